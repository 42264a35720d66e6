"""A step that is refused if its loss is no number: the state before it stays the last, and the first bad stage is named.

A finite loss and a finite gradient norm (the root of the sum of all squares) mean that every gradient is finite. Where one
of them is not, the step is run again on the same weights and tokens with a watch around every stage, which costs nothing
as long as all is well.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd import Array, Gradients, Parameter, SpecError, Tensor, backward, data_of, primitive
from refimpl.autograd.tensor import Vjp
from refimpl.layers.config import Config
from refimpl.layers.stage import Stage, observing, tap_name
from refimpl.model import ForCausalLM

from .training import Recipe, Report, State, step

MASKED = ("mask", "mla.scores", "mla.scores_absorbed")
"""Stages whose output holds -inf where a key may not be seen; everywhere else an infinity is an overflow."""
FINITE = "every stage and single gradient is finite: their norm overflows, or the loss of a task"


class NotFinite(SpecError):
    """A step gave no number; the state before it is good."""


def guarded_step(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    take: Callable[..., tuple[State, Report]] = step,
    *,
    in_place: bool = False,
    **rows: Array,
) -> tuple[State, Report]:
    """`step`, or NotFinite if loss or gradient norm is NaN or infinite: which stage first showed it, of which tokens.

    `take`: another way to take the same step (`memory.step`); `rows`: labels, valid, documents, as there.
    """
    try:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            new, report = take(c, state, tokens, recipe, in_place=in_place, **rows)
        check(report)
    except NotFinite as error:
        raise NotFinite(f"{error}\n  {first_bad(c, state, tokens, recipe, **rows) or FINITE}") from None
    except SpecError as error:  # quantisers refuse what is no number (FP8), before there is a loss
        found = first_bad(c, state, tokens, recipe, **rows)
        if not found:
            raise
        said = f"step {state.adam.t + 1}: no loss, for {error}; the state before it is unchanged\n  {found}"
        raise NotFinite(said) from None
    return new, report


def check(report: Report) -> None:
    """NotFinite unless loss and gradient norm are numbers; on a mesh they are the same on every rank, and so is this."""
    if not (math.isfinite(report.loss) and math.isfinite(report.norm)):
        what = f"step {report.step}: loss {report.loss}, gradient norm {report.norm}"
        what += "".join([f", {name} {x}" for name, x in report.parts.items() if not math.isfinite(x)])
        raise NotFinite(f"{what}; the state before it is unchanged")


def first_bad(c: Config, state: State, tokens: Array, recipe: Recipe, **rows: Array) -> str:
    """The first weight, else the first stage forward, else the first in backward, that holds NaN or infinity, in words; "" if none
    does.
    """
    for name, master in state.weights.items():
        for w in (master, recipe.plan.weight(name, master) if np.isfinite(master).all() else master):
            if not np.isfinite(w).all():
                return f"the weight {name} holds it already: {counted(w)}"
    held, watch = {n: recipe.plan.weight(n, w) for n, w in state.weights.items()}, Watch()
    model = ForCausalLM.from_weights(c, held).with_gradients()
    inputs = model.inputs(tokens, **({"labels": tokens} | rows))
    with contextlib.suppress(SpecError), np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        with observing(recipe.plan, watch):
            out = model.forward_and_loss(inputs, mtp_weight=recipe.mtp_weight, aux_weight=recipe.aux_weight)
        if not watch.found:
            grads: Gradients = backward(out.loss)
            leaves = [(n, w) for n, w in model.named_weights() if isinstance(w, Parameter) and w in grads]
            bad = [n for n, w in leaves if not np.isfinite(grads[w]).all()]
            if bad and not watch.found:
                watch.found = f"backward: the gradient of {bad[0]}"
    return f"first seen in {watch.found}" if watch.found else ""


class Watch:
    """An observer that notes the first stage that gives, or in backward is given, a number that is not finite."""

    def __init__(self) -> None:
        self.found = ""
        self.tap, self.backward, self.calls = "", False, 0
        """Of what was found: its tap, whether it was in backward, how many stages were called by then."""

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """Look at the output, and from the tape at its gradient."""
        y, tap = run(*args, **static), tap_name(stage)
        self.calls += not self.found
        self._look(data_of(y), tap, masked=stage.name in MASKED)
        return self._seen(y, tap) if isinstance(y, Tensor) else y

    def _look(self, x: Any, tap: str, *, masked: bool = False, backward: bool = False) -> None:
        if not self.found and getattr(x, "dtype", None) is not None and x.dtype.kind == "f":
            bad = ~np.isfinite(x)
            bad &= ~np.isneginf(x) if masked else True
            if bad.any():
                self.tap, self.backward = tap, backward
                where = f"backward: the gradient of {tap}" if backward else f"forward: {tap}"
                self.found = f"{where}: {counted(x, bad)}"

    def _seen(self, y: Tensor, tap: str) -> Tensor:
        @primitive
        def seen(x: Array) -> tuple[Array, tuple[Vjp]]:
            def vjp_x(dy: Array) -> Array:
                self._look(dy, tap, backward=True)
                return dy

            return x, (vjp_x,)

        out: Tensor = seen(y)
        out.saved = y.saved
        return out


def counted(x: Array, bad: Array | None = None) -> str:
    """How many numbers of x are none, and the first of them."""
    bad = ~np.isfinite(x) if bad is None else bad
    first = [int(i) for i in np.argwhere(bad)[0]]
    return f"{int(bad.sum())} of {x.size} numbers, the first at {first} ({x[tuple(first)]})"
