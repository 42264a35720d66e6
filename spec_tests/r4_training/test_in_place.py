"""R 4.2: the optimiser's step over the arrays themselves does what the text of it does, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from refimpl.layers.precision import BF16, FLOAT32
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.train import AdamState, AdamW, Recipe, State, adamw, clip, global_norm, init, step
from refimpl.train.guard import NotFinite, guarded_step
from refimpl.train.in_place import BLOCK, adamw_over
from refimpl.train.memory import step as in_parts

SHAPES = {"a.weight": (3, BLOCK - 1), "b.norm.weight": (7,), "c.weight": (1,), "d.weight": (2, BLOCK)}


def arrays(seed: int) -> dict[str, np.ndarray]:
    """Normal numbers, some of them 0 and -0, as a gradient has where nothing flowed."""
    rng = np.random.default_rng(seed)
    found = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    found["a.weight"][0, :2] = 0.0, -0.0
    return found


@pytest.mark.parametrize("opt", [AdamW(), AdamW(moments="bf16", decays="matrices", lr=0.1)])
def test_the_step_over_the_arrays_has_the_bits_of_the_text(opt: AdamW) -> None:
    """Catches a sum in another order, a block left out or met twice, the step count or the decay of another tensor."""
    text, state = arrays(0), AdamState()
    ours, own = arrays(0), AdamState()
    for t in range(3):
        grads, _ = clip(arrays(t + 1), max_norm=1.0)
        scale = min(1.0, 1.0 / (global_norm(arrays(t + 1)) + 1e-6))
        text, state = adamw(text, grads, state, opt)
        ours, own = adamw_over(ours, arrays(t + 1), own, opt, scale=scale)
        assert own.t == state.t
        for n in SHAPES:
            for a, b in ((ours[n], text[n]), (own.m[n], state.m[n]), (own.v[n], state.v[n])):
                np.testing.assert_array_equal(a, b)


def test_it_is_written_over_what_it_was_given() -> None:
    """Catches a copy somewhere, which is what the form is there to save, and gradients that were written to."""
    params, grads = arrays(0), arrays(1)
    first, state = adamw_over(params, grads, AdamState(), AdamW(), scale=0.5)
    then, after = adamw_over(first, grads, state, AdamW(), scale=0.5)
    for n in SHAPES:
        assert then[n] is params[n] and after.m[n] is state.m[n] and after.v[n] is state.v[n]
        np.testing.assert_array_equal(grads[n], arrays(1)[n])


@pytest.mark.parametrize("spoil", [lambda x: x.setflags(write=False), None], ids=["read-only", "transposed"])
def test_arrays_that_cannot_be_written_flat_are_copied(spoil: Callable[[np.ndarray], None] | None) -> None:
    """Catches an update that goes into a flat copy and is lost, and a crash on weights mapped from a file."""
    w = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    given = w.copy() if spoil else w.T
    if spoil:
        spoil(given)
    before, grad = given.copy(), np.ones_like(given)
    found, _ = adamw_over({"x.weight": given}, {"x.weight": grad}, AdamState(), AdamW(), scale=1.0)
    expected, _ = adamw({"x.weight": before}, {"x.weight": grad}, AdamState(), AdamW())
    np.testing.assert_array_equal(found["x.weight"], expected["x.weight"])
    np.testing.assert_array_equal(given, before)


def test_the_norm_over_blocks_is_the_norm() -> None:
    """Catches a block skipped or counted twice. Tolerance: float64 sums of 1e5 squares, against exact ones by fsum."""
    grads = arrays(5)
    exact = math.sqrt(math.fsum([float(x) ** 2 for g in grads.values() for x in g.reshape(-1)]))
    assert global_norm(grads) == pytest.approx(exact, rel=1e-13)


def state_of(seed: int) -> State:
    """A new model's state, with memory of its own."""
    return State(init(SMALL, seed=seed, std=0.05))


@pytest.mark.parametrize("plan", [FLOAT32, BF16], ids=lambda p: p.name)
def test_training_in_place_has_the_bits_of_training(plan: object) -> None:
    """Catches weights that the next forward no longer sees, a bias that is not moved, clipping left out."""
    recipe = Recipe(plan=plan, opt=AdamW(lr=1e-2), max_norm=0.1)
    ours, text = state_of(1), state_of(1)
    for t in range(3):
        tokens = np.random.default_rng(t).integers(0, SMALL.vocab_size, (2, 8))
        ours, seen = step(SMALL, ours, tokens, recipe, in_place=True)
        text, expected = step(SMALL, text, tokens, recipe)
        assert (seen.loss, seen.norm, seen.step) == (expected.loss, expected.norm, expected.step)
    assert seen.norm > 0.1  # clipped
    for n in text.weights:
        np.testing.assert_array_equal(ours.weights[n], text.weights[n])


def test_accumulation_in_place_has_the_bits_of_accumulation() -> None:
    """Catches the keyword left behind on the way: then the state given is not the one that comes back."""
    recipe, tokens = Recipe(plan=FLOAT32, opt=AdamW(lr=1e-2)), np.arange(32).reshape(4, 8) % SMALL.vocab_size
    given, text = state_of(3), state_of(3)
    ours, _ = in_parts(SMALL, given, tokens, recipe, micro_batches=2, in_place=True)
    text, _ = in_parts(SMALL, text, tokens, recipe, micro_batches=2)
    for n in text.weights:
        np.testing.assert_array_equal(ours.weights[n], text.weights[n])
    assert ours.weights["lm_head.weight"] is given.weights["lm_head.weight"]


def test_a_step_in_place_that_is_no_number_changes_nothing() -> None:
    """Catches a state spoilt by a bad batch, which in place has no copy to go back to."""
    state = state_of(2)
    state.weights["model.norm.weight"][0] = np.nan
    before = {n: w.copy() for n, w in state.weights.items()}
    with np.errstate(invalid="ignore"):
        after, report = step(SMALL, state, np.arange(16).reshape(2, 8), Recipe(plan=FLOAT32), in_place=True)
        with pytest.raises(NotFinite, match=r"the weight model\.norm\.weight holds it already"):
            guarded_step(SMALL, state, np.arange(16).reshape(2, 8), Recipe(plan=FLOAT32), in_place=True)
    assert not math.isfinite(report.loss) and after is state
    for n, w in before.items():
        np.testing.assert_array_equal(state.weights[n], w)
