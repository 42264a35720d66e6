"""Known bugs and innocent rewrites as implementations: the specification with one stage replaced, wherever it is called.

`Mutated("A12-q_a_norm-1e-05")` answers as a port with that bug would, in the five methods of the protocol. Used to measure the
suite: which claims kill which bug, and whether at the right stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from refimpl.autograd.errors import require
from refimpl.diff.corpus import MUTANTS, Mutant
from refimpl.layers.stage import STAGES, Patch, observing
from refimpl.model import Impl

from .innocent import INNOCENTS, Innocent, without_tape

ABSORBED = ("mla.q_absorbed", "mla.scores_absorbed", "mla.ctx_latent", "mla.ctx_absorbed")
"""Stages that attention in its absorbed form alone has."""


def usable(mutant: Mutant) -> bool:
    """Whether a mutant is a stage of the forward pass that needs nothing but its own arguments."""
    return mutant.stage in STAGES and not mutant.reads and not mutant.made and not mutant.stage.startswith("optim.")


class Mutated:
    """The specification with a known bug."""

    def __init__(self, id: str) -> None:
        """SpecError for an id that the corpus lacks, or whose bug is not in one stage's arguments alone."""
        require(id in (*MUTANTS, *INNOCENTS), f"no known bug or rewrite {id!r}; `refimpl mutants --list` lists them")
        changed = MUTANTS[id] if id in MUTANTS else INNOCENTS[id]
        usable_ = isinstance(changed, Innocent) or usable(changed)
        require(usable_, f"{id} changes {changed.stage}, which is not a stage by itself")
        fn = without_tape(changed.stage, changed.fn) if isinstance(changed, Innocent) else changed.fn
        self.id, self.patch = id, Patch(changed.stage, fn)
        self.impl = Impl(attend="absorbed" if changed.stage in ABSORBED else "expanded")

    def info(self) -> dict[str, Any]:
        """Ours, under the bug's name."""
        return self.impl.info() | {"name": f"refimpl with {self.id}"}

    def load(self, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Self:
        """As the specification."""
        self.impl.load(config, weights)
        return self

    def forward(self, *args: Any, **given: Any) -> Any:
        """With the bug in it."""
        with observing(self.patch):
            return self.impl.forward(*args, **given)

    def step(self, *args: Any, **given: Any) -> Any:
        """With the bug in it."""
        with observing(self.patch):
            return self.impl.step(*args, **given)

    def loss_and_grads(self, *args: Any, **given: Any) -> Any:
        """With the bug in it."""
        with observing(self.patch):
            return self.impl.loss_and_grads(*args, **given)

    def stage(self, name: str, inputs: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> Any:
        """With the bug in it."""
        with observing(self.patch):
            return self.impl.stage(name, inputs, params)


def __getattr__(name: str) -> partial[Mutated]:
    if name not in (*MUTANTS, *INNOCENTS):
        raise AttributeError(name)
    return partial(Mutated, name)
