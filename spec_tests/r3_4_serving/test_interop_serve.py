"""The server over its network, driven by OpenAI's own client: what it says is what `generate` says."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from refimpl.infer import Request, Settings, generate
from refimpl.infer.engine import Tiled
from refimpl.infer.server import create_server, listen
from refimpl.spec_tests.cases.serving import empty, service, small_impl, tiny_impl

from .test_interop_generate import TEXT, saved

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("starlette", "uvicorn", "openai", "tokenizers", "jinja2"):
        pytest.importorskip(
            name, reason="comes with the extras 'serve' and 'text', and openai; CI runs these tests with them"
        )


@contextmanager
def running(served):
    """A server on a free port, its address; at its end no request and no block is held."""
    sock = listen("127.0.0.1", 0, served.bounds.seconds)
    server = create_server(served)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert empty(served)
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
    assert not thread.is_alive() and not served.worker.alive


@contextmanager
def client(address):
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as c:
        yield c


@pytest.fixture(scope="module")
def tiny():
    """The tiny case, without a tokenizer: (model, client, service)."""
    it = tiny_impl()
    served = service(it, blocks=256, size=16)
    with running(served) as address, client(address) as c:
        yield it, c, served


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A small model with a tokenizer and a template, the same bits for the same request: (model, tokenizer, client)."""
    tokenizer, it = saved(tmp_path_factory.mktemp("text")), small_impl(vocab_size=300)
    with running(service(it, blocks=256, tokenizer=tokenizer, invariant=Tiled())) as address, client(address) as c:
        yield it, tokenizer, c


def ours(it, prompt, tokenizer=None, **settings):
    return generate(it, [Request(prompt, Settings(**settings), decode=tokenizer and tokenizer.decode)])[0]


