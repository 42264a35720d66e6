"""A part of a replayed region: the calls that lead to one tap, the arrays they start from, and how to cut them smaller.

Cutting is tried, not derived: an axis that the result shares with the inputs is cut to what is wanted, the region is run on what
is left, and the cut stands if the wanted numbers are the same. So no stage needs a rule of its own, but for two facts about
experts: dispatched rows follow the ids, and experts that nobody chose may be renumbered away.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.gemm import PLAIN
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import STAGES, Call

from .axes import Axes, axes_at
from .gradients import LOSS, gradient_name
from .grounds import Grounds
from .lanes import Lane
from .program import names
from .tangents import is_gradient, value_of

Index = tuple[int, ...]
Spans = tuple[Array, ...]
"""For every axis, which entries of the original are still there."""
_STEP = ("optim.clip", "optim.exp_avg", "optim.exp_avg_sq")
_NUMBERS = {"n_heads": "H"}
"""Settings that count an axis which may be cut."""


@dataclass(frozen=True)
class Part:
    """`calls` give the tap, the last one itself; `leaves` name -> array (float64 or integers); `at`, the index of what is wanted in
    the result, one number or a row; `axes` and `spans` of every leaf, and under the tap's own name those of the result.
    """

    calls: tuple[Call, ...]
    leaves: dict[str, Array]
    at: Index
    axes: dict[str, Axes]
    spans: dict[str, Spans]

    @property
    def tap(self) -> str:
        """What the part computes."""
        return self.calls[-1].tap

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        return tuple([len(s) for s in self.spans[self.tap]])

    def result(self, leaves: Mapping[str, Any] | None = None) -> Any:
        """The tap, from these leaves (arrays or Tensors) or its own."""
        return self.values(leaves)[self.tap]

    def values(self, leaves: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The leaves, and everything that is computed from them."""
        values = dict(self.leaves if leaves is None else leaves)
        with np.errstate(all="ignore"):
            for call in self.calls:
                values[call.tap] = call.of.fn(*[value_of(a, values) for a in call.args], **call.static)
        return values

    def origin(self, name: str, index: Index) -> Index:
        """Where an entry (or a row) of a leaf, or of the result, lies in the whole array."""
        return tuple([int(s[i]) for s, i in zip(self.spans[name], index, strict=False)])

    def of_result(self, whole: Array) -> Array:
        """The same part of another array of the result's original shape."""
        return whole[np.ix_(*self.spans[self.tap])] if self.spans[self.tap] else whole


def part_of(g: Grounds, region: Iterable[str], at: Index, shape: tuple[int, ...]) -> Part:
    """The whole region of a tap, nothing cut: float64, the candidate's recorded values where it has them. An optimiser's step
    begins at its gradient, recorded or not.
    """
    listed, lane = [g.calls[t] for t in region], Lane(FLOAT64)
    for call in [c for c in listed if _before(listed[-1], c)]:
        lane.values[call.tap] = lane.run(call, g.recorded)
    calls = tuple([_float64(c) for c in listed if not _before(listed[-1], c)])
    inner = {c.tap for c in calls}
    first = {n: call for call in reversed(calls) for n in names(call.args) if n not in inner}
    lane.values[gradient_name(f"fwd/{LOSS}")] = np.ones(())
    leaves = {n: np.asarray(lane.value(n, call, g.recorded)) for n, call in first.items()}
    tap = calls[-1].tap
    shapes = {n: a.shape for n, a in leaves.items()} | {tap: shape}
    axes = {n: axes_at(n, call, leaves[n].ndim) for n, call in first.items()}
    axes[tap] = axes_at(str(calls[-1].static.get("name", tap)), calls[-1], len(shape), tap)
    return Part(calls, leaves, at, axes, {n: tuple([np.arange(k) for k in s]) for n, s in shapes.items()})


def _before(last: Call, call: Call) -> bool:
    """Whether a call only leads to the gradient, or the norm, that the optimiser's step in question begins with."""
    return last.stage.startswith("optim.") and call is not last and call.stage not in _STEP


def smallest(part: Part) -> Part:
    """The part with everything cut away that the wanted numbers do not need."""
    want = part.result()[part.at]
    for keep in _wishes(part):
        part = _tried(part, cut(part, keep), want)
    return _tried(part, _renumbered(part), want)


