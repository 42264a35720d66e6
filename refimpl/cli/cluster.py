"""`refimpl cluster`: plan a training job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require

from .common import Commands, add_model, deliver, model_config

_TEXT = """Plan a training job: bytes per link class, memory per rank, bubble, step time. Defaults: V3's own run.

exit code: 0; 1 if the job does not fit the GPUs' memory; 3 bad input"""


def add(commands: Commands) -> None:
    """Add `cluster`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("cluster", help="plan a training job", description=_TEXT, formatter_class=raw)
    add_model(p, "deepseek-v3", "model (default deepseek-v3)")
    whole: Mapping[str, tuple[int | None, str]] = {
        "gpus": (2048, "GPUs in all"),
        "gpus-per-node": (8, "GPUs of a node"),
        "pp": (16, "pipeline ranks"),
        "ep": (64, "expert-parallel ranks"),
        "dp": (None, "copies of each expert group; checked against gpus / (pp * ep)"),
        "microbatches": (120, "micro-batches of a step per GPU of a stage"),
        "sequences": (1, "sequences of a micro-batch"),
        "sequence": (4096, "tokens of a sequence"),
    }
    for name, (value, text) in whole.items():
        p.add_argument(
            f"--{name}", type=int, default=value, help=text if value is None else f"{text} (default {value})"
        )
    p.add_argument("--schedule", default="dualpipe", help="see `refimpl schedule --help` (default dualpipe)")
    p.add_argument("--chunks", type=int, help="stages per rank of 'interleaved'")
    real = {
        "nvlink": (153.0, "effective GB/s of NVLink per GPU"),
        "ib": (44.0, "effective GB/s of the network per GPU"),
        "nvlink-latency": (3.33, "microseconds"),
        "ib-latency": (3.7, "microseconds"),
        "peak": (989.0, "dense BF16 TFLOP/s of a GPU"),
        "memory": (80.0, "GB of a GPU"),
        "memory-bandwidth": (3350.0, "GB/s of a GPU's memory"),
        "dollars": (2.0, "per GPU-hour"),
    }
    for name, (number, text) in real.items():
        p.add_argument(f"--{name}", type=float, default=number, help=f"{text} (default {number:g})")
    p.add_argument("--published", action="store_true", help="print the model beside DeepSeek's published numbers")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write the step's timeline as a Chrome trace")
    p.add_argument("--json", action="store_true", help="print JSON (schema refimpl-plan/1)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command `cluster`; returns its exit code."""
    from refimpl.parallel_emulation.cost import Cluster, Job, Link, Plan, plan_text

    if args.published:
        print(plan_text.against_published())
        return 0
    cluster = Cluster(
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        nvlink=Link(args.nvlink_latency * 1e-6, args.nvlink * 1e9),
        ib=Link(args.ib_latency * 1e-6, args.ib * 1e9),
        peak=args.peak * 1e12,
        memory=args.memory * 1e9,
        memory_bandwidth=args.memory_bandwidth * 1e9,
    )
    sizes: dict[str, Any] = {name: getattr(args, name) for name in ("pp", "ep", "chunks", "sequence", "sequences")}
    job = Job(model_config(args), cluster, micro_batches=args.microbatches, schedule=args.schedule, **sizes)
    require(args.dp in (None, job.dp), f"--dp {args.dp}; {args.gpus} GPUs / (pp * ep) is {job.dp}")
    plan = Plan(job)
    if args.trace:
        deliver(plan.timeline.chrome(unit_us=1e6), args.trace)
    print(plan_text.to_json(plan) if args.json else plan_text.render(plan, args.dollars))
    return 0 if plan.fits else 1
