"""What backward finds and what it makes once more, layer by layer: a policy is a table, a model that follows it, a class.

Modes of a segment of layers:

| mode | kept until backward | made once more |
|---|---|---|
| `keep` | all that a gradient needs | nothing |
| `report` | the rest | outputs of RMSNorm and of SwiGLU, everything between the MLA latents and o_proj (R 3.2.3, R 3.3.3) |
| `again` | the input of the segment | all of it |

R 3.2.3 recomputes "all RMSNorm operations and MLA up-projections"; the core between the up-projections and o_proj is
recomputed with them, as FlashAttention does by itself. SwiGLU is R 3.3.3's. A gradient has the bits it has without any of it.

"Adaptive checkpointing" in articles about this model means: choose by a budget what to keep, and is here `budget.plan`.
The code printed there sets `requires_grad = False` on layers instead, which saves memory because it stops training them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from refimpl.autograd import discard, recompute, require
from refimpl.layers.block import DecoderLayer
from refimpl.layers.config import Config
from refimpl.layers.gemm import PLAIN
from refimpl.layers.mla import KV, Attend, Attention, attn_out, heads, latents
from refimpl.layers.module import Linear, Unset
from refimpl.layers.precision import Plan
from refimpl.layers.router import Routing
from refimpl.layers.stage import Stage, observing, unit
from refimpl.model import Cache, ForCausalLM
from refimpl.parallel_emulation.axes.placed import Placed, placed

Mode = Literal["keep", "report", "again"]
NORMS = ("attn_norm", "ffn_norm", "mla.q_a_norm", "mla.c_kv", "final_norm", "mtp.hnorm", "mtp.enorm", "mtp.norm")
ACTIVATIONS = ("mlp.act", "shared.act", "moe.act")


@dataclass(frozen=True)
class Segment:
    """Layers first to stop, and how they are remembered."""

    first: int
    stop: int
    mode: Mode


@dataclass(frozen=True)
class Policy:
    """Segments that follow each other over all layers; `ends`: the final norm and the MTP modules (keep or report)."""

    segments: tuple[Segment, ...]
    ends: Mode = "keep"

    @classmethod
    def uniform(cls, c: Config, mode: Mode) -> Policy:
        """Every layer by itself in one mode."""
        layers = range(c.num_hidden_layers)
        return cls(tuple([Segment(i, i + 1, mode) for i in layers]), "report" if mode == "report" else "keep")

    @classmethod
    def roots(cls, c: Config) -> Policy:
        """ceil(sqrt(L)) layers a segment, so that inputs kept and layers rebuilt at a time are about sqrt(L) each (Chen et al.
        2016).
        """
        n = c.num_hidden_layers
        each = math.isqrt(n - 1) + 1
        return cls(tuple([Segment(i, min(i + each, n), "again") for i in range(0, n, each)]))

    def check(self, c: Config) -> None:
        """SpecError unless the segments cover the layers of the model once, in order."""
        ends = [s.stop for s in self.segments]
        follow = [s.first for s in self.segments] == [0, *ends[:-1]] and all(s.first < s.stop for s in self.segments)
        ok = follow and ends and ends[-1] == c.num_hidden_layers
        require(ok, f"segments {[(s.first, s.stop) for s in self.segments]} for {c.num_hidden_layers} layers")


@dataclass(frozen=True)
class Discard:
    """An observer around the plan's: outputs of some stages are not kept, but made once more when a gradient needs them.

    Where the plan's kernel keeps its own FP8 copies (SwiGLU's inputs, R 3.3.3) it stands back.
    """

    plan: Plan | None
    stages: tuple[str, ...] = (*NORMS, *ACTIVATIONS)

    def watches(self, stage: str) -> bool:
        """Whether it is one of them."""
        return stage in self.stages

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """The stage, its output discarded if it is one of them."""
        kernel = PLAIN if self.plan is None else self.plan.kernel(stage.name)
        if stage.name not in self.stages or kernel is not PLAIN:
            return run(*args, **static)
        return discard(partial(run, **static))(*args)


class Frugal(ForCausalLM):
    """DeepSeek-V3 as a policy remembers it; for training, so without a cache."""

    how: tuple[Policy, Plan | None]

    def following(self, policy: Policy, plan: Plan | None = None) -> Self:
        """The same model and weights under a policy; `plan`: the precision plan that will stand around its stages."""
        new = copy.copy(self)
        new.how = policy, plan  # a tuple: what has a dtype would count as a weight
        new.model = copy.copy(self.model)
        modes = {i: s.mode for s in policy.segments for i in range(s.first, s.stop)}
        new.model.layers = [
            _lean(layer) if modes.get(i, policy.ends) == "report" else layer
            for i, layer in enumerate(self.model.layers)
        ]
        return new

    def blocks(
        self, x: Any, table: Any, mask: Any, cache: Cache | None, attend: Attend
    ) -> tuple[Any, list[KV], dict[str, Routing]]:
        """The decoder layers, segment by segment.  x (B, S, D) -> x (B, S, D), no caches, routing."""
        require(cache is None, "a recomputation policy is for training; decoding with a cache keeps nothing anyway")
        policy, plan = self.how
        routing: dict[str, Routing] = {}
        for s in policy.segments:
            layers = {i: self.model.layers[i] for i in range(s.first, s.stop)}
            run = partial(_run, layers, lambda layer, x: layer(x, table, mask, None, attend))
            if s.mode == "again":
                weights = [w for layer in layers.values() for _, w in layer.named_weights() if not isinstance(w, Unset)]
                x, *found = recompute(run)(x, *weights)
            else:
                with observing(*([Discard(plan)] if s.mode == "report" else [])):
                    x, *found = run(x)
            routing |= _named(layers, found)
        return x, [], routing

    def __call__(self, *args: Any, **how: Any) -> Any:
        """As the model; what is at its ends by the policy too."""
        policy, plan = self.how
        with observing(*([Discard(plan)] if policy.ends == "report" else [])):
            return super().__call__(*args, **how)


def _run(layers: Mapping[int, DecoderLayer], call: Callable[..., Any], x: Any, *weights: Any) -> tuple[Any, ...]:
    """Layers in turn -> x, then scores, ids and weights of each router. `weights`, if given, take the place of theirs."""
    given, found = iter(weights), []
    for i, layer in layers.items():
        if weights:
            layer = layer.map(lambda name, w: w if isinstance(w, Unset) else next(given))
        with unit(f"L{i}"):
            x, _, r = call(layer, x)
        found += [] if r is None else [r.scores, r.ids, r.weights]
    return (x, *found)


def _named(layers: Mapping[int, DecoderLayer], found: Sequence[Any]) -> dict[str, Routing]:
    experts = [i for i, layer in layers.items() if layer.config.is_moe(i)]
    parts: Iterator[Any] = iter(found)
    return {f"L{i}": Routing(next(parts), next(parts), next(parts)) for i in experts}


def _lean(layer: DecoderLayer) -> DecoderLayer:
    return placed(layer, self_attn=Placed(layer.self_attn, _attention))


def _attention(
    m: Attention, x: Any, table: Any, mask: Any, past: KV | None = None, attend: Attend = "auto"
) -> tuple[Any, KV]:
    """Attention that keeps its latents: from there to the heads' outputs it is run again.  x (B, S, D) -> y (B, S, D)."""
    assert past is None
    query, latent, kr = latents(m, x, table)
    queries = "q_proj" if m.config.q_lora_rank is None else "q_b_proj"

    def core(query: Any, latent: Any, kr: Any, wq: Any, wkv: Any) -> Any:
        own = copy.copy(m)
        setattr(own, queries, _holding(wq))
        own.kv_b_proj = _holding(wkv)
        return heads(own, query, latent, kr, table, mask, attend)

    o = recompute(core)(query, latent, kr, getattr(m, queries).weight, m.kv_b_proj.weight)
    return attn_out(o, m.o_proj.weight, m.o_proj.bias), (latent, kr)


def _holding(w: Any) -> Linear:
    linear = Linear(w.shape[1], w.shape[0])
    linear.weight = w
    return linear
