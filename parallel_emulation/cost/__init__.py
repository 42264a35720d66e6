"""What it costs: bytes per link, memory, time and money of a job on a cluster, beside what DeepSeek has published."""

from .cluster import Cluster, Link, Traffic
from .layer_cost import kv_cache_bytes
from .plan import Job, Plan
from .plan_text import against_published, render
from .scale import total_cost, total_hours

__all__ = [
    "Cluster",
    "Job",
    "Link",
    "Plan",
    "Traffic",
    "against_published",
    "kv_cache_bytes",
    "render",
    "total_cost",
    "total_hours",
]
