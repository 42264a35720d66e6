"""What regimes do: weights and inputs in which a stage's rare side shows. Each takes a draft and changes it in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint.names import BIAS, SCALE, is_fp8, quantization_config
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.numerics.quantisation import quantization_settings, quantize_blocks

from .drafts import BESIDE_TIES, NEARLY_TIED, Draft

EPS = 1e-5
"""rms_norm_eps of regime eps."""
_GATE = "mlp.gate.weight"

# --------------------------------------------------------------------------------------- configs


def unequal_mscale(c: Config) -> Config:
    """mscale 0.707, mscale_all_dim 1.3."""
    assert c.rope_scaling is not None
    return c.replace(rope_scaling=replace(c.rope_scaling, mscale=0.707, mscale_all_dim=1.3))


def ragged(c: Config) -> Config:
    """Sizes of which 128 divides none; kv_a_proj has 129 rows."""
    rank = {} if c.q_lora_rank is None else {"q_lora_rank": 127}
    return c.replace(
        **rank,
        vocab_size=192,
        hidden_size=160,
        intermediate_size=200,
        moe_intermediate_size=130,
        num_attention_heads=4,
        kv_lora_rank=121,
        qk_nope_head_dim=28,
        qk_rope_head_dim=8,
        v_head_dim=33,
    )


# --------------------------------------------------------------------------------------- weights


def _edit(d: Draft, ending: str, change: Callable[[Array], Array]) -> None:
    """Replace the tensors whose names end so by change(a float32 copy), in the dtype they had; bfloat16 values."""
    for name, w in d.weights.items():
        if name.endswith(ending):
            d.weights[name] = to_bf16(change(w.astype(np.float32))).astype(w.dtype)


def _biases(d: Draft, change: Callable[[Array], Array]) -> None:
    """Replace every selection bias by change(it)."""
    d.weights |= {name: change(b) for name, b in d.weights.items() if name.endswith(BIAS)}


def positive_bias(d: Draft) -> None:
    """The least bias of each layer becomes 8; they are float32 numbers, which bfloat16 would move by up to 1/32."""
    _biases(d, lambda b: b + (8 - b.min()))


def negative_bias(d: Draft) -> None:
    """The greatest bias of each layer becomes -1.25; a score is at most 1."""
    _biases(d, lambda b: to_bf16(b - (1.25 + b.max())))


def near_ties(d: Draft) -> None:
    """Biases moved by up to 2**-8 of themselves, to numbers that bfloat16 has not."""
    d.goal = NEARLY_TIED
    _biases(d, lambda b: (b * (1 + 2.0**-8 * d.rng.uniform(-1, 1, b.shape))).astype(np.float32))


def ties(d: Draft) -> None:
    """Of every four experts of a group the second becomes equal to the first; the third group (of two, the second) to the one
    before it. Equal: the same row of the router, the same bias; what they compute stays different.
    """
    d.goal, groups = BESIDE_TIES, d.config.n_group
    size = d.config.n_routed_experts // groups
    e = np.arange(d.config.n_routed_experts)
    of = np.where(e % size % 4 == 1, e - 1, e).reshape(groups, size)
    if groups > 1:
        of[min(groups - 1, 2)] = of[min(groups - 1, 2) - 1]
    _edit(d, _GATE, lambda w: w[of.ravel()])
    _biases(d, lambda b: b[of.ravel()])


_DIAL = (0.0, -0.5, -8.0, 8.0)
"""Channel 0 of the embedding, by token id modulo 4: ordinary tokens, then those whose router logits it moves."""
_TURN = 160.0
"""Weight of channel 0 in the router: where the stream has a size of 2 to 8, logits of -10 to -40 and beyond 160."""


def extreme_logits(d: Draft) -> None:
    """Channel 0 of the stream is what the embedding says, since no layer writes to it; the router turns it into logits."""
    d.kinds = len(_DIAL)
    for ending in ("o_proj.weight", "down_proj.weight", "o_proj.bias"):
        _edit(d, ending, lambda w: _with_first(w, 0.0))
    dial = np.array([_DIAL[i % len(_DIAL)] for i in range(d.config.vocab_size)], np.float32)
    _edit(d, "embed_tokens.weight", lambda w: _with_first(w.T, dial).T)
    _edit(d, "post_attention_layernorm.weight", lambda w: _with_first(w, 1.0))
    _edit(d, _GATE, lambda w: _with_first(w.T / 4, _TURN).T)
    _biases(d, lambda b: _apart(d, len(b)))


def _with_first(a: Array, value: float | Array) -> Array:
    """a with a[0] replaced."""
    a[0] = value
    return a


def _apart(d: Draft, n: int) -> Array:
    """Biases of 12 and more in steps of 1/16 which alone decide by at least one step: where scores underflow they have to."""
    c = d.config
    while True:
        b = 12 + d.rng.permutation(n).astype(np.float32) / 16
        groups = np.sort(b.reshape(c.n_group, -1))[:, -2:].sum(axis=-1)
        ranked = np.sort(groups)[::-1]
        if c.topk_group == c.n_group or ranked[c.topk_group - 1] > ranked[c.topk_group]:
            return b


def small_latents(d: Draft) -> None:
    """The rows that give the latents, 1/256 of what they were: exact in bfloat16."""
    rank = d.config.kv_lora_rank
    for kind in ("weight", "bias"):
        _edit(d, f"q_a_proj.{kind}", lambda w: w / 256)
        _edit(d, f"kv_a_proj_with_mqa.{kind}", lambda w: np.concatenate([w[:rank] / 256, w[rank:]]))


def small_stream(d: Draft) -> None:
    """Embeddings of size 2**-9: their mean square is 0.4 eps."""
    _edit(d, "embed_tokens.weight", lambda w: w * 2.0**-9)


def fp8_weights(d: Draft) -> None:
    """Projections as codes with scales, and the keys of config.json that say so; as they say, if they do already."""
    block, scale_fmt = quantization_settings(d.written)
    d.written = quantization_config(scale_fmt, block) | d.written
    for name in [n for n in d.weights if is_fp8(n)]:
        with where(f"while quantising {name}"):
            w = d.weights[name].astype(np.float32)
            d.weights[name], d.weights[name + SCALE] = quantize_blocks(w, block, scale_fmt=scale_fmt)


# ---------------------------------------------------------------------------------------- inputs


def padding(d: Draft) -> None:
    """A quarter of the first sequence is padding in front of it, a quarter of the second behind it."""
    require(d.length >= 4, f"padding takes a quarter of a sequence; {d.length} tokens are too few")
    d.valid = np.ones((d.batch, d.length), np.int64)
    d.valid[0, : d.length // 4] = 0
    d.valid[1:2, -(d.length // 4) :] = 0


def offset(d: Draft) -> None:
    """Sequence b counts its tokens from 37 (b + 1) on; padding has the first position."""
    first = 37 * np.arange(1, d.batch + 1)
    last, most = int(first[-1]) + d.length, d.config.max_position_embeddings
    require(last <= most, f"positions up to {last - 1} need more than max_position_embeddings={most}")
    seen = np.ones((d.batch, d.length), np.int64) if d.valid is None else d.valid
    d.positions = first[:, None] + np.maximum(np.cumsum(seen, axis=1) - 1, 0)


def long_positions(d: Draft) -> None:
    """The first sequence runs across the original length (without YaRN, up to the last position); the others go in growing steps
    from 257 to the last position, by odd numbers, which bfloat16 has not.
    """
    c, steps = d.config, np.arange(d.length)
    most = c.max_position_embeddings
    require(
        most >= 512 + 4 * d.length, f"max_position_embeddings={most} is too few for positions that bfloat16 has not"
    )
    across = c.rope_scaling.original_max_position_embeddings if c.rope_scaling else most
    first = min(max(across - d.length // 2, 0), most - d.length)
    steeply = (steps / max(d.length - 1, 1)) ** 3 * ((most - 259) // 2 - d.length + 1)
    far = 257 + 2 * (steps + steeply.astype(np.int64))
    d.positions = np.array([first + steps, *[far] * (d.batch - 1)])[: d.batch]
