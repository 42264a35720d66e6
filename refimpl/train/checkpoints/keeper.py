"""The checkpoints of a run: written whole or not at all, the newest good one found again, old ones let go.

    RUN/step-00000400/          manifest.json  rank-00000-of-00004.safetensors  ...
    RUN/step-00000500.writing/  what a run that was killed left; the next one sweeps it away
    RUN/step-00000300.damaged/  set aside when a run was resumed and this one did not verify; never deleted

Every rank writes its shard into a folder that no reader looks at; when all are on the disk, rank 0 adds the manifest and
renames the folder, which is one step. So a reader sees the checkpoint before or this one, whenever the run is killed or
the power fails, and an old one is let go only after its successor is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from refimpl.autograd import SpecError, require, where
from refimpl.parallel_emulation.comm import Comm

from .agree import by_rank_0, complaint, everyone
from .disk import Disk, helpers, write_all
from .manifest import MANIFEST, Manifest, Shard
from .snapshot import Saved, Snapshot, file_name, write_shard

NAME = re.compile(r"step-(\d{8,})")
WRITING, OLD, DAMAGED = ".writing", ".old", ".damaged"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `last` newest, and besides every one whose step is a multiple of `every` (0: none)."""

    last: int = 3
    every: int = 0

    def __post_init__(self) -> None:
        require(self.last >= 1, f"last={self.last}: the newest checkpoint always stays")
        require(self.every >= 0, f"every={self.every} steps")

    def dropped(self, steps: list[int]) -> list[int]:
        """Those of the steps, oldest first, that need not stay."""
        return [step for step in steps[: -self.last] if not (self.every and step % self.every == 0)]


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is whole, if there is one, and those newer ones that are not, with what is wrong."""

    saved: Saved | None
    passed_over: Mapping[str, str]


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    temporary: Path
    snapshot: Snapshot
    shard: Future[Shard]


class Keeper:
    """A run's folder, as one rank sees it; `comm` are the ranks of the run, None is one process by itself.

    `save` returns when the checkpoint is there; `begin` copies the state and writes in a thread while training goes on:
    the checkpoint is there after `finish`, which the next save and the end of the `with` block do too, and on one rank
    as soon as it is written (a thread of several ranks does not communicate). All ranks make the same calls.

    SpecError, on every rank, where one of them cannot write (full disk, no permission): nothing is left of the new
    checkpoint then, and those before are as they were.
    """

    def __init__(
        self, folder: Path | str, *, comm: Comm | None = None, keep: Retention | None = None, disk: Disk | None = None
    ) -> None:
        self.folder, self._comm, self._keep = Path(folder), comm, keep or Retention()
        self._rank, self._size = (comm.rank, comm.size) if comm else (0, 1)
        self._disk = disk or Disk()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        by_rank_0(comm, self._sweep, "sweep")

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or self._comm is None:  # after an error other ranks may be gone
                self.finish()
        finally:
            self._thread.shutdown()

    # ---- Writing

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint and wait for it. SpecError for a step that is not newer than those of the folder."""
        self._start(snapshot)
        self.finish()

    def begin(self, snapshot: Snapshot) -> None:
        """Copy the state and write it while training goes on; a checkpoint still being written is finished first."""
        self.finish()
        self._start(snapshot.copied())

    def _start(self, snapshot: Snapshot) -> None:
        self.finish()
        temporary = self.folder / f"step-{snapshot.step:08}{WRITING}"

        def make() -> str:
            newest = max(self.steps(), default=-1)
            require(newest < snapshot.step, f"{self.folder} holds step {newest}; step {snapshot.step} is not newer")
            self._disk.make_folder(temporary)
            return ""

        by_rank_0(self._comm, make, "start")
        self._pending = _Pending(temporary, snapshot, self._thread.submit(self._write, temporary, snapshot))

    def _write(self, temporary: Path, snapshot: Snapshot) -> Shard:
        """In the thread: my shard; by myself also what makes a checkpoint of it."""
        with helpers() as summing:
            with self._disk.create(temporary / file_name(self._rank, self._size)) as f:
                described = write_shard(f, snapshot, summing)
            shard = described()
        if self._comm is None:
            self._commit(temporary, snapshot, [shard])
        return shard

    def finish(self) -> None:
        """Wait until the checkpoint begun last is there. SpecError if it could not be written."""
        if self._pending is None:
            return
        (temporary, snapshot, future), self._pending = self._pending, None
        said = {"trouble": "", "shard": {}}
        try:
            said["shard"] = future.result().to_json()
        except (OSError, SpecError) as error:
            said["trouble"] = complaint(error)
        parts = [json.loads(text) for text in everyone(self._comm, json.dumps(said), "checkpoint.written")]
        trouble = [f"rank {r}: {part['trouble']}" for r, part in enumerate(parts) if part["trouble"]]

        def commit() -> str:
            if not trouble and self._comm is not None:
                self._commit(temporary, snapshot, [Shard.from_json(part["shard"]) for part in parts])
            return ""

        with where(f"while saving step {snapshot.step} to {self.folder}; the checkpoints before it are untouched"):
            try:
                require(not trouble, "\n".join(trouble))
                by_rank_0(self._comm, commit, "commit")
            except SpecError:
                if self._rank == 0:
                    with suppress(OSError):
                        self._disk.remove_folder(temporary)
                raise

    def _commit(self, temporary: Path, snapshot: Snapshot, shards: list[Shard]) -> None:
        files = {file_name(rank, self._size): shard for rank, shard in enumerate(shards)}
        with self._disk.create(temporary / MANIFEST) as f:
            write_all(f, Manifest(snapshot.step, snapshot.facts, files).text())
        self._disk.sync_folder(temporary)
        self._disk.rename(temporary, temporary.with_name(temporary.name.removesuffix(WRITING)))
        self._disk.sync_folder(self.folder)
        with suppress(OSError):  # what cannot be removed now is tried again after the next one
            for step in self._keep.dropped(self.steps()):
                self._let_go(self.path(step))

    # ---- The folder

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, oldest first."""
        return sorted([int(m[1]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name))])

    def newest(self) -> Found:
        """The newest checkpoint, every byte verified; newer ones that are damaged or incomplete are set aside."""

        def find() -> str:
            bad: dict[str, str] = {}
            for step in reversed(self.steps()):
                try:
                    Saved(self.path(step))
                    return json.dumps([step, bad])
                except SpecError as error:
                    bad[self.path(step).name] = str(error)
                    self._disk.rename(self.path(step), self._free(self.path(step).name + DAMAGED))
            return json.dumps([None, bad])

        step, bad = json.loads(by_rank_0(self._comm, find, "newest"))
        return Found(None if step is None else Saved(self.path(step), verify=False), bad)

    def _free(self, name: str) -> Path:
        names = [name, *[f"{name}.{i}" for i in range(2, 1000)]]
        return next(p for n in names if not (p := self.folder / n).exists())

    def _sweep(self) -> str:
        """Remove what runs left that were killed while they wrote or let go."""
        if not self.folder.is_dir():
            self._disk.make_folder(self.folder)
        for p in sorted(self.folder.iterdir()):
            if p.suffix in (WRITING, OLD) and NAME.fullmatch(p.stem):
                self._disk.remove_folder(p)
        return ""

    def _let_go(self, path: Path) -> None:
        """Out of sight at once, then away."""
        old = path.with_name(path.name + OLD)
        self._disk.rename(path, old)
        self._disk.remove_folder(old)
