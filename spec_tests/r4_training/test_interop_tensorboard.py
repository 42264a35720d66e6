"""A run's TensorBoard files, read by TensorBoard itself."""

import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest

from refimpl.spec_tests.cases import runs
from refimpl.train.run import Log, Samples, records, train

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
MISSING = [name for name in ("tensorboard", "tensorboardX") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install tensorboard tensorboardX"
)


@pytest.mark.filterwarnings("ignore")  # of protobuf and TensorBoard themselves
def test_tensorboard_reads_what_the_journal_holds(tmp_path):
    """Catches a metric that is missing or at another step, numbers of a run that was cut off beside those of the one that went on
    from there, and samples that are no text. Values travel as float32.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = runs.job(runs.shards(tmp_path), log=Log(peak=1e9, tensorboard=True), samples=Samples(("1 times",), 3, 4))
    folder = tmp_path / "run"
    asked = iter([False, False, True])
    train(job, folder, stop=lambda: next(asked))
    train(replace(job), folder, resume=True)
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    rows = list(records(folder))
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
