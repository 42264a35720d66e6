"""What an implementation does otherwise, over all of its cases: blamed taps by the known mistake that reproduces them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

UNNAMED = "no known mistake reproduces it"


@dataclass
class Deviation:
    """title: of the known mistake; ids: its rows of the corpus; stages: blamed; errors: case -> tap -> what the diff found there;
    places: lines of the framework's source.
    """

    title: str
    ids: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    errors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    def add(self, case: str, id_: str, found: dict[str, dict[str, Any]], places: list[str]) -> None:
        """Another case, or another row of the corpus, that shows it."""
        self.ids += [id_] * (bool(id_) and id_ not in self.ids)
        self.stages += [s for s in dict.fromkeys(t.rpartition("/")[2] for t in found) if s not in self.stages]
        self.errors.setdefault(case, {}).update(found)
        self.places += [p for p in places if p not in self.places]

    def worst(self) -> tuple[float | None, float, str]:
        """(error, allowed, tap) of the largest error; None stands for NaN or infinity."""
        every = [(f["error"], f["allowed"], tap) for taps in self.errors.values() for tap, f in taps.items()]
        return max(every, key=lambda e: (math.inf if e[0] is None else e[0], e[2]))

    def note(self) -> str:
        """What the diff says where the error is within what is allowed."""
        leaning = [f for taps in self.errors.values() for f in taps.values() if f["lean"] > f["upright"]]
        within = all(
            f["error"] is not None and f["error"] <= f["allowed"] for t in self.errors.values() for f in t.values()
        )
        if not (within and leaning):
            return ""
        f = max(leaning, key=lambda f: f["lean"])
        return f"; all rows lean one way by {f['lean']:.1e}, where {f['upright']:.1e} is allowed"


def deviations(rows: dict[str, dict[str, Any]]) -> list[Deviation]:
    """Those that most cases show first.  rows: by case."""
    found: dict[tuple[str, str], Deviation] = {}
    for case, r in rows.items():
        blamed = dict(r.get("blamed", {}))
        for cause in r.get("causes", []):
            taps = {t: blamed[t] for t in cause["taps"] if t in blamed}
            here = r["places"].get(cause["title"], [])
            found.setdefault((cause["title"], ""), Deviation(cause["title"])).add(case, cause["id"], taps, here)
        named = {t for cause in r.get("causes", []) for t in cause["taps"]}
        for tap in blamed.keys() - named:
            stage = tap.rpartition("/")[2]
            here = r["places"].get(stage, [])
            found.setdefault((UNNAMED, stage), Deviation(UNNAMED)).add(case, "", {tap: blamed[tap]}, here)
    return sorted(found.values(), key=lambda d: -len(d.errors))
