"""Taps of many layers in few words: `router.weights in L1-L2`, and over which layers a mistake goes: `the MoE layers alone`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .compare import Finding
from .numbering import layer_of
from .subsets import periodic


def folded(taps: Sequence[str]) -> str:
    """Taps by name, their layers together, and their phases if there are several: `router.weights in L1-L2 of fwd, dec8`."""
    places: dict[str, list[tuple[str, str]]] = {}
    for tap in taps:
        phase, _, rest = tap.partition("/")
        unit, _, name = rest.rpartition("/")
        places.setdefault(name, []).append((phase, unit))
    parts = [f"{name}{_placed(found)}" for name, found in places.items()]
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _placed(found: list[tuple[str, str]]) -> str:
    """The layers and phases of a name."""
    phases, units = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    return (f" in {_span(units)}" if any(units) else "") + (f" of {', '.join(phases)}" if len(phases) > 1 else "")


def _span(units: list[str]) -> str:
    """`L1-L3` where the layers follow each other, else each: `L0, L2, mtp1`."""
    numbers = [int(u[1:]) for u in units if u[:1] == "L"]
    if len(units) > 1 and len(numbers) == len(units) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{units[0]}-{units[-1]}"
    return ", ".join(u for u in units if u)


def over_layers(blamed: Iterable[Finding], findings: Iterable[Finding]) -> str:
    """Which of the layers in which these taps were compared are blamed, where their numbers do not tell."""
    findings, blamed = [f for f in findings if not f.open], list(blamed)
    names = {_name(f.tap) for f in blamed}
    wrong = set(_layers([f.tap for f in blamed]))
    compared = sorted({n for f in findings if _name(f.tap) in names for n in _layers([f.tap])})
    if not wrong or len(compared) < 2:
        return ""
    if wrong == set(compared):
        return "all layers compared"
    moe = set(_layers([t for f in findings for t in f.places if _name(t).startswith(("moe.", "router."))]))
    for kind, layers in (("MoE", moe), ("dense", set(compared) - moe)):
        if wrong == layers & set(compared):
            return f"the {kind} layers alone"
    return periodic(np.isin(compared, list(wrong)), "layer") if compared == list(range(len(compared))) else ""


def _name(tap: str) -> str:
    return tap.rpartition("/")[2]


def _layers(taps: Iterable[str]) -> Iterable[int]:
    """The numbers of the main model's layers among those of the taps."""
    numbers = map(layer_of, taps)
    return [n for n in numbers if n is not None]
