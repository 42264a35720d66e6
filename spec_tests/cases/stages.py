"""Three stages in one small job: pre-training, twice the context under YaRN, two tasks at once."""

import json
from dataclasses import replace

from refimpl.spec_tests.cases import runs
from refimpl.train.recipe import read
from refimpl.train.run import Checkpoints, Job, Log

LENGTH = 24
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12, "beta_fast": 32, "beta_slow": 1}
TASKS = [
    {"name": "square", "prefix": "sq ", "share": 2},
    {"name": "grade", "prefix": "gr ", "loss": "regression", "share": 1},
]


def recipe(weighting=None, tasks=TASKS, **phase):
    """Two steps, one step, three steps; `phase`: what the last phase has otherwise."""
    first = {
        "name": "pre-training",
        "steps": 2,
        "sequence": 12,
        "batch": 4,
        "lr": 3e-3,
        "mtp_weight": 0.3,
        "gamma": 0.01,
    }
    first |= {"config": {"rope_scaling": {"type": "default"}}}
    longer = {"name": "longer", "steps": 1, "sequence": LENGTH, "batch": 2, "lr": 1e-3, "mtp_weight": 0.1}
    last = {"name": "tasks", "steps": 3, "sequence": LENGTH, "batch": 6, "lr": 3e-3, "mtp_weight": 0.1, "masked": True}
    last |= {"task": tasks, "weighting": weighting or {"by": "uncertainty"}} | phase
    changes = {"config": {"rope_scaling": YARN}}
    optimizer = {"precision": "bf16", "init_std": 0.1}
    phases = [first, longer | changes, last | changes]
    return {"name": "stages", "origin": "a test", "ema": 0.9, "optimizer": optimizer, "phase": phases}


def files(folder):
    """A file of samples for each task, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "square": [{"prompt": f"{i}", "answer": f"{i * i}"} for i in range(30)],
        "grade": [{"prompt": "x" * (1 + i % 4), "value": (i % 4) / 2} for i in range(12)],
    }
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join([json.dumps(d) + "\n" for d in lines]))
    return {name: folder / f"{name}.jsonl" for name in made}


def job(folder, weighting=None, **changes):
    """The job, its data built in `folder`."""
    shards = {
        "pre-training": runs.shards(folder / "short"),
        "longer": runs.shards(folder / "long", length=LENGTH),
    }
    found = Job(runs.CONFIG, read(recipe(weighting)), shards, seed=3, checkpoints=Checkpoints(1), log=Log(peak=1e9))
    return replace(found, tasks=files(folder), **changes)
