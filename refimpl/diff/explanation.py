"""One number of one tap in words: the equation, the inputs by name, the terms by size, what everybody gives, what is allowed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES, Call

from .examined import Examined
from .gradients import LOSS, gradient_name
from .part import Index, Part, smallest
from .tangents import is_gradient
from .terms import Term, Terms, moved_by, terms_of

INPUTS = 20
"""So many inputs are listed."""
LABEL = 14
"""Width of the column of labels."""


def explain_number(x: Examined, at: Index | None = None, most: int = 8) -> list[str]:
    """Lines on the number at an index (default: the one that is furthest off), `most` terms of each kind."""
    require(most > 0, f"{most} terms; at least 1")
    index = x.worst_in(x.worst_row()) if at is None else at
    with np.errstate(all="ignore"):
        part = smallest(x.part(index))
        body = _choice(x, index) if x.stage.compare == "set" else _value(x, index, part, most)
        return [f"{x.finding.tap}{list(index)}: {x.stage.what} ({x.stage.eq})", *_stage(x, part), *body]


def _line(label: str, text: str) -> str:
    return f"  {label:<{LABEL}} {text}".rstrip()


def _stage(x: Examined, part: Part) -> Iterator[str]:
    """The equation, which input is which, the settings."""
    call = part.calls[-1]
    doc = " ".join((x.stage.__doc__ or "").partition("\n\n")[0].split())
    yield _line("equation", doc)
    if is_gradient(call):
        yield from _readers(call)
    else:
        yield from _inputs(x, call)
    if len(part.calls) > 1:
        inner = ", ".join([c.tap.removeprefix("fwd/") for c in part.calls[:-1]][-6:])
        yield _line("region", f"{len(part.calls)} stages that were not recorded apart: ... {inner}, itself")


def _readers(call: Call) -> Iterator[str]:
    """What reads the tap or weight, and so sends something back to it."""
    for r in call.static["readers"]:
        sent = f"{gradient_name(r.tap)}{', which is 1' if r.stage == LOSS else ''}"
        yield _line("reader", f"{r.tap} ({r.of.what}), by {sent}")


def _inputs(x: Examined, call: Call) -> Iterator[str]:
    parameters = list(inspect.signature(x.stage.fn).parameters)
    pairs = [(parameters[min(i, len(parameters) - 1)], a) for i, a in enumerate(call.args)]
    shown = [f"{p} = {_named(a)}" for p, a in pairs[:INPUTS]]
    yield _line("inputs", ", ".join([*shown, *([f"and {len(pairs) - INPUTS} more"] if len(pairs) > INPUTS else [])]))
    if call.static:
        yield _line(
            "settings", ", ".join([f"{n}={_setting(v)}" for n, v in x.grounds.calls[x.finding.tap].static.items()])
        )


def _named(arg: object) -> str:
    return "(" + ", ".join(map(_named, arg)) + ")" if isinstance(arg, tuple) else "none" if arg is None else str(arg)


def _setting(value: object) -> str:
    return np.dtype(value).name if isinstance(value, type) else str(value)


def _value(x: Examined, index: Index, part: Part, most: int) -> Iterator[str]:
    """What everybody gives, what is allowed, the terms."""
    e, own = float(x.step.exact[index]), float(x.candidate()[index])
    yield _line("float64", f"{e:.10g}")
    yield _line("candidate", f"{own:.10g}   difference {0.0 if own == e else own - e:+.3e}{_recorded(x, index)}")
    if x.stage.compare == "exact":
        yield _line("allowed", "nothing: the number is exact")
    else:
        twins = [float(np.asarray(t)[index]) for t in x.step.twins()]
        yield _line("twins", "  ".join([f"{t:.10g}" for t in twins]))
        yield from _allowed(x, index)
    terms = terms_of(part)
    if not np.isfinite(terms.y):
        yield from _infinite(terms)
        return
    yield from _sum(terms, most)
    yield from _slopes(terms, most)
    if not terms.by_name:
        moved = [f"{n}{list(i)} = {v}" for n, i, v in moved_by(part)]
        floats = any(a.dtype.kind == "f" for a in part.leaves.values())
        nothing = "nothing: every slope is 0" if floats else "no input's value, only on its place"
        yield _line("depends on", ", ".join(moved[:most]) or nothing)
    yield from _hint(terms, own, x)


def _infinite(terms: Terms) -> Iterator[str]:
    """Which inputs a number owes it to that it is none."""
    guilty = [t for found in terms.by_name.values() for t in found if not np.isfinite(t.value)]
    text = ", ".join([f"{t.name}{list(t.index)} = {t.value}" for t in guilty[:8]])
    yield _line("not finite", f"because of {text}" if text else "though every input is: the stage overflows")


def _recorded(x: Examined, index: Index) -> str:
    inside = all(i in entries for i, entries in zip(index, x.entries(), strict=True))
    return "" if inside else " (not recorded: float64's own number is shown)"


def _allowed(x: Examined, index: Index) -> Iterator[str]:
    f, row = x.finding, index[:-1]
    size, error = x.size(row), float(x.errors()[row])
    beyond = "beyond" if error > f.allowed else "within"
    yield _line(
        "allowed",
        f"{f.allowed:.1e} of a row's size: here {f.allowed:.1e} x {size:.4g} = {f.allowed * size:.1e}; the row is off by"
        f" {error * size:.1e}, {beyond}",
    )
    if f.lean > f.upright:
        yield _line("lean", f"the whole tap leans one way by {f.lean:.1e}; allowed {f.upright:.1e}")


def _sum(terms: Terms, most: int) -> Iterator[str]:
    """The terms that sum to the number."""
    found = terms.largest
    if not found:
        return
    total = sum(t.product for t in found)
    yield _line(
        "terms",
        f"{len(found)}, of {_some(terms.exact)}: they sum to the number (apart by {abs(total - terms.y):.1e})",
    )
    for t in found[:most]:
        share = f"{t.product / terms.y:+8.1%}" if terms.y else ""
        yield _line("", f"{t.product:+.6e} {share:>9}  {_factors(t)}")
    if len(found) > most:
        yield _line("", f"{sum(t.product for t in found[most:]):+.6e}            the other {len(found) - most} terms")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _factors(t: Term) -> str:
    """`x[0, 3] = 0.2  x  w[7, 3] = 0.4`, and what is left of the slope."""
    own = f"{t.name}{list(t.index)} = {t.value:.6g}"
    if t.partner is None:
        return own if t.slope == 1 else f"{own}  x  {t.slope:.6g}"
    name, index, rest = t.partner
    other = f"{own}  x  {name}{list(index)} = {t.slope / rest:.6g}"
    return other if abs(rest - 1) < 1e-12 else f"{other}  x  {rest:.6g}"


def _slopes(terms: Terms, most: int) -> Iterator[str]:
    """Inputs in which the stage is not of degree one."""
    found = sorted([t for n in terms.first_order for t in terms.by_name[n]], key=lambda t: -abs(t.product))
    if not found:
        return
    yield _line(
        "first order", f"of {_some(terms.first_order)}: how far 1 % more of an input moves the number, in %; not a sum"
    )
    for t in found[:most]:
        share = f"{t.product / terms.y:+8.4f}" if terms.y else ""
        yield _line("", f"{share:>9}  {t.name}{list(t.index)} = {t.value:.6g}, slope {t.slope:.6g}")
    if len(found) > most:
        yield _line("", f"          and {len(found) - most} more")


def _hint(terms: Terms, own: float, x: Examined) -> Iterator[str]:
    """What would turn the number into the candidate's, if it is one term or one factor."""
    near = 8 * x.finding.allowed * abs(terms.y)
    away = own - terms.y
    if not np.isfinite(own) or abs(away) <= near:
        return
    for t in terms.largest if len(terms.largest) > 1 else []:
        for what, change in (("without", -t.product), ("with twice", t.product)):
            if abs(away - change) <= near:
                yield _line("hint", f"the candidate's number is the sum {what} the term of {t.name}{list(t.index)}")
                return
    if terms.y:
        yield _line("hint", f"the candidate's number is {own / terms.y:.6g} x ours")


