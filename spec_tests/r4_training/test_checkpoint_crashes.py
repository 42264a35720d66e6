"""A run that is killed at any moment finds the last checkpoint whole: every file-system call cut, the power too, real SIGKILLs."""

import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.comm import spmd
from refimpl.spec_tests.cases import killed_writer
from refimpl.spec_tests.cases.failing_disk import DyingDisk, FullDisk, Killed
from refimpl.spec_tests.cases.killed_writer import content, snap
from refimpl.train.checkpoints import Keeper, Retention
from refimpl.train.checkpoints import disk as disks

CALLS = 400  # more than a save makes


def save(folder, step, disk=None, keep=None, threaded=False):
    keeper = Keeper(folder, disk=disk, keep=keep)
    (keeper.begin if threaded else keeper.save)(snap(step))
    keeper.finish()


def calls(folder, step, keep=None):
    """What a save asks of the disk, call by call."""
    disk = DyingDisk(10**9)
    save(folder, step, disk, keep)
    return disk.calls


def whole(folder):
    """The step found after a crash; its content must be that of the step, whatever it is."""
    found = Keeper(folder).newest()
    assert not found.passed_over
    if found.saved is None:
        return None
    for name, x in content(found.saved.step).items():
        kind, _, name = name.partition("/")
        np.testing.assert_array_equal(found.saved.tensors(kind)[name], x)
    return found.saved.step


KEEP = Retention(last=1)
N = 60  # calls of the saves below; the first test says so if that changes


def test_a_save_makes_the_calls_that_the_tests_below_cut(tmp_path):
    """Catches tests that cut nothing: two saves, the second lets the first go, in fewer calls than are tried."""
    made = calls(tmp_path, 1, KEEP) + calls(tmp_path, 2, KEEP)
    names = [name for name, _ in made]
    assert {"make", "create", "write", "sync", "sync folder", "rename", "remove"} <= set(names)
    assert len(made) < N


@pytest.mark.parametrize("threaded", [False, True], ids=["waiting", "in a thread"])
@pytest.mark.parametrize("alive", range(1, N))
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path, alive, threaded):
    """Catches the old checkpoint removed before the new one is there, a manifest before its shards, a half-written file
    that counts. Saves of steps 2 and 3 over step 1; the disk stops in call `alive`, in a write after half of it.
    """
    save(tmp_path, 1)
    disk, done = DyingDisk(alive), 1
    try:
        for step in (2, 3):
            save(tmp_path, step, disk, KEEP, threaded)
            done = step
    except Killed:
        pass
    assert done <= whole(tmp_path) <= done + 1
    save(tmp_path, 4, keep=KEEP)  # and the run goes on
    assert whole(tmp_path) == 4 and sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004"]


@pytest.mark.parametrize("names", [True, False], ids=["names survive", "names are lost"])
@pytest.mark.parametrize("alive", range(1, N))
def test_a_power_failure_at_any_call_leaves_a_whole_checkpoint(tmp_path, alive, names):
    """Catches a missing sync: what was not synced is gone, and a rename not followed by a sync of its folder may or may
    not have happened. A save that has returned is on the disk.
    """
    save(tmp_path, 1)
    disk, done = DyingDisk(alive), 1
    try:
        for step in (2, 3):
            save(tmp_path, step, disk, KEEP)
            done = step
    except Killed:
        pass
    disk.cut_power(names=names)
    assert done <= whole(tmp_path) <= done + 1


@pytest.mark.parametrize("alive", range(1, N, 2))
def test_the_first_checkpoint_of_a_run_is_whole_or_absent(tmp_path, alive):
    """Catches a first save whose ruins pass for a checkpoint, or keep the next run from starting."""
    try:
        save(tmp_path / "run", 1, DyingDisk(alive))
        done = 1
    except Killed:
        done = None
    assert whole(tmp_path / "run") in (done, 1)


