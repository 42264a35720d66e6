"""DeepSeek-V3 trained on a mesh of ranks: pipeline x data x expert (x tensor) parallel, with ZeRO-1 (R 3.2).

The rank program that puts the parts together: `parallel_emulation` runs schedules, dispatches tokens and divides the
optimiser, `refimpl` has the model and the training step. On the simulator and under MPI:

    python -m refimpl.parallel_emulation run -n 4 refimpl.train.parallel:demo pp=2,ep=2

Sequences are divided among the ranks of dp and ep; a micro-batch counts by what it holds (`shares.py`). One rank does what
`train.step` does; more ranks differ from it in the order of sums only. Masters are kept in the plan's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd import Array, Parameter, require
from refimpl.layers.config import Config
from refimpl.layers.fp8 import nan_passes
from refimpl.layers.module import is_buffer
from refimpl.layers.precision import plan
from refimpl.layers.presets import TINY
from refimpl.layers.router import Routing, bias_update, counts
from refimpl.layers.stage import Observer, observing, phase, unit
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation import axes
from refimpl.parallel_emulation.axes.mesh import Groups, Mesh, enter
from refimpl.parallel_emulation.collectives import all_reduce
from refimpl.parallel_emulation.comm import Comm
from refimpl.parallel_emulation.pipeline import Outcome, Schedule, build, run

from .mesh_model import Local, checkpoint_names, divide
from .optimizer import AdamState, AdamW, adamw
from .pipeline_parts import Stage
from .shares import shares
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


def again(rank: Rank, weights: Mapping[str, Array]) -> Rank:
    """As this rank, at the start of a run with other weights."""
    return start(rank.groups.world, rank.config, weights, rank.recipe, rank.groups.mesh, rank.schedule)


def changed(rank: Rank, c: Config) -> Rank:
    """The same rank with another config of the same shapes: phases of a run change how positions are turned (R 4.3)."""
    c, local = trained(c, rank.recipe), rank.local
    if c == rank.config:
        return rank
    model = ForCausalLM(c)
    nothing = {
        n: np.broadcast_to(rank.recipe.plan.dtype(0), w.shape) for n, w in model.named_weights() if not w.optional
    }
    new = divide(rank.groups, rank.schedule.layout, model.load(nothing))
    return replace(rank, config=c, local=replace(local, cut=new.cut, model=new.model))


def trained(c: Config, recipe: Recipe) -> Config:
    """The model that a recipe trains: without MTP modules if their loss does not count."""
    return c if recipe.mtp_weight else c.replace(num_nextn_predict_layers=0)


def step(
    rank: Rank,
    tokens: Array,
    *,
    labels: Array | None = None,
    valid: Array | None = None,
    documents: Array | None = None,
) -> tuple[Rank, Report]:
    """Train on one batch, tokens (N, S), the same on every rank, as are the others, which are those of `train.step` -> my new part,
    and what all ranks saw together.

    Report.load holds the layers of my stages.
    """
    recipe, local, t = rank.recipe, rank.local, rank.t + 1
    rows = {"labels": labels, "valid": valid, "documents": documents}
    out, grads, load, heard = _passes(rank, {"tokens": tokens} | {n: x for n, x in rows.items() if x is not None})
    loss, parts = _together(rank, out, heard)
    update = partial(_adamw, opt=replace(recipe.opt, lr=recipe.opt.lr * recipe.schedule(t - 1)))
    own = [{name: grads[name] for name in kind.names} for kind in local.kinds]
    new, shards, norm = axes.data.step(rank.shards, own, update, max_norm=recipe.max_norm)
    assert norm is not None
    load = {at: all_reduce(local.replicas, n, f"load.{at}") for at, n in sorted(load.items())}
    weights = dict(rank.weights)
    for part in (*new, _biases(rank, load)):
        weights |= part
    return replace(rank, weights=weights, shards=shards, t=t), Report(t, loss, norm, load, parts)


def evaluate(rank: Rank, tokens: Array, **rows: Array) -> dict[str, float]:
    """The loss of a batch and its parts, by the passes of a step, without the step."""
    out, _, _, heard = _passes(rank, {"tokens": tokens} | rows)
    loss, parts = _together(rank, out, heard)
    return {"loss": loss} | parts


def watched(rank: Rank, tokens: Array, observer: Observer, **rows: Array) -> dict[str, Array]:
    """The passes of a step under an observer, on every rank -> my gradients by local name."""
    return _passes(rank, {"tokens": tokens} | rows, observer)[1]


def _together(rank: Rank, out: Outcome, heard: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The loss of all ranks and its parts."""
    names = ["main"] + [f"mtp{k}" for k in range(1, rank.local.cut.n_mtp + 1)] * bool(rank.recipe.mtp_weight)
    names += ["balance"] * bool(rank.recipe.aux_weight)
    own = [sum([float(loss) for loss in out.losses.values()]), *[heard.get(name, 0.0) for name in names]]
    loss, *parts = all_reduce(rank.local.once, np.array(own, np.float64), "loss").tolist()
    return loss, dict(zip(names, parts, strict=True))


def _passes(
    rank: Rank, rows: Mapping[str, Array], *observers: Observer
) -> tuple[Outcome, dict[str, Array], dict[str, Array], dict[str, float]]:
    """Forward and backward of my stages -> outcome, my gradients by local name, my tokens per expert by layer, my parts of the
    loss.
    """
    recipe, local, load, heard = rank.recipe, rank.local, dict[str, Array](), dict[str, float]()
    batches = _micro_batches(rank, {"labels": rows["tokens"], **rows})

    def leaf(name: str, w: Any) -> Any:
        held = recipe.plan.weight(name, rank.weights[name]) if hasattr(w, "dtype") else w
        return Parameter(held) if hasattr(w, "dtype") and not is_buffer(name) else held

    def saw(at: str, routing: Routing) -> None:
        n = counts.fn(routing.ids, n_experts=rank.config.n_routed_experts)
        load[at] = load[at] + n if at in load else n

    def hear(part: str, loss: float) -> None:
        heard[part] = heard.get(part, 0.0) + loss

    model, data = local.model.map(leaf), rank.groups.data
    inputs = [model.inputs(**batch) for batch in batches[data.rank]]
    each = shares(rank.config, [b["labels"] for of_rank in batches for b in of_rank], local.cut.n_mtp)
    mine = each[data.rank * len(inputs) : (data.rank + 1) * len(inputs)]
    how = recipe.mtp_weight, recipe.aux_weight, saw, hear
    with nan_passes(), observing(recipe.plan, *observers):
        stages = [Stage(model, local.cut, s, inputs, mine, *how) for s in local.stages]
        out = run(rank.groups.pp, rank.schedule, stages)
    leaves = [(name, w) for name, w in model.named_weights() if isinstance(w, Parameter)]
    return out, {name: out.grads.get(w, np.zeros_like(w.data)) for name, w in leaves}, load, heard


def _micro_batches(rank: Rank, rows: Mapping[str, Array]) -> list[list[dict[str, Array]]]:
    """The sequences (N, S) cut up: data-parallel ranks in turn, then their micro-batches."""
    data, m, n = rank.groups.data, rank.schedule.layout.micro_batches, len(rows["tokens"])
    fits = n > 0 and n % (data.size * m) == 0
    require(fits, f"{n} sequences for {data.size} data-parallel ranks with {m} micro-batches each")
    cut = {name: x.reshape(data.size, m, -1, x.shape[1]) for name, x in rows.items()}
    return [[{name: x[r, j] for name, x in cut.items()} for j in range(m)] for r in range(data.size)]


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
