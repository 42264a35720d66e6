"""Known bugs of losses, counters and the balancing bias: they show in a trace of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.loss import total
from refimpl.layers.router import top_k

from .mutant import Mutant, setting, stage, threads

_AUX = "loss.seq_aux"
_BIAS = "router.bias_update"


def _normalised(s: Any) -> Any:
    return s / ops.sum(s, axis=-1, keepdims=True)


def _balance(share: Callable[[Any], Any] = _normalised, load: Callable[[Array], Array] = lambda load: load) -> Any:
    """The balance loss with another share of every expert, from its score, or another load."""

    def fn(s: Any, routed: Array | None, *, k: int, alpha: float) -> Any:
        n_experts, length = s.shape[-1], s.shape[1]
        chosen = top_k(data_of(s), k) if routed is None else routed
        counted = load((chosen[..., None] == np.arange(n_experts)).sum(axis=(1, 2)))
        f = (counted * (n_experts / (k * length))).astype(s.dtype)
        return ops.sum(f * ops.mean(share(s), axis=1)) * (alpha / len(f))

    return fn


def _softmax(s: Any) -> Any:
    """softmax of the logits behind a sigmoid: e^z = s / (1 - s)."""
    return _normalised(s / (1 - s))


def _dropped(load: Array) -> Array:
    """Tokens that a capacity of the mean load lets through."""
    return np.minimum(load, np.ceil(load.mean(axis=-1, keepdims=True)))


def _summed(s: Any, routed: Array | None, *, k: int, alpha: float) -> Any:
    return stage(_AUX)(s, routed, k=k, alpha=alpha) * len(s)


def _rolled(by: int) -> Callable[..., Any]:
    """MTP's labels moved by another number of tokens than its depth + 1."""
    return lambda logits, labels, *, depth, mean: stage("loss.mtp")(
        logits, np.roll(labels, -by, axis=1), depth=depth, mean=mean
    )


def _twice(main: Any, mtp: tuple[Any, ...], aux: tuple[Any, ...], *, mtp_weight: float) -> Any:
    return total.fn(main, mtp, (*aux, *aux), mtp_weight=mtp_weight)


def _bias_by(step: Callable[[Array], Array]) -> Callable[..., Any]:
    """The selection bias moved by gamma times something else of the load (E,)."""
    return lambda b, load, *, gamma, zero_sum: (b + gamma * step(load)).astype(b.dtype)


MUTANTS = (
    Mutant(
        "L01",
        "the balance loss takes softmax shares where V3 normalises sigmoids",
        _AUX,
        _balance(_softmax),
        threads("Megatron-LM #1438; Megatron-LM #1439"),
        "training",
    ),
    Mutant(
        "L02",
        "the balance loss does not normalise the scores of a token",
        _AUX,
        _balance(lambda s: s),
        threads("PaddleNLP #11160"),
        "training",
    ),
    Mutant(
        "L03",
        "the balance loss counts tokens after a capacity has dropped some",
        _AUX,
        _balance(load=_dropped),
        threads("Megatron-LM #1513"),
        "training",
    ),
    Mutant(
        "L04",
        "the balance loss has weight 0",
        _AUX,
        setting(_AUX, alpha=0.0),
        threads("Megatron-Bridge #5165"),
        "training",
    ),
    Mutant(
        "L05",
        "tokens of an expert are counted twice",
        "router.counts",
        lambda ids, *, n_experts: 2 * stage("router.counts")(ids, n_experts=n_experts),
        threads("torchtitan #1593; Automodel #3247"),
        "training",
    ),
    Mutant("L06", "the balance loss is summed over the sequences of a batch", _AUX, _summed, (), "training"),
    Mutant(
        "L06b",
        "the balance losses count twice",
        "loss.total",
        _twice,
        threads("Megatron-LM #1330; Megatron-LM #1514"),
        "training",
    ),
    Mutant(
        "L07",
        "the selection bias is never updated",
        _BIAS,
        lambda b, load, *, gamma, zero_sum: b,
        threads("MaxText #2494"),
        "training",
    ),
    Mutant(
        "L07b",
        "the selection bias of overloaded experts is raised and that of the others lowered",
        _BIAS,
        lambda b, load, *, gamma, zero_sum: stage(_BIAS)(b, load, gamma=-gamma, zero_sum=zero_sum),
        (),
        "training",
    ),
    Mutant(
        "L07c",
        "the selection bias moves by gamma times the tokens that an expert lacks, not by their sign",
        _BIAS,
        _bias_by(lambda load: load.mean() - load),
        (),  # a variant that arXiv 2408.15664 tries beside the sign
        "training",
    ),
    Mutant(
        "L07d",
        "the selection bias moves in proportion to the load: gamma times what an expert lacks of the mean",
        _BIAS,
        _bias_by(lambda load: 1 - load / load.mean()),
        (),
        "training",
    ),
    Mutant(
        "T05",
        "the labels of MTP are moved one token too few",
        "loss.mtp",
        _rolled(-1),
        threads("Megatron-LM #1532; Megatron-LM #2417; Megatron-LM #3159"),
        "training",
    ),
    Mutant("T05b", "the labels of MTP are moved one token too many", "loss.mtp", _rolled(1), (), "training"),
)
