"""A judgement spread over processes, of this machine or of many: spans of the program, between which everything was recorded.

Replays start from what the candidate recorded, so spans of layers know nothing of each other where all that is still read was
recorded: the residual stream, as a rule. Only our own run, beside which every tap is reported too, is made from the tokens on, so
a worker first runs it up to its span. Whatever is found is put together in model order: the report is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import pairwise

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .case import Case
from .compare import Finding
from .comparison import Comparison, Track
from .lanes import Recorded
from .program import last_use, names, owner
from .reading import Pick
from .trace import Trace

Opener = Callable[[], tuple[Case, Trace]]
"""Opens the case and the trace in a worker. It can be sent to one, and compared."""
Span = tuple[int, int]
"""Calls of a program, from one to before another."""
AHEAD = 0.8
"""How long a span is beside the one before it: our own run to its start is a fifth of what judging costs."""


@dataclass(frozen=True)
class Pool:
    """Workers, how many, and how one of them opens what is judged."""

    executor: Executor
    workers: int
    opener: Opener


@dataclass(frozen=True)
class SpanFound:
    """What the comparison of a span gave: its findings, gauges and unknown names as in `Comparison`; taps that are to be read
    otherwise from here on, those withdrawn, and what was recorded of taps in part, as it is read.
    """

    findings: list[Finding]
    accepted: dict[str, tuple[str, ...]]
    either: set[str]
    plain: dict[str, Finding]
    alike: dict[str, tuple[float, str]]
    changed: dict[str, Array]
    supposable: bool
    withdrawn: dict[str, Array]
    partial: Mapping[str, tuple[Pick, Array]] = field(default_factory=dict)


def compared(comparison: Comparison, program: list[Call], span: Span) -> SpanFound:
    """Run a span of a fresh comparison."""
    taps = comparison.recorded.taps
    before = dict(taps)
    comparison.run(program, iter, *span)
    changed = {t: x for t, x in taps.items() if x is not before[t]}
    c = comparison
    return SpanFound(
        c.findings,
        c.accepted,
        c.either,
        c.plain,
        c.alike,
        changed,
        c.supposable,
        c.recorded.withdrawn,
        c.recorded.partial,
    )


def spread(
    program: list[Call], r: Recorded, track: Track, pool: Pool, work: Callable[[Span], SpanFound]
) -> list[SpanFound] | None:
    """What `work` finds in every span, in order; None if the program cannot be cut, or a span read otherwise what another had
    read as it was.
    """
    cuts = where_to_cut(program, r)
    spans = spans_of(len(program), list(cuts), pool.workers)
    if len(spans) < 2:
        return None
    waiting, found = {span[0]: pool.executor.submit(work, span) for span in spans}, list[SpanFound]()
    for i, _ in enumerate(track(program)):
        if i in waiting:
            found.append(waiting[i].result())
    crossing = frozenset[str]().union(*[cuts[start] for start, _ in spans[1:]])
    return None if any(crossing & {*f.changed, *f.withdrawn} for f in found) else found


def where_to_cut(program: list[Call], r: Recorded) -> dict[int, frozenset[str]]:
    """A unit's first call -> the taps from before it that are read from there on, where all of them were recorded whole. What
    follows from the inputs alone is made again.
    """
    last, cuts = last_use(program), dict[int, frozenset[str]]()
    known = {c.tap for c in program if all(n in r.inputs for n in names(c.args))}
    for i, (before, call) in enumerate(pairwise(program), start=1):
        if owner(before.tap) != owner(call.tap):
            read = frozenset([c.tap for c in program[:i] if last[c.tap] >= i]) - known
            if read <= r.taps.keys():
                cuts[i] = read
    return cuts


def spans_of(length: int, cuts: list[int], n: int) -> list[Span]:
    """At most n spans, cut as near as may be to where all of them end at the same time."""
    parts = [AHEAD**k for k in range(n)]
    wished = [length * sum(parts[: k + 1]) / sum(parts) for k in range(n - 1)]
    chosen = {min(cuts, key=lambda c: abs(c - at)) for at in wished} if cuts else set[int]()
    return list(pairwise([0, *sorted(chosen), length]))


def join(comparison: Comparison, parts: list[SpanFound]) -> None:
    """Put into a comparison what was found in all spans, as if it had run them."""
    r = comparison.recorded
    for part in parts:
        comparison.findings += part.findings
        comparison.accepted |= part.accepted
        comparison.either |= part.either
        comparison.plain |= part.plain
        comparison.supposable |= part.supposable
        r.taps |= part.changed
        r.partial = {**r.partial, **part.partial}
        r.withdrawn |= part.withdrawn
        for name, found in part.alike.items():
            comparison.alike[name] = min(comparison.alike.get(name, found), found)
    for tap in r.withdrawn:
        r.taps.pop(tap, None)
