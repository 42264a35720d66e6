"""What a trace's header declares, held against what the trace holds: contradictions are bad input, useless words are told.

A declaration is believed where it says what arrays leave open. One that the arrays deny, or that names what does not exist, would
have to be ignored in silence or be believed against the evidence, so it is refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.layers.config import Config, Dialect
from refimpl.layers.stage import STAGES, Call
from refimpl.model.phases import is_part

from .admission import check_layouts, parts, within
from .declared_axes import as_read, check_letters, check_number, check_sizes, terms_of
from .dims import Sizes, letters, shape_of, size_of
from .numbering import LAYERS, layer_of
from .precision import GENERAL, declared_storage, meant_by
from .ranks import alone
from .reading import Reading, coarser
from .shards import Shards
from .trace import Trace
from .training import PHASES

Notes = dict[str, list[str]]
"""What was declared and says nothing -> the taps."""
Shape = Sequence[int]
_FORMS = ("mask", "mla.rope_tables")
"""Taps that are brought to our form by their numbers, whatever their axes."""
_ONLY = {"expanded": ("/mla.kv_b",), "absorbed": ("/mla.q_absorbed", "/mla.ctx_latent")}
"""Form of attention -> the taps that the other one has not."""


@dataclass(frozen=True)
class Declared:
    """A trace with its layers counted as ours, the program that it is of under a config, and how many sequences and tokens."""

    trace: Trace
    config: Config
    sizes: Sizes
    program: Sequence[Call]

    def checked(self, differing: Callable[[Config, Config], set[str]]) -> Notes:
        """What is declared and means nothing here. SpecError for what contradicts the taps, or names what does not exist.
        differing: the taps that two configs compute by other calls.
        """
        notes: Notes = {}
        with where("in the trace header"):
            _check_phases(self.trace)
            self._check_lengths()
            check_layouts(self.trace.header.layouts)
            _check_form(self.trace)
            picked = parts(self.trace.header, self.config, self.sizes.parts[-1].stop)
            _check_count(self.trace, self.config)
            _check_layers(self.trace, self.config)
            self._check_precision(notes)
            self._check_axes(notes, picked)
            self._unread_dialect(notes, differing)
        return notes

    def _check_lengths(self) -> None:
        """Taps of a part hold no more tokens than the part: those of a run that was not cut hold all, and are of one part."""
        parts_, taps = self.sizes.parts, {c.tap: c for c in self.program if c.tap in self.trace.taps}
        seen = [p for p in parts_ if any(t.startswith(f"{p.name}/") for t in taps)]
        if len(parts_) == 1 or len(seen) != 1:
            return
        run = Sizes(self.sizes.batch, [replace(seen[0], start=0, stop=parts_[-1].stop)])
        tokens = [c for c in taps.values() if c.of.shape.startswith("B S ")]
        whole = [c for c in tokens if coarser(tuple(self.trace.taps[c.tap].shape), shape_of(c, self.config, run))]
        has = f"{seen[0].name} has {seen[0].length} of {run.parts[0].length} tokens"
        told = f"phases {', '.join(p.name for p in parts_)} say that {has}"
        require(not tokens or len(whole) < len(tokens), f"{told}, and all its taps hold all of them")

    def _check_precision(self, notes: Notes) -> None:
        """Every pattern means some tap, and every tap is meant one way."""
        told = {p: declared_storage(p, s) for p, s in self.trace.header.precision.items() if p not in GENERAL}
        ours = [c.tap for c in self.program]
        taps = dict.fromkeys([*self.trace.taps, *ours])
        for tap in taps:
            said = {s: p for p, s in told.items() if meant_by(tap, p)}
            both = " and ".join([f"{p!r} is {s}" for s, p in said.items()])
            require(len(said) < 2, f"precision: {both}, and {tap} is both; name each part once")
        for p in told:
            met = [tap for tap in taps if meant_by(tap, p)]
            known = met or any(fnmatchcase(s.tap, p) for s in STAGES.values())
            if not known:  # names that are near are looked for when there is something to say
                raise SpecError(f"precision {p!r} means no tap of this run{_near(p, [*_names(ours), *ours])}")
            if not any(tap in self.trace.taps for tap in met):
                notes[f"precision {p!r} means no tap that was recorded"] = []

    def _check_axes(self, notes: Notes, picked: Mapping[str, list[int]]) -> None:
        """Axes of all taps that were recorded, and whether something is cut as `slices` say."""
        calls = {c.tap: c for c in self.program}
        lone, cut, whole = (
            "" if isinstance(self.trace.taps, Shards) else alone(self.trace.header),
            set[str](),
            dict[str, str](),
        )
        for tap in self.trace.taps:
            with where(f"at {tap}"):
                some, found = self._check_tap(tap, calls.get(tap), picked, lone)
            cut |= found
            whole |= dict.fromkeys(some - found, tap)
        _check_slices(picked, cut, whole, self.config, self.sizes.parts[-1].stop, notes)
        if lone:
            notes[
                f"the file is of {lone} alone: its taps are taken for whole ones, and not compared with other ranks'"
            ] = []
        self._unused_axes(notes, calls)

    def _check_tap(
        self, tap: str, call: Call | None, picked: Mapping[str, list[int]], lone: str
    ) -> tuple[set[str], set[str]]:
        """Its axes of which a part was declared, and those of which it is a part. SpecError for axes that it has not."""
        shape, dims = tuple(self.trace.taps[tap].shape), self.trace.header.dims.get(tap)
        terms = None if dims is None else terms_of(dims)
        plain = call is None or tap.startswith(("grad/", "upd/"))  # names of arrays, and of weights
        if dims is not None and terms is not None:
            check_number(dims, terms, shape, known=not plain)
        if call is None or plain:
            return set(), set()
        axes, numbers = call.of.shape.split(), letters(self.config, call.of, tap, self.sizes)
        some = within(picked, self.sizes.of(tap), axes) if is_part(tap.partition("/")[0]) else {}
        formed = tap.rpartition("/")[2] in _FORMS
        if dims is not None and terms is not None:
            check_letters(dims, terms, axes)
            if not formed:
                check_sizes(dims, terms, shape, call, numbers, some)
        if formed or not (some or lone):
            return set(), set()
        reading = as_read(shape, call, numbers, some, dims)
        part = {axes[i]: entries for i, entries in reading.pick.items()} if reading else {}
        if lone:
            _check_whole(shape, [size_of(a, numbers) for a in axes], reading, part.keys() - some.keys(), lone)
        return (set(some) & set(axes) if reading else set()), set(part)

    def _unused_axes(self, notes: Notes, calls: Mapping[str, Call]) -> None:
        """Dims of what was not recorded: useless if it is a tap, and a slip if it is none."""
        h, taps = self.trace.header, self.trace.taps
        lost = {*taps.missing, *taps.wrong} if isinstance(taps, Shards) else set()
        unused = [t for t in h.dims if t not in taps and t not in lost]
        units, stages = {_place(c)[1] for c in calls}, {s.tap for s in STAGES.values()}
        for tap in unused:
            phase, unit, name = _place(tap)
            known = (is_part(phase) or phase in PHASES) and (unit in units or unit.startswith("mtp"))
            if not (tap in calls or tap in h.expected or (known and {name, f"mtp.{name}"} & stages)):
                raise SpecError(f"dims of {tap!r}, which is no tap here{_near(tap, [*taps, *calls])}")
        if unused:
            notes["dims are declared of taps that were not recorded"] = unused

    def _unread_dialect(self, notes: Notes, differing: Callable[[Config, Config], set[str]]) -> None:
        """Points of the dialect that change no stage of this run."""
        for name in Dialect.choices():
            usual, value = getattr(Dialect(), name), getattr(self.config.dialect, name)
            if value != usual:
                plain: dict[str, Any] = {name: usual}
                other = self.config.replace(dialect=replace(self.config.dialect, **plain))
                if not differing(self.config, other):
                    notes[f"dialect {name}={value} changes no stage of this run"] = []


def _check_phases(trace: Trace) -> None:
    """Declared phases are some that there are, and taps are of declared ones."""
    told = trace.header.phases
    odd = next((p for p in told if not is_part(p) and p not in PHASES), "")
    require(not odd, f"phases: {odd!r} is none; known: fwd, decN behind N tokens, {', '.join(PHASES)}")
    for tap in trace.taps if told != ["fwd"] else ():  # which is what nobody declared
        phase = tap.partition("/")[0]
        known = phase in told or not (is_part(phase) or phase in PHASES)
        require(known, f"phases are {', '.join(told)}, and yet there is {tap}")


def _check_form(trace: Trace) -> None:
    told = trace.header.layouts.get("mla", "")
    for form, ends in _ONLY.items():
        odd = next((t for t in trace.taps if t.endswith(ends)), "") if told in _ONLY and form != told else ""
        require(not odd, f"layouts say that mla is {told}, and yet there is {odd}, which only the {form} form has")


def _check_count(trace: Trace, c: Config) -> None:
    """Layers that are counted otherwise are layers of the model."""
    told, last = trace.header.layouts.get("layers", LAYERS[0]), c.num_hidden_layers - 1
    for tap in trace.taps if told not in LAYERS else ():
        n = layer_of(tap) or 0
        require(
            n <= last, f"layouts say that layers are counted {told!r}, and then there is L{n}; the last one is L{last}"
        )


def _check_layers(trace: Trace, c: Config) -> None:
    """Taps are of declared layers; what goes into one is the layer's before."""
    told = trace.header.slices.get("layers")
    if not isinstance(told, list):
        return
    meant = {f"L{i}" for i in told} | {f"L{i}/resid" for i in range(c.num_hidden_layers) if i + 1 in told}
    for tap in trace.taps:
        unit, _, name = tap.partition("/")[2].partition("/")
        odd = unit[:1] == "L" and unit[1:].isdigit() and int(unit[1:6]) < c.num_hidden_layers
        require(not odd or {unit, f"{unit}/{name}"} & meant, f"slices are of layers {told}, and yet there is {tap}")


