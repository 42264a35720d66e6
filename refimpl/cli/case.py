"""`refimpl case`: write a small case with random weights, plain or in a regime that shows what a plain one hides."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require

from .common import Commands, add_model, model_config

_TEXT = """Write a case: a folder with config.json, weights.safetensors and tokens.json that both sides run.

Weights are random, and large enough for mistakes to show. Tokens are drawn so that every routing decision is won clearly:
implementations that round differently make the same ones. Many real bugs show only in a regime: experts of dropped groups that
count as 0 instead of never are seen only where biased scores are negative. Another case that is there is kept, unless --force.

  refimpl case small                                                   preset tiny, every mechanism of V3
  refimpl case real --config config.json --shrink                      a real model, its sizes made small
  refimpl case hard --regime bias-negative,long-positions --seed 3     where two families of bugs show
  refimpl case --regimes                                               all regimes, what they do and what they show
  refimpl case served --servable                                       a folder that inference servers load (extra text)
  refimpl case both --servable --gguf --from refimpl/cases/tiny        an existing case; model.gguf for llama.cpp (extra gguf)"""

_FILES = ("config.json", "tokens.json", "weights.safetensors", "model.safetensors", "model.gguf")
"""What a case, or a folder for servers, consists of."""
_KEPT = "is there already; another folder, or --force to put a new case in its place"


class _Regimes(argparse.Action):
    """Print the regimes and leave, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        """The list, on standard output."""
        from refimpl.record.regimes import listing

        print("\n".join(listing()))
        parser.exit()


def add(commands: Commands) -> None:
    """Add `case`."""
    raw = argparse.RawDescriptionHelpFormatter
    case = commands.add_parser(
        "case",
        help="write a small case with random weights to run on both sides",
        description=_TEXT,
        formatter_class=raw,
    )
    case.add_argument("out", type=Path)
    case.add_argument("--force", action="store_true", help="in the place of the case or model that is there")
    add_model(case, "tiny", "tiny (default) or mini")
    case.add_argument(
        "--shrink", action="store_true", help="make a real model's config small, every mechanism kept: FP8 weights too"
    )
    case.add_argument("--mtp", action="store_true", help="with the MTP layers that the config has")
    case.add_argument("--seed", type=int, default=0, help="a natural number; the same seed writes the same files")
    case.add_argument("--regime", metavar="ID,...", help="regimes, commas between; --regimes lists them")
    case.add_argument("--regimes", action=_Regimes, nargs=0, help="list the regimes, what they do and show, and exit")
    case.add_argument(
        "--servable",
        nargs="?",
        const="float32",
        choices=("float32", "bfloat16"),
        help="write what inference servers load: weights in this dtype (float32), tokenizer, generation config",
    )
    case.add_argument("--gguf", action="store_true", help="with --servable: model.gguf too")
    case.add_argument("--from", dest="of", type=Path, metavar="CASE", help="with --servable: this case, not a new one")
    case.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import json_object
    from refimpl.record import new_case
    from refimpl.record.shrink import changes, quantised, shrink

    _check(args)
    if args.of:
        return _served(args, args.of)
    config = real = model_config(args)
    stored = quantised(json_object(args.config)) if args.config and not args.servable else None
    if args.shrink:
        config = shrink(real)
        kept = ["quantization_config as it is: weights are FP8 codes"] if stored else []
        print("\n".join(changes(real, config) + kept), file=sys.stderr)
    if config.hidden_size * config.n_routed_experts > 1 << 18:
        raise SpecError("this model is too large to draw at random; --shrink makes it small")
    if not args.servable:
        write = partial(
            new_case, config=config, seed=args.seed, mtp=args.mtp, regimes=args.regime or "", quantised=stored
        )
        _put(args.out, write, over=args.force)
        print(args.out)
        return 0
    from refimpl.record.servable import readable

    with tempfile.TemporaryDirectory() as folder:
        new_case(folder, config, seed=args.seed, regimes=args.regime or "", ids=readable(config.vocab_size))
        return _served(args, Path(folder))


def _check(args: argparse.Namespace) -> None:
    """SpecError for options that make no sense, a wrong name first, and for a folder that would be written over."""
    from refimpl.record.regimes import named

    require(args.regime is None or named(args.regime), f"--regime {args.regime!r} names none; --regimes lists them")
    require(args.servable or not (args.gguf or args.of), "--gguf and --from belong to --servable")
    drawn = [name for name in ("preset", "config", "shrink", "regime", "seed", "mtp") if getattr(args, name)]
    require(not (args.of and drawn), f"--{drawn[0] if drawn else ''} is for a new case; --from takes one as it is")
    require(args.seed >= 0, f"--seed is {args.seed}; it must not be negative")
    there = _there(args.out)
    require(not there or args.force or not args.servable, f"{there} {_KEPT}")


def _there(out: Path) -> Path | None:
    return next((out / name for name in _FILES if (out / name).exists()), None)


def _put(out: Path, write: Callable[[Path], object], *, over: bool) -> None:
    """A case in a folder; SpecError if another one is there, which the same command has not written."""
    if over or not (there := _there(out)):
        write(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        names = [path.name for path in Path(folder).iterdir()]
        same, _, _ = filecmp.cmpfiles(folder, out, names, shallow=False)
    require(len(same) == len(names), f"{there} {_KEPT}")


def _served(args: argparse.Namespace, case: Path) -> int:
    from refimpl.diff import Case
    from refimpl.record.servable import servable

    print(servable(Case.read(case), args.out, dtype=args.servable, gguf=args.gguf))
    return 0
