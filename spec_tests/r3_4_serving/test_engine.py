"""R 3.4: the batching engine. Any schedule gives each request what it gets alone; in the batch-invariant mode to the last bit."""

import contextlib
import functools

import numpy as np
import pytest

from refimpl import Impl, SpecError
from refimpl.infer import Request, Settings, generate
from refimpl.infer.engine import POLICIES, ByComplexity, Engine, Limits, Pages, Tiled, invariant
from refimpl.infer.engine.invariant import steady
from refimpl.infer.row import Row
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent
from refimpl.model.packed_cache import kv_format
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.cases.generation import impl
from refimpl.spec_tests.strategies.models import make_weights

TILE = Tiled()


def model(precision="float32", **how):
    config = SMALL.replace(**{k: how.pop(k) for k in list(how) if hasattr(SMALL, k)})
    return Impl(precision=precision, **how).load(config, make_weights(config.to_dict(), np.random.default_rng(0)))


def mixed(n=10, seed=0, **settings):
    """n requests of many lengths; some begin alike, two are the same."""
    rng = np.random.default_rng(seed)
    common, found = rng.integers(0, 29, 13).tolist(), []
    for i in range(n):
        prompt = common[: rng.integers(0, 14)] + rng.integers(0, 29, rng.integers(1, 12)).tolist()
        found.append(Request(prompt, Settings(max_tokens=int(rng.integers(1, 12)), seed=i, **settings)))
    return [*found, found[-1]]


def served(engine, requests):
    """Tokens by request, all submitted at once."""
    found = {n: [] for n in engine.submit_all(requests)}
    for token in engine.drain():
        found[token.row].append(token.id)
    return list(found.values())


@contextlib.contextmanager
def noted():
    """The logits of every decision as bytes, by request: filled by whatever is served."""
    seen, decide = {}, Row.decide

    def note(self, logits, tally):
        seen.setdefault(self.number, []).append(logits.tobytes())
        return decide(self, logits, tally)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Row, "decide", note)
        yield seen


@pytest.fixture
def bits():
    with noted() as seen:
        yield seen


def alone(it, requests, bits, **how):
    """Each request's logits when an engine has nothing else to do, and a new cache."""
    found = []
    for r in requests:
        bits.clear()
        served(Engine(it, Pages(it, blocks=64, size=4), invariant=how.get("invariant", TILE)), [r])
        found.append(bits[0])
    return found


SCHEDULES = {
    "all at once": ({"blocks": 99, "size": 4}, {"rows": 32, "tokens": 512}),
    "one token a step": ({"blocks": 99, "size": 4}, {"rows": 3, "tokens": 1}),
    "pieces beside decoding": ({"blocks": 99, "size": 5}, {"rows": 4, "tokens": 6}),
    "sent away": ({"blocks": 9, "size": 4}, {"rows": 6, "tokens": 9}),
    "blocks of one": ({"blocks": 40, "size": 1}, {"rows": 5, "tokens": 16}),
    "never sent away": ({"blocks": 16, "size": 4}, {"rows": 6, "tokens": 9, "reserve": "all"}),
}


@functools.cache
def without_pages():
    """The model, requests, and the tokens that the loop without pages gives each."""
    it, requests = impl(0), mixed()
    return it, requests, [c.tokens for c in generate(it, requests)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", [*POLICIES.values(), ByComplexity(short=6, long=5, limit=20)], ids=str)
def test_any_schedule_gives_each_request_the_tokens_it_gets_alone(schedule, policy):
    """Catches a neighbour's latents, positions or draws, a token run twice or never, a mask that is off in a piece; against the
    loop without pages, in float64, where rounding decides nothing."""
    (it, requests, expected), (pages, limits) = without_pages(), SCHEDULES[schedule]
    engine = Engine(it, Pages(it, **pages), limits=Limits(**limits), policy=policy)
    assert served(engine, requests) == expected
    assert engine.pages.blocks.free == pages["blocks"] and len(engine) == 0
    assert (engine.counts.preempted > 0) == (schedule in ("sent away", "blocks of one"))


@functools.cache
def each_alone():
    """A model, requests, and each one's logits when the engine has nothing else to do."""
    it, requests = model(), mixed()
    with noted() as seen:
        return it, requests, alone(it, requests, seen)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_the_invariant_mode_the_logits_are_the_same_bits(schedule, bits):
    """Catches a product whose shape depends on the batch, a sum over padding, a prompt's arithmetic that differs from decoding's, a
    cached prefix that is not what would have been computed."""
    (it, requests, expected), (pages, limits) = each_alone(), SCHEDULES[schedule]
    bits.clear()
    served(Engine(it, Pages(it, **pages), limits=Limits(**limits), invariant=TILE), requests)
    assert [bits[i] for i in range(len(requests))] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"precision": "float64"}, {"precision": "bf16"}, {"precision": "fp8"}, {"kv_format": "fp8"}]
)
def test_the_invariant_mode_under_every_precision(how, bits):
    """Catches quantisation tiles that reach over rows, rounding outside a tile, latents that are exact in one schedule and packed
    in another."""
    sizes = {"kv_lora_rank": 128} if "kv_format" in how else {}
    it, requests = model(**how, **sizes), mixed(5)
    expected = alone(it, requests, bits)
    bits.clear()
    engine = Engine(it, Pages(it, blocks=9, size=4), limits=Limits(rows=5, tokens=6), invariant=TILE)
    served(engine, requests)
    assert engine.counts.preempted and [bits[i] for i in range(len(requests))] == expected


