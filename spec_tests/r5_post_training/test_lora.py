"""Low-rank adaptation (arXiv 2106.09685), described in articles, not in V3."""

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import toys
from refimpl.spec_tests.cases.small_models import CLOSE, small, some_tokens
from refimpl.train import State, init, step_on
from refimpl.train.post import lora, sft
from refimpl.train.post.examples import one_a_row
from refimpl.train.post.likelihood import logits_of

ATTENTION = lora.Lora(4, 8.0, ("q_b_proj", "kv_b_proj", "o_proj"))
EVERYWHERE = lora.Lora(
    4, 8.0, (*ATTENTION.target_modules, "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "down_proj")
)


def drawn(weights, setting, seed=0):
    """Adapters with both matrices other than 0."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=a.shape).astype(a.dtype) for n, a in lora.init(setting, weights).items()}


def test_new_adapters_change_nothing():
    """Catches a B that does not begin at 0, an A that does: then neither would ever learn."""
    weights = init(toys.TOY, std=0.1)
    adapters = lora.init(ATTENTION, weights)
    merged = lora.merge(weights, adapters, ATTENTION.scale)
    for n, w in weights.items():
        np.testing.assert_array_equal(merged[n], w)
    assert all(a.any() for n, a in adapters.items() if n.endswith(lora.A))


def test_two_thin_products_give_the_same():
    """The form of the paper and of PEFT, y = W x + (alpha / r) B (A x). Catches a scale of r / alpha, A and B exchanged."""
    rng = np.random.default_rng(0)
    weights = {"m.weight": rng.normal(size=(5, 7))}
    adapters = {n: a.astype(np.float64) for n, a in drawn(weights, lora.Lora(2, 3.0, ("m",))).items()}
    x, (a, b) = rng.normal(size=7), (adapters["m" + part] for part in (lora.A, lora.B))
    thin = [
        sum(weights["m.weight"][f] * x) + 3.0 / 2 * sum(b[f, i] * sum(a[i] * x) for i in range(2)) for f in range(5)
    ]
    np.testing.assert_allclose(lora.adapted(weights, adapters, 1.5)["m.weight"] @ x, thin, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_unmerging_gives_back_the_weights(scale):
    """Catches an unmerge that adds. Each of the two sums rounds once: half an ulp of the merged, half of the result."""
    weights = init(toys.TOY, std=0.1)
    adapters = drawn(weights, ATTENTION)
    merged = lora.merge(weights, adapters, scale)
    back = lora.unmerge(merged, adapters, scale)
    changed = [n for n in weights if (merged[n] != weights[n]).any()]
    assert len(changed) == 3 * toys.TOY.num_hidden_layers
    for n, w in weights.items():
        assert merged[n].dtype == w.dtype
        assert (np.abs(back[n] - w) <= (np.spacing(np.abs(merged[n])) + np.spacing(np.abs(back[n]))) / 2).all(), n


def test_which_modules():
    """Catches a target that matches inside a name: `o_proj` is no part of `to_proj`, `b_proj` none of `q_b_proj`."""
    names = list(init(toys.TOY))
    one = lora.Lora(2, 2.0, ("layers.1.self_attn.o_proj",)).modules(names)
    assert one == ["model.layers.1.self_attn.o_proj"]
    experts = lora.Lora(2, 2.0, ("gate_proj",)).modules(names)
    assert len(experts) == 1 + toys.TOY.n_routed_experts + 1  # dense, routed, shared
    with pytest.raises(SpecError, match="no module is called 'b_proj'"):
        lora.Lora(2, 2.0, ("b_proj",)).modules(names)
    with pytest.raises(SpecError, match="no linear layer"):
        lora.init(lora.Lora(2, 2.0, ("input_layernorm",)), init(toys.TOY))


def test_what_is_refused():
    """Catches matrices of another model, halves, ranks and alphas that are none."""
    weights = init(toys.TOY)
    adapters = lora.init(lora.Lora(2, 2.0, ("o_proj",)), weights)
    name = next(n for n in adapters if n.endswith(lora.B))
    with pytest.raises(SpecError, match="do not make its"):
        lora.adapted(weights, adapters | {name: np.zeros((3, 2), np.float32)}, 1.0)
    with pytest.raises(SpecError, match="not a pair"):
        lora.adapted(weights, {n: a for n, a in adapters.items() if n != name}, 1.0)
    for r, alpha in ((0, 1.0), (1.5, 1.0), (2, 0.0)):
        with pytest.raises(SpecError):
            lora.Lora(r, alpha, ("o_proj",))


def test_the_merged_model_computes_what_the_adapted_one_does():
    """Catches an adapter that the model does not see, in the expert layers too."""
    model = small()
    weights = {n: w for n, w in model.named_weights() if hasattr(w, "dtype")}
    adapters = drawn(weights, lora.Lora(2, 1.0, ("q_b_proj", "down_proj")))
    merged = lora.merge(weights, adapters, 0.5)
    tokens = some_tokens()
    found = type(model).from_weights(model.config, merged)
    a, b = (m(m.inputs(tokens)).logits for m in (found, model))
    assert np.abs(a - b).max() > 1e-3
    direct = type(model).from_weights(model.config, lora.adapted(weights, adapters, 0.5))
    np.testing.assert_allclose(direct(direct.inputs(tokens)).logits, a, **CLOSE)


def test_adapters_learn_while_the_weights_stand_still():
    """A model that copies after COPY learns to reverse instead. Catches a frozen weight that trains, an adapter that does
    not, gradients that miss one of the two matrices.
    """
    weights, rng = toys.both(), np.random.default_rng(1)
    state = State(lora.init(EVERYWHERE, weights))
    start, kept = state.weights, {n: w.copy() for n, w in weights.items()}
    for _ in range(100):
        batch = one_a_row(toys.some(toys.REVERSE, 16, rng, front=toys.COPY))

        def objective(leaves, batch=batch):
            return sft.loss(logits_of(toys.TOY, lora.adapted(weights, leaves, EVERYWHERE.scale), batch), batch.labels)

        state, _ = step_on(state, objective, toys.RECIPE)
    asked = toys.every(toys.REVERSE, front=toys.COPY)
    assert toys.accuracy(weights, asked) < 0.3
    assert toys.accuracy(lora.merge(weights, state.weights, EVERYWHERE.scale), asked) > 0.9
    assert all((state.weights[n] != a).any() for n, a in start.items())
    for n, w in weights.items():
        np.testing.assert_array_equal(w, kept[n])
