"""W ranks give what one rank gives, asked of an implementation that need not know of ranks.

`by_stages`: the specification's rank programs on the simulator, with the implementation's stages in the places of ours, on each
rank's heads, channels or experts. `parts`: the same cut made in the weights: W loads, each of one rank's part of a layer, whose
contributions to the residual stream must add up to the whole model's. `Ranks`: what the implementation's own ranks recorded, put
together by the marks in its dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of
from refimpl.diff import Case, Trace
from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Stage, observing
from refimpl.model import ForCausalLM, effective
from refimpl.parallel_emulation.axes.mesh import Mesh, enter
from refimpl.parallel_emulation.comm import Comm, spmd
from refimpl.train.mesh_model import spread

from .process import Lacking
from .stages import named_arguments
from .subject import DIMS, Subject

Weights = dict[str, Array]
AXES = ("tp", "ep")
"""Axes of ranks that a layer is cut over: heads and channels, experts."""


# ---- The specification's ranks, the implementation's stages


@dataclass
class Theirs:
    """An observer that asks the implementation for every stage it has; ours stands in for those that it lacks."""

    of: Subject
    asked: set[str] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """The implementation's output."""
        if stage.name not in self.lacking:
            inputs, params = named_arguments(stage, list(args), static)
            try:
                out = Context().run(self.of.stage, stage.name, inputs, params)  # observed by nobody
            except Lacking:
                self.lacking.add(stage.name)
            else:
                self.asked.add(stage.name)
                return out
        return run(*args, **static)


def by_stages(of: Subject, case: Case, axis: str = "", world: int = 1) -> Array:
    """Logits (B, S, V) of the case, layers cut over `world` ranks along an axis. Lacking where the implementation has no stage."""
    of.must_have("stage")
    held, mesh = effective(case.weights(), FLOAT32), Mesh(**({axis: world} if axis else {}))
    theirs = Theirs(of)

    def program(comm: Comm) -> Array:
        model = ForCausalLM.from_weights(case.config, held)
        groups = enter(comm, mesh)
        model.model.layers = [spread(groups, layer) for layer in model.model.layers]
        with observing(theirs):
            logits: Array = data_of(model(model.inputs(case.tokens), None, attend="expanded").logits)
        return logits

    found = spmd(world, program)
    if not theirs.asked:
        raise Lacking("stage is not implemented")
    require(all(np.array_equal(found[0], x) for x in found), "ranks of one group hold different logits")
    return found[0].astype(np.float64)


# ---- The implementation's loads, each a rank's part


@dataclass(frozen=True)
class Cut:
    """A rank's part of a model: its config, its weights."""

    config: dict[str, Any]
    weights: Weights


def _heads(case: Case, world: int, rank: int) -> Cut:
    """My heads of every layer: rows of q_b_proj (or q_proj) and kv_b_proj, columns of o_proj."""
    c = case.config
    mine = _share(c.num_attention_heads, world, rank, "heads")

    def cut(name: str, w: Array) -> Array:
        if name.endswith(("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")):
            return w.reshape(c.num_attention_heads, -1, w.shape[1])[mine].reshape(-1, w.shape[1])
        if name.endswith("o_proj.weight"):
            return w.reshape(len(w), c.num_attention_heads, -1)[:, mine].reshape(len(w), -1)
        return w

    heads = {
        k: c.num_attention_heads // world
        for k in ("num_attention_heads", "num_key_value_heads")
        if k in case.raw_config
    }
    return Cut(case.raw_config | heads, {n: cut(n, np.asarray(w)) for n, w in case.weights().items()})


