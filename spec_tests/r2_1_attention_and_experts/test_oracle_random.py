"""The specification against the oracle on random models: every tap, gradients, masks, cache, MTP.

Routing is discrete, so an example whose closest call is nearer than rounding could decide is left out
(`routing_margin`). TIGHT: float64 rounding is 1e-16 per operation, a few hundred in a row, times the conditioning of
three random layers: 6e-15 is the most in 500 models. LOOSE: the same in float32 (6e-8): 4e-6 is the most. The quick
tests draw the same examples every time; the slow ones draw new ones.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from refimpl.model import Impl
from refimpl.spec_tests.oracles.compare import differing, routing_margin
from refimpl.spec_tests.oracles.model import cross_entropy, forward
from refimpl.spec_tests.oracles.moe import seq_balance_loss
from refimpl.spec_tests.oracles.mtp import mtp_forward, mtp_losses
from refimpl.spec_tests.oracles.slopes import direction, inner, slope
from refimpl.spec_tests.strategies import models as strategies

TIGHT, LOOSE = 1e-11, 1e-4
# Taps of one form of attention only, and of routers with a bias or with groups only.
LATENT, EXPANDED = ("mla.q_absorbed", "mla.ctx_latent"), ("mla.kv_b",)

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(quick, max_examples=400)


@dataclasses.dataclass
class Model:
    """A random model; weights follow from the seed, so that a failing example prints as a few lines."""

    config: dict
    tokens: np.ndarray
    bias: tuple
    seed: int
    mtp: int
    dtype: type

    @property
    def weights(self):
        rng = np.random.default_rng(self.seed)
        drawn = strategies.make_weights(self.config, rng, self.bias, self.mtp)
        return {n: w.astype(self.dtype) for n, w in drawn.items()}

    def __iter__(self):
        return iter((self.config, self.weights, self.tokens))


@st.composite
def models(draw, mtp=0, dtype=np.float64):
    """A model that unpacks as (config, weights, tokens)."""
    config = draw(strategies.configs()) | {"num_nextn_predict_layers": mtp}
    tokens, bias = draw(strategies.tokens(config)), draw(strategies.biases)
    return Model(config, tokens, bias, draw(strategies.seeds), mtp, dtype)


def compare_taps(model, precision, attend, margin, limit):
    config, weights, tokens = model
    theirs = forward(config, weights, tokens)
    assume(routing_margin(config, theirs) > margin)
    ours = Impl(precision=precision, attend=attend).load(config, weights).forward(tokens, taps=["*"])
    expected = [t for t in theirs if not t.endswith(EXPANDED if attend == "absorbed" else LATENT)]
    expected = [t for t in expected if t in ours or not t.endswith("router.choice")]  # V2 has no bias
    assert not differing(ours, theirs, expected, limit)


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
@quick
@given(models())
def test_every_tap_of_a_random_model(attend, model):
    """Catches any wrong equation, setting or layout: the taps that differ are named."""
    compare_taps(model, "float64", attend, 1e-9, TIGHT)


@quick
@given(models(dtype=np.float32))
def test_every_tap_in_float32(model):
    """Catches a cancellation, or a step that leaves float32 where the report computes in float32."""
    compare_taps(model, "float32", "auto", 1e-3, LOOSE)


@pytest.mark.slow
@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
@thorough
@given(models())
def test_every_tap_of_many_random_models(attend, model):
    """As above, for rare combinations of settings."""
    compare_taps(model, "float64", attend, 1e-9, TIGHT)


@quick
@given(models(), strategies.seeds)
def test_ties_go_to_the_lower_index(model, seed):
    """Catches an unstable or a reversed sort: with a router of zeros every score is equal, every bias one of three."""
    config, weights, tokens = model
    assume(config["first_k_dense_replace"] < config["num_hidden_layers"])
    rng = np.random.default_rng(seed)
    weights |= {n: 0 * w for n, w in weights.items() if n.endswith("mlp.gate.weight")}
    biases = [n for n in weights if n.endswith("e_score_correction_bias")]
    weights |= {n: rng.choice([-1.5, 0.0, 0.25], weights[n].shape) for n in biases}
    theirs = forward(config, weights, tokens)
    ours = Impl(precision="float64").load(config, weights).forward(tokens, taps=["*"])
    chosen = [t for t in theirs if t.endswith(("router.groups", "router.ids", "router.weights"))]
    assert not differing(ours, theirs, [*chosen, "fwd/logits"], TIGHT)


@st.composite
def masks(draw, batch=2, length=6):
    """(positions, valid, documents), (B, S) each: any positions, padding at either end, packed texts."""
    rows = st.lists(st.integers(0, 99), min_size=length, max_size=length)
    positions = np.array([draw(rows) for _ in range(batch)])
    valid, documents = np.ones((batch, length), int), np.zeros((batch, length), int)
    for b in range(batch):
        first, last = draw(st.integers(0, 2)), draw(st.integers(length - 2, length))
        valid[b, :first], valid[b, last:] = 0, 0
        documents[b, draw(st.integers(1, length)) :] = 1
    return positions, valid, documents


@quick
@given(models(), masks())
def test_positions_padding_and_documents(model, where):
    """Catches a key seen across a document border, padding that is attended to, positions that are counted instead of
    read, and causality by position (a text whose positions restart must not see its future). Rows of padding mean
    nothing and are not compared.
    """
    config, weights, tokens = model
    positions, valid, documents = where
    theirs = forward(config, weights, tokens, positions, valid, documents)
    assume(routing_margin(config, theirs) > 1e-9)
    impl = Impl(precision="float64").load(config, weights)
    ours = impl.forward(tokens, positions, taps=["*"], valid=valid, documents=documents)
    taps = ["fwd/logits", *(t for t in theirs if t.endswith(("attn_out", "resid", "mla.q_rope")))]
    real = [{t: run[t][valid == 1] for t in taps} for run in (ours, theirs)]
    assert not differing(*real, taps, TIGHT)


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
@quick
@given(models(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_cache_filled_in_any_portions(attend, model, cuts):
    """Catches a position that restarts, a mask of the wrong offset, and a latent cached before its norm."""
    config, weights, tokens = model
    theirs = forward(config, weights, tokens)
    assume(routing_margin(config, theirs) > 1e-9)
    impl, cache = Impl(precision="float64", attend=attend).load(config, weights), {}
    edges = [0, *sorted(set(cuts)), tokens.shape[1]]
    parts = [impl.forward(tokens[:, a:b], cache=cache)["logits"] for a, b in itertools.pairwise(edges)]
    ours = {"fwd/logits": np.concatenate(parts, axis=1)}
    assert not differing(ours, theirs, ["fwd/logits"], TIGHT)


@quick
@given(models(mtp=2))
def test_multi_token_prediction(model):
    """Catches a shift by one, halves exchanged, and a hidden or a norm from the wrong place."""
    config, weights, tokens = model
    theirs = mtp_forward(config, weights, tokens, 2)
    assume(closest_call(config, weights, tokens) > 1e-9)
    ours = Impl(precision="float64", attend="expanded").load(config, weights).forward(tokens, taps=["fwd/mtp*"])
    taps = [t for t in theirs if not t.endswith(LATENT) and (t in ours or not t.endswith("router.choice"))]
    assert not differing(ours, theirs, taps, TIGHT)


@pytest.mark.slow
@quick
@given(models(mtp=2))
def test_losses(model):
    """Catches an MTP loss over other terms or another denominator, balance counts of the routed (biased, grouped)
    experts, a batch-wise mean of the counts, and unnormalised scores.
    """
    config, weights, tokens = model
    assume(closest_call(config, weights, tokens) > 1e-9)
    parts = (
        Impl(precision="float64").load(config, weights).loss_and_grads(tokens, tokens, mtp_weight=0.3, aux_weight=0.1)
    )
    main, depths, balance = losses(config, weights, tokens, tokens, 0.1)
    ours = [parts["loss.main"], parts["loss.mtp1"], parts["loss.mtp2"], *(parts[f"{u}/loss.seq_aux"] for u in balance)]
    np.testing.assert_allclose(ours, [main, *depths, *balance.values()], rtol=TIGHT)
    np.testing.assert_allclose(parts["loss"], main + 0.3 * np.mean(depths) + sum(balance.values()), rtol=TIGHT)


def losses(config, weights, tokens, labels, alpha):
    """(main, [MTP depth 1, depth 2] if the config has them, {unit: balance loss of a main layer})."""
    taps, depths, k = forward(config, weights, tokens), [], config["num_experts_per_tok"]
    if config["num_nextn_predict_layers"]:
        depths = mtp_losses(mtp_forward(config, weights, tokens, 2), labels, 2, mean="length")
    scores = {t.split("/")[1]: v for t, v in taps.items() if t.endswith("router.scores")}
    balance = {unit: seq_balance_loss(v, k, alpha) for unit, v in scores.items()}
    return cross_entropy(taps["fwd/logits"], labels), depths, balance


def objective(*model_and_labels, mtp_weight=0.0, aux_weight=0.0):
    """The training loss: main, mtp_weight times the mean of the depths, the balance of the main layers."""
    main, depths, balance = losses(*model_and_labels, aux_weight)
    return main + (mtp_weight * np.mean(depths) if mtp_weight else 0.0) + sum(balance.values())


def slope_error(model, seed, choose=list, labels=None, **extra):
    """|measured - claimed| / scale along a random direction over the chosen weights.

    Measured: two central differences, steps h and 2h, combined to order h^4. Scale: the root of the
    sum of the squared terms of <gradient, direction>, but not less than 1e-2.
    """
    config, weights, tokens = model
    labels = tokens if labels is None else labels
    assume(closest_call(config, weights, tokens) > 1e-2)
    result = Impl(precision="float64").load(config, weights).loss_and_grads(tokens, labels, **extra)
    gradients = {n.removeprefix("grad/"): g for n, g in result.items() if n.startswith("grad/")}
    np.testing.assert_allclose(result["loss"], objective(*model, labels, **extra), rtol=TIGHT)
    along = direction(weights, choose(gradients), np.random.default_rng(seed))

    def value(w):
        return objective(config, w, tokens, labels, **extra)

    near, far = slope(value, weights, along, 1e-5), slope(value, weights, along, 2e-5)
    claimed, size = inner(gradients, along)
    return abs((4 * near - far) / 3 - claimed) / (size + 1e-2)


def closest_call(config, weights, tokens):
    """routing_margin, and the margin of the unbiased ungrouped top-k that the balance loss counts."""
    taps = forward(config, weights, tokens)
    if config["num_nextn_predict_layers"]:
        taps |= mtp_forward(config, weights, tokens, config["num_nextn_predict_layers"])
    free = {t.replace("scores", "choice"): v for t, v in taps.items() if t.endswith("router.scores")}
    return min(routing_margin(config, taps), routing_margin(config, free))


gradients_of = settings(quick, max_examples=8)
# Rounding: 1e-15 of a loss near 5 over h = 1e-5 is 5e-10, over a scale of at least 1e-2; truncation: 8e-10 was seen.
SLOPE = 1e-6


@gradients_of
@given(models(), strategies.seeds)
def test_gradients_are_slopes_of_the_oracles_loss(model, seed):
    """Catches a wrong or missing vjp, and a -100 that is counted."""
    labels = np.where(np.random.default_rng(seed).random(model.tokens.shape) < 0.3, -100, model.tokens)
    labels[0, -1] = model.tokens[0, -1]
    assert slope_error(model, seed, labels=labels) < SLOPE


@gradients_of
@given(models(mtp=2), strategies.seeds)
def test_gradients_of_the_whole_objective(model, seed):
    """Catches an MTP loss that stops at the main model, and a balance loss through f_i."""
    assert slope_error(model, seed, mtp_weight=0.3, aux_weight=0.1) < SLOPE


@gradients_of
@given(models(), strategies.seeds)
def test_every_weight_has_a_gradient_but_the_bias(model, seed):
    """Catches a weight that is left out of the tape (tied embeddings once, the bias never)."""
    config, weights, tokens = model
    names = {n for n in Impl().load(config, weights).loss_and_grads(tokens, tokens) if "grad/" in n}
    used = {n for n in weights if not n.endswith("e_score_correction_bias")}
    idle = {n for n in used if ".experts." in n}  # an expert without tokens may have none
    assert used - idle <= {n.removeprefix("grad/") for n in names} <= used


@pytest.mark.slow
@settings(thorough, max_examples=5)
@given(models(mtp=2), strategies.seeds)
def test_the_gradient_of_each_weight_alone(model, seed):
    """Catches an error that is small beside the other gradients."""
    idle = [n for n in model.weights if ".experts." in n or n.endswith("correction_bias")]
    for name in set(model.weights) - set(idle):
        assert slope_error(model, seed, lambda _, n=name: [n], mtp_weight=0.3) < SLOPE, name
