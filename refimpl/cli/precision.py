"""`refimpl precision`: print a precision plan."""

from __future__ import annotations

import argparse

from .common import Commands


def add(commands: Commands) -> None:
    """Add `precision`."""
    precision = commands.add_parser(
        "precision", help="print a precision plan: what is rounded, and how, stage by stage"
    )
    precision.add_argument(
        "plan", nargs="?", default="fp8", help="float64, float32, bf16, fp8, fp8_hopper or fp8_ue8m0 (default: fp8)"
    )
    precision.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.layers.precision import describe, plan

    print("\n".join(describe(plan(args.plan))))
    return 0
