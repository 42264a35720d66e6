"""Dumps that people already have, as traces: SGLang's dumper, transformers' model-addition debugger, llama.cpp's eval-callback.

Which of them a dump is, is seen by its files. A trace is made of the tensors that a tap map knows, and of those that are named
by tap. Pickles are code that reading would run: of .pt files torch's restricted reader takes the tensors, anything else is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Header, Trace, digest

from . import dump_eval_callback, dump_sglang, dump_transformers
from .candidate import Recorded, deliver
from .dump import Dump
from .tapmap import read
from .watch import Watch

_WAY_OUT = (
    "a pickle is a program, which reading it would run: load it where you trust it and write its arrays with refimpl_tap.py "
    "(`refimpl record tap-file`) or as .safetensors files"
)


@dataclass(frozen=True)
class Kind:
    """A kind of dump: how it is called, the map its names are read by, whether a path is one, how it is opened."""

    name: str
    map: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, Case], Dump]


KINDS = (
    Kind("SGLang's dumper", "sglang", dump_sglang.fits, dump_sglang.open_dump),
    Kind("transformers' model-addition debugger", "transformers", dump_transformers.fits, dump_transformers.open_dump),
    Kind("llama.cpp's eval-callback", "llama_cpp", dump_eval_callback.fits, dump_eval_callback.open_dump),
)


def record(case_dir: str | Path, out: str | Path, *, source: str | Path, map_name: str | None = None) -> Recorded:
    """Make a trace of a dump of this case's run. SpecError for what is none, for another run's, and for one that shows no tap."""
    case, path = Case.read(case_dir), Path(source)
    with where(f"while reading {path}"):
        kind = kind_of(path)
        made = _traces(case, kind, kind.open(path, case), map_name or kind.map)
        first, *_ = found = [deliver(trace, out) for trace in made]
        return replace(first, path=first.path.parent) if len(found) > 1 else first


def kind_of(path: Path) -> Kind:
    """What a path holds. SpecError, with the way out, for pickles and for what none of the kinds is."""
    require(path.exists(), "there is no such file or folder")
    found = next((k for k in KINDS if k.fits(path)), None)
    if found is None:
        files = [path] if path.is_file() else sorted(path.iterdir())
        pickles = [f.name for f in files if f.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz")]
        why = f"{pickles[0]}: {_WAY_OUT}" if pickles else "not a dump of " + ", ".join(k.name for k in KINDS)
        raise SpecError(why)
    return found


def _traces(case: Case, kind: Kind, dump: Dump, map_name: str) -> list[Trace]:
    """One trace; or one of every rank, if ranks do not agree on what all should hold: that is for the diff to judge."""
    first = _trace(case, kind, dump, map_name)
    others = [_trace(case, kind, d, map_name) for d in dump.replicas]
    apart = [_only(t, [n for n, x in t.taps.items() if not _same(x, first.taps.get(n))]) for t in others]
    if not any(t.taps for t in apart):
        return [first]
    n = len(others) + 1
    places = [{"rank": k, "ranks": n, "axes": {"tp": [k, n]}} for k in range(n)]
    return [
        Trace(replace(t.header, parallel=p, precision=first.header.precision), t.taps)
        for t, p in zip([first, *apart], places, strict=True)
    ]


def _only(trace: Trace, taps: list[str]) -> Trace:
    return Trace(replace(trace.header, expected=taps), {t: trace.taps[t] for t in taps})


def _same(x: Array, y: Array | None) -> bool:
    return y is not None and x.shape == y.shape and x.tobytes() == y.tobytes()


def _trace(case: Case, kind: Kind, dump: Dump, map_name: str) -> Trace:
    map_ = read(map_name)
    watch = Watch(map_, case)
    watch.fill(dump.find)
    _same_tokens(case, dump)
    taps, absent = watch.taps(), sorted({t.rpartition("/")[2] for t in watch.places})
    taps |= {t: x for t, x in dump.named.items() if t not in taps}
    require(taps, f"it shows no tap that the map {map_.key} knows; {'; '.join(dump.notes) or 'another map: --map'}")
    absent = [name for name in absent if not any(t.endswith(f"/{name}") for t in taps)]
    notes = [
        f"read from a dump of {kind.name}",
        "weights: those of the case's files, which the framework was given",
        *([f"the dump does not show {', '.join(absent)}"] if absent else []),
        *(n for n in watch.notes if "was not seen at" not in n),
        *dump.notes,
    ]
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=case.positions,
        producer={"name": map_.name, "version": "unknown"},
        weights={n: digest(w) for n, w in case.weights().items()},
        layouts=map_.layouts,
        dims={t: axes for t, axes in watch.axes.items() if t in taps},
        expected=sorted(taps),
        precision=dump.precision(taps),
        notes="; ".join(notes),
    )
    return Trace(header, taps)


def _same_tokens(case: Case, dump: Dump) -> None:
    """SpecError if the dump shows the tokens it was run on and they are others than the case's."""
    if dump.tokens is not None:
        same = np.array_equal(dump.tokens.ravel(), np.asarray(case.tokens).ravel())
        require(same, f"it is of other tokens: {dump.tokens.ravel()[:8]} ..., the case's are {case.tokens[0][:8]} ...")
