"""A new case: random weights that let mistakes show, and tokens whose routing no rounding can change."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction
from refimpl.checkpoint.names import BIAS
from refimpl.checkpoint.safetensors import write_into
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import to_bf16
from refimpl.model import Impl, expected_tensors

from .candidate import written
from .drafts import Draft, Goal
from .regimes import named


def new_case(
    folder: str | Path,
    config: Config,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 24,
    margin: float | None = None,
    mtp: bool = False,
    regimes: str = "",
    ids: Array | None = None,
    quantised: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json, weights.safetensors and tokens.json; the same seed writes the same files. -> the folder.

    Tokens are drawn for routing decisions that are won clearly, by `margin` in score or more (0.1 is usual for preset
    tiny, whose scores move by 0.06 in bfloat16; by default 0.04 of the mean score): an implementation with other
    roundings makes the same ones, and is compared number by number. MTP layers are written only with `mtp`. `regimes`,
    ids with commas between, make what is rare (`regimes.REGIMES`). Tokens are among `ids`, or any. `quantised` is a config.json's
    quantization_config: weights are FP8 codes in its blocks, with its scales. Raises SpecError where the margin is not met, and for
    regimes that cannot be.
    """
    folder, chosen = Path(folder), named(f"{regimes},fp8-weights" if quantised else regimes)
    config = config if mtp else config.replace(num_nextn_predict_layers=0)
    for regime in chosen:
        config = regime.applied(config)
    draft = Draft(config, draw_weights(config, seed), np.random.default_rng(seed), batch, length, ids=ids)
    draft.written |= {"quantization_config": dict(quantised)} if quantised else {}
    for regime in chosen:
        draft.rng = np.random.default_rng([seed, zlib.crc32(regime.id.encode())])
        regime.change(draft)
    run: dict[str, Any] = {"tokens": _draw(draft, seed, 0.04 * _mean_score(config) if margin is None else margin)}
    run |= {n: a.tolist() for n, a in (("positions", draft.positions), ("valid", draft.valid)) if a is not None}
    run |= {"regimes": [r.id for r in chosen]} if chosen else {}
    _write(folder, draft, run)
    return folder


def _write(folder: Path, draft: Draft, run: Mapping[str, Any]) -> None:
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Transaction() as files:
        write_into(files, folder / "weights.safetensors", draft.weights)
        for name, content in (("config.json", draft.config.to_dict() | draft.written), ("tokens.json", run)):
            with files.new(folder / name) as f:
                f.write(_json(content).encode())


def _mean_score(c: Config) -> float:
    """A sigmoid is about 1/2, a softmax over E experts 1/E."""
    return 0.5 if c.scoring_func == "sigmoid" else 1 / max(c.n_routed_experts, 1)


def _json(content: Mapping[str, object]) -> str:
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def draw_weights(config: Config, seed: int) -> dict[str, Array]:
    """Checkpoint name -> bfloat16 array; the selection bias is float32, as released, with bfloat16 values.

    Large on purpose: with the usual spread of 0.02 most mistakes stay below every tolerance. Matrices 1.3/sqrt(fan-in),
    norms 1 with spread 0.2, router 0.25, selection bias 0.15 of both signs, other biases 0.3, embedding 1.
    """
    found = {}
    for name, shape in expected_tensors(config, mtp=config.num_nextn_predict_layers > 0).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])  # a tensor of its own, whatever comes before
        x = to_bf16((_center(name) + _spread(name, shape) * rng.standard_normal(shape)).astype(np.float32))
        found[name] = x if name.endswith(BIAS) else x.astype(ml_dtypes.bfloat16)
    return found


def _center(name: str) -> float:
    return 1.0 if name.endswith("norm.weight") else 0.0


def _spread(name: str, shape: tuple[int, ...]) -> float:
    fixed = {"norm.weight": 0.2, "mlp.gate.weight": 0.25, BIAS: 0.15, ".bias": 0.3, "embed_tokens.weight": 1.0}
    return next((s for ending, s in fixed.items() if name.endswith(ending)), float(1.3 / np.sqrt(shape[-1])))


