"""R 3.4: generation from the latent cache. Each request gets what it asked for, whatever stands beside it; bad input changes
nothing."""

import itertools

import numpy as np
import pytest

from refimpl import Impl, SpecError
from refimpl.infer import Request, Settings, Speculation, generate, stream
from refimpl.infer.text import TextStream
from refimpl.layers import Dialect
from refimpl.model import Cache
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl, requests

WORDS = ("a", "b ", "c", "STOP", "e", "ST", "OP", "\n", "é")


def spell(ids):
    """Token ids of a small vocabulary as text."""
    return "".join(WORDS[i % len(WORDS)] for i in ids)


def without_cache(it, prompt, n, choose):
    """n tokens, each chosen from the logits of a run of everything so far."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(choose(it.forward([ids])["logits"][0, -1]))
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_runs_without_a_cache():
    """Catches a stale cache, positions that count padding, a first token from a padded place; rows of four lengths."""
    it = impl(0)
    expected = [without_cache(it, p, 10, lambda z: int(np.argmax(z))) for p in PROMPTS]
    assert [c.tokens for c in generate(it, requests(*PROMPTS, tokens=10, temperature=0))] == expected


def test_a_prompt_makes_logits_behind_its_last_token_only(monkeypatch):
    """Catches logits of a whole prompt, (S, V) numbers of which one row is read, a row of another place: prompts of four lengths,
    each against a run that makes all its logits. float32 products of other shapes, hence 1e-5.
    """
    it, seen, advance = impl(0), [], Impl.advance

    def watched(self, tokens, cache, **how):
        out = advance(self, tokens, cache, **how)
        seen.append(out.logits)
        return out

    monkeypatch.setattr(Impl, "advance", watched)
    generate(it, requests(*PROMPTS, tokens=2, temperature=0))
    assert seen[0].shape[:2] == (len(PROMPTS), 1)
    for found, prompt in zip(seen[0], PROMPTS, strict=True):
        np.testing.assert_allclose(found[0], it.forward([list(prompt)])["logits"][0, -1], atol=1e-5)


def test_every_request_has_its_own_settings_and_draws():
    """Catches settings or generators shared in a batch: each row is what it is alone, and the same again with the same seed."""
    it = impl(0)
    kinds = [{"temperature": 0}, {"temperature": 2.0, "seed": 4}, {"top_k": 3, "seed": 4}, {"repetition_penalty": 3.0}]
    rows = [Request(p, Settings(max_tokens=5 + i, **k)) for i, (p, k) in enumerate(zip(PROMPTS, kinds, strict=True))]
    together = generate(it, rows)
    assert [c.tokens for c in together] == [generate(it, [r])[0].tokens for r in rows]
    assert [len(c.tokens) for c in together] == [5, 6, 7, 8]
    other = generate(it, [Request(PROMPTS[1], Settings(temperature=2.0, max_tokens=6, seed=5))])
    assert other[0].tokens != together[1].tokens


def test_sampled_tokens_follow_their_distribution():
    """Catches logits of the wrong position: 4000 first and second tokens against probabilities of runs without cache, by
    chi-square (8 degrees of freedom, exceeded with probability 1e-4; the seeds are fixed)."""
    it, n = impl(0, vocab_size=3), 4000
    rows = [Request([1, 2], Settings(max_tokens=2, seed=i)) for i in range(n)]
    counts = np.zeros((3, 3))
    for c in generate(it, rows):
        counts[tuple(c.tokens)] += 1
    first = np.exp(it.forward([[1, 2]])["logits"][0, -1])
    expected = np.zeros((3, 3))
    for a in range(3):
        second = np.exp(it.forward([[1, 2, a]])["logits"][0, -1])
        expected[a] = n * first[a] / first.sum() * second / second.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 31.8


def test_log_probabilities_are_the_model_s_own():
    """Catches log-probabilities of the distribution that was cut and cooled instead, or of the token before."""
    it = impl(0)
    settings = Settings(temperature=0.5, top_k=2, repetition_penalty=2.0, max_tokens=6, logprobs=3)
    for speculate, it in ((None, impl(0)), (Speculation(1), impl(1))):
        tokens = list(stream(it, [Request(PROMPTS[0], settings)], speculate=speculate))
        ids = PROMPTS[0] + [t.id for t in tokens]
        z = it.forward([ids])["logits"][0]
        for at, token in enumerate(tokens, len(PROMPTS[0]) - 1):
            p = np.exp(z[at]) / np.exp(z[at]).sum()
            np.testing.assert_allclose(token.logprob, np.log(p[token.id]), **CLOSE)
            assert [i for i, _ in token.top] == sorted(range(len(p)), key=lambda i: -p[i])[:3]
            np.testing.assert_allclose([s for _, s in token.top], np.sort(np.log(p))[::-1][:3], **CLOSE)


def test_a_stream_comes_a_step_at_a_time(monkeypatch):
    """Catches a stream that computes everything before it gives anything."""
    it, runs = impl(0), []
    advance = Impl.advance
    monkeypatch.setattr(Impl, "advance", lambda self, *a, **k: runs.append(0) or advance(self, *a, **k))
    tokens = stream(it, requests([1, 2], [3], tokens=3))
    assert runs == []
    seen = [(t.row, len(runs)) for t in tokens]
    assert seen == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]


# ---- Where a text ends


@pytest.mark.parametrize("speculate", [None, Speculation(2)])
def test_the_end_token_ends_a_row(speculate):
    """Catches rows that go on, tokens of the same step behind the end, text of the end token itself; greedy, so that both ways of
    decoding have the same text to cut."""
    it = impl(2, vocab_size=4, seed=2)
    whole = generate(it, requests([1], [2], tokens=12, temperature=0))
    for eos in range(4):
        rows = [Request([p], Settings(temperature=0, max_tokens=12, eos=(eos,)), decode=spell) for p in (1, 2)]
        for c, w in zip(generate(it, rows, speculate=speculate), whole, strict=True):
            ends = eos in w.tokens
            expected = w.tokens[: w.tokens.index(eos) + 1] if ends else w.tokens
            assert (c.tokens, c.finish) == (expected, "eos" if ends else "length")
            assert c.text == spell(expected[:-1] if ends else expected)


def test_stop_texts_are_found_across_tokens_and_left_out():
    """Catches a stop text missed because two tokens make it, given out before it is known, or cut too late; against str.find
    on all words of up to five tokens."""
    for ids in itertools.product((0, 3, 5, 6, 8), repeat=4):
        for stop in (("STOP",), ("TO", "OP"), ("aé", "éST"), ("P",)):
            s, out = TextStream(spell, stop), []
            for i in ids:
                out.append(s.push(i))
                if s.stopped:
                    break
            else:
                out.append(s.finish())
            text = spell(ids)
            ends = [(text.find(x)) for x in stop if x in text]
            assert s.stopped == bool(ends)
            assert "".join(out) == (text[: min(ends)] if ends else text)


def test_text_is_given_out_as_soon_as_it_is_certain():
    """Catches a stream that holds everything back when there is a stop text."""
    s = TextStream(spell, ("STOP",))
    assert [s.push(i) for i in (0, 5, 0, 5, 6)] == ["a", "", "STa", "", ""]
    assert s.stopped


def test_a_row_stops_at_its_text():
    """Catches the stop text in the result, and tokens after it."""
    it = impl(0, vocab_size=9)
    whole = generate(it, [Request([1], Settings(max_tokens=30, seed=3), decode=spell)])[0]
    stop = spell(whole.tokens)[6:9]
    at = spell(whole.tokens).find(stop)
    cut = generate(it, [Request([1], Settings(max_tokens=30, seed=3, stop=("never", stop)), decode=spell)])[0]
    assert cut.text == spell(whole.tokens)[:at] and cut.finish == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < 12
    assert whole.text == spell(whole.tokens)


def test_an_unlimited_request_fills_the_window():
    """Catches a position beyond the table, or one left over."""
    it = impl(0, max_position_embeddings=10)
    done = generate(it, [Request([1, 2, 3], Settings()), Request([1] * 9, Settings())])
    assert [(len(c.tokens), c.finish) for c in done] == [(7, "length"), (1, "length")]


# ---- Bad input


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([]), "no tokens"),
        (Request([1, 29]), r"token id 29 at 1: outside 0\.\.28"),
        (Request([-1]), "token id -1 at 0"),
        (Request([1.5]), "token id 1.5 at 0"),
        (Request([1] * 512), r"512 tokens; the window \(max_position_embeddings=512\)"),
        (Request([1] * 500, Settings(max_tokens=13)), "max_tokens is 13; after 500 tokens .* has room for 12"),
        (Request([1], Settings(top_k=30)), "top_k is 30; the vocabulary has 29"),
        (Request([1], Settings(logprobs=30)), "logprobs is 30"),
        (Request([1], Settings(eos=(29,))), r"eos \[29\] is outside"),
        (Request([1], Settings(stop=("x",))), "stop texts need a tokenizer"),
    ],
)
def test_requests_that_the_model_cannot_take(request_, says, monkeypatch):
    """Catches a bad request found after others were run: the call itself refuses, names the request, and nothing ran."""
    it = impl(0)
    monkeypatch.setattr(Impl, "advance", None)
    with pytest.raises(SpecError, match=f"(?s){says}.*in request 1"):
        stream(it, [Request([1]), request_])
    with pytest.raises(SpecError, match="no requests"):
        stream(it, [])


def test_an_error_leaves_the_cache_as_it_was():
    """Catches half a step: after a refused token the cache is the same object, and the next step gives what it would have
    given."""
    it, state, fresh = impl(0), {}, {}
    for s in (state, fresh):
        it.forward([[1, 2, 3]], cache=s)
    before = state["kv"]
    for tokens, how in (([[29]], {}), ([[1], [2]], {}), ([[1]], {"valid": [[7]]})):
        with pytest.raises(SpecError):
            it.advance(tokens, state, **how)
        assert state["kv"] is before
    np.testing.assert_array_equal(it.step([4], state)["logits"], it.step([4], fresh)["logits"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "the cache has 3 layers, the model 2: it is another model's"),
        ({"kv_lora_rank": 8}, r"the cache of layer 0 holds \(8, 8\) numbers a token, the model \(9, 8\)"),
        ({"qk_rope_head_dim": 6}, r"holds \(9, 6\) numbers"),
    ],
)
def test_a_cache_of_another_model_is_refused(changes, says):
    """Catches a shape error of NumPy in layer 0, or a cache of more layers silently cut."""
    state = {}
    impl(0, **changes).forward([[1, 2]], cache=state)
    for go_on in (lambda: impl(0).step([1], state), lambda: impl(0).advance([[1]], state)):
        with pytest.raises(SpecError, match=says):
            go_on()


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_a_cache_of_a_model_of_equal_shape_is_refused(kv_format):
    """Catches latents of other weights, or of another dialect, read as one's own; also after a roll-back. The same weights loaded
    again, in another precision too, are the same model."""
    models = [impl(0, seed=seed).model for seed in (0, 1)]
    first, other = ({n: w for n, w in m.named_weights() if hasattr(w, "dtype")} for m in models)
    config = models[0].config
    near = first | {"model.norm.weight": first["model.norm.weight"] * 1.5}
    state = {}
    Impl(kv_format=kv_format).load(config, first).forward([[1, 2, 3]], cache=state)
    state["kv"] = state["kv"].kept(np.array([0]), np.array([2]))
    for c, weights in (
        (config, other),
        (config, near),
        (config.replace(dialect=Dialect(latent_norm_eps=None)), first),
    ):
        stranger = Impl(kv_format=kv_format).load(c, weights)
        for go_on in (stranger.step, stranger.forward, stranger.advance):
            with pytest.raises(SpecError, match="another model's, of the same shape"):
                go_on([[1]], cache=state)
    assert len(state["kv"]) == 2
    for precision in ("float32", "float64"):
        again = Impl(precision=precision, kv_format=kv_format).load(config, {n: w.copy() for n, w in first.items()})
        again.step([1], dict(state))


def test_generation_computes_under_the_precision_plan():
    """Catches `advance` in plain float32 where `forward` rounds: the same bits, with and without a cache in bytes."""
    model = impl(0)
    weights = {n: w for n, w in model.model.named_weights() if hasattr(w, "dtype")}
    for kv_format in (None, "fp8"):
        it = Impl(precision="bf16", kv_format=kv_format).load(model.model.config, weights)
        ours, theirs = {}, {}
        for tokens in ([[1, 2, 3]], [[4]]):
            logits = it.advance(tokens, ours).logits
            np.testing.assert_array_equal(logits, it.forward(tokens, cache=theirs)["logits"])
        assert np.abs(logits - model.forward([[1, 2, 3, 4]])["logits"][:, -1:]).max() > 1e-4


def test_what_a_cache_keeps():
    """Catches tokens of a neighbour, order lost, padding counted, a roll-back to more than there is."""
    layer = np.arange(24.0).reshape(3, 4, 2)
    valid = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
    cache = Cache(
        ((layer, layer + 0.5),), np.arange(12).reshape(3, 4), valid, documents=np.arange(12).reshape(3, 4) + 50
    )
    kept = cache.kept(np.array([2, 0]), np.array([1, 3]))
    np.testing.assert_array_equal(kept.valid, [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(kept.positions[kept.valid == 1], [9, 0, 1, 3])
    np.testing.assert_array_equal(kept.documents, kept.positions + 50)
    np.testing.assert_array_equal(kept.layers[0][0], layer.reshape(12, 2)[kept.positions])
    np.testing.assert_array_equal(kept.layers[0][1], kept.layers[0][0] + 0.5)
    assert cache.kept(np.array([1]), np.array([4])).valid is None
    plain = Cache(((layer, layer),), np.arange(12).reshape(3, 4))
    assert plain.kept(np.arange(3), np.full(3, 4)) is plain
    assert plain.kept(np.arange(3), np.full(3, 2)).positions.tolist() == [[0, 1], [4, 5], [8, 9]]
    with pytest.raises(SpecError, match=r"\[2\] tokens are to be kept of \[1\]"):
        cache.kept(np.array([2]), np.array([2]))
