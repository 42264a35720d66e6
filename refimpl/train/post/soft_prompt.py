"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): vectors in front of the tokens are trained, the model is frozen. Described
in articles, not in V3.

A soft prompt is rows of the embedding that no text has: ids V, V+1, ... So the model itself needs no change; what its head says of
them is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.config import Config
from refimpl.train.data import Batch

from .examples import Example
from .likelihood import logits_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def init(weights: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """A prompt that begins as the embeddings of real tokens, as the paper found best.  n ids -> (n, D)."""
    table = weights[EMBEDDING]
    require(len(ids) > 0 and all(0 <= i < len(table) for i in ids), f"ids {list(ids)} of {len(table)} tokens")
    return np.array(table[np.array(ids)], np.float32)


def fronted(c: Config, examples: Sequence[Example], n: int) -> list[Example]:
    """The same examples with the n ids of the soft prompt before their prompts."""
    front = list(range(c.vocab_size, c.vocab_size + n))
    return [Example([*front, *e.prompt], e.answer) for e in examples]


def extended(c: Config, weights: Mapping[str, Any], prompt: Any) -> tuple[Config, dict[str, Any]]:
    """The model that knows the prompt's ids.  prompt (n, D), array or leaf -> config with V + n tokens, weights."""
    table = weights[EMBEDDING]
    require(
        prompt.ndim == 2 and prompt.shape[1] == c.hidden_size, f"prompt {prompt.shape}; hidden_size={c.hidden_size}"
    )
    held = dict(weights) | {EMBEDDING: ops.concat([table, prompt], axis=0)}
    if not c.tie_word_embeddings:
        held[HEAD] = ops.concat([weights[HEAD], np.zeros_like(data_of(prompt))], axis=0)
    return c.replace(vocab_size=c.vocab_size + prompt.shape[0]), held


def logits(c: Config, weights: Mapping[str, Any], prompt: Any, batch: Batch) -> Any:
    """Logits over the real tokens.  prompt (n, D), batch (B, S) whose tokens may be the prompt's ids -> (B, S, V)."""
    larger, held = extended(c, weights, prompt)
    return logits_of(larger, held, batch)[..., : c.vocab_size]