def test_a_tile_of_one_row_assumes_nothing(bits):
    """Catches a stage left out of the tiles that larger ones happen to hide; V2's softmax routing sums over experts."""
    it = model(scoring_func="softmax", topk_method="greedy", q_lora_rank=None)
    requests = mixed(4)
    expected = alone(it, requests, bits, invariant=Tiled(1))
    bits.clear()
    served(Engine(it, Pages(it, blocks=30, size=4), limits=Limits(tokens=7), invariant=Tiled(1)), requests)
    assert [bits[i] for i in range(len(requests))] == expected


def test_without_the_mode_bits_do_depend_on_the_batch(bits):
    """Catches a test above that could not fail: without the mode a request's bits differ from those it has alone, by roundings."""
    it, requests = model(hidden_size=48, vocab_size=29), mixed(6)
    expected = alone(it, requests, bits, invariant=None)
    bits.clear()
    served(Engine(it, Pages(it, blocks=99, size=4)), requests)
    found = [bits[i] for i in range(len(requests))]
    assert found != expected
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(_floats(a), _floats(b), atol=2e-5)  # float32, two layers, logits of order 1


def _floats(rows):
    return np.array([np.frombuffer(r, np.float32) for r in rows])


def test_a_tile_s_row_does_not_depend_on_its_place():
    """Catches a mode whose one assumption is wrong here: every product of a row, in each place, beside anything."""
    for width, out in ((24, 72), (48, 80), (512, 192), (128, 257), (7, 5), (100, 1001)):
        for dtype in (np.float32, np.float64):
            assert steady(Tiled().rows, width, out, dtype), (width, out, dtype)
    assert steady(1, 48, 257, np.float64)


def test_rows_that_look_at_their_place_are_not_used(monkeypatch):
    """Catches a number of rows that is believed: a BLAS that is steady with two rows only, and one that never is."""
    for works, expected in (((2,), 2), ((), 1), ((8, 4, 2), 8)):
        monkeypatch.setattr(invariant, "steady", lambda rows, *shape, works=works: rows in works)
        invariant.steady_rows.cache_clear()
        assert invariant.steady_rows() == expected
    invariant.steady_rows.cache_clear()


# ---- The cache


def test_a_prefix_that_is_found_changes_nothing(bits):
    """Catches a hit that is one token off, or the last token of a prompt taken from the cache, which has no logits there."""
    it, prompt = model(), [7, 3, 9, 1, 4, 4, 2, 8]
    requests = [Request(prompt[:n], Settings(max_tokens=5, seed=n)) for n in (8, 8, 3, 5, 7, 1)]
    expected = alone(it, requests, bits)
    engine = Engine(it, Pages(it, blocks=30, size=4), invariant=TILE)
    for i, r in enumerate(requests):
        before = engine.counts.found
        bits.clear()
        served(engine, [r])
        assert bits[i] == expected[i]
        assert engine.counts.found - before == (0, 7, 2, 4, 6, 0)[i]


def test_a_cache_outlives_its_engine(bits):
    """Catches contents lost, or kept wrong, between engines of one model."""
    it, pages, request = model(), None, Request([5, 6, 7, 8, 9], Settings(max_tokens=4))
    pages = Pages(it, blocks=8, size=2)
    first = served(Engine(it, pages, invariant=TILE), [request])
    kept = list(bits[0])
    bits.clear()
    engine = Engine(it, pages, invariant=TILE)
    assert served(engine, [request]) == first and bits[0] == kept and engine.counts.found == 4


def test_pages_hold_what_the_model_s_own_cache_holds():
    """Catches latents in the wrong slot or layer, a key unrotated, bytes that are not the packed cache's."""
    it, tokens = model(kv_lora_rank=128), [3, 1, 4, 1, 5, 9, 2]
    for how in (None, "fp8"):
        paged = model(kv_lora_rank=128, kv_format=how)
        pages = Pages(paged, blocks=5, size=3)
        engine = Engine(paged, pages, limits=Limits(tokens=4))
        engine.submit(Request(tokens, Settings(max_tokens=2)))
        engine.step()
        engine.step()
        table, state = engine.scheduler.running[0].table, {}
        it.forward([tokens], cache=state)
        for i in range(1 if how else 2):  # layer 1 of packed pages has seen layer 0's packed values
            c, k = state["kv"].layers[i]
            if how:
                fmt, dialect = kv_format(how)
                c, k = unpack_latent(pack_latent(c, k, fmt=fmt, dialect=dialect), latent=128, rope=8, fmt=fmt)
            found = pages.read(i, pages.slots(table, 0, 7))
            step = np.abs(c).max() / 16 if how else 0  # a rounding may fall on either side of one code
            np.testing.assert_allclose(found[0], c, atol=2e-5 + step)
            np.testing.assert_allclose(found[1], k, atol=2e-5 + (np.abs(k).max() / 128 if how else 0))
    assert Pages(it, blocks=5, size=3).nbytes == 2 * 15 * (128 + 8) * 4
    assert pages.nbytes == 2 * 15 * (128 + 4 * 1 + 2 * 8)  # codes, one float32 scale, keys in bfloat16


