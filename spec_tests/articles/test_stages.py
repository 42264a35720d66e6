"""Stages in one file: pre-training, longer context, several tasks; a run goes through them and resumes in the middle of any."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.spec_tests.cases import stages
from refimpl.train.checkpoints import Keeper
from refimpl.train.data import Bytes
from refimpl.train.data.tokenizer import EOS
from refimpl.train.guard import NotFinite
from refimpl.train.recipe import load, read, rows, scaled, to_toml
from refimpl.train.recipe.tasks import Task
from refimpl.train.run import load_job, records, simulated, train
from refimpl.train.run.feed import Feed
from refimpl.train.run.monitor import VARIES
from refimpl.train.tasks import samples

STEPS = 6


def saved(folder):
    """Every tensor of the newest checkpoint, and what is counted."""
    found = Keeper(folder / "checkpoints").newest().saved
    tensors = {f"{kind}/{n}": np.array(x) for kind in found.kinds() for n, x in found.tensors(kind).items()}
    return tensors, found.facts["counters"], found.facts["cursor"]


def told(folder):
    return [{name: x for name, x in r.items() if name not in VARIES} for r in records(folder)]


@pytest.fixture(scope="module", params=["uncertainty", pytest.param("loss-ratio", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory):
    """The job in one go."""
    folder = tmp_path_factory.mktemp("stages")
    job = stages.job(folder, {"by": request.param})
    train(job, folder / "run")
    return job, folder / "run"


def test_a_run_goes_through_all_stages(whole):
    """Catches a stage that is left out or trained with another's data, length or config; the tasks' share of a batch; weights that
    stand still.
    """
    job, folder = whole
    found = told(folder)
    assert [r["phase"] for r in found] == ["pre-training"] * 2 + ["longer"] + ["tasks"] * 3
    assert [r["sequence"] for r in found] == [12, 12, 24, 24, 24, 24]
    assert [job.model(step).yarn is None for step in range(STEPS)] == [True] * 2 + [False] * 4
    for r in found[:3]:
        assert "loss/main" in r and not any(name.startswith(("weight/", "loss/task")) for name in r)
    for r in found[3:]:
        assert {"loss/task.square", "loss/task.grade", "weight/square", "weight/grade"} <= r.keys()
    first, last = found[3], found[5]
    by = job.run.phases[2].weighting.by
    assert (first["weight/square"], first["weight/grade"]) == ((1, 0.5) if by == "uncertainty" else (1, 1))
    assert last["weight/square"] != first["weight/square"]
    batch, _ = Feed(job).take(job.run.at(3), {})
    assert np.bincount(batch.task).tolist() == [4, 2]


@pytest.mark.parametrize("stop", [4, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5)]])
def test_resumed_in_any_stage_it_never_stopped(whole, tmp_path, stop):
    """Catches heads, variances, their moments or step, the history of losses, or a task's cursor lost over a stop."""
    job, folder = whole
    end = train(replace(job, steps=stop), tmp_path / "run")
    assert end.step == stop
    train(job, tmp_path / "run", resume=True)
    (tensors, counters, cursor), (want, counted, place) = saved(tmp_path / "run"), saved(folder)
    assert tensors.keys() == want.keys() and (counters, cursor) == (counted, place)
    assert {"tasks/tasks.grade.weight", "tasks.v/tasks.grade.bias"} <= tensors.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)
    assert told(tmp_path / "run") == told(folder)


