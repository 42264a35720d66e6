"""Small training jobs on shards of their own: a byte-level V3 with MTP and three schedules that move."""

from dataclasses import replace

from refimpl.layers.presets import TINY
from refimpl.train.data import Bytes, build
from refimpl.train.data.building import Build
from refimpl.train.recipe import read
from refimpl.train.run import Checkpoints, Job, Log

CONFIG = TINY.replace(
    vocab_size=262,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
)
STEPS = 6
LENGTH, BATCH = 12, 4


def recipe(precision="bf16", **optimizer):
    """Six steps of warm-up and decay; gamma and lambda change on the way."""
    return {
        "name": "six steps",
        "origin": "a test",
        "ema": 0.9,
        "optimizer": {"precision": precision, "init_std": 0.1} | optimizer,
        "phase": [
            {
                "name": "only",
                "steps": STEPS,
                "sequence": LENGTH,
                "batch": BATCH,
                "lr": [{"from": 1e-3, "to": 3e-3, "steps": 2}, {"to": 1e-3, "shape": "cosine"}],
                "gamma": [{"value": 0.01, "share": 0.5}, {"value": 0.0}],
                "mtp_weight": [{"value": 0.3, "share": 0.5}, {"value": 0.1}],
                "aux_weight": 1e-2,
            }
        ],
    }


TEXT = "".join([f"{i} times {i} is {i * i}.\n" for i in range(40)])


def shards(folder, text=TEXT, length=LENGTH, packing="concatenate"):
    """Shards of a text of bytes; every document a line, so best-fit leaves padding."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text)
    list(build(folder / "shards", [folder / "text.txt"], Bytes(), Build(length, packing, split="line")))
    return folder / "shards"


def job(path, **changes):
    """The job on shards at `path`, saved every second step."""
    found = Job(CONFIG, read(recipe()), {"only": path}, seed=3, checkpoints=Checkpoints(2), log=Log(peak=1e9))
    return replace(found, **changes)
