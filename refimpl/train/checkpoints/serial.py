"""The state of `refimpl.train.step` as a snapshot, and back, the same bits.

Saved are masters (the weights that a step computes with are made from them, by one rounding of the plan, so they are not
stored twice), buffers (the balancing bias) among them, both moments, the number of steps, and an EMA if there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd import Array, require, where
from refimpl.layers.config import Config
from refimpl.model import ForCausalLM
from refimpl.train.optimizer import AdamState
from refimpl.train.training import State

from .facts import check_config
from .pieces import Piece
from .random_states import generator
from .snapshot import Saved, Snapshot

MASTER, FIRST, SECOND, EMA = "master", "adam.m", "adam.v", "ema"


@dataclass(frozen=True)
class Resumed:
    """What a run goes on with."""

    state: State
    ema: dict[str, Array]
    cursor: dict[str, Any]
    random: dict[str, np.random.Generator]
    counters: dict[str, Any]


def snapshot(state: State, facts: Mapping[str, Any], *, ema: Mapping[str, Array] | None = None) -> Snapshot:
    """All of a state, on one rank; no copy."""
    kinds = {MASTER: state.weights, FIRST: state.adam.m, SECOND: state.adam.v, EMA: ema or {}}
    pieces = {f"{kind}/{name}": Piece.whole(x) for kind, held in kinds.items() for name, x in held.items()}
    return Snapshot(state.adam.t, pieces, facts)


def resume(saved: Saved, c: Config, *, changed: Collection[str] = ()) -> Resumed:
    """The state that was saved, by however many ranks. SpecError for a checkpoint of another config.

    `changed`: config keys that may differ from the saved ones, as rope_scaling does when the context is extended.
    """
    check_config(saved, c, changed)
    held = {kind: _writable(saved.tensors(kind)) for kind in (MASTER, FIRST, SECOND, EMA)}
    with where(f"while resuming from {saved.folder}"):
        ForCausalLM.from_weights(c, held[MASTER])  # names and shapes
    extra = sorted({n for kind in (FIRST, SECOND, EMA) for n in held[kind]} - held[MASTER].keys())
    require(not extra, f"{saved.folder} has moments of weights that it does not have: {extra[:3]}")
    adam = AdamState(held[FIRST], held[SECOND], saved.step)
    streams = {name: generator(state) for name, state in saved.facts.get("random", {}).items()}
    kept = [dict(saved.facts.get(key, {})) for key in ("cursor", "counters")]
    return Resumed(State(held[MASTER], adam), held[EMA], kept[0], streams, kept[1])


def _writable(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Off the disk: nothing that happens to the file reaches a run that has begun."""
    return {name: np.array(tensors[name]) for name in tensors}
