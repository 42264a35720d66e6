"""`refimpl train` and `refimpl plot`: from a recipe file to metrics, interrupted and resumed, on ranks, drawn."""

import argparse
import importlib.util
import re
import shlex
import shutil
import signal
import sys

import pytest

from refimpl.autograd import SpecError
from refimpl.cli import live, main, mpiexec, train
from refimpl.cli.dispatch import BAD_INPUT, INTERRUPTED
from refimpl.spec_tests.cases import runs
from refimpl.train.recipe import to_toml
from refimpl.train.run import records
from refimpl.train.run.monitor import VARIES


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory):
    """A recipe file that says what `runs.job` says."""
    folder = tmp_path_factory.mktemp("recipe")
    keys = {k: x for k, x in runs.CONFIG.to_dict().items() if isinstance(x, int) and not isinstance(x, bool)}
    model = "".join([f"{k} = {x}\n" for k, x in keys.items()])
    tables = (
        f'[model]\npreset = "tiny"\n{model}[data]\nshards = "{shards}"\n[log]\npeak = 1e9\n[checkpoints]\nevery = 2\n'
    )
    (folder / "job.toml").write_text(f"{to_toml(runs.recipe())}\n{tables}[train]\nseed = 3\n")
    return folder / "job.toml"


def same(folder):
    return [{name: x for name, x in r.items() if name not in VARIES} for r in records(folder)]


def test_a_file_and_a_command_are_the_job(recipe, whole, tmp_path, capfd):
    """Catches a table of the file that the command drops, a run that says nothing where nobody watches, lines that are no steps."""
    assert main(["train", str(recipe), "-o", str(tmp_path / "run")]) == 0
    assert same(tmp_path / "run") == same(whole[1])
    lines = [line.split("  ")[:2] for line in capfd.readouterr().out.splitlines()]
    assert lines == [[f"step {r['step']}/6", f"loss {r['loss']:.4f}"] for r in records(whole[1])]


def stopped(folder):
    assert main(["train", "--stop", str(folder)]) == 0


ENDS = {
    "Ctrl-C": lambda folder: signal.raise_signal(signal.SIGINT),
    "SIGUSR1": lambda folder: signal.raise_signal(signal.SIGUSR1),
    "--stop": stopped,
}


@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("SIGUSR1", marks=pytest.mark.slow), "--stop"])
def test_ctrl_c_saves_and_says_how_to_go_on(recipe, whole, tmp_path, monkeypatch, capfd, how):
    """Catches an interrupt in the middle of a step, steps since the last checkpoint lost, a command that does not go on, and a
    handler that stays when the command is over; a wish to stop that is not heard, or heard again by the run that goes on.
    """
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    before = live.line

    def interrupted(r, steps):
        if r["step"] == 2:
            ENDS[how](tmp_path / "run")
        return before(r, steps)

    monkeypatch.setattr(live, "line", interrupted)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run")]) == INTERRUPTED
    said = capfd.readouterr()
    assert said.out.count("\n") == 3
    assert "ending after this step" in said.err or re.search(r"asked process \d+ on .* to stop", said.err)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert not (tmp_path / "run" / "stop").exists()
    command = re.search(r"stopped after step 3, saved; go on with: refimpl (.*)\n", said.err)[1]
    assert main(shlex.split(command)) == 0
    assert same(tmp_path / "run") == same(whole[1])


def test_a_run_that_has_nothing_to_do_says_so(recipe, whole, tmp_path, capfd):
    """Catches a command that ends at once, or early, without a word."""
    folder = shutil.copytree(whole[1], tmp_path / "run")
    for more, says in (
        ([], "run has 6 of the recipe's 6 steps already, asked for 6: nothing to do"),
        (["--steps", "4"], "run has 6 of the recipe's 6 steps already, asked for 4: nothing to do"),
        (["--steps", "9"], "asked for 9 steps, the recipe has 6\n"),
    ):
        assert main(["train", str(recipe), "-o", str(folder), "--resume", *more]) == 0
        assert says in capfd.readouterr().err
    assert main(["train", str(recipe), "-o", str(tmp_path / "two"), "--steps", "2", "--from", str(whole[1])]) == 0
    assert capfd.readouterr().err == ""
    ours, theirs = [next(records(of))["loss"] for of in (tmp_path / "two", whole[1])]
    assert ours < theirs - 0.1  # it learns further
    assert main(["train", str(recipe), "-o", str(tmp_path / "no"), "--from", str(tmp_path)]) == BAD_INPUT


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path, monkeypatch, capfd):
    """Catches a run that nobody can end."""

    def twice(r, steps):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(live, "line", twice)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run")]) == INTERRUPTED
    assert "nothing was left half-written" in capfd.readouterr().err and len(same(tmp_path / "run")) == 1


