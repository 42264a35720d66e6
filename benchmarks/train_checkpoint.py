"""How fast a training checkpoint is written, against a plain write of as many bytes: `python benchmarks/train_checkpoint.py`.

plain       one file, written in 4 MiB pieces from memory and synced: what the disk gives
save        `Keeper.save`: safetensors, checksums of every tensor, manifest, syncs, rename
begin       `Keeper.begin`: how long training waits (the copy of the state), the rest being written in a thread

The two writes take turns in one process and the ratio of their medians counts, so that what else uses the disk hits both.
The goal: save at no less than 0.7 of plain. Reading back with every byte verified is shown beside.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # time this tree, installed or not

from refimpl.train.checkpoints import Keeper, Retention, Saved, Snapshot  # noqa: E402
from refimpl.train.checkpoints.pieces import Piece  # noqa: E402

GOAL = 0.7
PIECE = 4 << 20


def state(megabytes: int) -> dict[str, np.ndarray]:
    """Masters and moments of a model: 4 + 2 + 2 bytes a weight, tensors of 1 to 16 MB of masters."""
    rng, found, left, i = np.random.default_rng(0), {}, megabytes << 20, 0
    while left > 0:
        n = min((1 << 20) * (1 + i % 16) // 4, left // 8 + 1)
        w = rng.standard_normal(n, dtype=np.float32)
        moments = {k: (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for k in ("adam.m", "adam.v")}
        found |= {f"{kind}/layer{i}.weight": x for kind, x in ({"master": w} | moments).items()}
        left, i = left - 8 * n, i + 1
    return found


def plain(path: Path, data: memoryview) -> None:
    """Write bytes in order and sync."""
    f = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
    at = 0
    while at < len(data):
        at += os.write(f, data[at : at + PIECE])
    os.fsync(f)
    os.close(f)


def clear(folder: Path) -> None:
    """Remove what was written; the run's folder stays."""
    for path in (folder / "plain", *(folder / "run").glob("step-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def seconds(run: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(folder: Path, megabytes: int, times: int) -> dict[str, list[float]]:
    """Seconds of each kind of write, taking turns; the first turn of each is not counted."""
    snapshot = {name: Piece.whole(x) for name, x in state(megabytes).items()}
    found: dict[str, list[float]] = {"plain": [], "save": [], "begin": [], "read": []}
    keep = Retention(last=10**6)  # nothing is removed while it is measured
    with Keeper(folder / "run", keep=keep) as keeper:
        keeper.save(Snapshot(0, snapshot))
        nbytes = sum([p.stat().st_size for p in keeper.path(0).iterdir()])
        data = memoryview(np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8))
        clear(folder)

        def one(name: str, step: int) -> None:
            """One measurement, on a disk from which all before it is removed."""
            match name:
                case "plain":
                    took = seconds(lambda: plain(folder / "plain", data))
                case "save":
                    took = seconds(lambda: keeper.save(Snapshot(step, snapshot)))
                    found["read"].append(seconds(lambda: Saved(keeper.path(step))))
                case _:
                    took = seconds(lambda: keeper.begin(Snapshot(step, snapshot)))
                    keeper.finish()
            found[name].append(took)
            clear(folder)

        for i in range(times + 1):
            for name in ("plain", "save") if i % 2 else ("save", "plain"):
                one(name, 2 * i + 1)
            one("begin", 2 * i + 2)
    print(f"{nbytes / 2**20:.0f} MiB in {len(snapshot)} tensors, {times} rounds, on {folder}")
    for name, s in found.items():
        s.pop(0)
        print(f"{name:6} {statistics.median(s):7.2f} s  {nbytes / 2**20 / statistics.median(s):7.0f} MiB/s")
    return found


def main() -> int:
    """Print the rates and the ratio; 0 if the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="bytes of state (default: 1024 MiB)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median counts (default: 5)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: a temporary one)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        found = rounds(folder, args.megabytes, args.rounds)
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(found["plain"]) / statistics.median(found["save"])
    print(f"{'met   ' if ratio >= GOAL else 'MISSED'} save / plain {ratio:.2f}  goal {GOAL}")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