def _channels(case: Case, world: int, rank: int) -> Cut:
    """My channels of the dense layers: rows of gate and up, columns of down."""
    c = case.config
    mine = _share(c.intermediate_size, world, rank, "channels")
    dense = tuple(f"model.layers.{i}.mlp." for i in range(c.num_hidden_layers) if not c.is_moe(i))
    held = {n: np.asarray(w) for n, w in case.weights().items()}
    cut = {n: w[:, mine] if "down_proj" in n else w[mine] for n, w in held.items() if n.startswith(dense)}
    return Cut(case.raw_config | {"intermediate_size": c.intermediate_size // world}, held | cut)


def _experts(case: Case, world: int, rank: int) -> Cut:
    """My experts, the others giving 0; shared experts are the first rank's."""
    c = case.config
    shared = ["shared_experts"] if rank == 0 else []
    home = [
        *(f"experts.{e}" for e in range(c.n_routed_experts)[_share(c.n_routed_experts, world, rank, "experts")]),
        *shared,
    ]
    mine = tuple([f".mlp.{where}.down_proj.weight" for where in home])
    held = {n: np.asarray(w) for n, w in case.weights().items()}
    away = [n for n in held if "experts" in n and n.endswith("down_proj.weight") and not n.endswith(mine)]
    return Cut(dict(case.raw_config), held | {n: np.zeros_like(held[n]) for n in away})


def _share(total: int, world: int, rank: int, what: str) -> slice:
    require(total % world == 0, f"{total} {what} for {world} ranks")
    return slice(rank * total // world, (rank + 1) * total // world)


CUTS = {"heads": (_heads, "attn_out"), "channels": (_channels, "ffn_out"), "experts": (_experts, "ffn_out")}
"""What is cut -> how, and what adds up."""


def layer_of_cut(c: Config, what: str) -> int:
    """The layer whose contributions add up: the first that is cut, for what follows it sees one rank's part alone."""
    return next(i for i in range(c.num_hidden_layers) if what != "experts" or c.is_moe(i))


def parts(case: Case, what: str, world: int) -> Iterator[Cut]:
    """Every rank's part."""
    for rank in range(world):
        yield CUTS[what][0](case, world, rank)


def contribution(taps: Mapping[str, Any], layer: int, tap: str) -> Array:
    """What attention (attn_out) or feed-forward (ffn_out) adds to the residual stream, in float64; Lacking where neither it nor the
    stream before and behind it is shown.
    """
    shown = {n.removeprefix("fwd/"): a for n, a in taps.items() if n != DIMS and a is not None}
    before = {"attn_out": f"L{layer - 1}/resid" if layer else "embed", "ffn_out": f"L{layer}/resid_mid"}[tap]
    behind = {"attn_out": f"L{layer}/resid_mid", "ffn_out": f"L{layer}/resid"}[tap]
    if f"L{layer}/{tap}" in shown:
        return np.asarray(shown[f"L{layer}/{tap}"], np.float64)
    if before in shown and behind in shown:
        return np.asarray(shown[behind], np.float64) - np.asarray(shown[before], np.float64)
    raise Lacking(f"taps L{layer}/{tap}, or {before} and {behind}")


def whole_and_sum(of: Subject, case: Case, what: str, world: int) -> tuple[Array, Array]:
    """(the whole model's contribution, the sum of the parts'), (B, S, D) both."""
    layer, tap = layer_of_cut(case.config, what), CUTS[what][1]

    def asked(config: Mapping[str, Any], weights: Weights) -> Array:
        of.hold(config, weights)
        return contribution(of.call("forward", case.tokens, taps=["*"]), layer, tap)

    whole = asked(case.raw_config, case.weights())
    return whole, np.sum([asked(part.config, part.weights) for part in parts(case, what, world)], axis=0)


# ---- The implementation's own ranks


def joined(of: Subject, case: Case, axes: Mapping[str, int], folder: Path) -> Trace:
    """The trace of the implementation's ranks: `ranks(tokens, axes, taps)` gives each one's {tap: array}, "dims" among them."""
    answers: Sequence[Mapping[str, Any]] = of.call("ranks", case.tokens, axes=dict(axes), taps=["*"])
    world = int(np.prod(list(axes.values())))
    require(len(answers) == world, f"{len(answers)} ranks answered; {world} were asked for")
    for rank, taps in enumerate(answers):
        trace = of.trace(case, taps)
        at = np.unravel_index(rank, list(axes.values()))
        parallel = {"rank": rank, "axes": {a: [int(i), n] for (a, n), i in zip(axes.items(), at, strict=True)}}
        header = replace(trace.header, parallel=parallel)
        Trace(header, trace.taps).write(folder / f"rank-{rank}.safetensors")
    return Trace.read(folder)


__all__ = ["AXES", "CUTS", "by_stages", "joined", "whole_and_sum"]
