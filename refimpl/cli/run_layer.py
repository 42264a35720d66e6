"""`refimpl run-layer`: one decoder layer of a checkpoint of any size, straight from the disk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where

from .common import Commands

if TYPE_CHECKING:
    from refimpl.infer.from_disk import LayerRun

EXAMPLES = """examples:
  refimpl run-layer DeepSeek-V3/ --layer 17 --tokens 3,1,4
  refimpl run-layer DeepSeek-V3/ --layer 17 --tokens 3,1,4 -o after17.safetensors
  refimpl run-layer DeepSeek-V3/ --layer 18 --tokens 3,1,4 --input after17.safetensors   (what came out goes in)

Only this layer is read, and of its experts those that its router chooses. Without --input the layer is given the tokens'
embeddings. A line a token goes to standard output, time and bytes to standard error."""


def add(commands: Commands) -> None:
    """Add `run-layer`."""
    p = commands.add_parser(
        "run-layer",
        help="run one layer of a checkpoint of any size from disk",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", type=Path, help="a folder with config.json and weights")
    p.add_argument("--layer", type=int, required=True, help="its number, from 0")
    p.add_argument("--tokens", required=True, metavar="IDS", help="the sequence as ids, e.g. 3,1,4")
    p.add_argument(
        "--input", type=Path, metavar="FILE", help="the residual stream before the layer: `hidden` of this file"
    )
    p.add_argument(
        "-o", "--out", type=Path, help="write hidden, and ids and weights of the router, to a safetensors file"
    )
    p.add_argument("--precision", default="float32", help="float64, float32 or bf16 (default: float32)")
    p.add_argument("--attend", default="auto", choices=["auto", "expanded", "absorbed"])
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import Checkpoint, open_file, write_file
    from refimpl.infer.from_disk import DiskWeights, run_layer
    from refimpl.layers import Config
    from refimpl.layers.precision import plan

    checkpoint = Checkpoint.open(args.checkpoint)
    require(checkpoint.config is not None, f"{args.checkpoint} has no config.json")
    with where(f"while reading {args.checkpoint}"):
        c = Config.from_dict(checkpoint.config or {})
    hidden = None
    if args.input:
        file = open_file(args.input)
        require("hidden" in file, f"{args.input} has no tensor `hidden`; it holds {', '.join(file) or 'none'}")
        hidden = file["hidden"]
    start = time.perf_counter()
    with DiskWeights(checkpoint, plan(args.precision)) as weights:
        found = run_layer(weights, c, args.layer, [_ids(args.tokens)], hidden, attend=args.attend)
    took = time.perf_counter() - start
    print("\n".join(_lines(_ids(args.tokens), found)))
    if args.out:
        write_file(args.out, _tensors(found))
    experts = "" if found.routing is None else f", {len(np.unique(found.routing.ids))} of {c.n_routed_experts} experts"
    print(f"layer {args.layer}: {took:.2f} s, {found.bytes_read:,} bytes read{experts}", file=sys.stderr)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(t) for t in text.replace(",", " ").split()]
    except ValueError:
        raise SpecError(f"--tokens {text!r}; expected ids such as 3,1,4") from None


def _lines(tokens: list[int], found: LayerRun) -> list[str]:
    """`token 3: |y| 1.02, largest 3.1 at 17; experts 5 (0.31), 9 (0.28)`: the root mean square, the experts by weight."""
    lines = []
    for s, token in enumerate(tokens):
        y = found.hidden[0, s]
        at = int(np.argmax(np.abs(y)))
        line = f"token {token}: rms {np.sqrt(np.mean(np.square(y))):.4g}, largest {y[at]:.4g} at {at}"
        if found.routing is not None:
            pairs = zip(found.routing.ids[0, s], found.routing.weights[0, s], strict=True)
            line += "; experts " + ", ".join(f"{e} ({w:.3f})" for e, w in pairs)
        lines.append(line)
    return lines


def _tensors(found: LayerRun) -> dict[str, Any]:
    routing = {} if found.routing is None else {"ids": found.routing.ids, "weights": found.routing.weights}
    return {"hidden": found.hidden, **routing}
