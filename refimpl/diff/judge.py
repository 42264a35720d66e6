"""The verdict on a trace: gates (inputs, weights, coverage, recording), then each recorded tap against replays of its stage.

On the same recorded inputs: E, the stage in float64; P, a family of our own twins at the precision in which the
candidate keeps the tap; X, the candidate. X may be about as far from E as the P are (`tolerance.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint
from refimpl.layers.config import Config, Dialect
from refimpl.layers.mla import Attend
from refimpl.layers.module import is_buffer
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Call
from refimpl.model import ForCausalLM, Inputs, read_inputs
from refimpl.model.phases import Part, in_part, named, parts_of

from .admission import Admitted, admit, check_layouts
from .agreement import ranks_gate
from .case import Case
from .compare import Finding
from .comparison import Comparison, Shown, Track
from .diagnose import Diagnosis, diagnose
from .dims import Sizes
from .explained import explained
from .fp8_taps import decoded, has_codes, with_codes
from .gates import Gate, coverage_gate, inputs_gate, phases_of, self_check_gate, weights_gate
from .gradients import backward_of
from .grounds import Grounds
from .lanes import Recorded
from .names import by_name
from .pages import Pages
from .precision import Precision, precision_of
from .program import program_of
from .spread import Opener, Pool, Span, SpanFound, compared, join, spread
from .streamed import StageWeights
from .tolerance import Noise
from .trace import Trace
from .training import Training, training_of, update_of

Verdict = Literal["CONFORMS", "CONFORMS_IN_GAUGE", "CONTESTED", "DIVERGES", "INCONCLUSIVE"]
EXIT = {"CONFORMS": 0, "CONFORMS_IN_GAUGE": 0, "CONTESTED": 0, "DIVERGES": 1, "INCONCLUSIVE": 2}
_NOT_CONTESTED = ("masked_group_fill", "mtp_concat", "topk_denominator_eps")
"""Points of `Dialect` that released code has had both ways, but of which one way is a known bug today."""


@dataclass
class Judgement:
    """Gates, findings in model order, what was recognised and not blamed (`gauges`: what to declare -> taps; `notes`: the same
    for readings; `unknown`: names that are no taps -> which tap they seem to be), the dialect that had to be assumed, taps that
    nothing was replayed on, verdict.
    """

    gates: list[Gate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    gauges: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    contested: dict[str, str] = field(default_factory=dict)
    withdrawn: frozenset[str] = frozenset()
    diagnosis: Callable[[], list[Diagnosis]] = field(default=list, repr=False)
    grounds: Grounds | None = field(default=None, repr=False)

    @cached_property
    def causes(self) -> list[Diagnosis]:
        """Known mistakes that reproduce what is blamed, those that explain most first; searched for when first asked."""
        with np.errstate(all="ignore"):
            return self.diagnosis()

    @property
    def culprits(self) -> list[Finding]:
        """Taps whose own stage, fed with the candidate's inputs, gives something else."""
        return [f for f in self.findings if not f.ok]

    @property
    def blamed(self) -> set[str]:
        """The culprits' taps, without those that only show again what a withdrawn tap shows."""
        return {f.tap for f in self.culprits if not self.withdrawn & set(f.region[:-1])}

    @property
    def verdict(self) -> Verdict:
        """DIVERGES if a gate or a tap failed; INCONCLUSIVE if a gate could not decide or nothing was compared."""
        states = {g.state for g in self.gates}
        if self.culprits or "FAIL" in states:
            return "DIVERGES"
        if "?" in states:
            return "INCONCLUSIVE"
        if self.contested:
            return "CONTESTED"
        return "CONFORMS_IN_GAUGE" if self.gauges else "CONFORMS"

    @property
    def exit_code(self) -> int:
        """0 conforms, 1 diverges, 2 inconclusive (3, bad input, is a SpecError)."""
        return EXIT[self.verdict]


def judge(
    case: Case, trace: Trace, *, track: Track = iter, pictures: bool = False, pool: Pool | None = None
) -> Judgement:
    """Judge a candidate's trace of a case, findings with `pictures` if wanted, by a pool of processes if there is one. SpecError
    if the two cannot be brought together at all.
    """
    gates = [inputs_gate(case, trace)]
    with np.errstate(all="ignore"):  # a candidate may hold anything; that is reported, not warned of
        return _judged(case, decoded(trace), gates, track, pictures, pool)


