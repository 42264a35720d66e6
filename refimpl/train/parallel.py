"""DeepSeek-V3 trained on a mesh of ranks: pipeline x data x expert (x tensor) parallel, with ZeRO-1 (R 3.2).

The rank program that puts the parts together: `parallel_emulation` runs schedules, dispatches tokens and divides the
optimiser, `refimpl` has the model and the training step. On the simulator and under MPI:

    python -m refimpl.parallel_emulation run -n 4 refimpl.train.parallel:demo pp=2,ep=2

Sequences are divided among the ranks of dp and ep, every micro-batch counts alike. One rank does what `train.step`
does; more ranks differ from it in the order of sums only. Masters are kept in the plan's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd import Array, Parameter, require
from refimpl.layers.config import Config
from refimpl.layers.module import is_buffer
from refimpl.layers.precision import plan
from refimpl.layers.presets import TINY
from refimpl.layers.router import Routing, bias_update, counts
from refimpl.layers.stage import observing, phase, unit
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation import axes
from refimpl.parallel_emulation.axes.mesh import Groups, Mesh, enter
from refimpl.parallel_emulation.collectives import all_reduce
from refimpl.parallel_emulation.comm import Comm
from refimpl.parallel_emulation.pipeline import Outcome, Schedule, build, run

from .mesh_model import Local, checkpoint_names, divide
from .optimizer import AdamState, AdamW, adamw
from .pipeline_parts import Stage
from .training import Recipe, Report, check_unscaled, init


@dataclass(frozen=True)
class Rank:
    """What a rank is, and what it holds between two steps: weights by local names, its shards of the optimiser."""

    config: Config
    groups: Groups
    schedule: Schedule
    local: Local
    recipe: Recipe
    weights: dict[str, Array]
    shards: list[axes.data.Shard]
    t: int = 0

    @property
    def named(self) -> dict[str, Array]:
        """My weights by checkpoint names."""
        return checkpoint_names(self.groups, self.config.n_routed_experts, self.weights)


def start(world: Comm, c: Config, weights: Mapping[str, Array], recipe: Recipe, mesh: Mesh, schedule: Schedule) -> Rank:
    """My part of a model, whose weights are given whole by checkpoint name. MTP modules only if they are trained.

    SpecError where run, mesh, schedule and model do not fit each other.
    """
    check_unscaled(recipe)
    ranks = schedule.layout.n_ranks
    require(ranks == mesh.pp, f"{schedule.name} is for {ranks} pipeline ranks, the mesh is {mesh}")
    extra = tuple([f"model.layers.{c.num_hidden_layers + k}." for k in range(c.num_nextn_predict_layers)])
    c = trained(c, recipe)
    if not c.num_nextn_predict_layers:
        weights = {name: weights[name] for name in weights if not name.startswith(extra)}
    groups, dtype = enter(world, mesh), recipe.plan.dtype
    local = divide(groups, schedule.layout, ForCausalLM(c).load({n: w.astype(dtype) for n, w in weights.items()}))
    held = {name: w for name, w in local.model.named_weights() if hasattr(w, "dtype")}
    return Rank(c, groups, schedule, local, recipe, held, [kind.shard(held, dtype) for kind in local.kinds])


def trained(c: Config, recipe: Recipe) -> Config:
    """The model that a recipe trains: without MTP modules if their loss does not count."""
    return c if recipe.mtp_weight else c.replace(num_nextn_predict_layers=0)


def step(rank: Rank, tokens: Array) -> tuple[Rank, Report]:
    """Train on one batch, tokens (N, S), the same on every rank -> my new part, and what all ranks saw together.

    Report.load holds the layers of my stages.
    """
    recipe, local, t = rank.recipe, rank.local, rank.t + 1
    out, grads, load = _passes(rank, tokens)
    own = sum([float(loss) for loss in out.losses.values()])
    loss = float(all_reduce(local.once, np.array([own], np.float64), "loss")[0])
    update = partial(_adamw, opt=replace(recipe.opt, lr=recipe.opt.lr * recipe.schedule(t - 1)))
    parts = [{name: grads[name] for name in kind.names} for kind in local.kinds]
    new, shards, norm = axes.data.step(rank.shards, parts, update, max_norm=recipe.max_norm)
    assert norm is not None
    load = {at: all_reduce(local.replicas, n, f"load.{at}") for at, n in sorted(load.items())}
    weights = dict(rank.weights)
    for part in (*new, _biases(rank, load)):
        weights |= part
    return replace(rank, weights=weights, shards=shards, t=t), Report(t, loss, norm, load)


def _passes(rank: Rank, tokens: Array) -> tuple[Outcome, dict[str, Array], dict[str, Array]]:
    """Forward and backward of my stages -> outcome, my gradients by local name, my tokens per expert by layer."""
    recipe, local, load = rank.recipe, rank.local, dict[str, Array]()
    batches = _micro_batches(rank, tokens)

    def leaf(name: str, w: Any) -> Any:
        held = recipe.plan.weight(name, rank.weights[name]) if hasattr(w, "dtype") else w
        return Parameter(held) if hasattr(w, "dtype") and not is_buffer(name) else held

    def saw(at: str, routing: Routing) -> None:
        n = counts.fn(routing.ids, n_experts=rank.config.n_routed_experts)
        load[at] = load[at] + n if at in load else n

    model = local.model.map(leaf)
    inputs = [model.inputs(batch, labels=batch) for batch in batches]
    share = [1.0 / (len(batches) * rank.groups.data.size)] * len(batches)
    how = recipe.mtp_weight, recipe.aux_weight, saw
    with observing(recipe.plan):
        out = run(
            rank.groups.pp, rank.schedule, [Stage(model, local.cut, s, inputs, share, *how) for s in local.stages]
        )
    leaves = [(name, w) for name, w in model.named_weights() if isinstance(w, Parameter)]
    return out, {name: out.grads.get(w, np.zeros_like(w.data)) for name, w in leaves}, load


def _micro_batches(rank: Rank, tokens: Array) -> list[Array]:
    """My share of the sequences (N, S), cut into micro-batches: data-parallel ranks in turn, then their micro-batches."""
    data, m = rank.groups.data, rank.schedule.layout.micro_batches
    fits = len(tokens) > 0 and len(tokens) % (data.size * m) == 0
    require(fits, f"{len(tokens)} sequences for {data.size} data-parallel ranks with {m} micro-batches each")
    return list(tokens.reshape(data.size, m, -1, tokens.shape[1])[data.rank])


def _biases(rank: Rank, load: Mapping[str, Array]) -> dict[str, Array]:
    """The balancing biases of my layers, moved by the loads of all ranks."""
    c, gamma, moved = rank.config, rank.recipe.gamma, {}
    with phase("upd"):
        for at, n in load.items():
            name = f"model.layers.{at[1:]}.mlp.gate.e_score_correction_bias"
            if gamma and name in rank.weights:
                with unit(at):
                    zero_sum = c.dialect.bias_update == "zero_sum"
                    moved[name] = bias_update(rank.weights[name], n, gamma=gamma, zero_sum=zero_sum)
    return moved


def _adamw(
    weights: Mapping[str, Array], grads: Mapping[str, Array], state: AdamState | None, *, opt: AdamW
) -> tuple[dict[str, Array], AdamState]:
    return adamw(weights, grads, state or AdamState(), opt)


DEMO = TINY.replace(num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=1)
"""A V3 with every mechanism, small enough for 16 ranks on one core."""


def demo(
    world: Comm,
    mesh: str = "pp=2,ep=2",
    schedule: str = "dualpipe",
    micro_batches: int = 4,
    steps: int = 2,
    precision: str = "float64",
    sequences: int = 16,
) -> dict[str, Any]:
    """Train DEMO for a few steps on a mesh -> loss and gradient norm of each step, my weights by checkpoint name."""
    shape = Mesh.parse(mesh)
    recipe = Recipe(plan(precision), AdamW(lr=3e-3), mtp_weight=0.3, aux_weight=1e-2, gamma=1e-2, max_norm=0.5)
    rank = start(world, DEMO, init(DEMO, std=0.1), recipe, shape, build(schedule, shape.pp, micro_batches))
    rng, losses, norms = np.random.default_rng(1), [], []
    for _ in range(steps):
        rank, report = step(rank, rng.integers(0, DEMO.vocab_size, (sequences, 8)))
        losses.append(report.loss)
        norms.append(report.norm)
    return {"loss": np.array(losses), "norm": np.array(norms), "weights": rank.named}
