"""Which other tensor of the case lies in a tensor's place: another expert's, another layer's, gate for up.

A tensor is known by some of its numbers, evenly spread; they are gathered when first asked for, and kept instead of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Array
from refimpl.checkpoint.names import expert_of, layer_of

_SAMPLES = 256
_PAIRS = (
    ("gate_proj", "up_proj"),
    ("q_a_layernorm", "kv_a_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
)


class Kin:
    """The case's tensors by shape."""

    def __init__(self, checkpoint: Checkpoint | Mapping[str, Array]) -> None:
        self._checkpoint = checkpoint
        self._known: dict[tuple[int, ...], tuple[list[str], Array]] = {}

    def nearest(self, name: str, theirs: Array) -> str:
        """The name of the case's tensor of this shape, `name` apart, that theirs is nearest to; "" if none is near."""
        names, samples = self._of(theirs.shape)
        seen = _sample(theirs)
        size = np.sqrt(np.square(samples).sum(axis=1))
        with np.errstate(all="ignore"):
            off = np.sqrt(np.square(samples - seen).sum(axis=1)) / size
        order = [i for i in np.argsort(off, kind="stable") if names[i] != name]
        return names[order[0]] if order and off[order[0]] < 0.5 else ""

    def _of(self, shape: tuple[int, ...]) -> tuple[list[str], Array]:
        if shape not in self._known:
            ckpt = self._checkpoint
            if isinstance(ckpt, Checkpoint):
                names = [n for n in ckpt if ckpt.shape(n) == shape and not ckpt.unscaled(n)]
            else:
                names = [n for n in ckpt if ckpt[n].shape == shape]
            samples = [_sample(np.asarray(ckpt[n])) for n in names]
            self._known[shape] = names, np.array(samples, np.float32).reshape(len(names), -1)
        return self._known[shape]


def _sample(x: Array) -> Array:
    flat = x.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLES)].astype(np.float32)


def kinship(name: str, source: str, *, exchanged: bool) -> str:
    """How the tensor that lies there is related to the one that should; exchanged: where it belongs lies this one."""
    if _without_layer(name) == _without_layer(source):
        return f"a copy of layer {layer_of(source)}'s"
    if re.sub(r"\.experts\.\d+\.", ".experts.", name) == re.sub(r"\.experts\.\d+\.", ".experts.", source):
        return f"expert {expert_of(source)}'s"
    for a, b in _PAIRS:
        if name.replace(a, "|").replace(b, "|") == source.replace(a, "|").replace(b, "|"):
            here, there = (a, b) if a in name else (b, a)
            return f"{a} and {b} exchanged" if exchanged else f"{there} instead of {here}"
    return f"{source} instead"


def _without_layer(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.", name)


def order_of(order: list[int], groups: int) -> str:
    """A permutation in words: shifted by so many, whole groups moved, or from where each comes."""
    n = len(order)
    shift = order[0]
    if order == [(i + shift) % n for i in range(n)]:
        return f"shifted by {shift}"
    size = n // groups if groups and n % groups == 0 else 0
    if size and all(order[i] % size == i % size and order[i] // size == order[i - i % size] // size for i in range(n)):
        return f"moved in whole groups: {' '.join(str(order[i] // size) for i in range(0, n, size))}"
    shown = " ".join(map(str, order[:16]))
    return f"permuted: {shown}{' ...' if n > 16 else ''}"
