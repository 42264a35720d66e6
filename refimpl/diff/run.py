"""What is the same in all judgements of one trace: its program under a config, weights, phases, and what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from refimpl.autograd.errors import where
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.mla import Attend
from refimpl.layers.module import is_buffer
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Call
from refimpl.model import ForCausalLM, Inputs, read_inputs
from refimpl.model.phases import Part, named, parts_of

from .admission import Admitted, admit, check_layouts
from .case import Case
from .comparison import Comparison, Shown
from .dims import Sizes
from .fp8_taps import has_codes, with_codes
from .fused import Found, fused_in, suspects, taken_apart
from .gates import phases_of
from .gradients import backward_of
from .heads import of_some_heads, which_heads
from .lanes import Recorded
from .lse import with_lse
from .nearest import nearest
from .optimizer import Inputs as Read
from .padding import padding_of
from .pages import Pages
from .precision import Precision
from .program import placeholder, program_of
from .spread import Pool
from .streamed import StageWeights
from .tolerance import Noise
from .trace import Trace
from .training import Training, training_of, update_of
from .ways import Pick, Way

CHOSEN = ("router.ids", "router.groups", "router.group_scores")
"""Taps of which it is told that there are too many, or too few."""


@dataclass
class Run:
    """A case and a trace; the tap that is to be explained (`show`), and how its tolerance came about (`shown`); of arrays that hold
    several taps, which parts were cut out of which (`cuts`), in words (`apart`), and whether there was a look for them; how those
    lie whose shape does not tell (`ways`); whether
    tokens are `packed` one behind the other where their number does not tell; what was done on reading the trace (`done`).
    """

    case: Case
    trace: Trace
    precision: Precision
    rounded: Mapping[str, str]
    show: str = ""
    shown: Shown | None = None
    pictures: bool = False
    pool: Pool | None = None
    cuts: dict[str, Pick] = field(default_factory=dict)
    ways: Mapping[str, Way | None] = field(default_factory=dict)
    apart: dict[str, list[str]] = field(default_factory=dict)
    looked: bool = False
    packed: bool = False
    done: dict[str, list[str]] = field(default_factory=dict)
    programs: dict[Config, tuple[list[Call], Inputs]] = field(default_factory=dict)

    def program(self, config: Config) -> tuple[list[Call], Inputs]:
        """The stage calls of the run under a config, and its inputs; found once, however often they are judged."""
        if config not in self.programs:
            self.programs[config] = self._program(config)
        return self.programs[config]

    def _program(self, config: Config) -> tuple[list[Call], Inputs]:
        case, t, n_mtp = self.case, self.training, self.n_mtp
        labels = t.targets(case.tokens, case.valid) if t else None
        with where(f"in {case.path / 'tokens.json'}"):
            inputs = read_inputs(config, case.tokens, case.positions, case.valid, labels=labels)
        found = program_of(config, inputs, n_mtp=n_mtp, parts=self.parts, losses=t.losses if t else None)
        if t:
            shapes = {n: case.checkpoint.shape(n) for n in case.checkpoint if not is_buffer(n)}
            found += backward_of(found, shapes, self.precision.plan)
            found += update_of(found, config, t)
        return found, inputs

    def calls(self, config: Config) -> list[Call]:
        """The program with what only some recorders show: codes of FP8 products, log-sum-exps."""
        program, taps = self.program(config)[0], self.trace.taps
        return with_lse(with_codes(program, self.precision.plan, taps) if has_codes(taps) else program, taps)

    @cached_property
    def weights(self) -> StageWeights:
        """The case's weights, as the candidate holds them."""
        return StageWeights(self.case.checkpoint, self.rounded)

    @cached_property
    def n_mtp(self) -> int:
        """How many MTP modules the weights have, under any dialect; SpecError where names or shapes are not the model's."""
        checkpoint = self.case.checkpoint
        shapes = {n: placeholder(checkpoint.shape(n)) for n in checkpoint}
        return ForCausalLM.from_weights(self.case.config, shapes).n_mtp

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
        first, second = ({c.tap: (c.stage, c.args, c.static) for c in self.program(config)[0]} for config in (a, b))
        return {tap for tap, call in first.items() if second.get(tap) != call}

    def comparison(
        self, config: Config, without: frozenset[str], told: frozenset[str] = frozenset()
    ) -> tuple[Comparison, list[Call]]:
        """What was recorded, ready to be compared under a config, and along which program; gauges not to be tried, and known."""
        check_layouts(self.trace.header.layouts)
        program, inputs = self.calls(config), self.program(config)[1]
        admitted = self._admitted(program, config, inputs)
        ours = {c.tap for c in program} | set(admitted.renamed)
        comparison = Comparison(
            config,
            self.precision,
            admitted,
            self._recorded(admitted, inputs, config.num_hidden_layers),
            without=without,
            told=told,
            show=self.show,
            pictures=self.pictures,
            unknown={n: np.asarray(self.trace.taps[n]) for n in self.trace.taps if n not in ours},
            pages=Pages(self.trace.taps),
        )
        return comparison, program

    def _admitted(self, program: list[Call], config: Config, inputs: Inputs) -> Admitted:
        """The taps that can be compared; arrays of several are taken apart when they are first met."""
        embedded = self._embedded(inputs)

        def admitted() -> Admitted:
            known, sizes = self.cuts, self.sizes
            return admit(program, self.trace, config, sizes, embedded, known, told=self.ways, packed=self.packed)

        self.ways = self.ways if self.looked else {}
        found = admitted()
        if not self.looked:
            self.looked, r = True, self._recorded(found, inputs, config.num_hidden_layers)
            for heads in (False, True):
                if heads and not self._some_heads(found, program, r, config):
                    continue
                found = admitted() if heads else found
                if found.doubt:
                    self.ways = nearest(found.doubt, program, r)
                    found = admitted()
                r = self._recorded(found, inputs, config.num_hidden_layers)
            odd = suspects(self.trace.taps, program, found.flawed)
            if several := fused_in(odd, program, r, config, self.sizes):
                self.take_apart(several)
                found = admitted()
        found.notes |= self.apart
        return found

    def _some_heads(self, a: Admitted, program: list[Call], r: Recorded, config: Config) -> bool:
        """Whether taps hold some heads only, and which; then as if that had been declared."""
        if "heads" in self.trace.header.slices:
            return False
        for taps in of_some_heads(self.trace.taps, a.flawed, program, config, self.sizes):
            if heads := which_heads(taps, program, r):
                slices = self.trace.header.slices | {"heads": heads}
                self.trace = replace(self.trace, header=replace(self.trace.header, slices=slices))
                what = f"{len(heads)} of {config.num_attention_heads} heads, told by value"
                self.apart = self.apart | {f'{what}: declare slices {{"heads": {heads}}}': list(taps)}
                return True
        return False

    @property
    def sizes(self) -> Sizes:
        """How many sequences and tokens there are."""
        return Sizes(len(self.case.tokens), self.parts)

    def take_apart(self, several: Mapping[str, Found]) -> None:
        """Put parts in the place of arrays that hold several taps."""
        seen = self.precision.seen  # bfloat16 values in a float32 array are what their array is
        dtypes = {p.tap: seen.get(name, x.dtype.name) for name, one in several.items() for p, x in one.parts}
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
        some = {t: (k, a.taps[t]) for t, k in a.picks.items() if t in a.mixed}
        adam = self.training.optimizer if self.training else None
        masters = adam.masters if adam else "float32"
        read = Read(named(inputs, self.parts), self.case.checkpoint, masters)
        return Recorded(
            taken,
            read,
            self.weights,
            p.plan,
            noise,
            parts,
            layers=layers,
            partial=some,
            odd={t: np.asarray(self.trace.taps[t]) for t in a.flawed if t.endswith(CHOSEN) and t in self.trace.taps},
            padding=padding_of(self.case.valid, self.sizes),
        )
