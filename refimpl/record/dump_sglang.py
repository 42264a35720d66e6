"""The folder of SGLang's dumper: one file a tensor, tags in its name: `step=0___rank=0___dump_index=7___name=...___layer_id=3.pt`.

`non_intrusive__PATH.output` and `.inputs.0` are modules' results and arguments (DUMPER_NON_INTRUSIVE_MODE=all); what was dumped
as `dumper.dump("attn_out", x, layer_id=3)` is the tap of that name. A .pt file is read by torch's restricted reader, which takes
tensors and plain containers and runs no code; a .safetensors file of the same name, holding `value`, needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import safetensors
from refimpl.diff import Case
from refimpl.layers.stage import STAGES

from .candidate import library
from .dump import Dump
from .tapmap import Part
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


def fits(path: Path) -> bool:
    """Whether it is a folder with files of that kind."""
    return path.is_dir() and bool(_files(path))


def open_dump(path: Path, case: Case) -> Dump:
    """The first forward pass in the folder. SpecError for tensors that are spread over ranks."""
    files = _files(path)
    ranks = sorted({f.tags.get("rank", "0") for f in files})
    require(
        len(ranks) == 1,
        f"it holds tensors of ranks {', '.join(ranks)}, which may be parts: run on one rank, or merge them",
    )
    first = min(f.step for f in files)
    byname: dict[str, list[_File]] = {}
    for f in sorted((f for f in files if f.step == first), key=lambda f: int(f.tags.get("dump_index", "0"))):
        byname.setdefault(f.tags["name"], []).append(f)

    def find(part: Part) -> Array | None:
        places = [f"{_HOOK}{name}" for name in _spelled(part)] if not part.function else []
        found = next((byname[name] for name in places if name in byname), [])
        return _value(found[part.nth - 1].path) if len(found) >= part.nth else None

    dump, taps = Dump(find), {s.tap for s in STAGES.values()}
    for f in [f for name, same in byname.items() if name in taps for f in same]:
        unit = f"L{f.tags['layer_id']}/" if "layer_id" in f.tags else ""
        dump.named.setdefault(f"fwd/{unit}{f.tags['name']}", _value(f.path))
    if "input_ids" in byname:
        dump.tokens = _value(byname["input_ids"][0].path)
    known = taps | {"input_ids", "positions"}
    other = sorted(n for n in byname if not n.startswith(_HOOK) and n not in known)
    dump.notes += [f"not used, as no tap is called so: {', '.join(other)}"] if other else []
    dump.notes += [f"of several forward passes the first, {first}"] if len({f.step for f in files}) > 1 else []
    return dump


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
    if path.suffix == ".safetensors":
        return np.array(safetensors.open_file(path)["value"])
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
        raise SpecError(f"{path.name} holds more than tensors: {way_out} ({str(error).splitlines()[0]})") from None
    return array(x["value"] if isinstance(x, dict) and "value" in x else x)
