"""Random generators as JSON: a run's streams, saved and set going again where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd import require


def random_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a generator: the algorithm's name and its numbers (128-bit ones too: JSON has no limit)."""
    found: dict[str, Any] = _plain(rng.bit_generator.state)
    return found


def generator(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on where the saved one was. SpecError for a state NumPy does not know."""
    known = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    name = state.get("bit_generator")
    require(name in known, f"random state of {name!r}; NumPy's generators are {', '.join(known)}")
    bits = getattr(np.random, str(name))()
    try:
        bits.state = state
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        require(False, f"a random state that {name} does not take: {error!r}")
    return np.random.Generator(bits)


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray):
        return x.tolist()
    return x.item() if isinstance(x, np.generic) else x
