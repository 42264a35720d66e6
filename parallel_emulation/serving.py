"""Serving V3 (R 3.4): bytes of the KV transfer, which replica of a redundant expert takes a token, and two
micro-batches that hide each other's communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from refimpl.autograd.errors import SpecError, require
from refimpl.layers.config import Config
from refimpl.parallel_emulation.cost import Cluster, kv_cache_bytes

from .eplb import Ints, Placement


def kv_transfer_bytes(config: Config, tokens: int, value_bytes: int = 2) -> int:
    """tokens * (C + Dr) * value_bytes * layers: what a prefill unit hands to a decode unit; 70,272 per token for V3."""
    require(tokens >= 0, f"a transfer of {tokens} tokens")
    return tokens * kv_cache_bytes(config, value_bytes)


def kv_transfer_time(config: Config, tokens: int, cluster: Cluster) -> float:
    """Seconds over one GPU's network link, one message per layer."""
    return cluster.ib.time(kv_transfer_bytes(config, tokens), config.num_hidden_layers)


def choose_replicas(ids: ArrayLike, placement: Placement, layer: int, tokens: ArrayLike | None = None) -> Ints:
    """ids (N, K) logical experts -> (N, K) physical slots: replica (token mod number of replicas) of each.

    `tokens` (N,) numbers the tokens, 0...N-1 unless given; -1 stays -1. The rule among replicas is not published; this
    one is deterministic and spreads consecutive tokens evenly. Raises SpecError for an expert or a layer that is not
    there.
    """
    chosen = np.asarray(ids, np.int64)
    require(chosen.ndim == 2, f"ids have shape {chosen.shape}; expected (tokens, k)")
    number = np.arange(len(chosen)) if tokens is None else np.asarray(tokens, np.int64)
    require(number.shape == chosen.shape[:1] and (number >= 0).all(), f"token numbers of shape {number.shape}, or < 0")
    layers, experts = placement.logcnt.shape
    require(0 <= layer < layers, f"layer {layer} of a placement for {layers}")
    known = not chosen.size or (chosen.min() >= -1 and chosen.max() < experts)
    require(known, f"expert ids must lie in -1...{experts - 1}")
    replica = number[:, None] % placement.logcnt[layer, chosen]
    return np.where(chosen < 0, np.int64(-1), placement.log2phy[layer, chosen, replica])


def slot_ranks(slots: Ints, placement: Placement, ranks: int) -> Ints:
    """Physical slots -> the ranks that hold them; -1 stays -1."""
    total = placement.phy2log.shape[1]
    require(ranks >= 1 and total % ranks == 0, f"{ranks} ranks do not divide {total} slots")
    return np.where(slots < 0, np.int64(-1), slots // (total // ranks))


Stage = Literal["attention", "attention 1", "attention 2", "dispatch", "mlp", "combine"]


class Part(NamedTuple):
    """One stage of one layer for one of the two micro-batches."""

    stage: Stage
    batch: int
    layer: int


@dataclass(frozen=True)
class Lanes:
    """Two queues that run side by side: the GPU's computation and its network."""

    stages: tuple[Stage, ...]  # of one layer, in the order a micro-batch goes through them
    compute: tuple[Part, ...]
    network: tuple[Part, ...]

    def before(self, part: Part) -> Part | None:
        """What a part's micro-batch does before it; None for the first part."""
        i = self.stages.index(part.stage)
        if i:
            return Part(self.stages[i - 1], part.batch, part.layer)
        return Part(self.stages[-1], part.batch, part.layer - 1) if part.layer else None


def prefill_overlap(layers: int) -> Lanes:
    """Attention 0 | combine 1, attention 1 | dispatch 0, mlp 0 | dispatch 1, mlp 1 | combine 0, in each layer.

    Attention and MoE of one micro-batch run over dispatch and combine of the other (R 3.4.1).
    """
    require(layers >= 1, f"{layers} layers; at least 1")
    compute: list[Part] = []
    network: list[Part] = []
    for n in range(layers):
        compute += [Part("attention", 0, n), Part("attention", 1, n), Part("mlp", 0, n), Part("mlp", 1, n)]
        network += [Part("dispatch", 0, n), Part("dispatch", 1, n), Part("combine", 0, n), Part("combine", 1, n)]
    return Lanes(("attention", "dispatch", "mlp", "combine"), tuple(compute), tuple(network))


def decode_overlap(layers: int) -> Lanes:
    """Attention in two steps, so that each of the four transfers of a layer runs beside half an attention.

    attention-1 0 | dispatch 1 (of the layer before), mlp 1 (likewise), attention-2 0 | combine 1 (likewise),
    attention-1 1 | dispatch 0, mlp 0, attention-2 1 | combine 0. The inference overview publishes the five stages and
    the two micro-batches; the order within a layer is ours.
    """
    require(layers >= 1, f"{layers} layers; at least 1")
    compute: list[Part] = []
    network: list[Part] = []
    for n in range(layers + 1):
        late = [Part("mlp", 1, n - 1)] if n else []
        if n < layers:
            compute += [Part("attention 1", 0, n), *late, Part("attention 2", 0, n)]
            compute += [Part("attention 1", 1, n), Part("mlp", 0, n), Part("attention 2", 1, n)]
        else:
            compute += late
        network += [Part("dispatch", 1, n - 1), Part("combine", 1, n - 1)] if n else []
        network += [Part("dispatch", 0, n), Part("combine", 0, n)] if n < layers else []
    return Lanes(("attention 1", "attention 2", "dispatch", "mlp", "combine"), tuple(compute), tuple(network))


def run_lanes(lanes: Lanes, seconds: Mapping[str, float]) -> dict[Part, tuple[float, float]]:
    """Part -> (start, end): each lane in its order, each part after what its micro-batch does before.

    `seconds` per stage name. Raises SpecError for a stage without time, or if the lanes wait for each other forever.
    """
    missing = set(lanes.stages) - set(seconds)
    require(not missing, f"no duration for {', '.join(sorted(missing))}")
    done: dict[Part, tuple[float, float]] = {}
    queues = [list(reversed(lanes.compute)), list(reversed(lanes.network))]
    clocks = [0.0, 0.0]
    while any(queues):
        ready = [i for i, queue in enumerate(queues) if queue and _ready(lanes, queue[-1], done)]
        if not ready:
            raise SpecError(f"the lanes wait for each other at {[queue[-1] for queue in queues if queue]}")
        for i in ready:
            part = queues[i].pop()
            earlier = lanes.before(part)
            start = max(clocks[i], done[earlier][1] if earlier else 0.0)
            clocks[i] = start + seconds[part.stage]
            done[part] = start, clocks[i]
    return done


def _ready(lanes: Lanes, part: Part, done: Mapping[Part, tuple[float, float]]) -> bool:
    earlier = lanes.before(part)
    return earlier is None or earlier in done


def exposed(lanes: Lanes, seconds: Mapping[str, float]) -> float:
    """Time in which the GPU waits for the network: the end of all parts - the computation's own time."""
    end = max(end for _, end in run_lanes(lanes, seconds).values())
    return end - sum(seconds[part.stage] for part in lanes.compute)
