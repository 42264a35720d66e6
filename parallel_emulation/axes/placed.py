"""Put a rank program where a module stands, so that a whole serial model runs spread out, its own code unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from refimpl.layers.block import DecoderLayer
from refimpl.layers.module import Module


class Placed(Module):
    """The weights of `m` under their names; a call is `program(self, ...)`, as in `Placed(mine, partial(moe, ep))`."""

    def __init__(self, m: Module, program: Callable[..., Any]) -> None:
        vars(self).update(vars(m))
        self.program = program

    def __call__(self, *args: Any, **static: Any) -> Any:
        """What the program makes of it."""
        return self.program(self, *args, **static)


def placed(layer: DecoderLayer, **parts: Module) -> DecoderLayer:
    """A copy of the layer with other parts: `placed(layer, mlp=Placed(...), self_attn=Placed(...))`."""
    new = copy.copy(layer)
    vars(new).update(parts)
    return new