def _choice(x: Examined, index: Index) -> Iterator[str]:
    """A chosen set: the scores in falling order, who chose what, how clearly it was won."""
    row = index[:-1]
    part = smallest(x.part(index))
    leaf = part.calls[-1].args[0]
    if len(part.calls) > 1 or part.leaves[leaf].shape[:-1] != (1,) * len(row):
        yield _line("scores", "were not recorded: record the tap that is chosen by to see them")
        yield from _who(x, row)
        return
    scores, ours, theirs = part.leaves[leaf].reshape(-1), x.step.exact[row], x.candidate()[row]
    open_ = _eligible(part, leaf)
    yield from _who(x, row)
    kept, lost = (
        scores[ours].min(),
        max([s for i, s in enumerate(scores) if open_[i] and i not in ours], default=-np.inf),
    )
    yield _line("margin", f"{kept - lost:.3e} between the last that is chosen and the first that is not")
    yield _line("scores", f"of {leaf}, largest first")
    for i in np.argsort(-scores, kind="stable"):
        marks = ["float64" if i in ours else "", "candidate" if i in theirs else "", "" if open_[i] else "not eligible"]
        yield _line("", f"{scores[i]:+.6e}  {i:>4}  {marks[0]:<8} {marks[1]:<10} {marks[2]}")


def _who(x: Examined, row: Index) -> Iterator[str]:
    for who, a in (("float64", x.step.exact), ("candidate", x.candidate())):
        yield _line(who, f"{sorted(a[row].tolist())}")


def _eligible(part: Part, leaf: str) -> Array:
    """Which entries would be chosen if they were the largest."""
    a, call = part.leaves[leaf], part.calls[-1]
    found = np.zeros(a.shape[-1], bool)
    for i in range(a.shape[-1]):
        changed = a.copy()
        changed[..., i] = a.max() + 1
        args = [{**part.leaves, leaf: changed}.get(n, n) if isinstance(n, str) else n for n in call.args]
        found[i] = i in STAGES[call.stage].fn(*args, **call.static)
    return found
