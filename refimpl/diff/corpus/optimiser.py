"""Known bugs of an optimiser's step: they show in a trace that holds norms, moments or weights after it (docs/taps.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import to_bf16

from .mutant import Mutant, setting, stage

_NORM, _CLIP, _M, _V, _STEP = "optim.grad_norm", "optim.clip", "optim.exp_avg", "optim.exp_avg_sq", "optim.step"


def _step(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """The step with settings that follow from its own."""
    return lambda w, m, v, **static: stage(_STEP)(w, m, v, **static | change(static))


def _eps_inside(w: Array, m: Array, v: Array, *, steps: int, eps: float, beta2: float, **static: Any) -> Any:
    """sqrt(v^ + eps): the step on v + eps (1 - beta2^steps), without eps."""
    return stage(_STEP)(w, m, v + eps * (1 - beta2**steps), steps=steps, eps=0.0, beta2=beta2, **static)


def _eps_before_correction(w: Array, m: Array, v: Array, *, steps: int, eps: float, beta2: float, **static: Any) -> Any:
    """eps beside sqrt(v), both divided by sqrt(1 - beta2^steps)."""
    return stage(_STEP)(w, m, v, steps=steps, eps=eps / np.sqrt(1 - beta2**steps), beta2=beta2, **static)


def _uncorrected(w: Array, m: Array, v: Array, *, steps: int, beta1: float, beta2: float, **static: Any) -> Any:
    return stage(_STEP)(w, m, v, steps=1, beta1=0.0, beta2=0.0, **static)


def _first_uncorrected(w: Array, m: Array, v: Array, *, steps: int, beta1: float, **static: Any) -> Any:
    return stage(_STEP)(w, m * (1 - beta1**steps), v, steps=steps, beta1=beta1, **static)


def _l2(g: Array, norm: Any, *, reads: tuple[Array], max_norm: float | None) -> Any:
    return stage(_CLIP)(g, norm, max_norm=max_norm) + _DECAY * reads[0]


_DECAY = 0.1
"""R 4.2's weight decay: what a coupled decay adds to the gradient is known to no stage of the clipping."""


def _alone(g: Array, norm: Any, *, max_norm: float | None) -> Any:
    return stage(_CLIP)(g, np.linalg.norm(np.asarray(g, np.float64)), max_norm=max_norm)


def _always(g: Array, norm: Any, *, max_norm: float | None) -> Any:
    return g if max_norm is None else g * np.asarray(max_norm / (norm + 1e-6), g.dtype)


def _truncated(name: str) -> Callable[..., Any]:
    """The moment cut to bfloat16's bits instead of rounded."""

    def fn(*args: Any, **static: Any) -> Any:
        y = np.asarray(stage(name)(*args, **static), np.float32)
        return (y.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    return fn


def _sum_of_norms(*grads: Array) -> Any:
    return np.sum([np.linalg.norm(g.astype(np.float64)) for g in grads])


def _largest(*grads: Array) -> Any:
    return np.max([np.abs(g).max(initial=0) for g in grads])


def _experts_once(*grads: Array) -> Any:
    """The norm as a rank sees it that holds half of the gradients."""
    return stage(_NORM)(*grads[: len(grads) // 2])


def _one_sum(*grads: Array) -> Any:
    squares = np.concatenate([np.square(g.astype(np.float32)).ravel() for g in grads])
    return np.sqrt(np.add.accumulate(squares)[-1])


_bug = partial(Mutant, regime="training")
MUTANTS = (
    _bug("O01", "eps is added to the second moment inside the square root", _STEP, _eps_inside),
    _bug("O01b", "eps is added before the bias correction", _STEP, _eps_before_correction),
    _bug(
        "O02",
        "weight decay is added to the gradient (L2) instead of taken from the weight",
        _CLIP,
        _l2,
        reads=("master",),
        also={_STEP: setting(_STEP, decay=0.0)},
    ),
    _bug("O03", "no weight decays", _STEP, setting(_STEP, decay=0.0)),
    _bug(
        "O03b",
        "weights decay that should not (norms, biases)",
        _STEP,
        _step(lambda s: {"decay": s["decay"] or _DECAY}),
    ),
    _bug(
        "O03c",
        "weight decay is not multiplied by the learning rate",
        _STEP,
        _step(lambda s: {"decay": s["decay"] / s["lr"] if s["lr"] else s["decay"]}),
    ),
    _bug("O04", "the moments are not corrected for their start at 0", _STEP, _uncorrected),
    _bug("O04b", "the first moment is not corrected for its start at 0", _STEP, _first_uncorrected),
    _bug(
        "O04c",
        "the bias correction counts one step too many",
        _STEP,
        _step(lambda s: {"steps": s["steps"] + 1}),
    ),
    _bug(
        "O04d",
        "the bias correction counts one step too few",
        _STEP,
        _step(lambda s: {"steps": s["steps"] - 1}),
    ),
    _bug("O05", "gradients are clipped tensor by tensor, not by their global norm", _CLIP, _alone),
    _bug(
        "O05b",
        "gradients are not clipped before the moments see them",
        _CLIP,
        setting(_CLIP, max_norm=None),
    ),
    _bug("O05c", "gradients below the clipping norm are scaled up to it", _CLIP, _always),
    _bug("O06", "the gradient norm is the sum of the tensors' norms", _NORM, _sum_of_norms),
    _bug("O06b", "the gradient norm is the largest value", _NORM, _largest),
    _bug("O06c", "the gradient norm is that of the first half of the tensors", _NORM, _experts_once),
    _bug(
        "O06d",
        "the gradient norm is one sum in float32, number by number, and loses what is small beside it",
        _NORM,
        _one_sum,
    ),
    _bug(
        "O07",
        "moments are cut to bfloat16's bits instead of rounded",
        _M,
        _truncated(_M),
        also={_V: _truncated(_V)},
    ),
    _bug(
        "O08",
        "beta2 is 0.999",
        _V,
        setting(_V, beta=0.999),
        also={_STEP: setting(_STEP, beta2=0.999)},
    ),
    _bug(
        "O09",
        "the step starts from the bfloat16 weight instead of its master",
        _STEP,
        lambda w, m, v, **static: stage(_STEP)(to_bf16(w).astype(w.dtype), m, v, **static),
    ),
)