# ---- Coming and going


def test_cancelled_requests_free_their_blocks():
    """Catches blocks kept by whoever was given up while waiting, half read, decoding or sent away; others undisturbed."""
    it, requests = impl(0), mixed(8)
    expected = [c.tokens for c in generate(it, requests)]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        engine = Engine(it, Pages(it, blocks=10, size=4), limits=Limits(rows=5, tokens=6))
        found, alive = {n: [] for n in engine.submit_all(requests)}, set(range(len(requests)))
        expected_now = list(expected)
        while len(engine):
            for token in engine.step():
                found[token.row].append(token.id)
                if token.finish:
                    alive.discard(token.row)
            if alive and rng.random() < 0.15:
                gone = int(rng.choice(sorted(alive)))
                assert engine.cancel(gone) and not engine.cancel(gone)
                alive.discard(gone)
                assert found[gone] == expected[gone][: len(found[gone])]
                expected_now[gone] = found[gone]
        assert engine.pages.blocks.free == 10 and list(found.values()) == expected_now
    assert not engine.cancel(99)


def test_requests_may_come_at_any_step():
    """Catches a batch that is closed once it runs: one request a step, while others are anywhere."""
    it, requests = impl(0), mixed(8, seed=3)
    expected = [c.tokens for c in generate(it, requests)]
    engine, found = Engine(it, Pages(it, blocks=12, size=4), limits=Limits(rows=4, tokens=8)), {}
    for r in requests:
        found[engine.submit(r)] = []
        for token in engine.step():
            found[token.row].append(token.id)
    for token in engine.drain():
        found[token.row].append(token.id)
    assert list(found.values()) == expected


def test_a_request_ends_where_it_says():
    """Catches blocks kept after an end token, or tokens behind it."""
    it = impl(0, vocab_size=4)
    whole = generate(it, [Request([1], Settings(max_tokens=12, seed=1))])[0].tokens
    for eos in range(4):
        engine = Engine(it, Pages(it, blocks=8, size=2))
        expected = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert served(engine, [Request([1], Settings(max_tokens=12, seed=1, eos=(eos,)))]) == [expected]
        assert engine.pages.blocks.free == 8


# ---- Bad input


def test_what_can_never_fit_is_refused_and_others_wait():
    """Catches a request that waits for ever, one refused though it fits exactly, a list of which half was taken."""
    it = impl(0)
    engine = Engine(it, Pages(it, blocks=3, size=4))
    fits, too_long = Request([1] * 6, Settings(max_tokens=7)), Request([1] * 6, Settings(max_tokens=8))
    with pytest.raises(
        SpecError, match=r"(?s)6 tokens of prompt and up to 8 more need 4 blocks of 4; the cache has 3.*in request 1"
    ):
        engine.submit_all([fits, too_long])
    assert len(engine) == 0 and engine.step() == []
    assert served(engine, [fits, fits, fits]) == [c.tokens for c in generate(it, [fits, fits, fits])]
    with pytest.raises(SpecError, match="token id 29"):
        engine.submit(Request([29]))
    assert len(engine) == 0 and engine.pages.blocks.free == 3


def test_pages_of_another_model_are_refused():
    """Catches latents of other weights read as one's own: equal shapes do not make them so."""
    one, other = impl(0), impl(0, seed=1)
    with pytest.raises(SpecError, match="another model's"):
        Engine(other, Pages(one, blocks=3, size=4))
    pages = Pages(one, blocks=3, size=4)
    running = Engine(one, pages)
    running.submit(Request([1], Settings(max_tokens=3)))
    running.step()
    with pytest.raises(SpecError, match="1 blocks are in use: another engine still runs"):
        Engine(one, pages)


@pytest.mark.parametrize("limits", [{"rows": 0}, {"tokens": 0}, {"tokens": 1.5}, {"rows": True}, {"reserve": "some"}])
def test_limits_that_let_nobody_run(limits):
    """Catches an engine that stands still."""
    with pytest.raises(SpecError, match=next(iter(limits))):
        Limits(**limits)


@pytest.mark.parametrize("rows", [0, -1, "8", 2.0])
def test_tiles_of_no_rows_are_refused(rows):
    """Catches an error in the first step instead, with requests in it."""
    with pytest.raises(SpecError, match="rows is"):
        Tiled(rows)
