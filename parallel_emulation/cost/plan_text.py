"""A plan as text and as JSON, and the models beside the published numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .cluster import Cluster
from .plan import Plan
from .published import LOW_LATENCY_US, NORMAL_GBS, TRAINING
from .scale import predicted_rate, published_rate, total_cost, total_hours
from .traffic import (
    LOW_LATENCY_COMBINE,
    LOW_LATENCY_DISPATCH,
    bf16_row,
    fp8_row,
    low_latency_row,
    low_latency_time,
    normal_bandwidth,
    uniform_copies,
)

GB, HIDDEN = 1e9, 7168


def render(plan: Plan, dollars: float = 2.0) -> str:
    """The plan as lines of text; `dollars` per GPU-hour."""
    return "\n".join([*_head(plan), *_time(plan, dollars), *_bytes(plan), *_memory(plan)])


def _head(plan: Plan) -> Iterator[str]:
    job = plan.job
    yield f"{job.cluster.gpus} GPUs = pp {job.pp} x dp {job.dp} x ep {job.ep}, {job.schedule}"
    yield f"{job.micro_batches} micro-batches of {job.sequences} x {job.sequence} tokens; {job.step_tokens:,} a step"
    yield f"{job.config.num_hidden_layers} layers on {len(plan.layers)} stages: {' '.join(map(str, plan.layers))}"


def _time(plan: Plan, dollars: float) -> Iterator[str]:
    times, rate = plan.timeline, plan.rate
    idle = [times.bubble(rank) for rank in range(plan.job.pp)]
    chunk = plan.layer_times.chunk(max(plan.layers))
    values = (x * 1e3 for x in (chunk.F, chunk.B, chunk.W, chunk.overlapped))
    yield "chunk         F {:.1f} ms, B {:.1f} ms, W {:.1f} ms, F&B {:.1f} ms".format(*values)
    yield f"step          {rate.step:.2f} s = pipeline {times.makespan:.2f} + optimizer {plan.optimizer_time:.2f}"
    yield f"bubble        {min(idle):.2f} to {max(idle):.2f} s, {max(idle) / rate.step:.1%} of the step at most"
    yield f"throughput    {rate.tokens_per_day / 1e9:.2f} B tokens a day"
    yield f"compute       {rate.tflops:.0f} TFLOP/s a GPU, {rate.utilisation:.1%} of peak (causal, nothing recomputed)"
    hours = rate.gpu_hours_per_trillion
    yield f"per 10^12     {hours / 1e3:.1f} K GPU-hours, ${hours * dollars / 1e3:,.0f} K"


def _bytes(plan: Plan) -> Iterator[str]:
    yield "GB a GPU sends in a step   NVLink mean       max   network mean       max"
    for axis, (nvlink, ib) in plan.traffic().items():
        row = (x / GB for x in (nvlink.mean(), nvlink.max(), ib.mean(), ib.max()))
        yield "  {:<22}{:>14.2f}{:>10.2f}{:>15.2f}{:>10.2f}".format(axis, *row)


def _memory(plan: Plan) -> Iterator[str]:
    yield "GB on a GPU of rank     weights gradients optimizer activations     total"
    for rank in range(plan.job.pp):
        m = plan.memory(rank)
        row = (x / GB for x in (m.weights, m.gradients, m.optimizer, m.activations, m.total))
        yield "  {:<20}{:>9.1f}{:>10.1f}{:>10.1f}{:>12.1f}{:>10.1f}".format(rank, *row)
    if not plan.fits:
        yield f"does not fit: {plan.job.cluster.memory / GB:g} GB a GPU"


def to_json(plan: Plan) -> str:
    """Schema refimpl-plan/1: seconds and bytes."""
    job, rate = plan.job, plan.rate
    return json.dumps(
        {
            "schema": "refimpl-plan/1",
            "gpus": job.cluster.gpus,
            "pp": job.pp,
            "dp": job.dp,
            "ep": job.ep,
            "schedule": job.schedule,
            "layers_per_stage": plan.layers,
            "tokens_per_step": job.step_tokens,
            "step_s": rate.step,
            "optimizer_s": plan.optimizer_time,
            "bubble_s": [plan.timeline.bubble(rank) for rank in range(job.pp)],
            "tokens_per_day": rate.tokens_per_day,
            "gpu_hours_per_trillion": rate.gpu_hours_per_trillion,
            "utilisation": rate.utilisation,
            "sent_bytes": {
                axis: {"nvlink_mean": nv.mean(), "nvlink_max": nv.max(), "ib_mean": ib.mean(), "ib_max": ib.max()}
                for axis, (nv, ib) in plan.traffic().items()
            },
            "memory_bytes": [vars(plan.memory(rank)) | {"total": plan.memory(rank).total} for rank in range(job.pp)],
            "fits": plan.fits,
        },
        indent=2,
    )


def against_published() -> str:
    """Model, publication and error, line by line."""
    lines = [f"{'':<44}{'model':>10}{'published':>11}{'error':>8}"]
    for what, model, published in comparisons():
        lines.append(f"{what:<44}{model:>10.1f}{published:>11.1f}{model / published - 1:>+8.1%}")
    return "\n".join(lines)


def comparisons() -> Iterator[tuple[str, float, float]]:
    """(quantity, model, published)."""
    cluster = Cluster()
    for ep, (dispatch, combine) in NORMAL_GBS.items():
        copies = uniform_copies(ep)
        for name, row, value in (("dispatch", fp8_row(HIDDEN), dispatch), ("combine", bf16_row(HIDDEN), combine)):
            yield f"normal {name}, EP {ep}, GB/s", normal_bandwidth(cluster, copies, 4096, row) / GB, value
    for ep, (dispatch, combine) in ((ep, pair) for ep, pair in LOW_LATENCY_US.items() if ep > cluster.gpus_per_node):
        sides = (
            ("dispatch", LOW_LATENCY_DISPATCH, low_latency_row(HIDDEN), dispatch),
            ("combine", LOW_LATENCY_COMBINE, bf16_row(HIDDEN), combine),
        )
        for name, link, row, value in sides:
            yield f"low-latency {name}, EP {ep}, us", low_latency_time(link, ep, 128, 8, row) * 1e6, value
    (rate, _), known = predicted_rate(), published_rate()
    yield "step, s", rate.step, TRAINING.step_s
    yield "K GPU-hours per 10^12 tokens", rate.gpu_hours_per_trillion / 1e3, TRAINING.gpu_hours_per_trillion / 1e3
    yield "B tokens a day, from the published step", known.tokens_per_day / 1e9, TRAINING.tokens_per_day / 1e9
    yield "TFLOP/s a GPU, from the published step", known.tflops, TRAINING.causal_tflops
    yield "K GPU-hours in all", total_hours() / 1e3, 2788.0
    yield "K dollars in all", total_cost() / 1e3, 5576.0
