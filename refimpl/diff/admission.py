"""Which recorded taps a stage can be replayed on, in our axes and layout; and for each of the others what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call
from refimpl.model.phases import Part

from .compare import unusable
from .dims import Sizes, shape_of
from .forms import in_our_form
from .gauges import ROPE_TAPS, swap_pairs
from .late import LATE, unshifted
from .numbering import LAYERS, is_count
from .padding import FILLED, NOWHERE, PACKED, Padding, padding_of, placed, without_fill
from .program import integers, owner
from .reading import Reading, open_ways, read, read_so
from .slots import of_slots, other_sizes
from .trace import Header, Trace
from .ways import FILLED_UP, PADDED, Pick, Way
from .wide import with_infinity

KNOWN = {"rope": ("interleaved", "half"), "mla": ("expanded", "absorbed", "auto"), "layers": LAYERS}


@dataclass
class Admitted:
    """taps in our axes; `picks`, of those that are a part, which, and `mixed`, those of stretches or of heads alone, beside which
    later stages may read our own; flawed: tap -> why; notes: what was done -> taps; renamed: name in the trace -> the tap it is;
    doubt: taps whose shape does not tell how they lie, and the ways in which they may.
    """

    taps: dict[str, Array] = field(default_factory=dict)
    picks: dict[str, Pick] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    flawed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    doubt: dict[str, tuple[Array, list[Way]]] = field(default_factory=dict)

    def note(self, tap: str, *done: str) -> None:
        """Say of a tap what was done to it."""
        for what in filter(None, done):
            self.notes.setdefault(what, []).append(tap)


def admit(
    program: list[Call],
    trace: Trace,
    c: Config,
    sizes: Sizes,
    embedded: Array,
    cuts: Mapping[str, Pick] | None = None,
    *,
    told: Mapping[str, Way | None] | None = None,
    packed: bool = False,
) -> Admitted:
    """Read every tap of the program that the trace holds. embedded (B, S, D): what the first layer reads; cuts, of taps that are
    known to be a part: which, in our axes already; told: how those lie whose shape does not tell, None if in no way; packed: see
    `placed`.
    """
    padding = padding_of(trace.header.valid, sizes)
    found, limits = Admitted(), {"router.ids": c.n_routed_experts, "router.groups": c.n_group}
    picked, recorded = parts(trace.header, c, embedded.shape[1]), _as_named(trace.taps, c, sizes, embedded, found)
    sized = other_sizes(program, recorded, c, sizes)
    configs = {call.tap: sized.get(call.tap, c) for call in program if call.tap in recorded}
    shapes = {call.tap: shape_of(call, configs[call.tap], sizes) for call in program if call.tap in recorded}
    for call in [call for call in program if call.tap in recorded]:
        stage, shape, limit = call.of, shapes[call.tap], limits.get(call.stage)
        x, done = _in_form(call, recorded, shape, padding, limit, configs[call.tap], packed)
        found.note(call.tap, *done)
        known, some = (cuts or {}).get(call.tap), within(picked, sizes.of(call.tap), stage.shape.split())
        dims, way = trace.header.dims.get(call.tap), (told or {}).get(call.tap)
        reading = Reading(x, "", known) if known else _read(call, x, shape, dims, some, way, found)
        note = unusable(reading.array if reading else x, integers(stage), limit)
        if reading is None or note:
            found.flawed[call.tap] = note or f"shape {x.shape}, expected {shape}{_may_be(call.tap, found)}"
            continue
        _take(found, call, reading, trace.header.layouts, c)
    _sized(found, program, sized, c, sizes)
    _follow(found, program, recorded, c.num_experts_per_tok)
    _packed_rows(found, program, {t for t in found.flawed if _is_longer(recorded[t], shapes[t])})
    return found


def _take(found: Admitted, call: Call, reading: Reading, layouts: Mapping[str, str], c: Config) -> None:
    """Admit a tap as it was read."""
    found.note(call.tap, reading.note)
    if reading.pick:
        found.picks[call.tap] = reading.pick
        found.mixed |= {call.tap} if _stands_alone(reading.pick, call.of.shape.split()) else set()
    x = reading.array.astype(np.int64) if integers(call.of) else reading.array
    found.taps[call.tap] = _canonical(call, x, layouts, c)


def _read(
    call: Call,
    x: Array,
    shape: tuple[int, ...],
    dims: str | None,
    some: Mapping[str, list[int]],
    way: Way | None,
    found: Admitted,
) -> Reading | None:
    """A tap in our axes, in the way that is known if its shape does not tell; then the ways are noted."""
    axes = call.of.shape.split()
    if doubt := open_ways(x, shape, axes, dims, some):
        found.doubt[call.tap] = x, doubt
        return read_so(x, way) if way else None
    return read(x, shape, axes, dims, some)


def _may_be(tap: str, found: Admitted) -> str:
    """What else an array may be, where no values tell."""
    ways = found.doubt[tap][1][:3] if tap in found.doubt else []
    return f"; it may be: {' | '.join([way.note for way in ways])}; declare which" if ways else ""


def _as_named(
    taps: Mapping[str, Array], c: Config, sizes: Sizes, embedded: Array, found: Admitted
) -> Mapping[str, Array]:
    """The taps under the names that they should have, with the slots that they should have."""
    for part in sizes.parts:
        taps, named = unshifted(taps, c.num_hidden_layers, part.name, embedded[:, part.start : part.stop])
        if named is not None:
            found.renamed |= named
            found.notes.setdefault(LATE, []).extend(named.values())
    return _without_shared(taps, c, found)


def _stands_alone(pick: Pick, axes: list[str]) -> bool:
    """Whether the entries know nothing of those beside them: stretches, and heads; tokens attend to all before them."""
    return all(isinstance(entries, slice) or axes[axis] == "H" for axis, entries in pick.items())


def _in_form(
    call: Call,
    taps: Mapping[str, Array],
    shape: tuple[int, ...],
    padding: Padding | None,
    limit: int | None,
    c: Config,
    packed: bool,
) -> tuple[Array, list[str]]:
    """A tap as our form has it, with rows where padding is and none behind, and what was done to it."""
    x, formed = in_our_form(call.stage, np.asarray(taps[call.tap]), shape, c.num_attention_heads)
    x, sent = without_fill(call, x, shape, taps.get(f"{owner(call.tap)}/router.ids"), c.num_experts_per_tok)
    rows = padding.at(call) if padding else None
    x, placing = placed(x, shape, call.of.shape.split(), rows, limit, packed=packed)
    return x, [*formed, *sent, *placing]


def _sized(found: Admitted, program: list[Call], sized: Mapping[str, Config], c: Config, sizes: Sizes) -> None:
    """Where all of a unit has another number of experts a token, its ids are wrong, and the rest is judged on them."""
    for call in [call for call in program if call.tap in sized and call.tap in found.taps]:
        if call.stage == "router.ids":
            found.flawed[call.tap] = f"shape {found.taps[call.tap].shape}, expected {shape_of(call, c, sizes)}"
        else:
            k, ours = sized[call.tap].num_experts_per_tok, c.num_experts_per_tok
            found.note(call.tap, f"sized by {k} experts a token instead of {ours}: judged on these ids")


def _follow(found: Admitted, program: list[Call], recorded: Mapping[str, Array], k: int) -> None:
    """Where a token has another number of experts, every array of slots or dispatched rows has another size: that is the fault
    of the ids alone.
    """
    for call in program:
        if call.stage == "router.ids" and call.tap in found.flawed and call.tap not in found.taps:
            unit, slots = owner(call.tap), np.asarray(recorded[call.tap]).shape[-1:]
            for other in [o for o in of_slots(program, unit) if o.tap in found.flawed and o is not call]:
                if other.of.shape[0] == "M" or np.asarray(recorded[other.tap]).shape[-1:] == slots:
                    del found.flawed[other.tap]
                    n = slots[0] if slots else 0
                    what = f"sized by {n} experts a token{f' instead of {k}' if n != k else ''}: not compared"
                    found.note(other.tap, what)


def _packed_rows(found: Admitted, program: list[Call], longer: set[str]) -> None:
    """Where padding has no experts, no rows of it are dispatched, so that these arrays have other rows than ours; and `longer` ones
    may hold rows of no token.
    """
    ids = [t for what in (PACKED, FILLED, NOWHERE) for t in found.notes.get(what, []) if t.endswith("router.ids")]
    fewer = {owner(t) for t in ids}
    more = {owner(t) for what, taps in found.notes.items() if what.startswith((FILLED_UP, PADDED)) for t in taps}
    for tap in [c.tap for c in program if c.of.shape.startswith("M ")]:
        if owner(tap) in fewer:
            if found.flawed.pop(tap, None) is not None or found.taps.pop(tap, None) is not None:
                found.note(tap, "dispatched without padding: not compared")
        elif owner(tap) in more and tap in longer:
            del found.flawed[tap]
            found.note(tap, "dispatched with rows of no token: not compared")


def _is_longer(x: Array, shape: tuple[int, ...]) -> bool:
    return x.ndim == len(shape) > 0 and x.shape[1:] == shape[1:] and len(x) > shape[0]


def parts(header: Header, c: Config, length: int) -> dict[str, list[int]]:
    """Axis letter -> the entries that the header's `slices` say were recorded: tokens, heads. SpecError for what is none."""
    known = {"tokens": ("S", length), "heads": ("H", c.num_attention_heads), "layers": ("", c.num_hidden_layers)}
    found = {}
    for key, told in header.slices.items():
        require(key in known, f"slices of {key!r}; known: {', '.join(known)}")
        letter, limit = known[key]
        whole = (
            isinstance(told, list)
            and all(type(i) is int and 0 <= i < limit for i in told)
            and len(set(told)) == len(told)
        )
        require(whole and told, f"slices {key} is {told!r}; expected a list of different numbers from 0 to {limit - 1}")
        if letter:
            found[letter] = list(told)
    return found


