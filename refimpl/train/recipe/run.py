"""A whole training run as data (R 4.2, 4.3): phases, what each schedule says in each step, what the optimiser is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from refimpl.autograd.errors import require
from refimpl.layers.config import Config
from refimpl.layers.precision import plan
from refimpl.train.half import HALF
from refimpl.train.optimizer import AdamW
from refimpl.train.training import Recipe

from .schedule import Schedule
from .steps import Steps
from .tasks import Task, Weighting

SCHEDULES = ("lr", "gamma", "mtp_weight", "aux_weight")
"""What changes during a run besides the batch: learning rate, bias speed, lambda of MTP, alpha of the balance loss."""


@dataclass(frozen=True)
class Phase:
    """A part of the run with one sequence length: `config` holds what it changes in config.json, `masked` says whether attention
    stays inside a document (R 4.1: not in pre-training; R 5.1: in fine-tuning). If `lr_per_batch` is given, a step's
    learning rate is lr batch / lr_per_batch. With `tasks` it reads their samples instead of shards (`refimpl.train.tasks`).
    """

    name: str
    tokens: int
    sequence: int
    multiple: int
    batch: Schedule
    steps: Steps
    schedules: Mapping[str, Schedule]
    masked: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    lr_per_batch: int | None = None
    tasks: tuple[Task, ...] = ()
    weighting: Weighting = field(default_factory=Weighting)


@dataclass(frozen=True)
class Optimizer:
    """AdamW's settings in this run (R 4.2), the clipping norm and the standard deviation of the first weights; `loss_scale`
    for FP16 only (described in articles, not in V3).
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decays: Literal["all", "matrices"] = "all"
    moments: Literal["fp32", "bf16"] = "bf16"
    clip: float = 1.0
    init_std: float = 0.006
    precision: str = "fp8"
    loss_scale: float | None = None


@dataclass(frozen=True)
class Setting:
    """What holds in one step: `tokens` were consumed before it, in the whole run; `batch` sequences of `sequence` tokens."""

    step: int
    phase: Phase
    tokens: int
    batch: int
    sequence: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """Phases one after the other. `origin` says where the numbers come from, `unpublished` what the source does not say and
    what was taken instead; `ema` is the decay of the average of the parameters, or None.
    """

    name: str
    origin: str
    phases: tuple[Phase, ...]
    optimizer: Optimizer = Optimizer()
    unpublished: tuple[str, ...] = ()
    ema: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all phases."""
        return sum([p.tokens for p in self.phases])

    def __len__(self) -> int:
        return sum([len(p.steps) for p in self.phases])

    def at(self, step: int) -> Setting:
        """What holds in step `step`, from 0. SpecError for a step that the run does not have."""
        require(0 <= step < len(self), f"step {step} of {self.name}: it has the steps 0 to {len(self) - 1}")
        first = [0, *accumulate([len(p.steps) for p in self.phases])]
        i = bisect_right(first, step) - 1
        phase, local = self.phases[i], step - first[i]
        token = phase.steps.token(local)
        batch = phase.steps.batch(local)
        values = {name: s.value(token, local) for name, s in phase.schedules.items()}
        if phase.lr_per_batch:
            values["lr"] *= batch / phase.lr_per_batch
        before = sum([p.tokens for p in self.phases[:i]])
        return Setting(step, phase, before + token, batch, phase.sequence, values)

    def settings(self, first: int = 0) -> Iterator[Setting]:
        """Every step from `first` on."""
        return (self.at(step) for step in range(first, len(self)))

    def recipe(self, step: int) -> Recipe:
        """Step `step` in the form that `train.step` takes, or with a `loss_scale` (FP16) `train.loss_scale.step`."""
        o, v = self.optimizer, self.at(step).values
        adam = AdamW(v["lr"], o.betas, o.eps, o.weight_decay, o.moments, o.decays)
        gamma, mtp, aux = v["gamma"], v["mtp_weight"], v["aux_weight"]
        p = HALF if o.precision == HALF.name else plan(o.precision)
        return Recipe(p, adam, max_norm=o.clip, gamma=gamma, mtp_weight=mtp, aux_weight=aux, loss_scale=o.loss_scale)

    def config(self, step: int, base: Config) -> Config:
        """The model's config in a step: R 4.3 switches YaRN on by the phase."""
        changes = dict(self.at(step).phase.config)
        return Config.from_dict(base.to_dict() | changes) if changes else base
