"""What DeepSeek has published about running V3, with its source; the models are fitted to some and checked on more.

R = technical report (arXiv 2412.19437); HW = "Insights into DeepSeek-V3" (arXiv 2505.09343); EP = DeepEP dd758ca, its
first generation; PD = profile-data 4496024, `train.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Training:
    """The pre-training run and its steady state on 2048 H800 (R 1, R 4.2, HW tables 2 and 4)."""

    gpus: int = 2048
    pipeline: int = 16
    expert_parallel: int = 64
    sequence: int = 4096
    sequences_per_step: int = 15360
    step_s: float = 19.926
    optimizer_s: float = 0.29
    tokens_per_day: float = 272.80e9
    flops_per_token: float = 250e9  # causal
    causal_tflops: float = 385.0
    peak_tflops: float = 989.0
    gpu_hours_per_trillion: float = 180e3
    trillions: float = 14.8
    pretraining_hours: float = 2664e3
    extension_hours: float = 119e3
    post_training_hours: float = 5e3
    dollars_per_hour: float = 2.0


TRAINING = Training()

TRACE_US: Mapping[str, float] = MappingProxyType(
    {
        "attention F": 4363.0,
        "mlp F": 4604.0,
        "attention I": 9341.0,
        "mlp I": 5306.0,
        "mlp W": 3540.0,
        "attention W": 2388.0,
    }
)
"""Kernel time of one MoE layer on the compute stream, 4096 tokens, EP 64 (PD); I backward for input, W for weights."""

TRACE_PAIR_US = 129.0e3
"""One forward and one backward of four MoE layers executed together (PD)."""

NORMAL_GBS: Mapping[int, tuple[float, float]] = MappingProxyType(
    {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50), 128: (45.34, 41.6)}
)
"""EP size -> GB/s of dispatch and combine, normal kernels, 4096 tokens (EP; 128: HW figure 7)."""

LOW_LATENCY_US: Mapping[int, tuple[float, float]] = MappingProxyType(
    {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
)
"""EP size -> microseconds of dispatch and combine, low-latency kernels, 128 tokens, top 8, hidden 7168 (EP)."""

KV_BYTES_PER_TOKEN = 70_272
"""576 values of 2 bytes in each of 61 layers."""
