"""Engines that show only tokens and log-probabilities: right ones and wrong ones, their replies, files of what they showed.

The engine is `Impl` in float32, one forward pass; the expectation is a float64 replay.
"""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint.held import Held, Part, Stored
from refimpl.cli import main
from refimpl.diff import Case
from refimpl.model import Impl
from refimpl.score import Shown, expected, measure
from refimpl.score.expectation import declared
from refimpl.score.files import read, write
from refimpl.score.replies import Words, generated, whole
from refimpl.score.shown import Again

from .test_refimpl_tap import TINY

BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def case():
    return Case.read(TINY)


@pytest.fixture(scope="module")
def e(case):
    return expected(case)


def logprobs(case, change=lambda name, w: w, precision="float32"):
    """Row, position, vocabulary; naively normalised."""
    weights = {n: change(n, np.asarray(w, np.float32)) for n, w in case.weights().items()}
    out = Impl(precision=precision).load(case.config, weights).forward(case.tokens)["logits"].astype(np.float64)
    return out - np.log(np.exp(out).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def right(case):
    return logprobs(case)


def top(x, k, also=()):
    """The k likeliest, and some more, as a dictionary."""
    return {int(i): float(x[i]) for i in {*np.argsort(-x)[:k].tolist(), *also}}


def places(x, k=10):
    return {(b, t): top(x[b, t], k) for b in range(x.shape[0]) for t in range(x.shape[1])}


def scored(case, e, x, k=10, **more):
    return measure(Shown(case.tokens, places(x, k), **more), e)


# ---- The measure


def test_a_right_engine_is_consistent(case, e, right):
    """Catches a limit below float32's own roundings, and an expectation of another position."""
    found = scored(case, e, right)
    assert found.verdict == "CONSISTENT" and len(found.settled) == 48 and not found.shift
    assert 0 < found.candidate.rms < found.allowed.rms < 1e-4


@pytest.mark.parametrize("k", [1, 2, 128])
def test_any_length_of_list_will_do(case, e, right, k):
    """Catches a measure that needs a full distribution, or more than one token."""
    assert scored(case, e, right, k).verdict == "CONSISTENT"


FAULTS = {
    "selection bias of a layer": lambda n, w: 0 * w if n.endswith(f"2.{BIAS}") else w,
    "keys and values exchanged": lambda n, w: w[::-1] if n.endswith("1.self_attn.kv_b_proj.weight") else w,
    "a norm's weight, by a thousandth": lambda n, w: (
        w * np.float32(1.001) if n.endswith("1.input_layernorm.weight") else w
    ),
    "an expert of a layer": lambda n, w: 0 * w if ".1.mlp.experts.3.down" in n else w,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_engine_is_inconsistent(case, e, fault):
    """Catches limits so wide that a mistake of the corpus's size passes."""
    found = scored(case, e, logprobs(case, FAULTS[fault]))
    assert found.verdict == "INCONSISTENT" and found.breaks and not found.shift and not found.tempered


def test_the_first_break_is_where_the_engine_leaves(case, e, right):
    """Catches breaks of another place, and those of all places once one is off."""
    x = right.copy()
    x[1, 7, :] = x[1, 6, :]
    found = scored(case, e, x)
    assert found.breaks == ((1, 7),) and found.verdict == "INCONSISTENT"


def test_a_temperature_is_named(case, e, right):
    """Catches a scale of the wrong sign, and a temperature taken for wrong arithmetic."""
    x = right / 1.25
    found = scored(case, e, x - np.log(np.exp(x).sum(-1, keepdims=True)), 40)
    assert found.tempered and "a temperature of 1.25" in found.reasons[0]


def test_a_small_scale_is_seen_over_all_places(case, e, right):
    """Catches a scale that stays within each place's limit: roundings have no direction."""
    x = right * (1 + 1e-6)
    found = scored(case, e, x - np.log(np.exp(x).sum(-1, keepdims=True)), 128)
    assert found.verdict == "INCONSISTENT" and not found.breaks and "scaled by 1" in found.reasons[0]


def test_a_list_without_its_likeliest_tokens_is_seen(case, e, right):
    """Catches an engine that drops tokens from its vocabulary, and the case's own token taken for the end of the list."""
    x, rows = right, case.tokens
    lists = places(x)
    for (b, t), entry in lists.items():
        if t + 1 < len(rows[b]):
            entry[rows[b][t + 1]] = float(x[b, t, rows[b][t + 1]])  # as an echo lists it, however unlikely
    assert measure(Shown(rows, lists), e).verdict == "CONSISTENT"
    second = int(np.argsort(-x[0, 5])[1])
    del lists[0, 5][second]
    found = measure(Shown(rows, lists), e)
    assert found.hidden == ((0, 5),) and found.verdict == "INCONSISTENT" and not found.breaks
    assert measure(Shown(rows, lists, unnamed=frozenset({second})), e).verdict == "CONSISTENT"


def test_an_echo_that_is_one_position_early_is_read_so(case, e, right):
    """Catches llama-cpp-python's echo taken for a wrong model, and a wrong model taken for such an echo."""
    early = {(b, t - 1): entry for (b, t), entry in places(right).items() if t}
    found = measure(Shown(case.tokens, early), e)
    assert found.shift == 1 and found.verdict == "CONSISTENT" and len(found.settled) == 46


def test_tokens_alone_decide_nothing_unless_they_are_wrong(case, e, right):
    """Catches "consistent" from tokens alone, and a token within roundings of the likeliest that is blamed."""
    chosen = {(b, t): int(right[b, t].argmax()) for b in range(2) for t in range(24)}
    assert measure(Shown(case.tokens, {}, chosen), e).verdict == "INCONCLUSIVE"
    other = chosen | {(1, 3): int(np.argsort(-right[1, 3])[1])}
    found = measure(Shown(case.tokens, {}, other), e)
    assert found.tokens == ((1, 3),) and found.verdict == "INCONSISTENT"


def test_nothing_shown_is_inconclusive(case, e):
    """Catches a verdict on nothing."""
    assert measure(Shown(case.tokens), e).exit_code == 2


def test_other_company_that_moves_the_numbers_is_seen(case, e, right):
    """Catches a cache that gives another sequence's keys, and roundings of another batch that are blamed."""
    lists = places(right)
    near = Again("in a batch", {p: {i: x + 1e-7 for i, x in entry.items()} for p, entry in lists.items()})
    assert scored(case, e, right, again=(near,)).verdict == "CONSISTENT"
    far = Again("after a prefix", {(0, 23): {i: x - 1e-3 for i, x in lists[0, 23].items()}})
    found = scored(case, e, right, again=(near, far))
    assert [a.ok for a in found.again] == [True, False] and found.verdict == "INCONSISTENT"


def test_the_declared_precision_is_the_limit(case, e, right):
    """Catches bfloat16 held to float32, and a cache in float16 that nobody declared."""
    bf16 = logprobs(case, precision="bf16")
    assert scored(case, e, bf16).verdict == "INCONSISTENT"
    wide = expected(case, "bfloat16")
    assert scored(case, wide, bf16).verdict == "CONSISTENT" and scored(case, wide, right).verdict == "CONSISTENT"
    assert wide.doubtful.any() and not e.doubtful.any()
    cache = expected(case, "float32,mla.c_kv=float16")
    assert 10 * e.unit * 20 < np.abs(cache.twins[1] - cache.exact).max() < np.abs(wide.twins[1] - wide.exact).max()


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_further_draws_of_the_roundings_are_consistent(case, precision, monkeypatch):
    """Catches a limit that admissible roundings exceed: four scales alone are too few to say how far a fifth may be."""
    for module in ("refimpl.diff.replay", "refimpl.score.expectation"):
        monkeypatch.setattr(f"{module}.TWINS", 16)
    e = expected(case, precision)
    four = replace(e, twins=e.twins[:4])
    assert {scored(case, four, twin).verdict for twin in e.twins[4:]} == {"CONSISTENT"}


def test_weights_are_held_as_the_precision_holds_them(case):
    """Catches float32 weights in the expectation of an engine that rounded them to bfloat16."""
    finer = {n: np.asarray(w, np.float32) * np.float32(1.001) for n, w in case.weights().items()}
    parts = {n: Part(w.shape, (Stored("F32"),), lambda w=w: w) for n, w in finer.items()}
    there = expected(replace(case, checkpoint=Held("arrays", "here", parts)), "bfloat16")
    rounded = {n: w if n.endswith(BIAS) else w.astype(ml_dtypes.bfloat16).astype(np.float64) for n, w in finer.items()}
    z = Impl(precision="float64").load(case.config, rounded).forward(case.tokens)["logits"]
    np.testing.assert_allclose(
        there.exact, z - np.log(np.exp(z).sum(-1, keepdims=True)), atol=1e-10
    )  # float64, other order


def test_places_in_doubt_decide_nothing(case, e, right):
    """Catches a token whose experts rounding may exchange that is blamed."""
    x = right.copy()
    x[0, 3] = x[0, 4]
    doubtful = np.zeros((2, 24), bool)
    doubtful[0, 3] = True
    held = type(e)(**{**vars(e), "doubtful": doubtful})
    found = scored(case, held, x)
    assert found.verdict == "CONSISTENT" and len(found.settled) == 47 and found.doubtful[0].rms > 0.1


def test_numbers_that_are_printed_short_are_held_to_their_decimals(case, e, right):
    """Catches three decimals called wrong arithmetic, and numbers that happen to be round opening the limit."""
    assert scored(case, e, np.round(right, 3)).verdict == "CONSISTENT"
    assert scored(case, e, np.round(right, 3) + 0.002).verdict == "INCONSISTENT"


def test_a_token_beyond_the_vocabulary_is_another_model(case, e, right):
    """Catches an index error, or the largest id of a padded vocabulary compared with nothing."""
    lists = places(right)
    lists[0, 0][128] = -9.0
    with pytest.raises(SpecError, match="token id 128 is shown; the case's vocabulary is 128"):
        measure(Shown(case.tokens, lists), e)


@pytest.mark.parametrize("text", ["float33", "float64", "float32,mla.c_kv", "float32,=float16", ""])
def test_an_unknown_precision_is_refused(text):
    """Catches a misspelt storage taken for float32."""
    with pytest.raises(SpecError, match="precision"):
        declared(text)


# ---- Replies


def test_replies_of_every_shape():
    """Catches ids, tokens and texts confused, and an entry given to the position it is of instead of the one before."""
    words = Words({"a": 0, "b": 1})
    vllm = {"choices": [{"index": 0, "prompt_logprobs": [None, {"1": {"logprob": -2.0}, "0": {"logprob": -0.5}}]}]}
    assert whole(vllm, 0, [0, 1], words) == {0: {1: -2.0, 0: -0.5}}
    echo = {"choices": [{"logprobs": {"top_logprobs": [None, {"b": -2.0, "?": -3.0}, {"token_id:0": -1.0}]}}]}
    assert whole(echo, 0, [0, 1], words) == {0: {1: -2.0}, 1: {0: -1.0}}
    listed = [{"id": 1, "token": "a", "logprob": -2.0}, {"token": "a", "logprob": -1.0}]
    assert generated({"choices": [{"text": "a", "logprobs": {"content": [{"top_logprobs": listed}]}}]}, words) == (
        {1: -2.0, 0: -1.0},
        0,
    )
    assert generated({"choices": [{"text": "b", "logprobs": {"token_logprobs": [-0.5]}}]}, words) == ({1: -0.5}, 1)
    assert generated({"choices": [{"text": "?"}]}, words) == ({}, None)
    rows = [{"index": 1, "prompt_logprobs": [None, {"0": -1.0}]}, {"index": 0, "prompt_logprobs": [None, {"1": -2.0}]}]
    assert whole({"choices": rows}, 1, [0, 1], words) == {0: {0: -1.0}}


@pytest.mark.parametrize(
    "reply",
    [
        None,
        {},
        {"choices": []},
        {"choices": [3]},
        {"choices": [{"prompt_logprobs": 1}]},
        {"choices": [{"prompt_logprobs": [None, {"x": -1}]}]},
        {"choices": [{"prompt_logprobs": [None, {"9" * 5000: -1}]}]},
        {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": 2.0}}]}]},
        {"choices": [{"prompt_logprobs": [None, {"1": None}]}]},
        {"choices": [{"prompt_logprobs": [None, {"1": float("nan")}]}]},
        {"choices": [{"logprobs": {"top_logprobs": [None]}}]},
        {"choices": [{"logprobs": {"top_logprobs": [None, 5]}}]},
    ],
)
def test_a_reply_that_is_none_is_refused(reply):
    """Catches a trace of Python for what a server may send, and NaN or a positive log-probability that is compared."""
    with pytest.raises(SpecError):
        whole(reply, 0, [0, 1], Words())


def test_a_negative_id_is_refused():
    """Catches an id that counts from the end of the vocabulary."""
    with pytest.raises(SpecError, match="token id -1"):
        generated({"choices": [{"logprobs": {"content": [{"id": -1, "logprob": -1.0}]}}]}, Words())


# ---- Files


def test_what_was_shown_comes_back_from_its_file(case, right, tmp_path):
    """Catches a position or a number lost on the way."""
    shown = Shown(case.tokens, places(right), {(0, 1): 3}, source="a server", unnamed=frozenset({7}))
    write(shown, tmp_path / "s.json")
    assert read(tmp_path / "s.json", case.tokens) == shown


def test_the_command_scores_a_file(case, right, tmp_path, capsys):
    """Catches a verdict without its exit code, and a JSON report that is none."""
    write(Shown(case.tokens, places(right)), tmp_path / "s.json")
    assert main(["score", str(TINY), str(tmp_path / "s.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "CONSISTENT" and said["places"] == {"shown": 48, "settled": 48, "all": 48}
    write(Shown(case.tokens, places(np.roll(right, 1, axis=-1))), tmp_path / "s.json")
    assert main(["score", str(TINY), str(tmp_path / "s.json")]) == 1
    assert "\nfirst break     row 0, position 0; 48 of 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"unnamed": ["x"]},
        {"unnamed": 3},
        {"tokens": [[1]]},
        {"logprobs": 3},
        {"logprobs": [[], 5]},
        {"logprobs": [[{"1": 0.5}], []]},
        {"logprobs": [[7], []]},
        {"logprobs": [[None] * 25, []]},
    ],
)
def test_a_file_of_another_kind_is_bad_input(case, tmp_path, change):
    """Catches a file of other tokens that is scored, and a trace of Python for one that is broken."""
    good = {"schema": "refimpl-shown/1", "tokens": case.tokens, "logprobs": [[], []]}
    (tmp_path / "s.json").write_text(json.dumps(good | change))
    assert main(["score", str(TINY), str(tmp_path / "s.json")]) == 3
