"""Real bugs of DeepSeek-V3 ports, put into transformers' model while it runs: to try out the diff, and to test it.

Each is a change of one loaded model object, taken back on leaving; classes and modules of transformers stay untouched.
`benchmarks/diff_matrix` has many more, made with the same three functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import SpecError, require
from refimpl.layers.rope import mscale


@dataclass(frozen=True)
class Bug:
    """A corpus id, what is wrong and where it happened, the stage that a diff must name, and how to put it in."""

    id: str
    description: str
    stage: str
    patch: Callable[[Any], AbstractContextManager[None]]


def injected(model: Any, bug: str | None) -> AbstractContextManager[None]:
    """The model with the bug of this id in it (None: as it is). SpecError for an unknown id."""
    require(bug is None or bug in BUGS, f"bug {bug!r}; known: {', '.join(BUGS)}")
    return nullcontext() if bug is None else BUGS[bug].patch(model)


def modules(model: Any, ending: str) -> list[Any]:
    """The modules whose path ends so. SpecError if there are none."""
    found = [m for path, m in model.named_modules() if path.endswith(ending)]
    if not found:
        raise SpecError(f"this model has no {ending}: the bug cannot be put in")
    return found


@contextmanager
def with_forward(model: Any, ending: str, wrap: Callable[[Any, Any], Callable[..., Any]]) -> Iterator[None]:
    """Every such module computes wrap(module, its own forward) instead."""
    found = modules(model, ending)
    before = [vars(m).get("forward") for m in found]  # None: the class's own
    for m in found:
        m.forward = wrap(m, m.forward)
    try:
        yield
    finally:
        for m, old in zip(found, before, strict=True):
            del m.forward
            if old is not None:
                m.forward = old


@contextmanager
def with_setting(model: Any, ending: str, name: str, value: Callable[[Any], Any]) -> Iterator[None]:
    """Every such module has attribute `name` set to value(module)."""
    found = modules(model, ending)
    before = [getattr(m, name) for m in found]
    for m in found:
        setattr(m, name, value(m))
    try:
        yield
    finally:
        for m, old in zip(found, before, strict=True):
            setattr(m, name, old)


def _biased_weights(gate: Any, forward: Any) -> Callable[..., Any]:
    def route(x: Any) -> Any:
        logits, _, ids = forward(x)
        g = (logits.sigmoid() + gate.e_score_correction_bias).gather(1, ids)
        if gate.norm_topk_prob:
            g = g / (g.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, g * gate.routed_scaling_factor, ids

    return route


def _scaled_again(experts: Any, forward: Any) -> Callable[..., Any]:
    return lambda x, ids, weights: forward(x, ids, weights * experts.config.routed_scaling_factor)


def _unmasked(attention: Any, forward: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **(kwargs | {"attention_mask": None}))


def _one_mscale(rotary: Any) -> Any:
    rope = rotary.config.rope_parameters
    return rotary.attention_scaling * mscale(rope.get("factor", 1.0), rope.get("mscale") or 1.0)


def _absent(mlp: Any, forward: Any) -> Callable[..., Any]:
    return lambda x: forward(x) * 0


_CATALOGUE = (
    Bug(
        "R01",
        "the selection bias leaks into the expert weights (vLLM #11971, transformers #41647)",
        "router.weights",
        lambda m: with_forward(m, "mlp.gate", _biased_weights),
    ),
    Bug(
        "R07",
        "the weights of the chosen experts are not renormalised (torchtitan #1418)",
        "router.weights",
        lambda m: with_setting(m, "mlp.gate", "norm_topk_prob", lambda gate: False),
    ),
    Bug(
        "R09",
        "the routed scaling factor is applied twice, by the router and by the experts (vLLM #24118, sglang #8402)",
        "moe.routed",
        lambda m: with_forward(m, "mlp.experts", _scaled_again),
    ),
    Bug(
        "R17",
        "the shared expert contributes nothing (ROCm/ATOM #1527)",
        "moe.shared",
        lambda m: with_forward(m, "mlp.shared_experts", _absent),
    ),
    Bug(
        "R18",
        "the selection bias is not loaded and stays zero (Megatron-Bridge #4199, MaxText #2494)",
        "router.choice",
        lambda m: with_setting(m, "mlp.gate", "e_score_correction_bias", lambda gate: gate.e_score_correction_bias * 0),
    ),
    Bug(
        "A04",
        "the softmax scale lacks mscale squared (transformers #47435, optimum-intel #1877)",
        "mla.scores",
        lambda m: with_setting(m, "self_attn", "scaling", lambda attention: attention.qk_head_dim**-0.5),
    ),
    Bug(
        "A06",
        "cos and sin are multiplied by one mscale instead of the ratio of two (sglang #22711, exllamav3 #259)",
        "mla.rope_tables",
        lambda m: with_setting(m, "rotary_emb", "attention_scaling", _one_mscale),
    ),
    Bug(
        "A13",
        "the query latent is not normalised before the up-projection (Megatron-LM #1611)",
        "mla.q_a_norm",
        lambda m: with_forward(m, "q_a_layernorm", lambda norm, forward: lambda x: x),
    ),
    Bug(
        "A17",
        "attention has no causal mask (mlxcel #991)",
        "mla.scores",
        lambda m: with_forward(m, "self_attn", _unmasked),
    ),
)
BUGS: dict[str, Bug] = {bug.id: bug for bug in _CATALOGUE}
"""Corpus id -> bug."""