def _judged(case: Case, trace: Trace, gates: list[Gate], track: Track, pictures: bool, pool: Pool | None) -> Judgement:
    precision = precision_of(trace.header, trace.taps)
    gate, rounded = weights_gate(case.checkpoint, trace.header, precision.storage)
    gates.append(gate)
    run = _Run(case, trace, precision, rounded, pictures=pictures, pool=pool)
    config = case.config.replace(dialect=trace.config.dialect)
    gates += ranks_gate(trace, precision, run.program(config)[0])
    result = run.settle(config, track)
    result.gates[:0] = gates
    return _contested(run, result) if result.culprits else result


def explain(case: Case, trace: Trace, tap: str) -> list[str]:
    """Lines that say how far a tap may be off, and why. SpecError for a tap that the trace does not hold."""
    trace = decoded(trace)
    precision = precision_of(trace.header, trace.taps)
    _, rounded = weights_gate(case.checkpoint, trace.header, precision.storage)
    run = _Run(case, trace, precision, rounded, tap)
    run.judge(case.config.replace(dialect=trace.config.dialect), iter)
    require(run.shown is not None, f"{tap!r} was not compared: the trace does not hold it, or it is unusable")
    assert run.shown is not None
    return explained(run.shown, precision.storage)


def _contested(run: _Run, result: Judgement) -> Judgement:
    """The judgement under the dialect points that leave the fewest culprits, if any leaves fewer."""
    dialect = run.trace.config.dialect
    for name, value in _others(dialect):
        changed: dict[str, Any] = {name: value}
        before, config = (run.case.config.replace(dialect=d) for d in (dialect, replace(dialect, **changed)))
        blamed = {t for f in result.culprits for t in f.region}
        if not blamed & run.differing(before, config):
            continue
        other = run.settle(config, iter)
        if {f.tap for f in other.culprits} < {f.tap for f in result.culprits}:
            other.gates[:0] = result.gates[: len(result.gates) - len(other.gates)]
            other.contested = result.contested | {name: str(value)}
            result, dialect = other, config.dialect
    return result


def _others(dialect: Dialect) -> Iterable[tuple[str, object]]:
    """Every other value of every contested point."""
    for name, values in Dialect.choices().items():
        if name not in _NOT_CONTESTED:
            yield from ((name, value) for value in values if value != getattr(dialect, name))