def _tried(part: Part, smaller: Part | None, want: Array) -> Part:
    """The smaller part if it gives what is wanted."""
    if smaller is None:
        return part
    try:
        result = smaller.result()
        got = result[smaller.at] if np.shape(result) == smaller.shape else None
    except (ValueError, IndexError, TypeError, AssertionError, KeyError):
        return part  # these axes do not go apart
    scale = 1e-12 * float(np.max(np.abs(want), where=np.isfinite(want), initial=0))
    same = (
        got is not None
        and np.shape(got) == np.shape(want)
        and np.allclose(got, want, rtol=1e-9, atol=scale, equal_nan=True)
    )
    return smaller if same else part


def _wishes(part: Part) -> Iterator[Mapping[str, Array]]:
    """Cuts worth trying, sequences and tokens first: axis name -> entries to keep (of the original part)."""
    wanted = dict(_wanted(part))
    for name in ("B", "S", "T", "H"):
        if name in wanted:
            yield {name: wanted[name]}
    if "S" in wanted:
        at, n, t = int(wanted["S"][0]), *(max(map(len, _spans(part, a)), default=0) for a in "ST")
        cached = max(t - n, 0)  # keys of earlier parts come first
        yield {"S": np.arange(at + 1), "T": np.arange(cached + at + 1)}  # attention over the tokens before, all at once
        yield {"S": np.arange(at, n), "T": np.arange(cached + at, t)}  # a gradient, over those after
    yield from ({name: keep} for name, keep in wanted.items() if name not in ("B", "S", "T", "H"))


def _spans(part: Part, name: str) -> Iterator[Array]:
    """The spans of an axis of that name, wherever it is."""
    for n, axes in part.axes.items():
        yield from [span for factors, span in zip(axes, part.spans[n], strict=True) if factors == (name,)]


def _wanted(part: Part) -> Iterator[tuple[str, Array]]:
    """Axis name -> the one entry that the wanted numbers have on it; tokens and slots of a dispatched row by its ids."""
    for factors, i in zip(part.axes[part.tap], part.at, strict=False):
        ids = _ids(part)
        if factors == ("M",) and ids:
            order = np.argsort(part.leaves[ids], axis=None, kind="stable")
            place = np.unravel_index(order[i], part.leaves[ids].shape)
            yield from zip("BSK", [np.array([int(p)]) for p in place], strict=True)
        elif len(factors) == 1:
            yield factors[0], np.array([i])


def cut(part: Part, keep: Mapping[str, Array]) -> Part | None:
    """The part with these entries of the named axes only (counted in the original); None where that changes nothing or
    cannot be.
    """
    kept = {n: k for n, entries in keep.items() if (k := _local(part, n, entries)) is not None}
    rows = _rows_of(part, kept)
    picks = {n: _picks(part, n, kept | rows) for n in part.axes}
    found = {n: p for n, p in picks.items() if p is not None}
    same = all(len(p) == len(s) for n in found for p, s in zip(found[n], part.spans[n], strict=True))
    if same or len(found) < len(picks):
        return None
    at = [np.flatnonzero(p == i) for p, i in zip(found[part.tap], part.at, strict=False)]
    if not all(len(a) for a in at):
        return None
    leaves = {n: a[np.ix_(*found[n])] if a.ndim else a for n, a in part.leaves.items()}
    spans = {n: tuple([s[p] for s, p in zip(part.spans[n], found[n], strict=True)]) for n in part.spans}
    calls = tuple([_counting(call, kept) for call in part.calls])
    return replace(part, calls=calls, leaves=leaves, spans=spans, at=tuple([int(a[0]) for a in at]))


def _local(part: Part, name: str, entries: Array) -> Array | None:
    """Entries of the original as entries of what is left: found where the axis stands alone."""
    for n, axes in part.axes.items():
        for factors, span in zip(axes, part.spans[n], strict=True):
            if factors == (name,):
                return np.flatnonzero(np.isin(span, entries))
    return None


def _rows_of(part: Part, kept: Mapping[str, Array]) -> dict[str, Array]:
    """Dispatched rows that stay when ids are cut: those of the tokens and slots that stay."""
    ids = _ids(part)
    if not ids or not set(kept) & {"B", "S", "K"}:
        return {}
    a = part.leaves[ids]
    stays = np.zeros(a.shape, bool)
    stays[np.ix_(*[kept.get(n, np.arange(k)) for n, k in zip("BSK", a.shape, strict=True)])] = True
    return {"M": np.flatnonzero(stays.reshape(-1)[np.argsort(a, axis=None, kind="stable")])}


