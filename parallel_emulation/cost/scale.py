"""Step time of a training run from its schedule: chunk durations, an event simulation, and what follows from the step.

Calibrated on one published object, the trace of a forward-backward pair on H800 (`published.TRACE_US`), checked against
the published steady state. Not in the model: embedding, head and MTP, three cheap dense layers, stragglers in expert
parallelism; together they are about a tenth of the published step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refimpl.autograd.errors import require
from refimpl.layers.config import Config
from refimpl.layers.presets import DEEPSEEK_V3
from refimpl.parallel_emulation.pipeline import Timeline, Times, build, simulate

from .cluster import Cluster
from .layer_cost import GROUPS, group_flop, training_flop
from .published import TRACE_PAIR_US, TRACE_US, TRAINING
from .traffic import Copies, bf16_row, fp8_row, normal_time, uniform_copies

COMMUNICATING_SLOWDOWN = 0.67
"""Bandwidth of dispatch and combine while computation overlaps them: 0.6 to 0.75 of stand-alone in the trace."""
DAY, HOUR, TRILLION = 86400.0, 3600.0, 1e12


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one MoE layer for one micro-batch: computation by group, and exposed dispatch + combine one way."""

    forward: float
    input_part: float
    weight_part: float
    communication: float
    overlap_efficiency: float

    def chunk(self, layers: int, message: float = 0.0) -> Times:
        """Durations of a chunk of `layers` layers: alone, communication is exposed; in a pair the longer one counts."""
        f, i = (layers * (part + self.communication) for part in (self.forward, self.input_part))
        w = layers * self.weight_part
        computing = layers * (self.forward + self.input_part + self.weight_part)
        moving = layers * 2 * self.communication / COMMUNICATING_SLOWDOWN
        pair = max(computing, moving) / self.overlap_efficiency
        return Times(F=f, B=i + w, W=w, FB=min(pair, f + i + w), message=message)


def trace_seconds() -> dict[str, float]:
    """Kernel group -> seconds of one V3 layer on one H800 for 4096 tokens, as traced."""
    return {group: TRACE_US[group] * 1e-6 for group in GROUPS}


def trace_overlap() -> float:
    """Computation of a traced pair / its duration: 0.916."""
    return 4 * sum(trace_seconds().values()) / (TRACE_PAIR_US * 1e-6)


def layer_times(c: Config, cluster: Cluster, copies: Copies, *, sequence: int = 4096, sequences: int = 1) -> LayerTimes:
    """Scale the traced kernels by FLOP and peak; dispatch (FP8) and combine (BF16) from the link model.

    For V3 on H800 with 4096 tokens the computation is the trace itself.
    """
    tokens = sequence * sequences
    flop, traced = group_flop(c, sequence), group_flop(DEEPSEEK_V3, TRAINING.sequence)
    speed = cluster.peak / (TRAINING.peak_tflops * 1e12)
    took = {
        group: seconds * flop[group] * tokens / (traced[group] * TRAINING.sequence) / speed
        for group, seconds in trace_seconds().items()
    }
    rows = fp8_row(c.hidden_size), bf16_row(c.hidden_size)
    return LayerTimes(
        forward=took["attention F"] + took["mlp F"],
        input_part=took["attention I"] + took["mlp I"],
        weight_part=took["attention W"] + took["mlp W"],
        communication=sum(normal_time(cluster, copies, tokens, row) for row in rows),
        overlap_efficiency=trace_overlap(),
    )


def split_layers(layers: int, stages: int) -> list[int]:
    """How many layers each stage has, as even as possible, the longer stages first (R does not say)."""
    require(1 <= stages <= layers, f"{stages} stages for {layers} layers")
    return [layers // stages + (s < layers % stages) for s in range(stages)]


@dataclass(frozen=True)
class Rate:
    """What follows from the time of a step. `step` seconds, `tokens` per step, `flop` per token (causal)."""

    step: float
    tokens: float
    gpus: int
    flop: float
    peak: float

    @property
    def tokens_per_day(self) -> float:
        """tokens * 86400 / step."""
        return self.tokens * DAY / self.step

    @property
    def gpu_hours_per_trillion(self) -> float:
        """10^12 / tokens * step * gpus / 3600."""
        return TRILLION / self.tokens * self.step * self.gpus / HOUR

    @property
    def tflops(self) -> float:
        """10^-12 * flop * tokens / (gpus * step), per GPU."""
        return self.flop * self.tokens / (self.gpus * self.step) / TRILLION

    @property
    def utilisation(self) -> float:
        """tflops / peak: the model FLOP utilisation."""
        return self.tflops * TRILLION / self.peak


def published_rate() -> Rate:
    """The published step with the published FLOP."""
    t = TRAINING
    tokens = t.sequences_per_step * t.sequence
    return Rate(t.step_s, tokens, t.gpus, t.flops_per_token, t.peak_tflops * 1e12)


def predicted_rate() -> tuple[Rate, Timeline]:
    """V3's training step as the model sees it: DualPipe on 16 stages, 120 micro-batches of one sequence, EP 64."""
    t = TRAINING
    cluster = Cluster(t.gpus)
    times = layer_times(DEEPSEEK_V3, cluster, uniform_copies(t.expert_parallel))
    micro_batches = t.sequences_per_step * t.pipeline // t.gpus
    layers = max(split_layers(DEEPSEEK_V3.num_hidden_layers, t.pipeline))
    timeline = simulate(build("dualpipe", t.pipeline, micro_batches), times.chunk(layers))
    step, flop = timeline.makespan + t.optimizer_s, training_flop(DEEPSEEK_V3, t.sequence)
    return replace(published_rate(), step=step, flop=flop), timeline


def total_hours() -> float:
    """Pre-training + context extension + post-training, in GPU-hours: 2.788 M."""
    return TRAINING.pretraining_hours + TRAINING.extension_hours + TRAINING.post_training_hours


def total_cost() -> float:
    """GPU-hours * $2: $5.576 M (R table 1)."""
    return total_hours() * TRAINING.dollars_per_hour
