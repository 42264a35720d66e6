"""`refimpl train`: a training run from a recipe file."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Commands

if TYPE_CHECKING:
    from refimpl.train.run.journal import Record

_TEXT = """Train a model by a recipe file, on token shards.

  refimpl data build books/*.txt -o shards --length 64
  refimpl recipe --tokens 2M --sequence 64 --batch 40 --lr 3e-3 --toml > mine.toml
  printf '[model]\\npreset = "tiny"\\nvocab_size = 262\\n[data]\\nshards = "shards"\\n' >> mine.toml
  refimpl train mine.toml -o run
  refimpl train mine.toml -o run --resume      after Ctrl-C, a crash, a full disk: the same bits as without
  refimpl plot run -o run.svg

A recipe file is what `refimpl recipe` prints, and tables beside it: [model], [data], [train], [checkpoints], [evaluation],
[samples], [log] (docs/training.md). A step is one line on standard output, a table where a person watches; everything about it
is in RUN/metrics.jsonl. Ctrl-C ends after the step that is being taken, saves, and says how to resume.

exit code: 0; 3 bad input, a loss that is no number, a full disk; 130 interrupted"""


def add(commands: Commands) -> None:
    """Add `train`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("train", help="train a model by a recipe file", description=_TEXT, formatter_class=raw)
    p.add_argument("recipe", type=Path, help="a recipe file with [model] and [data]")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="RUN", help="the folder of the run")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of RUN")
    p.add_argument("--steps", type=int, metavar="N", help="end after step N (the recipe's own schedules stay)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from dataclasses import replace

    from refimpl.train.run import load_job, train

    job = load_job(args.recipe)
    job = job if args.steps is None else replace(job, steps=args.steps)
    with _asked() as asked:
        end = train(job, args.out, resume=args.resume, stop=asked, tell=_lines(job.log.every, len(job)))
    if end.complete:
        return 0
    print(f"refimpl: stopped after step {end.step}, saved; go on with: {resume_command(args)}", file=sys.stderr)
    return 130


def resume_command(args: argparse.Namespace) -> str:
    """What goes on with this run."""
    steps = "" if args.steps is None else f" --steps {args.steps}"
    return f"refimpl train {args.recipe} -o {args.out}{steps} --resume"


@contextmanager
def _asked() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; the second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        print("refimpl: ending after this step; Ctrl-C again ends at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(every: int, steps: int) -> Callable[[Record], None]:
    """A line for every so many steps, and for the last."""

    def tell(r: Record) -> None:
        if r["step"] % every == 0 or r["step"] == steps:
            print(line(r, steps), flush=True)

    return tell


def line(r: Record, steps: int) -> str:
    """A step in words."""
    parts = "  ".join(f"{name} {r[name]:.4g}" for name in ("norm", "lr") if name in r)
    return f"step {r['step']}/{steps}  loss {r['loss']:.4f}  {parts}  {r['tokens/s']:,.0f} tokens/s  mfu {r['mfu']:.1%}"
