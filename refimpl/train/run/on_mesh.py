"""A run on a mesh of ranks: each has its part (`refimpl.train.parallel`), on the simulator and under MPI alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refimpl.autograd import Array, require
from refimpl.layers.config import Config
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.parallel_emulation.comm import Comm
from refimpl.parallel_emulation.pipeline import Schedule, build
from refimpl.train import parallel
from refimpl.train.checkpoints import Saved, Snapshot, mesh
from refimpl.train.data import Batch
from refimpl.train.ema import Ema
from refimpl.train.recipe import Setting
from refimpl.train.training import Recipe, Report

from .beginning import beginning
from .engine import places
from .guard_mesh import guarded_step
from .job import Job


def shape_of(job: Job, ranks: int) -> Mesh:
    """The job's mesh, or data parallelism. SpecError unless it has as many ranks as the run."""
    shape = Mesh.parse(job.mesh) if job.mesh else Mesh(dp=ranks)
    require(shape.size == ranks, f"the mesh {shape} takes {shape.size} ranks, the run has {ranks}")
    return shape


class OnMesh:
    """One rank's part of the model."""

    def __init__(self, job: Job, rank: parallel.Rank, ema: Mapping[str, Array] | None = None) -> None:
        self._job, self._rank, decay = job, rank, job.run.ema
        self._ema = None if decay is None else Ema(ema or mesh.my_masters(rank), decay)

    @classmethod
    def start(cls, job: Job, saved: Saved | None, world: Comm) -> OnMesh:
        """From a checkpoint of any mesh, or from new weights. SpecError for a mesh that does not fit model or batches."""
        _check(job)
        shape = shape_of(job, world.size)
        done = saved.step if saved else 0
        c, s = job.model_after(done), job.run.at(max(done - 1, 0))
        recipe, schedule = job.run.recipe(s.step), _schedule(job, s.batch, shape)
        batches = {same.batch for p in job.run.phases for same in p.steps.runs}
        for batch in sorted(batches | ({job.evaluation.batch} if job.evaluation else set())):
            _schedule(job, batch, shape)
        if saved is None:
            return cls(job, parallel.start(world, c, beginning(job), recipe, shape, schedule))
        rank = mesh.resume(saved, world, c, recipe, shape, schedule)
        return cls(job, rank, mesh.resume_ema(saved, rank))

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._rank.t

    def step(self, c: Config, s: Setting, recipe: Recipe, batch: Batch) -> Report:
        """`parallel.step`; a loss that is no number is seen by all ranks, and its stage."""
        self._rank, report = guarded_step(self._at(c, s.batch, recipe), **batch.inputs())
        if self._ema is not None:
            self._ema.add(mesh.my_masters(self._rank))
        return report

    def evaluate(self, c: Config, recipe: Recipe, batch: Batch) -> dict[str, float]:
        """The passes of a step without the step."""
        return parallel.evaluate(self._at(c, len(batch.tokens), recipe), **batch.inputs())

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """My part, for a checkpoint."""
        return mesh.snapshot(self._rank, facts, ema=None if self._ema is None else self._ema.value())

    def biases(self) -> dict[str, Array]:
        """The balancing biases of my layers."""
        return places(self._rank.weights)

    def weights(self) -> dict[str, Array]:
        """My weights, as the layers take them."""
        return self._rank.named

    def close(self) -> None:
        """End the thread of the average."""
        if self._ema is not None:
            self._ema.__exit__(None, None, None)

    def _at(self, c: Config, batch: int, recipe: Recipe) -> parallel.Rank:
        schedule = _schedule(self._job, batch, self._rank.groups.mesh)
        return replace(parallel.changed(self._rank, c), recipe=recipe, schedule=schedule)


def _schedule(job: Job, batch: int, shape: Mesh) -> Schedule:
    return build(job.schedule, shape.pp, job.micro_batches(batch, shape.dp * shape.ep))


def _check(job: Job) -> None:
    """What one rank can do and several cannot."""
    require(job.samples is None, "samples are made on one rank; leave out [samples], or train without ranks")
    require(job.run.optimizer.loss_scale is None, "FP16 under a loss scale is trained on one rank")
    require(job.memory == "keep", f"memory {job.memory!r}: recomputation is for one rank; on a mesh everything is kept")
    reached = job.run.at(len(job) - 1).phase
    tasks = [p.name for p in job.run.phases[: job.run.phases.index(reached) + 1] if p.tasks]
    end = "end before it (--steps), and go on with --resume without ranks"
    require(not tasks, f"phase {tasks}: several tasks are trained on one rank; {end}")
    require(
        len(job.mtp) == 1,
        "mtp_weight is 0 in a part of the run only; on a mesh MTP modules are trained always or never",
    )
