"""A rank dies in the middle of a step: the job goes on on fewer ranks from the last checkpoint, and ends where it should."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.parallel_emulation.comm import Log, RankFault, launcher, mortal, spmd
from refimpl.train.checkpoints import Keeper
from refimpl.train.checkpoints.recovery import run, survive

CLOSE = 1e-9  # as in r3_2_parallel/test_mesh.py: the order of float64 sums, through AdamW
FOUR, TWO = ("pp=2,ep=2", "dualpipe"), ("ep=2", "gpipe")
STEPS, EVERY = 5, 2


def job(n, folder, how, *rest):
    return spmd(n, run, str(folder), *how, 4, STEPS, EVERY, *rest)


def weights(results):
    """All ranks' weights by checkpoint name; the copies are the same."""
    found = {}
    for r in results:
        for name, w in r["weights"].items():
            np.testing.assert_array_equal(found.setdefault(name, w), w)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The job on four ranks and on two, and how many calls a rank makes in all and before the fourth step."""
    folder, log = tmp_path_factory.mktemp("runs"), Log()
    four = weights(spmd(4, run, str(folder / "four"), *FOUR, 4, STEPS, EVERY, log=log))
    two = weights(job(2, folder / "two", TWO))
    labels = [r.label for r in log.select(rank=1)]
    commit = [i for i, label in enumerate(labels) if label == "checkpoint.commit"]
    return four, two, commit[0] + 1, commit[1] + 1


def crash(folder, victim, calls):
    """Four ranks of which one dies, then two: (weights at the end, what was said, the step at which two began)."""
    began = []

    def attempt(shape):
        began.extend(Keeper(folder).steps()[-1:] if folder.exists() else [])
        if shape.size == 4:
            return job(4, folder, FOUR, victim, calls)
        return job(2, folder, TWO)

    results, ended = survive([Mesh(pp=2, ep=2), Mesh(ep=2)], attempt)
    return weights(results), ended, began


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Two ranks that resume at step 2 of four without anything going wrong -> weights at the end."""
    folder = tmp_path_factory.mktemp("calm")
    spmd(4, run, str(folder), *FOUR, 4, 2, EVERY)
    return weights(job(2, folder, TWO))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "where"), [(0, 0.1), *[pytest.param(*p, marks=pytest.mark.slow) for p in [(1, 0.9), (3, 0.5)]]]
)
def test_the_job_goes_on_on_fewer_ranks(tmp_path, undisturbed, calm, victim, where):
    """Catches a checkpoint of some ranks only, moments or biases that the survivors lose, batches trained twice or never.

    A rank of four dies on the way from the commit of step 2 to that of step 4. Two ranks resume at step 2. They end, bit for
    bit, where two ranks end that resume there undisturbed, and up to the order of sums where two ranks end that had always
    been two.
    """
    _, two, first, second = undisturbed
    mine, ended, began = crash(tmp_path / "run", victim, int(first + where * (second - first)))
    assert began == [2] and len(ended) == 1 and f"rank {victim} died in" in ended[0]
    for name, w in calm.items():
        np.testing.assert_array_equal(mine[name], w, err_msg=name)
        np.testing.assert_allclose(mine[name], two[name], rtol=0, atol=CLOSE, err_msg=name)


@pytest.mark.slow
def test_a_job_that_dies_before_its_first_checkpoint_begins_again(tmp_path, undisturbed):
    """Catches a resume from nothing that fails, or from ruins."""
    mine, ended, began = crash(tmp_path / "run", 2, 50)
    assert began == [] and len(ended) == 1
    for name, w in undisturbed[1].items():
        np.testing.assert_array_equal(mine[name], w, err_msg=name)


def test_only_faults_are_survived():
    """Catches a mistake of the program tried again on every mesh, and the last fault swallowed."""
    tried = []

    def attempt(error):
        def start(shape):
            tried.append(shape.size)
            raise error

        return start

    with pytest.raises(SpecError):
        survive([Mesh(ep=2), Mesh()], attempt(SpecError("bad recipe")))
    assert tried == [2]
    with pytest.raises(RankFault):
        survive([Mesh(ep=2), Mesh()], attempt(RankFault("gone")))
    assert tried == [2, 2, 1]
    with pytest.raises(SpecError, match="no mesh"):
        survive([], attempt(SpecError("")))


def talks(comm, calls):
    comm = mortal(comm, calls) if comm.rank == 1 else comm
    half = comm.split(comm.rank // 2, label="half")
    half.barrier("b")
    comm.allgather(np.ones(2), "a")
    return half.ranks


@pytest.mark.parametrize(("calls", "says"), [(1, "split 'half'"), (2, "barrier 'b'"), (3, "allgather 'a'")])
def test_a_rank_dies_in_the_call_it_is_told(calls, says):
    """Catches calls of a split group that do not count, and a death one call early or late."""
    with pytest.raises(RankFault, match=f"rank 1 died in {says}"):
        spmd(4, talks, calls)
    assert spmd(4, talks, 4) == [(0, 1), (0, 1), (2, 3), (2, 3)]
    with pytest.raises(SpecError, match="not in call 0"):
        spmd(4, talks, 0)


# ---- MPI

FOUND = importlib.util.find_spec("mpi4py") is not None and (
    (Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")
)


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")
def test_a_killed_process_is_survived_by_relaunch(tmp_path, undisturbed):
    """Catches a recovery that only works where ranks share a process: rank 1 of four gets SIGKILL between its second and
    third checkpoint; mpiexec is started again with two, and ends with the bits that the simulator ends with.
    """
    name, (_, _, first, second) = "refimpl.train.checkpoints.recovery:run", undisturbed
    folder, tail = tmp_path / "mpi", ("4", str(STEPS), str(EVERY))

    def attempt(shape):
        if shape.size == 4:
            fatal = ("1", str((first + second) // 2), "kill")
            return launcher.launch(4, [name], (str(folder), *FOUR, *tail, *fatal), timeout=240)
        return launcher.launch(2, [name], (str(folder), *TWO, *tail), timeout=240)

    found, ended = survive([Mesh(pp=2, ep=2), Mesh(ep=2)], attempt, faults=(SpecError,))
    assert len(ended) == 1 and "the MPI job" in ended[0]
    simulated = tmp_path / "simulated"
    spmd(4, run, str(simulated), *FOUR, 4, 2, EVERY)
    want = launcher.simulate(2, [name], str(simulated), *TWO, 4, STEPS, EVERY)
    assert found == want
