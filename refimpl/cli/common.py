"""What several commands share: the model a command line names, progress for people who watch, results that are whole."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from refimpl.autograd.errors import require, where

if TYPE_CHECKING:
    from refimpl.layers import Config

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
"""What `add` of a command adds itself to."""


def add_model(parser: argparse.ArgumentParser, preset: str, help: str) -> None:
    """--preset and --config, of which only one can be given."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--preset", help=help)
    one.add_argument("--config", type=Path, help="a config.json instead of a preset")
    parser.set_defaults(default_preset=preset)


def model_config(args: argparse.Namespace) -> Config:
    """The model of --config, or of --preset; SpecError for what is neither."""
    from refimpl.checkpoint import json_object
    from refimpl.layers import PRESETS, Config

    if args.config:
        with where(f"while reading {args.config}"):
            return Config.described(json_object(args.config))
    preset = args.default_preset if args.preset is None else args.preset
    require(preset in PRESETS, f"preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]


def takes_index(parser: Any) -> None:
    """Lets `-1,-1,3` be an argument, so that it is said what is wrong with it: to argparse only `-1` is, and the rest an option."""
    parser._negative_number_matcher = re.compile(r"-\d+(,-?\d+)*$")


def gib(number: float) -> int:
    """GiB in bytes; SpecError for what is no amount."""
    require(0 <= number < 2**20, f"a cache of {number} GiB; expected 0 or more")
    return int(number * 2**30)


def progress(what: str) -> Callable[[list[Any]], Iterable[Any]]:
    """A progress bar on standard error if a person is watching, nothing otherwise."""
    if not sys.stderr.isatty():
        return iter

    def track(items: list[Any]) -> Iterable[Any]:
        from rich.console import Console
        from rich.progress import track

        return track(items, what, console=Console(stderr=True), transient=True)

    return track


def deliver(text: str, out: Path | None, *, quiet: bool = False) -> None:
    """To standard output, or whole to a file, whose name is then printed unless `quiet`."""
    from refimpl.checkpoint import Transaction

    if out is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    with Transaction() as files, files.new(out) as f:
        f.write(text.encode() if text.endswith("\n") else text.encode() + b"\n")
    if not quiet:
        print(out)
