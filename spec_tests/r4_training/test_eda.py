"""Easy data augmentation (Wei and Zou 2019): described in articles, not in V3."""

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.train.data.eda import augment, deletion, insertion, swap, synonyms

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "the", "quick", "cat"]
THESAURUS = {"quick": ("fast", "rapid"), "lazy": ("idle",), "the": ("a",), "dog": ("hound",)}
STOP = {"the", "and", "over"}


@pytest.mark.parametrize("seed", range(8))
def test_synonyms_replace_every_occurrence_of_n_words(seed):
    """Catches stop words replaced, one of two occurrences left, more than n words changed."""
    out = synonyms(WORDS, 2, np.random.default_rng(seed), THESAURUS, STOP)
    changed = {a: b for a, b in zip(WORDS, out, strict=True) if a != b}
    assert len(changed) == 2 and all(b in THESAURUS[a] for a, b in changed.items()) and not STOP & set(changed)
    assert all(out[i] == changed.get(w, w) for i, w in enumerate(WORDS))
    assert synonyms(WORDS, 9, np.random.default_rng(seed), THESAURUS, STOP)[7:9] == ["idle", "hound"]


@pytest.mark.parametrize("seed", range(8))
def test_insertion_adds_n_synonyms(seed):
    """Catches words that are replaced, and synonyms of stop words: without the new ones the sentence is the old one."""
    out = insertion(WORDS, 3, np.random.default_rng(seed), THESAURUS, STOP)
    new = [w for w in out if w in ("fast", "rapid", "idle", "hound")]
    assert len(out) == len(WORDS) + 3 and len(new) == 3 and "a" not in out
    assert [w for w in out if w not in new] == WORDS
    assert insertion(["and"], 3, np.random.default_rng(seed), THESAURUS, STOP) == ["and"]


@pytest.mark.parametrize("seed", range(8))
def test_swap_exchanges_two_places(seed):
    """Catches a place exchanged with itself, and a word copied."""
    letters = list("abcdefgh")
    out = swap(letters, 1, np.random.default_rng(seed))
    assert sorted(out) == letters and sum(a != b for a, b in zip(letters, out, strict=True)) == 2
    assert swap(["a"], 3, np.random.default_rng(seed)) == ["a"]


def test_deletion_keeps_the_order_the_rate_and_one_word():
    """Catches an empty sentence, and p the other way round: 5 sigma of the binomial with 4,000 words."""
    rng = np.random.default_rng(0)
    words = [str(i) for i in range(4000)]
    out = deletion(words, 0.1, rng)
    assert [int(w) for w in out] == sorted(int(w) for w in out)
    assert abs(len(out) - 3600) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert deletion(["a", "b"], 1.0, rng)[0] in ("a", "b") and deletion([], 0.5, rng) == []


def test_augment_takes_the_four_in_turn():
    """Catches n = 0 for a short sentence, a kind left out, a result that the seed does not decide."""
    one = augment(WORDS, np.random.default_rng(1), THESAURUS, stop=STOP, times=6)
    assert one == augment(WORDS, np.random.default_rng(1), THESAURUS, stop=STOP, times=6)
    assert [len(o) - len(WORDS) for o in one[:3]] == [0, 1, 0] and len(one) == 6 and len(one[3]) <= len(WORDS)
    assert one[0] != WORDS and sorted(one[2]) == sorted(WORDS) and augment([], np.random.default_rng(1), {}) == []
    with pytest.raises(SpecError, match="alpha is 2"):
        augment(WORDS, np.random.default_rng(1), THESAURUS, alpha=2)
