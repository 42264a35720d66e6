"""What other implementations call our taps, and what a tap of an unknown name may be."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.model.phases import is_part

_LAYER = re.compile(r"(?:^|[./_-])(?:layers?|blk|h|block|L)?[./_-]?(\d+)(?=$|[./_-])")
_AGREE = 0.2
"""Two taps that differ by less than this share are the same quantity: bfloat16 drifts less through a few layers, others differ
by their whole size."""


@dataclass(frozen=True)
class Framework:
    """Where an implementation shows which tap: places that `refimpl record` reads (refimpl/record/tapmap.py), and `words` for
    what only a person can find. `package` and `tested`: of which versions the places are true, none if nobody has run them;
    `trial`: what else was done to find out.
    """

    key: str
    name: str
    taps: dict[str, str]
    version: str = ""
    note: str = ""
    package: str = ""
    tested: list[str] = field(default_factory=list)
    trial: str = ""
    layer: str = ""
    build: str = ""
    layouts: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def says(self, tap: str) -> str:
        """Where the tap is, in words; "" if nowhere."""
        return self.taps.get(tap, "") or self.words.get(tap, "")


@cache
def frameworks() -> tuple[Framework, ...]:
    """Those of elsewhere/*.toml: transformers, then the others in the order of their names."""
    files = [f for f in (resources.files(__package__) / "elsewhere").iterdir() if f.name.endswith(".toml")]
    found = [Framework(key=f.name.removesuffix(".toml"), **tomllib.loads(f.read_text(encoding="utf-8"))) for f in files]
    return tuple(sorted(found, key=lambda f: (f.key != "transformers", f.name.lower())))


def shipped(key: str) -> str:
    """The text of one of elsewhere/*.toml."""
    return (resources.files(__package__) / "elsewhere" / f"{key}.toml").read_text(encoding="utf-8")


def unit_of(name: str) -> str:
    """The unit that a name seems to be of: `fwd/L3` for `model.layers.3.mlp`; "" where it tells none."""
    phase, slash, rest = name.partition("/")
    told = bool(slash) and is_part(phase)
    layer = _LAYER.search(rest if told else name)
    return f"{phase if told else 'fwd'}/L{layer[1]}" if layer else ""


def by_name(name: str, ours: list[str]) -> str:
    """The tap that a name means, with whose name it is, or the nearest of our own names of that layer; "" if nothing is near.

    `model.layers.3.self_attn.q_b_proj` -> `fwd/L3/mla.q (as mlx-lm calls it)`.
    """
    known = set(ours)
    layer = _LAYER.search(name)
    layer_of = f"/L{layer[1]}/" if layer else "/"
    unit = f"fwd{layer_of}"
    whole = name.removesuffix(".weight") if layer is None else name[: layer.start(1)] + "i" + name[layer.end(1) :]
    spellings = {whole, re.sub(r"^(model|decoder|transformer)\.", "", whole)}
    spellings |= {re.sub(r"^(layers|blk|h)\.i\.", "", s) for s in spellings}
    for framework in frameworks():
        for tap, entry in {**framework.words, **framework.taps}.items():
            firsts = {re.split(r"[ ;(,[]", p)[0] for p in entry.split(" | ") if not p.startswith("input")}
            said = (firsts | {re.sub(r"^(model|decoder)\.", "", f) for f in firsts}) & spellings
            if said and unit + tap in known:
                return f"{unit}{tap} (as {framework.name} calls it)"
    near = difflib.get_close_matches(name, [tap for tap in ours if layer_of in tap], n=1, cutoff=0.6)
    return near[0] if near else ""


def by_value(unknown: Mapping[str, Array], ours: Array) -> Iterator[tuple[str, float]]:
    """(name, distance) of the arrays that hold what our own run has at a tap, as far as a recording in bfloat16 can: relative, or
    of ids the share that is other.
    """
    if ours.dtype.kind in "iu" and ours.ndim > 2:
        for name, x in unknown.items():
            if x.size == ours.size and x.dtype.kind in "iu":
                away = float((np.sort(x.reshape(ours.shape), axis=-1) != np.sort(ours, axis=-1)).mean())
                if away < _AGREE:
                    yield name, away
    if ours.dtype.kind != "f" or ours.ndim < 2:
        return
    size = float(np.linalg.norm(np.where(np.isfinite(ours), ours, 0)))
    for name, x in unknown.items():
        if x.size == ours.size and x.dtype.kind not in "iub" and size > 0:
            difference = x.astype(np.float32).reshape(ours.shape) - ours
            away = float(np.linalg.norm(np.where(np.isfinite(difference), difference, 0))) / size
            if away < _AGREE:
                yield name, away
