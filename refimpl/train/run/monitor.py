"""What a run tells of every step: a record, to its journal and to whoever listens.

Names in a record: step (after it), phase, tokens (consumed so far), batch, sequence, the values of the schedules; loss, and its
parts as loss/main, loss/mtp1, loss/balance; norm (of the gradients, before clipping); load/L3/peak, /entropy, /dead and
bias/L3/drift, /spread for every layer of experts (`meters.py`); and, which differ from run to run (VARIES), seconds,
tokens/s, mfu, peak_bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from refimpl.autograd import Array
from refimpl.layers.config import Config
from refimpl.train.recipe import Setting
from refimpl.train.training import Report

from . import meters
from .job import Job
from .journal import Journal, Record

VARIES = ("seconds", "tokens/s", "mfu", "peak_bytes")


class Monitor:
    """Takes the time of steps and writes their records."""

    def __init__(self, job: Job, folder: Path, done: int, tell: Callable[[Record], None]) -> None:
        self._journal, self._tell = Journal(folder, done), tell
        self._peak = job.log.peak or meters.gemm_rate()
        self.last: Record = {}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    @contextmanager
    def step(self, c: Config, s: Setting) -> Iterator[Callable[[Report, Mapping[str, Array]], None]]:
        """Time what is done inside; it gives its report and the biases after it to what this yields."""
        began = time.perf_counter()

        def note(report: Report, biases: Mapping[str, Array]) -> None:
            seconds = time.perf_counter() - began
            rate = s.batch * s.sequence / seconds
            flop = meters.flop_per_token(c, s.sequence, mtp=bool(s.values["mtp_weight"]))
            used = {"seconds": seconds, "tokens/s": rate, "mfu": flop * rate / self._peak}
            self.add(seen(s, report, biases) | used | {"peak_bytes": meters.peak_bytes()})

        yield note

    def add(self, record: dict[str, Any]) -> None:
        """One record to all."""
        self._journal.add(record)
        self.last = record
        self._tell(record)


def seen(s: Setting, report: Report, biases: Mapping[str, Array]) -> dict[str, Any]:
    """What a step says that is the same whenever it is taken."""
    at = {"step": report.step, "phase": s.phase.name, "tokens": s.tokens + s.batch * s.sequence}
    found: dict[str, Any] = at | {"batch": s.batch, "sequence": s.sequence} | dict(s.values)
    found |= {"loss": report.loss, "norm": report.norm} | {f"loss/{name}": x for name, x in report.parts.items()}
    for place in sorted(report.load, key=lambda name: int(name[1:])):
        found |= {f"load/{place}/{name}": x for name, x in meters.load(report.load[place]).items()}
    for place, b in biases.items():
        found |= {f"bias/{place}/{name}": x for name, x in meters.bias(b).items()}
    return found
