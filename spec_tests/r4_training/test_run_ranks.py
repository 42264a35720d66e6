"""A training run on ranks: the run that one rank takes, elastic at every checkpoint, the same bits under MPI."""

import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refimpl import train as train_room
from refimpl.autograd import SpecError, ops, primitive
from refimpl.layers.stage import STAGES, tap_name
from refimpl.parallel_emulation.comm import Log, counted, spmd
from refimpl.parallel_emulation.comm.launcher import mpiexec_command
from refimpl.parallel_emulation.cost.cluster import Cluster
from refimpl.spec_tests.cases import runs
from refimpl.train.checkpoints import Keeper
from refimpl.train.guard import NotFinite
from refimpl.train.recipe import read, to_toml
from refimpl.train.run import Evaluation, Samples, records, simulated, train
from refimpl.train.run.monitor import VARIES
from refimpl.train.run.ranks import links

CLOSE = 3e-4
"""Of a loss after a few steps. float32 sums in another order, 1e-7 of a gradient, but AdamW divides a gradient by its own size: an
element that is nearly 0 beside that rounding moves by up to lr = 3e-3 either way.
"""


def job(folder, **changes):
    """Four steps in float32 on rows that end in padding, held-out text after the third and the last."""
    shards = runs.shards(folder / "data", packing="best-fit")
    held = runs.shards(folder / "held", text="2 times 2 is 4.\n" * 9, packing="best-fit")
    plain = runs.job(shards, run=read(runs.recipe("float32")), evaluation=Evaluation(held, 3, 4, 4), steps=4)
    return replace(plain, **changes)


def saved(folder):
    """Every tensor of the newest checkpoint by kind and name."""
    found = Keeper(folder / "checkpoints").newest().saved
    kinds = ("master", "adam.m", "adam.v", "ema")
    return {f"{kind}/{n}": np.array(x) for kind in kinds for n, x in found.tensors(kind).items()}


def same(folder):
    return [{name: x for name, x in r.items() if name not in VARIES} for r in records(folder)]


def equal(a, b):
    """The same checkpoint and the same records, bit for bit."""
    x, y = saved(a), saved(b)
    assert x.keys() == y.keys()
    for name, data in x.items():
        np.testing.assert_array_equal(data, y[name], err_msg=name)
    assert same(a) == same(b)


def alike(a, b):
    """The same run up to the order of sums: the same rows, loads nearly."""
    for mine, theirs in zip(same(a), same(b), strict=True):
        assert mine["tokens"] == theirs["tokens"] and mine["lr"] == theirs["lr"]
        assert (mine.keys() - theirs.keys()) <= {"links/bytes", "links/messages", "links/h800_s"}
        for name in theirs:
            if name.startswith(("loss", "eval", "norm")):
                assert mine[name] == pytest.approx(theirs[name], rel=CLOSE, abs=CLOSE), (mine["step"], name)


def stop_after(n):
    """Asked once a step by each rank of a run: only rank 0 hears of it, at step n."""
    asked = itertools.count(1)
    return lambda: next(asked) == n


def test_two_ranks_take_the_run_of_one(tmp_path):
    """Catches ranks that read other rows, an average or a bias that is not divided, a stop that only one rank follows, and a
    checkpoint that two ranks write and one, or two, cannot go on from.
    """
    one, two = job(tmp_path), job(tmp_path, mesh="ep=2")
    train(one, tmp_path / "one")
    simulated(two, tmp_path / "two", 2)
    alike(tmp_path / "two", tmp_path / "one")
    mine, theirs = saved(tmp_path / "two"), saved(tmp_path / "one")
    for name in [
        n for n in theirs if n.startswith("ema/")
    ]:  # of weights of 0.1 that move by 3e-3 a step; a bias has none
        want = mine[name.replace("ema/", "master/")] if name.endswith("bias") else theirs[name]
        np.testing.assert_allclose(mine[name], want, rtol=0, atol=0 if name.endswith("bias") else 1e-3, err_msg=name)
    ends = simulated(two, tmp_path / "stopped", 2, stop=stop_after(5))
    assert [(e.step, e.complete) for e in ends] == [(3, False)] * 2
    shutil.copytree(tmp_path / "stopped", tmp_path / "fewer")
    simulated(two, tmp_path / "stopped", 2, resume=True)
    equal(tmp_path / "stopped", tmp_path / "two")
    train(one, tmp_path / "fewer", resume=True)
    alike(tmp_path / "fewer", tmp_path / "one")
    assert {n: x.shape for n, x in saved(tmp_path / "fewer").items()} == {
        n: x.shape for n, x in saved(tmp_path / "one").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "ranks", "schedule", "micro_batch"),
    [("pp=2,ep=2", 4, "1f1b", 1), ("tp=2", 2, "gpipe", 2), ("pp=2", 2, "dualpipe", 1), ("dp=2,ep=2", 4, "gpipe", 1)],
)
def test_every_mesh_takes_the_run_of_one(tmp_path, mesh, ranks, schedule, micro_batch):
    """Catches an axis along which the average, the parts of the loss or the held-out loss are counted twice; a resumed run."""
    train(job(tmp_path), tmp_path / "one")
    many = job(tmp_path, mesh=mesh, schedule=schedule, micro_batch=micro_batch)
    simulated(many, tmp_path / "many", ranks)
    alike(tmp_path / "many", tmp_path / "one")
    simulated(many, tmp_path / "again", ranks, stop=stop_after(2 * ranks))
    simulated(many, tmp_path / "again", ranks, resume=True)
    equal(tmp_path / "again", tmp_path / "many")


