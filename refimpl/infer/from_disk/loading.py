"""A model whose matrices stay on disk."""

from __future__ import annotations

from functools import partial
from typing import Any

from refimpl.autograd.errors import require
from refimpl.checkpoint import Checkpoint
from refimpl.layers.block import DecoderLayer
from refimpl.layers.moe import MoE
from refimpl.layers.router import MoEGate, Routing
from refimpl.model import Impl

from .weights import DiskWeights


class Announcing(MoEGate):
    """A router that says which experts are needed as soon as it knows; what follows it takes time in which they can be read."""

    def __init__(self, gate: MoEGate, tell: Any) -> None:
        vars(self).update(vars(gate))
        self._tell = tell

    def __call__(self, x: Any) -> Routing:
        """x (B, S, D) -> Routing."""
        routing = super().__call__(x)
        self._tell(routing.ids)
        return routing


def announce(block: DecoderLayer, layer: int, weights: DiskWeights) -> None:
    """Let the layer's router, if it has one, tell the weights what it chose."""
    if isinstance(block.mlp, MoE):
        block.mlp.gate = Announcing(block.mlp.gate, partial(weights.chosen, layer))


def load_from_disk(impl: Impl, checkpoint: Checkpoint, *, budget: int = 0) -> DiskWeights:
    """As `impl.load(config, checkpoint)`, but matrices stay on disk, with a cache of `budget` bytes -> the weights, to be used
    with `with`, in which a thread reads ahead.

    Names and shapes are checked now, numbers when they are read.
    """
    require(checkpoint.config is not None, f"{checkpoint.path} has no config.json")
    weights = DiskWeights(checkpoint, impl.plan, budget=budget)
    impl.load(checkpoint.config or {}, weights)
    c = impl.model.config
    mtp = tuple([f"model.layers.{c.num_hidden_layers + k}." for k in range(impl.model.n_mtp)])
    tied = ("lm_head.",) if c.tie_word_embeddings else ()
    weights.follow(n for n in checkpoint if not n.startswith((*mtp, *tied)))
    for i, block in enumerate(impl.model.model.layers):
        announce(block, i, weights)
    return weights
