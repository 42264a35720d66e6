"""Beam search against all texts there are, and against a search without cache that never stops early."""

import itertools

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.infer import beam_search, greedy
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl


def test_with_all_beginnings_kept_beam_search_is_exhaustive():
    """Catches a beam that continues another's cache: the best of all 81 texts of four tokens, in order, and of those that may
    end early with token 2, scored by mean log-probability."""
    it = impl(0, vocab_size=3)

    def logprob(text):
        z = it.forward([[1, *text]])["logits"][0]
        return sum(z[i, t] - np.log(np.exp(z[i]).sum()) for i, t in enumerate(text))

    for eos, penalty in (((), 1.0), ((2,), 1.0), ((2,), 0.0), ((2,), -1.0)):
        texts = [t for n in range(1, 5) for t in itertools.product(range(3), repeat=n)]
        texts = [t for t in texts if not set(t[:-1]) & set(eos) and (len(t) == 4 or t[-1] in eos)]
        best = sorted(texts, key=lambda t: -logprob(t) / len(t) ** penalty)[:27]
        found = beam_search(it, [1], beams=27, max_tokens=4, eos=eos, length_penalty=penalty)
        assert [b.tokens for b in found] == best
        np.testing.assert_allclose([b.logprob for b in found], [logprob(t) for t in best], **CLOSE)


SHARP = [  # (seed, beams, length penalty, end token) of which each would end too early under a bound that is nearly right
    (0, 2, 1.0, 0),
    (8, 1, 1.0, 1),
    (7, 1, 3.0, 3),
    (9, 1, 3.0, 3),
    (5, 2, -1.0, 1),
    (6, 2, -1.0, 1),
    (8, 2, -1.0, 2),
]


def test_stopping_early_loses_nothing():
    """Catches a search that ends although a running text could still become the best; the oracle has no cache and goes on to
    the last token."""

    def patient(it, beams, n, eos, penalty):
        live, done = {(): 0.0}, {}
        for _ in range(n):
            longer = {}
            for text, s in live.items():
                z = it.forward([[1, *text]])["logits"][0, -1]
                longer |= {(*text, t): s + z[t] - np.log(np.exp(z).sum()) for t in range(len(z))}
            ranked = sorted(longer, key=lambda t: -longer[t])
            done |= {t: longer[t] for t in ranked[:beams] if t[-1] == eos}
            live = {t: longer[t] for t in [t for t in ranked if t[-1] != eos][:beams]}
        return sorted(done | live, key=lambda t: -(done | live)[t] / len(t) ** penalty)[:beams]

    early = 0
    for seed, beams, penalty, eos in SHARP:
        it = impl(0, vocab_size=4, seed=seed, sharp=2.0)
        found = [b.tokens for b in beam_search(it, [1], beams=beams, max_tokens=6, eos=(eos,), length_penalty=penalty)]
        assert found == patient(it, beams, 6, eos, penalty)
        early += len(found[0]) < 6
    assert early > 1


def test_one_beam_is_greedy():
    """Catches a search that does not go on from the best."""
    it = impl(0)
    assert list(beam_search(it, PROMPTS[0], beams=1, max_tokens=9)[0].tokens) == greedy(it, [PROMPTS[0]], 9)[0].tolist()


@pytest.mark.parametrize("penalty", [1e6, -1e6, float("nan"), "1"])
def test_a_penalty_whose_power_is_no_float(penalty):
    """Catches an OverflowError, a division by zero, a TypeError."""
    with pytest.raises(SpecError, match="length_penalty"):
        beam_search(impl(0), PROMPTS[0], beams=2, max_tokens=5, length_penalty=penalty)
