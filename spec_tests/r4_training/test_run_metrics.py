"""What a training run tells: the meters, the records, the table, the figure."""

import io
import itertools
import json

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import live
from refimpl.layers.presets import DEEPSEEK_V3, TINY
from refimpl.model import expected_tensors
from refimpl.spec_tests.cases import runs
from refimpl.train.data import Reader, Shards
from refimpl.train.memory import step as memory_step
from refimpl.train.run import Evaluation, Samples, journal, meters, records, train
from refimpl.train.run.engine import Serial
from refimpl.train.run.feed import Feed
from refimpl.train.run.plot import PANELS, curves, picture
from refimpl.train.training import State, init

# ---- Meters


def test_load_by_hand():
    """Catches a mean over experts that have tokens, an entropy in bits, a dead expert counted as log 0."""
    assert meters.load(np.array([2, 2, 2, 2])) == {"peak": 1.0, "entropy": 1.0, "dead": 0}
    assert meters.load(np.array([8, 0, 0, 0])) == {"peak": 4.0, "entropy": 0.0, "dead": 3}
    assert meters.load(np.array([1, 7]))["dead"] == 0
    half = meters.load(np.array([3, 3, 0, 0]))
    assert half["peak"] == 2.0 and half["dead"] == 2 and half["entropy"] == pytest.approx(0.5, abs=1e-15)
    assert meters.load(np.zeros(4, np.int64)) == {"peak": 0.0, "entropy": 0.0, "dead": 4}


def test_bias_by_hand():
    """Catches a drift that cancels because signs do."""
    assert meters.bias(np.float32([3, -3, 3, -3])) == {"drift": 3.0, "spread": 6.0}


@pytest.mark.parametrize(
    "c", [DEEPSEEK_V3.replace(num_hidden_layers=5), TINY.replace(num_nextn_predict_layers=2)], ids=["V3", "tiny"]
)
@pytest.mark.parametrize("mtp", [False, True])
def test_flop_of_a_token(c, mtp):
    """Catches experts counted that a token does not visit, an embedding that multiplies nothing, MTP without its head.

    Oracle: every matrix of the checkpoint is two FLOP an element and token, an expert's with the chance K / E that it is
    chosen; attention by counting the pairs of a short sequence. Norms and biases are vectors.
    """
    sequence, total = 5, 0.0
    heads = 1 + c.num_nextn_predict_layers * mtp
    for name, shape in expected_tensors(c, mtp=mtp).items():
        if len(shape) == 2 and "embed_tokens" not in name:
            chance = c.num_experts_per_tok / c.n_routed_experts if ".experts." in name else 1.0
            total += 2 * shape[0] * shape[1] * chance * (heads if name == "lm_head.weight" else 1)
    pairs = sum(1 for q, k in itertools.product(range(sequence), repeat=2) if k <= q) / sequence
    layers = c.num_hidden_layers + heads - 1
    total += layers * pairs * c.num_attention_heads * 2 * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    assert meters.flop_per_token(c, sequence, mtp=mtp) == pytest.approx(3 * total, rel=1e-12)  # float64 sums