@pytest.mark.slow
def test_a_phase_changes_the_model_on_ranks_too(tmp_path):
    """Catches YaRN that a mesh never switches on (R 4.3), or that a resumed run switches on a phase early. Oracle: one rank."""
    d = runs.recipe("float32")
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 12}
    d["phase"].append(dict(d["phase"][0], name="longer", steps=3, sequence=24, config={"rope_scaling": yarn}))
    for key in ("gamma", "mtp_weight"):
        d["phase"][1][key] = 0.1
    short, long = runs.shards(tmp_path / "short"), runs.shards(tmp_path / "long", length=24)
    both = replace(runs.job(short, run=read(d)), shards={"only": short, "longer": long})
    train(both, tmp_path / "one")
    plain = dict(d, phase=[d["phase"][0], {k: x for k, x in d["phase"][1].items() if k != "config"}])
    train(replace(both, run=read(plain)), tmp_path / "plain")
    assert list(records(tmp_path / "one"))[6]["loss"] != list(records(tmp_path / "plain"))[6]["loss"]
    many = replace(both, mesh="ep=2")
    simulated(many, tmp_path / "two", 2)
    alike(tmp_path / "two", tmp_path / "one")
    for stop in (6, 7):
        folder = tmp_path / f"stop{stop}"
        simulated(many, folder, 2, stop=stop_after(2 * stop))
        simulated(many, folder, 2, resume=True)
        equal(folder, tmp_path / "two")


def spoiled_forward(y):
    return ops.add(y, np.float32(np.nan))


@primitive
def spoiled_backward(y):
    return y, (lambda dy: dy * np.float32(np.inf),)


