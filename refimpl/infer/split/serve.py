"""Prefill and decode apart: one rank program for both units, the same on the simulator and on MPI (R 3.4).

Prompts are read in rounds; what a round knows is handed over, and while the next one is read, the decode unit steps. Greedy,
since the point is that the answers are one rank's: bit for bit, where the order of sums is fixed (see docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.autograd.errors import require, where
from refimpl.model import ForCausalLM, identity
from refimpl.parallel_emulation.comm import Comm

from .decode import Answer, Decode
from .moves import Move
from .prefill import Prefill
from .units import Deployment


@dataclass
class Served:
    """What one rank knows at the end: its answers (decode), logits (V,) behind prompts (prefill) and in steps (decode), moves."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    prompt_logits: dict[int, Array] = field(default_factory=dict)
    step_logits: dict[int, list[Array]] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)


def serve(
    world: Comm,
    model: ForCausalLM,
    prompts: Sequence[Any],
    n: int,
    how: Deployment,
    *,
    per_round: int = 0,
    eos: Collection[int] = (),
) -> Served:
    """n tokens for every prompt, or fewer if one of `eos` ends them; `per_round` prompts are read at a time (0: all).

    Every rank gets the same arguments. SpecError unless the run has as many ranks as the deployment, for empty prompts, for
    tokens outside the vocabulary, and for answers beyond the window.
    """
    tokens = _checked(world, model, prompts, n, how)
    require(per_round >= 0, f"{per_round} prompts a round")
    size = per_round or len(tokens)
    rounds = [range(i, min(i + size, len(tokens))) for i in range(0, len(tokens), size)]
    reads = world.rank < how.prefill
    unit = world.split(
        int(not reads), world.rank, f"unit of model {identity(model)}"
    )  # latents mean nothing to another
    found = Served()
    if reads:
        prefill = Prefill(unit, model, how)
        for requests in rounds:
            found.prompt_logits |= prefill.read(world, requests, tokens)
        return found
    decode = Decode(unit, model, how)
    _answer(world, decode, rounds, tokens, n, frozenset(eos), found)
    found.moves = decode.moves
    return found


def _answer(
    world: Comm,
    decode: Decode,
    rounds: Sequence[range],
    tokens: Sequence[Array],
    n: int,
    eos: frozenset[int],
    found: Served,
) -> None:
    left, mine = list(rounds), list[Answer]()
    while left or decode.unit.allgather(np.array(len(decode.going)), "left").any():
        if left:
            mine += decode.take(world, left.pop(0), tokens)
        decode.going = [s for s in decode.going if len(s.answer) < n and s.answer[-1] not in eos]
        decode.step()
        decode.going = [s for s in decode.going if len(s.answer) < n and s.answer[-1] not in eos]
    for s in mine:
        found.answers[s.number], found.step_logits[s.number] = s.answer, s.logits


def _checked(world: Comm, model: ForCausalLM, prompts: Sequence[Any], n: int, how: Deployment) -> list[Array]:
    """The prompts as (S,) int64."""
    require(world.size == how.ranks, f"the deployment takes {how.ranks} ranks, the run has {world.size}")
    require(n >= 1, f"{n} tokens for every prompt; at least 1")
    found = []
    for i, prompt in enumerate(prompts):
        with where(f"in prompt {i}"):
            inputs = model.inputs([prompt])
            window = model.config.max_position_embeddings
            last = inputs.tokens.shape[1] + n - 1
            require(
                last <= window,
                f"{inputs.tokens.shape[1]} tokens and an answer of {n} do not fit the window of {window}",
            )
        found.append(np.asarray(inputs.tokens[0]))
    return found
