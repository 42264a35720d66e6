"""A module is the address of its weights: attribute path = Hugging Face checkpoint key. The maths is in the stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Tensor

BUFFERS = ("e_score_correction_bias",)
"""Last parts of names that a checkpoint holds but no gradient trains."""


def is_buffer(name: str) -> bool:
    """Whether the weight of this checkpoint name is a buffer: stored, not trained by gradient."""
    return name.endswith(BUFFERS)


@dataclass(frozen=True)
class Unset:
    """A declared weight that holds nothing yet: its shape, and whether a checkpoint may leave it out."""

    shape: tuple[int, ...]
    optional: bool = False


class Module:
    """Weights and sub-modules as attributes, in the order of their definition. `__call__` never writes to self."""

    def named_weights(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """(checkpoint name, array or Tensor or Unset) of every weight below."""
        for key, value in vars(self).items():
            if isinstance(value, Module):
                yield from value.named_weights(f"{prefix}{key}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from item.named_weights(f"{prefix}{key}.{i}.")
            elif isinstance(value, Unset | Tensor) or hasattr(value, "dtype"):
                yield prefix + key, value

    def map(self, fn: Callable[[str, Any], Any], prefix: str = "") -> Self:
        """A copy of the tree whose weights are fn(name, weight): other values, dtypes, or Tensors instead of arrays."""
        new = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Module):
                setattr(new, key, value.map(fn, f"{prefix}{key}."))
            elif isinstance(value, list):
                setattr(new, key, [m.map(fn, f"{prefix}{key}.{i}.") for i, m in enumerate(value)])
            elif isinstance(value, Unset | Tensor) or hasattr(value, "dtype"):
                setattr(new, key, fn(prefix + key, value))
        return new

    def load(self, weights: Mapping[str, Any]) -> Self:
        """A copy that holds `weights`; names are checked both ways, shapes one by one (SpecError lists what is
        wrong).
        """
        declared = dict(self.named_weights())
        missing = [n for n, w in declared.items() if n not in weights and not w.optional]
        extra = [n for n in weights if n not in declared]
        require(not missing, f"{len(missing)} tensors missing: {_some(missing)}")
        require(not extra, f"{len(extra)} tensors that the model does not have: {_some(extra)}")
        return self.map(lambda name, unset: _fit(name, unset, weights) if name in weights else unset)


def _fit(name: str, unset: Any, weights: Mapping[str, Any]) -> Any:
    with where(f"while loading {name}"):
        array = weights[name]
        if tuple(array.shape) != tuple(unset.shape):
            raise SpecError(f"the checkpoint has shape {tuple(array.shape)}, the model {tuple(unset.shape)}")
        return array


def _some(names: list[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class Linear(Module):
    """y = x wT (+ b): weight (F, D), as torch.nn.Linear stores it; bias (F,) or None."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        self.weight: Any = Unset((d_out, d_in))
        self.bias: Any = Unset((d_out,)) if bias else None


class RMSNorm(Module):
    """weight (D,)."""

    def __init__(self, dim: int) -> None:
        self.weight: Any = Unset((dim,))


class Embedding(Module):
    """weight (V, D)."""

    def __init__(self, vocab: int, dim: int) -> None:
        self.weight: Any = Unset((vocab, dim))
