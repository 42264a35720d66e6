"""`refimpl weights`: a converted file against a case, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.autograd.errors import SpecError

from .common import Commands, progress

_TEXT = """Hold converted weights against a case's, tensor by tensor, whatever the container: safetensors, DeepSeek's converted
files, GGUF (extra `gguf`), mlx-lm's folders, torchtitan's or Megatron's names in safetensors.

Each tensor is equal, rounded (to which format), or wrong, and then how: permuted (RoPE halves, transposed, keys and values,
experts), scaled, missing, extra, a copy of another layer's. CASE is a case, or any checkpoint with its config.json.

example: refimpl weights CASE model-Q8_0.gguf --impact

exit code: 0 equal or rounded, 1 not the case's weights, 3 bad input"""


def add(commands: Commands) -> None:
    """Add `weights`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "weights", help="hold a converted file against a case, tensor by tensor", description=_TEXT, formatter_class=raw
    )
    p.add_argument("case", type=Path)
    p.add_argument("candidate", type=Path, help="a file, or a folder of safetensors")
    p.add_argument(
        "--impact", action="store_true", help="also say how far each moves the logits of our float64 run of the case"
    )
    p.add_argument("--all", action="store_true", help="list everything, also what is equal or rounded")
    p.add_argument("--json", action="store_true", help="print JSON (schema refimpl-weights/1)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import Checkpoint
    from refimpl.diff import Case
    from refimpl.layers import Config
    from refimpl.weights import held_against, open_weights
    from refimpl.weights.moving import weighed
    from refimpl.weights.report import Report, render, to_json
    from refimpl.weights.summary import experts_told

    checkpoint = Checkpoint.open(args.case)
    if checkpoint.config is None:
        raise SpecError(f"{args.case} has no config.json beside its weights; it says which model they are of")
    config = Config.from_dict(checkpoint.config)
    case = Case.read(args.case) if args.impact else None
    held = open_weights(args.candidate, config)
    findings = experts_told(list(held_against(checkpoint, config, held, track=progress("comparing"))), config)
    moves = weighed(case, held, findings, track=progress("running")) if case else None
    report = Report(held.container, held.path, findings, moves)
    print(to_json(report) if args.json else render(report, everything=args.all))
    return 0 if report.ok else 1
