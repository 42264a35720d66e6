"""A run that begins with given weights: another run's, a training checkpoint's, released files'; checked against its model."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.checkpoint import save
from refimpl.spec_tests.cases import runs
from refimpl.train import State, step
from refimpl.train.checkpoints import Keeper
from refimpl.train.data import Reader, Shards
from refimpl.train.recipe import read
from refimpl.train.run import records, simulated, train

CONFIG = runs.CONFIG


def masters(folder):
    return {n: np.array(w) for n, w in Keeper(folder / "checkpoints").newest().saved.tensors("master").items()}


@pytest.fixture(scope="module")
def released(whole, tmp_path_factory):
    """The run's weights as safetensors with a config.json."""
    folder = tmp_path_factory.mktemp("released")
    save(folder, masters(whole[1]), CONFIG, dtype="float32")
    return folder


@pytest.mark.parametrize(
    "source", ["run", "safetensors", *[pytest.param(s, marks=pytest.mark.slow) for s in ("checkpoint", "ranks")]]
)
def test_the_first_step_is_one_from_these_weights(whole, released, shards, tmp_path, source):
    """Catches a run that begins with new weights all the same, moments or a step number that come with them, a balancing bias that
    does not, and a cursor that goes on in the data of the other run. Oracle: `train.step` on the first batch.
    """
    folders = {"checkpoint": whole[1] / "checkpoints" / "step-00000006", "safetensors": released}
    job = replace(runs.job(shards), init=folders.get(source, whole[1]), steps=1)
    end = train(job, tmp_path / "run") if source != "ranks" else simulated(job, tmp_path / "run", 1)[0]
    reader = Reader(Shards(shards), 3, None)
    batch, _ = reader.take(reader.start(), runs.BATCH)
    state, report = step(CONFIG, State(masters(whole[1])), recipe=job.run.recipe(0), **batch.inputs())
    (record,) = records(tmp_path / "run")
    assert (record["step"], record["loss"], record["norm"]) == (1, report.loss, report.norm) and end.began == 0
    for name, w in masters(tmp_path / "run").items():
        np.testing.assert_array_equal(w, state.weights[name], err_msg=name)


def without_mtp():
    d = runs.recipe()
    d["phase"][0]["mtp_weight"] = 0
    return read(d)


def test_modules_that_are_not_trained_are_left_out(whole, shards, tmp_path):
    """Catches a checkpoint with MTP modules that nobody can fine-tune without them."""
    end = train(replace(runs.job(shards), init=whole[1], run=without_mtp(), steps=1), tmp_path)
    assert end.weights and not [name for name in end.weights if ".layers.2." in name]


@pytest.mark.parametrize(
    ("changed", "spoil", "says"),
    [
        (
            {"routed_scaling_factor": 9.0},
            {},
            r"another config: routed_scaling_factor is .* there, 9.0 in \[model\]\n  while beg",
        ),
        (
            {"num_nextn_predict_layers": 2},
            {},
            r"weights of the model are not there, .*layers.3.*num_nextn_predict_layers = 0",
        ),
        ({}, {"model.norm.weight": None}, r"1 weights of the model are not there, the first \['model.norm.weight'\]\n"),
        ({}, {"model.norms.weight": np.ones(24)}, r"1 weights are not the model's, the first \['model.norms.weight'\]"),
        ({}, {"model.norm.weight": np.ones(25)}, r"model.norm.weight has shape \[25\]; the model's has \[24\]"),
        ({}, {"model.norm.weight": np.full(24, np.nan)}, r"model.norm.weight holds NaN or infinity\n  while beginning"),
        ({"rope_scaling": "yarn"}, {}, ""),
    ],
)
def test_weights_of_another_model_are_refused(whole, shards, tmp_path, changed, spoil, says):
    """Catches weights that are read as something else than they are, and a longer context that is taken for another model."""
    weights = {n: w for n, w in (masters(whole[1]) | spoil).items() if w is not None}
    save(tmp_path / "w", {n: np.float32(w) for n, w in weights.items()}, CONFIG, dtype="float32")
    if "rope_scaling" in changed:
        changed = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
    job = replace(runs.job(shards), config=config_with(changed), init=tmp_path / "w", steps=1)
    if not says:
        assert train(job, tmp_path / "run").complete
        return
    with pytest.raises(SpecError, match=says):
        train(job, tmp_path / "run")


def config_with(changed):
    return type(CONFIG).from_dict(CONFIG.to_dict() | changed)


def test_a_folder_without_weights_is_refused(shards, tmp_path):
    """Catches a run from nothing where a name is mistyped, or a run has no checkpoint yet."""
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for wrong, says in ((tmp_path / "nowhere", "nowhere"), (tmp_path / "empty", "the run has no checkpoint yet")):
        with pytest.raises(SpecError, match=rf"(?s){says}.*while beginning from"):
            train(replace(runs.job(shards), init=wrong), tmp_path / "run")
