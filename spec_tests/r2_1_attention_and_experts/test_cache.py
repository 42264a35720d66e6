"""The latent cache (R 2.1.1, the boxed vectors): however a text arrives, its logits are the same."""

import numpy as np
import pytest

from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, logits, small, some_tokens

from .test_attention import VARIANTS


def in_chunks(model, tokens, sizes, attend="auto", **how):
    """Logits of a text fed in chunks, each with the cache of those before."""
    cache, out, start = None, [], 0
    for n in sizes:
        part = np.s_[:, start : start + n]
        given = {k: v[part] for k, v in how.items()}
        run = model(model.inputs(tokens[part], cache=cache, **given), cache, attend=attend)
        cache, start = run.cache, start + n
        out.append(run.logits)
    assert len(cache) == start == tokens.shape[1]
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attend", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("sizes", [[5, 6], [3, 4, 4], [10, 1], [1, 10], [1] * 11], ids=str)
def test_chunks_are_the_whole(variant, attend, sizes):
    """Catches positions that start again, a mask of the wrong corner (S, S instead of S, T), rope
    applied twice to cached keys, a normalised latent normalised again."""
    model, tokens = small(**VARIANTS[variant]), some_tokens(2, 11)
    whole = logits(model, tokens, attend="expanded")
    np.testing.assert_allclose(in_chunks(model, tokens, sizes, attend), whole, **CLOSE)


def test_a_long_prefix_and_one_token():
    """Catches a cache cut at a block of queries: 150 tokens in the cache, then one."""
    model, tokens = small(), some_tokens(1, 151)
    whole = logits(model, tokens)
    np.testing.assert_allclose(in_chunks(model, tokens, [150, 1]), whole, **CLOSE)


def test_documents_go_on_across_chunks():
    """Catches document ids compared with those of the chunk instead of those of the cache."""
    model, tokens = small(), some_tokens(1, 9)
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    whole = logits(model, tokens, documents=documents)
    split = in_chunks(model, tokens, [5, 3, 1], documents=documents)
    np.testing.assert_allclose(split, whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attend", ["auto", "expanded"])
def test_texts_of_unequal_length_decode_as_if_alone(side, attend):
    """Catches padding in the cache that later tokens see, and positions that count it."""
    model, prompt, new = small(), some_tokens(2, 7), some_tokens(2, 4, seed=5)
    valid = np.ones_like(prompt)
    valid[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    cache, together = model(model.inputs(prompt, valid=valid)).cache, []
    for t in range(4):
        run = model(model.inputs(new[:, t : t + 1], cache=cache), cache, attend=attend)
        cache = run.cache
        together.append(run.logits[:, 0])
    for b in range(2):
        text = np.concatenate([prompt[b, valid[b] == 1], new[b]])[None]
        alone = logits(model, text)[0, -4:]
        np.testing.assert_allclose([row[b] for row in together], alone, **CLOSE)


def test_positions_of_new_tokens_follow_the_cache():
    """Catches counting from the cache's width: padding takes no position, not even a whole row."""
    model, tokens = small(), some_tokens(3, 5)
    valid = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    inputs = model.inputs(tokens, valid=valid)
    np.testing.assert_array_equal(inputs.positions[:2], [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    cache = model(inputs).cache
    following = model.inputs(tokens[:, :2], cache=cache)
    np.testing.assert_array_equal(following.positions, [[5, 6], [3, 4], [0, 1]])


def test_the_cache_holds_the_latent_and_one_rotated_key():
    """R 2.1.1: "only need to be cached". Catches per-head keys or values in the cache."""
    model, tokens = small(), some_tokens(2, 6)
    cache = model(model.inputs(tokens)).cache
    assert len(cache.layers) == SMALL.num_hidden_layers
    for c_kv, k_rope in cache.layers:
        assert c_kv.shape == (2, 6, SMALL.kv_lora_rank)
        assert k_rope.shape == (2, 6, SMALL.qk_rope_head_dim)


def test_a_cache_is_not_changed_by_going_on_from_it():
    """Catches append in place: two continuations of one prompt must not meet."""
    model, tokens = small(), some_tokens(1, 6)
    cache = model(model.inputs(tokens)).cache
    before = [a.copy() for pair in cache.layers for a in pair]
    first, second = np.array([[3]]), np.array([[8]])

    def step(token):
        return model(model.inputs(token, cache=cache), cache).logits

    expected = step(first)
    step(second)
    np.testing.assert_array_equal(step(first), expected)
    for a, b in zip(before, (a for pair in cache.layers for a in pair), strict=True):
        np.testing.assert_array_equal(a, b)
