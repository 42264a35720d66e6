"""What every adapter does around a framework: run it plainly, run it watched, twice, and put the trace together."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Header, Trace, digest
from refimpl.diff.names import Framework

from .ranks import parallel_of
from .refimpl_tap import Recording
from .tapmap import untested
from .watch import Watch, array


@dataclass(frozen=True)
class Candidate:
    """A model that holds a case's weights. `call(module, tokens)` runs it on nested lists of tokens (B, S) and gives the logits,
    or anything that has them; None where `module(tokens)` will do. weights: checkpoint name -> array that the model holds, if
    it can say so. precision, layouts: for the trace's header. Of a process of several: `parallel`, which rank it is (None: what
    torch.distributed, a DeviceMesh or Megatron say), and `dims`, by tap or its last part what ranks hold of it:
    {"mla.q": "N H@tp Dn+Dr"}. `release` undoes what building it did.
    """

    module: Any
    call: Callable[[Any, list[list[int]]], Any] | None = None
    weights: Mapping[str, Any] | None = None
    precision: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parallel: Mapping[str, Any] | None = None
    dims: Mapping[str, str] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Recorded:
    """A trace that was written, and what its notes say."""

    path: Path
    notes: tuple[str, ...]


Run = Callable[[Watch | None], Array]
"""One run of the framework, watched or not -> logits."""


def record_runs(
    case: Case, map_: Framework, run: Run, watch: Callable[[], Watch], made: Candidate, *, storage: str
) -> Trace:
    """The trace of three runs, of which two are watched."""
    version = version_of(map_.package)
    with theirs(f"{map_.package or map_.name} {version}".strip()):
        plain = run(None)  # not watched, so that what is raised is not ours
    (first, logits), (second, _) = [(w, run(w)) for w in (watch(), watch())]
    taps, again = first.taps(), second.taps()
    warning = untested(map_, version)
    held = case.weights() if made.weights is None else made.weights
    said = () if made.weights is not None else ("weights: those of the case's files, which the framework was given",)
    notes = [*([warning] if warning else []), *made.notes, *said, *first.repeated(), *first.notes]
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=case.positions,
        valid=case.valid,
        producer={"name": map_.package or map_.name, "version": version},
        weights={n: digest(array(w)) for n, w in held.items()},
        layouts={**map_.layouts, **made.layouts},
        dims=first.axes | {t: d for t in taps if (d := made.dims.get(t) or made.dims.get(t.rpartition("/")[2]))},
        parallel=dict(parallel_of(made.module) if made.parallel is None else made.parallel),
        expected=sorted(first.places),
        precision={"storage": storage, "accumulate": "float32", **made.precision},
        self_check=self_check(plain, logits, taps, again),
        notes="; ".join(notes),
    )
    return Trace(header, taps)


@contextmanager
def theirs(who: str) -> Iterator[None]:
    """What a framework raises in its own run is said of it, with the line of its source: it is no bug of ours."""
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(at.filename).as_posix().rpartition("site-packages/")[2]
        raise SpecError(f"{who} raises {type(error).__name__}: {error} ({file}:{at.lineno})") from error


def deliver(trace: Trace, out: str | Path) -> Recorded:
    """Write a trace, with the file that people paste into their own programs -> where, with its notes one by one."""
    made = Recording(**dataclasses.asdict(trace.header))
    for tap, x in trace.taps.items():
        made.tap(tap, x)
    with written(out):
        file = made.write(out)
    return Recorded(file, tuple(filter(None, trace.header.notes.split("; "))))


@contextmanager
def written(out: str | Path) -> Iterator[None]:
    """A disk's refusal is no bug of ours: a folder that is not there, a place that may not be written."""
    try:
        yield
    except OSError as error:
        raise SpecError(f"{out}: cannot be written: {error.strerror or error}") from error


def version_of(package: str) -> str:
    """The installed version of a distribution; "" if it is not one."""
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def library(name: str, extra: str) -> Any:
    """A framework, imported now. SpecError says which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = f"it comes with the extra: pip install 'deepseek-v3-refimpl[{extra}]'"
        raise SpecError(f"{error.name or name} cannot be imported ({error}); {wanted}") from None


def builder(name: str) -> Callable[[Case], Any]:
    """The function `pkg.mod:fn`. SpecError if there is none of that name."""
    found = named_object(name, f"--build {name}", "pkg.mod:fn, a function of the case")
    require(callable(found), f"--build {name}: not a function")
    return found  # type: ignore[no-any-return]


def named_object(name: str, said: str, expected: str) -> Any:
    """What `pkg.mod:attribute` names; SpecError, in the words that were `said`, if there is none or its module raises."""
    module, colon, attribute = name.partition(":")
    require(colon and module and attribute, f"{said}; expected {expected}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{said}: {error}") from None
    except Exception as error:  # the user's module may raise anything
        raise SpecError(f"{said}: {module} cannot be imported: {type(error).__name__}: {error}") from error


def plain_only(case: Case, what: str) -> None:
    """SpecError for a case with padding or positions of its own, which a plain call cannot be told of."""
    require(case.valid is None, f"the case has padding, which {what} is not told of")
    usual = case.positions is None or all(row == list(range(len(row))) for row in case.positions)
    require(usual, f"the case has positions of its own, which {what} is not told of")


def self_check(plain: Array, logits: Array, taps: Mapping[str, Array], again: Mapping[str, Array]) -> dict[str, float]:
    """Tests of a recorder, 0 if passed: watching moves no logit (`plain` are those of a run nobody watched), and a second run
    gives the same bits.
    """
    repeat = [_difference(x, again[t]) if t in again else np.inf for t, x in taps.items()]
    return {"logits_taps_off_vs_on": _difference(plain, logits), "repeat": max(repeat, default=0.0)}


def _difference(a: Array, b: Array) -> float:
    """0 for the same bits (NaN and infinity included), else the largest difference."""
    if a.shape != b.shape:
        return float("inf")
    if a.tobytes() == b.tobytes():
        return 0.0
    return float(np.nan_to_num(np.abs(a.astype(np.float64) - b.astype(np.float64)), nan=np.inf).max())