def within(picked: Mapping[str, list[int]], part: Part, axes: Sequence[str]) -> dict[str, list[int]]:
    """What of the declared entries lies in a part: tokens are counted over all parts. Where an array has keys and no queries, and
    no cache lies before them, these are its tokens.
    """
    here = [t - part.start for t in picked.get("S", []) if part.start <= t < part.stop]
    keys = here if "T" in axes and "S" not in axes and not part.start else []
    return {a: entries for a, entries in (dict(picked) | {"S": here, "T": keys}).items() if entries}


def _without_shared(taps: Mapping[str, Array], c: Config, found: Admitted) -> Mapping[str, Array]:
    """The taps, without slots of shared experts: fused kernels take these for routed ones that every token has, numbered behind
    the others.
    """
    changed: dict[str, Array] = {}
    for tap in [t for t in taps if t.endswith("/router.ids")] if c.n_shared_experts else []:
        ids = np.asarray(taps[tap])
        if ids.dtype.kind not in "iu" or not ids.ndim or not ids.size or int(ids.max()) < c.n_routed_experts:
            continue
        routed = ids < c.n_routed_experts
        k = int(routed[(0,) * (ids.ndim - 1)].sum())
        if not k or not (routed.sum(axis=-1) == k).all():
            continue
        weights = tap.replace("router.ids", "router.weights")
        for name in [t for t in (tap, weights) if t in taps and taps[t].shape == ids.shape]:
            changed[name] = np.asarray(taps[name])[routed].reshape(*ids.shape[:-1], k)
    if changed:
        found.notes.setdefault("shared experts are among the routed ones: their slots are taken out", []).extend(
            changed
        )
    return {**taps, **changed} if changed else taps


def check_layouts(layouts: Mapping[str, str]) -> None:
    """SpecError for a declared layout that does not exist."""
    for key, value in layouts.items():
        require(key in KNOWN, f"a layout of {key!r}; known: {', '.join(KNOWN)}")
        if not (is_count(value) if key == "layers" else value in KNOWN[key]):
            more = ", `L0 is L3`" if key == "layers" else ""
            raise SpecError(f"layout {key}={value!r}; known: {', '.join(KNOWN[key])}{more}")


def _canonical(call: Call, x: Array, layouts: Mapping[str, str], c: Config) -> Array:
    """The tap in our layout: rotated channels in the order of the config's pairs, a finite mask as -inf.

    transformers reads interleaved pairs and writes the two halves one after the other; the same permutation of q and
    k leaves every score as it is, so this is a layout, not a bug (DeepSeek-V3 #938, transformers #39687).
    """
    if call.stage == "mask":
        return with_infinity(x)
    ours = "interleaved" if c.rope_interleave else "half"
    theirs = layouts.get("rope", ours)
    if theirs == ours or call.tap.rpartition("/")[2] not in ROPE_TAPS:
        return x
    return swap_pairs(x, to_interleaved=ours == "interleaved")
