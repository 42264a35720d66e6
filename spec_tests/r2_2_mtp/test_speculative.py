"""R 2.2, 5.4.3: speculative decoding by MTP. What comes out is what plain sampling gives, exactly; how fast is counted."""

import itertools

import numpy as np
import pytest

from refimpl import Impl, SpecError
from refimpl.infer import Request, Settings, Speculation, Tally, expected_tokens, generate, greedy, stream
from refimpl.infer.verify import Draft, verify
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl, requests
from refimpl.spec_tests.cases.small_models import SMALL
from refimpl.spec_tests.oracles.enumeration import outcomes
from refimpl.spec_tests.strategies.models import make_weights

EXACT = 1e-10  # probabilities of a few tokens, products of numbers that differ by the roundings of CLOSE


# ---- Verification alone


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_verified_drafts_have_the_target_s_distribution(depth, sparse):
    """Leviathan et al. 2023, appendix A.1, for any p and q that depend on everything before. Catches a residual from the wrong
    position, a draft that is looked at after one fell, a bonus token from q. Every path of the program is run."""
    rng, v = np.random.default_rng(depth), 3
    tables = {name: {} for name in "pq"}
    for name, n in itertools.product("pq", range(depth + 1)):
        for before in itertools.product(range(v), repeat=n):
            w = rng.dirichlet(np.ones(v))
            tables[name][before] = np.eye(v)[rng.integers(v)] if sparse and rng.random() < 0.4 else w
    p, q = tables["p"], tables["q"]

    def run(draw):
        drafts = []
        for _ in range(depth):
            here = q[tuple(d.token for d in drafts)]
            drafts.append(Draft(draw(here), here))
        ids = tuple(d.token for d in drafts)
        stood, last = verify(lambda j: p[ids[:j]], drafts, draw)
        return (*ids[:stood], last)

    made = outcomes(run)
    for n in range(1, depth + 2):
        for sequence in itertools.product(range(v), repeat=n):
            # P(the first n tokens are these), given that so many were made: what p says, times the chance to get so far
            reached = sum(w for s, w in made.items() if len(s) >= n and s[: n - 1] == sequence[: n - 1])
            here = sum(w for s, w in made.items() if s[:n] == sequence)
            assert abs(here - reached * p[sequence[:-1]][sequence[-1]]) < EXACT


# ---- The whole loop against the chain rule


def chain_rule(it, prompt, tokens, settings):
    """{continuation: probability} by runs without any cache, one token after another."""
    found = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for sequence, weight in found.items():
            ids = [*prompt, *sequence]
            p = settings.distribution(it.forward([ids])["logits"][0, -1], ids)
            longer |= {(*sequence, int(t)): weight * p[t] for t in np.flatnonzero(p)}
        found = longer
    return found


@pytest.mark.parametrize(
    ("modules", "how", "settings"),
    [
        (1, Speculation(1), {"temperature": 0}),
        (1, Speculation(1), {"temperature": 0.7}),
        (1, Speculation(1), {"temperature": 1.0}),
        (1, Speculation(1, greedy=True), {"temperature": 2.0}),
        (1, Speculation(1), {"temperature": 1.3, "top_k": 2, "repetition_penalty": 1.5}),
        (2, Speculation(2), {"temperature": 1.0}),
        (1, Speculation(2, recycle=True), {"temperature": 1.0}),
        (2, Speculation(2), {"temperature": 1.5, "top_p": 0.8, "min_p": 0.1}),
    ],
    ids=str,
)
def test_the_distribution_of_texts_is_plain_sampling_s(modules, how, settings):
    """Catches everything that moves a probability: a cache that remembers a fallen draft, p at the wrong position, a q that is
    not what was drawn from, penalties that forget the drafts. All paths of generation are enumerated, and summed by text; the
    oracle has no cache, no drafts and no draws."""
    it, prompt, tokens = impl(modules, vocab_size=3), [2, 0], 3
    settings = Settings(max_tokens=tokens, **settings)

    def run(draw):
        return tuple(generate(it, [Request(prompt, settings, draw)], speculate=how)[0].tokens)

    expected, made = chain_rule(it, prompt, tokens, settings), outcomes(run)
    assert set(made) == set(expected)
    assert max(abs(made[s] - expected[s]) for s in expected) < EXACT


