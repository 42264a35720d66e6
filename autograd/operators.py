"""Tensor's operators and array methods, by name, so that `x * w + b` reads the same for arrays and Tensors."""

from __future__ import annotations

from typing import Any

from . import ops
from .tensor import Tensor


def install() -> None:
    """Give the class its operators; called once, when the package is imported."""

    def method(name: str, fn: Any) -> None:
        setattr(Tensor, name, fn)

    for name, op in (
        ("add", ops.add),
        ("sub", ops.sub),
        ("mul", ops.mul),
        ("truediv", ops.div),
        ("matmul", ops.matmul),
    ):
        method(f"__{name}__", op)
        method(f"__r{name}__", lambda self, other, op=op: op(other, self))
    method("__neg__", ops.neg)
    method("__pow__", lambda self, p: ops.power(self, p=p))
    method("__getitem__", lambda self, index: ops.getitem(self, index=index))
    method("reshape", lambda self, *shape: ops.reshape(self, shape=_flat(shape)))
    method("transpose", lambda self, *axes: ops.transpose(self, axes=_flat(axes) or None))
    method("swapaxes", ops.swapaxes)
    method("sum", lambda self, axis=None, keepdims=False: ops.sum(self, axis=axis, keepdims=keepdims))
    method("mean", lambda self, axis=None, keepdims=False: ops.mean(self, axis=axis, keepdims=keepdims))
    method("astype", lambda self, dtype: ops.cast(self, dtype=dtype))
    Tensor.T = property(ops.transpose)  # type: ignore[attr-defined]


def _flat(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args