def test_samples_are_prefix_prompt_answer_end(tmp_path):
    """Catches a prefix that is dropped, or put before the answer; an answer that does not end; a number taken for text."""
    files = stages.files(tmp_path)
    found = samples(files["square"], Task("square", "sq "), Bytes())[7]
    assert bytes(found.prompt.tolist()) == b"sq 7" and found.answer.tolist() == [*b"49", Bytes.ids[EOS]]
    found = samples(files["grade"], Task("grade", "gr ", "regression"), Bytes())[3]
    assert bytes(found.prompt.tolist()) == b"gr xxxx" and not len(found.answer) and found.value == 1.5
    (tmp_path / "line.jsonl").write_text(json.dumps({"prompt": "a\u2028b", "answer": "c"}, ensure_ascii=False))
    assert len(samples(tmp_path / "line.jsonl", Task("t"), Bytes())) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ('["a"]', "expected an object"),
        ('{"answer": "b"}', "prompt is None"),
        ('{"prompt": "", "answer": "b"}', "prompt is ''"),
        ('{"prompt": "a", "value": 1}', "answer is None; a task of cross-entropy"),
        ('{"prompt": "' + 30 * "a" + '", "answer": "b"}', "sample 2: 32 tokens; a row has 24"),
    ],
)
def test_bad_samples_are_named(tmp_path, line, says):
    """Catches a line that is skipped or cut in silence."""
    job = stages.job(tmp_path)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    run = read(stages.recipe(tasks=[{"name": "square"}], weighting={"by": "fixed"}))
    with pytest.raises(SpecError, match=says) as error:
        Feed(replace(job, run=run, tasks={"square": path}))
    assert "in phase 'tasks'" in str(error.value) and "bad.jsonl" in str(error.value)


