"""`refimpl diff`: judge another implementation's trace."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import require

from .common import Commands, deliver, progress
from .jobs import Files, pool
from .terminal import screen, show

if TYPE_CHECKING:
    from refimpl.diff import Case, Judgement, Trace

_TEXT = """Judge a recorded run of another implementation, stage by stage.

CASE is a folder with config.json, weights.safetensors and tokens.json; CANDIDATE is a trace: a safetensors file whose
tensors are named by tap (`refimpl record hf` writes one; so can any language), or a folder of the traces that the ranks of
a parallel engine wrote, which are put together (docs/taps.md). Each recorded stage is re-run on the candidate's own
recorded inputs, so a wrong stage shows up alone, wherever it is. With a second trace, the two are refereed.

  refimpl diff refimpl/cases/tiny refimpl/cases/tiny/hf-bug.safetensors --html report.html
  refimpl diff CASE ranks/          # ranks/rank0.safetensors, ranks/rank1.safetensors, ...

exit code: 0 conforms (also in another gauge, or in a contested dialect, which is named), 1 diverges, 2 inconclusive
(something needed was not recorded), 3 bad input"""


def add(commands: Commands) -> None:
    """Add `diff`."""
    raw = argparse.RawDescriptionHelpFormatter
    diff = commands.add_parser(
        "diff", help="judge another implementation's trace", description=_TEXT, formatter_class=raw
    )
    diff.add_argument("case", type=Path)
    diff.add_argument("candidate", type=Path, help="a trace, or a folder of the traces of all ranks")
    diff.add_argument("other", type=Path, nargs="?", help="a second trace: which of the two left the specification?")
    diff.add_argument("--all", action="store_true", help="list every tap in model order")
    diff.add_argument("--quiet", action="store_true", help="print the verdict only")
    diff.add_argument("--json", action="store_true", help="print JSON (schema refimpl-diff/1)")
    diff.add_argument(
        "--schema", action=_Schema, nargs=0, help="print the JSON Schema of --json instead; needs no other argument"
    )
    diff.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML, a test case a tap")
    diff.add_argument("--sarif", type=Path, metavar="FILE", help="also write SARIF 2.1.0, a result a blamed tap")
    diff.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page that needs nothing else: stages by layers, and where each is off",
    )
    diff.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="judge under these weights, which are reported apart (`refimpl weights`)",
    )
    diff.add_argument(
        "--jobs",
        default="1",
        metavar="N",
        help="judge spans of layers in N processes, with the same report; or mpi, in those of mpiexec (docs/diff.md)",
    )
    diff.add_argument("--explain-tolerance", metavar="TAP", help="say how far this tap may be off, and why, instead")
    diff.set_defaults(run=run)


class _Schema(argparse.Action):
    """Prints the schema and ends, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """The action."""
        print((resources.files("refimpl.diff") / "report.schema.json").read_text(encoding="utf-8"), end="")
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace, to_json
    from refimpl.diff.judge import explain, judge

    case, trace = Case.read(args.case), Trace.read(args.candidate)
    apart = []
    if args.weights:
        from refimpl.weights.under import under

        case, trace, gate = under(case, trace, args.weights)
        apart = [gate]
    if args.explain_tolerance:
        tap = _full(args.explain_tolerance, trace)
        show(screen(lambda _: "\n".join(explain(case, trace, tap)), 1))
        return 0
    if args.other:
        return _referee(case, trace, args)
    with pool(args.jobs, Files(args.case, args.candidate, args.weights)) as workers:
        judgement = judge(case, trace, track=progress("replaying"), pictures=bool(args.html), pool=workers)
    judgement.gates += apart
    for out, make in _files(args):
        deliver(make(judgement), out, quiet=True)
    if args.json:
        print(to_json(judgement))
    else:
        show(_text(judgement, args))
    return judgement.exit_code


def _full(tap: str, trace: Trace) -> str:
    """A tap whose name may leave out the phase, as `refimpl explain` takes it."""
    from refimpl.diff.training import PHASES
    from refimpl.model.phases import in_part, is_part

    begin = tap.partition("/")[0]
    if is_part(begin) or begin in PHASES:
        return tap
    held = [t for t in trace.taps if t.partition("/")[2] == tap]
    parts = [t for t in held if in_part(t)]
    require(len(parts) < 2, f"{tap!r} is in several parts of the run; say which: {', '.join(parts)}")
    return (parts or held or [f"fwd/{tap}"])[0]


def _files(args: argparse.Namespace) -> list[tuple[Path, Callable[[Judgement], str]]]:
    """What is written beside what is printed."""
    from refimpl.diff.html import to_html
    from refimpl.diff.junit import to_junit
    from refimpl.diff.sarif import to_sarif

    wanted = ((args.junit, to_junit), (args.sarif, partial(to_sarif, trace=args.candidate)), (args.html, to_html))
    return [(out, make) for out, make in wanted if out]


def _text(judgement: Judgement, args: argparse.Namespace) -> str:
    """For a person's screen as many stages as fit on it."""
    from refimpl.diff import render, summary
    from refimpl.diff.report import MOST

    if args.quiet:
        return summary(judgement)
    if args.all:
        return render(judgement, everything=True)
    return screen(lambda stages: render(judgement, stages=stages), MOST)


def _referee(case: Case, trace: Trace, args: argparse.Namespace) -> int:
    from refimpl.diff import Trace
    from refimpl.diff.referee import referee

    one_only = ("all", "quiet", "json", "junit", "sarif", "html")
    given = [f"--{name}" for name in one_only if getattr(args, name)] + ["--jobs"] * (args.jobs != "1")
    require(not given, f"{', '.join(given)} with two traces; it is for one")
    lines, code = referee(case, trace, Trace.read(args.other), (str(args.candidate), str(args.other)))
    show(screen(lambda _: "\n".join(lines), 1))
    return code
