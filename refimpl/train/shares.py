"""What a micro-batch carries of the loss of the whole batch, part by part.

The parts of the loss are means over different things, so a micro-batch's part counts with its share of just that:

| part | mean over | share of a micro-batch |
|---|---|---|
| main | labels that count | its labels / all labels |
| mtpK, `mtp_loss_mean` "length" (R eq 24) | the main labels too | the same |
| mtpK, "valid" | labels that count at depth K | its labels at depth K / all of them |
| balance (R eq 17) | sequences | its sequences / all sequences |

Weighting all parts by tokens, or averaging micro-batches, is right only where every micro-batch has equally many of
each: with padding or answers-only labels it is another loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE

Share = Mapping[str, float]
"""Part of the loss ("main", "mtp1", ..., "balance") -> how much of the whole batch's a micro-batch carries."""


def shares(c: Config, labels: Sequence[Array], depths: int) -> list[Share]:
    """The share of every micro-batch, whose labels (B, S) are given, of all of them together; `depths` MTP modules."""
    counts = [_counts(c, part, depths) for part in labels]
    whole = {name: max(sum([n[name] for n in counts]), 1) for name in counts[0]}
    return [{name: n[name] / whole[name] for name in n} for n in counts]


def _counts(c: Config, labels: Array, depths: int) -> dict[str, int]:
    at = [int(np.sum(labels[:, k + 1 :] != IGNORE)) for k in range(depths + 1)]
    own = c.dialect.mtp_loss_mean == "valid"
    return {"main": at[0]} | {f"mtp{k}": at[k if own else 0] for k in range(1, depths + 1)} | {"balance": len(labels)}


def part_of(name: str) -> str:
    """The part that a loss of the model belongs to: "loss.mtp1" -> "mtp1", "L3/loss.seq_aux" -> "balance"."""
    return "balance" if name.endswith("loss.seq_aux") else name.removeprefix("loss.")


def shared(total: Any, losses: Mapping[str, Any], share: Share, mtp_weight: float) -> Any:
    """What a micro-batch adds to the loss of the whole batch (): its `total`, or where the parts' shares differ its `losses`, each
    by its own.
    """
    return total * share["main"] if len(set(share.values())) == 1 else terms(losses, share, mtp_weight)


def terms(losses: Mapping[str, Any], share: Share, mtp_weight: float) -> Any:
    """The sum of `losses`, each by its own share; None without any."""
    heads = [name for name in losses if name.startswith("loss.mtp")]
    loss = None
    for name, part in losses.items():
        if name != "loss":
            term = part * (share[part_of(name)] * (mtp_weight / len(heads) if name in heads else 1.0))
            loss = term if loss is None else loss + term
    return loss
