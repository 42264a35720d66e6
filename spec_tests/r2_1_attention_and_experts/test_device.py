"""The whole model on arrays that are not NumPy's (cases/duck.py): weights and tokens decide where it runs."""

import numpy as np
import pytest

from refimpl.autograd import Parameter, backward, nn_ops
from refimpl.spec_tests.cases.duck import Duck
from refimpl.spec_tests.cases.small_models import small, some_tokens


@pytest.fixture(scope="module", autouse=True)
def plain_products():
    """A device's BLAS is its own; what is compared here is all else, so few rows are multiplied as many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn_ops, "SOME", -1)
        yield


def on_device(model):
    return model.map(lambda name, w: Duck(w) if hasattr(w, "dtype") else w)


def everything(model, move):
    """Logits, MTP logits, a cached step both ways, and all gradients; `move` puts an input in place."""
    tokens, step = move(some_tokens()), move(some_tokens(2, 1, seed=4))
    inputs = model.inputs(tokens, labels=tokens)
    run = model(inputs, with_mtp=True)
    found = [run.logits, *run.mtp_logits]
    for attend in ("absorbed", "expanded"):
        found.append(model(model.inputs(step, cache=run.cache), run.cache, attend=attend).logits)
    tracked = model.with_gradients()
    loss, _ = tracked.loss(inputs, mtp_weight=0.3, aux_weight=0.1)
    grads = backward(loss)
    return [*found, *(grads[w] for _, w in tracked.named_weights() if isinstance(w, Parameter))]


@pytest.mark.parametrize("family", ["V3", "V2"])
def test_the_model_gives_the_same_bits_on_a_device(family):
    """Catches an index, mask or constant made with NumPy inside a stage."""
    softmax = {"scoring_func": "softmax", "norm_topk_prob": False, "topk_method": "group_limited_greedy"}
    model = small(num_nextn_predict_layers=1, **(softmax if family == "V2" else {}))
    ours = everything(model, lambda a: a)
    theirs = everything(on_device(model), Duck)
    assert len(ours) == len(theirs) > 60
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(b, Duck)
        np.testing.assert_array_equal(b.get(), a)
