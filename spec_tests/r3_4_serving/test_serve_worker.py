"""The server's worker: one thread, many listeners; who goes, who fails and who dies harms nobody else."""

import asyncio
import queue
import threading

import pytest

from refimpl import SpecError
from refimpl.infer import Request, Settings, generate
from refimpl.infer.server import Refusal
from refimpl.infer.server.feed import feed
from refimpl.spec_tests.cases.serving import empty, service, settled, small_impl


@pytest.fixture(scope="module")
def it():
    return small_impl()


@pytest.fixture
def served(it):
    running = service(it, concurrency=8)
    running.worker.start()
    yield running
    running.worker.close()
    assert not running.worker._thread.is_alive()


def listener():
    found = queue.Queue()
    return found, found.put


def until_over(events, n):
    """Tokens by index until all n are over, or the refusal that ended them."""
    tokens = [[] for _ in range(n)]
    while n:
        event = events.get(timeout=60)
        if isinstance(event, Refusal):
            return event
        tokens[event[0]].append(event[1].id)
        n -= event[1].finish is not None
    return tokens


def test_the_worker_gives_what_generate_gives(it, served):
    """Catches tokens that go to another's listener, and a ticket whose requests are counted wrongly."""
    groups = [[Request([1 + g, i], Settings(max_tokens=5 + i, seed=i)) for i in range(2)] for g in range(3)]
    heard = []
    for group in groups:
        events, deliver = listener()
        served.worker.submit(object(), group, deliver).result(60)
        heard.append(events)
    got = [until_over(events, 2) for events in heard]
    assert got == [[c.tokens for c in generate(it, group)] for group in groups]
    assert empty(served)


def test_a_cancelled_ticket_is_silent_and_frees_its_blocks(served):
    """Catches a cancellation that stops the wrong requests, or that leaves blocks or a listener behind."""
    (heard, deliver), (kept, keep), ticket = listener(), listener(), object()
    served.worker.submit(ticket, [Request([1], Settings(max_tokens=200)) for _ in range(2)], deliver).result(60)
    served.worker.submit(object(), [Request([2], Settings(max_tokens=30))], keep).result(60)
    heard.get(timeout=60)
    served.worker.cancel(ticket)
    settled(served)
    before = heard.qsize()
    assert len(until_over(kept, 1)[0]) == 30
    assert heard.qsize() == before < 400 and empty(served)
    served.worker.cancel(object())  # of one who never came
    assert empty(served)


def test_too_many_and_too_long_leave_the_others_alone(served):
    """Catches a ticket that is taken in part, and a limit that counts tickets instead of requests."""
    kept, keep = listener()
    served.worker.submit(object(), [Request([2], Settings(max_tokens=100))] * 5, keep).result(60)
    for requests, error in (
        ([Request([1], Settings(max_tokens=2))] * 4, Refusal),
        ([Request([1], Settings(max_tokens=2)), Request([99], Settings(max_tokens=2))], SpecError),
        ([Request([1], Settings(max_tokens=2)), Request([1] * 300, Settings(max_tokens=2))], SpecError),
    ):
        heard, deliver = listener()
        with pytest.raises(error):
            served.worker.submit(object(), requests, deliver).result(60)
        assert heard.empty()
    assert [len(t) for t in until_over(kept, 5)] == [100] * 5 and empty(served)


def test_a_step_that_fails_is_told_to_all_and_the_next_request_runs(it, served, monkeypatch):
    """Catches a worker that dies and leaves its clients waiting, and blocks that a failed step keeps."""
    heard, deliver = listener()
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.pages, "write", None)
        served.worker.submit(object(), [Request([1, 2, 3, 4, 5, 6], Settings(max_tokens=9))] * 3, deliver).result(60)
        failure = until_over(heard, 3)
    assert (failure.status, "the step failed" in failure.message) == (500, True)
    settled(served)
    assert heard.qsize() == 2 and empty(served)
    heard, deliver = listener()
    request = Request([1, 2, 3, 4, 5, 6], Settings(max_tokens=9))
    served.worker.submit(object(), [request], deliver).result(60)
    assert until_over(heard, 1) == [generate(it, [request])[0].tokens]


def test_closing_ends_what_runs_and_takes_no_more(it):
    """Catches a thread that outlives its server, and a submission to a closed worker that waits for ever."""
    running = service(it)
    running.worker.start()
    heard, deliver = listener()
    running.worker.submit(object(), [Request([1], Settings(max_tokens=200))], deliver).result(60)
    running.worker.close()
    assert until_over(heard, 1).status == 503 and not running.worker._thread.is_alive()
    assert running.engine.pages.blocks.free == 64
    with pytest.raises(Refusal, match="closing"):
        running.worker.submit(object(), [], deliver)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_leaves_nobody_waiting(it):
    """Catches clients that wait for ever on a thread that is gone: who was being answered, who was waiting to be taken."""
    running = service(it)
    (heard, deliver), held = listener(), threading.Event()
    running.worker.start()
    running.worker._commands.put(lambda: held.wait(60) and None)
    request = Request([1], Settings(max_tokens=200))
    running.worker.submit(object(), [request], deliver)
    running.worker._commands.put(lambda: 1 / 0)
    late = running.worker.submit(object(), [request], deliver)
    held.set()
    with pytest.raises(Refusal, match="closing"):
        late.result(60)
    assert until_over(heard, 1).status == 503 and not running.worker.alive
    assert running.engine.pages.blocks.free == 64
    running.worker.close()


def test_a_feed_that_is_left_early_cancels(it, served):
    """Catches requests that run on when their reader has left: by an exception, by cancellation while waiting to be taken."""
    requests = [Request([1, 2], Settings(max_tokens=200, seed=i)) for i in range(2)]

    async def leave():
        async with feed(served.worker, requests) as tokens:
            async for _ in tokens:
                break

    async def never_taken():
        held = threading.Event()
        served.worker._commands.put(lambda: held.wait(60) and None)
        task = asyncio.ensure_future(leave())
        await asyncio.sleep(0)  # to where it waits
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()

    short = [Request([1, 2], Settings(max_tokens=9))]

    async def whole():
        async with feed(served.worker, short) as tokens:
            return [token.id async for _, token in tokens]

    for run in (leave, never_taken):
        asyncio.run(run())
        assert empty(served) and served.engine.counts.run < 200
    assert asyncio.run(whole()) == generate(it, short)[0].tokens