@dataclass
class _Run:
    """What does not change between judgements of the same trace."""

    case: Case
    trace: Trace
    precision: Precision
    rounded: bool
    show: str = ""
    shown: Shown | None = None
    pictures: bool = False
    pool: Pool | None = None
    programs: dict[Config, tuple[list[Call], Inputs]] = field(default_factory=dict)

    def settle(self, config: Config, track: Track) -> Judgement:
        """The judgement under a config with the gauges that explain something: one takes taps out of blame and puts none in."""
        result, without = self.judge(config, track), frozenset[str]()
        if result.culprits:
            for gauge in list(result.gauges):
                other = self.judge(config, iter, without | {gauge})
                if not {f.tap for f in result.culprits} < other.blamed:
                    result, without = other, without | {gauge}
        return result

    def program(self, config: Config) -> tuple[list[Call], Inputs]:
        """The stage calls of the run under a config, and its inputs; found once, however often they are judged."""
        if config not in self.programs:
            self.programs[config] = self._program(config)
        return self.programs[config]

    def _program(self, config: Config) -> tuple[list[Call], Inputs]:
        case, t, n_mtp = self.case, self.training, _n_mtp(config, self.case.checkpoint)
        labels = t.targets(case.tokens, case.valid) if t else None
        with where(f"in {case.path / 'tokens.json'}"):
            inputs = read_inputs(config, case.tokens, case.positions, case.valid, labels=labels)
        found = program_of(config, inputs, n_mtp=n_mtp, parts=self.parts, losses=t.losses if t else None)
        if t:
            shapes = {n: case.checkpoint.shape(n) for n in case.checkpoint if not is_buffer(n)}
            found += [*backward_of(found, shapes), *update_of(found, config, t)]
        return found, inputs

    @cached_property
    def weights(self) -> StageWeights:
        """The case's weights, as the candidate holds them."""
        return StageWeights(self.case.checkpoint, self.rounded)

    @cached_property
    def training(self) -> Training | None:
        """The training step, if the trace has something of one."""
        return training_of(self.trace.header, self.trace.taps)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the run that were recorded, each in the form of attention that was declared or that its taps betray."""
        phases = phases_of(self.trace.header, self.trace.taps)
        with where("in the trace header's phases"):
            found = parts_of(phases, len(self.case.tokens[0]))
        return tuple([replace(p, attend=self._attend(p)) for p in found])

    def differing(self, a: Config, b: Config) -> set[str]:
        """Taps that two configs compute by other calls."""
        (first, _), (second, _) = self.program(a), self.program(b)
        theirs = {c.tap: c for c in second}
        return {c.tap for c in first if theirs.get(c.tap) != c}

    def comparison(self, config: Config, without: frozenset[str]) -> tuple[Comparison, list[Call]]:
        """What was recorded, ready to be compared under a config, and the program along which."""
        check_layouts(self.trace.header.layouts)
        plain, inputs = self.program(config)
        program = with_codes(plain, self.precision.plan, self.trace.taps) if has_codes(self.trace.taps) else plain
        admitted = admit(program, self.trace, config, Sizes(len(inputs.tokens), self.parts), self._embedded(inputs))
        ours = {c.tap for c in program}
        comparison = Comparison(
            config,
            self.precision,
            admitted,
            self._recorded(admitted, inputs, config.num_hidden_layers),
            without=without,
            show=self.show,
            pictures=self.pictures,
            unknown={n: np.asarray(self.trace.taps[n]) for n in self.trace.taps if n not in ours},
            pages=Pages(self.trace.taps),
        )
        return comparison, program

    def judge(self, config: Config, track: Track, without: frozenset[str] = frozenset()) -> Judgement:
        """Replay everything under a config (its dialect) and compare, some gauges not being allowed."""
        comparison, program = self.comparison(config, without)
        recorded, admitted, header = comparison.recorded, comparison.admitted, self.trace.header
        parts = None
        if self.pool:
            work = partial(_part, self.pool.opener, self.rounded, self.pictures, config, without)
            parts = spread(program, recorded, track, self.pool, work)
        if parts is None:
            comparison.run(program, track)
        else:
            join(comparison, parts)
        comparison.finish()
        self.shown = comparison.shown
        ours = [c.tap for c in program]
        means = {n: comparison.alike.get(n, (0.0, ""))[1] or by_name(n, ours) for n in comparison.unknown}
        gates = [coverage_gate(program, self.trace), self_check_gate(header)]
        notes = admitted.notes | ({self.precision.note: []} if self.precision.note else {})
        found = Judgement(gates, comparison.findings, dict(header.layouts), comparison.gauges, notes, means)
        found.withdrawn = frozenset(recorded.withdrawn)
        found.diagnosis = partial(diagnose, program, recorded, comparison.findings, config)
        forward = [c for c in self.program(config)[0] if in_part(c.tap)]
        found.grounds = Grounds(config, forward, recorded, admitted, self.precision)
        return found

    def _embedded(self, inputs: Inputs) -> Array:
        """What the first layer reads (B, S, D)."""
        found: Array = self.weights("model.embed_tokens.weight", FLOAT32)[inputs.tokens]
        return found

    def _attend(self, part: Part) -> Attend:
        """The form of attention: declared, or betrayed by taps that only the absorbed form has."""
        told = self.trace.header.layouts.get("mla")
        inner = ("mla.q_absorbed", "mla.ctx_latent")
        absorbed = any(t.startswith(f"{part.name}/") and t.endswith(inner) for t in self.trace.taps)
        if told is None:
            return "absorbed" if absorbed else "expanded"
        return "absorbed" if told == "absorbed" else "auto" if told == "auto" else "expanded"

    def _recorded(self, a: Admitted, inputs: Inputs, layers: int) -> Recorded:
        p, taken = self.precision, {t: x for t, x in a.taps.items() if t not in a.picks}
        noise, parts = Noise(p.unit, p.format), frozenset(a.picks)
        return Recorded(taken, named(inputs, self.parts), self.weights, p.plan, noise, parts, layers=layers)


@lru_cache(maxsize=1)
def _opened(opener: Opener, rounded: bool, pictures: bool) -> _Run:
    """What a worker keeps from one span to the next."""
    case, trace = opener()
    trace = decoded(trace)
    return _Run(case, trace, precision_of(trace.header, trace.taps), rounded, pictures=pictures)


def _part(
    opener: Opener, rounded: bool, pictures: bool, config: Config, without: frozenset[str], span: Span
) -> SpanFound:
    """A worker's part of a judgement."""
    with np.errstate(all="ignore"):
        comparison, program = _opened(opener, rounded, pictures).comparison(config, without)
        return compared(comparison, program, span)


def _n_mtp(config: Config, checkpoint: Checkpoint) -> int:
    """How many MTP modules the weights have; SpecError where names or shapes are not the model's."""
    shapes = {n: np.broadcast_to(np.zeros((), np.float32), checkpoint.shape(n)) for n in checkpoint}
    return ForCausalLM.from_weights(config, shapes).n_mtp


__all__ = ["EXIT", "Finding", "Judgement", "Track", "Verdict", "explain", "judge"]
