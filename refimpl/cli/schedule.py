"""`refimpl schedule`: print a pipeline schedule, or check one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import SpecError, require

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.parallel_emulation.pipeline import Schedule, Times


_TEXT = """Print a pipeline schedule: gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev.

ops   one line a rank, e.g. F0.1|B1.0 I1.2 W1.2 (kind, direction, chunk; | executed together)
text  the same over time, lower case for direction 1; svg the figure; chrome a trace for Perfetto

--check FILE reads an order in the ops notation, says whether it can run and how it differs from ours.
exit code: 0; 1 if --check finds a fault or a difference; 3 bad input"""


def add(commands: Commands) -> None:
    """Add `schedule`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("schedule", help="print a pipeline schedule", description=_TEXT, formatter_class=raw)
    p.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev")
    p.add_argument("--pp", type=int, required=True, help="ranks of the pipeline")
    p.add_argument("--microbatches", type=int, required=True, help="of a step, both directions together")
    p.add_argument("--chunks", type=int, help="stages per rank of 'interleaved' (default 2)")
    p.add_argument("--format", choices=["ops", "text", "svg", "chrome"], default="text")
    p.add_argument("--times", default="", help="durations of a chunk, default F=1,B=2,W=1,FB=3,message=0 (FB: F + B)")
    p.add_argument("--check", type=Path, metavar="FILE", help="judge the order in FILE instead of printing ours")
    p.add_argument("-o", "--out", type=Path, help="write to a file instead of standard output")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command `schedule`; returns its exit code."""
    from refimpl.parallel_emulation.pipeline import build, draw, simulate

    schedule, times = build(args.name, args.pp, args.microbatches, args.chunks), _times(args.times)
    if args.check:
        return _check(schedule, args.check, times)
    forms: Mapping[str, Callable[[], str]] = {
        "ops": lambda: f"{schedule}",
        "text": lambda: draw.text(simulate(schedule, times)),
        "svg": lambda: draw.svg(simulate(schedule, times)),
        "chrome": lambda: simulate(schedule, times).chrome(),
    }
    deliver(forms[args.format](), args.out)
    return 0


def _times(text: str) -> Times:
    """`F=1,B=2` -> Times. Raises SpecError for anything else."""
    from refimpl.parallel_emulation.pipeline import Times

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
    from refimpl.parallel_emulation.pipeline import check, simulate
    from refimpl.parallel_emulation.pipeline.schedule import parse, step_text

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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
