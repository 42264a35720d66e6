"""Names of another framework turned into the checkpoint's, by a table of patterns: what matches none keeps its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from refimpl.autograd.errors import require
from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Array, Part, Stored

Rules = Mapping[str, tuple[str, ...]]
"""Pattern of a name -> the checkpoint's names, with {0}, {1}, ... for its groups. Several: the tensor's equal parts one below the
other. A name with {e} is a name for each matrix of a stack.
"""


def renamed(ckpt: Checkpoint, rules: Rules) -> dict[str, Part]:
    """Checkpoint name -> part, for every tensor."""
    found: dict[str, Part] = {}
    for name in ckpt:
        for to, part in _restored(ckpt, name, rules).items():
            require(to not in found, f"{name} of {ckpt.path} is a second {to}")
            found[to] = part
    return found


def target(name: str, rules: Rules) -> tuple[str, ...]:
    """The checkpoint's names for a name; the name itself if no rule matches."""
    for pattern, to in rules.items():
        if m := re.fullmatch(pattern, name):
            given = [g for g in m.groups() if g is not None]
            return tuple(t.format(*given, e="{e}") for t in to)
    return (name,)


def _restored(ckpt: Checkpoint, name: str, rules: Rules) -> dict[str, Part]:
    to, shape, stored = target(name, rules), ckpt.shape(name), (Stored(ckpt.dtype(name), block=ckpt.block),)
    places: dict[str, tuple[int | slice, ...]]
    if "{e}" in to[0]:
        require(len(shape) == 3, f"{name} of {ckpt.path} has shape {shape}; expected a stack of matrices")
        places = {to[0].format(e=e): (e, slice(None)) for e in range(shape[0])}
        shape = shape[1:]
    else:
        require(shape and shape[0] % len(to) == 0, f"{name} of {ckpt.path}: {shape} does not come apart in {len(to)}")
        rows = shape[0] // len(to)
        places = {t: (slice(i * rows, (i + 1) * rows),) for i, t in enumerate(to)}
        shape = (rows, *shape[1:])
    return {t: Part(shape, stored, partial(_read, ckpt, name, place)) for t, place in places.items()}


def _read(ckpt: Checkpoint, name: str, place: tuple[int | slice, ...]) -> Array:
    x: Array = ckpt[name][place]
    return x
