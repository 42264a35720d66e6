"""One decoder layer alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.block import DecoderLayer
from refimpl.layers.common import embed, mask
from refimpl.layers.config import Config
from refimpl.layers.mla import KV, Attend
from refimpl.layers.rope import rope_tables
from refimpl.layers.router import Routing
from refimpl.layers.stage import phase, unit
from refimpl.model import Impl, effective, read_inputs

from .loading import announce
from .weights import DiskWeights


@dataclass(frozen=True)
class LayerRun:
    """What came out: hidden (B, S, D), the latent cache, the routing of a layer with experts, the stored bytes that were read."""

    hidden: Array
    cache: KV
    routing: Routing | None
    bytes_read: int


def run_layer(
    weights: DiskWeights, c: Config, layer: int, tokens: Any, hidden: Any = None, *, attend: Attend = "auto"
) -> LayerRun:
    """y = layer(x), x the residual stream before it: `hidden` (B, S, D), or else the embeddings of tokens (B, S).

    Only this layer is loaded. SpecError for a layer the model does not have, and for a hidden that does not fit the tokens.
    """
    require(0 <= layer < c.num_hidden_layers, f"layer {layer}; the model has 0..{c.num_hidden_layers - 1}")
    inputs, before, prefix = read_inputs(c, tokens), weights.bytes_read, f"model.layers.{layer}."
    x = embed(inputs.tokens, weights["model.embed_tokens.weight"]) if hidden is None else _fit(hidden, inputs.tokens, c)
    x = x.astype(weights.plan.dtype, copy=False)
    own = {n.removeprefix(prefix): w for n, w in effective(_of(weights, prefix), weights.plan).items()}
    block = DecoderLayer(c, layer).load(own)
    weights.follow(prefix + n for n in own)
    announce(block, layer, weights)
    table = rope_tables(
        inputs.positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=weights.plan.dtype
    )
    seen = mask(inputs.positions, None, None, None, past=0, dtype=weights.plan.dtype)
    with Impl(precision=weights.plan).rounding(), phase("fwd"), unit(f"L{layer}"):
        y, cache, routing = block(x, table, seen, None, attend)
    return LayerRun(y, cache, routing, weights.bytes_read - before)


def _of(weights: DiskWeights, prefix: str) -> dict[str, Any]:
    return {n: weights[n] for n in weights if n.startswith(prefix)}


def _fit(hidden: Any, tokens: Array, c: Config) -> Array:
    x, expected = np.asarray(hidden), (*tokens.shape, c.hidden_size)
    require(x.shape == expected and x.dtype.kind == "f", f"hidden is {x.dtype} {x.shape}; expected floats {expected}")
    require(np.isfinite(x).all(), "hidden holds NaN or infinity")
    return x
