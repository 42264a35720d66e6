"""R 2.2 "MTP in inference": the drafts are what the modules say, from a cache that forgets what fell."""

import ml_dtypes
import numpy as np
import pytest

from refimpl import Impl
from refimpl.infer import Settings, Speculation, generate
from refimpl.infer.drafter import Drafter
from refimpl.layers import Dialect
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl, requests


def spied(monkeypatch):
    """A list that fills with what every draft was made from and the draft: (tokens decided, drafts before, logits, draft)."""
    said, propose = [], Drafter.propose

    def spy(self, rows, hidden, tokens, draft, most):
        def noting(b, logits, before):
            made = draft(b, logits, before)
            said.append((list(tokens[b]), list(before), logits, made))
            return made

        return propose(self, rows, hidden, tokens, noting, most)

    monkeypatch.setattr(Drafter, "propose", spy)
    return said


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("recycle", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_what_the_modules_say_of_the_whole_text(monkeypatch, hidden, recycle, modules):
    """Catches a hidden handed over from the other side of a norm, the token of the wrong depth, a module's cache with an entry
    made from a fallen draft, a position off by one. The oracle runs model and modules on the whole text without any cache."""
    dialect = Dialect(mtp_hidden=hidden, mtp_recycle=recycle)
    it, said = impl(modules, dialect=dialect), spied(monkeypatch)
    generate(it, requests(*PROMPTS, temperature=6.0), speculate=Speculation(modules))
    assert len(said) > 12
    for tokens, before, logits, _ in said:
        text, depth = [*tokens, *before], len(before)
        whole = it.model(it.model.inputs([text + [0] * modules]), with_mtp=True)  # padded behind: nothing looks there
        at = len(text) - 2 - depth  # tokens t_0 .. t_m and `depth` drafts: entry m - 1
        np.testing.assert_allclose(logits, whole.mtp_logits[depth][0, at], **CLOSE)


def test_a_recycled_module_goes_on_from_its_own_output(monkeypatch):
    """Catches recycling on the main model's hidden, at the old position, or without the entry before: by hand, the single
    module on entries 0 .. m-1 and then m, which has the module's own last h and the first draft."""
    it, said = impl(1), spied(monkeypatch)
    generate(it, requests(*PROMPTS, temperature=6.0, tokens=6), speculate=Speculation(3, recycle=True))
    model, deep = it.model, [s for s in said if s[1]]
    assert {len(s[1]) for s in deep} == {1, 2}
    for tokens, before, logits, _ in deep:
        m = len(tokens) - 1
        h, ids = model(model.inputs([tokens[:m]])).hidden, [tokens[1:]]
        for n in range(len(before) + 1):
            at = model.inputs([list(range(m + n))])
            y, own, _ = model.mtp_module(1, np.array(ids), h, at, (at.positions, None, None), attend="expanded")
            if n < len(before):
                h, ids = np.concatenate([h, own[:, -1:]], axis=1), [[*ids[0], before[n]]]
        np.testing.assert_allclose(logits, y[0, -1], **CLOSE)


@pytest.mark.parametrize("greedy", [False, True])
def test_drafts_come_from_the_request_s_own_distribution(monkeypatch, greedy):
    """Catches a q without the request's temperature, or whose repetition penalty forgets the drafts before (what comes out
    would still be right: only the acceptance suffers)."""
    it, said, how = impl(2), spied(monkeypatch), {"temperature": 2.0, "top_k": 5, "repetition_penalty": 8.0}
    generate(it, requests(PROMPTS[2], tokens=12, **how), speculate=Speculation(2, greedy=greedy))
    assert len(said) > 6
    for tokens, before, logits, made in said[:-4]:  # the last have no room, and cost no draw
        q = Settings(**how).distribution(logits, tokens + before)
        np.testing.assert_array_equal(made.q, np.eye(len(q))[q.argmax()] if greedy else q)


def test_drafts_are_made_under_the_precision_plan(monkeypatch):
    """Catches modules that run in plain float32 beside a model in bfloat16: every logit is a bfloat16 number."""
    model, said = impl(1), spied(monkeypatch)
    weights = {n: w for n, w in model.model.named_weights() if hasattr(w, "dtype")}
    it = Impl(precision="bf16").load(model.model.config, weights)
    generate(it, requests(PROMPTS[0], tokens=4), speculate=Speculation(2, recycle=True))
    for _, _, logits, _ in said:
        np.testing.assert_array_equal(logits, logits.astype(ml_dtypes.bfloat16).astype(logits.dtype))


def test_no_drafts_are_made_that_nobody_has_room_for(monkeypatch):
    """Ten tokens at most: after the first there is room for 8 drafts. Catches a depth that is run to its end, here a billion."""
    it, said = impl(1), spied(monkeypatch)
    plain = generate(it, requests(*PROMPTS, temperature=0, tokens=10))
    found = generate(
        it, requests(*PROMPTS, temperature=0, tokens=10), speculate=Speculation(10**9, recycle=True, greedy=True)
    )
    assert [f.tokens for f in found] == [f.tokens for f in plain]
    assert max(len(before) for _, before, _, _ in said) + 1 == 8
