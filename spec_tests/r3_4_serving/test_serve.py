"""The server without its network: fields, and that no request harms another."""

import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import SpecError
from refimpl.cli import main
from refimpl.infer import Settings
from refimpl.infer.server import Bounds, Refusal
from refimpl.infer.server.asgi import Door
from refimpl.infer.server.asked import NEUTRAL, chat, completion, read_json
from refimpl.spec_tests.cases.serving import service, small_impl


class Letters:
    """A tokenizer of 29 letters; conversations are their contents with a 1 before each."""

    def encode(self, text):
        return [ord(c) % 29 for c in text]

    def chat(self, messages):
        if messages[0]["role"] == "refused":
            raise SpecError("the chat template failed")
        return [t for m in messages for t in (1, *self.encode(m["content"]))]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    piece = decode


@pytest.fixture(scope="module")
def it():
    return small_impl()


@pytest.fixture
def served(it):
    return service(it, tokenizer=Letters(), eos=(5,), concurrency=8, tokens=40)


def asked(served, read=completion, **fields):
    base = {"model": "ours"} | ({"prompt": [1, 2, 3]} if read is completion else {})
    return read(served, json.dumps(base | fields).encode())


def test_fields_reach_the_sampler(served):
    """Catches a field that is read and forgotten, OpenAI's defaults mistaken for `generate`'s, draws that choices share."""
    a = asked(served, prompt=[[1, 2], [3]], n=2, seed=7, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, max_tokens=9)
    own = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "max_tokens": 9, "eos": (5,)}
    assert [(c.prompt, c.settings) for c in a.choices] == [
        (p, Settings(seed=7 + i, **own)) for i, p in enumerate([(1, 2), (1, 2), (3,), (3,)])
    ]
    assert [a.prompt(i).ids for i in range(4)] == [(1, 2), (1, 2), (3,), (3,)]
    plain = asked(served, logprobs=None).choices[0].settings
    assert plain == Settings(temperature=1.0, max_tokens=16, eos=(5,))
    ends = (
        asked(served, stop_token_ids=[9], ignore_eos=True, top_k=-1, stop="x", repetition_penalty=2).choices[0].settings
    )
    assert ends == Settings(max_tokens=16, eos=(9,), stop=("x",), repetition_penalty=2)
    assert (asked(served, echo=True, logprobs=2).scored, asked(served, logprobs=2).scored) == (2, None)
    assert asked(served, echo=True, logprobs=2, prompt_logprobs=3).scored == 3
    said = [{"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
    talk = asked(served, chat, messages=said, logprobs=True, top_logprobs=3, max_completion_tokens=4)
    assert talk.choices[0].prompt == (1, 10, 11, 1, 12)
    assert (talk.choices[0].settings.logprobs, talk.choices[0].settings.max_tokens) == (3, 4)
    assert asked(served, chat, messages=said).choices[0].settings.max_tokens == 40  # all that the bounds leave
    for name, values in NEUTRAL.items():
        for value in values:
            assert asked(served, **{name: value}) == asked(served), name


BAD = [
    ({"prompt": None}, "provide a prompt", "prompt"),
    ({"prompt": []}, "prompt: expected", "prompt"),
    ({"prompt": [1, "a"]}, "prompt 0: expected", "prompt"),
    ({"prompt": [[1], "\ud800"]}, "lone surrogate", None),
    ({"prompt": [1, True]}, "prompt 0: expected", "prompt"),
    ({"temperature": -1}, "temperature is -1", "temperature"),
    ({"temperature": "hot"}, "temperature is 'hot'", "temperature"),
    ({"temperature": float("nan")}, "temperature is nan", "temperature"),
    ({"temperature": 10**400}, "expected a finite number", "temperature"),
    ({"top_p": 0}, "top_p is 0", "top_p"),
    ({"min_p": 2}, "min_p is 2", "min_p"),
    ({"top_k": -2}, "top_k is -2", "top_k"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300", "repetition_penalty"),
    ({"seed": -1}, "seed is -1", "seed"),
    ({"n": 0}, "n is 0", "n"),
    ({"n": 9}, "9 choices; at most 8", "n"),
    ({"prompt": [[1]] * 5, "n": 2}, "10 choices", "n"),
    ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
    ({"max_tokens": 41}, "from 1 to 40", "max_tokens"),
    ({"logprobs": True}, "logprobs is True", "logprobs"),
    ({"logprobs": 21}, "from 0 to 20", "logprobs"),
    ({"stop": [""]}, "stop is", "stop"),
    ({"stop": ["a"] * 17}, "at most 16", "stop"),
    ({"stop": "a" * 257}, "at most 256", "stop"),
    ({"stop_token_ids": 3}, "stop_token_ids", "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "eos is", None),
    ({"stream": 1}, "true or false", "stream"),
    ({"stream": True, "prompt_logprobs": 1}, "do not come in a stream", "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "needs stream", "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options"),
    ({"frequency_penalty": 0.5}, "not supported", "frequency_penalty"),
    ({"frequency_penalty": False}, "not supported", "frequency_penalty"),
    ({"logit_bias": {"1": 2}}, "not supported", "logit_bias"),
    ({"topk": 3}, "unrecognized request argument: topk", "topk"),
    ({"messages": []}, "unrecognized request argument: messages", "messages"),
    ({"model": 3}, "provide a model", "model"),
    ({"user": 3}, "user", "user"),
]
BAD_CHAT = [
    ({}, "provide messages", "messages"),
    ({"messages": []}, "provide messages", "messages"),
    ({"messages": ["hi"]}, r"messages\[0\]: expected an object", "messages"),
    ({"messages": [{"role": "user"}]}, "content must be", "messages"),
    ({"messages": [{"content": "a"}]}, "role must be", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of type text", "messages"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls not supported", "messages"),
    ({"messages": [{"role": "refused", "content": "a"}]}, "the chat template failed", "messages"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "lone surrogate", None),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "needs logprobs", "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "not supported", "tools"),
    (
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 1},
        "the old name",
        "max_tokens",
    ),
]


@pytest.mark.parametrize(
    ("read", "fields", "says", "param"),
    [(completion, *b) for b in BAD] + [(chat, *b) for b in BAD_CHAT],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_bad_fields_are_refused_by_name(served, read, fields, says, param):
    """Catches a field taken for another, one that is ignored in silence, a traceback instead of a refusal."""
    with pytest.raises(Refusal, match=says) as caught:
        asked(served, read, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}", b"null"])
def test_bodies_that_are_no_object(body):
    """Catches what json raises besides its own error: bad UTF-8, depth, numbers of thousands of digits."""
    with pytest.raises(Refusal, match="JSON"):
        read_json(body)


def test_another_model_and_no_tokenizer(it, served):
    """Catches 400 for what is 404, and a text without a tokenizer that reaches the engine."""
    with pytest.raises(Refusal, match="'theirs' does not exist") as caught:
        asked(served, model="theirs")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    bare = service(it)
    for read, fields in ((completion, {"prompt": "a"}), (chat, {"messages": [{"role": "user", "content": "a"}]})):
        with pytest.raises(Refusal, match=r"no tokenizer\.json"):
            asked(bare, read, **fields)
    with pytest.raises(SpecError, match="tokens is 0"):
        Bounds(tokens=0)


def test_the_door_lets_in_as_many_as_leave():
    """Catches a place that is not given back by a request that fails."""
    door = Door(2)
    for _ in range(3):
        with door(), pytest.raises(KeyError), door():
            with pytest.raises(Refusal, match="2 requests are being answered") as caught, door():
                pass
            assert caught.value.status == 429
            raise KeyError


numbers = st.floats(allow_nan=False) | st.integers() | st.sampled_from([0, 1, 1e-320, 1e308, 10**300, 0.01, 100])
fields = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), numbers | st.none() | st.booleans()),
        **dict.fromkeys(("top_k", "seed", "n", "logprobs", "prompt_logprobs", "max_tokens"), st.integers(-2, 40)),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=3),
        "stop_token_ids": st.lists(st.integers(-1, 30), max_size=3),
        "prompt": st.text(max_size=5) | st.lists(st.integers(-1, 30), max_size=5),
    },
)


@settings(max_examples=60, deadline=None)
@given(fields)
def test_whatever_is_asked_is_answered_or_refused(it, said):
    """Catches settings that pass every check and then break a step, which would end everybody's answer: here that is a 500."""
    served = service(it, tokenizer=Letters(), concurrency=4, tokens=4)
    try:
        a = asked(served, **said)
        served.engine.submit_all(a.choices, prompt_logprobs=a.scored)
    except (Refusal, SpecError):
        assert len(served.engine) == 0
    assert sum(token.finish is not None for token in served.engine.drain()) <= 4
    assert served.engine.pages.blocks.free == 64


def test_without_the_libraries_it_says_what_to_install(capsys, monkeypatch):
    """Catches an ImportError instead of advice."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "nowhere"]) == 3
    assert "starlette and uvicorn: pip install 'deepseek-v3-refimpl[serve]'" in capsys.readouterr().err