def _check_whole(shape: Shape, full: Shape, reading: Reading | None, few: Iterable[str], lone: str) -> None:
    """SpecError for less than a tap in a file of one of several ranks."""
    less = reading is None and math.prod(shape) < math.prod(full)
    told = f"shape {_by(shape)} of {_by(full)}, and the file is of {lone} alone"
    require(
        not less and not set(few),
        f"{told}: give the folder of all ranks' files, with dims that say what is split, as B S H@tp Dv",
    )


def _check_slices(
    picked: Mapping[str, list[int]], cut: set[str], whole: Mapping[str, str], c: Config, length: int, notes: Notes
) -> None:
    """Where fewer tokens or heads than all are declared, some tap has no more."""
    for letter, key, n in (("S", "tokens", length), ("H", "heads", c.num_attention_heads)):
        some = picked.get(letter, [])
        if some and len(some) < n and letter not in cut:
            told = f"slices say that {len(some)} of {n} {key} were recorded"
            require(
                letter not in whole, f"{told}, and every tap that has {key} holds all of them, as {whole.get(letter)}"
            )
            notes[f"{told}, and no tap has {key}"] = []


def _place(tap: str) -> tuple[str, str, str]:
    """Phase, layer or module, and what of it: of `fwd/L1/mla.q`, and of `fwd/logits`, whose layer is ""."""
    phase, _, rest = tap.partition("/")
    unit, _, name = rest.rpartition("/")
    return phase, unit, name


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "one number"


def _names(taps: Iterable[str]) -> list[str]:
    """The taps' last parts, and their groups as patterns: `mla.q`, `mla.*`."""
    last = list(dict.fromkeys(t.rpartition("/")[2] for t in taps))
    return last + list(dict.fromkeys(f"{n.partition('.')[0]}.*" for n in last if "." in n))


def _near(name: str, known: Sequence[str]) -> str:
    near = [k for k in known if k.endswith(f"/{name}")] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; is it {near[0]}?" if near else ""
