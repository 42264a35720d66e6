"""A new case: random weights that let mistakes show, and tokens whose routing no rounding can change."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

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

_CANDIDATES = 32


def new_case(
    folder: str | Path,
    config: Config,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 24,
    margin: float = 0.02,
    mtp: bool = False,
) -> Path:
    """Write config.json, weights.safetensors and tokens.json; the same seed writes the same files. -> the folder.

    Tokens are drawn for routing decisions that are won clearly, by `margin` in score or more (0.1 is usual for preset
    tiny, whose scores move by 0.06 in bfloat16): an implementation with other roundings makes the same ones, and is
    compared number by number. MTP layers are written only with `mtp`. Raises SpecError where the margin is not met.
    """
    folder = Path(folder)
    config = config if mtp else config.replace(num_nextn_predict_layers=0)
    weights = draw_weights(config, seed)
    tokens = draw_tokens(config, weights, seed, batch=batch, length=length, margin=margin)
    folder.mkdir(parents=True, exist_ok=True)
    with Transaction() as files:
        write_into(files, folder / "weights.safetensors", weights)
        for name, content in (("config.json", config.to_dict()), ("tokens.json", {"tokens": tokens})):
            with files.new(folder / name) as f:
                f.write(_json(content).encode())
    return folder


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
    rng = np.random.default_rng([seed, zlib.crc32(b"tokens")])
    impl = Impl(precision="float32").load(config, weights)
    rows: list[list[int]] = [[] for _ in range(batch)]
    for row in rows:
        for _ in range(length):
            some = rng.permutation(config.vocab_size)[:_CANDIDATES]
            won = _margins_of(config, impl, np.array([[*row, t] for t in some]))
            require(won.max() >= margin, f"no margin of {margin} after {len(row)} tokens; the best is {won.max():.1e}")
            row.append(int(some[won.argmax()]))
    return rows


def _margins_of(config: Config, impl: Impl, rows: Array) -> Array:
    if not any(config.is_moe(i) for i in range(config.num_hidden_layers)):
        return np.full(len(rows), np.inf)
    return margins(impl.forward(rows, taps=["L*/router.*"]), config)[:, -1]


def margins(taps: Mapping[str, Array], config: Config) -> Array:
    """The score by which the closest routing decision of each token was won, over all layers -> (B, S).

    In each layer the least of two gaps: between the last chosen and the first rejected expert of the kept groups, and
    between the last kept and the first dropped group. Infinite where nothing was rejected. Needs the taps `L*/router.*`.
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
    return np.min(found, axis=0)


def _gap(scores: Array, k: int) -> Array:
    """The k-th largest minus the next; infinite if there is none.  scores (..., N) -> (...)."""
    falling = -np.sort(-scores, axis=-1)
    return falling[..., k - 1] - falling[..., k] if k < scores.shape[-1] else np.full(scores.shape[:-1], np.inf)
