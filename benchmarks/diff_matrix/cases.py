"""The cases of the matrix: small models in which different mistakes show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import write_file
from refimpl.layers.config import Config
from refimpl.layers.presets import PRESETS
from refimpl.layers.rope import RopeScaling
from refimpl.record.make_case import draw_tokens, draw_weights

BATCH, LENGTH = 2, 24
MARGINS = (0.1, 0.05, 0.02, 0.01)
"""By which every routing decision is won: the first of these that can be met."""
Weights = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Changes of preset tiny, of its weights, and the position of the first token."""

    change: dict[str, Any]
    edit: Callable[[Weights], None] = lambda weights: None
    first: int = 0


def _negative(weights: Weights) -> None:
    """Every biased score is below 0, so that a mask of 0 wins."""
    for name in weights:
        if name.endswith("e_score_correction_bias"):
            weights[name] = (-1.25 - np.abs(weights[name])).astype(np.float32)


def _faint(weights: Weights) -> None:
    """A channel that is large in every token pushes all router logits to about -45, and latents have a size of 0.01."""
    for name, w in weights.items():
        x = w.astype(np.float32)
        if name.endswith("embed_tokens.weight"):
            x[:, 0] = 30
        elif name.endswith("mlp.gate.weight"):
            x[:, 0] = -7
        elif name.endswith("post_attention_layernorm.weight"):
            x[0] = 1
        elif name.endswith("e_score_correction_bias"):  # it alone chooses: well apart, differently in every layer
            x = np.random.default_rng(len(x) + int(name.split(".")[2])).permutation(len(x)).astype(np.float32) / 16
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            x[:-8] *= 2**-6
        elif name.endswith("q_a_proj.weight"):
            x *= 2**-6
        weights[name] = x.astype(ml_dtypes.bfloat16).astype(w.dtype)


VARIANTS = {
    "tiny": Variant({}),
    "full-rank-q": Variant({"q_lora_rank": None}),
    "one-group": Variant({"n_group": 1, "topk_group": 1}),
    "no-yarn": Variant({"rope_scaling": None}),
    "negative": Variant({}, _negative),
    "faint": Variant({}, _faint),
    "far": Variant(
        {"rope_scaling": RopeScaling(mscale=0.707, mscale_all_dim=1.3), "norm_topk_prob": False}, first=5003
    ),
}


def make(folder: Path, name: str, seed: int) -> Path:
    """Write the case of a variant and a seed, unless it is there. -> the folder."""
    if (folder / "tokens.json").exists():
        return folder
    variant = VARIANTS[name]
    config = PRESETS["tiny"].replace(num_nextn_predict_layers=0, **variant.change)
    weights = draw_weights(config, seed)
    variant.edit(weights)
    run: dict[str, Any] = {"tokens": _tokens(config, weights, seed)}
    if variant.first:
        run["positions"] = [[variant.first + i for i in range(LENGTH)]] * BATCH
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "weights.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokens.json").write_text(json.dumps(run))
    return folder


def _tokens(config: Config, weights: Weights, seed: int) -> list[list[int]]:
    for margin in MARGINS[:-1]:
        try:
            return draw_tokens(config, weights, seed, batch=BATCH, length=LENGTH, margin=margin)
        except SpecError:
            continue
    return draw_tokens(config, weights, seed, batch=BATCH, length=LENGTH, margin=MARGINS[-1])
