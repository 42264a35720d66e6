"""`refimpl trace`: record the specification's own run of a case."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from refimpl.autograd.errors import SpecError, require

from .common import Commands


def add(commands: Commands) -> None:
    """Add `trace`."""
    trace = commands.add_parser("trace", help="record the specification's own run of a case")
    trace.add_argument("case", type=Path)
    trace.add_argument("-o", "--out", type=Path, required=True)
    trace.add_argument("--precision", default="float32", help="float64, float32, bf16 or fp8 (default: float32)")
    trace.add_argument("--attend", default="expanded", choices=["expanded", "absorbed", "auto"])
    trace.add_argument("--taps", default="*", help="patterns, comma-separated (default: all), e.g. 'fwd/L*/router.*'")
    trace.add_argument(
        "--phases",
        default="fwd",
        help="how the run is cut, by how many tokens the cache holds: fwd,dec8,dec16 is a prefill in three chunks, "
        "fwd,dec20,dec21 a prefill of 20 tokens and then one at a time (default: fwd, all at once)",
    )
    trace.add_argument(
        "--training",
        metavar="KEY=NUMBER,...",
        help="record a training step: losses, gradients and the bias update, with mtp_weight (lambda), aux_weight (alpha) and "
        "gamma as given, e.g. mtp_weight=0.3,aux_weight=1e-4,gamma=0.001; '' for all of them 0",
    )
    trace.add_argument(
        "--optimizer",
        metavar="KEY=VALUE,...",
        help="with --training: record AdamW's step too, e.g. lr=2.2e-4,moments=bfloat16,max_norm=1 (docs/taps.md)",
    )
    trace.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case
    from refimpl.record import trace_case

    options = {"precision": args.precision, "attend": args.attend, "taps": args.taps.split(",")}
    options["phases"] = args.phases.split(",")
    if args.training is not None:
        options["training"] = dict(map(_setting, filter(None, args.training.split(","))))
    if args.optimizer is not None:
        require(args.training is not None, "--optimizer needs --training, '' if all of its numbers are 0")
        options["training"]["optimizer"] = dict(map(_value, args.optimizer.split(",")))
    trace = trace_case(Case.read(args.case), **options)
    trace.write(args.out)
    print(f"{args.out}: {len(trace.taps)} taps")
    return 0


def _value(text: str) -> tuple[str, object]:
    """KEY=VALUE as the header has it: numbers, null and words."""
    key, equals, value = text.partition("=")
    require(equals, f"--optimizer {text!r}: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _setting(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key, float(value)
    except ValueError:
        raise SpecError(f"--training {text!r}: expected {key or 'KEY'}=NUMBER") from None