@pytest.mark.parametrize(
    ("precision", "spoiled", "place", "mesh", "says"),
    [
        ("float32", spoiled_forward, "", "ep=2", "rank 0: first seen in forward: fwd/L0/mla.kv_b"),
        ("fp8", spoiled_forward, "L1", "pp=2", "rank 1: first seen in forward: fwd/L1/mla.kv_b"),
        pytest.param(
            *("fp8", spoiled_backward, "L1", "pp=2", "rank 1: first seen in backward: the gradient of fwd/L1/mla.c_kv"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("bf16", spoiled_forward, "L0", "pp=2", "rank 0: first seen in forward: fwd/L0/mla.kv_b"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("fp8", spoiled_backward, "", "ep=2", "rank 0: first seen in backward: the gradient of fwd/mtp1/mla.c_kv"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_number_on_ranks(tmp_path, monkeypatch, precision, spoiled, place, mesh, says):
    """Catches a rank that goes on alone after a loss that is no number, one that a quantiser stops while others wait (FP8), a good
    state that is not kept, and a stage named that only received what another rank's gave: in a pipeline rank 0 sees a
    forward's NaN of rank 1 in backward, at its own last layer.
    """
    run = read(runs.recipe(precision))
    two, before, done = job(tmp_path, mesh=mesh, evaluation=None, run=run), STAGES["mla.kv_b"].fn, []

    def stage(*args, **static):
        y = before(*args, **static)
        return spoiled(y) if len(done) == 3 and place in tap_name(STAGES["mla.kv_b"]) else y

    monkeypatch.setitem(STAGES["mla.kv_b"].__dict__, "fn", stage)
    with pytest.raises(NotFinite, match=rf"(?s)step 4: loss .*{says}.*kept: .*step-00000003"):
        simulated(two, tmp_path / "run", 2, tell=done.append)
    assert Keeper(tmp_path / "run" / "checkpoints").steps() == [2, 3]


def test_a_weight_that_is_no_number_on_ranks(tmp_path, monkeypatch):
    """Catches a stage blamed for what a weight holds already, on the rank that has it."""
    init = train_room.init
    bad = "model.layers.1.self_attn.o_proj.weight"
    monkeypatch.setattr(
        "refimpl.train.run.beginning.init",
        lambda *a, **k: {n: w * np.float32(np.nan) if n == bad else w for n, w in init(*a, **k).items()},
    )
    with pytest.raises(NotFinite, match=rf"rank 1: the weight {bad} holds it already: .*\n  it was the first step"):
        simulated(job(tmp_path, mesh="pp=2", evaluation=None), tmp_path / "run", 2)


def _sometimes():
    d = runs.recipe("float32")
    d["phase"][0]["mtp_weight"] = [{"value": 0.3, "share": 0.5}, {"value": 0.0}]
    return d


@pytest.mark.slow
def test_mtp_modules_that_are_never_trained_are_left_out(tmp_path):
    """Catches a checkpoint that one rank writes with them and ranks without them: neither could go on from the other's."""
    d = runs.recipe("float32")
    d["phase"][0]["mtp_weight"] = 0
    plain = job(tmp_path, run=read(d))
    end = train(plain, tmp_path / "one")
    assert not [n for n in end.weights if ".layers.2." in n] and "loss/mtp1" not in next(records(tmp_path / "one"))
    train(plain, tmp_path / "run", stop=stop_after(2))
    simulated(replace(plain, mesh="ep=2"), tmp_path / "run", 2, resume=True, stop=stop_after(1))
    train(plain, tmp_path / "run", resume=True)
    alike(tmp_path / "run", tmp_path / "one")


def test_what_ranks_cannot_do_is_refused(tmp_path):
    """Catches a batch that does not divide, a mesh of another size, a policy or samples that would be dropped without a word."""
    plain = job(tmp_path, evaluation=None)
    cases = [
        (replace(plain, mesh="pp=2,ep=2"), r"the mesh pp 2 x dp 1 x ep 2 x tp 1 takes 4 ranks, the run has 3"),
        (plain, r"4 sequences for 3 data-parallel ranks in micro-batches of 2"),
        (replace(plain, memory="report"), r"memory 'report': recomputation is for one rank"),
        (
            replace(plain, mesh="ep=3", steps=2, evaluation=Evaluation(plain.shards["only"], 9, 4, 4)),
            r"4 sequences for 3 data",
        ),
        (replace(plain, samples=Samples(("a",))), r"samples are made on one rank"),
        (replace(plain, mesh="pp=3"), r"2 layers do not divide among 3 stages"),
        (replace(plain, run=read(_sometimes()), mesh="pp=3"), r"mtp_weight is 0 in a part of the run only"),
    ]
    for bad, says in cases:
        with pytest.raises(SpecError, match=says):
            simulated(bad, tmp_path / "run", 3)


# ---- What goes over the links


def talk(comm):
    """Every kind of call, also in a group, and to oneself."""
    comm, tally = counted(comm)
    assert tally.taken() == {"sent": [0, 0, 0], "messages": 0, "seconds": 0.0}, "nothing has been said yet"
    x = np.arange(6, dtype=np.float32)
    comm.allgather(x, "a")
    comm.broadcast(x if comm.rank == 1 else None, 1, "b")
    comm.alltoallv(np.ones((6, 2)), [comm.rank, 3, 3 - comm.rank], "c")
    half = comm.split(comm.rank > 0, label="d")
    half.allgather(x[: comm.rank + 1] if half.size == 1 else x, "e")
    comm.exchange([(comm.rank, x), ((comm.rank + 1) % 3, x[:2])], [comm.rank, (comm.rank - 1) % 3], "f")
    comm.barrier("g")
    first = tally.taken()
    return first, tally.taken()


def test_bytes_are_counted_as_a_log_counts_them():
    """Catches bytes to oneself, a broadcast counted where it is received, a group's ranks taken for the run's, counts that go on
    adding or do not begin at 0. Oracle: the simulator's log.
    """
    log = Log()
    found = spmd(3, talk, log=log)
    np.testing.assert_array_equal([first["sent"] for first, _ in found], log.matrix(3))
    assert [first["messages"] for first, _ in found] == [sum(len(r.sent) for r in log.select(rank=i)) for i in range(3)]
    assert all(then == {"sent": [0, 0, 0], "messages": 0, "seconds": 0.0} for _, then in found)
    assert all(first["seconds"] > 0 for first, _ in found)


def test_links_by_hand():
    """Catches a mean instead of the busiest rank, messages of all ranks in its latency. Ranks 0 and 8 are in different nodes."""
    sent = np.zeros((9, 9), int)
    sent[0, 8], sent[0, 1], sent[3, 2] = 44_000, 153, 1530
    taken = [{"sent": row.tolist(), "messages": int((row > 0).sum()), "seconds": i / 8} for i, row in enumerate(sent)]
    c = Cluster()
    want = max(c.ib.latency * 2 + 1e-6, c.nvlink.latency * 2 + 1e-8)
    assert links(taken) == {
        "links/bytes": 45_683,
        "links/messages": 3,
        "links/h800_s": pytest.approx(want),
        "links/waited_s": 1.0,
    }
    assert links([{}]) == {}


# ---- MPI

FOUND = importlib.util.find_spec("mpi4py") is not None and (
    (Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")
)


ROOT = Path(__file__).parents[2]


def mpi_job(folder, steps=runs.STEPS):
    """A job file for two ranks, the command that trains it on the simulator, and that under mpiexec."""
    d = runs.recipe("float32")
    d["phase"][0]["steps"] = steps
    keys = {k: x for k, x in runs.CONFIG.to_dict().items() if x is not None and not isinstance(x, dict)}
    model = "".join(f"{k} = {str(x).lower() if isinstance(x, bool) else repr(x)}\n" for k, x in keys.items())
    (folder / "job.toml").write_text(
        f'{to_toml(d)}\n[model]\npreset = "tiny"\n{model}[data]\nshards = "data/shards"\n[train]\nmesh = "ep=2"\n'
        "[checkpoints]\nevery = 2\n[log]\npeak = 1e9\n"
    )
    runs.shards(folder / "data")
    tail = ["-m", "refimpl", "train", str(folder / "job.toml")]
    start = [*mpiexec_command(2), sys.executable, "-m", "mpi4py", *tail, "-o", str(folder / "mpi")]
    return [sys.executable, *tail, "-o", str(folder / "sim"), "--ranks", "2"], start


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")
def test_under_mpi_the_run_has_the_bits_of_the_simulator(tmp_path):
    """Catches a run that only works where ranks share memory: `refimpl train` under mpiexec, stopped and resumed, against the
    simulator's run in one go.
    """
    simulator, start = mpi_job(tmp_path)
    subprocess.run(simulator, check=True, cwd=ROOT)
    told = subprocess.run([*start, "--steps", "3"], check=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    subprocess.run([*start, "--resume"], check=True, cwd=ROOT, timeout=240)
    assert told.stdout.count("step 3/3") == 1
    equal(tmp_path / "mpi", tmp_path / "sim")


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")
@pytest.mark.parametrize("how", ["--stop", "SIGUSR1", "Ctrl-C"])
def test_a_run_under_mpi_is_stopped_and_nothing_is_lost(tmp_path, how):
    """Catches a job that can be ended by killing it only: from outside, by the file, by a signal to mpiexec or by Ctrl-C in the
    terminal of `--mpi`, it ends after a step that no `every` saves, with that step saved, and goes on as if it had never stopped.
    """
    simulator, start = mpi_job(tmp_path, steps=2000)
    if how == "Ctrl-C":
        start = [*simulator[:-3], str(tmp_path / "mpi"), "--mpi", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background are started deaf to it
    with subprocess.Popen(start, cwd=ROOT, **pipes, start_new_session=True, preexec_fn=heard) as job:
        for line in job.stdout:
            if line.startswith("step 3/"):
                break
        if how == "--stop":
            subprocess.run([sys.executable, "-m", "refimpl", "train", "--stop", tmp_path / "mpi"], cwd=ROOT, check=True)
        elif how == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)  # to all whom a terminal would send it
        else:
            job.send_signal(signal.SIGUSR1)
        _, err = job.communicate(timeout=240)
    assert job.returncode == 130
    done, again = re.search(r"stopped after step (\d+), saved; go on with: (.*)\n", err).groups()
    done = int(done)
    assert "--mpi 2 --resume" in again and "ABORT" not in err if how == "Ctrl-C" else again.startswith("mpiexec -n 2 ")
    assert [r["step"] for r in records(tmp_path / "mpi")] == list(range(1, done + 1))
    subprocess.run([*start, "--resume", "--steps", str(done + 1)], check=True, cwd=ROOT, timeout=240)
    subprocess.run([*simulator, "--steps", str(done + 1)], check=True, cwd=ROOT)
    equal(tmp_path / "mpi", tmp_path / "sim")