def draw_tokens(
    config: Config, weights: Mapping[str, Array], seed: int, *, batch: int, length: int, margin: float
) -> list[list[int]]:
    """Tokens (batch, length), each of 32 random ones that whose routing decisions are won most clearly.

    Attention is causal, so what comes later cannot take a decision back. Raises SpecError below `margin`.
    """
    return _draw(Draft(config, dict(weights), np.random.default_rng(seed), batch, length), seed, margin)


def _draw(d: Draft, seed: int, margin: float) -> list[list[int]]:
    """Tokens (batch, length), each of some random ones that which reaches the draft's goal best; SpecError if none does."""
    rng = np.random.default_rng([seed, zlib.crc32(b"tokens")])
    impl = Impl(precision="float32").load(d.config.to_dict() | d.written, d.weights)
    rows: list[list[int]] = [[] for _ in range(d.batch)]
    for b, row in enumerate(rows):
        for place in range(d.length):
            some = rng.permutation(d.config.vocab_size)
            some = some if d.ids is None else some[np.isin(some, d.ids)]
            some = some[some % d.kinds == place % d.kinds][: d.goal.among]
            reached = d.goal.reach(_gaps_of(d, impl, b, np.array([[*row, t] for t in some])))
            row.append(int(some[_best(reached, d.goal, margin, place)]))
    return rows


def _best(reached: Array, goal: Goal, margin: float, place: int) -> int:
    least, best = margin if goal.least is None else goal.least, reached.max()
    require(best >= least, f"no {goal.name} of {abs(least)} after {place} tokens; the best is {abs(best):.1e}")
    return int(reached.argmax())


def _gaps_of(d: Draft, impl: Impl, b: int, rows: Array) -> Array:
    """The gaps of the last token's decisions, of several continuations of sequence b.  rows (N, s) -> (N, decisions)."""
    if not any(d.config.is_moe(i) for i in range(d.config.num_hidden_layers)):
        return np.full((len(rows), 1), np.inf)
    given = {n: _repeated(a, b, rows) for n, a in (("positions", d.positions), ("valid", d.valid)) if a is not None}
    taps = impl.forward(rows, taps=["L*/router.*"], **given)
    return np.stack(decisions(taps, d.config), axis=-1)[:, -1]


def _repeated(a: Array, b: int, rows: Array) -> Array:
    return np.broadcast_to(a[b, : rows.shape[1]], rows.shape)


def margins(taps: Mapping[str, Array], config: Config) -> Array:
    """The score by which the closest routing decision of each token was won, over all layers -> (B, S).

    Infinite where nothing was rejected. Needs the taps `L*/router.*`.
    """
    return np.min(decisions(taps, config), axis=0)


def decisions(taps: Mapping[str, Array], config: Config) -> list[Array]:
    """The gap of every routing decision of each token, (B, S) each: in each layer the one between the last chosen and the first
    rejected expert of the kept groups, and the one between the last kept and the first dropped group.
    """
    found = []
    for at in sorted({t.rpartition("/")[0] for t in taps if t.endswith("/router.ids")}):
        choice = taps.get(f"{at}/router.choice", taps[f"{at}/router.scores"])  # V2 chooses by the scores themselves
        if f"{at}/router.groups" in taps:
            kept = taps[f"{at}/router.groups"]
            found.append(_gap(taps[f"{at}/router.group_scores"], config.topk_group))
            inside = (np.arange(config.n_group) == kept[..., None]).any(axis=-2)
            choice = np.where(np.repeat(inside, config.n_routed_experts // config.n_group, axis=-1), choice, -np.inf)
        found.append(_gap(choice, config.num_experts_per_tok))
    return found


def _gap(scores: Array, k: int) -> Array:
    """The k-th largest minus the next; infinite if there is none.  scores (..., N) -> (...)."""
    falling = -np.sort(-scores, axis=-1)
    return falling[..., k - 1] - falling[..., k] if k < scores.shape[-1] else np.full(scores.shape[:-1], np.inf)
