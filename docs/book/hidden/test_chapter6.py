"""Chapter 6's exercises, held against the specification's loss, its verification enumerated, and its formula."""

import numpy as np
import pytest

from refimpl.infer.verify import Draft, expected_tokens, verify
from refimpl.layers import loss


def test_targets(mine):
    """Catches labels moved by one too few or too many (T05): the loss of a sure prediction is 0 only at the right places."""
    tokens = [5, 2, 7, 1, 3, 6]
    embedded, foretold = mine.targets(tokens, 2)
    assert embedded == [7, 1, 3] and foretold == [1, 3, 6]
    sure = np.full((1, 4, 8), -50.0)  # logits of a module of depth 2: 6 - 2 positions, of which the last has no label
    for i, t in enumerate(foretold):
        sure[0, i, t] = 50.0
    assert float(loss.mtp(sure, np.array([tokens]), depth=2, mean="length")) == pytest.approx(0, abs=1e-12)
    assert mine.targets([1, 2], 1) == ([], [])


@pytest.mark.parametrize("seed", range(3))
def test_step_distribution(mine, seed):
    """Catches a second draw from p instead of what is left of it, and a chance that forgets the drafts' own distribution."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    out, stands = np.zeros(4), 0.0
    for x in range(4):  # all branches of `verify`, by hand: the draft, whether it stands, what comes instead
        for verdict in (0, 1):
            for instead in range(4):
                script, weight = iter([verdict, instead]), [q[x]]

                def draw(d, script=script, weight=weight):
                    i = next(script)
                    weight.append(d[i])
                    return i

                stood, token = verify(lambda j: p if j == 0 else np.full(4, 0.25), [Draft(x, q)], draw)
                out[x if stood else token] += np.prod(weight)
                stands += stood * np.prod(weight)
    found, chance = mine.step_distribution(p, q)
    np.testing.assert_allclose(found, out, atol=1e-12)
    assert chance == pytest.approx(stands, abs=1e-12)


def test_step_distribution_of_equals(mine):
    """Catches 0 / 0 where nothing ever falls."""
    p = np.array([0.5, 0.5])
    out, stands = mine.step_distribution(p, p)
    np.testing.assert_allclose(out, p)
    assert stands == pytest.approx(1)


def test_tokens_a_run(mine):
    """Catches a sum of chances where products are meant, and the token that comes for sure."""
    assert mine.tokens_a_run([]) == 1
    assert mine.tokens_a_run([0.8] * 3) == pytest.approx(expected_tokens(0.8, 3))
    assert mine.tokens_a_run([0.9, 0.5]) == pytest.approx(1 + 0.9 + 0.45)
