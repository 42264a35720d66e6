"""Models larger than memory: weights stay on disk, and what a token needs is read, decoded and multiplied by when it does."""

from .accounting import bytes_of, layer_bytes, pass_bytes
from .hot import Hot
from .layer import LayerRun, run_layer
from .loading import load_from_disk
from .shelf import Shelf
from .weights import DiskWeights

__all__ = [
    "DiskWeights",
    "Hot",
    "LayerRun",
    "Shelf",
    "bytes_of",
    "layer_bytes",
    "load_from_disk",
    "pass_bytes",
    "run_layer",
]
