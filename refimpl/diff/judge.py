"""The verdict on a trace: gates (inputs, weights, coverage, recording), then each recorded tap against replays of its stage.

On the same recorded inputs: E, the stage in float64; P, a family of our own twins at the precision in which the
candidate keeps the tap; X, the candidate. X may be about as far from E as the P are (`tolerance.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

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
from refimpl.model.phases import Part, named, parts_of

from .admission import Admitted, admit, check_layouts
from .agreement import ranks_gate
from .case import Case
from .compare import Finding
from .comparison import Comparison, Shown, Track
from .diagnose import diagnose
from .dims import Sizes
from .explained import explained
from .fp8_taps import decoded, has_codes, with_codes
from .fused import Found, fused_in, reordered, suspects, taken_apart
from .gates import Gate, coverage_gate, inputs_gate, phases_of, self_check_gate, weights_gate
from .gradients import backward_of
from .grounds import Grounds
from .holes import UNKNOWN
from .judgement import EXIT, Judgement, Verdict
from .lanes import Recorded
from .lse import with_lse
from .names import by_name
from .optimizer import Inputs as Read
from .precision import Precision, precision_of
from .program import program_of
from .reading import Pick
from .streamed import StageWeights
from .tolerance import Noise
from .trace import Trace
from .training import Training, training_of, update_of

_NOT_CONTESTED = ("masked_group_fill", "mtp_concat", "topk_denominator_eps")
"""Points of `Dialect` that released code has had both ways, but of which one way is a known bug today."""


def judge(case: Case, trace: Trace, *, track: Track = iter, pictures: bool = False) -> Judgement:
    """Judge a candidate's trace of a case, findings with `pictures` if wanted. SpecError if the two cannot be brought together
    at all.
    """
    gates = [inputs_gate(case, trace)]
    with np.errstate(all="ignore"):  # a candidate may hold anything; that is reported, not warned of
        return _judged(case, decoded(trace), gates, track, pictures)


def _judged(case: Case, trace: Trace, gates: list[Gate], track: Track, pictures: bool) -> Judgement:
    precision = precision_of(trace.header, trace.taps)
    gate, rounded = weights_gate(case.checkpoint, trace.header, precision.storage)
    gates.append(gate)
    run = _Run(case, trace, precision, rounded, pictures=pictures)
    config = case.config.replace(dialect=trace.config.dialect)
    gates += ranks_gate(trace, precision, run.program(config)[0])
    result = run.settle(config, track)
    blamed = {f.tap for f in result.culprits}
    if several := reordered(result.grounds, run.trace, blamed, run.sizes):
        other = replace(run)
        other.take_apart(several)
        better = other.settle(config, iter)
        if {f.tap for f in better.culprits} < blamed:
            run, result = other, better
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
    rounded: Mapping[str, str]
    show: str = ""
    shown: Shown | None = None
    pictures: bool = False
    cuts: dict[str, Pick] = field(default_factory=dict)
    apart: dict[str, list[str]] = field(default_factory=dict)
    looked: bool = False
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
            found += backward_of(found, shapes, self.precision.plan)
            found += update_of(found, config, t)
        return found, inputs

    @cached_property
    def weights(self) -> StageWeights:
        """The case's weights, as the candidate holds them."""
        return StageWeights(self.case.checkpoint, self.rounded, experts=self.case.config.n_routed_experts)

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
        first, second = ({c.tap: replace(c, own=None) for c in self.program(config)[0]} for config in (a, b))
        return {tap for tap, call in first.items() if second.get(tap) != call}

    def judge(self, config: Config, track: Track, without: frozenset[str] = frozenset()) -> Judgement:
        """Replay everything under a config (its dialect) and compare, some gauges not being allowed."""
        header = self.trace.header
        check_layouts(header.layouts)
        plain, inputs = self.program(config)
        program = with_codes(plain, self.precision.plan, self.trace.taps) if has_codes(self.trace.taps) else plain
        program = with_lse(program, self.trace.taps)
        admitted = self._admitted(program, config, inputs)
        ours = [c.tap for c in program]
        unknown = {n: np.asarray(self.trace.taps[n]) for n in self.trace.taps if n not in set(ours)}
        recorded = self._recorded(admitted, inputs, config.num_hidden_layers)
        comparison = Comparison(
            config,
            self.precision,
            admitted,
            recorded,
            without=without,
            show=self.show,
            pictures=self.pictures,
            unknown=unknown,
        )
        comparison.run(program, track)
        self.shown = comparison.shown
        means = {n: comparison.alike.get(n, (0.0, ""))[1] or by_name(n, ours) for n in unknown}
        blind = [f.tap for f in comparison.findings if f.open and f.note == UNKNOWN]
        gates = [coverage_gate(program, self.trace, blind), self_check_gate(header)]
        notes = admitted.notes | ({self.precision.note: []} if self.precision.note else {})
        found = Judgement(gates, comparison.findings, dict(header.layouts), comparison.gauges, notes, means)
        found.withdrawn = frozenset(recorded.withdrawn)
        found.diagnosis = partial(diagnose, program, recorded, comparison.findings, config)
        found.grounds = Grounds(config, plain, recorded, admitted, self.precision)
        return found

    def _admitted(self, program: list[Call], config: Config, inputs: Inputs) -> Admitted:
        """The taps that can be compared; arrays of several are taken apart when they are first met."""
        embedded = self._embedded(inputs)
        found = admit(program, self.trace, config, self.sizes, embedded, self.cuts)
        if not self.looked:
            self.looked, odd = True, suspects(self.trace.taps, program, found.flawed)
            r = self._recorded(found, inputs, config.num_hidden_layers)
            if several := fused_in(odd, program, r, config, self.sizes):
                self.take_apart(several)
                found = admit(program, self.trace, config, self.sizes, embedded, self.cuts)
        found.notes |= self.apart
        return found

    @property
    def sizes(self) -> Sizes:
        """How many sequences and tokens there are."""
        return Sizes(len(self.case.tokens), self.parts)

    def take_apart(self, several: Mapping[str, Found]) -> None:
        """Put parts in the place of arrays that hold several taps."""
        dtypes = {p.tap: x.dtype.name for one in several.values() for p, x in one.parts}
        self.trace, cuts, notes = taken_apart(self.trace, several)
        self.cuts = {t: p for t, p in self.cuts.items() if t not in several} | cuts
        self.apart = self.apart | notes
        self.precision = replace(self.precision, seen=dtypes | dict(self.precision.seen))

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
        some = {t: (k, a.taps[t]) for t, k in a.picks.items() if all(isinstance(e, slice) for e in k.values())}
        adam = self.training.optimizer if self.training else None
        masters = adam.masters if adam else "float32"
        read = Read(named(inputs, self.parts), self.case.checkpoint, masters)
        return Recorded(taken, read, self.weights, p.plan, noise, parts, layers=layers, partial=some)


def _n_mtp(config: Config, checkpoint: Checkpoint) -> int:
    """How many MTP modules the weights have; SpecError where names or shapes are not the model's."""
    shapes = {n: np.broadcast_to(np.zeros((), np.float32), checkpoint.shape(n)) for n in checkpoint}
    return ForCausalLM.from_weights(config, shapes).n_mtp


__all__ = ["EXIT", "Finding", "Judgement", "Track", "Verdict", "explain", "judge"]
