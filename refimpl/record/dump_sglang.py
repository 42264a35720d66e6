"""The folder of SGLang's dumper: one file a tensor, tags in its name: `step=0___rank=0___dump_index=7___name=...___layer_id=3.pt`.

`non_intrusive__PATH.output` and `.inputs.0` are modules' results and arguments (DUMPER_NON_INTRUSIVE_MODE=all); what was dumped
as `dumper.dump("attn_out", x, layer_id=3)` is the tap of that name. A .pt file is read by torch's restricted reader, which takes
tensors and plain containers and runs no code; a .safetensors file of the same name, holding `value`, needs no torch.

All ranks write into the one folder. Beside `value` a .pt file holds `meta`, with its rank's place in `sglang_parallel_info` (a
.safetensors file as JSON in its metadata); where there is none, ranks are taken for tensor-parallel ones in their order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import safetensors
from refimpl.diff import Case
from refimpl.layers.stage import STAGES

from .candidate import library
from .dump import Dump
from .tapmap import Part
from .tensor_parallel import How, how_of, how_of_tap, together
from .watch import array

_HOOK = "non_intrusive__"
_STEP = ("step", "forward_pass_id")
"""The tag that counts forward passes, today's name and the one of 2025."""


@dataclass(frozen=True)
class _File:
    path: Path
    tags: dict[str, str]

    @property
    def step(self) -> int:
        found = next((self.tags[t] for t in _STEP if self.tags.get(t, "").isdigit()), "0")
        return int(found)

    @property
    def rank(self) -> int:
        return int(self.tags["rank"]) if self.tags.get("rank", "").isdigit() else 0


Named = dict[str, list[_File]]
"""Name -> one rank's files of that name, in the order in which they were dumped."""


def fits(path: Path) -> bool:
    """Whether it is a folder with files of that kind."""
    return path.is_dir() and bool(_files(path))


def open_dump(path: Path, case: Case) -> Dump:
    """The first forward pass in the folder, tensor-parallel ranks put together. SpecError for ranks that are not these alone."""
    files = _files(path)
    first = min(f.step for f in files)
    ranks = _in_order([_by_name([f for f in files if f.step == first and f.rank == k]) for k in _numbers(files)])
    notes, taps = list[str](), {s.tap for s in STAGES.values()}
    found, *others = [_of_rank(_Parts(ranks, k, notes), taps) for k in range(len(ranks))]
    if "input_ids" in ranks[0]:
        found.tokens = _value(ranks[0]["input_ids"][0].path)
    known = taps | {"input_ids", "positions"}
    other = sorted(n for n in ranks[0] if not n.startswith(_HOOK) and n not in known)
    found.replicas, found.notes = others, notes
    notes += [f"not used, as no tap is called so: {', '.join(other)}"] if other else []
    notes += [f"of several forward passes the first, {first}"] if len({f.step for f in files}) > 1 else []
    notes += [f"{len(ranks)} tensor-parallel ranks put together"] if others else []
    return found


def _of_rank(parts: _Parts, taps: set[str]) -> Dump:
    """The dump as one rank sees it."""
    dump, mine = Dump(parts.find), parts.ranks[parts.rank]
    for name in [name for name in mine if name in taps]:
        for i, f in enumerate(mine[name]):
            unit = f"L{f.tags['layer_id']}/" if "layer_id" in f.tags else ""
            dump.named.setdefault(f"fwd/{unit}{name}", parts.tap(name, i))
    return dump


def _numbers(files: list[_File]) -> list[int]:
    """The ranks that there are. SpecError if one is missing."""
    numbers = sorted({f.rank for f in files})
    told = ", ".join(map(str, numbers))
    require(
        numbers == list(range(len(numbers))) or len(numbers) == 1, f"it holds tensors of ranks {told}: one is missing"
    )
    return numbers


def _by_name(files: list[_File]) -> Named:
    found: Named = {}
    for f in sorted(files, key=lambda f: int(f.tags.get("dump_index", "0"))):
        found.setdefault(f.tags["name"], []).append(f)
    return found


