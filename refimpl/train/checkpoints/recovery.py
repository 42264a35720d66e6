"""A run that loses ranks: it ends, starts again on fewer from the last checkpoint, and goes on.

`survive` tries one mesh after the other. `run` is the rank program of such a job, the same on the simulator and on MPI: it
finds the newest checkpoint of its folder, whoever wrote it, trains from there and saves. What it ends with is bit for bit
what an undisturbed run ends with that is resumed from that checkpoint on that mesh; against a run that had this mesh
from its first step only the order of sums before the checkpoint differs.

    python -m refimpl.parallel_emulation run -n 4 --engine simulator refimpl.train.checkpoints.recovery:run RUN pp=2,ep=2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from refimpl.autograd import Array, require
from refimpl.layers.config import Config
from refimpl.layers.precision import plan
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.parallel_emulation.comm import Comm, RankFault, mortal
from refimpl.parallel_emulation.pipeline import Schedule, build
from refimpl.train import parallel
from refimpl.train.guard import check
from refimpl.train.optimizer import AdamW
from refimpl.train.training import Recipe, init

from . import mesh as meshes
from .facts import facts
from .keeper import Keeper, Retention

T = TypeVar("T")


def survive(
    meshes: Sequence[Mesh], attempt: Callable[[Mesh], T], *, faults: tuple[type[Exception], ...] = (RankFault,)
) -> tuple[T, list[str]]:
    """The result of the first mesh on which the job ends by itself, and what ended it on those before.

    `attempt(mesh)` starts the job on as many ranks and returns its result. An error that is not one of `faults` is one
    that fewer ranks would meet again, and is raised at once; so is the fault of the last mesh.
    """
    require(meshes, "no mesh to run on")
    ended: list[str] = []
    for shape in meshes[:-1]:
        try:
            return attempt(shape), ended
        except faults as fault:
            ended.append(f"on {shape}: {fault}")
    return attempt(meshes[-1]), ended


def train(
    world: Comm,
    folder: Path | str,
    c: Config,
    weights: Callable[[], dict[str, Array]],
    recipe: Recipe,
    shape: Mesh,
    schedule: Schedule,
    batch: Callable[[int], Array],
    *,
    steps: int,
    every: int,
    keep: Retention | None = None,
) -> parallel.Rank:
    """Train to step `steps` from the newest checkpoint of the folder, or from `weights()`; save each `every` steps.

    A checkpoint is written during the step after it. batch(t): tokens (N, S) of step t, from 0, the same on every rank.
    """
    with Keeper(folder, comm=world, keep=keep) as keeper:
        saved = keeper.newest().saved
        if saved is None:
            rank = parallel.start(world, c, weights(), recipe, shape, schedule)
        else:
            rank = meshes.resume(saved, world, c, recipe, shape, schedule)
        while rank.t < steps:
            rank, report = parallel.step(rank, batch(rank.t))
            check(report)
            keeper.finish()  # begun a step ago
            if rank.t % every == 0:
                keeper.begin(meshes.snapshot(rank, facts(rank.config, cursor={"batch": rank.t})))
    return rank


def run(
    world: Comm,
    folder: str,
    mesh: str = "pp=2,ep=2",
    schedule: str = "dualpipe",
    micro_batches: int = 4,
    steps: int = 4,
    every: int = 2,
    victim: int = -1,
    calls: int = 0,
    how: Any = "raise",
) -> dict[str, Any]:
    """Train `parallel.DEMO` with checkpoints; rank `victim` dies in its call number `calls` -> step, my weights."""
    shape = Mesh.parse(mesh)
    comm = mortal(world, calls, how) if world.rank == victim else world
    recipe = Recipe(plan("float64"), AdamW(lr=3e-3), mtp_weight=0.3, aux_weight=1e-2, gamma=1e-2, max_norm=0.5)

    def batch(t: int) -> Array:
        return np.random.default_rng([1, t]).integers(0, parallel.DEMO.vocab_size, (16, 8))

    rank = train(
        comm,
        folder,
        parallel.DEMO,
        lambda: init(parallel.DEMO, std=0.1),
        recipe,
        shape,
        build(schedule, shape.pp, micro_batches),
        batch,
        steps=steps,
        every=every,
    )
    return {"step": rank.t, "weights": rank.named}
