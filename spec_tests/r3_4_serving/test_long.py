"""R 2.1.1, 3.4: long texts through the engine. Attention in blocks of keys is attention, and beside the latents nothing grows."""

import tracemalloc
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest

from refimpl import Impl
from refimpl.infer.engine import Pages, Piece, core
from refimpl.infer.engine.forward import forward
from refimpl.layers.stage import observing
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.strategies.models import make_weights

WIDE = SMALL.replace(max_position_embeddings=20_000, kv_lora_rank=16, first_k_dense_replace=2)


def model(config=SMALL, precision="float64"):
    return Impl(precision=precision).load(config, make_weights(config.to_dict(), np.random.default_rng(0)))


def watch(stage, run, *args, **static):
    """An observer that changes nothing: with it, the stages themselves are run."""
    return run(*args, **static)


CUTS = {"at once": [0, 40], "pieces and single tokens": [0, 1, 7, 8, 30, 40], "single tokens last": [0, 33, 34, 35, 40]}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("keys", "scores"), [(5, 64), (1024, 2**22), (1, 1)])
def test_blocks_of_keys_give_what_the_stages_give(cuts, keys, scores, monkeypatch):
    """Catches a block's mask that is off by one, a sum that is not scaled down when a larger score comes, a head or a query of a
    block in another's place. The stages, and the model without pages, in float64 sums of another order: 1e-13 at logits of
    order 1. Pieces above 18 queries are expanded, others absorbed.
    """
    monkeypatch.setattr(core, "KEYS", keys)
    monkeypatch.setattr(core, "SCORES", scores)
    it, tokens = model(), np.random.default_rng(1).integers(0, 29, 40).tolist()
    expected = it.forward([tokens])["logits"][0]

    def run(around):
        pages = Pages(it, blocks=10, size=4)
        with around:
            return [forward(it.model, [Piece(tokens[a:b], a, range(10))], pages)[0] for a, b in pairwise(cuts)]

    found, stages = run(nullcontext()), run(observing(watch))
    np.testing.assert_allclose(found, stages, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found, expected[np.array(cuts[1:]) - 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("expands", [True, False])
def test_both_forms_are_chosen_by_the_length_of_the_piece(expands, monkeypatch):
    """Catches a form that is never reached, so that the test above compares one form with itself: 9 (7 + 5) / (18 - 12) = 18."""
    called = []
    for name in ("_absorbed", "_expanded"):
        form = getattr(core, name)
        monkeypatch.setattr(core, name, lambda *a, form=form, name=name: called.append(name) or form(*a))
    it = model()
    forward(it.model, [Piece([1] * (19 if expands else 18), 0, range(5))], Pages(it, blocks=5, size=4))
    assert called == ["_expanded" if expands else "_absorbed"] * 2


@pytest.mark.parametrize(("n", "most"), [(1, 15), (18, 60), (19, 95), (40, 200)])
def test_scores_are_held_in_parts(n, most, monkeypatch):
    """Catches all queries or all heads at once: of 3 heads and blocks of 5 keys, 64 scores allow 4 queries absorbed (60), and
    expanded 64 / 5n heads, so one, which is the least.
    """
    sizes, add = [], core.Running.add
    monkeypatch.setattr(core.Running, "add", lambda run, s, v: sizes.append(s.size) or add(run, s, v))
    monkeypatch.setattr(core, "KEYS", 5)
    monkeypatch.setattr(core, "SCORES", 64)
    it = model()
    forward(it.model, [Piece([1] * n, 20, range(15))], Pages(it, blocks=15, size=4))
    assert max(sizes) == most


def beside(it, pages, start, n):
    """Bytes that a piece holds at most beside the pages, and bytes that stay."""
    piece = Piece(np.arange(n) % 29, start, range(pages.blocks.count))
    forward(it.model, [piece], pages)
    tracemalloc.start()
    try:
        forward(it.model, [piece], pages)
        return tracemalloc.get_traced_memory()[::-1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [1, 8, 64])
def test_memory_beside_the_pages_does_not_grow_with_the_text(n, monkeypatch):
    """Catches all keys gathered at once, a row number for each, a mask or scores of all keys: from 1,024 tokens to 16,384 these
    grow by 1.4 MiB (24 float32 a token), 120 KiB, 15 n KiB and 180 n KiB. The table of blocks may grow, thrice 8 bytes for 64
    tokens.
    """
    monkeypatch.setattr(core, "KEYS", 64)
    monkeypatch.setattr(core, "SCORES", 4096)
    it, most = model(WIDE, "float32"), 16_384
    pages = Pages(it, blocks=most // 64, size=64)
    short, long = (beside(it, pages, t - n, n)[0] for t in (most // 16, most))
    assert long - short < 3 * 8 * most // 64 + 4096, (short, long)


def test_decoding_keeps_latents_only():
    """Catches keys or values that are kept, a cache that is copied: the pages are layers x tokens x (C + Dr) numbers, and nothing
    else is left after a step.
    """
    it = model(WIDE, "float32")
    pages = Pages(it, blocks=64, size=64)
    assert pages.nbytes == WIDE.num_hidden_layers * 4096 * (WIDE.kv_lora_rank + WIDE.qk_rope_head_dim) * 4
    held = [a.ctypes.data for a in pages._rows]
    _, left = beside(it, pages, 4095, 1)
    assert left < 4096 and held == [a.ctypes.data for a in pages._rows]
