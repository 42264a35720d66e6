"""The whole model: embedding, decoder layers, final norm, head, MTP modules (R fig. 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, Parameter
from refimpl.layers import loss as losses
from refimpl.layers import mtp, router
from refimpl.layers.block import DecoderLayer
from refimpl.layers.common import embed, final_norm, logits, mask
from refimpl.layers.config import Config
from refimpl.layers.mla import KV, Attend
from refimpl.layers.module import Embedding, Module, RMSNorm, is_buffer
from refimpl.layers.mtp import MTPLayer
from refimpl.layers.rope import rope_tables
from refimpl.layers.router import Routing
from refimpl.layers.stage import phase, unit

from .inputs import Cache, Inputs, extend, read_inputs, shrink


@dataclass(frozen=True)
class Output:
    """logits (B, S, V), hidden before and after the final norm (B, S, D), the cache, each MoE layer's routing, MTP
    logits; with labels the loss () and its parts.
    """

    logits: Any
    hidden_pre_norm: Any
    hidden: Any
    cache: Cache
    routing: dict[str, Routing]
    mtp_logits: list[Any] = field(default_factory=list)
    loss: Any = None
    losses: dict[str, Any] = field(default_factory=dict)


class Model(Module):
    """embed_tokens, layers, norm. MTP modules are the layers after num_hidden_layers, as in the checkpoint."""

    def __init__(self, c: Config, *, n_mtp: int) -> None:
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers: list[DecoderLayer] = [DecoderLayer(c, i) for i in range(c.num_hidden_layers)]
        self.layers += [MTPLayer(c, c.num_hidden_layers + k) for k in range(n_mtp)]
        self.norm = RMSNorm(c.hidden_size)


class ForCausalLM(Module):
    """DeepSeek-V3. `ForCausalLM(config).load(weights)` gives a model that holds arrays; calling it computes."""

    def __init__(self, c: Config, *, n_mtp: int | None = None) -> None:
        self.config = c
        self.n_mtp = c.num_nextn_predict_layers if n_mtp is None else n_mtp
        self.model = Model(c, n_mtp=self.n_mtp)
        if not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size)

    @classmethod
    def from_weights(cls, c: Config, weights: Mapping[str, Any]) -> Self:
        """The model that holds `weights` under checkpoint names; without any MTP tensor there, a model without MTP."""
        has_mtp = any(n.startswith(f"model.layers.{c.num_hidden_layers}.") for n in weights)
        if c.tie_word_embeddings:
            weights = {n: weights[n] for n in weights if n != "lm_head.weight"}
        return cls(c, n_mtp=None if has_mtp else 0).load(weights)

    def with_gradients(self) -> Self:
        """The same model with every trained weight a leaf on the tape (no copies)."""
        return self.map(lambda name, w: w if is_buffer(name) or not hasattr(w, "dtype") else Parameter(w))

    @property
    def head(self) -> Any:
        """What makes logits of hidden (V, D): its own matrix, or the embedding's."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def dtype(self) -> Any:
        """The dtype the model computes in: that of its embedding."""
        return self.model.embed_tokens.weight.dtype

    def inputs(self, tokens: Any, *args: Any, **given: Any) -> Inputs:
        """`read_inputs` for this model: tokens (B, S), positions, valid, documents, labels, and cache=."""
        return read_inputs(self.config, tokens, *args, **given)

    def __call__(
        self,
        inputs: Inputs,
        cache: Cache | None = None,
        *,
        attend: Attend = "auto",
        with_mtp: bool = False,
        name: str | None = None,
        at: Array | None = None,
    ) -> Output:
        """Run the model; taps are named under `name`, by default "fwd", or "decN" with N tokens in the cache.

        `at` (B,): logits behind this token of each row alone (B, 1, V), as a prompt needs no others.
        """
        name = name or (f"dec{len(cache)}" if cache else "fwd")
        with phase(name):
            x = embed(inputs.tokens, self.model.embed_tokens.weight)
            keys = extend(cache, inputs)
            table, m = self._tables(inputs), self._mask(inputs, keys)
            x, kvs, routing = self.blocks(x, table, m, cache, attend)
            h = final_norm(x, self.model.norm.weight, eps=self.config.rms_norm_eps)
            y = logits(h if at is None else h[np.arange(len(at)), at][:, None], self.head)
            out = Output(y, x, h, Cache(tuple(kvs), *keys), routing)
            return replace(out, mtp_logits=self._mtp(inputs, self.mtp_start(out), attend)) if with_mtp else out

    def blocks(
        self, x: Any, table: Any, mask: Any, cache: Cache | None, attend: Attend
    ) -> tuple[Any, list[KV], dict[str, Routing]]:
        """The decoder layers in turn.  x (B, S, D), table (2, B, S, Dr/2), mask (B, 1, S, T) -> x (B, S, D), their
        latent caches, the routing of those with experts.
        """
        kvs, routing = [], {}
        for i in range(self.config.num_hidden_layers):
            with unit(f"L{i}"):
                past = cache.layers[i] if cache else None
                x, kv, routed = self.model.layers[i](x, table, mask, past, attend)
            kvs.append(kv)
            if routed is not None:
                routing[f"L{i}"] = routed
        return x, kvs, routing

    def _tables(self, inputs: Inputs) -> Array:
        c = self.config
        return rope_tables(inputs.positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=self.dtype)

    def _mask(self, inputs: Inputs, keys: tuple[Any, Any, Any]) -> Array:
        positions, valid, documents = keys
        past = positions.shape[1] - inputs.positions.shape[1]
        return mask(inputs.positions, valid, inputs.documents, documents, past=past, dtype=self.dtype)

    def _mtp(self, inputs: Inputs, h: Any, attend: Attend) -> list[Any]:
        """Every MTP module in turn, from the main model's hidden h (B, S, D) on -> logits (B, S-k, V) each."""
        require(inputs.tokens.shape[1] > self.n_mtp, f"{self.n_mtp} MTP modules need more than {self.n_mtp} tokens")
        tokens, out = inputs.tokens, []
        for k in range(1, self.n_mtp + 1):
            with unit(f"mtp{k}"):
                inputs = shrink(inputs)
                keys = (inputs.positions, inputs.valid, inputs.documents)
                y, h, _ = self.mtp_module(k, tokens, mtp.hidden(h), inputs, keys, ahead=k, attend=attend)
            out.append(y)
        return out

    def mtp_module(
        self,
        k: int,
        tokens: Array,
        h: Any,
        inputs: Inputs,
        keys: tuple[Any, Any, Any],
        past: KV | None = None,
        *,
        ahead: int = 0,
        attend: Attend = "auto",
    ) -> tuple[Any, Any, KV]:
        """Module k alone on h (B, S, D) of the depth before and tokens (B, ahead + S), of which the first `ahead` are skipped; the
        positions, padding and documents of `inputs`, `keys` with those of the module's cache -> logits (B, S, V), h for the
        next depth (B, S, D), the cache.
        """
        layer = self.model.layers[self.config.num_hidden_layers + k - 1]
        assert isinstance(layer, MTPLayer)
        x = layer.front(tokens, h, self.model.embed_tokens.weight, depth=ahead)
        x, n, kv = layer.block(x, self._tables(inputs), self._mask(inputs, keys), past, attend)
        return logits(n, self.head), n if self.config.dialect.mtp_recycle == "post_norm" else x, kv

    def mtp_start(self, out: Output) -> Any:
        """h^0, what the first module takes of a run (B, S, D): after the final norm or before (Dialect.mtp_hidden)."""
        return out.hidden if self.config.dialect.mtp_hidden == "post_norm" else out.hidden_pre_norm

    def loss(self, inputs: Inputs, *, mtp_weight: float = 0.0, aux_weight: float = 0.0) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy of the next token, + mtp_weight x mean MTP loss, + the balance loss with alpha = aux_weight.

        -> loss (), its parts by name.
        """
        out = self.forward_and_loss(inputs, mtp_weight=mtp_weight, aux_weight=aux_weight)
        return out.loss, out.losses

    def forward_and_loss(self, inputs: Inputs, *, mtp_weight: float = 0.0, aux_weight: float = 0.0) -> Output:
        """As `loss`, with everything else the run gave."""
        require(inputs.labels is not None, "the loss needs labels: model.inputs(tokens, labels=...)")
        out = self(inputs, with_mtp=bool(mtp_weight and self.n_mtp))
        with phase("fwd"):
            parts = {"loss.main": losses.main(out.logits, inputs.labels)}
            heads = self._mtp_losses(inputs, out.mtp_logits)
            aux = self._aux_losses(out.routing, aux_weight) if aux_weight else {}
            total = losses.total(parts["loss.main"], tuple(heads.values()), tuple(aux.values()), mtp_weight=mtp_weight)
        return replace(out, loss=total, losses={"loss": total} | parts | heads | aux)

    def mtp_loss(self, inputs: Inputs, hidden: Any, *, weight: float) -> tuple[Any, dict[str, Any]]:
        """weight x the mean MTP loss alone (R eq 25), from a given hidden of the main model (B, S, D): constant, if
        it is an array.
        """
        with phase("fwd"):
            heads = self._mtp_losses(inputs, self._mtp(inputs, hidden, "auto"))
            return losses.total(0.0, tuple(heads.values()), (), mtp_weight=weight), heads

    def _mtp_losses(self, inputs: Inputs, logits: list[Any]) -> dict[str, Any]:
        mean, found = self.config.dialect.mtp_loss_mean, {}
        for k, y in enumerate(logits, 1):
            with unit(f"mtp{k}"):
                found[f"loss.mtp{k}"] = losses.mtp(y, inputs.labels, depth=k, mean=mean)
        return found

    def _aux_losses(self, routing: dict[str, Routing], alpha: float) -> dict[str, Any]:
        """The layers' balance losses. MTP modules' routers are left out: R says nothing of them."""
        c, found = self.config, {}
        for at, r in routing.items():
            routed = r.ids if c.dialect.seq_aux_counts == "routed" else None
            with unit(at):
                found[f"{at}/loss.seq_aux"] = router.seq_aux(r.scores, routed, k=c.num_experts_per_tok, alpha=alpha)
        return found


def expected_tensors(c: Config, *, mtp: bool = True) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of everything the model of this config holds (MTP copies of embedding and head left
    out).
    """
    model = ForCausalLM(c, n_mtp=None if mtp else 0)
    return {n: w.shape for n, w in model.named_weights() if not w.optional}
