"""How fast the reader gives batches from page cache, beside a plain copy of a NumPy memmap: `python benchmarks/loader.py`.

copy     np.array of the next rows of one np.memmap, in order, in the file's dtype: what nothing can beat that copies at all
cast     the same as int64, which the model's inputs are
plain    the reader: rows in the order of a seed, int64
masked   the same with documents, labels and padding (R 5.1)

All four move the same number of tokens in turn, round by round, and a reader goes on where its last round ended; the table has the
medians of CPU time and of the ratios of a round. The goal is 100 M tokens a second for `plain` and for `masked`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # time this tree, installed or not

from refimpl.train.data import Reader, Shards  # noqa: E402
from refimpl.train.data.shards import index_of  # noqa: E402

GOAL = 100e6
SHARDS = 4
TOKENS = 17_000_000
"""Of a shard, and of a round. The rows are a little more than a power of two, which is what the order takes longest for."""


def make(folder: Path, length: int, rows: int, shards: int, dtype: str) -> Shards:
    """Random tokens in shards whose rows hold two documents and a little padding."""
    rng, records = np.random.default_rng(0), []
    for i in range(shards):
        rng.integers(0, 60_000, (rows, length)).astype(dtype).tofile(folder / f"{i:06d}.tokens")
        begin = np.arange(rows, dtype=np.int64)[:, None] * length
        cut = rng.integers(1, length - 1, (rows, 1))
        ends = [np.concatenate([begin + a, begin + b], axis=1).reshape(-1) for a, b in ((0, cut), (cut, length - 1))]
        np.stack(ends).tofile(folder / f"{i:06d}.spans")
        (2 * np.arange(rows + 1, dtype=np.int64)).tofile(folder / f"{i:06d}.first")
        records.append(
            {"name": f"{i:06d}", "rows": rows, "pieces": 2 * rows, "tokens": rows * length, "crc": [0, 0, 0]}
        )
    facts = {"length": length, "dtype": dtype, "vocab_size": 129280, "tokenizer": "none", "pad": 2}
    (folder / "index.json").write_bytes(index_of(facts, records))
    return Shards(folder)


def contenders(shards: Shards, batch: int, batches: int) -> dict[str, Callable[[], None]]:
    """What is timed: each moves `batches` batches. Every page is mapped before."""
    for i in range(SHARDS):
        for a in (shards.tokens(i), shards.spans(i), shards.first_pieces(i)):
            a.max()
    first = shards.folder / "000000.tokens"
    memmap = np.memmap(first, shards.dtype, "r").reshape(-1, shards.length)

    def copy(dtype: np.dtype) -> None:
        for i in range(batches):
            at = i * batch % (len(memmap) - batch)
            np.array(memmap[at : at + batch], dtype)

    readers = {masked: Reader(shards, epochs=None, masked=masked) for masked in (False, True)}
    cursors = {masked: reader.start() for masked, reader in readers.items()}

    def read(masked: bool) -> None:
        reader, cursor = readers[masked], cursors[masked]
        for _ in range(batches):
            _, cursor = reader.take(cursor, batch)
        cursors[masked] = cursor

    return {
        "copy": lambda: copy(shards.dtype),
        "cast": lambda: copy(np.dtype(np.int64)),
        "plain": lambda: read(False),
        "masked": lambda: read(True),
    }


def measure(shards: Shards, batch: int, batches: int, rounds: int) -> dict[str, dict[str, float]]:
    """Contender -> million tokens a second, and times as long as `copy` and as `cast`."""
    runs = contenders(shards, batch, batches)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if k:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    tokens = batch * batches * shards.length

    def ratio(name: str, other: str) -> float:
        return statistics.median([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])

    return {
        name: {
            "M tokens/s": tokens / statistics.median(s) / 1e6,
            "/ copy": ratio(name, "copy"),
            "/ cast": ratio(name, "cast"),
        }
        for name, s in seconds.items()
    }


def main() -> int:
    """Print the table; exit code 1 if the goal is missed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--length", type=int, default=4096, help="tokens of a row (default 4096)")
    p.add_argument("--batch", type=int, default=32, help="rows of a batch (default 32)")
    p.add_argument("--batches", type=int, help="batches of a round (default: 17 M tokens)")
    p.add_argument("--rows", type=int, help="rows of each of the four shards (default: 17 M tokens)")
    p.add_argument("--dtype", choices=["uint16", "uint32"], default="uint32")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    rows, batches = a.rows or TOKENS // a.length, a.batches or TOKENS // (a.length * a.batch)
    with tempfile.TemporaryDirectory() as folder:
        shards = make(Path(folder), a.length, rows, SHARDS, a.dtype)
        found = measure(shards, a.batch, batches, a.rounds)
    if a.json:
        print(json.dumps(found))
    else:
        print(f"{'':<8}{'M tokens/s':>12}{'/ copy':>9}{'/ cast':>9}")
        for name, row in found.items():
            print(
                f"{name:<8}"
                + "".join(f"{v:{w}.{d}f}" for v, w, d in zip(row.values(), (12, 9, 9), (0, 2, 2), strict=True))
            )
    slowest = min([found[name]["M tokens/s"] * 1e6 for name in ("plain", "masked")])
    if not a.json:
        verdict = "met   " if slowest >= GOAL else "MISSED"
        print(f"{verdict} the slower of plain and masked {slowest / 1e6:.0f} M tokens/s  goal {GOAL / 1e6:.0f}")
    return 0 if slowest >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