def test_tokens_and_log_probabilities_are_generate_s(tiny):
    """Catches a sampler, a seed or an order of choices that differs from the command's, log-probabilities after the cuts."""
    it, c, served = tiny
    prompts, n, seed = [IDS, [2, 7]], 2, 11
    how = {"temperature": 0.8, "max_tokens": 12, "top_p": 0.9}
    extra = {"top_k": 40, "repetition_penalty": 1.2, "min_p": 0.01}
    got = c.completions.create(model="ours", prompt=prompts, n=n, seed=seed, logprobs=3, extra_body=extra, **how)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    for i, choice in enumerate(got.choices):
        alone = ours(it, prompts[i // n], seed=seed + i, **how, **extra)
        assert (choice.token_ids, choice.finish_reason, choice.text) == (alone.tokens, "length", "")
        np.testing.assert_allclose(choice.logprobs.token_logprobs, alone.logprobs, rtol=0, atol=1e-9)  # float64
        assert choice.logprobs.tokens == [f"token_id:{t}" for t in alone.tokens]
        for top, name, p in zip(
            choice.logprobs.top_logprobs, choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True
        ):
            assert top[name] == p and len(top) in (3, 4) and max(top, key=top.get) == next(iter(top))
    u = got.usage
    assert (u.prompt_tokens, u.completion_tokens, u.total_tokens) == (7, 48, 55)
    assert empty(served)


def test_prompts_with_their_own_log_probabilities(tiny):
    """Catches echo without its scores, scores of the wrong token, max_tokens 0 that gives one: as evaluation harnesses ask."""
    it, c, _ = tiny
    rows = it.forward([IDS])["logits"][0]
    p = rows - rows.max(-1, keepdims=True)
    p = p - np.log(np.exp(p).sum(-1, keepdims=True))
    expected = [p[i, t] for i, t in enumerate(IDS[1:])]
    got = c.completions.create(model="ours", prompt=IDS, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert got.logprobs.token_logprobs[0] is None and got.logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(got.logprobs.token_logprobs[1:], expected, rtol=0, atol=1e-9)
    assert got.logprobs.tokens == [f"token_id:{t}" for t in IDS] and got.token_ids == []
    how = {"extra_body": {"prompt_logprobs": 2}}
    got = c.completions.create(model="ours", prompt=IDS, max_tokens=1, **how).choices[0]
    assert got.prompt_logprobs[0] is None and got.prompt_token_ids == IDS
    for i, (token, said) in enumerate(zip(IDS[1:], got.prompt_logprobs[1:], strict=True)):
        order = np.argsort(-p[i], kind="stable").tolist()
        assert {int(t): v["rank"] for t, v in said.items()} == {order[0]: 1, order[1]: 2, token: 1 + order.index(token)}
        assert said[str(token)]["logprob"] == pytest.approx(p[i, token], abs=1e-9)


def test_a_stream_joins_to_the_whole(texts):
    """Catches text lost or doubled between chunks, a stop text that is shown, usage that is missing, log-probabilities of another
    token beside a chunk."""
    it, tokenizer, c = texts
    whole = ours(it, tokenizer.encode(TEXT), tokenizer, temperature=1.0, max_tokens=40, seed=3)
    stop = whole.text[9:11]
    for how in ({}, {"echo": True}, {"stop": [stop]}, {"n": 3}):
        ask = {"model": "ours", "prompt": TEXT, "max_tokens": 40, "seed": 3, "logprobs": 2} | how
        once = c.completions.create(**ask)
        text, entries, ends = [""] * 3, [[], [], []], {}
        chunks = list(c.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
        assert chunks[-1].usage == once.usage and not chunks[-1].choices
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            text[choice.index] += choice.text
            entries[choice.index] += list(
                zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset, strict=True)
            )
            ends[choice.index] = choice.finish_reason
        for choice in once.choices:
            logprobs = choice.logprobs
            assert (choice.text, choice.finish_reason) == (text[choice.index], ends[choice.index])
            assert entries[choice.index] == list(
                zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True)
            )
        expected = whole.text[: whole.text.find(stop)] if "stop" in how else whole.text
        assert once.choices[0].text == (TEXT if "echo" in how else "") + expected
        assert (once.choices[0].finish_reason == "stop") == ("stop" in how)


def test_where_tokens_begin_in_the_text(texts):
    """Catches offsets that count bytes or tokens, or that drift at characters of several tokens."""
    _, tokenizer, c = texts
    said = "Naïve 漢字, 🙂"
    singly = [i for character in said for i in tokenizer.encode(character)]  # characters of several tokens
    for prompt, ids in ((singly, singly), (said, tokenizer.encode(said))):  # tokens that end one and begin another
        got = c.completions.create(model="ours", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
        complete = [tokenizer.decode(ids[:i]) for i in range(len(ids))]
        expected = [len(text.rstrip("\ufffd")) for text in complete]
        assert got.text == said and got.logprobs.text_offset == expected
        assert len(singly) >= len(ids) >= len(set(expected)) > 4


def test_chat_is_the_template_s_prompt(texts):
    """Catches a conversation without its template, parts of a message that are lost, log-probabilities in completions' shape."""
    it, tokenizer, c = texts
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    prompt = tokenizer.chat([{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}])
    alone = ours(it, prompt, tokenizer, temperature=0, max_tokens=20)
    ask = {"model": "ours", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    got = c.chat.completions.create(logprobs=True, top_logprobs=2, extra_body={"prompt_logprobs": 0}, **ask)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert [e.logprob for e in choice.logprobs.content] == pytest.approx(alone.logprobs, abs=1e-9)
    assert [e.token for e in choice.logprobs.content] == [tokenizer.piece(t) for t in alone.tokens]
    for e in choice.logprobs.content:
        assert e.bytes == (None if "\ufffd" in e.token else list(e.token.encode()))
        assert (e.top_logprobs[0].token, len(e.top_logprobs)) == (e.token, 2)  # greedy
    assert len(got.prompt_logprobs) == len(prompt)
    chunks = list(c.chat.completions.create(stream=True, logprobs=True, **ask))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (got.object, {k.object for k in chunks}) == ("chat.completion", {"chat.completion.chunk"})
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == alone.text
    assert [e.token for k in chunks[1:] for e in k.choices[0].logprobs.content] == [
        e.token for e in choice.logprobs.content
    ]
    assert [k.choices[0].finish_reason for k in chunks][-2:] == [None, "length"]


def test_an_end_token_ends_and_is_not_text(texts):
    """Catches an end that is reported as length, ends that stop_token_ids or ignore_eos do not change."""
    it, tokenizer, c = texts
    alone = ours(it, IDS, tokenizer, temperature=0, max_tokens=9)
    ask = {"model": "ours", "prompt": IDS, "temperature": 0, "max_tokens": 9}
    how = {"stop_token_ids": [alone.tokens[4]], "return_token_ids": True}
    got = c.completions.create(extra_body=how, **ask).choices[0]
    n = 1 + alone.tokens.index(alone.tokens[4])
    assert (got.finish_reason, got.token_ids) == ("stop", alone.tokens[:n])
    assert got.text == tokenizer.decode(alone.tokens[: n - 1])


def test_what_the_client_raises(tiny, texts):
    """Catches a status or a shape that OpenAI's client does not know, and an engine that is not as before afterwards."""
    import openai

    it, c, served = tiny
    window, message = it.model.config.max_position_embeddings, [{"role": "user", "content": "hi"}]
    before = c.completions.create(model="ours", prompt=IDS, max_tokens=4, temperature=0).choices[0].token_ids
    for error, says, param, ask in (
        (openai.NotFoundError, "does not exist", "model", {"model": "gpt"}),
        (openai.BadRequestError, "can never run", None, {"prompt": [1] * 5000}),
        (openai.BadRequestError, "token id 128 at 1: outside", None, {"prompt": [1, 128]}),
        (openai.BadRequestError, "temperature is -1", "temperature", {"temperature": -1}),
        (openai.BadRequestError, "top_k is 500; the vocabulary", None, {"extra_body": {"top_k": 500}}),
        (openai.BadRequestError, "no tokenizer", "prompt", {"prompt": "text"}),
        (openai.BadRequestError, "stop texts need", None, {"stop": "x"}),
        (openai.BadRequestError, "no tokens", None, {"prompt": [[1], []]}),
    ):
        with pytest.raises(error, match=says) as caught:
            c.completions.create(**{"model": "ours", "prompt": IDS} | ask)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
        assert empty(served)
    with pytest.raises(openai.BadRequestError, match="conversation"):
        c.chat.completions.create(model="ours", messages=message)
    with pytest.raises(openai.BadRequestError, match="roles: tool"):
        texts[2].chat.completions.create(model="ours", messages=[{"role": "tool", "content": "hi"}])
    with pytest.raises(openai.NotFoundError):
        c.models.retrieve("gpt")
    assert [m.id for m in c.models.list()] == ["ours"] and c.models.retrieve("ours").max_model_len == 4097 < window
    assert c.completions.create(model="ours", prompt=IDS, max_tokens=4, temperature=0).choices[0].token_ids == before


def test_longer_than_the_window():
    """Catches a prompt that is cut in silence."""
    import openai

    it = small_impl(max_position_embeddings=16)
    with running(service(it)) as address, client(address) as c:
        for ask, says in (
            ({"prompt": [1] * 16}, "the window"),
            ({"prompt": [1] * 10, "max_tokens": 7}, "has room for 6"),
        ):
            with pytest.raises(openai.BadRequestError, match=says):
                c.completions.create(model="ours", **ask)
        assert len(c.completions.create(model="ours", prompt=[1] * 10).choices[0].token_ids) == 6  # all that fits


def test_sixty_four_streams_at_once(tiny):
    """Catches tokens that go to a neighbour's stream, and a stream that never ends."""
    from openai import AsyncOpenAI

    it, c, served = tiny
    asked = [([1 + i % 100, i // 8, 7], 6 + i % 9, i) for i in range(64)]

    async def one(api, prompt, most, seed):
        stream = await api.completions.create(model="ours", prompt=prompt, max_tokens=most, seed=seed, stream=True)
        return [t async for chunk in stream for t in chunk.choices[0].token_ids]

    async def everybody():
        async with AsyncOpenAI(base_url=c.base_url, api_key="none", max_retries=0, timeout=120) as api:
            return await asyncio.wait_for(asyncio.gather(*(one(api, *a) for a in asked)), 120)

    got = asyncio.run(everybody())
    alone = generate(it, [Request(p, Settings(max_tokens=most, seed=seed)) for p, most, seed in asked])
    assert got == [a.tokens for a in alone] and empty(served)
