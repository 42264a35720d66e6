"""A recipe file (TOML) read and checked: unknown keys, wrong types, schedules that do not add up to their phase."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.layers.config import Config
from refimpl.layers.presets import DEEPSEEK_V3

from .amounts import amount, shown
from .reading_tasks import read_tasks, read_weighting
from .run import SCHEDULES, Optimizer, Phase, Run
from .schedule import SHAPES, Piece, Schedule
from .steps import Steps, steps_of
from .values import known_keys, number, tables, text, whole

_RUN = ("name", "origin", "unpublished", "ema", "optimizer", "phase")
JOB = ("model", "data", "train", "checkpoints", "evaluation", "samples", "log")
"""Tables of a recipe file that say what a training run does with the recipe (`refimpl.train.run.reading`); not read here."""
_PHASE = (
    "name",
    "tokens",
    "steps",
    "sequence",
    "batch",
    "batch_multiple",
    "lr_per_batch",
    "masked",
    "config",
    "task",
    "weighting",
    *SCHEDULES,
)
_PIECE = ("value", "from", "to", "shape", "tokens", "steps", "share", "until")
_LENGTHS = ("tokens", "steps", "share", "until")
_OPTIMIZER = {f.name for f in fields(Optimizer)}
PRECISIONS = ("fp8", "bf16", "float32", "float64", "fp8_hopper", "fp8_ue8m0", "fp16")
FOLDER = Path(__file__).with_name("recipes")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {f.stem: f for f in sorted(FOLDER.glob("*.toml"))}


def document(source: str | Path) -> dict[str, Any]:
    """The TOML of a recipe: a file, or the name of one that comes with the package. SpecError if there is none, or no TOML."""
    path = recipes().get(str(source), Path(source))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(recipes())
        raise SpecError(f"{source}: no recipe file can be read there, and it is none of {known}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{source}: not TOML: {error}") from error


def load(source: str | Path) -> Run:
    """The run that a recipe describes. SpecError says what is wrong and where."""
    found = document(source)
    with where(f"in recipe {source}"):
        return read(found)


def read(d: Mapping[str, Any]) -> Run:
    """A run from the keys and values of a recipe file."""
    known_keys(d, (*_RUN, *JOB), "the recipe")
    phases = d.get("phase", [])
    require(tables(phases) and phases, "a recipe has at least one [[phase]]")
    o = d.get("optimizer", {})
    require(isinstance(o, Mapping), f"optimizer is {o!r}; expected a table")
    with where("in [optimizer]"):
        optimizer = _optimizer(o)
    notes = d.get("unpublished", [])
    require(isinstance(notes, list) and all(isinstance(n, str) for n in notes), "unpublished is a list of texts")
    ema = d.get("ema")
    require(
        ema is None or (number(ema) and 0 <= ema < 1), f"ema is {ema!r}; the decay of an average is in 0..1, without 1"
    )
    read_phases = tuple([_phase(p, i) for i, p in enumerate(phases, 1)])
    return Run(text(d, "name"), text(d, "origin"), read_phases, optimizer, tuple(notes), ema)


# ---- The parts


def _optimizer(d: Mapping[str, Any]) -> Optimizer:
    known_keys(d, _OPTIMIZER, "the optimizer")
    for key in ("eps", "weight_decay", "clip", "init_std", "loss_scale"):
        require(
            key not in d or (number(d[key]) and d[key] >= 0),
            f"{key} is {d.get(key)!r}; expected a number of at least 0",
        )
    betas = tuple(d.get("betas", (0.9, 0.95)))
    require(
        len(betas) == 2 and all(number(b) and 0 <= b < 1 for b in betas), f"betas is {d.get('betas')!r}; two of 0..1"
    )
    choices = {"moments": ("fp32", "bf16"), "decays": ("all", "matrices"), "precision": PRECISIONS}
    for key, known in choices.items():
        require(d.get(key, known[0]) in known, f"{key} is {d.get(key)!r}; known: {', '.join(known)}")
    fp16 = d.get("precision") == "fp16"
    require(
        fp16 == (d.get("loss_scale") is not None), "loss_scale goes with precision 'fp16', and 'fp16' with a loss_scale"
    )
    return Optimizer(**dict(d) | {"betas": betas})


def _phase(d: Mapping[str, Any], number: int) -> Phase:
    name = d.get("name", f"{number}")
    with where(f"in phase {name!r}"):
        known_keys(d, _PHASE, "a phase")
        for key in ("sequence", "batch", "lr"):
            require(key in d, f"{key} is missing")
        sequence, multiple = whole(d, "sequence", 0), whole(d, "batch_multiple", 1)
        require(("tokens" in d) != ("steps" in d), "a phase has a length: either tokens or steps")
        tokens = int(amount(d["tokens"])) if "tokens" in d else whole(d, "steps", 0) * sequence * _constant(d["batch"])
        require(
            0 < tokens < 2**62, f"a phase of {float(tokens):.3g} tokens; expected 1 to 2^62, which is 4.6 million T"
        )
        batch = _schedule("batch", d["batch"], tokens, None)
        require(all(min(p.start, p.end) >= 1 for p in batch.pieces), "a batch has at least one sequence")
        steps = steps_of(batch, sequence, multiple)
        schedules = {key: _schedule(key, d.get(key, 0), tokens, steps) for key in SCHEDULES}
        changes = d.get("config", {})
        require(isinstance(changes, Mapping), f"config is {changes!r}; expected a table of config.json keys")
        with where("in config"):
            Config.from_dict(DEEPSEEK_V3.to_dict() | changes)
        per = whole(d, "lr_per_batch", 1) if "lr_per_batch" in d else None
        masked = d.get("masked", False)
        require(isinstance(masked, bool), f"masked is {masked!r}; expected true or false")
        tasks = read_tasks(d.get("task", []), masked, [same.batch for same in steps.runs])
        weighting = read_weighting(d.get("weighting", {}), tasks)
        return Phase(
            str(name), tokens, sequence, multiple, batch, steps, schedules, masked, changes, per, tasks, weighting
        )


def _schedule(key: str, given: Any, tokens: int, steps: Steps | None) -> Schedule:
    """The pieces of one schedule, which must cover exactly the tokens of its phase."""
    pieces = [{"value": given}] if not isinstance(given, list) else given
    require(
        tables(pieces) and pieces, f"{key} is {given!r}; expected a number, or a list of pieces such as {{value = 1}}"
    )
    found: list[Piece] = []
    for i, d in enumerate(pieces, 1):
        with where(f"in {key}, piece {i} of {len(pieces)}"):
            first, before = (found[-1].last, found[-1].end) if found else (0, None)
            found.append(_piece(d, first, before, tokens, steps, is_last=i == len(pieces)))
    end = found[-1].last
    if end != tokens:
        lengths = " + ".join(shown(p.tokens) for p in found)
        off = f"{shown(abs(end - tokens))} too {'much' if end > tokens else 'little'}"
        raise SpecError(f"{key} does not add up: {lengths} = {shown(end)} tokens, the phase has {shown(tokens)}: {off}")
    return Schedule(tuple(found))


def _piece(
    d: Mapping[str, Any], first: int, before: float | None, tokens: int, steps: Steps | None, *, is_last: bool
) -> Piece:
    known_keys(d, _PIECE, "a piece")
    start, end = _ends(d, before)
    shape = d.get("shape", "linear" if start != end else "constant")
    require(shape in SHAPES, f"shape is {shape!r}; known: {', '.join(SHAPES)}")
    require(start == end or shape != "constant", f"constant, but from {start:g} to {end:g}")
    given = [k for k in _LENGTHS if k in d]
    require(len(given) <= 1, f"a piece has one length, not {' and '.join(given)}")
    require(given or is_last, f"a piece that is not the last has a length: {', '.join(_LENGTHS[:-1])} or until")
    unit = given[0] if given else "until"
    if unit == "steps":
        return _by_steps(shape, start, end, first, float(amount(d["steps"])), steps)
    of = {"tokens": first, "share": first, "until": 0}[unit]
    length = amount(d.get(unit, tokens)) * (tokens if unit == "share" else 1)
    last = of + round(length)
    require(last > first, f"it ends at {shown(last)} tokens, but begins at {shown(first)}")
    return Piece(shape, start, end, first, last - first)


def _by_steps(shape: str, start: float, end: float, first: int, count: float, steps: Steps | None) -> Piece:
    if steps is None:
        raise SpecError("the batch decides how long a step is: its pieces are counted in tokens, until or share")
    require(count > 0, "a piece without steps")
    begin = steps.step(first)
    require(begin + count <= len(steps), f"{count:g} steps from step {begin} on; the phase has {len(steps)}")
    last = min(steps.token(begin + count), steps.tokens)
    return Piece(shape, start, end, first, last - first, count, begin)


def _ends(d: Mapping[str, Any], before: float | None) -> tuple[float, float]:
    """Start and end: `value` for both, or `from` (where the piece before ended) and `to`."""
    require(
        ("value" in d) != ("to" in d),
        "a piece has either a value, or an end: to (and from, if it is not the one before)",
    )
    for key in ("value", "from", "to"):
        require(key not in d or (number(d[key]) and d[key] >= 0), f"{key} is {d.get(key)!r}; a number of at least 0")
    if "value" in d:
        require("from" not in d, "from belongs to a piece with an end: to")
        return float(d["value"]), float(d["value"])
    start = d.get("from", before)
    require(start is not None, "the first piece has no piece before it: from is missing")
    return float(start or 0), float(d["to"])


def _constant(batch: Any) -> int:
    require(number(batch) and batch == int(batch), "a phase whose length is given in steps has one number as its batch")
    return int(batch)
