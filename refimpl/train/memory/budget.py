"""A budget in bytes that picks what to keep: the policy with the least recomputation whose predicted peak fits.

What articles about this model call adaptive checkpointing. Cost is counted in FLOP of what is run twice, so the choice is
the same on every machine. Layers of one kind (dense, experts) differ only in when they come: the early ones are remembered
least, since what they keep lives longest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from refimpl.autograd import require
from refimpl.layers.config import Config
from refimpl.parallel_emulation.cost.layer_cost import attention_parameters, core_flop, mlp_flop

from .policies import Mode, Policy, Segment
from .predict import Probe, peak

MODES: tuple[Mode, ...] = ("again", "report", "keep")
"""From the least kept to the most."""
ENDS: tuple[Mode, ...] = ("keep", "report")


def plan(probe: Probe, budget: int) -> Policy:
    """The cheapest policy of single layers that stays within `budget` bytes. SpecError if none does, with the least there is.

    Of equally cheap ones the one with the smallest peak.
    """
    found = min(
        ((cost(probe, policy), peak(probe, policy), i, policy) for i, policy in enumerate(candidates(probe.c))),
        key=lambda candidate: (candidate[1] > budget, candidate[0] if candidate[1] <= budget else 0, *candidate[1:3]),
    )
    require(
        found[1] <= budget,
        f"a budget of {budget} bytes; the least that any policy of single layers needs is {found[1]}",
    )
    return found[3]


def candidates(c: Config) -> Iterator[Policy]:
    """For each kind of layer every number of layers in each mode, the least kept first; the ends kept, or not."""
    dense, experts = ([i for i in range(c.num_hidden_layers) if c.is_moe(i) == moe] for moe in (False, True))
    for first, then in itertools.product(_splits(len(dense)), _splits(len(experts))):
        modes = dict(zip(dense, first, strict=True)) | dict(zip(experts, then, strict=True))
        segments = tuple([Segment(i, i + 1, modes[i]) for i in range(c.num_hidden_layers)])
        yield from [Policy(segments, ends) for ends in ENDS]


def _splits(n: int) -> list[list[Mode]]:
    """n layers in three runs, one per mode, of any lengths."""
    again, report, keep = ([mode] for mode in MODES)
    return [again * a + report * b + keep * (n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]


def cost(probe: Probe, policy: Policy) -> float:
    """FLOP of what a policy runs a second time."""
    tokens = probe.batch * probe.length
    total = 0.0 if policy.ends == "keep" else tokens * _ends(probe.c)
    for s in policy.segments:
        total += sum([tokens * _flop(probe.c, i, probe.length, s.mode) for i in range(s.first, s.stop)])
    return total


def _flop(c: Config, layer: int, length: int, mode: Mode) -> float:
    """FLOP per token of running a layer again in a mode; 10 per element for norms and activations."""
    moe = c.is_moe(layer)
    if mode == "keep":
        return 0.0
    if mode == "again":
        return 2.0 * attention_parameters(c) + core_flop(c, length) + mlp_flop(c, moe=moe)
    width = (c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size if moe else c.intermediate_size
    return _up_projections(c) + core_flop(c, length) + 10.0 * (2 * c.hidden_size + width)


def _up_projections(c: Config) -> float:
    """q from its latent (or from x), keys and values from theirs."""
    q = (c.q_lora_rank or c.hidden_size) * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    return 2.0 * c.num_attention_heads * (q + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim))


def _ends(c: Config) -> float:
    """The final norm, and what mode `report` runs again of each MTP module."""
    extra = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    return 10.0 * c.hidden_size + sum([_flop(c, i, c.max_position_embeddings, "report") for i in extra])
