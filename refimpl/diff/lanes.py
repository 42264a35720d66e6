"""What a replay runs on, and one way of running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.gemm import using
from refimpl.layers.precision import Plan
from refimpl.layers.stage import Call

from .holes import mended, torn
from .orders import ORDERS
from .padding import Padding
from .reading import Pick, entries
from .tolerance import TWINS, Noise
from .wide import Place, Wide

Weights = Callable[[str, Plan], Array]
"""Checkpoint name and plan -> the weight as that plan holds it."""


@dataclass
class Recorded:
    """What the candidate gave: taps in our axes and layout, which stages are replayed on (and which may be corrected or
    withdrawn while the replay goes on); names of further taps that are compared only; inputs, weights, plan and admissible
    roundings; how many `layers` the main model has; which tokens are `padding`; of which taps a `partial` array was recorded, and
    of which entries; weights whose slots were `placed` by value, so that either of two near ones may be the first; what is `odd`,
    of another number of experts or groups than there should be. Of wide taps
    that were compared: those that are `sound`, and of their blocks, where the keys end that are seen (`wide`).
    """

    taps: dict[str, Array]
    inputs: Mapping[str, Array]
    weights: Weights
    plan: Plan
    noise: Noise
    outputs: frozenset[str] = frozenset()
    withdrawn: dict[str, Array] = field(default_factory=dict)
    layers: int = 0
    padding: Padding | None = None
    partial: Mapping[str, tuple[Pick, Array]] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)
    odd: Mapping[str, Array] = field(default_factory=dict)
    sound: dict[str, Array] = field(default_factory=dict)
    ends: dict[str, dict[Place, int]] = field(default_factory=dict)

    def is_sound(self, name: str) -> bool:
        """Whether it is known of a recorded tap, as it is now, that it holds nothing but numbers and what is masked."""
        return name in self.sound and self.sound[name] is self.taps.get(name)

    def weight(self, unit: str, end: str) -> str:
        """The name of a unit's weight: MTP module k is the checkpoint's layer `layers` + k - 1."""
        kind = unit.rpartition("/")[2]
        index = self.layers + int(kind[3:]) - 1 if kind.startswith("mtp") else int(kind[1:])
        return f"w/model.layers.{index}.{end}"


@dataclass
class Lane:
    """One way of computing: a plan, the number of a twin or None, whether it sees the candidate, and the values still of use;
    `naive`, whether NaN spreads as floating point spreads it, and `torn`, whether that would make a difference; what was `found` in
    blocks of arrays that more than one stage reads.
    """

    plan: Plan
    twin: int | None = None
    given: bool = True
    values: dict[str, Array | Wide] = field(default_factory=dict)
    naive: bool = False
    torn: bool = False
    found: dict[tuple[str, str, Place], int] = field(default_factory=dict)

    def run(self, call: Call, r: Recorded, fn: Callable[..., Any] | None = None) -> Array:
        """The call's stage in this lane, or another function of the same arguments in its place."""
        ours = {"dtype": self.plan.dtype, "kernel": self.plan.kernel}  # settings that are the lane's
        fn = fn or (ORDERS.get(call.stage) if self.twin == TWINS - 1 else None) or call.of.fn
        static = call.static | {k: ours[k] for k in ours if k in call.static}
        # a candidate may hold NaN; that is reported, not warned of
        with np.errstate(all="ignore"), using(self.plan.kernel(call.stage)):
            args = [self.value(a, call, r) for a in call.args]

            def made(values: Sequence[Any]) -> Array:
                out: Array = fn(*values, **static)
                return out

            if self.naive or not self.given or not torn(call.args, args):
                return made(args)
            self.torn = True
            return mended(made, call.args, args)

    def once(self, what: str, name: str, place: Place, find: Callable[[], int]) -> int:
        """What there is to find in a block of an array, looked for when it is first asked for."""
        key = (what, name, place)
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]

    def overlay(self, call: Call, r: Recorded) -> None:
        """Put the candidate's entries of a tap of which it recorded some in the place of those computed."""
        pick, x = r.partial[call.tap]
        whole = np.array(self.values[call.tap])
        whole[np.ix_(*entries(whole.shape, pick))] = r.noise.given(call, x.astype(whole.dtype), self.twin)
        self.values[call.tap] = whole

    def value(self, arg: Any, call: Call, r: Recorded) -> Any:
        """What a call's argument is in this lane."""
        if isinstance(arg, tuple):
            return tuple([self.value(a, call, r) for a in arg])
        if not isinstance(arg, str):
            return arg
        if arg.startswith("w/"):
            return r.weights(arg[2:], self.plan)
        a = np.asarray(self.held(arg, r))
        if a.dtype.kind in "iub":
            return a
        if arg in r.inputs:
            return a.astype(self.plan.dtype, copy=False)
        return r.noise.given(call, a.astype(self.plan.dtype, copy=False), self.twin) if self.is_given(arg, r) else a

    def held(self, name: str, r: Recorded) -> Array | Wide:
        """An input, a recorded tap as it was recorded, or what was computed in this lane."""
        if name in r.inputs:
            return r.inputs[name]
        return r.taps[name] if self.is_given(name, r) else self.values[name]

    def is_given(self, name: str, r: Recorded) -> bool:
        """Whether this lane takes a tap from the candidate."""
        return self.given and name in r.taps and name not in r.inputs
