"""The verdict on a trace: gates (inputs, weights, coverage, recording), then each recorded tap against replays of its stage.

On the same recorded inputs: E, the stage in float64; P, a family of our own twins at the precision in which the
candidate keeps the tap; X, the candidate. X may be about as far from E as the P are (`tolerance.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.layers.config import Config, Dialect

from .agreement import ranks_gate
from .case import Case
from .compare import Finding
from .comparison import Track
from .counting import from_zero, other_counts
from .declared import Declared
from .diagnose import diagnose
from .explained import explained
from .formats import Notes, in_own_formats
from .fp8_taps import decoded
from .fused import reordered
from .gates import Gate, coverage_gate, inputs_gate, self_check_gate, weights_gate
from .grounds import Grounds
from .holes import UNKNOWN
from .judgement import EXIT, Judgement, Verdict
from .local_counts import local_counts
from .names import by_name
from .padding import may_be_packed, padding_of
from .precision import precision_of
from .routing import OTHER_ROWS, as_lists, of_rows, rows_by_expert
from .run import Run
from .spread import Opener, Pool, Span, SpanFound, compared, join, spread
from .supposed import SUPPOSED
from .trace import Trace
from .weighing import blamed, explains, far_less_off, fewer

Rounded = tuple[tuple[str, str], ...]
"""Weights that agree only when rounded, each with the dtype."""
_NOT_CONTESTED = ("masked_group_fill", "mtp_concat", "topk_denominator_eps")
"""Points of `Dialect` that released code has had both ways, but of which one way is a known bug today."""


def judge(
    case: Case, trace: Trace, *, track: Track = iter, pictures: bool = False, pool: Pool | None = None
) -> Judgement:
    """Judge a candidate's trace of a case, findings with `pictures` if wanted, by a pool of processes if there is one. SpecError
    if the two cannot be brought together at all.
    """
    gates = [inputs_gate(case, trace)]
    with np.errstate(all="ignore"):  # a candidate may hold anything; that is reported, not warned of
        return _judged(case, from_zero(decoded(trace)), gates, track, pictures, pool)


def _judged(case: Case, whole: Trace, gates: list[Gate], track: Track, pictures: bool, pool: Pool | None) -> Judgement:
    trace, done = _as_ours(whole)
    precision = precision_of(trace.header, trace.taps)
    gate, rounded = weights_gate(case.checkpoint, trace.header, precision.storage)
    gates.append(gate)
    run = Run(case, trace, precision, rounded, pictures=pictures, pool=pool, done=done)
    config = case.config.replace(dialect=trace.config.dialect)
    run.done |= _declared(run, whole, config)
    gates += ranks_gate(whole, precision, run.program(config)[0])
    run, result = _read_otherwise(run, _settled(run, config, track), trace, config)
    run, result = _rearranged(run, result, config)
    result.gates[:0] = gates
    return _contested(run, result) if result.culprits else result


def _ours(trace: Trace) -> Trace:
    """The trace with numbers for codes, layers counted as ours, and all of it as we have it."""
    return _as_ours(from_zero(decoded(trace)))[0]


def _as_ours(trace: Trace) -> tuple[Trace, Notes]:
    """The trace with numbers in arrays of their own dtypes and routing in lists; what was done."""
    trace, typed = in_own_formats(trace)
    trace, listed = as_lists(trace)
    return trace, typed | listed


def _declared(run: Run, trace: Trace, config: Config) -> Notes:
    """What the header declares and nothing of the trace uses. SpecError for what contradicts it."""
    return Declared(trace, config, run.sizes, run.calls(config)).checked(run.differing)


def _read_otherwise(run: Run, result: Judgement, trace: Trace, config: Config) -> tuple[Run, Judgement]:
    """The judgement under the reading of the trace that leaves least off, if that is far less."""
    for other in _readings(run, trace, config):
        if not result.off:
            break
        better = _settled(other, config, iter)
        if far_less_off(better, result):
            run, result = other, better
    return run, result


def _rearranged(run: Run, result: Judgement, config: Config) -> tuple[Run, Judgement]:
    """The judgement with what is blamed in another order, dispatched rows or channels, if fewer taps are blamed then. Workers read
    the trace as it was written.
    """
    odd = {f.tap for f in result.culprits if f.error > OTHER_ROWS}
    for trace, done in rows_by_expert(run.trace, run.done, odd):
        other = replace(run, pool=None, trace=trace, done=done)
        better = _settled(other, config, iter)
        if of_rows(blamed(better)) < of_rows(blamed(result)):
            run, result = other, better
            break
    if several := reordered(result.grounds, run.trace, blamed(result), run.sizes):
        other = replace(run, pool=None)
        other.take_apart(several)
        better = _settled(other, config, iter)
        if blamed(better) < blamed(result):
            run, result = other, better
    return run, result


def _readings(run: Run, trace: Trace, config: Config) -> Iterator[Run]:
    """What else the trace may be: with layers counted otherwise, or its tokens one behind the other."""
    fresh = replace(run, trace=trace, pool=None, cuts={}, apart={}, looked=False)
    for counted, what in (*other_counts(trace), *local_counts(fresh, config)):
        yield replace(fresh, trace=counted, precision=precision_of(counted.header, counted.taps), apart=what)
    if may_be_packed(trace.taps, padding_of(trace.header.valid, run.sizes)):
        yield replace(fresh, packed=True)


def explain(case: Case, trace: Trace, tap: str) -> list[str]:
    """Lines that say how far a tap may be off, and why. SpecError for a tap that the trace does not hold."""
    trace = _ours(trace)
    precision = precision_of(trace.header, trace.taps)
    _, rounded = weights_gate(case.checkpoint, trace.header, precision.storage)
    run = Run(case, trace, precision, rounded, tap)
    config = case.config.replace(dialect=trace.config.dialect)
    _declared(run, trace, config)
    _under(run, config, iter)
    require(run.shown is not None, f"{tap!r} was not compared: the trace does not hold it, or it is unusable")
    assert run.shown is not None
    return explained(run.shown, precision.storage)


def _contested(run: Run, result: Judgement) -> Judgement:
    """The judgement under the dialect points that leave the fewest culprits, if any leaves fewer."""
    dialect = run.trace.config.dialect
    for name, value in _others(dialect):
        changed: dict[str, Any] = {name: value}
        before, config = (run.case.config.replace(dialect=d) for d in (dialect, replace(dialect, **changed)))
        regions = {t for f in result.culprits for t in f.region}
        if not regions & run.differing(before, config):
            continue
        other = _settled(run, config, iter)
        if fewer(other, result) and len(other.culprits) < len(result.culprits):
            other.gates[:0] = result.gates[: len(result.gates) - len(other.gates)]
            other.contested = result.contested | {name: str(value)}
            result, dialect = other, config.dialect
    return result


def _others(dialect: Dialect) -> Iterable[tuple[str, object]]:
    """Every other value of every contested point."""
    for name, values in Dialect.choices().items():
        if name not in _NOT_CONTESTED:
            yield from ((name, value) for value in values if value != getattr(dialect, name))


def _settled(run: Run, config: Config, track: Track) -> Judgement:
    """The judgement under a config. Where taps fit in no gauge, in those that they are supposed to be in, if that takes taps out of
    blame, puts none in, and leaves some: a mistake that shows nowhere is none of the gauge's.
    """
    result = _in_gauges(run, config, track, frozenset({SUPPOSED}))
    if result.culprits and result.supposable:
        other = _in_gauges(run, config, iter, frozenset(), frozenset(result.gauges))
        if other.culprits and len(other.culprits) <= len(result.culprits) and fewer(other, result):
            return other
    return result


def _in_gauges(
    run: Run, config: Config, track: Track, without: frozenset[str], told: frozenset[str] = frozenset()
) -> Judgement:
    """The judgement with the gauges that explain something: one takes taps out of blame and puts none in. Of those that do not, the
    one goes first without which least is blamed: it may be what makes others look so.
    """
    result = _under(run, config, track, without, told)
    while result.culprits:
        others, idle = {g: _under(run, config, iter, without | {g}, told) for g in result.gauges}, list[str]()
        for g, other in others.items():
            if (
                other.gauges.keys() - result.gauges.keys()
            ):  # taps that fit in another gauge now, which has to explain something too
                other = _in_gauges(run, config, iter, without | {g}, told)
            idle += [] if explains(g, result, other) else [g]
        if not idle:
            break
        gauge = min(idle, key=lambda g: len(others[g].culprits))
        result, without = others[gauge], without | {gauge}
    return result


def _under(
    run: Run, config: Config, track: Track, without: frozenset[str] = frozenset(), told: frozenset[str] = frozenset()
) -> Judgement:
    """Replay everything under a config (its dialect) and compare, some gauges not being allowed, some being known of other taps."""
    comparison, program = run.comparison(config, without, told)
    recorded, admitted, header = comparison.recorded, comparison.admitted, run.trace.header
    parts = None
    if run.pool:
        work = partial(_part, run.pool.opener, tuple(sorted(run.rounded.items())), run.pictures, config, without, told)
        parts = spread(program, recorded, track, run.pool, work)
    if parts is None:
        comparison.run(program, track)
    else:
        join(comparison, parts)
    comparison.finish()
    run.shown = comparison.shown
    ours = [c.tap for c in program]
    means = {n: comparison.alike.get(n, (0.0, ""))[1] or by_name(n, ours) for n in comparison.unknown}
    blind = [f.tap for f in comparison.findings if f.open and f.note == UNKNOWN]
    gates = [coverage_gate(program, run.trace, blind, admitted.renamed), self_check_gate(header)]
    notes = dict(run.done) | admitted.notes | ({run.precision.note: []} if run.precision.note else {})
    found = Judgement(gates, comparison.findings, dict(header.layouts), comparison.gauges, notes, means)
    found.withdrawn, found.supposable = frozenset(recorded.withdrawn), comparison.supposable
    found.diagnosis = partial(diagnose, program, recorded, comparison.findings, config)
    found.grounds = Grounds(config, run.program(config)[0], recorded, admitted, run.precision)
    return found


@lru_cache(maxsize=1)
def _opened(opener: Opener, rounded: Rounded, pictures: bool) -> Run:
    """What a worker keeps from one span to the next."""
    case, trace = opener()
    trace = _ours(trace)
    return Run(case, trace, precision_of(trace.header, trace.taps), dict(rounded), pictures=pictures)


def _part(
    opener: Opener,
    rounded: Rounded,
    pictures: bool,
    config: Config,
    without: frozenset[str],
    told: frozenset[str],
    span: Span,
) -> SpanFound:
    """A worker's part of a judgement."""
    with np.errstate(all="ignore"):
        comparison, program = _opened(opener, rounded, pictures).comparison(config, without, told)
        return compared(comparison, program, span)


__all__ = ["EXIT", "Finding", "Judgement", "Track", "Verdict", "explain", "judge"]
