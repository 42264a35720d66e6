"""A model of the user's own: what transformers' loader left as it was initialised, filled from a checkpoint.

The loader fuses the experts of every model of a type it knows, wanted or not, and never those of code that is not its own: so
single experts of a subclass are left, and fused ones of a copied file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from typing import Any

from .torch_arrays import libraries

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A fused parameter of all experts (E, rows, columns) -> whose rows of a single expert it holds, one below the other."""


def not_loaded(model: Any, report: Mapping[str, Iterable[Any]]) -> list[str]:
    """What the loader's report says was not there or of another shape, and what the class has it keep silent about. A parameter
    that is tied to an earlier one counts as that one.
    """
    named = {*report.get("missing_keys", ()), *(name for name, *_ in report.get("mismatched_keys", ()))}
    silent = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return [n for n in first.values() if n in named or any(pattern.search(n) for pattern in silent)]


def fill(model: Any, state: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Give the parameters and buffers of these names what `state` (checkpoint names) has for them, experts one by one or fused
    -> those that it has nothing for, or nothing of that shape.
    """
    own, fits, left = model.state_dict(), {}, []
    for name in names:
        found = _of_checkpoint(name, state)
        if found is None or found.shape != own[name].shape:
            left.append(name)
        else:
            fits[name] = found
    model.load_state_dict(fits, strict=False)
    return left


def _of_checkpoint(name: str, state: Mapping[str, Any]) -> Any:
    """The tensor of this name; of a fused one the experts' matrices, stacked (E, rows, columns); None if there is none."""
    torch, _ = libraries()
    path, _, last = name.rpartition(".")
    if name in state or last not in FUSED:
        return state.get(name)
    experts = ([f"{path}.{e}.{part}.weight" for part in FUSED[last]] for e in count())
    there = takewhile(lambda matrices: all(n in state for n in matrices), experts)
    stack = [torch.cat([state[n] for n in matrices]) for matrices in there]
    return torch.stack(stack) if stack else None