@pytest.mark.parametrize(
    ("modules", "how", "attend"),
    [
        (1, Speculation(1), "auto"),
        (2, Speculation(2), "expanded"),
        (3, Speculation(2), "absorbed"),
        (3, Speculation(3), "auto"),
        (1, Speculation(4, recycle=True), "auto"),
        (2, Speculation(3, recycle=True, greedy=True), "auto"),
    ],
    ids=str,
)
def test_greedy_is_identical(modules, how, attend):
    """Catches a draft that stands without being the most likely token; rows of other lengths, accepting differently, in one
    batch. Of four tokens all are used, and some drafts stand."""
    it = impl(modules, vocab_size=4, seed=2)
    it.attend = attend
    prompts = [[t % 4 for t in p] for p in PROMPTS]
    tally = Tally()
    rows = requests(*prompts, tokens=20, temperature=0)
    plain, drafted = generate(it, rows), generate(it, rows, speculate=how, tally=tally)
    assert [c.tokens for c in drafted] == [c.tokens for c in plain]
    for a, b in zip(plain, drafted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, **CLOSE)
    assert 0 < tally.stood[0] < tally.tried[0]


def test_rows_do_not_know_each_other():
    """Catches draws shared between rows, padding that is attended to, positions counted with padding or with fallen drafts:
    rows that end at different times and accept differently give what each gives alone."""
    it, how = impl(2), Speculation(2)
    rows = [
        Request(p, Settings(temperature=t, max_tokens=n, seed=n))
        for p, t, n in zip(PROMPTS, (3.0, 1.0, 9.0, 5.0), (20, 3, 14, 9), strict=True)
    ]
    alone = [generate(it, [r], speculate=how)[0] for r in rows]
    together = generate(it, rows, speculate=how)
    for a, b in zip(alone, together, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, **CLOSE)


def test_after_every_step_the_cache_is_that_of_the_decided_tokens(monkeypatch):
    """Catches a roll-back one too short or too long, in the model's cache or the modules': after each step the main cache
    equals that of a run of the decided tokens alone, and no row has more."""
    it, kept = impl(2), []
    advance = Impl.advance

    def spied(self, tokens, cache, **how):
        if "kv" in cache:
            kept.append(cache["kv"])
        return advance(self, tokens, cache, **how)

    monkeypatch.setattr(Impl, "advance", spied)
    done = generate(it, requests(*PROMPTS[:3], temperature=6.0, tokens=10), speculate=Speculation(2))
    texts = [[*p, *c.tokens] for p, c in zip(PROMPTS, done, strict=False)]
    assert len({len(k) for k in kept}) > 3
    for cache in kept:
        valid = np.ones_like(cache.positions) if cache.valid is None else cache.valid
        for b in range(len(valid)) if len(valid) == 3 else ():
            n = valid[b].sum()
            state = {}
            Impl.forward(it, [texts[b][:n]], cache=state)
            np.testing.assert_array_equal(cache.positions[b][valid[b] == 1], np.arange(n))
            for ours, whole in zip(cache.layers, state["kv"].layers, strict=True):
                np.testing.assert_allclose(ours[0][b][valid[b] == 1], whole[0][0], **CLOSE)
                np.testing.assert_allclose(ours[1][b][valid[b] == 1], whole[1][0], **CLOSE)


# ---- What it comes to