def test_nobody_is_asked_to_stop_where_nobody_trains(recipe, whole, tmp_path, monkeypatch, capfd):
    """Catches a wish that lies in wait for the next run: one left over is not meant for it; and a recipe beside --stop."""
    folder = shutil.copytree(whole[1], tmp_path / "run")
    for wrong in (folder, tmp_path, tmp_path / "none"):
        assert main(["train", "--stop", str(wrong)]) == BAD_INPUT
        assert re.search("nobody trains in|is no folder of a run", capfd.readouterr().err)
    assert main(["train", str(recipe), "--stop", str(folder)]) == BAD_INPUT
    assert main(["train", "-o", str(folder)]) == BAD_INPUT
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "stop").touch()
    assert main(["train", str(recipe), "-o", str(tmp_path / "new"), "--steps", "2"]) == 0
    assert not (tmp_path / "new" / "stop").exists()


def test_the_command_under_mpiexec_is_its_command(monkeypatch):
    """Catches advice to go on alone with what was begun on ranks."""
    args = argparse.Namespace(recipe="a.toml", out="run", steps=None, init=None, ranks=None, mpi=None)
    processes = argparse.Namespace(recipe="a b.toml", out="run", steps=None, init=None, ranks=None, mpi=4)
    from_weights = argparse.Namespace(recipe="a.toml", out="run", steps=3, init="w", ranks=None, mpi=None)
    assert train.resume_command(from_weights) == "refimpl train a.toml -o run --steps 3 --from w --resume"
    assert train.resume_command(args) == "refimpl train a.toml -o run --resume"
    monkeypatch.setenv("PMIX_RANK", "0")
    assert train.resume_command(args).startswith("mpiexec -n N python -m mpi4py -m refimpl train a.toml")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert train.resume_command(args).startswith("mpiexec -n 4 python")
    assert train.resume_command(processes) == "refimpl train 'a b.toml' -o run --mpi 4 --resume"


JOB = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
assert os.getsid(0) == os.getpid() and "--mpi" in sys.argv and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
for _ in range(int(sys.argv[1])):
    os.kill(os.getppid(), signal.SIGINT)
    print(signal.sigwait([signal.SIGINT, signal.SIGUSR1]).name, flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize(
    ("times", "code", "heard"), [(0, 0, []), (0, 7, []), (1, 0, ["SIGUSR1"]), (2, 1, ["SIGUSR1", "SIGINT"])]
)
def test_a_ctrl_c_is_handed_on_to_mpiexec(monkeypatch, capfd, times, code, heard):
    """Catches a Ctrl-C that reaches mpiexec from the terminal, or as the signal at which it kills its processes; a second one that
    ends nothing; an exit code of its own; handlers that stay; a hang-up heard under nohup. The job sends its parent Ctrl-C.
    """
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    before = [signal.getsignal(getattr(signal, name)) for name in mpiexec.HANDED_ON]
    monkeypatch.setattr(
        mpiexec, "mpiexec_command", lambda n: [sys.executable, "-c", JOB, str(times), str(code), f"-n {n}"]
    )
    if times and code:
        with pytest.raises(KeyboardInterrupt):
            mpiexec.ranks_of(2, ["train", "--mpi"])
    else:
        assert mpiexec.ranks_of(2, ["train", "--mpi"]) == code
    said = capfd.readouterr()
    assert said.out.split() == heard and said.err.count("ending") == times
    assert [signal.getsignal(getattr(signal, name)) for name in mpiexec.HANDED_ON] == before
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, interrupt)
    with pytest.raises(SpecError, match="--mpi 0; at least 1"):
        mpiexec.ranks_of(0, [])


