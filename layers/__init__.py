"""DeepSeek-V3 as stages. Reading order: stage, config, common, rope, mla, router, moe, block, mtp, loss, precision."""

if __name__ != "refimpl.layers":
    raise ImportError(f"this folder is the package refimpl.layers, not {__name__}; see pyproject.toml")

from . import (
    block,
    common,
    config,
    loss,
    mla,
    moe,
    mtp,
    neighbours,
    numerics,
    precision,
    presets,
    rope,
    router,
    stage,
    variants,
)
from .config import Config, Dialect
from .presets import PRESETS
from .stage import STAGES, Recorder, Stage, observing

__all__ = [
    "PRESETS",
    "STAGES",
    "Config",
    "Dialect",
    "Recorder",
    "Stage",
    "block",
    "common",
    "config",
    "loss",
    "mla",
    "moe",
    "mtp",
    "neighbours",
    "numerics",
    "observing",
    "precision",
    "presets",
    "rope",
    "router",
    "stage",
    "variants",
]
