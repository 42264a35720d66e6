"""Replay: every stage of a program re-run on the candidate's own recorded inputs, so that no wrong stage hides another.

An input that was not recorded is computed from those that were: then the replayed region spans several stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.gemm import using
from refimpl.layers.precision import Plan, rounded
from refimpl.layers.stage import STAGES, Call, Recorder, observing
from refimpl.model import ForCausalLM, Inputs, introduce

Given = Callable[[str], Array | None]
"""Name of a weight, an input or a recorded tap -> its array, or None if it was not recorded."""


def program_of(
    model: ForCausalLM, inputs: Inputs, *, with_mtp: bool, attend: Any
) -> tuple[list[Call], dict[str, Array]]:
    """Run the specification once under a recorder -> its stage calls in model order, and what every tap held."""
    recorder = introduce(Recorder(), model, inputs)
    with observing(recorder):
        model(inputs, with_mtp=with_mtp, attend=attend, name="fwd")
    return recorder.program, {tap: data_of(a) for tap, a in recorder.taps.items()}


def replay(program: list[Call], given: Given, plan: Plan, stored: Mapping[str, str]) -> Iterator[tuple[Call, Array]]:
    """(call, our output) for each call: its stage alone on `given` inputs, in `plan`; `stored` names the format in
    which the candidate keeps a tap, to which ours is rounded instead of the plan's.
    """
    computed: dict[str, Array] = {}

    def value(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple([value(a) for a in arg])
        if not isinstance(arg, str):
            return arg
        recorded = given(arg)
        return computed[arg] if recorded is None else recorded

    for call in program:
        static = call.static | ({"dtype": plan.dtype} if "dtype" in call.static else {})
        # a candidate may hold NaN; that is reported, not warned of
        with np.errstate(all="ignore"), using(plan.kernel(call.stage)):
            out = STAGES[call.stage].fn(*[value(a) for a in call.args], **static)
        computed[call.tap] = out = rounded(out, stored.get(call.tap) or plan.format(call.stage))
        yield call, out
