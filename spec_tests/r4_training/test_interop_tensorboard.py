"""A run's TensorBoard files, read by TensorBoard itself."""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest

from refimpl.spec_tests.cases import runs
from refimpl.train.run import Log, Samples, records, train
from refimpl.train.run.tensorboard import Board

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
MISSING = [name for name in ("tensorboard", "tensorboardX") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install tensorboard tensorboardX"
)


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
    """The clock that tensorboardX names its files by stands still."""
    if not MISSING:
        monkeypatch.setattr("tensorboardX.event_file_writer.time", SimpleNamespace(time=lambda: 1.7e9))


def read(folder):
    """What TensorBoard finds in a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


@pytest.mark.filterwarnings("ignore")  # of protobuf and TensorBoard themselves
def test_tensorboard_reads_what_the_journal_holds(tmp_path):
    """Catches a metric that is missing or at another step, numbers of a run that was cut off beside those of the one that went on
    from there, a file written over by a run that goes on within the same second, and samples that are no text. Values travel as
    float32.
    """
    job = runs.job(runs.shards(tmp_path), log=Log(peak=1e9, tensorboard=True), samples=Samples(("1 times",), 3, 4))
    folder = tmp_path / "run"
    asked = iter([False, False, True])
    train(job, folder, stop=lambda: next(asked))
    train(job, folder, resume=True)
    found, rows = read(folder), list(records(folder))
    names = {name for r in rows for name, x in r.items() if isinstance(x, int | float)} - {"step"}
    assert set(found.Tags()["scalars"]) == names
    for name in names:
        events = found.Scalars(name)
        assert [e.step for e in events] == [r["step"] for r in rows]
        np.testing.assert_array_equal(
            np.float32([e.value for e in events]), np.float32([r[name] for r in rows]), err_msg=name
        )
    (tag,) = found.Tags()["tensors"]
    texts = [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)]
    assert texts == [s["text"] for s in records(folder, "samples.jsonl")] and "1 times" in tag


@pytest.mark.filterwarnings("ignore")
def test_of_runs_within_a_second_the_last_one_counts(tmp_path):
    """Catches a second run from the same step that writes over the first one's file, a file of a run that goes back to an earlier
    step and sorts before what it takes back, and a number given twice because an earlier file was removed.
    """
    begun = ((0, 1.0), (2, 2.0), (2, 3.0), (1, 4.0))
    for done, value in begun:
        board = Board(tmp_path, done)
        for step in (done + 1, done + 2):
            board.add({"step": step, "x": value})
        board.close()
    files = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert [int(name.rpartition("-")[2]) for name in files] == [done for done, _ in begun]
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("x")] == [(1, 1.0), (2, 4.0), (3, 4.0)]
    (tmp_path / "tensorboard" / files[1]).unlink()
    Board(tmp_path, 1).close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(files)