def test_acceptance_is_the_overlap_of_p_and_q():
    """Leviathan et al. 2023, theorem 3.5. Catches a tally that counts drafts nobody looked at, or steps of the prompt: over
    all paths, the mean of `stood` is the sum of min(p, q)."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])

    def run(draw):
        token = draw(q)
        return verify(lambda j: p, [Draft(token, q)], draw)[0]

    assert abs(outcomes(run)[1] - (0.2 + 0.2 + 0.2)) < 1e-14


def test_the_tally_counts_rows_and_depths():
    """Catches depths mixed up: two drafts of which one stands were both looked at, of three of which none stands only the
    first."""
    tally = Tally()
    for drafts, stood in ((2, 1), (3, 0), (3, 3), (0, 0)):
        tally.add(drafts, stood, stood + 1)
    assert (tally.tried, tally.stood) == ([3, 2, 1], [2, 1, 1])
    assert tally.acceptance == [2 / 3, 1 / 2, 1] and tally.tokens_per_step == 8 / 4
    assert Tally().tokens_per_step == 0 and Tally().acceptance == []


def test_tokens_per_step_follow_from_acceptance():
    """R 5.4.3: 85-90 % and "1.8 times TPS" belong together: 1 + a with one draft. Catches the exponent off by one."""
    assert expected_tokens(0.85, 1) == 1.85
    assert expected_tokens(1.0, 3) == 4 and expected_tokens(0.0, 3) == 1
    assert abs(expected_tokens(0.8, 2) - (1 - 0.8**3) / (1 - 0.8)) < 1e-12


def test_a_perfect_module_doubles_the_tokens_of_a_step():
    """Catches drafts thrown away: where the whole text is one token over and over, every draft stands, but those cut off by
    the end."""
    config = SMALL.replace(num_nextn_predict_layers=1, vocab_size=5)
    weights = make_weights(config.to_dict(), np.random.default_rng(0), mtp=1)
    weights["lm_head.weight"] = np.zeros((5, config.hidden_size))  # all logits equal: the lowest id
    it, tally = Impl(precision="float64").load(config, weights), Tally()
    done = generate(it, requests([1], tokens=9, temperature=0), speculate=Speculation(1), tally=tally)
    assert done[0].tokens == [0] * 9
    assert tally.steps == 4 and tally.tokens_per_step == 2 and tally.acceptance == [1.0]


def test_with_a_packed_cache_and_in_low_precision():
    """Catches a roll-back that unpacks and packs again, and drafts made outside the precision plan: greedy speculative text in
    FP8 with a cache in bytes is the plain one's. (Not promised where two logits are within a rounding; fixed weights, so it
    holds or not.)"""
    config = SMALL.replace(num_nextn_predict_layers=1, vocab_size=3)
    weights = make_weights(config.to_dict(), np.random.default_rng(0), mtp=1)
    it = Impl(precision="bf16", kv_format="fp8").load(config, weights)
    prompts = np.array([[1, 2, 0], [2, 2, 1]])
    np.testing.assert_array_equal(greedy(it, prompts, 10, speculate=Speculation(1)), greedy(it, prompts, 10))


# ---- Bad input


def test_without_modules_nobody_speculates():
    """Catches an IndexError in the middle of a run, or a silent plain run; nothing may have been run."""
    it = impl(0)
    with pytest.raises(SpecError, match="no MTP module"):
        stream(it, requests([1]), speculate=Speculation())
    with pytest.raises(SpecError, match="depth 2 needs as many MTP modules, the checkpoint has 1; or recycle"):
        stream(impl(1), requests([1]), speculate=Speculation(2))
    for depth in (0, -1, 1.5, None):
        with pytest.raises(SpecError, match="whole number from 1"):
            Speculation(depth)


def test_the_end_of_the_window_is_reached_and_not_passed():
    """Catches drafts beyond the last position: with 12 positions and 3 tokens of prompt, 9 more come, as without
    speculation, beside a row that has room for fewer."""
    it = impl(2, max_position_embeddings=12)
    rows = [Request([1] * n, Settings(temperature=4.0)) for n in (3, 8, 11)]
    done = generate(it, rows, speculate=Speculation(4, recycle=True))
    assert [len(c.tokens) for c in done] == [9, 4, 1]
    assert {c.finish for c in done} == {"length"}