def _in_order(ranks: list[Named]) -> list[Named]:
    """Ranks by their place among the tensor-parallel ones. SpecError where there are ranks of another kind."""
    if len(ranks) == 1:
        return ranks
    told = [_parallel_info(next(iter(r.values()))[0].path) if r else {} for r in ranks]
    for axis in ("pp", "attn_dp", "dp", "cp"):
        size = next((n for info in told if (n := info.get(f"{axis}_size", 1)) != 1), 1)
        require(size == 1, f"it is of {axis} {size}: ranks of tensor parallelism alone can be put together")
    places = [info.get("tp_rank", i) for i, info in enumerate(told)]
    sizes = [info.get("tp_size", len(ranks)) for info in told]
    numbers = all(type(n) is int for n in (*places, *sizes))
    whole = numbers and set(sizes) == {len(ranks)} and sorted(places) == list(range(len(ranks)))
    require(whole, f"its ranks are at tp {places} of {sizes}: some are missing, or of another kind")
    return [ranks[places.index(i)] for i in range(len(ranks))]


class _Parts:
    """What all ranks hold of a tensor, put together; where they should hold the same and do not, what this rank has."""

    def __init__(self, ranks: list[Named], rank: int, notes: list[str]) -> None:
        self.ranks, self.rank, self.notes = ranks, rank, notes

    def find(self, part: Part) -> Array | None:
        """The tensor that a part of a tap map names."""
        places = [f"{_HOOK}{name}" for name in _spelled(part)] if not part.function else []
        name = next((n for n in places if n in self.ranks[self.rank]), "")
        return self._joined(name, part.nth - 1, how_of(part), -1) if name else None

    def tap(self, name: str, i: int) -> Array:
        """The i-th tensor that was dumped under a tap's name; this rank's if others have not dumped it."""
        how, axis = how_of_tap(name)
        found = self._joined(name, i, how, axis)
        return _value(self.ranks[self.rank][name][i].path) if found is None else found

    def _joined(self, name: str, i: int, how: How, axis: int) -> Array | None:
        held = [_value(r[name][i].path) for r in self.ranks if len(r.get(name, [])) > i]
        if len(held) < len(self.ranks):
            told = f"{name} was dumped by {len(held)} of {len(self.ranks)} ranks"
            self.notes += [told] if held and told not in self.notes else []
            return None
        with where(f"in {name}"):
            whole, made = together(held, how, axis)
        return held[self.rank] if made == "replicas" else whole


def _parallel_info(path: Path) -> dict[str, Any]:
    """What a file says of its rank's place, {} if nothing."""
    told = _content(path)[1].get("sglang_parallel_info")
    return told if isinstance(told, dict) else {}


def _spelled(part: Part) -> list[str]:
    """How a part may be called: a single tensor among results, as with (output, None), has no number."""
    side = f"inputs.{part.arg}" if part.input else "output"
    numbered = [f"{part.path}.{side}.{part.item}"] if part.item else []
    return numbered + ([f"{part.path}.{side}"] if part.item in ("", "0") else [])


def _files(path: Path) -> list[_File]:
    found = []
    for f in sorted(path.iterdir()):
        if f.suffix in (".pt", ".safetensors") and "name=" in f.stem:
            found.append(_File(f, dict(tag.partition("=")[::2] for tag in f.stem.split("___"))))
    return [f for f in found if "name" in f.tags]


def _value(path: Path) -> Array:
    return _content(path)[0]


def _table(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    require(isinstance(found, dict), "`meta` is no JSON object")
    assert isinstance(found, dict)
    return found


def _content(path: Path) -> tuple[Array, dict[str, Any]]:
    """A file's tensor, and what was written beside it."""
    if path.suffix == ".safetensors":
        file = safetensors.open_file(path)
        with where(f"in the metadata of {path.name}"):
            return np.array(file["value"]), _table(file.metadata.get("meta", "{}"))
    torch = library("torch", "torch")
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    require(
        version >= (2, 6),
        f"torch {torch.__version__}: its restricted reader of .pt files is safe from 2.6 on (CVE-2025-32434)",
    )
    try:
        x: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        way_out = "save the tensor alone, torch.save(tensor, path), or as .safetensors under the key `value`"
        reason = str(error).splitlines()[0].partition(". ")[0]  # without torch's advice, to read it unrestrictedly
        raise SpecError(f"{path.name} holds more than tensors: {way_out} ({reason})") from None
    both = isinstance(x, dict) and "value" in x
    meta = x.get("meta") if both else None
    return array(x["value"] if both else x), meta if isinstance(meta, dict) else {}
