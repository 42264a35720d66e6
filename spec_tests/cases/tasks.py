"""A small model, and batches of two or three tasks for it, with several samples in a row."""

import numpy as np

from refimpl.layers.precision import plan
from refimpl.spec_tests.cases.small_models import SMALL, small
from refimpl.train import Recipe, State
from refimpl.train.recipe import read
from refimpl.train.tasks import Rows, Sample, TaskReader, joined

LENGTH = 14
EXACT = Recipe(plan("float64"))


def phase(by="fixed", **changes):
    """A phase with three tasks: answers, numbers, and answers whose samples in one row see each other."""
    weights = [{"weight": w} if by == "fixed" else {} for w in (1.5, 0.25, 1)]
    tasks = [{"name": "say"}, {"name": "tell", "loss": "regression"}, {"name": "open", "masked": False}]
    one = {"name": "tasks", "steps": 4, "sequence": LENGTH, "batch": 6, "lr": 1e-3, "masked": True} | changes
    one |= {"task": [t | w for t, w in zip(tasks, weights, strict=True)], "weighting": {"by": by}}
    return read({"name": "tasks", "origin": "a test", "phase": [one]}).phases[0]


def some_samples(numbers, seed=0, n=9):
    """Samples of 3 to 6 tokens, so two or more in a row; with a number, or with an answer."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        p, a = rng.integers(1, SMALL.vocab_size, 3), rng.integers(1, SMALL.vocab_size, rng.integers(1, 4))
        found.append(Sample(p, a[:0], float(rng.normal())) if numbers else Sample(p, a))
    return found


def batch(of, seed=0, rows=2):
    """`rows` rows of every task of a phase -> the batch, the samples of each of its rows."""
    parts, held = [], []
    for number, t in enumerate(of.tasks):
        packed = Rows(some_samples(t.loss == "regression", seed + number), LENGTH, t.masked, 0, t.name)
        reader = TaskReader(packed, number, seed, None)
        part, _ = reader.take(reader.start(), rows)
        parts.append(part)
        held += [[sample for sample, _ in packed.placed(int(row))] for row in reader.samples(0, rows)]
    return joined(parts), held


def state(seed=0):
    """A model with MTP and its weights in float32, as a run holds them."""
    model = small(seed, np.float32, num_nextn_predict_layers=1)
    return model.config, State({n: np.asarray(w) for n, w in model.named_weights() if hasattr(w, "dtype")})
