"""The optimiser's step in a trace: what its header says of it, and the calls from the gradients to the weights after it.

`upd/grad_norm` is the norm before clipping, `upd/NAME` a weight after the step, `upd/NAME.exp_avg` and `upd/NAME.exp_avg_sq` its
moments after it, the same with `.before` those before it (0 before the first step), `upd/NAME.clipped` the gradient that they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers import adamw
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.stage import Call, Stage

from .replay import Step
from .settled import SLACK

Storage = Literal["float32", "bfloat16"]
MASTER = "master/"
"""How a call names the weight that the optimiser moves: as the checkpoint has it, whatever the model computes with."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Optimizer:
    """AdamW's settings (defaults: those of R 4.2 that it gives); `max_norm` None: gradients are not clipped; `decays`, which
    weights decay; `moments` and `masters`, how they are kept (R 3.3.3: bfloat16, float32); `step`, its number, from 1.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0
    decays: Literal["all", "matrices"] = "all"
    moments: Storage = "float32"
    masters: Storage = "float32"
    step: int = 1

    def storage(self) -> dict[str, str]:
        """Pattern of taps -> how they are kept. Gradients reach the optimiser in float32 (R 3.3.3)."""
        exact = dict.fromkeys(["upd/grad_norm", "upd/*.clipped", "upd/*/*"], "float32")
        return {"upd/*.exp_avg*": self.moments} | exact | {"upd/*": self.masters}


_TEXTS = {"decays": ("all", "matrices"), "moments": ("float32", "bfloat16"), "masters": ("float32", "bfloat16")}


def read_optimizer(given: object) -> Optimizer:
    """Checked settings. SpecError for what is none."""
    require(isinstance(given, dict), f"optimizer is {given!r}; expected its settings by name")
    assert isinstance(given, dict)
    known = [f.name for f in fields(Optimizer)]
    for key, value in given.items():
        require(key in known, f"unknown key {key!r} of optimizer; known: {', '.join(known)}")
        if key in _TEXTS:
            require(value in _TEXTS[key], f"optimizer's {key} is {value!r}; expected {' or '.join(_TEXTS[key])}")
        elif not (key == "max_norm" and value is None):
            require(
                _fits(key, value), f"optimizer's {key} is {value!r}; expected {_WANTED.get(key, 'a number from 0 on')}"
            )
    require("lr" in given, "optimizer lacks lr")
    return Optimizer(**given)


_WANTED = {"beta1": "a number from 0 to 1", "beta2": "a number from 0 to 1", "step": "a whole number from 1 on"}


def _fits(key: str, value: object) -> bool:
    if key == "step":
        return type(value) is int and 1 <= value < 2**31
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
    return number and not (key.startswith("beta") and value >= 1)  # type: ignore[operator]


def stepped_by(program: list[Call], o: Optimizer) -> list[Call]:
    """The calls of a step: the norm of all gradients of the program, then clipping, moments and step of every weight."""
    grads = [c for c in program if c.tap.startswith("grad/")]
    if not grads:
        return []
    norm = Call(adamw.grad_norm.name, "upd/grad_norm", tuple([g.tap for g in grads]), {})
    return [norm, *[call for g in grads for call in _of_weight(g, norm.tap, o)]]


def _of_weight(grad: Call, norm: str, o: Optimizer) -> Iterator[Call]:
    """What happens to one weight."""
    name, after = grad.tap.partition("/")[2], f"upd/{grad.tap.partition('/')[2]}"
    master, clipped = MASTER + name, f"{after}.clipped"

    def call(stage: Stage, tap: str, *args: Any, **static: Any) -> Call:
        own = replace(stage, shape=grad.of.shape, tap=tap.partition("/")[2])
        return Call(stage.name, tap, args, static, own)

    yield call(adamw.clip, clipped, grad.tap, norm, max_norm=o.max_norm)
    for stage, moment, beta in zip((adamw.exp_avg, adamw.exp_avg_sq), MOMENTS, (o.beta1, o.beta2), strict=True):
        before = f"{after}.{moment}.before" if o.step > 1 else None
        if before:
            yield call(adamw.before, before, master)
        yield call(stage, f"{after}.{moment}", clipped, before, beta=beta)
    settings = {"lr": o.lr, "beta1": o.beta1, "beta2": o.beta2, "eps": o.eps, "steps": o.step}
    decay = adamw.decay_of(name, o.weight_decay, o.decays)
    yield call(adamw.step, after, master, *[f"{after}.{m}" for m in MOMENTS], decay=decay, **settings)


def doubtful(step: Step) -> Array | None:
    """Which entries of a weight after the step say nothing, None if all do: at first the step is lr times little more than a sign,
    so where roundings may turn the first moment round, a correct candidate may have gone the other way.
    """
    if step.call.stage != adamw.step.name:
        return None
    (_, m, _), *twins = step.inputs()
    away = np.max([np.abs(its[1] - m) for its in twins], axis=0)
    found: Array = SLACK * away >= np.abs(m)
    return found if found.any() else None


@dataclass(frozen=True)
class Inputs(Mapping[str, Array]):
    """What a run reads beside weights: its tokens and what belongs to them, and the optimiser's masters, read when asked for."""

    given: Mapping[str, Array]
    checkpoint: Mapping[str, Array]
    masters: Storage = "float32"

    def __getitem__(self, name: str) -> Array:
        if not name.startswith(MASTER):
            return self.given[name]
        w = np.asarray(self.checkpoint[name.removeprefix(MASTER)], np.float32)
        return to_bf16(w) if self.masters == "bfloat16" else w

    def __contains__(self, name: object) -> bool:
        return name in self.given or (isinstance(name, str) and name.startswith(MASTER))

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)
