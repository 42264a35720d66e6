"""The server's application without a network, called as a server would call it: no task is left, whoever goes or stalls."""

import asyncio
import json

import pytest

from refimpl.infer import Request, Settings, generate
from refimpl.infer.server import create_app
from refimpl.spec_tests.cases.serving import empty, service, small_impl

LONG = 4000


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    pytest.importorskip("starlette", reason="comes with the extra 'serve'; CI runs these tests with it")


@pytest.fixture(scope="module")
def it():
    return small_impl(max_position_embeddings=8192)


class Caller:
    """An ASGI server's side of one connection: `stall` is how many messages it takes before it takes no more."""

    def __init__(self, app, body, *, stall=None):
        self.app, self.parts, self.stall, self.sent = app, [body], stall, []
        self.leave = asyncio.Event()

    async def receive(self):
        if self.parts:
            return {"type": "http.request", "body": self.parts.pop(), "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.stall is not None and len(self.sent) >= self.stall:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def __call__(self):
        headers = [(b"content-type", b"application/json; charset=utf-8")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        await asyncio.wait_for(self.app(scope, self.receive, self.send), 60)
        return b"".join(m.get("body", b"") for m in self.sent).decode()


def called(served, scenario):
    """Run a scenario of an application whose lifespan has begun; no task of it is left."""
    app = create_app(served)

    async def run():
        async with app.router.lifespan_context(app):
            found = await asyncio.wait_for(scenario(app), 120)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert await asyncio.to_thread(empty, served)
        return found

    return asyncio.run(run())


def body(**fields):
    return json.dumps({"model": "ours", "prompt": [1, 2, 3], "max_tokens": 6} | fields).encode()


def test_many_callers_of_whom_some_go_and_some_stall(it):
    """Catches a task that is left behind by a client that went or stalled, and neighbours that notice."""
    served = service(it, blocks=4096, seconds=0.3, concurrency=300)

    async def scenario(app):
        good = [Caller(app, body(seed=i, stream=bool(i % 2))) for i in range(40)]
        leaving = [Caller(app, body(max_tokens=LONG, stream=bool(i % 2))) for i in range(12)]
        stalled = [Caller(app, body(max_tokens=9, stream=True), stall=i) for i in range(12)]
        tasks = [asyncio.ensure_future(c()) for c in (*leaving, *stalled, *good)]
        answers = await asyncio.gather(*tasks[24:])
        for c in leaving:
            c.leave.set()
        await asyncio.gather(*tasks)
        assert not any("[DONE]" in t.result() for t in tasks[:23]) and "[DONE]" in tasks[23].result()
        return answers

    answers = called(served, scenario)
    for i, answer in enumerate(answers):
        alone = generate(it, [Request([1, 2, 3], Settings(max_tokens=6, seed=i))])[0].tokens
        events = [json.loads(e) for e in answer.split("data: ")[1:-1]] if i % 2 else [json.loads(answer)]
        assert [t for e in events for t in e["choices"][0]["token_ids"]] == alone


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_is_an_error_of_the_server(it, monkeypatch, stream):
    """Catches a stream that ends as if it were whole, and a client that waits for an answer that never comes."""
    served = service(it)

    async def scenario(app):
        monkeypatch.setattr(served.engine.pages, "read", None)
        failing = Caller(app, body(stream=stream))
        said = await failing()
        monkeypatch.undo()
        return failing.sent[0]["status"], said, await Caller(app, body())()

    status, said, later = called(served, scenario)
    assert status == (200 if stream else 500) and "the step failed" in said and "[DONE]" not in said
    assert json.loads(said.removeprefix("data: "))["error"]["type"] == "server_error"
    assert len(json.loads(later)["choices"][0]["token_ids"]) == 6


def test_a_client_that_goes_within_its_body_is_not_answered(it):
    """Catches half a body that is read as a whole one."""
    served = service(it)

    async def scenario(app):
        caller = Caller(app, body())
        caller.parts.clear()
        caller.leave.set()
        await caller()
        return caller.sent

    assert called(served, scenario) == []


def test_an_endless_body_is_left(it):
    """Catches a body that is read for as long as it comes."""
    served = service(it, body=1000)

    async def scenario(app):
        caller = Caller(app, b"")
        parts = iter([b" " * 1000] * 20)

        async def receive():
            return {"type": "http.request", "body": next(parts), "more_body": True}

        caller.receive = receive
        said = await caller()
        return caller.sent[0]["status"], said, len(list(parts))

    status, said, left = called(served, scenario)
    assert (status, left) == (413, 11) and "longer than 1000" in said  # 9 of 1000 are more than 8 x 1000
