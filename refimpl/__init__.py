"""An executable specification of DeepSeek-V3. Names are imported when first used, so `import refimpl` costs nothing."""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refimpl.autograd import Parameter, SpecError, Tensor, backward
    from refimpl.checkpoint import Checkpoint
    from refimpl.layers import PRESETS, STAGES, Config, Dialect, Recorder, observing
    from refimpl.model import Cache, ForCausalLM, Impl
    from refimpl.version import __version__ as __version__

_here = pathlib.Path(__file__).resolve().parent
if not (_here / "layers").is_dir():  # a bare clone: the sub-packages are this folder's siblings (see pyproject.toml)
    __path__.append(str(_here.parent))

_HOME = {
    "Cache": "refimpl.model",
    "Checkpoint": "refimpl.checkpoint",
    "Config": "refimpl.layers",
    "Dialect": "refimpl.layers",
    "ForCausalLM": "refimpl.model",
    "Impl": "refimpl.model",
    "PRESETS": "refimpl.layers",
    "Parameter": "refimpl.autograd",
    "Recorder": "refimpl.layers",
    "STAGES": "refimpl.layers",
    "SpecError": "refimpl.autograd",
    "Tensor": "refimpl.autograd",
    "__version__": "refimpl.version",
    "backward": "refimpl.autograd",
    "observing": "refimpl.layers",
}

__all__ = [
    "PRESETS",
    "STAGES",
    "Cache",
    "Checkpoint",
    "Config",
    "Dialect",
    "ForCausalLM",
    "Impl",
    "Parameter",
    "Recorder",
    "SpecError",
    "Tensor",
    "backward",
    "observing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
