"""Gates that come before the mathematics: the same inputs, the same weights, enough recorded, a sound recording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from refimpl.autograd.errors import SpecError, where
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call
from refimpl.model import read_inputs
from refimpl.model.phases import in_part

from .case import Case
from .pages import Pages
from .program import owner
from .streamed import narrowed
from .trace import Header, Trace, digest


@dataclass(frozen=True)
class Gate:
    """ok, FAIL, or ? when it cannot be decided; a line of text, and details for the long form."""

    name: str
    state: Literal["ok", "FAIL", "?"]
    text: str
    details: tuple[str, ...] = ()


def inputs_gate(case: Case, trace: Trace) -> Gate:
    """Tokens, positions, padding and config must be the case's: anything else is another experiment (SpecError). A header may have
    the first sequences only, if that is what was run.
    """
    h = trace.header
    with where(f"in {case.path / 'tokens.json'}"):
        read_inputs(case.config, case.tokens, case.positions, case.valid)
    n = len(h.tokens) if case.valid is None and 0 < len(h.tokens) < len(case.tokens) else len(case.tokens)
    places = "which are then counted from 0; the case has its own" if h.positions is None else ""
    for name, mine, theirs, lacks in (
        ("tokens", case.tokens, h.tokens, ""),
        ("padding (valid)", case.valid, h.valid, "" if h.valid else "and the case has padding"),
        ("positions", _positions(case), _positions(h), places),
    ):
        if (mine if mine is None else mine[:n]) != theirs:
            other = f"the trace was recorded with other {name} than the case holds; record it again"
            silent = f"the trace's header has no {name}, {lacks}: declare them if they were used, else record it again"
            context = f"while comparing {case.path} with the trace's header"
            raise SpecError(f"{silent if lacks else other}\n  {context}")
    few = "" if n == len(case.tokens) else f" of the first {n} of {len(case.tokens)} sequences"
    mine_c, theirs_c = case.config, trace.config
    different = [
        f for f in Config.__dataclass_fields__ if f != "dialect" and getattr(mine_c, f) != getattr(theirs_c, f)
    ]
    different = [f for f in different if f != "num_nextn_predict_layers"]
    if different:
        f = different[0]
        what = f"{f} is {getattr(theirs_c, f)!r}, in the case {getattr(mine_c, f)!r}"
        return Gate("inputs", "FAIL", f"config differs: {what}", tuple(different))
    return Gate("inputs", "ok", f"config, {sum(map(len, h.tokens))} tokens{few}")


def _positions(run: Case | Header) -> list[list[int]]:
    """Positions as given, or what is meant without them: tokens counted from 0, padding 0."""
    if run.positions is not None:
        return run.positions
    real = run.valid or [[1] * len(row) for row in run.tokens]
    return [[n - 1 if one else 0 for n, one in zip(accumulate(row), row, strict=True)] for row in real]


def weights_gate(weights: Mapping[str, Array], header: Header, storage: str) -> tuple[Gate, dict[str, str]]:
    """Compare digests with the case's weights as they are, or rounded to bfloat16 or float16 if that is how the candidate holds
    them.

    -> the gate, and name -> dtype of the weights that agree only when they are rounded to it.
    """
    if not header.weights:
        return Gate(
            "weights", "?", "the trace declares no weight digests: wrong weights would look like wrong maths"
        ), {}
    rounded: dict[str, str] = {}
    wrong, missing = [], [n for n in weights if n not in header.weights]
    pages = Pages(weights)
    for name in [n for n in weights if n in header.weights]:
        w, theirs = weights[name], header.weights[name]
        pages.read(w.nbytes)
        if theirs == digest(w):
            continue
        if storage in ("bfloat16", "float16") and theirs == digest(narrowed(name, w, storage)):
            rounded[name] = storage
        else:
            wrong.append(name)
    extra = [n for n in header.weights if n not in weights]
    n = len(weights)
    if wrong:
        return Gate(
            "weights", "FAIL", f"{len(wrong)} of {n} tensors differ from the case: {wrong[0]}", tuple(wrong)
        ), rounded
    if missing or extra:
        text = f"{len(missing)} tensors not loaded, {len(extra)} not in the case: {(missing + extra)[0]}"
        return Gate("weights", "FAIL", text, tuple(missing + extra)), rounded
    return Gate(
        "weights", "ok", f"{n} of {n} tensors agree" + (f" after rounding to {storage}" if rounded else "")
    ), rounded


def phases_of(header: Header, taps: Iterable[str]) -> list[str]:
    """The phases of a run: declared, or else those that the taps' names begin with."""
    if header.phases != ["fwd"]:
        return header.phases
    return ["fwd", *sorted({t.partition("/")[0] for t in taps if in_part(t)} - {"fwd"})]


def coverage_gate(
    program: list[Call], trace: Trace, blind: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> Gate:
    """How many of our taps were recorded. Names we do not know, expected taps that are absent, and taps of which nothing is known
    (`blind`) make it undecided. renamed: names that were read as other taps.
    """
    as_read = renamed or {}
    taps, expected = ({as_read.get(t, t) for t in names} for names in (trace.taps, trace.header.expected))
    meant = {"fwd", *trace.header.phases, *[t.partition("/")[0] for t in taps]}
    ours = [c.tap for c in program if in_part(c.tap) or c.tap.partition("/")[0] in meant]
    seen = [t for t in ours if t in taps]
    unknown = sorted(taps - set(ours))
    absent = sorted(expected - taps)
    text = f"{len(seen)} of {len(ours)} taps recorded"
    details = tuple(t for t in ours if t not in taps)
    if not seen:
        return Gate("coverage", "?", "nothing to compare: no tap of the trace is one of ours", tuple(unknown))
    units, told = {owner(t) for t in ours}, trace.header.slices.get("layers")
    ends = [t for t in ours if t.count("/") == 1 and t.endswith("/logits")][-1:]  # a chunk in the middle needs none
    if told is not None:  # only these were meant to be recorded
        units, ends = {u for u in units if u.partition("/L")[2] in map(str, told)}, []
    unseen = sorted(units - {owner(t) for t in seen}) + [t for t in ends if t not in seen]
    if unseen:
        return Gate("coverage", "?", f"{text}; nothing of {', '.join(unseen[:4])}", details)
    if absent:
        return Gate("coverage", "?", f"{text}; expected but never recorded: {', '.join(absent[:3])}", tuple(absent))
    if unknown:
        return Gate("coverage", "?", f"{text}; unknown taps: {', '.join(unknown[:3])}", tuple(unknown))
    if blind:
        return Gate(
            "coverage", "?", f"{text}; what {blind[0]} is computed from is not known or not finite", tuple(blind)
        )
    return Gate("coverage", "ok", text, details)


def self_check_gate(header: Header) -> Gate:
    """The recorder's own test: the probe must not change the result."""
    if not header.self_check:
        return Gate("recording", "ok", "no self-check declared")
    for name, value in header.self_check.items():
        if value != 0:
            return Gate("recording", "?", f"the recorder's self-check {name} is {value}, not 0")
    return Gate("recording", "ok", "the recorder's self-checks are 0: " + ", ".join(header.self_check))
