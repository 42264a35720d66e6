"""The runs of docs/learning.md: the main one, and short ones that each change one thing, as recipe documents.

All come from `novels.toml`. A short run is that recipe scaled to fewer tokens, every piece of its curves with the same share of the
run; a variant changes what its name says and nothing else; the seed decides the first weights and the order of the data.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.autograd.errors import require
from refimpl.train.recipe import read, scaled
from refimpl.train.recipe.reading import JOB

HERE = Path(__file__).parent
RECIPE = HERE / "novels.toml"
SHORT = 81_920
"""Tokens of a short run."""
SEEDS = (0, 1, 2)


class Variant(NamedTuple):
    """What it is, in words; what it changes in the tables of the recipe."""

    what: str
    changes: Mapping[str, Mapping[str, Any]] = {}


VARIANTS = {
    "v3": Variant("as V3: bias and a little balance loss, MTP, BF16"),
    "no-balance": Variant("no bias, no balance loss", {"phase": {"gamma": 0, "aux_weight": 0}}),
    "aux-loss": Variant("no bias, balance loss with alpha 0.01", {"phase": {"gamma": 0, "aux_weight": 0.01}}),
    "no-mtp": Variant("no MTP module", {"model": {"num_nextn_predict_layers": 0}, "phase": {"mtp_weight": 0}}),
    "fp8": Variant("products in FP8", {"optimizer": {"precision": "fp8"}}),
}


def document(name: str) -> dict[str, Any]:
    """The recipe of a run: `main`, or VARIANT-SEED. Its paths are absolute. SpecError for another name."""
    variant, _, seed = name.rpartition("-")
    known = name == "main" or (variant in VARIANTS and seed.isdigit())
    require(known, f"run {name!r}; known: main, or a variant and a seed as in v3-0; variants: {', '.join(VARIANTS)}")
    d = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    d["data"] |= {key: str(HERE / d["data"][key]) for key in ("shards", "tokenizer")}
    d["evaluation"] |= {"shards": str(HERE / d["evaluation"]["shards"])}
    return d if name == "main" else _short(d, VARIANTS[variant], int(seed))


def _short(d: dict[str, Any], variant: Variant, seed: int) -> dict[str, Any]:
    job = {key: d.pop(key) for key in JOB if key in d and key != "samples"}
    d.pop("samples")
    d = scaled(read(d), tokens=SHORT) | job
    d |= {"train": job["train"] | {"seed": seed}, "checkpoints": {"every": 100, "last": 1}}
    d["evaluation"] |= {"every": 10_000}  # at the end
    for table, changes in variant.changes.items():
        d[table] = [p | changes for p in d[table]] if table == "phase" else d[table] | changes
    return d


def names() -> list[str]:
    """Every run: the main one, then the short ones, a seed of every variant after the other."""
    return ["main", *[f"{variant}-{seed}" for seed in SEEDS for variant in VARIANTS]]
