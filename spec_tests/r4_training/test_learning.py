"""The recipe of docs/learning.md: it adds up and keeps V3's curves; its variants change what they say; it learns."""

import gzip
import importlib.util
import itertools
import json
import math
import pathlib
import re

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.train import State, init, step, text_batches
from refimpl.train.recipe import load, read
from refimpl.train.recipe.reading import JOB
from refimpl.train.run import load_job, read_job

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "learn"
RECIPE = FOLDER / "novels.toml"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="an installed wheel has no benchmarks")


def module(name):
    spec = importlib.util.spec_from_file_location(f"learn_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def text():
    """The novels as bytes, each a token."""
    lines = gzip.decompress((FOLDER / "novels.jsonl.gz").read_bytes()).splitlines()
    return "\n\n".join([json.loads(line)["text"] for line in lines]).encode()


def trained(steps, batch, length):
    """Main losses of the recipe's first steps at its full rate, on bytes."""
    job = load_job(RECIPE)
    state = State(init(job.config, seed=job.seed, std=job.run.optimizer.init_std))
    losses = []
    for tokens in text_batches(text(), batch=batch, length=length, steps=steps):
        state, report = step(job.config, state, tokens, job.run.recipe(100))
        losses.append(report.parts["main"])
    return losses


def test_the_recipe_adds_up():
    """Catches a schedule that no longer covers the run, a parameter count that is not the model's. Oracle: the phase's own sum, the
    count in the file's comment, added up here from the tensors of a new model.
    """
    job, said = load_job(RECIPE), int(re.search(r"# ([\d,]+) parameters", RECIPE.read_text())[1].replace(",", ""))
    assert job.run.tokens == 2_048_000 and job.run.at(len(job) - 1).tokens < 2_048_000
    assert sum(w.size for w in init(job.config).values()) == said
    assert (
        job.config.n_routed_experts >= 8
        and job.config.num_nextn_predict_layers == 1
        and job.config.n_shared_experts == 1
    )


@pytest.mark.parametrize("name", ["lr", "gamma", "mtp_weight"])
def test_curves_are_those_of_v3(name):
    """Catches a piece with another share or ratio than in R 4.2. Oracle: V3's own recipe at the same part of its pre-training, both
    relative to their peaks; 1 % of the run where a curve moves within a step of ours.
    """
    ours, v3 = load(RECIPE).phases[0], load("deepseek-v3").phases[0]
    peaks = [max(max(p.start, p.end) for p in run.schedules[name].pieces) for run in (ours, v3)]
    for part in np.linspace(0.03, 0.999, 200):
        a, b = [
            p.schedules[name].value(part * p.tokens, p.steps.step(int(part * p.tokens))) / peak
            for p, peak in zip((ours, v3), peaks, strict=True)
        ]
        near = abs(part - 0.6757) < 0.01 or abs(part - 0.966) < 0.01 or abs(part - 0.9887) < 0.01
        assert near or math.isclose(a, b, abs_tol=0.01), (part, a, b)


def test_variants_change_what_they_say():
    """Catches a variant that changes nothing, or something besides; a seed that is not used. Oracle: a comparison key by key."""
    runs = module("runs")
    base = flat(runs.document("v3-0"))
    for name, variant in runs.VARIANTS.items():
        found = flat(runs.document(f"{name}-0"))
        changed = {k for k in base.keys() | found.keys() if base.get(k) != found.get(k)}
        assert changed == {f"{table}.{key}" for table, keys in variant.changes.items() for key in keys}
        assert read_job(runs.document(f"{name}-0"), FOLDER).run.tokens == runs.SHORT
    two = flat(runs.document("v3-2"))
    assert {k for k in base if base[k] != two[k]} == {"train.seed"}
    with pytest.raises(SpecError, match="no-such"):
        runs.document("no-such-0")


def flat(d):
    """ "table.key" -> value; the recipe has one phase."""
    tables = {k: v[0] if k == "phase" else v for k, v in d.items()}
    assert len(d["phase"]) == 1 and read({k: v for k, v in d.items() if k not in JOB})
    return {f"{t}.{k}": v for t, table in tables.items() if isinstance(table, dict) for k, v in table.items()}


def test_a_verdict_needs_a_difference_beyond_the_seeds():
    """Catches a table of Student's t that is off by a row or one-sided, differences that are not paired. Oracle: the density
    integrated numerically; numbers worked by hand.
    """
    spreads = module("spreads")
    for n, t in spreads.T95.items():
        df = n - 1
        x = np.linspace(-t, t, 200_001)
        y = math.gamma(n / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2) * (1 + x * x / df) ** (-n / 2)
        assert abs(np.trapezoid(y, x) - 0.95) < 2e-4  # the table has four digits
    assert spreads.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    # differences 1, 2, 3: mean 2, deviation 1, 4.303 / sqrt 3 = 2.484
    assert spreads.verdict([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], 2) == "+2.00 ± 2.48: cannot be told apart"
    assert spreads.verdict([9.0, 18.9, 29.1], [10.0, 20.0, 30.0], 2) == "-1.00 ± 0.25: lower"
    assert spreads.verdict([11.0, 21.1, 30.9], [10.0, 20.0, 30.0], 2) == "+1.00 ± 0.25: higher"


def test_a_few_steps_learn():
    """Catches a recipe whose rate, deviation or loss is wrong. Oracles: a new model's logits are normal, sums of 192 products of a
    normalised h with weights of deviation 0.05, so its loss is ln V + 192 0.05^2 / 2 = 7.17, here for 94 labels, hence +- 0.2
    (their deviation is sqrt(0.48 / 94) = 0.07); a model that has learned no more than that tokens are bytes has ln 256.
    """
    losses = trained(steps=8, batch=2, length=48)
    assert abs(losses[0] - math.log(1024) - 192 * 0.05**2 / 2) < 0.2
    assert losses[-1] < math.log(256)


@pytest.mark.slow
def test_a_short_run_uses_the_context():
    """Catches a model that learns which tokens are frequent and nothing else, as one whose attention sees nothing does. Oracle:
    what the best guess without context gets, the entropy of the bytes' frequencies, counted here: 3.06 nats. The mean of ten
    batches of 504 labels moves by some 0.05 with the seed; measured is 2.68.
    """
    losses, counts = trained(steps=40, batch=8, length=64), np.bincount(np.frombuffer(text(), np.uint8))
    p = counts[counts > 0] / counts.sum()
    assert np.mean(losses[-10:]) < -(p * np.log(p)).sum() - 0.1


def test_both_texts_are_what_the_page_says():
    """Catches a held-out novel that is trained on. Oracle: the names in the files."""
    names = [
        [json.loads(line)["novel"] for line in gzip.decompress((FOLDER / f"{n}.jsonl.gz").read_bytes()).splitlines()]
        for n in ("novels", "held_out")
    ]
    trained_on, held = ([k for k, _ in itertools.groupby(n)] for n in names)
    assert trained_on == ["Pride and Prejudice", "Sense and Sensibility", "Emma", "Mansfield Park"]
    assert held == ["Persuasion"] and len(names[1]) == 8
