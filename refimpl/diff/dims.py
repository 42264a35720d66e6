"""The axes of a tap: letters (README, Letters) turned into numbers for a config and a run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from refimpl.layers.config import Config
from refimpl.layers.stage import STAGES, Call

_TERM = re.compile(r"(\d+)?([A-Z][a-z]?)?(?:([+/-])(\w+))?")


def letters(c: Config, stage: str, *, batch: int, length: int, keys: int, depth: int = 0) -> dict[str, int]:
    """What every letter of a stage's shape stands for.  length and keys are S and T of the run; depth the MTP module, or 0.

    F is the width of that feed-forward; M the dispatched rows, or where groups are meant the kept groups.
    """
    shared = c.moe_intermediate_size * c.n_shared_experts
    width = {"mlp": c.intermediate_size, "shared": shared}.get(stage.partition(".")[0], c.moe_intermediate_size)
    here = length - depth if "-k" not in STAGES[stage].shape else length
    rows = batch * here * c.num_experts_per_tok
    return {
        "B": batch,
        "S": here,
        "T": keys - depth,
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
        "M": c.topk_group if stage == "router.groups" else rows,
        "k": depth,
    }


def shape_of(call: Call, c: Config, *, batch: int, length: int, keys: int | None = None) -> tuple[int, ...]:
    """The shape that the tap of a call has: "B S H Dn+Dr" with this config's numbers.  keys, T, defaults to length."""
    unit = call.tap.split("/")[1]
    depth = int(unit.removeprefix("mtp")) if unit.startswith("mtp") else 0
    numbers = letters(c, call.stage, batch=batch, length=length, keys=length if keys is None else keys, depth=depth)
    return tuple([size_of(axis, numbers) for axis in STAGES[call.stage].shape.split()])


def size_of(axis: str, numbers: Mapping[str, int]) -> int:
    """The length of one axis: a number, a letter, `2D`, or two of them with + - / between."""
    found = _TERM.fullmatch(axis)
    assert found, f"axis {axis!r}"
    times, letter, sign, other = found.groups()
    value = int(times or 1) * (numbers[letter] if letter else 1)
    if sign is None:
        return value
    operand = numbers[other] if other in numbers else int(other)
    return {"+": value + operand, "-": value - operand, "/": value // operand}[sign]
