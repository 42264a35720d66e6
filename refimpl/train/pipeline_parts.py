"""DeepSeek-V3 cut into pipeline stages: consecutive layers, the embedding before the first, heads and losses behind the last.

The MTP modules are part of the last stage, behind the main head (R 3.2.3). They need the embedding, which the first
stage has, and the head, which the last stage has anyway: where a rank holds both stages, they share one array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.autograd import Parameter, data_of, require
from refimpl.layers import loss as losses
from refimpl.layers.common import embed, final_norm, logits, mask
from refimpl.layers.config import Config
from refimpl.layers.module import Unset
from refimpl.layers.rope import rope_tables
from refimpl.layers.router import Routing, seq_aux
from refimpl.layers.stage import phase, unit
from refimpl.model import ForCausalLM, Inputs

from .shares import Share, part_of, shared


@dataclass(frozen=True)
class Cut:
    """Which layers are in which stage: bounds[s] to bounds[s + 1]."""

    config: Config
    n_mtp: int
    bounds: tuple[int, ...]

    @property
    def n_stages(self) -> int:
        """How many stages there are."""
        return len(self.bounds) - 1

    def layers(self, s: int) -> range:
        """The main model's layers of stage s."""
        return range(self.bounds[s], self.bounds[s + 1])

    def holds(self, s: int, name: str) -> bool:
        """Whether stage s uses the weight of this checkpoint name; the embedding is used at both ends."""
        c, first, last = self.config, s == 0, s == self.n_stages - 1
        if name.startswith("model.layers."):
            i = int(name.split(".")[2])
            return i in self.layers(s) or (last and i >= c.num_hidden_layers)
        if name.startswith("model.embed_tokens."):
            return first or (last and (self.n_mtp > 0 or c.tie_word_embeddings))
        return last  # the final norm and the head

    def only(self, model: ForCausalLM, stages: Iterable[int]) -> ForCausalLM:
        """The model with the weights of these stages, all others Unset."""
        mine = tuple(stages)

        def keep(name: str, w: Any) -> Any:
            return w if any(self.holds(s, name) for s in mine) else Unset(tuple(w.shape))

        return model.map(keep)


def cut(c: Config, n_stages: int, sizes: Sequence[int] | None = None) -> Cut:
    """Equally many layers in every stage, or `sizes[s]` layers in stage s. SpecError where that does not come out.

    V3's own division of 61 layers among 16 stages is not published.
    """
    n = c.num_hidden_layers
    if sizes is None:
        require(n_stages >= 1 and n % n_stages == 0, f"{n} layers do not divide among {n_stages} stages; give sizes")
        sizes = [n // n_stages] * n_stages
    fits = len(sizes) == n_stages and min(sizes, default=-1) >= 0 and sum(sizes) == n
    require(fits, f"sizes {list(sizes)} for {n_stages} stages and {n} layers")
    return Cut(c, c.num_nextn_predict_layers, tuple(sum(sizes[:s]) for s in range(n_stages + 1)))


@dataclass(frozen=True)
class Stage:
    """Stage s of a cut model as the executor takes it: `stage(x, j)` for `inputs[j]`, of whose losses `shares[j]` counts.

    `saw` is told the routing of every layer of experts, under its place in the model ("L3"); `heard` every part of the loss.
    """

    model: ForCausalLM
    cut: Cut
    s: int
    inputs: Sequence[Inputs]
    shares: Sequence[Share]
    mtp_weight: float = 0.0
    aux_weight: float = 0.0
    saw: Callable[[str, Routing], None] = lambda place, routing: None
    heard: Callable[[str, float], None] = lambda part, loss: None

    def __call__(self, x: Any, j: int) -> tuple[Any, Any]:
        """x (B, S, D), None in the first stage -> (x (B, S, D), None in the last one; loss () or None)."""
        inputs = self.inputs[j]
        with phase("fwd"):
            if self.s == 0:
                x = embed(inputs.tokens, self.model.model.embed_tokens.weight)
            x, loss = self._blocks(inputs, x)
            found = {} if loss is None else {"loss.seq_aux": loss}
            if self.s == self.cut.n_stages - 1:
                loss, heads = self._heads(inputs, x, loss)
                x, found = None, heads | found
        for name, part in found.items():
            self.heard(part_of(name), float(data_of(part)) * self.shares[j][part_of(name)])
        return x, shared(loss, found, self.shares[j], self.mtp_weight) if found else None

    def _blocks(self, inputs: Inputs, x: Any) -> tuple[Any, Any]:
        """The layers of this stage -> x (B, S, D), the sum of their balance losses or None."""
        c, loss = self.cut.config, None
        table = rope_tables(inputs.positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=x.dtype)
        keys = (inputs.valid, inputs.documents, inputs.documents)
        visible = mask(inputs.positions, *keys, past=0, dtype=x.dtype)
        for i in self.cut.layers(self.s):
            with unit(f"L{i}"):
                x, _, routing = self.model.model.layers[i](x, table, visible)
                if routing is None:
                    continue
                self.saw(f"L{i}", routing)
                if self.aux_weight:
                    aux = self._balance(routing)
                    loss = aux if loss is None else loss + aux
        return x, loss

    def _balance(self, r: Routing) -> Any:
        c = self.cut.config
        routed = r.ids if c.dialect.seq_aux_counts == "routed" else None
        return seq_aux(r.scores, routed, k=c.num_experts_per_tok, alpha=self.aux_weight)

    def _heads(self, inputs: Inputs, x: Any, loss: Any) -> tuple[Any, dict[str, Any]]:
        """Final norm, head, MTP modules.  x (B, S, D), loss so far -> loss (), main and MTP losses by name."""
        assert inputs.labels is not None
        c, m = self.cut.config, self.model
        head = m.model.embed_tokens.weight if c.tie_word_embeddings else m.lm_head.weight
        h = final_norm(x, m.model.norm.weight, eps=c.rms_norm_eps)
        main, mtp = losses.main(logits(h, head), inputs.labels), {}
        if self.mtp_weight and self.cut.n_mtp:
            start = h if c.dialect.mtp_hidden == "post_norm" else x
            mtp = m.mtp_loss(inputs, start, weight=self.mtp_weight)[1]
        aux = () if loss is None else (loss,)
        total = losses.total(main, tuple(mtp.values()), aux, mtp_weight=self.mtp_weight)
        return total, {"loss.main": main} | mtp


def trained(model: ForCausalLM) -> dict[str, Parameter]:
    """The leaves of a model by checkpoint name."""
    return {name: w for name, w in model.named_weights() if isinstance(w, Parameter)}
