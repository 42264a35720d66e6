"""Do a checkpoint's names and shapes match the model's, and are its numbers finite?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl.autograd.errors import SpecError

from .mapping import Checkpoint
from .names import SCALE, is_mtp_copy, layer_of, near
from .safetensors import Array
from .sources import same_bits

Shape = tuple[int, ...]
_SUGGESTIONS = 8  # near names are searched for the first few missing ones only
_CHUNK = 1 << 22  # elements examined at a time


@dataclass(frozen=True)
class Report:
    """What `check` found. `nan` stays empty until `scan_nonfinite` has read the data."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]  # name -> (found, expected)
    dtypes: Mapping[str, tuple[int, int]]  # dtype -> (tensors, bytes), scales included
    mtp_copies: tuple[str, ...]  # MTP's copies of embedding and head: allowed, never required
    suggestions: Mapping[str, str]  # missing name -> extra name like it
    nan: Mapping[str, int] = field(default_factory=dict)  # name -> NaN or Inf elements

    @property
    def ok(self) -> bool:
        """Every expected tensor is there with its shape, and nothing else, and nothing known to be
        NaN.
        """
        return not (self.missing or self.extra or self.misshapen or self.nan)

    def lines(self, most: int = 10) -> list[str]:
        """One line per flaw, at most `most` of a kind."""
        hint = {m: f"; did you mean {e}?" for m, e in self.suggestions.items()}
        kinds: list[list[str]] = [
            [f"missing    {name}{hint.get(name, '')}" for name in self.missing],
            [f"extra      {name}" for name in self.extra],
            [f"misshapen  {n}: shape {a}, expected {b}" for n, (a, b) in self.misshapen.items()],
            [f"not finite {name}: {count} elements" for name, count in self.nan.items()],
        ]
        return [line for kind in kinds for line in _at_most(kind, most)]

    def demand(self) -> None:
        """Raise SpecError with the list of flaws unless `ok`."""
        if not self.ok:
            raise SpecError("the checkpoint does not fit the model:\n" + "\n".join(self.lines()))


def _at_most(lines: list[str], most: int) -> list[str]:
    return lines[:most] + ([f"... and {len(lines) - most} more"] if len(lines) > most else [])


def check(expected: Mapping[str, Shape], ckpt: Checkpoint) -> Report:
    """Compare names both ways and shapes with the model's. Reads no data."""
    layers = 1 + max((layer for n in expected if (layer := _main_layer(n, expected)) is not None), default=-1)
    copies = tuple(n for n in ckpt if is_mtp_copy(n, layers))
    missing = tuple(n for n in expected if n not in ckpt and not is_mtp_copy(n, layers))
    extra = tuple(n for n in ckpt if n not in expected and n not in copies)
    shapes = {n: (ckpt.shape(n), tuple(expected[n])) for n in expected if n in ckpt} | _scale_shapes(ckpt)
    suggestions = {m: other for m in missing[:_SUGGESTIONS] if (other := near(m, extra))}
    return Report(
        missing=missing,
        extra=extra,
        misshapen={n: pair for n, pair in shapes.items() if pair[0] != pair[1]},
        dtypes=count_dtypes(ckpt),
        mtp_copies=copies,
        suggestions=suggestions,
    )


def _scale_shapes(ckpt: Checkpoint) -> dict[str, tuple[Shape, Shape]]:
    """Scale's name -> (its shape, one entry per block of its weight)."""
    shapes = {}
    for name in ckpt:
        scale = ckpt.scale(name)
        if scale is not None:
            grid = tuple(-(-n // b) for n, b in zip(ckpt.shape(name), ckpt.block, strict=False))
            shapes[name + SCALE] = (scale.shape, grid)
    return shapes


def _main_layer(name: str, expected: Mapping[str, Shape]) -> int | None:
    """The layer a name belongs to, None for MTP layers, which are those with an eh_proj."""
    layer = layer_of(name)
    return None if layer is None or f"model.layers.{layer}.eh_proj.weight" in expected else layer


def count_dtypes(ckpt: Checkpoint) -> dict[str, tuple[int, int]]:
    """Stored dtype -> (number of tensors, bytes), scales included; the most bytes first."""
    tensors: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name in ckpt:
        tensors[ckpt.dtype(name)] += 1
        size[ckpt.dtype(name)] += ckpt.nbytes(name)
        scale = ckpt.scale(name)
        if scale is not None:
            tensors[scale.dtype] += 1
            size[scale.dtype] += scale.nbytes
    return {dtype: (tensors[dtype], nbytes) for dtype, nbytes in size.most_common()}


def scan_nonfinite(ckpt: Checkpoint, progress: Callable[[int, int, str], None] | None = None) -> dict[str, int]:
    """name -> number of NaN or Inf elements, for the tensors that have any. Reads every byte once.

    FP8 weights are judged by their codes; a scale that is NaN, Inf, zero or negative counts under
    its own name. progress(tensors done, tensors in all, name) is called before each tensor.
    """
    found: dict[str, int] = {}
    for done, name in enumerate(ckpt):
        if progress:
            progress(done, len(ckpt), name)
        codes, scales = ckpt.raw(name)
        counts = {name: _count_nonfinite(codes), name + SCALE: _count_bad_scales(scales)}
        found |= {n: count for n, count in counts.items() if count}
    return found


def _count_nonfinite(a: Array) -> int:
    if a.dtype.kind in "iub":
        return 0
    return sum(int(np.count_nonzero(~np.isfinite(chunk))) for chunk in _chunks(a))


def _count_bad_scales(scales: Array | None) -> int:
    if scales is None:
        return 0
    s = scales.astype(np.float32)
    return int(np.count_nonzero(~(np.isfinite(s) & (s > 0))))


def _chunks(a: Array) -> Iterator[Array]:
    flat = a.reshape(-1)  # a view: stored tensors are contiguous
    return (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))


def copies_that_differ(ckpt: Checkpoint, num_hidden_layers: int) -> list[str]:
    """MTP's embed_tokens and shared_head.head that are not bit for bit the main model's. Reads
    those tensors.
    """
    main = {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "shared_head.head.weight": "lm_head.weight",
    }
    differing = []
    for name in (n for n in ckpt if is_mtp_copy(n, num_hidden_layers)):
        original = main[name.split(".", 3)[3]]
        same = original in ckpt and same_bits(ckpt.raw(name)[0], ckpt.raw(original)[0])
        differing += [] if same else [name]
    return differing
