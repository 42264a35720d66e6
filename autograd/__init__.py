"""The engine: primitives with their gradients, a tape, recomputation. See tensor.py first, then ops.py and
nn_ops.py.
"""

if __name__ != "refimpl.autograd":
    raise ImportError(f"this folder is the package refimpl.autograd, not {__name__}; see pyproject.toml")

from . import attention_op, expert_ops, nn_ops, operators, ops
from .errors import SpecError, require, where
from .gradcheck import directional
from .memory import keep_freed
from .recompute import discard, recompute
from .tensor import Array, Gradients, Parameter, Tensor, backward, data_of, primitive

__all__ = [
    "Array",
    "Gradients",
    "Parameter",
    "SpecError",
    "Tensor",
    "attention_op",
    "backward",
    "data_of",
    "directional",
    "discard",
    "expert_ops",
    "nn_ops",
    "ops",
    "primitive",
    "recompute",
    "require",
    "where",
]

operators.install()
keep_freed()
