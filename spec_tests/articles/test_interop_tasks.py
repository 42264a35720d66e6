"""Uncertainty weighting in torch: losses and all gradients, from its own Gaussian likelihood and cross-entropy.

`pip install torch==2.13.0`, then `pytest` this file. float64 on both sides; 1e-12 is the rounding of sums of 200 terms of order 1.
"""

import types

import numpy as np
import pytest

from refimpl.autograd import Parameter, Tensor, backward
from refimpl.spec_tests.cases import tasks as cases
from refimpl.train.tasks import own as names
from refimpl.train.tasks.step import Objective

D, V = 5, 13


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    pytest.importorskip("torch", reason="comes with the extra 'interop'; CI runs these tests with it")


def given():
    """A batch, and what a model could have said of it."""
    of, rng = cases.phase("uncertainty"), np.random.default_rng(4)
    batch, _ = cases.batch(of)
    batch.tokens[:], batch.labels[batch.labels >= 0] = 1, batch.labels[batch.labels >= 0] % V
    shape = batch.tokens.shape
    held = {"logits": rng.normal(size=(*shape, V)), "hidden": rng.normal(size=(*shape, D))}
    own = {names.weight("tell"): rng.normal(size=D), names.bias("tell"): rng.normal(size=1)}
    return of, batch, held, own | {names.log_variance(t.name): rng.normal(size=1) for t in of.tasks}


def in_torch(of, batch, held, own):
    """sum over tasks: of numbers the negative log likelihood of a Gaussian, of answers L / sigma^2 + log sigma."""
    import torch

    leaf = {n: torch.tensor(x, requires_grad=True) for n, x in (held | own).items()}
    total = torch.zeros((), dtype=torch.float64)
    for number, t in enumerate(of.tasks):
        rows = np.flatnonzero(batch.task == number)
        s = leaf[names.log_variance(t.name)]
        if t.loss == "regression":
            b, i = (torch.tensor(x) for x in np.nonzero(~np.isnan(batch.targets)))
            told = leaf["hidden"][b, i] @ leaf[names.weight(t.name)] + leaf[names.bias(t.name)]
            target = torch.tensor(batch.targets)[b, i]
            total = total + torch.nn.GaussianNLLLoss()(told, target, torch.exp(s).expand(told.shape))
        else:
            labels = torch.tensor(batch.labels[rows, 1:].reshape(-1))
            loss = torch.nn.functional.cross_entropy(leaf["logits"][rows, :-1].reshape(-1, V), labels)
            total = total + loss / torch.exp(s / 2) ** 2 + torch.log(torch.exp(s / 2))
    total = total.sum()
    total.backward()
    return total.item(), {n: x.grad.numpy() for n, x in leaf.items()}


def test_uncertainty_weighting_is_torchs():
    """Catches a factor of two between sigma and sigma^2, a price that is not paid, a gradient that stops at the weight."""
    of, batch, held, own = given()
    leaves = {n: Parameter(x) for n, x in own.items()}
    said = {n: Tensor(x) for n, x in held.items()}
    aim = Objective(of, batch, leaves, None, 0.0, len(batch.tokens))
    loss = aim(0, types.SimpleNamespace(losses={}, **said), {})
    grads = backward(loss)
    value, want = in_torch(of, batch, held, own)
    np.testing.assert_allclose(loss.data, value, rtol=1e-12)
    for name, leaf in (leaves | said).items():
        np.testing.assert_allclose(grads[leaf], want[name], rtol=1e-12, atol=1e-12, err_msg=name)
