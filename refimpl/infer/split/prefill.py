"""The prefill unit: prompts read by groups of tensor- and sequence-parallel ranks, experts over all groups (R 3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.layers import mla
from refimpl.layers.common import final_norm, logits, mask
from refimpl.layers.mla import KV, Attention
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.axes.tensor import jointly, shard_attention, with_bias
from refimpl.parallel_emulation.collectives import make_nodes, shares, slices
from refimpl.parallel_emulation.collectives.duals import all_gather, reduce_scatter
from refimpl.parallel_emulation.comm import Comm, Send
from refimpl.parallel_emulation.serving import prefill_overlap

from . import kv
from .batch import Batch, alone, order, run
from .experts import Experts
from .units import Deployment


class Prompts(Batch):
    """Several prompts, of each the share of tokens that is mine; a prompt may be shorter than the group, a share empty."""

    def __init__(
        self,
        tp: Comm,
        model: ForCausalLM,
        mine: Sequence[Attention],
        experts: Experts,
        number: int,
        prompts: Sequence[Array],
    ) -> None:
        self.tp, self.heads, self.lengths = tp, mine, [len(p) for p in prompts]
        cuts = [slices(shares(n, tp.size))[tp.rank] for n in self.lengths]
        positions = [np.arange(n)[cut] for n, cut in zip(self.lengths, cuts, strict=True)]
        tokens = [np.asarray(p, np.int64)[cut] for p, cut in zip(prompts, cuts, strict=True)]
        none = [np.zeros(0, np.int64)]
        super().__init__(model, experts, number, np.concatenate(none + tokens), np.concatenate(none + positions))
        self.columns = slices([len(t) for t in tokens])
        self.kept: list[list[KV]] = [[] for _ in prompts]  # prompt -> layer -> c_kv (n, C), k_rope (n, Dr) of my tokens

    def attend(self, i: int) -> Array:
        """Each prompt by itself: the latents are gathered, my heads attend, partial sums are scattered back to their tokens."""
        found = [np.zeros((1, 0, self.x.shape[-1]), self.x.dtype)]
        for p, (length, s) in enumerate(zip(self.lengths, self.columns, strict=True)):
            query, latent, kr = [np.asarray(a)[:, s] for a in self.mine]
            self.kept[p].append((latent[0], kr[0]))
            found.append(self._prompt(self.heads[i], (query, latent, kr), length, f"L{i}.{self.number}"))
        return np.concatenate(found, axis=1)

    def _prompt(self, m: Attention, mine: tuple[Array, Array, Array], length: int, tag: str) -> Array:
        how: dict[str, Any] = {"comm": self.tp, "axis": 1, "sizes": shares(length, self.tp.size)}
        at = np.arange(length)[None]
        query, latent, kr = jointly(all_gather, mine, label=f"attention.gather.{tag}", **how)
        seen = mask(at, None, None, None, past=0, dtype=self.model.dtype)
        o = mla.heads(m, query, latent, kr, self.tables(at[0]), seen, "expanded")
        y = mla.attn_out(o, m.o_proj.weight)  # (1, S, D), partial over tp
        y = reduce_scatter(y, label=f"attention.scatter.{tag}", **how)
        return np.asarray(with_bias(y, m.o_proj.bias))

    def last(self) -> dict[int, Array]:
        """Logits (V,) behind each prompt whose last token is mine."""
        found = {}
        for p, (length, s) in enumerate(zip(self.lengths, self.columns, strict=True)):
            if min(length, self.tp.size) - 1 == self.tp.rank:
                h = final_norm(
                    self.x[:, s.stop - 1 : s.stop], self.model.model.norm.weight, eps=self.model.config.rms_norm_eps
                )
                found[p] = np.asarray(logits(h, self.model.head)[0, 0])
        return found


class Prefill:
    """One rank of the unit."""

    def __init__(self, unit: Comm, model: ForCausalLM, how: Deployment) -> None:
        c = model.config
        self.unit, self.model, self.how = unit, model, how
        self.tp = unit.split(unit.rank // how.tp, unit.rank, "prefill.tp")
        self.mine = [shard_attention(self.tp, m.self_attn) for m in model.model.layers[: c.num_hidden_layers]]
        slots = how.slots(c.n_routed_experts, decode=False)
        nodes = make_nodes(unit, 1, "prefill.nodes")
        self.experts = Experts(nodes, model, slots, active=how.prefill_active, recipe=how.recipe, wire=how.wire)
        lanes = prefill_overlap(c.num_hidden_layers)
        self.parts = order(lanes) if how.overlap else alone(lanes)

    def read(self, world: Comm, requests: Sequence[int], prompts: Sequence[Array]) -> dict[int, Array]:
        """One round: these prompts of all groups in two micro-batches, then to the decode unit.  -> {request: logits (V,)} of those
        whose last token is mine.
        """
        ours = [r for r in requests if self.unit.rank in self.how.sources(r)]
        halves = [ours[b::2] for b in range(2)]
        batches = [
            Prompts(self.tp, self.model, self.mine, self.experts, b, [prompts[r] for r in half])
            for b, half in enumerate(halves)
        ]
        run(self.parts, batches, "prefill")
        found = {half[p]: y for half, b in zip(halves, batches, strict=True) for p, y in b.last().items()}
        layers = {r: b.kept[p] for half, b in zip(halves, batches, strict=True) for p, r in enumerate(half)}
        world.exchange([s for r in ours for s in kv.sends(layers[r], self.how.target(r), self.how.kv)], [], "kv")
        first = [Send(self.how.target(r), np.array(found[r].argmax(), np.int64)) for r in ours if r in found]
        world.exchange(first, [], "kv.first")
        return found
