"""The weights that a run begins with: new ones, or given ones (continual updates, fine-tuning), checked against the job's model.

Given are a checkpoint of weights (safetensors, whole or in shards, FP8 codes too), a training checkpoint, or a run, whose newest
checkpoint counts. Only weights and balancing biases are taken: moments, average, steps and the place in the data begin anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.autograd.errors import require, where
from refimpl.checkpoint import Checkpoint
from refimpl.layers.config import Config
from refimpl.model import expected_tensors
from refimpl.train.checkpoints import Saved
from refimpl.train.checkpoints.keeper import NAME
from refimpl.train.checkpoints.manifest import MANIFEST
from refimpl.train.checkpoints.serial import MASTER
from refimpl.train.training import init

from .job import Job

MAY_DIFFER = ("rope_scaling", "max_position_embeddings", "num_nextn_predict_layers")
"""Keys of a config that say nothing about what the weights of its layers mean: a longer context (R 4.3), MTP modules or none."""


def beginning(job: Job) -> dict[str, Array]:
    """float32 by checkpoint name. SpecError for weights of another config, missing ones, others than the model has, NaN."""
    c = job.model_after(0)
    if job.init is None:
        return init(c, seed=job.seed, std=job.run.optimizer.init_std)
    with where(f"while beginning from {job.init}"):
        config, given = _opened(job.init)
        if config is not None:
            _check(Config.from_dict(config), c)
        return _taken(given, c)


def _opened(path: Path) -> tuple[Mapping[str, Any] | None, Mapping[str, Array]]:
    """What it says of its config, if it does, and its weights by checkpoint name."""
    if (path / "checkpoints").is_dir():
        steps = sorted([p for p in (path / "checkpoints").iterdir() if NAME.fullmatch(p.name)])
        require(steps, "the run has no checkpoint yet")
        path = steps[-1]
    if (path / MANIFEST).is_file():
        saved = Saved(path)
        return saved.facts.get("config"), saved.tensors(MASTER)
    found = Checkpoint.open(path)
    return found.config, found


def _check(theirs: Config, c: Config) -> None:
    was, now = theirs.to_dict(), c.to_dict()
    other = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key) and key not in MAY_DIFFER]
    said = "; ".join([f"{key} is {was.get(key)!r:.60} there, {now.get(key)!r:.60} in [model]" for key in other[:5]])
    require(not other, f"weights of another config: {said}")


def _taken(given: Mapping[str, Array], c: Config) -> dict[str, Array]:
    shapes = expected_tensors(c)
    missing = [name for name in shapes if name not in given]
    modules = any(_beyond(name, c) for name in missing)
    hint = "; a model without MTP modules has num_nextn_predict_layers = 0 in [model]" if modules else ""
    require(not missing, f"{len(missing)} weights of the model are not there, the first {missing[:1]}{hint}")
    extra = [name for name in given if name not in shapes and not _left_out(name, c)]
    require(not extra, f"{len(extra)} weights are not the model's, the first {extra[:1]}")
    found = {name: np.array(given[name], np.float32) for name in shapes}
    for name, w in found.items():
        require(w.shape == shapes[name], f"{name} has shape {list(w.shape)}; the model's has {list(shapes[name])}")
        require(np.isfinite(w).all(), f"{name} holds NaN or infinity")
    return found


def _left_out(name: str, c: Config) -> bool:
    """MTP modules that are not trained, their copies of embedding and head, a head that is the embedding."""
    return _beyond(name, c) or (c.tie_word_embeddings and name == "lm_head.weight")


def _beyond(name: str, c: Config) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= c.num_hidden_layers