@pytest.mark.parametrize("value", ["1", "NaN", "true", "1e999"])
def test_a_number_is_a_finite_number(tmp_path, value):
    """Catches NaN as a target, which would count as no target at all, and a text or truth value that Python takes for a number."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "value": %s}\n' % (f'"{value}"' if value == "1" else value))
    with pytest.raises(SpecError, match="learns a finite number"):
        samples(path, Task("grade", loss="regression"), Bytes())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"tasks": [{"name": "a/b"}]}, "expected letters"),
        ({"tasks": [{"name": "a", "losss": "regression"}]}, "did you mean loss"),
        ({"tasks": [{"name": "a", "loss": "huber"}]}, "known: cross-entropy, regression"),
        ({"tasks": [{"name": "a", "share": 0}]}, "share is 0"),
        (
            {"tasks": [{"name": "a", "share": 100}, {"name": "b"}]},
            "a batch of 6 sequences has no row for every task: a 6, b 0",
        ),
        ({"tasks": [{"name": "a", "weight": 2}], "weighting": {"by": "uncertainty"}}, "found by uncertainty"),
        ({"weighting": {"by": "gradnorm"}}, "known: fixed, uncertainty, loss-ratio"),
        ({"weighting": {"by": "uncertainty", "window": 3}}, "of loss-ratio only"),
        ({"weighting": {"by": "loss-ratio", "temperature": 0}}, "temperature is 0"),
        ({"tasks": []}, "no \\[\\[phase.task\\]\\]"),
    ],
)
def test_recipes_that_do_not_add_up(changes, says):
    """Catches settings without effect, a task that never gets a row, names that cannot be told apart."""
    with pytest.raises(SpecError, match=says) as error:
        read(stages.recipe(**changes))
    assert "in phase 'tasks'" in str(error.value)


TABLES = """
[model]
preset = "tiny"
vocab_size = 262
[data]
tokenizer = "bytes"
"""


@pytest.mark.parametrize(
    ("data", "phases", "says"),
    [
        ('shards = { pre-training = "s", longer = "l" }\ntasks = { square = "a", grade = "b" }', 3, None),
        ('shards = { pre-training = "s", longer = "l" }', 2, None),
        ('shards = { pre-training = "s" }\ntasks = { square = "a", grade = "b" }', 0, "these phases have"),
        ('shards = { pre-training = "s", longer = "l" }\ntasks = { square = "a" }', 0, "have \\['grade', 'square'\\]"),
        ('shards = { pre-training = "s", tasks = "l" }', 0, "in this order"),
        ('tasks = { square = "a", grade = "b" }', 0, "shards is missing"),
    ],
)
def test_a_job_says_where_the_data_of_its_first_stages_lies(tmp_path, data, phases, says):
    """Catches a stage that is skipped because its data is not named, and a file that no task reads."""
    (tmp_path / "job.toml").write_text(to_toml(stages.recipe()) + TABLES + data)
    if says is not None:
        with pytest.raises(SpecError, match=says):
            load_job(tmp_path / "job.toml")
        return
    job = load_job(tmp_path / "job.toml")
    assert len(job.run.phases) == phases
    assert job.tasks == ({} if phases == 2 else {"square": tmp_path / "a", "grade": tmp_path / "b"})


def test_shards_where_samples_are_needed(tmp_path):
    """Catches a message that names no file of samples to who trains `deepseek-v3-sft` on shards."""
    (tmp_path / "job.toml").write_text(
        to_toml(scaled(load("deepseek-v3-sft"), tokens=10**6)) + TABLES + 'shards = "s"\n'
    )
    with pytest.raises(
        SpecError, match=r"learns from samples, not from shards: tasks = \{ instructions = \"FILE.jsonl\" \}"
    ):
        load_job(tmp_path / "job.toml")


def test_what_a_run_of_tasks_refuses(whole, tmp_path):
    """Catches samples that change between two runs, epochs that end too early, and a tokenizer with more ids than the model."""
    job, folder = whole
    only = replace(job, run=replace(job.run, phases=job.run.phases[2:]), shards={}, tokenizer="bytes")
    with pytest.raises(
        SpecError, match=r"grade\.jsonl gives 3 sequences in 1 epochs; the 3 steps take more from step 1"
    ):
        Feed(replace(only, epochs=1))
    with pytest.raises(SpecError, match="262 ids; the model has only 100"):
        Feed(replace(only, config=job.config.replace(vocab_size=100)))
    with pytest.raises(SpecError, match="tasks need a tokenizer"):
        Feed(replace(only, tokenizer=None))
    files = stages.files(tmp_path / "other")
    files["square"].write_text(files["square"].read_text().replace("49", "50"))
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(SpecError, match=r"square\.jsonl is sha256:\w+; the run has read"):
        train(replace(job, tasks=files), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_before_it_counts(tmp_path):
    """Catches a head or history that a refused step has already changed."""
    job = stages.job(tmp_path)
    lines = [json.dumps({"prompt": "x", "value": 1e200})] * 12  # its square is no float32
    job.tasks["grade"].write_text("\n".join(lines))
    with pytest.raises(NotFinite, match=r"step 4.*, task\.grade inf.*\n.*the loss of a task"):
        train(job, tmp_path / "run")
    tensors, counters, _ = saved(tmp_path / "run")
    assert "tasks" not in counters and not any(name.startswith("tasks") for name in tensors)


@pytest.mark.slow
def test_ranks_train_the_stages_before_the_tasks(tmp_path):
    """Catches tasks trained on a mesh without their own loss; and a run that cannot go on from ranks to one. Against one rank the
    sums of gradients differ in order: 5 steps of lr 3e-3, of which AdamW may turn a part where a gradient is near 0.
    """
    job = stages.job(tmp_path)
    with pytest.raises(SpecError, match=r"\['tasks'\]: several tasks are trained on one rank"):
        simulated(job, tmp_path / "ranks", 2)
    shutil.rmtree(tmp_path / "ranks")
    simulated(replace(job, steps=3), tmp_path / "ranks", 2)
    train(job, tmp_path / "ranks", resume=True)
    train(job, tmp_path / "one")
    for a, b in zip(records(tmp_path / "ranks"), records(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-2)


# ---- The recipes


def test_fine_tuning_of_the_report(capsys):
    """R 5.1: two epochs of 1.5M instances, cosine from 5e-6 to 1e-6, sample masking. Catches a warm-up, another shape, no mask."""
    run = load("deepseek-v3-sft")
    (phase,) = run.phases
    (task,) = phase.tasks
    assert phase.masked and task.masked and (task.loss, task.prefix) == ("cross-entropy", "")
    for step, lr in ((0, 5e-6), (len(run) // 2, 3e-6), (len(run) - 1, 1e-6)):
        assert run.at(step).values["lr"] == pytest.approx(lr, rel=1e-3)
    assert run.tokens == 2 * 1_500_000 * 1000
    assert main(["recipe", "deepseek-v3-sft"]) == 0
    assert "5e-06 to 1e-06" in capsys.readouterr().out


def test_the_table_says_the_tasks(capsys):
    """Catches a task, its share, or how the losses are weighed missing from the printed recipe."""
    assert main(["recipe", "article-stages"]) == 0
    text = capsys.readouterr().out
    assert "tasks of multi-task, weights uncertainty" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["answer", "cross-entropy", "uncertainty", "0.75", "yes", "'answer:", "'"] in lines
    assert main(["recipe", "article-stages", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in found["tasks"]["multi-task"]["tasks"]] == ["answer", "grade"]
    assert len({r.phase for r in rows(load("article-stages"))}) == 3
