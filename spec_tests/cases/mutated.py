"""A known bug at work in a run of the specification."""

from __future__ import annotations

from typing import Any

from refimpl.autograd.tensor import Array
from refimpl.diff.corpus import Mutant
from refimpl.layers.stage import tap_name


class Mutated:
    """An observer that runs a mutant in its stage's place, and hands it what it reads beside the stage's arguments."""

    def __init__(self, mutant: Mutant, weights: dict[str, Array]) -> None:
        self.mutant, self.weights, self.seen = mutant, weights, dict[str, Array]()

    def __call__(self, stage: Any, run: Any, /, *args: Any, **static: Any) -> Any:
        """As `Patch`, with `reads`."""
        tap, m = tap_name(stage), self.mutant
        if stage.name != m.stage:
            out = run(*args, **static)
        else:
            out = m.fn(*args, **static, **({"reads": self._read(tap)} if m.reads else {}))
        self.seen[tap] = out
        return out

    def _read(self, tap: str) -> tuple[Array, ...]:
        unit = tap.rpartition("/")[0]
        layer = f"model.layers.{unit.rpartition('/L')[2]}."
        return tuple(
            [self.weights[layer + n[2:]] if n.startswith("w:") else self.seen[f"{unit}/{n}"] for n in self.mutant.reads]
        )
