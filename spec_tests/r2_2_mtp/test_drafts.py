"""R 2.2 "MTP in inference": the drafts are what the modules say, from a cache that forgets what fell."""

import numpy as np
import pytest

from refimpl.infer import Speculation, generate
from refimpl.infer.drafter import Drafter
from refimpl.layers import Dialect
from refimpl.spec_tests.cases.generation import CLOSE, PROMPTS, impl, requests


def spied(monkeypatch):
    """A list that fills with what every draft was made from: (tokens decided, drafts before, logits)."""
    said, propose = [], Drafter.propose

    def spy(self, rows, hidden, tokens, draft):
        def noting(b, logits, before):
            said.append((list(tokens[b]), list(before), logits))
            return draft(b, logits, before)

        return propose(self, rows, hidden, tokens, noting)

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
    for tokens, before, logits in said:
        text, depth = [*tokens, *before], len(before)
        whole = it.model(it.model.inputs([text + [0] * modules]), with_mtp=True)  # padded behind: nothing looks there
        at = len(text) - 2 - depth  # tokens t_0 .. t_m and `depth` drafts: entry m - 1
        np.testing.assert_allclose(logits, whole.mtp_logits[depth][0, at], **CLOSE)


def test_a_recycled_module_goes_on_from_its_own_output(monkeypatch):
    """Catches recycling on the main model's hidden, at the old position, or without the entry before: by hand, the single
    module on entries 0 .. m-1 and then m, which has the module's own last h and the first draft."""
    it, said = impl(1), spied(monkeypatch)
    generate(it, requests(PROMPTS[0], temperature=6.0, tokens=6), speculate=Speculation(3, recycle=True))
    model, deep = it.model, [s for s in said if s[1]]
    assert {len(s[1]) for s in deep} == {1, 2}
    for tokens, before, logits in deep:
        m = len(tokens) - 1
        h, ids = model(model.inputs([tokens[:m]])).hidden, [tokens[1:]]
        for n in range(len(before) + 1):
            at = model.inputs([list(range(m + n))])
            y, own, _ = model.mtp_module(1, np.array(ids), h, at, (at.positions, None, None), attend="expanded")
            if n < len(before):
                h, ids = np.concatenate([h, own[:, -1:]], axis=1), [[*ids[0], before[n]]]
        np.testing.assert_allclose(logits, y[0, -1], **CLOSE)
