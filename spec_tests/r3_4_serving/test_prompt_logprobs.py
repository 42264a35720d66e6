"""log P of a prompt's own tokens, from the engine: those of the whole text in one forward pass, in every schedule."""

import numpy as np
import pytest

from refimpl import SpecError
from refimpl.infer import Request, Settings, generate
from refimpl.infer.engine import Engine, Limits, Pages, Tiled
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl

LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
TEXTS = [*PROMPTS, LONG, [*LONG[:9], 20, 21], LONG]
SCHEDULES = {
    "all at once": ({"blocks": 99, "size": 4}, {}),
    "in pieces": ({"blocks": 99, "size": 4}, {"rows": 4, "tokens": 3}),
    "sent away": ({"blocks": 8, "size": 3}, {"rows": 4, "tokens": 5}),
}


def scored(engine, requests, n):
    """(tokens, the prompt's scores) of each."""
    numbers = engine.submit_all(requests, prompt_logprobs=n)
    tokens, scores = {i: [] for i in numbers}, {}
    for token in engine.drain():
        assert not (token.prompt and tokens[token.row])  # with the first token only
        tokens[token.row].append(token.id)
        scores.setdefault(token.row, token.prompt)
    return [(tokens[i], scores[i]) for i in numbers]


def naive(it, text, n):
    """(id, log P, rank, the n likeliest ids) of every token but the first, by the definition: one pass, no cache, plain loops."""
    rows = it.forward([text])["logits"][0]
    for i, token in enumerate(text[1:]):
        p = np.exp(rows[i] - rows[i].max())
        order = sorted(range(len(p)), key=lambda j: (-rows[i][j], j))
        yield token, np.log(p[token] / p.sum()), 1 + order.index(token), order[:n]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_prompt_s_log_probabilities_are_those_of_one_forward_pass(schedule):
    """Catches scores that are off by one token, a piece whose last logits are lost, a prefix that is found in the cache and so has
    no logits, a prompt that was sent away and is scored in part; tokens and blocks stay as they were."""
    it, (pages, limits) = impl(0), SCHEDULES[schedule]
    requests = [Request(t, Settings(max_tokens=9, seed=i)) for i, t in enumerate(TEXTS)]
    engine = Engine(it, Pages(it, **pages), limits=Limits(**limits))
    engine.submit(Request(LONG, Settings(max_tokens=1)))
    list(engine.drain())  # its blocks are there to be found
    got = scored(engine, requests, 3)
    assert [tokens for tokens, _ in got] == [c.tokens for c in generate(it, requests)]
    for text, (_, scores) in zip(TEXTS, got, strict=True):
        expected = list(naive(it, text, 3))
        assert [(s.id, s.rank, [t for t, _ in s.top]) for s in scores] == [(t, r, top) for t, _, r, top in expected]
        np.testing.assert_allclose([s.logprob for s in scores], [p for _, p, _, _ in expected], **CLOSE)
    assert engine.pages.blocks.free == pages["blocks"]
    assert (engine.counts.preempted > 0) == (schedule == "sent away")


def test_in_the_invariant_mode_they_are_the_same_bits_in_any_company():
    """Catches scores read from a product of the whole batch."""
    it, tile = impl(0), Tiled()
    requests = [Request(t, Settings(max_tokens=2)) for t in TEXTS]

    def run(which, **limits):
        engine = Engine(it, Pages(it, blocks=99, size=4), limits=Limits(**limits), invariant=tile)
        return [scores for _, scores in scored(engine, which, 2)]

    assert run(requests, tokens=5) == [run([r])[0] for r in requests]


def test_what_cannot_be_scored_changes_nothing():
    """Catches a request that is half submitted, and scores that are kept for one that was cancelled."""
    it = impl(0)
    engine = Engine(it, Pages(it, blocks=9, size=4))
    for n in (-1, 30, True, 1.5):
        with pytest.raises(SpecError, match="prompt_logprobs is"):
            engine.submit(Request([1, 2], Settings(max_tokens=2)), prompt_logprobs=n)
    with pytest.raises(SpecError, match="can never run"):
        engine.submit(Request(LONG * 4, Settings(max_tokens=2)), prompt_logprobs=1)
    assert len(engine) == 0 and list(engine.drain()) == []
    number = engine.submit(Request(LONG, Settings(max_tokens=2)), prompt_logprobs=1)
    assert engine.cancel(number) and not engine._prompts and engine.pages.blocks.free == 9
