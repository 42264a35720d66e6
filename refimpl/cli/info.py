"""`refimpl info`: what a checkpoint or a preset is."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from refimpl.autograd.errors import where

from .common import Commands


def add(commands: Commands) -> None:
    """Add `info`."""
    info = commands.add_parser(
        "info", help="what a checkpoint holds, misses, has too much, or says wrongly in config.json (exit code 1 if so)"
    )
    info.add_argument(
        "checkpoint", help="a safetensors file, a folder, a bare config.json, or a preset such as deepseek-v3"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument("--scan", action="store_true", help="also read every tensor and report NaN and infinity")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import json_object
    from refimpl.checkpoint.info import count_parameters, describe, render, render_counts, to_json
    from refimpl.layers import PRESETS, Config

    path = Path(args.checkpoint)
    known = PRESETS.get(args.checkpoint) if not path.exists() else None
    if known is None and path.suffix == ".json" and path.is_file() and not path.name.endswith(".index.json"):
        with where(f"while reading {path}"):
            known = Config.described(json_object(path))
    if known is not None:
        counts = count_parameters(known)
        print(json.dumps(asdict(counts), indent=1) if args.json else "\n".join(render_counts(counts)))
        return 0
    info = describe(args.checkpoint, scan=args.scan, progress=_count_on_stderr if sys.stderr.isatty() else None)
    print(to_json(info) if args.json else render(info))
    return 0 if info.ok and not info.disagreements else 1


def _count_on_stderr(done: int, total: int, name: str) -> None:
    print(f"\r{done + 1} of {total} {name:<70.70}", end="" if done + 1 < total else "\n", file=sys.stderr, flush=True)
