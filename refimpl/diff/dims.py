"""The axes of a tap: letters (README, Letters) turned into numbers for a config and a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refimpl.layers.config import Config
from refimpl.layers.stage import Call, Stage
from refimpl.model.phases import Part, parts_of

_TERM = re.compile(r"(\d+)?([A-Z][a-z]?)?(?:([+*-])(\w+))?")
TOKEN_AXES = ("S", "T", "S-k")
"""Letters of tokens: queries, keys, and those of a module that looks k ahead."""


@dataclass(frozen=True)
class Sizes:
    """Sequences in a batch, and how many tokens (S) and keys (T) every part of the run has."""

    batch: int
    parts: Sequence[Part]

    @classmethod
    def whole(cls, batch: int, length: int) -> Sizes:
        """Those of one forward run."""
        return cls(batch, parts_of(["fwd"], length))

    def of(self, tap: str) -> Part:
        """The part that a tap belongs to; gradients and updates are those of the forward run."""
        phase = tap.partition("/")[0]
        return next((p for p in self.parts if p.name == phase), self.parts[0])


def depth_of(tap: str) -> int:
    """How many tokens fewer than the part has a tap: k in MTP module k, which looks so far ahead."""
    unit = tap.split("/")[1]
    return int(unit.removeprefix("mtp")) if unit.startswith("mtp") else 0


def letters(c: Config, stage: Stage, tap: str, sizes: Sizes) -> dict[str, int]:
    """What every letter of a stage's shape stands for at a tap.

    F is the width of that feed-forward; M the dispatched rows, or where groups are meant the kept groups.
    """
    part, depth = sizes.of(tap), depth_of(tap)
    shared = c.moe_intermediate_size * c.n_shared_experts
    width = {"mlp": c.intermediate_size, "shared": shared}.get(stage.tap.partition(".")[0], c.moe_intermediate_size)
    here = part.length - (depth if "-k" not in stage.shape else 0)
    return {
        "B": sizes.batch,
        "S": here,
        "T": part.stop - depth,
        "D": c.hidden_size,
        "V": c.vocab_size,
        "H": c.num_attention_heads,
        "Dn": c.qk_nope_head_dim,
        "Dr": c.qk_rope_head_dim,
        "Dv": c.v_head_dim,
        "C": c.kv_lora_rank,
        "Q": c.q_lora_rank or c.hidden_size,
        "F": width,
        "E": c.n_routed_experts,
        "G": c.n_group,
        "K": c.num_experts_per_tok,
        "M": c.topk_group if stage.tap == "router.groups" else sizes.batch * here * c.num_experts_per_tok,
        "k": depth,
    }


def shape_of(call: Call, c: Config, sizes: Sizes) -> tuple[int, ...]:
    """The shape that the tap of a call has: "B S H Dn+Dr" with this config's numbers."""
    numbers = letters(c, call.of, call.tap, sizes)
    return tuple([size_of(axis, numbers) for axis in call.of.shape.split()])


def size_of(axis: str, numbers: Mapping[str, int]) -> int:
    """The length of one axis: a number, a letter, `2D`, two of them with + - * between; `/128` behind it: how many parts of 128,
    the last one ragged.
    """
    whole, _, part = axis.partition("/")
    found = _TERM.fullmatch(whole)
    assert found, f"axis {axis!r}"
    times, letter, sign, other = found.groups()
    value = int(times or 1) * (numbers[letter] if letter else 1)
    if sign is not None:
        operand = numbers[other] if other in numbers else int(other)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
    return -(-value // int(part)) if part else value
