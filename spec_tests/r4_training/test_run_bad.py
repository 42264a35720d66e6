"""What can go wrong in a training run: each is named with its place, and nothing that was good is lost."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError, ops
from refimpl.layers.stage import STAGES
from refimpl.spec_tests.cases import runs
from refimpl.spec_tests.cases.failing_disk import FullDisk
from refimpl.train.checkpoints import Keeper, keeper
from refimpl.train.data import Cursor
from refimpl.train.guard import NotFinite
from refimpl.train.recipe import load, read, to_toml
from refimpl.train.run import Evaluation, Samples, feed, journal, load_job, records, train
from refimpl.train.run.monitor import VARIES


def without_times(folder):
    return [{name: x for name, x in r.items() if name not in VARIES} for r in records(folder)]


def ends_as(whole, job, folder):
    """Resumed, a run ends with the bits and the records of one that nothing disturbed."""
    end = train(job, folder, resume=True)
    for name, w in whole[0].weights.items():
        np.testing.assert_array_equal(end.weights[name], w, err_msg=name)
    assert without_times(folder) == without_times(whole[1])


# ---- Recipe files

TABLES = """
[model]
preset = "tiny"
vocab_size = 262

[data]
shards = "shards"
"""


def written(folder, tables=TABLES, **changes):
    """A recipe file with tables, some lines of it replaced."""
    text = to_toml(runs.recipe()) + tables
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def test_a_recipe_file_is_a_job(tmp_path):
    """Catches a table that is read and dropped, a path relative to somewhere else, a default that is not the documented one."""
    more = """
