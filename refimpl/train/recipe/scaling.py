"""A recipe made small, with the shape of its curves kept; and recipes as files again.

With a = new / old tokens, b = batches, c = sequence lengths, every length in tokens is multiplied by a and every length in steps
by a / (b c): each piece keeps its share of the run, in tokens and in steps. Values keep their ratios: the batch ramp is
multiplied by b, the learning rate by one factor; gamma, lambda and alpha stay. So v'(x) / v'(peak) = v(x) / v(peak) at every
fraction x of the run, up to whole batches (a batch has at least one sequence) and whole tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from refimpl.autograd.errors import require

from .run import Phase, Run
from .schedule import Piece, Schedule


def scaled(
    run: Run,
    *,
    tokens: int | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    multiple: int | None = None,
) -> dict[str, Any]:
    """The recipe with `tokens` in all its phases together, the first phase's sequences of `sequence` tokens, batches of `batch`
    sequences at most in it, a learning rate of `lr` at most, every batch a `multiple` of so many sequences (data-parallel ranks
    share them evenly); what is None stays. -> a document for `read` or `to_toml`.
    """
    first = run.phases[0]
    peaks = {"batch": _peak(first.batch), "lr": _peak(first.schedules["lr"])}
    for name, value in (
        ("tokens", tokens),
        ("sequence", sequence),
        ("batch", batch),
        ("lr", lr),
        ("multiple", multiple),
    ):
        require(value is None or value > 0, f"{name} is {value}; it must be positive")
    a = Fraction(tokens or run.tokens, run.tokens)
    b = Fraction(batch or round(peaks["batch"])) / Fraction(peaks["batch"])
    c = Fraction(sequence or first.sequence, first.sequence)
    rate = 1.0 if lr is None else lr / peaks["lr"]
    optimizer = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(run.optimizer).items() if v is not None}
    head: dict[str, Any] = {"name": run.name, "origin": run.origin, "unpublished": list(run.unpublished)}
    if any(factor != 1 for factor in (a, b, c, rate)):
        head["origin"] += (
            f"; scaled: tokens x {float(a):.3g}, batch x {float(b):.3g}, sequence x {float(c):.3g}, lr x {rate:.3g}"
        )
    if run.ema is not None:
        head["ema"] = run.ema
    phases = [_phase(p, a, b, c, rate) for p in run.phases]
    for phase in phases:
        phase["batch_multiple"] = multiple or phase["batch_multiple"]
    return head | {"optimizer": optimizer, "phase": phases}


def _peak(s: Schedule) -> float:
    return max([max(p.start, p.end) for p in s.pieces])


def _phase(p: Phase, a: Fraction, b: Fraction, c: Fraction, rate: float) -> dict[str, Any]:
    sequence = max(1, round(p.sequence * c))
    d: dict[str, Any] = {"name": p.name, "tokens": max(1, round(p.tokens * a)), "sequence": sequence}
    d |= {
        "batch_multiple": max(1, round(p.multiple * b)),
        "batch": _pieces(p.batch, a, Fraction(1), float(b), at_least=1),
    }
    for name, s in p.schedules.items():
        d[name] = _pieces(s, a, a / (b * c), rate if name == "lr" else 1.0)
    if p.lr_per_batch:
        d["lr_per_batch"] = max(1, round(p.lr_per_batch * b))
    config = dict(p.config)
    rope = config.get("rope_scaling")
    if isinstance(rope, Mapping) and "original_max_position_embeddings" in rope:
        config["rope_scaling"] = dict(rope) | {
            "original_max_position_embeddings": max(1, round(rope["original_max_position_embeddings"] * c))
        }
    d |= {"masked": p.masked} | ({"config": config} if config else {})
    return d | _tasks(p) if p.tasks else d


def _tasks(p: Phase) -> dict[str, Any]:
    """The tasks and how they are weighed, without what is the default."""
    by = p.weighting.by
    weighting = asdict(p.weighting) if by == "loss-ratio" else {"by": by}
    tasks = [asdict(t) for t in p.tasks]
    if by != "fixed":
        tasks = [{k: v for k, v in t.items() if k != "weight"} for t in tasks]
    return {"weighting": weighting, "task": tasks}


def _pieces(s: Schedule, a: Fraction, steps: Fraction, factor: float, at_least: float = 0) -> Any:
    """The pieces of a schedule as a recipe writes them; one constant piece is a number."""

    def value(v: float) -> float:
        return max(at_least, v * factor)

    def piece(p: Piece) -> dict[str, Any]:
        if p.start == p.end:
            d: dict[str, Any] = {"value": value(p.start)}
        else:
            d = {"from": value(p.start), "to": value(p.end), "shape": p.shape}
        return d | ({"until": round(p.last * a)} if p.steps is None else {"steps": float(Fraction(p.steps) * steps)})

    found = [piece(p) for p in s.pieces]
    return found[0]["value"] if len(found) == 1 and "value" in found[0] else found


def to_toml(d: Mapping[str, Any]) -> str:
    """A recipe document as TOML; reading it gives the document again."""
    lines = [f"{k} = {_value(v)}" for k, v in d.items() if k not in ("optimizer", "phase")]
    lines += ["", "[optimizer]", *[f"{k} = {_value(v)}" for k, v in d["optimizer"].items()]]
    for phase in d["phase"]:
        lines += ["", "[[phase]]", *[f"{k} = {_value(v)}" for k, v in phase.items()]]
    return "\n".join(lines) + "\n"


def _value(v: Any) -> str:
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, str):
        return '"' + "".join(f"\\u{ord(c):04x}" if c in '"\\' or ord(c) < 32 or ord(c) == 127 else c for c in v) + '"'
    if isinstance(v, Mapping):
        return "{ " + ", ".join(f"{k} = {_value(x)}" for k, x in v.items()) + " }"
    if isinstance(v, list) and any(isinstance(x, Mapping) for x in v):
        return "[\n" + "".join(f"    {_value(x)},\n" for x in v) + "]"
    if isinstance(v, list):
        return "[" + ", ".join(_value(x) for x in v) + "]"
    return repr(v)
