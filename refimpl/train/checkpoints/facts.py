"""What a checkpoint says of its run beside the tensors: config, cursor of the data, random states, counters; and a check."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from refimpl.autograd import require
from refimpl.layers.config import Config

from .random_states import random_state
from .snapshot import Saved


def facts(
    c: Config,
    *,
    cursor: Mapping[str, Any] | None = None,
    random: Mapping[str, np.random.Generator] | None = None,
    counters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As a snapshot holds them. The cursor is whatever the data loader needs to go on, as JSON; random streams by name."""
    streams = {name: random_state(rng) for name, rng in (random or {}).items()}
    config = json.loads(json.dumps(c.to_dict()))
    return {"config": config, "cursor": dict(cursor or {}), "random": streams, "counters": dict(counters or {})}


def check_config(saved: Saved, c: Config, changed: Collection[str] = ()) -> None:
    """SpecError unless the checkpoint is one of this config, but for keys that are meant to change (context extension)."""
    then, now = saved.facts.get("config", {}), json.loads(json.dumps(c.to_dict()))
    other = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key) and key not in changed]
    said = "; ".join([f"{key} was {then.get(key)!r:.60}, is {now.get(key)!r:.60}" for key in other[:5]])
    require(not other, f"{saved.folder} is a checkpoint of another config: {said}")