# ---- Records


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run with everything but TensorBoard -> its folder."""
    folder = tmp_path_factory.mktemp("run")
    held = runs.shards(folder / "held", text="2 times 2 is 4.\n" * 9, packing="best-fit")
    job = runs.job(shards, evaluation=Evaluation(held, 4, 6, 2), samples=Samples(("1 times",), 4, 3))
    train(job, folder / "run")
    return folder / "run"


def test_the_parts_of_a_loss_are_the_loss(run):
    """Catches a part that is weighted already, MTP without its mean, a balance loss of one layer. float32 sums of three terms."""
    for r in records(run):
        whole = r["loss/main"] + r["mtp_weight"] * r["loss/mtp1"] + r["loss/balance"]
        assert r["loss"] == pytest.approx(whole, rel=4 * 2.0**-24)
        assert r["loss/balance"] > 0 and r["tokens"] == r["step"] * runs.BATCH * runs.LENGTH


def test_a_record_says_what_the_step_saw(run, shards):
    """Catches the load of another layer or step, a bias before its update, MFU of other tokens. Oracle: the first step, taken by
    hand, its loads counted from the routing.
    """
    job = runs.job(shards)
    s = job.run.at(0)
    batch, _ = Feed(job).take(s, {})
    state, report = memory_step(
        runs.CONFIG, State(init(runs.CONFIG, seed=3, std=0.1)), recipe=job.run.recipe(0), **batch.inputs()
    )
    first = next(records(run))
    (place,) = report.load
    assert first[f"load/{place}/peak"] == report.load[place].max() / report.load[place].mean()
    bias = state.weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert place == "L1" and first["bias/L1/spread"] == float(bias.max()) - float(bias.min()) > 0
    flop = meters.flop_per_token(runs.CONFIG, runs.LENGTH, mtp=True)
    assert first["mfu"] == pytest.approx(flop * 48 / first["seconds"] / 1e9)
    assert first["norm"] == report.norm and first["peak_bytes"] > 1 << 24


def test_held_out_text_and_samples_come_when_they_are_due(run, whole, shards, tmp_path):
    """Catches an evaluation that learns, that averages batches with unequal labels, or that is off by a step; samples likewise.

    Oracle: one pass over all six rows at once, by the weights of a run that ends there without evaluating. Rounded to
    bfloat16 alike, so only the order of float32 sums differs.
    """
    rows = list(records(run))
    assert [r["step"] for r in rows if "eval/main" in r] == [4, 6]
    assert [(s["step"], s["prompt"]) for s in records(run, "samples.jsonl")] == [(n, "1 times") for n in (0, 4, 6)]
    job = runs.job(shards)
    engine = Serial(job, State(dict(whole[0].weights)))
    held = runs.shards(tmp_path / "held", text="2 times 2 is 4.\n" * 9, packing="best-fit")
    reader = Reader(Shards(held))
    batch, _ = reader.take(reader.start(), 6)
    assert batch.valid is not None and (batch.valid == 0).any()
    want = engine.evaluate(runs.CONFIG, job.run.recipe(5), batch)
    engine.close()
    for part in ("main", "mtp1"):
        assert rows[-1][f"eval/{part}"] == pytest.approx(want[part], rel=1e-6)


def test_a_journal_goes_on_where_it_is_told(tmp_path):
    """Catches steps that are in it twice, a torn line that swallows the next one, and a line that is no record read over."""
    with pytest.raises(SpecError, match=r"holds no metrics.jsonl; it is no run"):
        list(records(tmp_path))
    j = journal.Journal(tmp_path, 0)
    for step in (1, 2, 3):
        j.add({"step": step})
    j.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    j = journal.Journal(tmp_path, 2)
    j.add({"step": 3, "again": 1})
    j.close()
    assert list(records(tmp_path)) == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(SpecError, match=r"line 2 is no JSON.*\n  while reading"):
        list(records(tmp_path))
    path.write_bytes(b'{"stop": 1}\n')
    with pytest.raises(SpecError, match="line 1 has no step"):
        list(records(tmp_path))


# ---- For people


class Screen(io.StringIO):
    """Where a person watches."""

    def isatty(self):
        return True


def test_a_line_and_a_table(run, monkeypatch):
    """Catches a table that leaves out a layer, a part of the loss or the held-out loss, and one that is drawn into a pipe."""
    last = list(records(run))[-1]
    assert live.line(last, 6).startswith(f"step 6/6  loss {last['loss']:.4f}  held out {last['eval/main']:.4f}  norm ")
    screen, pipe = Screen(), io.StringIO()
    monkeypatch.setenv("COLUMNS", "100")
    for out, alone in ((screen, True), (pipe, True)):
        monkeypatch.setattr("sys.stdout", out)
        with live.told(1, 6, alone=alone) as tell:
            tell(last)
    text = screen.getvalue()
    assert all(
        name in text for name in ("step 6 of 6, only, 288 tokens", "loss/mtp1", "loss/balance", "eval/main", "tokens/s")
    )
    row = next(line for line in text.splitlines() if " L1 " in line)
    assert f"{last['load/L1/peak']:.2f}" in row and f"{last['bias/L1/drift']:.4f}" in row
    assert pipe.getvalue() == live.line(last, 6) + "\n"
    assert [live.size(n) for n in (5, 3 << 10, 5 << 19, 1 << 30)] == ["5 B", "3 KiB", "2.5 MiB", "1 GiB"]


def test_curves_are_the_records(run):
    """Catches a metric of another name, a value at another step. Needs no matplotlib."""
    found = curves(run, ["eval/*", "loss"], "step")
    rows = list(records(run))
    assert found["loss"] == ([1, 2, 3, 4, 5, 6], [r["loss"] for r in rows])
    assert found["eval/main"] == ([4, 6], [rows[3]["eval/main"], rows[5]["eval/main"]]) and "eval/mtp1" in found
    assert set(found) == {"loss", "eval/main", "eval/mtp1"}


def test_the_figure(run, tmp_path):
    """Catches a panel without data, a panel that is left out, another file for the same run."""
    pytest.importorskip("matplotlib")
    svg = picture([run], form="svg")
    text = svg.decode()
    shown = [title for title in PANELS if title in text]
    assert shown == [title for title in PANELS if "links" not in title] and "load/L1/entropy" not in text
    assert svg == picture([run], form="svg")
    png = picture([run, run], {"loss": ("loss",)}, over="step", form="png")
    assert png.startswith(b"\x89PNG") and png == picture([run, run], {"loss": ("loss",)}, over="step", form="png")
    with pytest.raises(SpecError, match=r"no metric of .* is one of lose"):
        picture([run], {"lose": ("lose",)}, form="svg")


def test_every_number_of_a_record_is_json(run):
    """Catches NumPy numbers and NaN in the journal: they would be no JSON elsewhere."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["step"] >= 1
