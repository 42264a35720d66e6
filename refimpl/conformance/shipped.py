"""Implementations that come with us, by a short name (`refimpl conform mlx`), each with what it is known to do otherwise."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


PROFILES = ("core", "yarn", "fp8", "mtp", "cache", "train", "parallel")
"""What claims are grouped by."""


@dataclass(frozen=True)
class Shipped:
    """`impl` as `pkg.mod:attribute`, or a command that speaks the process protocol; its file of known failures, if it has any; the
    profiles of which it has something.
    """

    impl: str = ""
    command: str = ""
    known: Path | None = None
    profiles: tuple[str, ...] = PROFILES


def _port(name: str, *profiles: str, process: bool = False) -> Shipped:
    impl, known = f"{__package__}.ports.{name}:Impl", _HERE / "ports" / f"{name}.txt"
    command = f"{sys.executable} -m {__package__}.serve {impl}" if process else ""
    return Shipped("" if process else impl, command, known, profiles)


SHIPPED = {
    "float32": Shipped("refimpl.model:Impl"),
    "bf16": Shipped(f"{__package__}.ours:bf16"),
    "fp8": Shipped(f"{__package__}.ours:fp8"),
    "ranks": Shipped(f"{__package__}.ranks:Impl"),
    "transformers": _port("transformers", "core", "yarn", "cache", "train", "parallel"),
    "mlx": _port("mlx", "core", "yarn", "cache", "parallel"),
    "llama.cpp": _port("llama_cpp", "core", "yarn", "cache", "parallel", process=True),
}
"""Ourselves; our twins; ourselves on ranks; and other people's."""


def profiles_of(name: str) -> tuple[str, ...]:
    """The profiles that are asked of an implementation unless others are chosen."""
    return SHIPPED[name].profiles if name in SHIPPED else PROFILES
