"""What a run tells of every step: a record, to its journal, to TensorBoard, and to whoever listens.

| names in a record | |
|---|---|
| step, phase, tokens, batch, sequence | after which step it is, tokens consumed by then, of what size the step was |
| lr, gamma, mtp_weight, aux_weight | what the schedules said |
| loss, loss/main, loss/mtp1, ..., loss/balance | before the update; the parts before lambda, balance with alpha |
| loss/task.NAME, weight/NAME | of a phase with tasks, in place of loss/main: each task's loss and the weight it had |
| norm | of all gradients, before clipping |
| loss_scale | under FP16: the one that the step took |
| load/L3/peak, entropy, dead; bias/L3/drift, spread | of every layer of experts (`meters.py`) |
| eval/main, eval/mtp1, ... | on the held-out shards, after the update |
| links/bytes, messages, h800_s, waited_s | with ranks (`ranks.py`) |
| seconds, tokens/s, mfu, peak_bytes | of the step alone; of this process |

Those of VARIES differ from run to run; all others are the same bits whenever and wherever the step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.layers.config import Config
from refimpl.train.recipe import Setting
from refimpl.train.training import Report

from . import meters, sampling
from .job import Job
from .journal import Journal, Record
from .ranks import links
from .tensorboard import Board

VARIES = ("seconds", "tokens/s", "mfu", "peak_bytes", "links/waited_s")


class Monitor:
    """Writes the records of a run that goes on after `done` steps; on one rank only, that others listen to nothing.

    `cores`: how many processes take part, for MFU.
    """

    def __init__(self, job: Job, folder: Path, done: int, tell: Callable[[Record], None], cores: int = 1) -> None:
        self._journal, self._tell = Journal(folder, done), tell
        self._samples = Journal(folder, done, sampling.FILE) if job.samples else None
        self._board = Board(folder, done) if job.log.tensorboard else None
        self._peak = job.log.peak or cores * meters.gemm_rate()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._journal, self._samples, self._board):
            if part is not None:
                part.close()

    def add(self, c: Config, s: Setting, record: Mapping[str, Any], seconds: float) -> None:
        """What a step says, and how long it took, to all."""
        rate = s.batch * s.sequence / seconds
        flop = meters.flop_per_token(c, s.sequence, mtp=bool(s.values["mtp_weight"]))
        used = {"seconds": seconds, "tokens/s": rate, "mfu": flop * rate / self._peak}
        whole = dict(record) | used | {"peak_bytes": meters.peak_bytes()}
        self._journal.add(whole)
        if self._board is not None:
            self._board.add(whole)
        self._tell(whole)

    def sync(self) -> None:
        """What was written onto the disk."""
        for journal in (self._journal, self._samples):
            if journal is not None:
                journal.sync()

    def sampled(self, samples: Sequence[Record]) -> None:
        """Texts that the model made."""
        for sample in samples:
            if self._samples is not None:
                self._samples.add(sample)
            if self._board is not None:
                self._board.text(sample)


def said(report: Report, biases: Mapping[str, Array], taken: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank has to tell the others of a step, as JSON."""
    load = {place: n.tolist() for place, n in report.load.items()}
    return {"load": load, "bias": {place: b.tolist() for place, b in biases.items()}, "links": dict(taken)}


def seen(s: Setting, report: Report, heard: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A step in all ranks' words, without its times."""
    found: dict[str, Any] = {"step": report.step, "phase": s.phase.name, "tokens": s.tokens + s.batch * s.sequence}
    found |= {"batch": s.batch, "sequence": s.sequence} | dict(s.values)
    found |= {"loss": report.loss, "norm": report.norm} | {f"loss/{name}": x for name, x in report.parts.items()}
    found |= {f"weight/{name}": x for name, x in report.weights.items()}
    found |= {} if report.loss_scale is None else {"loss_scale": report.loss_scale}
    load, bias = (
        {place: np.array(x) for part in heard for place, x in part[kind].items()} for kind in ("load", "bias")
    )
    for place in sorted(load, key=lambda name: int(name[1:])):  # biases of MTP's routers stay where they are
        found |= {f"load/{place}/{name}": x for name, x in meters.load(load[place]).items()}
        found |= {f"bias/{place}/{name}": x for name, x in meters.bias(bias[place]).items()} if place in bias else {}
    return found | links([part["links"] for part in heard])
