"""The engine that a command line describes; `batch` and `serve` share it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import require

if TYPE_CHECKING:
    from refimpl.checkpoint import Checkpoint
    from refimpl.infer.engine import Engine, Limits, Policy


def add_engine(p: argparse.ArgumentParser) -> None:
    """The options of `open_engine`."""
    p.add_argument("--blocks", type=int, default=256, help="blocks of the latent cache (default: 256)")
    p.add_argument("--block-size", type=int, default=16, help="tokens a block (default: 16)")
    p.add_argument("--rows", type=int, default=32, help="requests that run at once (default: 32)")
    p.add_argument("--step-tokens", type=int, default=256, help="tokens a step, prompts in pieces (default: 256)")
    p.add_argument("--invariant", action="store_true", help="the same bits for a request whatever else runs")
    p.add_argument("--precision", default="float32", help="float64, float32, bf16 or fp8 (default: float32)")
    p.add_argument("--kv-format", choices=["fp8", "int8"], help="keep the latent cache in bytes")


def open_checkpoint(path: Path) -> tuple[Checkpoint, Path]:
    """A checkpoint that says its config, and the folder it lies in."""
    from refimpl.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    require(checkpoint.config is not None, f"{path} has no config.json")
    return checkpoint, path if path.is_dir() else path.parent


def limits_of(args: argparse.Namespace) -> Limits:
    """Its limits; SpecError before anything is loaded."""
    from refimpl.infer.engine import Limits

    return Limits(rows=args.rows, tokens=args.step_tokens)


def open_engine(args: argparse.Namespace, checkpoint: Checkpoint, policy: Policy | None = None) -> Engine:
    """Load the model and make its cache."""
    from refimpl.infer.engine import Engine, Pages, Tiled
    from refimpl.model import Impl

    limits, config = limits_of(args), checkpoint.config or {}
    impl = Impl(precision=args.precision, kv_format=args.kv_format).load(config, checkpoint)
    pages = Pages(impl, blocks=args.blocks, size=args.block_size)
    return Engine(impl, pages, limits=limits, policy=policy, invariant=Tiled() if args.invariant else None)