[train]
seed = 7
steps = 4
micro_batch = 2
memory = "64K"
mesh = "dp=2"
schedule = "gpipe"
init = "before"
[checkpoints]
every = 3
milestone = 6
[evaluation]
shards = "held"
sequences = 4
batch = 2
[samples]
prompts = ["a", "b"]
temperature = 0.5
[log]
tensorboard = true
peak = "2G"
"""
    more = more.replace('"2G"', "2e9")
    job = load_job(written(tmp_path, TABLES + more))
    assert job.shards == {"only": tmp_path / "shards"} and job.config.vocab_size == 262 and len(job) == 4
    assert (job.seed, job.micro_batch, job.memory, job.mesh, job.schedule) == (7, 2, 64000, "dp=2", "gpipe")
    assert job.init == tmp_path / "before"
    assert (job.checkpoints.every, job.checkpoints.last, job.checkpoints.milestone) == (3, 3, 6)
    assert job.evaluation == Evaluation(tmp_path / "held", 100, 4, 2)
    assert job.samples == Samples(("a", "b"), 100, 64, 0.5)
    assert job.log.tensorboard and job.log.peak == 2e9 and job.log.every == 1
    assert read(runs.recipe()) == job.run == load(tmp_path / "job.toml")  # `refimpl recipe` reads it too


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('preset = "tiny"', 'preset = "tinny"', r"preset 'tinny'; known: .*tiny.*\n  in \[model\]\n  in recipe"),
        ('preset = "tiny"', 'preset = "tiny"\nconfig = "c.json"', r"either a preset or a config"),
        ('preset = "tiny"', 'preset = "tiny"\nhiden_size = 8', r"does not know: hiden_size\n  in \[model\]"),
        ('shards = "shards"', "", r"shards is missing.*\n  in \[data\]"),
        ('shards = "shards"', 'shards = { first = "a" }', r"shards are for \['first'\]; the phases are \['only'\]"),
        (
            'shards = "shards"',
            'shards = "shards"\nepoch = 2',
            r"unknown key 'epoch' in \[data\]; did you mean epochs\?",
        ),
        ("[data]", "[train]\nmemory = 'most'\n[data]", r"'most' is no amount.*\n  in \[train\]"),
        (
            "[data]",
            "[train]\nmicro_batch = 3\n[data]",
            r"batches of 4 sequences are no micro-batches of 3\n  in phase 'only'",
        ),
        ("[data]", "[train]\nsteps = 0\n[data]", r"steps is 0; expected a whole number of at least 1\n  in \[train\]"),
        ("[data]", "[train]\nmesh = 'pp=two'\n[data]", r"'pp=two' in mesh"),
        ("[data]", "[samples]\nprompts = []\n[data]", r"prompts is \[\]; expected a list of texts\n  in \[samples\]"),
        ("[data]", "[evaluation]\nevery = 2\n[data]", r"shards is missing\n  in \[evaluation\]"),
        ("[data]", "[log]\ntensorboard = 1\n[data]", r"tensorboard is 1; expected true or false\n  in \[log\]"),
        (
            "[data]",
            "[checkpoint]\nevery = 2\n[data]",
            r"unknown key 'checkpoint' in the recipe; did you mean checkpoints\?",
        ),
        ("[model]", "[[model]]", r"model is \[.*\]; expected a table"),
        ('precision = "bf16"', 'precision = "fp16"', r"loss_scale goes with precision 'fp16'"),
        ("steps = 2", "steps = 9", r"9 steps from step 0 on; the phase has 6"),
        ("{ value = 0.1 }", "{ value = 0.1, tokens = 5 }", r"mtp_weight does not add up: 144 \+ 5 = 149 tokens"),
    ],
)
def test_a_recipe_file_that_is_wrong_is_refused(tmp_path, old, new, says):
    """Catches a key that is ignored, a schedule that does not cover its phase, and a message without its place."""
    with pytest.raises(SpecError, match=says):
        load_job(written(tmp_path, **{old: new}))


# ---- Data


def relabelled(folder, **changes):
    index = json.loads((folder / "index.json").read_text()) | changes
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_shards_that_do_not_fit_are_refused(shards, tmp_path):
    """Catches ids that mean other texts, ids that the model does not have, rows of another length, held-out text of another
    tokenizer, prompts without one; and a run folder made for nothing.
    """
    other = relabelled(runs.shards(tmp_path / "other"), tokenizer="sha256:another")
    long = runs.shards(tmp_path / "long", length=13)
    job = runs.job(shards)
    cases = [
        (
            replace(job, tokenizer="bytes", shards={"only": other}),
            r"made by tokenizer sha256:another, not by bytes/1.*\n  in ph",
        ),
        (replace(job, config=job.config.replace(vocab_size=200)), r"of 262 ids; the model has only 200"),
        (replace(job, shards={"only": long}), r"rows of 13 tokens, the phase sequences of 12\n  in phase 'only'"),
        (
            replace(job, evaluation=Evaluation(other, 1, 4, 4)),
            r"by tokenizer sha256:another, not by bytes/1.*\n  in \[eval",
        ),
        (
            replace(job, evaluation=Evaluation(shards, 1, 999, 9)),
            r"has \d+ rows; sequences is 999\n  in \[evaluation\]",
        ),
        (
            replace(job, shards={"only": other}, samples=Samples(("a",))),
            r"samples need a tokenizer, the shards' is sha256:another: name",
        ),
        (replace(job, shards={}), r"shards for the phases \[\]; the recipe has \['only'\]"),
        (replace(job, memory="5"), r"memory is '5'; keep"),
    ]
    for bad, says in cases:
        with pytest.raises(SpecError, match=says):
            train(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_ends_too_early_is_seen_before_the_first_step(tmp_path):
    """Catches a run that trains on a short last batch, or ends without its last steps."""
    few = runs.shards(tmp_path / "few", text="".join([f"{i} is {i}.\n" for i in range(22)]))
    job = replace(runs.job(few), epochs=1)
    rows = len(feed.Shards(few))
    assert 4 * runs.BATCH <= rows < 6 * runs.BATCH
    with pytest.raises(
        SpecError, match=rf"gives {rows} sequences in 1 epochs; the 6 steps take more from step {rows // 4} on"
    ):
        train(job, tmp_path / "run")
    assert train(replace(job, steps=rows // 4), tmp_path / "run").complete


def test_a_cursor_that_does_not_fit_is_refused(shards):
    """Catches a run that goes on beyond its data, in another order, or in other shards."""
    f = feed.Feed(replace(runs.job(shards), epochs=9))
    of, phase = feed.Shards(shards).fingerprint, runs.job(shards).run.phases[0]
    good = Cursor(8, 3, of)
    assert f.restored({of: good.to_dict()}, phase) == {of: good}
    for bad, says in [
        ({of: replace(good, samples=10**6).to_dict()}, "the cursor is past the end: 1000000 samples"),
        ({of: replace(good, seed=4).to_dict()}, "order of seed 4, not 3"),
        ({"sha256:x": replace(good, data="sha256:x").to_dict()}, "the run has read sha256:x"),
        ({of: {"samples": 3}}, "not a cursor"),
    ]:
        with pytest.raises(SpecError, match=says):
            f.restored(bad, phase)


# ---- Checkpoints


@pytest.fixture
def begun(shards, tmp_path):
    """A run of two steps."""
    job = runs.job(shards)
    train(replace(job, steps=2), tmp_path / "run")
    return job, tmp_path / "run"


def test_a_checkpoint_of_another_run_is_refused(begun):
    """Catches masters of one model in another, and a resumed run with other schedules, another order or another optimiser."""
    job, folder = begun
    slower = runs.recipe()
    slower["phase"][0]["aux_weight"] = 2e-2
    cases = [
        (
            replace(job, config=job.config.replace(rms_norm_eps=1e-5)),
            r"checkpoint of another config: rms_norm_eps was 1e-06, is",
        ),
        (replace(job, seed=4), r"of a run with another recipe: seed was 3, is 4"),
        (replace(job, run=read(slower)), r"another recipe: phase only was"),
        (replace(job, run=read(runs.recipe(clip=0.5))), r"another recipe: optimizer was .*\n  while training in"),
    ]
    for bad, says in cases:
        with pytest.raises(SpecError, match=says):
            train(bad, folder, resume=True)
    assert Keeper(folder / "checkpoints").steps() == [2] and train(job, folder, resume=True).complete


def test_no_whole_checkpoint_is_not_a_new_run(begun):
    """Catches a damaged checkpoint taken for none, and the run begun again over its metrics."""
    job, folder = begun
    shard = next((folder / "checkpoints").rglob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SpecError, match=r"no checkpoint in .* is whole:\n  step-00000002: "):
        train(job, folder, resume=True)


# ---- A full disk


def test_a_disk_that_is_full_at_a_checkpoint(whole, shards, tmp_path, monkeypatch):
    """Catches a torn checkpoint, a good one given up for it, an error without its file, and records of steps that are gone."""
    job, folder = runs.job(shards), tmp_path / "run"
    one = next((whole[1] / "checkpoints").rglob("rank-*"))
    disk = FullDisk(one.stat().st_size * 3 // 2)
    monkeypatch.setattr(keeper, "Disk", lambda: disk)
    with pytest.raises(SpecError, match=r"(?s)No space left on device.*while saving step 4 to .*\n  while training in"):
        train(job, folder)
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000002"]
    monkeypatch.undo()
    ends_as(whole, job, folder)


@pytest.mark.parametrize("part", [20, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_the_metrics(whole, shards, tmp_path, monkeypatch, part):
    """Catches a half line that a resumed run cannot read, or reads as a step; a step without its line."""
    job, folder, before, left = runs.job(shards), tmp_path / "run", journal.Journal.add, [4]

    def add(self, record):
        left[0] -= 1
        if not left[0]:
            self._f = Full(self._f, part)
        before(self, record)

    monkeypatch.setattr(journal.Journal, "add", add)
    with pytest.raises(SpecError, match=r"metrics.jsonl: No space left on device, at step 4\n  while training in"):
        train(job, folder)
    assert len(list(records(folder))) == 3
    monkeypatch.undo()
    ends_as(whole, job, folder)


class Full:
    """A file that takes a part of the next write, and no more."""

    def __init__(self, f, part):
        self._f, self._part = f, part

    def write(self, data):
        self._f.write(data[: self._part])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self._f, name)


# ---- No number


def test_a_loss_that_is_no_number_ends_the_run(whole, shards, tmp_path, monkeypatch):
    """Catches a run that goes on with NaN, saves it, loses the good step since the last checkpoint, or does not say where it began.

    The third step of six is spoiled; a checkpoint comes every second one. The run can go on when the cause is gone.
    """
    job, folder, before, done = replace(runs.job(shards)), tmp_path / "run", STAGES["mla.kv_b"].fn, []

    def spoiled(*args, **static):
        y = before(*args, **static)
        return ops.add(y, np.float32(np.nan)) if len(done) == 3 else y

    monkeypatch.setitem(STAGES["mla.kv_b"].__dict__, "fn", spoiled)
    says = (
        r"(?s)step 4: loss nan.*first seen in forward: fwd/L0/mla.kv_b.*\n  kept: .*step-00000003\n  while training in"
    )
    with pytest.raises(NotFinite, match=says):
        train(job, folder, tell=done.append)
    assert Keeper(folder / "checkpoints").steps() == [2, 3] and len(done) == 3
    monkeypatch.undo()
    ends_as(whole, job, folder)
