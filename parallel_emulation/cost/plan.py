"""The plan of a training job on a user's cluster: bytes per link class, memory per rank, bubble, step time.

GPU number = (pipeline rank * dp + data rank) * ep + expert rank: expert groups fill nodes, pipeline neighbours are
farthest apart. No tensor parallelism (R 3.2). Embedding sits on the first stage, head and final norm on the last; MTP
is left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require, where
from refimpl.layers.config import Config
from refimpl.layers.presets import DEEPSEEK_V3
from refimpl.parallel_emulation.pipeline import Schedule, Timeline, build, simulate
from refimpl.parallel_emulation.pipeline.checker import Facts, check

from .cluster import Cluster
from .layer_cost import activation_bytes, dense_parameters, expert_parameters, training_flop
from .scale import LayerTimes, Rate, layer_times, split_layers
from .traffic import Copies, bf16_row, fp8_row, uniform_copies

WEIGHT_BYTES, GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES = 2, 4, 4, 2  # BF16, float32, float32, BF16 each (R 3.3.3)

Bytes = NDArray[np.float64]  # (gpus,)


@dataclass(frozen=True)
class Job:
    """What to train, where, and how it is cut. `sequences` are those of one micro-batch on one GPU.

    Raises SpecError where the sizes do not divide or the schedule does not exist for them.
    """

    config: Config = DEEPSEEK_V3
    cluster: Cluster = field(default_factory=Cluster)
    pp: int = 16
    ep: int = 64
    micro_batches: int = 120
    schedule: str = "dualpipe"
    chunks: int | None = None
    sequence: int = 4096
    sequences: int = 1

    def __post_init__(self) -> None:
        with where(f"in a plan for {self.cluster.gpus} GPUs"):
            for name in ("pp", "ep", "micro_batches", "sequence", "sequences"):
                require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1")
            require(self.config.n_routed_experts > 0, "the model has no routed experts, the plan is for MoE layers")
            whole = self.cluster.gpus % (self.pp * self.ep) == 0
            require(whole, f"pp={self.pp} x ep={self.ep} does not divide {self.cluster.gpus} GPUs")

    @property
    def dp(self) -> int:
        """Copies of each expert group: gpus / (pp * ep)."""
        return self.cluster.gpus // (self.pp * self.ep)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one GPU."""
        return self.sequence * self.sequences

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all GPUs."""
        return self.tokens * self.micro_batches * self.dp * self.ep


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU of one pipeline rank."""

    weights: float
    gradients: float
    optimizer: float  # float32 masters and two BF16 moments, one ZeRO-1 shard
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Plan:
    """Everything that follows from a job; attributes are computed when asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.schedule: Schedule = build(job.schedule, job.pp, job.micro_batches, job.chunks)
        self.facts: Facts = check(self.schedule)
        self.layers = split_layers(job.config.num_hidden_layers, self.schedule.layout.n_stages)
        self.copies: Copies = uniform_copies(
            job.ep,
            experts=job.config.n_routed_experts,
            k=job.config.num_experts_per_tok,
            gpus_per_node=job.cluster.gpus_per_node,
            node_limit=job.config.topk_group if job.config.n_group > 1 else job.config.n_routed_experts,
        )

    @cached_property
    def layer_times(self) -> LayerTimes:
        """Seconds of one layer."""
        job = self.job
        return layer_times(job.config, job.cluster, self.copies, sequence=job.sequence, sequences=job.sequences)

    @cached_property
    def timeline(self) -> Timeline:
        """The pipeline of one step; every chunk as long as the longest stage's, messages between nodes over IB."""
        job, size = self.job, self._boundary
        apart = job.dp * job.ep % job.cluster.gpus_per_node == 0
        message = (job.cluster.ib if apart else job.cluster.nvlink).time(size)
        return simulate(self.schedule, self.layer_times.chunk(max(self.layers), message))

    @property
    def _boundary(self) -> float:
        """Bytes of one message between stages: the residual stream in BF16."""
        return float(self.job.tokens * bf16_row(self.job.config.hidden_size))

    def _stage_layers(self, rank: int) -> list[int]:
        """Numbers of the layers a pipeline rank holds."""
        first = np.concatenate([[0], np.cumsum(self.layers)])
        return [i for s in self.schedule.layout.stages[rank] for i in range(first[s], first[s + 1])]

    def parameters(self, rank: int) -> tuple[int, int]:
        """(dense, expert) parameters on each GPU of a pipeline rank."""
        c, layers = self.job.config, self._stage_layers(rank)
        dense = sum(dense_parameters(c, i) for i in layers)
        stages, last = self.schedule.layout.stages[rank], self.schedule.layout.n_stages - 1
        table = c.vocab_size * c.hidden_size
        dense += table * (0 in stages) + (table * (not c.tie_word_embeddings) + c.hidden_size) * (last in stages)
        experts = sum(map(c.is_moe, layers)) * (c.n_routed_experts // self.job.ep) * expert_parameters(c)
        return dense, experts

    def _mirrors(self, rank: int) -> tuple[int, ...]:
        """Pipeline ranks that hold the same stages, this one included: DualPipe's mirror pair."""
        stages = self.schedule.layout.stages
        return tuple(r for r in range(len(stages)) if set(stages[r]) == set(stages[rank]))

    def memory(self, rank: int) -> Memory:
        """Bytes on each GPU of a pipeline rank: its most live chunks at the mean size of its stages' chunks."""
        job, (dense, experts) = self.job, self.parameters(rank)
        copies = job.dp * len(self._mirrors(rank))
        sharded = dense / (copies * job.ep) + experts / copies
        kept = sum(activation_bytes(job.config, moe=job.config.is_moe(i)) for i in self._stage_layers(rank))
        per_token = kept / len(self.schedule.layout.stages[rank])
        return Memory(
            weights=WEIGHT_BYTES * (dense + experts),
            gradients=GRADIENT_BYTES * (dense + experts),
            optimizer=(MASTER_BYTES + 2 * MOMENT_BYTES) * sharded,
            activations=self.facts.peak_until_weight[rank] * per_token * job.tokens,
        )

    @property
    def fits(self) -> bool:
        """Whether every GPU's memory suffices."""
        return all(self.memory(rank).total <= self.job.cluster.memory for rank in range(self.job.pp))

    def _gpus(self, rank: int) -> NDArray[np.int64]:
        """(dp, ep) numbers of the GPUs of a pipeline rank."""
        each = self.job.dp * self.job.ep
        return np.arange(rank * each, (rank + 1) * each).reshape(self.job.dp, self.job.ep)

    def traffic(self) -> dict[str, tuple[Bytes, Bytes]]:
        """Axis -> bytes each GPU sends in a step over (NVLink, IB): "expert", "pipeline", "data"."""
        return {"expert": self._expert(), "pipeline": self._pipeline(), "data": self._data()}

    def _expert(self) -> tuple[Bytes, Bytes]:
        """Dispatch and combine, forward and backward, of every MoE layer and micro-batch."""
        job, c = self.job, self.job.config
        row = 2 * (fp8_row(c.hidden_size) + bf16_row(c.hidden_size)) * job.tokens
        passes = self.schedule.layout.chunks * np.array(
            [sum(map(c.is_moe, self._stage_layers(r))) for r in range(job.pp)], np.float64
        )
        each = np.repeat(passes, job.dp * job.ep) * row
        return each * self.copies.nvlink, each * self.copies.remote_nodes

    def _pipeline(self) -> tuple[Bytes, Bytes]:
        """The schedule's own messages, each between GPUs of equal place in neighbouring pipeline ranks."""
        nvlink, ib = np.zeros(self.job.cluster.gpus), np.zeros(self.job.cluster.gpus)
        for rank, batches in enumerate(self.schedule.batches):
            peers = Counter(m.peer for batch in batches for m in batch if m.verb == "s")
            for peer, count in peers.items():
                source, target = self._gpus(rank).ravel(), self._gpus(peer).ravel()
                local = self.job.cluster.same_node(source, target)
                nvlink[source] += np.where(local, count * self._boundary, 0)
                ib[source] += np.where(local, 0, count * self._boundary)
        return nvlink, ib

    def _data(self) -> tuple[Bytes, Bytes]:
        """ZeRO-1 on rings: reduce-scatter of gradients, all-gather of weights, (d-1)/d of each per GPU.

        Dense parameters over all GPUs of a stage, experts over the copies of an expert group, both with the mirror.
        Several rings share the work, so that crossings between nodes are spread evenly over a group.
        """
        nvlink, ib = np.zeros(self.job.cluster.gpus), np.zeros(self.job.cluster.gpus)
        for mirrors in dict.fromkeys(map(self._mirrors, range(self.job.pp))):
            dense, experts = self.parameters(mirrors[0])
            gpus = np.stack([self._gpus(r) for r in mirrors])  # (mirrors, dp, ep)
            rings = [(dense, gpus.ravel()), *((experts, gpus[:, :, e].ravel()) for e in range(self.job.ep))]
            for parameters, ring in rings:
                sent = (len(ring) - 1) / len(ring) * parameters * (GRADIENT_BYTES + WEIGHT_BYTES)
                crossing = 1 - self.job.cluster.same_node(ring, np.roll(ring, -1)).mean()
                nvlink[ring] += sent * (1 - crossing)
                ib[ring] += sent * crossing
        return nvlink, ib

    @cached_property
    def optimizer_time(self) -> float:
        """Seconds: gradient and weight exchange, max(NVLink, IB), and the update's memory traffic; not overlapped."""
        nvlink, ib = self._data()
        cluster = self.job.cluster
        exchange = max(cluster.nvlink.time(nvlink.max()), cluster.ib.time(ib.max()))
        state = max(self.memory(rank).optimizer for rank in range(self.job.pp))
        return exchange + 3 * state / cluster.memory_bandwidth  # read, write, and the gradients and weights beside it

    @cached_property
    def rate(self) -> Rate:
        """Step time and what follows from it."""
        job = self.job
        step, flop = self.timeline.makespan + self.optimizer_time, training_flop(job.config, job.sequence)
        return Rate(step, job.step_tokens, job.cluster.gpus, flop, job.cluster.peak)
