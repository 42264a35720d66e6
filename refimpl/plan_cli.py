"""The commands `schedule` and `cluster`: pipeline schedules, and the plan of a training job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import SpecError, require, where

if TYPE_CHECKING:
    from refimpl.layers import Config
    from refimpl.parallel_emulation.schedule import Schedule
    from refimpl.parallel_emulation.timeline import Times

_SCHEDULE = """Print a pipeline schedule: gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev.

ops   one line a rank, e.g. F0.1|B1.0 I1.2 W1.2 (kind, direction, chunk; | executed together)
text  the same over time, lower case for direction 1; svg the figure; chrome a trace for Perfetto

--check FILE reads an order in the ops notation, says whether it can run and how it differs from ours.
exit code: 0; 1 if --check finds a fault or a difference; 3 bad input"""

_CLUSTER = """Plan a training job: bytes per link class, memory per rank, bubble, step time. Defaults: V3's own run.

exit code: 0; 1 if the job does not fit the GPUs' memory; 3 bad input"""


def add_parsers(commands: argparse._SubParsersAction[Any]) -> None:
    """Add both commands to `refimpl`'s."""
    _add_schedule(commands)
    _add_cluster(commands)


def _add_schedule(commands: argparse._SubParsersAction[Any]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("schedule", help="print a pipeline schedule", description=_SCHEDULE, formatter_class=raw)
    p.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev")
    p.add_argument("--pp", type=int, required=True, help="ranks of the pipeline")
    p.add_argument("--microbatches", type=int, required=True, help="of a step, both directions together")
    p.add_argument("--chunks", type=int, help="stages per rank of 'interleaved' (default 2)")
    p.add_argument("--format", choices=["ops", "text", "svg", "chrome"], default="text")
    p.add_argument("--times", default="", help="durations of a chunk, default F=1,B=2,W=1,FB=3,message=0 (FB: F + B)")
    p.add_argument("--check", type=Path, metavar="FILE", help="judge the order in FILE instead of printing ours")
    p.add_argument("-o", "--out", type=Path, help="write to a file instead of standard output")
    p.set_defaults(run=run_schedule)


def _add_cluster(commands: argparse._SubParsersAction[Any]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("cluster", help="plan a training job", description=_CLUSTER, formatter_class=raw)
    p.add_argument("--preset", default="deepseek-v3", help="model (default deepseek-v3)")
    p.add_argument("--config", type=Path, help="a config.json instead of a preset")
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
    p.set_defaults(run=run_cluster)


def run_schedule(args: argparse.Namespace) -> int:
    """The command `schedule`; returns its exit code."""
    from refimpl.parallel_emulation import draw
    from refimpl.parallel_emulation.schedules import build
    from refimpl.parallel_emulation.timeline import simulate

    schedule, times = build(args.name, args.pp, args.microbatches, args.chunks), _times(args.times)
    if args.check:
        return _check(schedule, args.check, times)
    forms: Mapping[str, Callable[[], str]] = {
        "ops": lambda: f"{schedule}",
        "text": lambda: draw.text(simulate(schedule, times)),
        "svg": lambda: draw.svg(simulate(schedule, times)),
        "chrome": lambda: simulate(schedule, times).chrome(),
    }
    _deliver(forms[args.format](), args.out)
    return 0


def _times(text: str) -> Times:
    """`F=1,B=2` -> Times. Raises SpecError for anything else."""
    from refimpl.parallel_emulation.timeline import Times

    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        require(name.strip() in Times.__annotations__, f"--times: {part!r}; expected F, B, W, FB or message = a number")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise SpecError(f"--times: {part!r}; expected a number after =") from None
    return Times(**given)


def _check(ours: Schedule, path: Path, times: Times) -> int:
    """Whether the order in `path` runs, and where it first differs from ours."""
    from refimpl.parallel_emulation.schedule import parse, step_text
    from refimpl.parallel_emulation.schedule_check import check
    from refimpl.parallel_emulation.timeline import simulate

    theirs = parse(_read(path), ours.layout, path.name)
    try:
        facts = check(theirs, rendezvous=False)
    except SpecError as error:
        print(f"{path}: {error}")
        return 1
    idle = [f"{simulate(s, times).bubble(0):g}" for s in (theirs, ours)]
    print(f"{path}: it can run; peak live chunks {max(facts.peak_live)}, idle on rank 0 {idle[0]}, ours {idle[1]}")
    for rank, (a, b) in enumerate(zip(theirs.ranks, ours.ranks, strict=True)):
        if a != b:
            i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            x, y = (step_text(row[i]) if i < len(row) else "nothing" for row in (a, b))
            print(f"rank {rank}, step {i}: {x}; in {ours.name} it is {y}")
            return 1
    print(f"the order is that of {ours.name}")
    return 0


def run_cluster(args: argparse.Namespace) -> int:
    """The command `cluster`; returns its exit code."""
    from refimpl.parallel_emulation import plan_text
    from refimpl.parallel_emulation.cluster import Cluster, Link
    from refimpl.parallel_emulation.plan import Job, Plan

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
    job = Job(_config(args), cluster, micro_batches=args.microbatches, schedule=args.schedule, **sizes)
    require(args.dp in (None, job.dp), f"--dp {args.dp}; {args.gpus} GPUs / (pp * ep) is {job.dp}")
    plan = Plan(job)
    if args.trace:
        _deliver(plan.timeline.chrome(unit_us=1e6), args.trace)
    print(plan_text.to_json(plan) if args.json else plan_text.render(plan, args.dollars))
    return 0 if plan.fits else 1


def _config(args: argparse.Namespace) -> Config:
    from refimpl.layers import PRESETS, Config
    from refimpl.shards import json_object

    if args.config:
        with where(f"while reading {args.config}"):
            return Config.from_dict(json_object(args.config))
    require(args.preset in PRESETS, f"preset {args.preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[args.preset]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error


def _deliver(text: str, out: Path | None) -> None:
    """To standard output, or whole to a file."""
    from refimpl.atomic import Transaction

    if out is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    with Transaction() as files, files.new(out) as f:
        f.write(text.encode() if text.endswith("\n") else text.encode() + b"\n")
    print(out)
