"""A training job as data: which model, on which shards, by which recipe, and what is kept and told on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require, where
from refimpl.layers.config import Config
from refimpl.train.checkpoints import Retention
from refimpl.train.data import Bytes
from refimpl.train.memory import Policy, Probe, budget
from refimpl.train.recipe import Run, Setting

MEMORY = ("keep", "report", "again", "roots")
"""Memory policies by name; a number of bytes is a budget (`memory.budget`)."""


@dataclass(frozen=True)
class Checkpoints:
    """One every `every` steps, and at the end; the `last` newest stay, and every one whose step is a multiple of `milestone`."""

    every: int = 100
    last: int = 3
    milestone: int = 0

    @property
    def retention(self) -> Retention:
        """As a keeper takes it."""
        return Retention(self.last, self.milestone)


@dataclass(frozen=True)
class Evaluation:
    """The loss on the first `sequences` rows of other shards, `batch` at a time, every `every` steps and at the end."""

    shards: Path
    every: int = 100
    sequences: int = 32
    batch: int = 8


@dataclass(frozen=True)
class Samples:
    """Text that the model makes of each prompt, at the start, every `every` steps, and at the end; 0: greedy."""

    prompts: tuple[str, ...]
    every: int = 100
    tokens: int = 64
    temperature: float = 0.0


@dataclass(frozen=True)
class Log:
    """Lines on the terminal every `every` steps, TensorBoard files or not, the peak (FLOP/s) of MFU or None to measure one."""

    every: int = 1
    tensorboard: bool = False
    peak: float | None = None


@dataclass(frozen=True)
class Job:
    """Train `config` by `run` on `shards`, a folder for each phase by its name, or for a phase with tasks on `tasks`, a JSONL file
    for each by its name; `steps` may end it early. `tokenizer`: "bytes", or the tokenizer.json that the shards must have been made
    with. `epochs`: how often the data may be read, None as often as it
    takes. `micro_batch`: sequences that are on the tape at a time, None all. `memory`: see MEMORY. `init`: weights to begin with.
    """

    config: Config
    run: Run
    shards: Mapping[str, Path]
    seed: int = 0
    steps: int | None = None
    tokenizer: str | None = None
    epochs: int | None = None
    micro_batch: int | None = None
    memory: str | int = "keep"
    mesh: str = ""
    schedule: str = "1f1b"
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation | None = None
    samples: Samples | None = None
    log: Log = field(default_factory=Log)
    tasks: Mapping[str, Path] = field(default_factory=dict)
    init: Path | None = None

    def __len__(self) -> int:
        """Steps that it takes."""
        return len(self.run) if self.steps is None else min(max(self.steps, 0), len(self.run))

    @property
    def mtp(self) -> set[bool]:
        """Whether MTP modules are trained in some part of the run, and whether they are not."""
        pieces = [piece for p in self.run.phases for piece in p.schedules["mtp_weight"].pieces]
        return {bool(weight) for piece in pieces for weight in (piece.start, piece.end)}

    def model(self, step: int) -> Config:
        """The model in a step, from 0: phases may change it (R 4.3). Without MTP modules if they are never trained."""
        c = self.run.config(step, self.config)
        return c if self.mtp != {False} else c.replace(num_nextn_predict_layers=0)

    def model_after(self, steps: int) -> Config:
        """The model that a checkpoint after so many steps holds: that of the last one."""
        return self.model(max(steps - 1, 0))

    def known_tokenizer(self, made: str | None, what: str) -> str:
        """The job's tokenizer as `load_tokenizer` takes it; `made`: that of its shards, by fingerprint. SpecError unless known."""
        known = self.tokenizer or ("bytes" if made == Bytes.fingerprint else None)
        require(known, f"{what} need a tokenizer, the shards' is {made}: name its file, [data] tokenizer = ...")
        return str(known)

    def identity(self, steps: int) -> dict[str, Any]:
        """What decided the bits of a run of so many steps, beside config and data, as JSON; a checkpoint keeps it. Of phases
        only those that it has begun, by their checksums: what comes after may still change.
        """
        names = [p.name for p in self.run.phases]
        begun = names.index(self.run.at(steps - 1).phase.name) + 1 if steps else 0
        texts = {p.name: json.dumps(asdict(p), default=str) for p in self.run.phases[:begun]}
        sums = {f"phase {name}": sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
        optimizer = json.loads(json.dumps(asdict(self.run.optimizer)))
        return sums | {"optimizer": optimizer, "ema": self.run.ema, "seed": self.seed}

    def micro_batches(self, batch: int, ranks: int = 1) -> int:
        """Into how many micro-batches each of `ranks` data-parallel ranks cuts its share of a batch. SpecError if it has a rest."""
        each = self.micro_batch or -(-batch // ranks)
        fits = batch % (each * ranks) == 0
        require(fits, f"{batch} sequences for {ranks} data-parallel ranks in micro-batches of {each}")
        return batch // (each * ranks)

    def policy(self, c: Config, s: Setting) -> Policy | None:
        """What the tape keeps in a step. SpecError for a budget that no policy keeps to."""
        if isinstance(self.memory, int):
            rows = s.batch // self.micro_batches(s.batch)
            return budget.plan(Probe(c, rows, s.sequence, self.run.recipe(s.step)), self.memory)
        if self.memory in ("keep", "roots"):
            return Policy.roots(c) if self.memory == "roots" else None
        return Policy.uniform(c, "report" if self.memory == "report" else "again")

    def check(self) -> None:
        """SpecError for a job that cannot be run, whatever its shards hold."""
        require(
            self.memory in MEMORY or isinstance(self.memory, int), f"memory is {self.memory!r}; {', '.join(MEMORY)}"
        )
        require(len(self) >= 1, f"steps is {self.steps}; at least 1")
        names = [p.name for p in self.run.phases if not p.tasks]
        odd = sorted(set(names) ^ set(self.shards))
        require(not odd, f"shards for the phases {sorted(self.shards)}; the recipe has {names}")
        tasks = sorted({t.name for p in self.run.phases for t in p.tasks})
        require(tasks == sorted(self.tasks), f"data for the tasks {sorted(self.tasks)}; the recipe has {tasks}")
        for p in self.run.phases:
            with where(f"in phase {p.name!r}"):
                for same in p.steps.runs:
                    fits = same.batch % (self.micro_batch or 1) == 0
                    require(fits, f"batches of {same.batch} sequences are no micro-batches of {self.micro_batch}")
        self.run.recipe(0)  # a precision that has only a name here
        scaled = self.run.optimizer.loss_scale is not None
        require(
            not (scaled and tasks), f"tasks {tasks}: phases with tasks are trained without a loss scale, not in FP16"
        )
