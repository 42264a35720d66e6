"""`refimpl recipe`: a whole training run as a table, a figure, a smaller run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, deliver

_TEXT = """Print a training run: every stretch of it with its tokens, steps, batch, learning rate and loss weights, and the totals.

  refimpl recipe                                    DeepSeek-V3's own: 14.8 T tokens, then the context extension
  refimpl recipe deepseek-v3 --plot recipe.svg      the same, drawn (extra: plot)
  refimpl recipe deepseek-v3 --tokens 20M --sequence 64 --batch 40 --lr 3e-3 --toml > mine.toml
                                                    a small run with the same curves, to edit and to train
  refimpl recipe mine.toml                          checked, with what is wrong in it

Recipes that come with the package: deepseek-v3; deepseek-v3-context (its two stages of context extension alone), deepseek-v3-sft
(fine-tuning, R 5.1); article-cosine, article-linear-scaling, article-fp16, article-stages (pre-training, longer context, several
tasks), described in articles, not in V3. Scaling keeps the share of every piece of a schedule in tokens and in steps, and the
ratios of values.

exit code: 0; 3 bad input"""


def add(commands: Commands) -> None:
    """Add `recipe`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "recipe", help="print a training run, or make it small", description=_TEXT, formatter_class=raw
    )
    p.add_argument("recipe", nargs="?", default="deepseek-v3", help="a recipe file or a name (default deepseek-v3)")
    p.add_argument("--tokens", metavar="N", help='scale to so many tokens in all, such as "20M"')
    p.add_argument(
        "--sequence", metavar="N", help="scale the first phase's sequences to this length, the others' with them"
    )
    p.add_argument("--batch", metavar="N", help="scale the first phase's largest batch to this, the others with it")
    p.add_argument(
        "--multiple", metavar="N", help="make every batch a multiple of N sequences, which N ranks can share"
    )
    p.add_argument("--lr", type=float, help="scale the first phase's largest learning rate to this, the others with it")
    p.add_argument("--step", type=int, metavar="K", help="print only what holds in step K, from 0")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--toml", action="store_true", help="print the recipe as a file")
    form.add_argument("--json", action="store_true", help="print JSON (schema refimpl-recipe/1)")
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw every schedule as SVG")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.autograd.errors import where
    from refimpl.checkpoint import Transaction
    from refimpl.train.recipe import load, read, render, scaled, to_json, to_toml

    sizes = {name: _whole(name, getattr(args, name)) for name in ("tokens", "sequence", "batch", "multiple")}
    document = scaled(load(args.recipe), **sizes, lr=args.lr)
    with where(f"in {args.recipe}, scaled"):
        found = read(document)
    if args.plot:
        from refimpl.train.recipe.plot import svg

        picture = svg(found)
        with Transaction() as files, files.new(args.plot) as f:
            f.write(picture)
    if args.step is not None:
        s = found.at(args.step)
        facts = {
            "step": s.step,
            "phase": s.phase.name,
            "tokens": s.tokens,
            "batch": s.batch,
            "sequence": s.sequence,
            **s.values,
        }
        deliver("\n".join(f"{name:<12}{value}" for name, value in facts.items()), None)
        return 0
    deliver(to_toml(document) if args.toml else to_json(found) if args.json else render(found), None)
    return 0


def _whole(name: str, text: str | None) -> int | None:
    from refimpl.autograd.errors import require
    from refimpl.train.recipe import amount

    if text is None:
        return None
    n = amount(text)
    require(n.denominator == 1 and n >= 1, f"--{name} {text}: expected a whole number of at least 1")
    return int(n)
