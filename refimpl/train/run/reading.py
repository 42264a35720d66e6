"""A training job from a recipe file: the recipe itself (`refimpl.train.recipe`), and beside it tables that say with what to train.

    [model]         preset = "tiny" or config = "config.json", and any key of config.json that differs
    [data]          shards = "folder", or { "name of a phase" = "folder", ... }: the run ends with the last one named; tokenizer,
                    epochs; tasks = { "name of a task" = "file.jsonl", ... } for phases with tasks
    [train]         seed, steps, micro_batch, memory, mesh, schedule, init
    [checkpoints]   every, last, milestone
    [evaluation]    shards, every, sequences, batch
    [samples]       prompts, every, tokens, temperature
    [log]           every, tensorboard, peak

Paths are relative to the file. All but model and data may be left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.checkpoint import json_object
from refimpl.layers.config import Config
from refimpl.layers.presets import PRESETS
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.train.recipe import Phase, amount, document, read
from refimpl.train.recipe.reading import JOB
from refimpl.train.recipe.values import known_keys

from .job import MEMORY, Checkpoints, Evaluation, Job, Log, Samples

_DATA = ("shards", "tasks", "tokenizer", "epochs")
_TRAIN = ("seed", "steps", "micro_batch", "memory", "mesh", "schedule", "init")


def load_job(path: str | Path) -> Job:
    """The job that a recipe file describes, checked as far as that goes without its shards. SpecError: what is wrong and where."""
    found = document(path)
    with where(f"in recipe {path}"):
        return read_job(found, Path(path).parent)


def read_job(d: Mapping[str, Any], folder: Path) -> Job:
    """A job from the keys and values of a recipe file that lies in `folder`."""
    tables = {name: d.get(name, {}) for name in JOB}
    for name, table in tables.items():
        require(isinstance(table, Mapping), f"{name} is {table!r}; expected a table")
    run = read({key: d[key] for key in d if key not in JOB})
    parts: dict[str, Any] = {"config": _model(tables["model"], folder)}
    parts |= _data(tables["data"], folder, run.phases)
    fed = _fed(run.phases, parts["shards"], parts["tasks"])
    parts |= _train(tables["train"], folder)
    for name, kind in (("checkpoints", Checkpoints), ("evaluation", Evaluation), ("samples", Samples), ("log", Log)):
        if name in d:
            with where(f"in [{name}]"):
                parts[name] = _table(kind, tables[name], folder)
    job = Job(run=replace(run, phases=run.phases[:fed]), **parts)
    job.check()
    return job


def _model(d: Mapping[str, Any], folder: Path) -> Config:
    with where("in [model]"):
        require(("preset" in d) != ("config" in d), "a model has either a preset or a config (a config.json)")
        if "config" in d:
            base = json_object(folder / _text(d, "config"))
        else:
            require(d["preset"] in PRESETS, f"preset {d['preset']!r}; known: {', '.join(PRESETS)}")
            base = PRESETS[d["preset"]].to_dict()
        changes = {key: value for key, value in d.items() if key not in ("preset", "config")}
        return Config.from_dict(base | changes)


def _data(d: Mapping[str, Any], folder: Path, phases: Sequence[Phase]) -> dict[str, Any]:
    """Where the data of the first phases lies, up to the last one that has some."""
    with where("in [data]"):
        known_keys(d, _DATA, "[data]")
        plain = [p.name for p in phases if not p.tasks]
        require("shards" in d or not plain, 'shards is missing: a folder that "refimpl data build" made')
        shards, tasks = d.get("shards", {}), d.get("tasks", {})
        given = shards if isinstance(shards, Mapping) else dict.fromkeys(plain, shards)
        require(isinstance(tasks, Mapping), f"tasks is {tasks!r}; expected a table, the name of a task = its file")
        first = phases[: _fed(phases, given, tasks)]
        names, known = [p.name for p in first if not p.tasks], {t.name for p in first for t in p.tasks}
        if not first and phases[0].tasks:
            wanted = ", ".join([f'{t.name} = "FILE.jsonl"' for t in phases[0].tasks])
            raise SpecError(f"phase {phases[0].name!r} learns from samples, not from shards: tasks = {{ {wanted} }}")
        order = f"the phases are {[p.name for p in phases]}, in this order"
        require(first and sorted(given) == sorted(names), f"shards are for {list(given)}; {order}")
        require(set(tasks) == known, f"tasks has files for {sorted(tasks)}; these phases have {sorted(known)}")
        found: dict[str, Any] = {"shards": {name: folder / _text(given, name) for name in given}}
        found["tasks"] = {name: folder / _text(tasks, name) for name in tasks}
        if "tokenizer" in d:
            name = _text(d, "tokenizer")
            found["tokenizer"] = name if name == "bytes" else str(folder / name)
        return found | ({"epochs": _whole(d, "epochs", 1)} if "epochs" in d else {})


def _fed(phases: Sequence[Phase], shards: Collection[str], tasks: Collection[str]) -> int:
    """How many phases from the first on have data."""
    has = [any(t.name in tasks for t in p.tasks) if p.tasks else p.name in shards for p in phases]
    return [*has, False].index(False)


def _train(d: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    with where("in [train]"):
        known_keys(d, _TRAIN, "[train]")
        least = {"seed": 0, "steps": 1, "micro_batch": 1}
        found: dict[str, Any] = {key: _whole(d, key, n) for key, n in least.items() if key in d}
        found |= {key: _text(d, key) for key in ("mesh", "schedule") if key in d}
        found |= {"init": folder / _text(d, "init")} if "init" in d else {}
        Mesh.parse(found["mesh"]) if "mesh" in found else None
        if "memory" in d:
            found["memory"] = d["memory"] if d["memory"] in MEMORY else _whole(d, "memory", 1)
        return found


def _table(kind: type[Any], d: Mapping[str, Any], folder: Path) -> Any:
    """A dataclass from a table: its fields are the keys, their defaults say the type."""
    known_keys(d, [f.name for f in fields(kind)], "the table")
    found: dict[str, Any] = {}
    for f in fields(kind):
        if f.name not in d:
            require(f.default is not MISSING, f"{f.name} is missing")
        elif f.type == "int":
            found[f.name] = _whole(d, f.name, 0 if f.name in ("milestone",) else 1)
        elif f.type == "bool":
            require(isinstance(d[f.name], bool), f"{f.name} is {d[f.name]!r}; expected true or false")
            found[f.name] = d[f.name]
        elif f.type == "Path":
            found[f.name] = folder / _text(d, f.name)
        elif f.type == "tuple[str, ...]":
            texts = isinstance(d[f.name], list) and d[f.name] and all(isinstance(t, str) and t for t in d[f.name])
            require(texts, f"{f.name} is {d[f.name]!r}; expected a list of texts")
            found[f.name] = tuple(d[f.name])
        else:
            found[f.name] = float(amount(d[f.name]))
    return kind(**found)


def _text(d: Mapping[str, Any], key: str) -> str:
    value = d[key]
    if not isinstance(value, str) or not value:
        raise SpecError(f"{key} is {value!r}; expected a text")
    return value


def _whole(d: Mapping[str, Any], key: str, least: int) -> int:
    n = amount(d[key])
    require(n.denominator == 1 and n >= least, f"{key} is {d[key]!r}; expected a whole number of at least {least}")
    return int(n)