def rank_saves(comm, folder, alive, victim):
    """Every rank has its own disk calls; the victim dies in one of them."""
    disk = DyingDisk(alive if comm.rank == victim else 10**9)
    with Keeper(folder, comm=comm, disk=disk, keep=KEEP) as keeper:
        keeper.save(snap(2, comm.rank, comm.size))


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("alive", range(1, 24))
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(tmp_path, alive, victim):
    """Catches a manifest written before the slowest rank's shard: four ranks, one dies in call `alive` of its own."""
    save(tmp_path, 1)
    try:
        spmd(4, rank_saves, tmp_path, alive, victim)
        done = 2
    except Killed:
        done = 1
    assert done <= whole(tmp_path) <= 2


# ---- A full disk


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.75, 0.999])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_garbage(tmp_path, part):
    """Catches a short write taken for a whole one, and what was written left behind to fill the disk for good."""
    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    room = int(part * sum(p.stat().st_size for p in before if p.is_file()))
    with pytest.raises(SpecError, match=r"step-00000002.writing/.*: No space left on device") as caught:
        save(tmp_path, 2, FullDisk(room))
    assert "while saving step 2" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and whole(tmp_path) == 1
    save(tmp_path, 2)
    assert whole(tmp_path) == 2


def test_a_full_disk_in_the_thread_is_told_by_the_next_save(tmp_path):
    """Catches an error that dies with its thread: a run that believes it has checkpoints."""
    keeper = Keeper(tmp_path, disk=FullDisk(100))
    keeper.begin(snap(1))
    with pytest.raises(SpecError, match="No space left"):
        keeper.begin(snap(2))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_with_a_full_disk_is_named_on_every_rank(tmp_path, victim):
    """Catches ranks that go on with the belief that all have written, and ranks that wait for ever."""
    save(tmp_path, 1)

    def program(comm):
        disk = FullDisk(100) if comm.rank == victim else None
        with (
            Keeper(tmp_path, comm=comm, disk=disk) as keeper,
            pytest.raises(SpecError, match=rf"^rank {victim}: .*No space left on device"),
        ):
            keeper.save(snap(2, comm.rank, comm.size))

    spmd(2, program)
    assert whole(tmp_path) == 1


# ---- What goes to the disk while the rest is written


class AtOnce(Executor):
    """A thread that is never late."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_a_file_goes_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    """Catches a checkpoint that begins to reach the disk when all of it is written: the last sync waits for everything then."""
    held = []
    monkeypatch.setattr(disks, "helpers", AtOnce)
    monkeypatch.setattr(disks, "EARLY", 1000)
    monkeypatch.setattr(disks, "_data_sync", lambda f: held.append(os.fstat(f).st_size))
    save(tmp_path, 1)
    nbytes = max(p.stat().st_size for p in tmp_path.glob("*/*.safetensors"))
    assert held and min(held) < nbytes


def test_what_an_early_sync_hears_is_not_lost(tmp_path, monkeypatch):
    """Catches a checkpoint believed whole whose bytes did not reach the disk: the system says so once, and not to the last sync."""

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    save(tmp_path, 1)
    (shard,) = tmp_path.glob("*/*.safetensors")
    monkeypatch.setattr(disks, "EARLY", shard.stat().st_size)  # the last write
    monkeypatch.setattr(disks, "_data_sync", fails)
    with pytest.raises(SpecError, match="Input/output error"):
        save(tmp_path, 2)
    assert whole(tmp_path) == 1


# ---- Real kills


@pytest.mark.slow
def test_hundreds_of_real_kills(tmp_path):
    """Catches what a simulated disk does not know. A child saves as fast as it can, every second time in a thread, and is
    killed with SIGKILL at a random moment, 300 times; each time the newest checkpoint verifies, and is one that the child
    had reported as saved or a later one.
    """
    env_path = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {env_path!r}\n{killed_writer.START}", str(tmp_path), "300"],
        capture_output=True,
        text=True,
        cwd=Path(killed_writer.__file__).parents[2],
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, last, in_a_save = (int(n) for n in done.stdout.split())
    assert kills == 300 and last > 100 and in_a_save > 100, done.stdout
