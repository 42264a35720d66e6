"""The decode unit: every rank has requests of its own, one token of each a step; experts over all ranks (R 3.4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.autograd import Array
from refimpl.layers import mla
from refimpl.layers.common import final_norm, logits, mask
from refimpl.layers.mla import KV
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.parallel_emulation.comm import Comm, Recv
from refimpl.parallel_emulation.serving import decode_overlap

from . import kv
from .batch import Batch, alone, order, run
from .experts import Experts
from .moves import Move
from .units import Deployment


@dataclass
class Answer:
    """A request that is being answered: its cache, c_kv (1, T, C) and k_rope (1, T, Dr) a layer, and the answer so far."""

    number: int
    cache: list[KV]
    answer: list[int]
    logits: list[Array] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the last token of the answer stands: behind all that the cache holds."""
        return int(self.cache[-1][0].shape[1])


class Steps(Batch):
    """The last token of several sequences."""

    def __init__(self, model: ForCausalLM, experts: Experts, number: int, sequences: Sequence[Answer]) -> None:
        self.sequences = sequences
        tokens = np.array([s.answer[-1] for s in sequences], np.int64)
        super().__init__(model, experts, number, tokens, np.array([s.position for s in sequences], np.int64))

    def attention_1(self, i: int) -> None:
        """The new latents go behind the old ones."""
        super().attention_1(i)
        _, latent, kr = [np.asarray(a) for a in self.mine]
        for j, s in enumerate(self.sequences):
            c, k = s.cache[i]
            s.cache[i] = (
                np.asarray(mla.cache_c_kv(c, latent[:, j : j + 1])),
                np.asarray(mla.cache_k_rope(k, kr[:, j : j + 1])),
            )

    def attend(self, i: int) -> Array:
        """Each sequence on its own latents, absorbed."""
        if not self.sequences:
            return self.x
        m, query, o = self.layer(i).self_attn, np.asarray(self.mine[0]), []
        for j, s in enumerate(self.sequences):
            c, k = s.cache[i]
            at = self.positions[None, j : j + 1]
            seen = mask(at, None, None, None, past=c.shape[1] - 1, dtype=self.model.dtype)
            o.append(np.asarray(mla.heads(m, query[:, j : j + 1], c, k, self.table[:, :, j : j + 1], seen, "absorbed")))
        return np.asarray(mla.attn_out(np.concatenate(o, axis=1), m.o_proj.weight, m.o_proj.bias))


class Decode:
    """One rank of the unit."""

    def __init__(self, unit: Comm, model: ForCausalLM, how: Deployment) -> None:
        self.unit, self.model, self.how = unit, model, how
        slots = how.slots(model.config.n_routed_experts, decode=True)
        nodes = make_nodes(unit, 1, "decode.nodes")
        self.experts = Experts(nodes, model, slots, active=how.decode_active, recipe=how.recipe, wire=how.wire)
        lanes = decode_overlap(model.config.num_hidden_layers)
        self.parts = order(lanes) if how.overlap else alone(lanes)
        self.going: list[Answer] = []
        self.moves: list[Move] = []
        self.steps = 0

    def take(self, world: Comm, requests: Sequence[int], prompts: Sequence[Array]) -> list[Answer]:
        """What the prefill unit hands over of one round; the first token of each answer comes with it."""
        c, mine = self.model.config, [r for r in requests if self.how.target(r) == world.rank]
        came = iter(world.exchange([], [e for r in mine for e in kv.recvs(c, self.how.sources(r))], "kv"))
        last = [self.how.sources(r)[min(len(prompts[r]), self.how.tp) - 1] for r in mine]
        first = world.exchange([], [Recv(source) for source in last], "kv.first")
        new = []
        for r, token in zip(mine, first, strict=True):
            parts = [next(came) for _ in range(self.how.tp * c.num_hidden_layers)]
            cache = kv.joined(parts, c, len(prompts[r]), self.how.tp, self.how.kv, self.model.dtype)
            new.append(Answer(r, cache, [int(token)]))
        self.going += new
        return new

    def step(self) -> None:
        """One token for everybody, in two micro-batches; all ranks of the unit step together, also those without requests."""
        batches = [Steps(self.model, self.experts, b, self.going[b::2]) for b in range(2)]
        run(self.parts, batches, "decode")
        for b in batches:
            h = final_norm(b.x, self.model.model.norm.weight, eps=self.model.config.rms_norm_eps)
            for s, y in zip(b.sequences, np.asarray(logits(h, self.model.head))[0], strict=True):
                s.logits.append(y)
                s.answer.append(int(y.argmax()))
        self.steps += 1
        if self.how.replan and self.steps % self.how.replan == 0:
            self.moves += self.experts.replan()
