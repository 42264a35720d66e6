"""The ranks of a run: what all of them must know alike after a step, and what went over the links between them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refimpl.parallel_emulation.comm import Comm, Tally, counted
from refimpl.parallel_emulation.cost.cluster import Cluster, traffic
from refimpl.train.checkpoints.agree import everyone


class Ranks:
    """All ranks as one of them sees it; None is one process by itself. `comm` counts, `plain` does not."""

    def __init__(self, plain: Comm | None) -> None:
        self.plain, self.comm = plain, plain
        self._tally: Tally | None = None
        if plain is not None:
            self.comm, self._tally = counted(plain)
        self.first = plain is None or plain.rank == 0

    def taken(self) -> dict[str, Any]:
        """What I sent since this was last asked."""
        return {} if self._tally is None else self._tally.taken()

    def meet(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, as JSON, in rank order."""
        return [json.loads(text) for text in everyone(self.plain, json.dumps(said), "run.meet")]


def links(taken: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What all ranks sent in a step: `links/bytes` and `links/messages` of all together; `links/h800_s`, how long the busiest H800
    of the report's cluster would take for its part (alpha per message, beta per byte; `cost.cluster`), rank r on GPU r;
    `links/waited_s`, the longest that a rank of this run was inside calls.
    """
    if not any(taken):
        return {}
    n, most = len(taken), max([t["messages"] for t in taken])
    cluster = Cluster(n if n < Cluster.gpus_per_node else -(-n // Cluster.gpus_per_node) * Cluster.gpus_per_node)
    matrix = np.array([t["sent"] for t in taken])
    found = {"links/bytes": int(matrix.sum()), "links/messages": sum([t["messages"] for t in taken])}
    return found | {
        "links/h800_s": traffic(cluster, matrix).time(cluster, most),
        "links/waited_s": max([t["seconds"] for t in taken]),
    }
