"""How many bytes have to be read, counted from the headers alone: the least that a layer or a pass can do with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from refimpl.checkpoint import Checkpoint
from refimpl.layers.config import Config


def bytes_of(checkpoint: Checkpoint, name: str) -> int:
    """Stored bytes of a tensor, scales included."""
    scale = checkpoint.scale(name)
    return checkpoint.nbytes(name) + (scale.nbytes if scale else 0)


def row_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Stored bytes of one row."""
    return checkpoint.nbytes(name) // checkpoint.shape(name)[0]


def layer_bytes(checkpoint: Checkpoint, layer: int, experts: Iterable[int] = (), *, vectors: bool = True) -> int:
    """What a layer needs: everything but its routed experts, and of those the ones that were chosen, each once. Without `vectors`,
    matrices only: vectors stay in memory once they are there.
    """
    prefix = f"model.layers.{layer}."
    wanted = tuple([f"{prefix}mlp.experts.{e}." for e in set(experts)])
    names = [n for n in checkpoint if n.startswith(prefix) and (vectors or len(checkpoint.shape(n)) == 2)]
    return sum(bytes_of(checkpoint, n) for n in names if f"{prefix}mlp.experts." not in n or n.startswith(wanted))


def pass_bytes(checkpoint: Checkpoint, c: Config, chosen: Mapping[int, Iterable[int]], tokens: Iterable[int]) -> int:
    """What a pass of these tokens through the model reads of matrices, layer i's routers having chosen the experts chosen[i]: each
    layer's own, the head, a row of the embedding for each different token.
    """
    embedding = "model.embed_tokens.weight"
    head = embedding if c.tie_word_embeddings else "lm_head.weight"
    layers = sum(layer_bytes(checkpoint, i, chosen.get(i, ()), vectors=False) for i in range(c.num_hidden_layers))
    return layers + bytes_of(checkpoint, head) + len(set(tokens)) * row_bytes(checkpoint, embedding)
