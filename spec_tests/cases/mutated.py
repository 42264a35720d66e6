"""A known bug at work in a run of the specification on a case."""

from __future__ import annotations

from typing import Any

from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.diff.corpus import Mutant
from refimpl.layers.stage import tap_name


class Mutated:
    """An observer, as `Patch`, that runs a mutant in its stage's place and hands it what it reads beside the arguments."""

    def __init__(self, mutant: Mutant, case: Case) -> None:
        self.mutant = mutant.under(case.config)
        self.weights, self.depth = case.weights(), case.config.num_hidden_layers
        self.seen: dict[str, Array] = {}

    def __call__(self, stage: Any, run: Any, /, *args: Any, **static: Any) -> Any:
        """The mutant where the stage is its own, the call as it is elsewhere."""
        tap, m = tap_name(stage), self.mutant
        if stage.name != m.stage:
            out = run(*args, **static)
        else:
            out = m.fn(*args, **static, **({"reads": self._reads(tap.rpartition("/")[0])} if m.reads else {}))
        self.seen[tap] = out
        return out

    def _reads(self, unit: str) -> tuple[Array, ...]:
        name = unit.rpartition("/")[2]
        layer = int(name[1:]) if name[0] == "L" else self.depth + int(name.removeprefix("mtp")) - 1
        return tuple(
            [
                self.weights[f"model.layers.{layer}.{n[2:]}"] if n[:2] == "w:" else self.seen[f"{unit}/{n}"]
                for n in self.mutant.reads
            ]
        )
