"""`refimpl conform`: hold an implementation to the specification's claims."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

from .common import Commands

_TEXT = """Hold an implementation to what DeepSeek-V3 must do: every stage alone on exact inputs, whole runs tap by tap,
runs that must agree with each other (chunks, cached steps, batches, orders of experts and heads), losses and gradients,
weights that must be refused. Needs pytest and hypothesis (extra: test).

IMPL is pkg.mod:Class with any of load, forward, step, loss_and_grads, stage (docs/conformance.md); what it lacks is
skipped and counted; or one that comes with us: float32, bf16, fp8, ranks (ourselves), transformers, mlx, llama.cpp, each with the
list of what it is known to do otherwise. --cmd drives a process of any language by lines of JSON instead.

example: refimpl conform bf16
example: refimpl conform mlx --profile core,cache
example: refimpl conform --cmd './engine --spec' --profile core,yarn --certified --badge spec.svg
example: refimpl conform my.port:Impl --pytest '-k RN-002 -x'"""


def add(commands: Commands) -> None:
    """Add `conform`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "conform", help="hold an implementation to the specification", description=_TEXT, formatter_class=raw
    )
    p.add_argument("impl", nargs="?", default="", help="pkg.mod:Class, or a name of ours; ourselves by default")
    p.add_argument("--cmd", default="", help="a command that speaks the process protocol")
    p.add_argument(
        "--profile",
        default="",
        help="core, yarn, fp8, mtp, cache, train, parallel, with commas between; by default all, or those of which an "
        "implementation that comes with us has something",
    )
    p.add_argument("--certified", action="store_true", help="a skip within the profiles is a failure")
    p.add_argument("--quick", action="store_true", help="four regimes instead of all; a report says so")
    p.add_argument("--skips", type=Path, help="a file of claims not to be run: lines `ID  # reason`")
    p.add_argument("--xfails", type=Path, help="a file of claims known to fail")
    p.add_argument("--json", type=Path, help="write the report here (schema refimpl-conformance/1)")
    p.add_argument("--junit", type=Path, help="write JUnit XML here")
    p.add_argument("--badge", type=Path, help="write a badge here (SVG)")
    p.add_argument("--pytest", default="", metavar="ARGS", help="further arguments of pytest, in quotes")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code: 0 conforms, 1 does not, 3 for bad input."""
    from refimpl.conformance.shipped import profiles_of
    from refimpl.conformance.suite import command, environment

    options = {
        "--impl": args.impl,
        "--impl-cmd": args.cmd,
        "--profile": args.profile or ",".join(profiles_of(args.impl)),
        "--skips-file": args.skips,
        "--xfails-file": args.xfails,
        "--conformance-json": args.json,
        "--junitxml": args.junit,
        "--badge": args.badge,
    }
    more = [*(["--certified"] if args.certified else []), *shlex.split(args.pytest)]
    code = subprocess.run(command(options, slow=not args.quick, more=more), env=environment()).returncode
    return code if code in (0, 1) else 3
