"""Snapshots whose content follows from their step, and a process that saves them until it is killed, again and again."""

import os
import random
import select
import signal
import sys
from pathlib import Path

import numpy as np

from refimpl.train.checkpoints import Keeper, Retention, Snapshot
from refimpl.train.checkpoints.pieces import Piece, Place

START = """
import importlib.util, pathlib
if pathlib.Path("conftest.py").exists(): import conftest
from refimpl.spec_tests.cases import killed_writer
killed_writer.main()
"""
ROWS = 40


def content(step, rows=ROWS):
    """Every tensor of a step: another step differs in every element."""
    numbers = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)
    return {
        "master/a.weight": numbers + step,
        "master/b.weight": (numbers[:3] * step + 1).astype(np.float64),
        "adam.m/a.weight": np.full((rows, 8), step, np.float32),
    }


def snap(step, rank=0, size=1, rows=ROWS):
    """One rank's part: an equal run of the flat elements of each tensor."""
    pieces = {}
    for name, x in content(step, rows).items():
        a, b = x.size * rank // size, x.size * (rank + 1) // size
        pieces[name] = Piece(Place(x.shape, (0, 0), x.shape, a, b), x.reshape(-1)[a:b])
    return Snapshot(step, pieces, {"cursor": {"document": step}})


def saves(folder, seed, pipe):
    """The child: resume, then save step after step; tell the pipe of every one that is there."""
    rows = 40 + 2000 * (seed % 3)
    keeper = Keeper(folder, keep=Retention(last=1 + seed % 2))
    found = keeper.newest()
    step = found.saved.step + 1 if found.saved else 1
    while True:
        os.write(pipe, b"b" + step.to_bytes(8, "little"))
        (keeper.begin if seed % 2 else keeper.save)(snap(step, rows=rows))
        keeper.finish()
        os.write(pipe, b"d" + step.to_bytes(8, "little"))
        step += 1


def check(folder):
    """The newest checkpoint's step, every element compared; none may have been passed over."""
    found = Keeper(folder).newest()
    assert not found.passed_over, found.passed_over
    if found.saved is None:
        return 0
    rows = len(found.saved.tensors("master")["a.weight"])
    for name, x in content(found.saved.step, rows).items():
        kind, _, name = name.partition("/")
        np.testing.assert_array_equal(found.saved.tensors(kind)[name], x)
    return found.saved.step


def main():
    """Fork and kill; prints how many kills, the last step, how many of the kills fell into a save."""
    folder, times, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
    last = inside = 0
    for i in range(times):
        out, into = os.pipe()
        if not (child := os.fork()):
            try:
                saves(folder, i, into)
            finally:
                os._exit(1)
        os.close(into)
        first = os.read(out, 9)  # it has begun
        select.select([], [], [], rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun, done = told(out, first)
        step = check(folder)
        assert max(last, done) <= step <= max(last, begun), (i, last, begun, done, step)
        inside += begun > done
        last = step
    print(times, last, inside)


def told(pipe, text):
    """(the last step begun, the last one that was there) of what the child wrote."""
    while part := os.read(pipe, 1 << 16):
        text += part
    os.close(pipe)
    numbers = {b"b"[0]: [0], b"d"[0]: [0]}
    for at in range(0, len(text) - 8, 9):
        numbers[text[at]].append(int.from_bytes(text[at + 1 : at + 9], "little"))
    return max(numbers[b"b"[0]]), max(numbers[b"d"[0]])
