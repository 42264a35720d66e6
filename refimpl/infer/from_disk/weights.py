"""A checkpoint's weights as a model takes them, of which the matrices stay on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint, Reader, Rows
from refimpl.checkpoint.names import layer_of
from refimpl.layers.numerics.formats import BF16, decode
from refimpl.layers.numerics.quantisation import dequantize_blocks
from refimpl.layers.precision import Plan
from refimpl.model import Streamed, effective
from refimpl.model.by_rows import rows_of_a_block

from .accounting import row_bytes
from .hot import Hot, Key
from .shelf import Shelf

CHUNK = 1 << 24
"""Bytes that are read at a time: a matrix of an expert of the released model is 14.7 million."""
AHEAD = CHUNK // 2
"""So many bytes may wait to be used before another chunk is read ahead."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LOOKED_UP = "embed_tokens.weight"
_TURN = (
    *("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj"),
    *("mlp.gate", "gate_proj", "up_proj", "down_proj"),
)
"""The matrices of a layer but for its experts, in the order in which it uses them."""


class DiskWeights(Mapping[str, Any]):
    """Checkpoint name -> the array, if it is a vector; a `Streamed` matrix otherwise, decoded from a chunk of rows as stored.

    Chunks come from a `Shelf`: a cache of `budget` bytes, and a thread that reads ahead inside `with`. Rows that are looked up
    are read alone. `bytes_read` counts everything that was read.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, *, budget: int = 0) -> None:
        require(budget >= 0, f"a cache of {budget} bytes; expected 0 or more")
        fits = f"precision {plan.name} quantises whole matrices again; weights are streamed in float32, float64 or bf16"
        require(not plan.gemms, fits)
        self.checkpoint, self.plan = checkpoint, plan
        self.reader = Reader(checkpoint)
        checkpoint.let_go()  # pages of the headers
        self.hot = Hot(budget)
        self.shelf = Shelf(self._chunk, self.hot, ahead=AHEAD)
        self._now: tuple[Key, Rows] | None = None  # the chunk that blocks are taken from
        self._pass: list[Key] = []

    @property
    def bytes_read(self) -> int:
        """So many bytes were read, vectors and scales included."""
        return self.reader.bytes_read

    def follow(self, names: Iterable[str]) -> None:
        """A pass uses these, layer after layer: what is read ahead. Experts are not, nor rows that are looked up, nor vectors."""
        ahead = [n for n in names if not _EXPERT.search(n) and not n.endswith(_LOOKED_UP)]
        matrices = [n for n in ahead if len(self.checkpoint.shape(n)) == 2]
        self._pass = [key for name in sorted(matrices, key=_turn) for key in self.keys_of(name)]

    def chosen(self, layer: int, ids: Array) -> None:
        """A router has decided: its experts' matrices come behind what the layer uses before them.  ids (B, S, K)"""
        prefix = f"model.layers.{layer}."
        names = [
            f"{prefix}mlp.experts.{e}.{proj}.weight"
            for proj in ("gate_proj", "up_proj", "down_proj")
            for e in np.unique(ids)
        ]
        self.shelf.insert([k for n in names for k in self.keys_of(n)], behind=lambda key: key[0].startswith(prefix))

    def keys_of(self, name: str) -> list[Key]:
        """The chunks of a matrix."""
        shape = self.checkpoint.shape(name)
        return [(name, a) for a in range(0, shape[0], self._height(name))]

    def read(self, name: str, plan: Plan, start: int, stop: int) -> Array:
        """Rows of a matrix as the plan holds them; SpecError for NaN, infinity and bad scales."""
        if name.endswith(_LOOKED_UP):
            return self._decoded(name, plan, self.reader.rows(name, start, stop), start, stop)
        height = self._height(name)
        first = start // height * height
        if stop > first + height:
            cut = first + height
            return np.concatenate([self.read(name, plan, start, cut), self.read(name, plan, cut, stop)])
        key = (name, first)
        if self._now is None or self._now[0] != key:
            if self._pass and key == self._pass[0]:
                self.shelf.begin(self._pass)
            self._now = None  # not two at a time
            self._now = key, self.shelf.get(key)
        return self._decoded(name, plan, self._now[1], start, stop)

    def __getitem__(self, name: str) -> Any:
        shape = self.checkpoint.shape(name)
        if len(shape) == 2:
            return Streamed(self, name, self.plan, shape)
        return self.reader.rows(name, 0, shape[0]).codes if len(shape) == 1 else self.checkpoint[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def __enter__(self) -> DiskWeights:
        self.shelf.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shelf.__exit__(kind, error, trace)

    def _chunk(self, key: Key) -> Rows:
        name, start = key
        return self.reader.rows(name, start, min(start + self._height(name), self.checkpoint.shape(name)[0]))

    def _height(self, name: str) -> int:
        """Rows of a chunk: whole blocks, at least one."""
        shape, row = self.checkpoint.shape(name), row_bytes(self.checkpoint, name)
        block = math.lcm(rows_of_a_block(shape), self.checkpoint.block[0])
        return block * max(CHUNK // (block * row), 1)

    def _decoded(self, name: str, plan: Plan, rows: Rows, start: int, stop: int) -> Array:
        with where(f"while loading {name} from {self.checkpoint.source(name).pieces[0].file.path}"):
            if rows.scales is None:
                codes = rows.codes[start - rows.start : stop - rows.start]
                return effective({name: decode(codes, BF16) if codes.dtype == BF16.dtype else codes}, plan)[name]
            high, a, b = self.checkpoint.block[0], start - rows.start, stop - rows.start
            first, last = a // high, -(-b // high)
            codes = rows.codes[first * high : b]
            _refuse_nan(codes)
            w = dequantize_blocks(codes, rows.scales[first:last], self.checkpoint.block)
            return plan.weight(name, w[a - first * high :])


def _turn(name: str) -> tuple[float, int]:
    """When a pass uses this matrix: its layer, its place there; what belongs to no layer is the head."""
    place = next((i for i, part in enumerate(_TURN) if name.endswith(f"{part}.weight")), len(_TURN))
    layer = layer_of(name)
    return math.inf if layer is None else layer, place


def _refuse_nan(codes: Array) -> None:
    """SpecError for codes that are NaN, of which E4M3 has two, 0x7f and 0xff, and E5M2 more, beside infinities."""
    first = 0x7F if codes.dtype.name == "float8_e4m3fn" else 0x7C
    if codes.view(np.int8).max(initial=0) >= first or codes.view(np.uint8).max(initial=0) >= 0x80 + first:
        size = codes.view(np.uint8) & 0x7F
        bad = np.argwhere(size >= first)
        raise SpecError(f"{len(bad)} codes are NaN or infinite, the first at {bad[0].tolist()}")
