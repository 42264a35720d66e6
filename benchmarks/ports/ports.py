"""The implementations that are judged, and how each is recorded."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from refimpl.record.regimes import REGIMES

PLAIN = "plain"
CASES = (PLAIN, *REGIMES)
"""Preset tiny without a regime, and in each."""


@dataclass(frozen=True)
class Port:
    """name; `words`, those of `refimpl record` before the case; the extra that brings it; distributions whose versions count."""

    name: str
    words: str
    extra: str
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """Distribution -> the version that is installed. PackageNotFoundError if one is not."""
        return {p: importlib.metadata.version(p) for p in self.packages}

    def commands(self, case: str) -> tuple[str, str, str]:
        """What makes the case, records it and judges it; in the current folder."""
        folder = f"tiny-{case}"
        regime = "" if case == PLAIN else f" --regime {case}"
        return f"case {folder}{regime}", f"record {self.words} {folder} -o trace", f"diff {folder} trace"


PORTS = {
    p.name: p
    for p in (
        Port("transformers, float32", "hf", "interop", ("transformers", "torch")),
        Port("transformers, bfloat16", "hf --dtype bfloat16", "interop", ("transformers", "torch")),
        Port("llama.cpp", "llamacpp", "llamacpp", ("llama-cpp-python", "gguf")),
        Port("mlx-lm", "mlx", "mlx", ("mlx-lm", "mlx")),
        Port("torchtitan", "torch --map torchtitan", "torchtitan", ("torchtitan", "torch")),
        Port("Megatron-core", "torch --map megatron", "megatron", ("megatron-core", "torch")),
    )
}
"""name -> port, in the page's order."""
