"""How a deployment is laid out: the ranks of the prefill unit, then those of the decode unit (R 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.autograd.errors import require
from refimpl.parallel_emulation.axes.expert_wire import OWN, Recipe, Wire

from .experts import IN_ORDER
from .kv import KVFormat


@dataclass(frozen=True)
class Deployment:
    """Prefill: `dp` groups of `tp` ranks, attention tensor and sequence parallel in each, experts over them all. Decode: `decode`
    ranks, each with requests of its own, experts over them all. V3's: tp 4, dp 8, then 320 (R 3.4.1, 3.4.2).

    `slots`: experts with replicas that a unit holds, by default as few as its ranks need. `active`: how many of a rank's run in
    a step. `replan`: decode steps after which EPLB plans anew, 0 for never. `overlap`: two micro-batches take turns.
    """

    tp: int = 4
    dp: int = 1
    decode: int = 4
    prefill_slots: int = 0
    decode_slots: int = 0
    prefill_active: int | None = None
    decode_active: int | None = None
    kv: KVFormat = "own"
    replan: int = 0
    overlap: bool = True
    recipe: Recipe = IN_ORDER
    wire: Wire = OWN

    def __post_init__(self) -> None:
        require(min(self.tp, self.dp, self.decode) >= 1, f"tp {self.tp}, dp {self.dp}, decode {self.decode} ranks")
        require(min(self.prefill_slots, self.decode_slots, self.replan) >= 0, "slots and replan must not be negative")
        require(self.kv in ("own", "bf16", "fp8"), f"the KV transfer is in 'own', 'bf16' or 'fp8', not {self.kv!r}")

    @property
    def prefill(self) -> int:
        """Ranks of the prefill unit."""
        return self.tp * self.dp

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.prefill + self.decode

    def slots(self, experts: int, *, decode: bool) -> int:
        """Slots of a unit: as given, or the fewest that its ranks share evenly."""
        given, ranks = (self.decode_slots, self.decode) if decode else (self.prefill_slots, self.prefill)
        return given or -(-experts // ranks) * ranks

    def sources(self, request: int) -> list[int]:
        """The ranks that read a request's prompt, in tp order: the groups take turns."""
        group = request % self.dp
        return list(range(group * self.tp, (group + 1) * self.tp))

    def target(self, request: int) -> int:
        """The rank that decodes it."""
        return self.prefill + request % self.decode
