"""Implementations that come with us, by a short name: `refimpl conform mlx`. Each with the file of what it is known to do otherwise."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """`impl` as `pkg.mod:attribute`, or a command that speaks the process protocol; its file of known failures, if it has any."""

    impl: str = ""
    command: str = ""
    known: Path | None = None


def _port(name: str, *, process: bool = False) -> Shipped:
    impl, known = f"{__package__}.ports.{name}:Impl", _HERE / "ports" / f"{name}.txt"
    return Shipped(command=f"{sys.executable} -m {__package__}.serve {impl}", known=known) if process else Shipped(impl, known=known)


SHIPPED = {
    "float32": Shipped("refimpl.model:Impl"),
    "bf16": Shipped(f"{__package__}.ours:bf16"),
    "fp8": Shipped(f"{__package__}.ours:fp8"),
    "ranks": Shipped(f"{__package__}.ranks:Impl"),
    "transformers": _port("transformers"),
    "mlx": _port("mlx"),
    "llama.cpp": _port("llama_cpp", process=True),
}
"""Ourselves; our twins; ourselves on ranks; and other people's."""