def _picks(part: Part, name: str, kept: Mapping[str, Array]) -> Spans | None:
    """For every axis of an array, which entries stay; None where the named axes do not divide it."""
    found = []
    for factors, span in zip(part.axes[name], part.spans[name], strict=True):
        sizes = _sizes(part, factors, len(span))
        if sizes is None:
            if set(factors) & set(kept):
                return None
            found.append(np.arange(len(span)))
            continue
        parts = [kept.get(f, np.arange(k)) for f, k in zip(factors, sizes, strict=True)]
        if any(p.max(initial=-1) >= k for p, k in zip(parts, sizes, strict=True)):
            return None
        found.append(np.arange(len(span)).reshape(sizes)[np.ix_(*parts)].reshape(-1))
    return tuple(found)


def _sizes(part: Part, factors: tuple[str, ...], total: int) -> tuple[int, ...] | None:
    """The size of every factor of an axis: as they stand alone elsewhere, the last unknown one by division."""
    if len(factors) == 1:
        return (total,)
    alone = {
        f[0]: len(s) for n, axes in part.axes.items() for f, s in zip(axes, part.spans[n], strict=True) if len(f) == 1
    }
    sizes = [int(f) if f.isdigit() else alone.get(f) for f in factors]
    known = int(np.prod([k for k in sizes if k is not None]))
    if sizes.count(None) > 1 or total % known or (None not in sizes and known != total):
        return None
    return tuple([total // known if k is None else k for k in sizes])


def _counting(call: Call, kept: Mapping[str, Array]) -> Call:
    """The call with its settings that count a cut axis."""
    changed: dict[str, Any] = {s: len(kept[name]) for s, name in _NUMBERS.items() if s in call.static and name in kept}
    if is_gradient(call):
        changed["readers"] = tuple([_counting(r, kept) for r in call.static["readers"]])
    return replace(call, static=call.static | changed) if changed else call


def _renumbered(part: Part) -> Part | None:
    """Without the rows of tables, and the experts' matrices, that no integer left names."""
    part, before = _fewer_experts(part), part
    for name, axes in part.axes.items():
        tokens = [n for n in part.leaves if n.rpartition("/")[2] == "tokens"]
        if axes[:1] == (("V",),) and name in part.leaves and tokens and ("V",) not in part.axes[part.tap]:
            used = np.unique(part.leaves[tokens[0]])
            leaves = part.leaves | {
                name: part.leaves[name][used],
                tokens[0]: np.searchsorted(used, part.leaves[tokens[0]]),
            }
            spans = part.spans | {name: (part.spans[name][0][used], *part.spans[name][1:])}
            part = replace(part, leaves=leaves, spans=spans)
    return part if part is not before else None


def _fewer_experts(part: Part) -> Part:
    """Only the experts that somebody chose, in their order."""
    ids, calls = _ids(part), []
    if not ids or any(c.own for c in part.calls):
        return part
    used = np.unique(part.leaves[ids])
    for call in part.calls:
        starred = [
            p for p in inspect.signature(STAGES[call.stage].fn).parameters.values() if p.kind is p.VAR_POSITIONAL
        ]
        matrices = [call.args[2 + e] for e in used] if starred else []
        calls.append(replace(call, args=(*call.args[:2], *matrices)) if starred else call)
    read = {n for call in calls for n in names(call.args)}
    if len(read) == len({n for call in part.calls for n in names(call.args)}):
        return part
    leaves = {n: a for n, a in part.leaves.items() if n in read} | {ids: np.searchsorted(used, part.leaves[ids])}
    axes, spans = ({n: d[n] for n in (*leaves, part.tap)} for d in (part.axes, part.spans))
    return replace(part, calls=tuple(calls), leaves=leaves, axes=axes, spans=spans)


def _ids(part: Part) -> str:
    """The leaf that says who goes to which expert, "" if there is none."""
    return next((n for n in part.leaves if n.endswith("/router.ids") and part.leaves[n].ndim == 3), "")


def _float64(call: Call) -> Call:
    """The call as the exact lane makes it."""
    if is_gradient(call):  # what waits for it in fewer bits is not asked
        readers = call.static["readers"]
        args = tuple([(*r.args, gradient_name(r.tap)) for r in readers])
        plain = {"makers": (None,) * len(args), "kernel": lambda stage: PLAIN}
        return replace(call, args=args, static=call.static | plain)
    return replace(call, static=call.static | {"dtype": np.float64}) if "dtype" in call.static else call
