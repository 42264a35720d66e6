"""Regimes: what a case must have for a mistake to show that a plain one hides, as changes of config, weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations

from refimpl.autograd.errors import SpecError, require, where
from refimpl.diff.corpus import MUTANTS, NOT_STAGES
from refimpl.layers.config import Config

from . import excite
from .drafts import Draft


def _same(c: Config) -> Config:
    return c


def _nothing(d: Draft) -> None:
    pass


Need = tuple[Callable[[Config], bool], str]
"""What a config must have, in words."""
_ANY: Need = (lambda c: True, "")
_EXPERTS: Need = (lambda c: c.n_routed_experts > 0, "routed experts")
_BIAS: Need = (lambda c: c.n_routed_experts > 0 and c.topk_method == "noaux_tc", "the selection bias (noaux_tc)")
_YARN: Need = (lambda c: c.rope_scaling is not None and c.rope_scaling.factor > 1, "YaRN")


@dataclass(frozen=True)
class Regime:
    """id; `does`, what the case then has; `shows`, families of the corpus that a plain case hides; `sets`, what it decides, which
    no other regime then can; `config` and `change`, how; `needs`, without which it is refused.
    """

    id: str
    does: str
    shows: tuple[str, ...]
    sets: str
    config: Callable[[Config], Config] = _same
    change: Callable[[Draft], None] = _nothing
    needs: Need = _ANY

    def applied(self, c: Config) -> Config:
        """The config in this regime; SpecError if it cannot be."""
        with where(f"in regime {self.id}"):
            has, what = self.needs
            require(has(c), f"it is about {what}, and this config has none")
            return self.config(c)


REGIMES: dict[str, Regime] = {
    r.id: r
    for r in (
        Regime(
            "one-group",
            "n_group and topk_group are 1",
            ("R15b",),
            "groups",
            lambda c: c.replace(n_group=1, topk_group=1),
            needs=_EXPERTS,
        ),
        Regime(
            "no-groups",
            "n_group and topk_group are null in config.json",
            ("R15b",),
            "groups",
            lambda c: c.replace(n_group=1, topk_group=1),
            lambda d: d.written.update(n_group=None, topk_group=None),
            needs=_EXPERTS,
        ),
        Regime(
            "raw-weights",
            "norm_topk_prob is false: the chosen experts' scores are not renormalised",
            ("R07b", "R08"),
            "norm_topk_prob",
            lambda c: c.replace(norm_topk_prob=False),
            needs=_EXPERTS,
        ),
        Regime(
            "scaling-1",
            "routed_scaling_factor is 1",
            ("X07",),
            "routed_scaling_factor",
            lambda c: c.replace(routed_scaling_factor=1.0),
            needs=_EXPERTS,
        ),
        Regime(
            "full-rank-q",
            "q_lora_rank is null: queries have no latent",
            ("A13d",),
            "q_lora_rank",
            lambda c: c.replace(q_lora_rank=None),
        ),
        Regime(
            "mscale",
            "mscale 0.707 and mscale_all_dim 1.3: their ratio multiplies cos and sin",
            ("A05b", "A06b", "A06c", "A11c"),
            "mscale",
            excite.unequal_mscale,
            needs=_YARN,
        ),
        Regime(
            "mtp-2",
            "two MTP modules, one behind the other",
            ("T08b",),
            "num_nextn_predict_layers",
            lambda c: c.replace(num_nextn_predict_layers=2),
        ),
        Regime(
            "ragged-128",
            "128 divides no size; most are above it, kv_a_proj has 129 rows; with fp8-weights, blocks that are cut off",
            ("X50", "F01", "F02", "F03", "F04"),
            "sizes",
            excite.ragged,
        ),
        Regime(
            "bias-positive",
            "every selection bias is 8 or more, far above any score, and a float32 number",
            ("R05", "R14"),
            "bias",
            change=excite.positive_bias,
            needs=_BIAS,
        ),
        Regime(
            "bias-negative",
            "every selection bias is below -1, so every biased score below 0",
            ("R02",),
            "bias",
            change=excite.negative_bias,
            needs=_BIAS,
        ),
        Regime(
            "near-ties",
            "each token's closest decision is won by 1e-5 to 5e-3, mostly below 1e-3, in float32; biases are float32 numbers",
            ("R05", "R06"),
            "closeness",
            change=excite.near_ties,
            needs=_BIAS,
        ),
        Regime(
            "ties",
            "each token's closest decision is an exact tie, of two equal experts or groups of equal experts",
            ("X06",),
            "closeness router",
            change=excite.ties,
            needs=_EXPERTS,
        ),
        Regime(
            "extreme-logits",
            "router logits as usual, about -10 to -50, below -110 and above 90, token by token; biases of 12 and more decide there",
            ("R12", "R13", "R13b", "R14"),
            "closeness router bias stream",
            change=excite.extreme_logits,
            needs=_BIAS,
        ),
        Regime(
            "small-latents",
            "latents of queries and keys have a size of about 0.005 before their norms, where eps counts",
            ("A12-q_a_norm-1e-05", "A12-c_kv-1e-05", "A12-q_a_norm-1e-12", "A12-c_kv-1e-12"),
            "latents",
            change=excite.small_latents,
        ),
        Regime(
            "eps",
            "rms_norm_eps is 1e-5 and embeddings are so small that it exceeds their mean square",
            ("N01-attn_norm-1e-06", "N01-ffn_norm-1e-06", "N01-final_norm-1e-06", "N01-all-1e-06"),
            "stream",
            lambda c: c.replace(rms_norm_eps=excite.EPS),
            excite.small_stream,
        ),
        Regime(
            "padding",
            "sequences of unequal lengths: the first is padded in front, the second behind",
            ("A17g", "X24"),
            "valid",
            change=excite.padding,
        ),
        Regime(
            "offset",
            "positions start at 37 in the first sequence, at 74 in the second, and so on",
            ("X24",),
            "positions",
            change=excite.offset,
        ),
        Regime(
            "long-positions",
            "positions run across the original length, and in other sequences from 257 to the last one there is",
            ("A14", "X24"),
            "positions",
            change=excite.long_positions,
        ),
        Regime(
            "fp8-weights",
            "projections are stored as E4M3 codes with a float32 scale a block of 128 x 128, as released",
            ("F05", "F10"),
            "storage",
            change=excite.fp8_weights,
        ),
    )
}
"""id -> regime, in the order in which they are applied: config, weights, inputs, storage."""

NOT_REGIMES: dict[str, str] = {
    "biases of both signs; scaling 2.5; four groups of which two; positions from 0; one dense layer": "the plain case has them",
    "n_group 2 or 8": "--config; shows what four groups show (R03, R04c)",
    "groups of one expert": "refused by the config: a group's score is the sum of its two best experts",
    "topk_group = n_group, num_experts_per_tok = n_routed_experts": "hides R02, R03, R04c and R15, and shows nothing else",
    "first_k_dense_replace 0 or 3": "--config; R11, their row, is a float16 overflow and shows as a factor in any dense layer",
    "YaRN's factor 1": "equals no YaRN; hides A04 to A11",
    "1 or 2 tokens": "show less; A19 is about a phase",
    "chunked prefill, decoding, absorbed = expanded, MTP on = off (A18-A22, T07)": "phases of a run, not inputs",
    "FP8 activations: zero groups, subnormals, amax at 448, scales at powers of two (F08, F09, F11-F15)": (
        "numbers inside a kernel: spec_tests/r3_3_fp8 gives them to the quantisers"
    ),
    "caches in FP8 (A21)": "a cache is part of decoding",
    "MTP depth 0 and 1": "without and with --mtp",
    "ignored labels (T05, T06), recomputation, micro-batches, capacity (L01-L08)": "a case is no training step",
    "renamed, transposed, permuted, missing, extra tensors (R17, R18)": "what a loader does to any case: the weights gate",
    "other block sizes, scales that are powers of two (F07, F09)": "refimpl.checkpoint.save writes such weights",
}
"""What else the corpus needs -> why it is no regime of a case, or where it is."""


def named(text: str) -> tuple[Regime, ...]:
    """The regimes of ids with commas between, in the order of REGIMES. SpecError for unknown and for contradictory ones."""
    ids = [i.strip() for i in text.split(",") if i.strip()]
    for i in ids:
        if i not in REGIMES:
            near = get_close_matches(i, REGIMES, 1)
            raise SpecError(
                f"regime {i!r}{f'; did you mean {near[0]!r}?' if near else ''}\n  known: {', '.join(REGIMES)}"
            )
    chosen = tuple([r for r in REGIMES.values() if r.id in ids])
    for a, b in combinations(chosen, 2):
        both = set(a.sets.split()) & set(b.sets.split())
        require(not both, f"regimes {a.id} and {b.id} contradict each other: both decide {', '.join(sorted(both))}")
    return chosen


def listing() -> Iterable[str]:
    """Lines: every regime with what the case then has and what that makes visible; then what is no regime, and why."""
    for r in REGIMES.values():
        yield f"{r.id:<16}{r.does}"
        for mistake, ids in _mistakes(r).items():
            yield f"{'':<16}  shows {', '.join(ids)}: {mistake}"
    yield "\nno regimes:"
    for what, why in NOT_REGIMES.items():
        yield f"  {what}\n      {why}"


def _mistakes(r: Regime) -> dict[str, list[str]]:
    """What is wrong, in the words of the corpus -> ids."""
    found: dict[str, list[str]] = {}
    for id in r.shows:
        titles = [m.title for m in MUTANTS.values() if m.id == id or m.id.startswith(f"{id}-")]
        found.setdefault(titles[0] if titles else NOT_STAGES[id].partition(":")[0], []).append(id)
    return found