def test_in_processes_the_command_is_the_same(recipe, tmp_path, monkeypatch, capfd):
    """Catches an option that the ranks do not get, an end before the last step that counts as success, a job that is started with
    what cannot be trained, --mpi beside --ranks.
    """
    seen = []

    def alone(n, command):
        seen.append(command)
        return main([*(x for x in command if x not in ("--mpi", "3")), "--steps", "1"])

    monkeypatch.setattr(mpiexec, "ranks_of", alone)
    run = ["train", str(recipe), "-o", str(tmp_path / "run")]
    assert main([*run, "--mpi", "3"]) == INTERRUPTED
    assert main([*run, "--mpi", "3", "--steps", "1", "--resume"]) == 0
    assert seen == [[*run, "--mpi", "3"], [*run, "--steps", "1", "--mpi", "3", "--resume"]]
    assert main([*run, "--mpi", "3", "--steps", "0"]) == BAD_INPUT and len(seen) == 2
    assert main([*run, "--mpi", "3", "--ranks", "3"]) == BAD_INPUT
    assert "the simulator or processes" in capfd.readouterr().err


def test_what_went_wrong_says_how_to_go_on(recipe, whole, tmp_path, capfd):
    """Catches a run begun over another, bad input that ends as a bug, and advice to resume where nothing was begun."""
    folder = shutil.copytree(whole[1], tmp_path / "run")
    assert main(["train", str(recipe), "-o", str(folder)]) == BAD_INPUT
    said = capfd.readouterr().err
    assert "holds a run of 6 steps; --resume goes on with it" in said and "mended" not in said
    for bad in (folder / "checkpoints").glob("step-*"):
        shard = next(bad.glob("rank-*"))
        shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["train", str(recipe), "-o", str(folder), "--resume"]) == BAD_INPUT
    said = capfd.readouterr().err
    assert (
        "is whole" in said and f"when that is mended, go on with: refimpl train {recipe} -o {folder} --resume" in said
    )
    for args in (["--ranks", "0"], ["--steps", "0"], ["--steps", "-1"], ["--ranks", "3"]):
        assert main(["train", str(recipe), "-o", str(tmp_path / "no"), *args]) == BAD_INPUT


@pytest.mark.slow
def test_on_ranks_of_the_simulator(recipe, whole, tmp_path):
    """Catches --ranks that is not used: links are counted, and the losses are those of one rank up to the order of sums and the
    roundings to bfloat16 that it moves.
    """
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), "--ranks", "2", "--steps", "3"]) == 0
    for mine, theirs in zip(same(tmp_path / "run"), same(whole[1]), strict=False):
        assert mine["links/bytes"] > 0 and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_a_process_of_mpiexec_is_a_rank(recipe, tmp_path, monkeypatch, capfd):
    """Catches processes under mpiexec that each train a whole model into one folder, when mpi4py is missing too."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(["train", str(recipe), "-o", str(tmp_path / "run"), "--ranks", "2"]) == BAD_INPUT
    assert "under mpiexec the processes are the ranks" in capfd.readouterr().err


def test_plot(whole, tmp_path, capfd):
    """Catches a figure of another format than its name says, and a file that is begun and left."""
    assert main(["plot", str(whole[1]), "-o", str(tmp_path / "run.pdf")]) == BAD_INPUT
    assert "ends in .svg or .png" in capfd.readouterr().err
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "run.svg")]) == BAD_INPUT
    assert "holds no metrics.jsonl" in capfd.readouterr().err and not list(tmp_path.iterdir())
    if importlib.util.find_spec("matplotlib"):
        assert main(["plot", str(whole[1]), "-o", str(tmp_path / "run.svg"), "--metric", "load/*/dead"]) == 0
        assert "<svg" in (tmp_path / "run.svg").read_text() and capfd.readouterr().out.endswith("run.svg\n")
