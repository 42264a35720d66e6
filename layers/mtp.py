"""Multi-token prediction (R 2.2, eqs 21-25): module k predicts token i+k+1 from depth k-1's hidden at i and token
i+k.
"""

from __future__ import annotations

from typing import Any

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.tensor import Array

from .block import DecoderLayer
from .common import rms_norm
from .config import Config
from .mla import KV, Attend
from .module import Embedding, Linear, Module, RMSNorm, Unset
from .stage import stage


def _window(x: Any) -> Any:
    """All but the last position, which has no token left to look ahead to.  x (B, S, ...) -> (B, S-1, ...)."""
    return x[:, :-1]


hidden = stage("mtp.hidden", what="hidden of the depth before, cut", eq="R eq 21: h_i^(k-1)", shape="B S-k D")(_window)
positions = stage("mtp.positions", what="positions, cut", eq="R eq 22: i = 1..T-k", shape="B S-k", compare="exact")(
    _window
)
valid = stage("mtp.valid", what="padding, cut", eq="R eq 22 (padding is no token)", shape="B S-k", compare="exact")(
    _window
)
documents = stage(
    "mtp.documents", what="documents, cut", eq="R eq 22; 5.1 (sample masking)", shape="B S-k", compare="exact"
)(_window)


@stage("mtp.emb", what="embedding of the token k ahead", eq="R eq 21: Emb(t_(i+k))", shape="B S-k D")
def emb(tokens: Array, w: Any, *, depth: int) -> Any:
    """Embedding of the token `depth` ahead.  tokens (B, S) int, w (V, D) -> (B, S-k, D)."""
    return ops.take_rows(w, tokens[:, depth:])


hnorm = stage("mtp.hnorm", what="normalised hidden", eq="R eq 21", shape="B S-k D")(rms_norm)
enorm = stage("mtp.enorm", what="normalised embedding", eq="R eq 21", shape="B S-k D")(rms_norm)
norm = stage("mtp.norm", what="input of the shared head, h^k", eq="R eq 23 (before the shared head)", shape="B S-k D")(
    rms_norm
)


@stage("mtp.cat", what="embedding and hidden side by side", eq="R eq 21", shape="B S-k 2D")
def cat(embedding: Any, hidden: Any, *, hidden_first: bool) -> Any:
    """[emb; hidden], or the order R prints.  embedding (B, S, D), hidden (B, S, D) -> (B, S, 2 D)."""
    return ops.concat([hidden, embedding] if hidden_first else [embedding, hidden])


@stage("mtp.proj", what="input of the module's layer", eq="R eq 21: M_k", shape="B S-k D")
def proj(x: Any, w: Any) -> Any:
    """M_k x.  x (B, S, 2 D), w (D, 2 D) -> (B, S, D)."""
    return nn_ops.linear(x, w)


class SharedHead(Module):
    """Norm before the head; `head` itself is a copy of the main model's and may be absent from a checkpoint."""

    def __init__(self, c: Config) -> None:
        self.norm = RMSNorm(c.hidden_size)
        self.head = Embedding(c.vocab_size, c.hidden_size)
        self.head.weight = Unset((c.vocab_size, c.hidden_size), optional=True)


class MTPLayer(DecoderLayer):
    """MTP module k = checkpoint layer num_hidden_layers + k - 1: a decoder layer with a front and its own last norm."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__(c, layer)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.embed_tokens.weight = Unset((c.vocab_size, c.hidden_size), optional=True)
        self.enorm = RMSNorm(c.hidden_size)
        self.hnorm = RMSNorm(c.hidden_size)
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = SharedHead(c)

    def front(self, tokens: Array, h: Any, embedding: Any, *, depth: int) -> Any:
        """M_k [norm(emb of t_(i+k)); norm(h_i)].  tokens (B, S), h (B, S-k, D), embedding (V, D) -> (B, S-k, D)."""
        eps = self.config.rms_norm_eps
        e = enorm(emb(tokens, embedding, depth=depth), self.enorm.weight, eps=eps)
        n = hnorm(h, self.hnorm.weight, eps=eps)
        first = self.config.dialect.mtp_concat == "hidden_first"
        return proj(cat(e, n, hidden_first=first), self.eh_proj.weight)

    def block(self, x: Any, table: Any, mask: Any, past: KV | None, attend: Attend) -> tuple[Any, Any, KV]:
        """The decoder layer and its last norm.  x (B, S-k, D) -> before the norm (B, S-k, D), after it (B, S-k, D), its cache."""
        x, kv, _ = self(x, table, mask, past, attend)
        return x, norm(x, self.shared_head.norm.weight, eps=self.config.rms_norm_eps), kv
