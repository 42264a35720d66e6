"""The server among clients that go, stall, flood or talk nonsense: nothing leaks, nothing hangs, the others notice nothing."""

import contextlib
import json
import socket
import threading

import pytest

from refimpl.infer import Request, Settings, generate
from refimpl.infer.server import create_server, listen
from refimpl.spec_tests.cases.serving import empty, service, settled, small_impl

from .test_interop_serve import running

LONG = 4000


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="come with the extra 'serve'; CI runs these tests with them")


@pytest.fixture(scope="module")
def it():
    return small_impl(max_position_embeddings=8192)


@contextlib.contextmanager
def alone(served):
    """A running server, (host, port), after which no thread is left that was not there before."""
    before = set(threading.enumerate())
    with running(served) as address:
        host, port = address.removeprefix("http://").split(":")
        yield host, int(port)
    assert set(threading.enumerate()) <= before


@pytest.fixture
def cancelled(monkeypatch):
    """Follow a service's cancellations: an event that is set by each of them."""

    def follow(served):
        event, cancel = threading.Event(), served.worker.cancel

        def note(ticket):
            cancel(ticket)
            event.set()

        monkeypatch.setattr(served.worker, "cancel", note)
        return event

    return follow


def post(path="/v1/completions", **fields):
    """The bytes of a request."""
    body = fields.pop("body", None)
    body = json.dumps({"model": "ours", "prompt": [1, 2, 3]} | fields).encode() if body is None else body
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def connected(address, *, receive=None):
    s = socket.socket()
    s.settimeout(60)
    if receive:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    s.connect(address)
    return s


def everything(s):
    """What comes until the other side closes, or gives the connection up."""
    found = b""
    while True:
        try:
            part = s.recv(1 << 16)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


def asks(address, raw):
    """(status, the body's object) of a request on a connection of its own."""
    with connected(address) as s:
        s.sendall(raw)
        head, _, body = everything(s).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_not_computed_for(it, cancelled, stream):
    """Catches an answer that is computed to its end for nobody, its blocks held meanwhile; in a stream and whole."""
    served = service(it, blocks=2048)
    gone = cancelled(served)
    begun, step = threading.Event(), served.engine.step
    served.engine.step = lambda **how: (begun.set(), step(**how))[1]
    with alone(served) as address:
        with connected(address) as s:
            s.sendall(post(max_tokens=LONG, n=4, stream=stream))
            assert begun.wait(60) and (not stream or s.recv(10))
        assert gone.wait(60) and empty(served)
        assert served.engine.counts.run < 4 * LONG
        expected = generate(it, [Request([1, 2, 3], Settings(max_tokens=5))])[0].tokens
        assert asks(address, post(max_tokens=5))[1]["choices"][0]["token_ids"] == expected


def test_a_reader_that_reads_nothing_is_given_up(it, cancelled, capfd):
    """Catches a task that waits for ever to send, and a connection that outlives it: closing would have to wait for that."""
    served = service(it, blocks=4096, seconds=0.5)
    gone = cancelled(served)
    with contextlib.ExitStack() as later, alone(served) as address:
        s = later.enter_context(connected(address, receive=4096))  # open, and unread, until the server has ended
        s.sendall(post(max_tokens=LONG, n=2, logprobs=20, stream=True))
        assert gone.wait(120) and empty(served)
        assert asks(address, post(max_tokens=5))[0] == 200  # others are served meanwhile
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert "graceful shutdown exceeded" not in capfd.readouterr().err


def test_a_slow_reader_gets_all_of_it(it):
    """Catches events that are dropped when a client is slower than the engine."""
    served, n = service(it, blocks=1024), 500
    with alone(served) as address, connected(address, receive=4096) as s:
        s.sendall(post(max_tokens=n, logprobs=5, stream=True))
        first = s.recv(100)
        while len(served.engine):  # the engine is ahead of us, or this ends at once
            settled(served)
        said = first + everything(s)
    events = [line[6:] for line in said.split(b"\n") if line.startswith(b"data: ")]
    ids = [json.loads(e)["choices"][0]["token_ids"][0] for e in events[:-1]]
    assert (
        events[-1] == b"[DONE]"
        and len(ids) == n
        and ids == generate(it, [Request([1, 2, 3], Settings(max_tokens=n))])[0].tokens
    )


NONSENSE = [
    (post(body=b"{"), 400, "not JSON"),
    (post(body=b"[]"), 400, "no JSON object"),
    (post(body=b"[" * 90_000), 400, "not JSON"),
    (post(body=b"\xff\xfe"), 400, "not JSON"),
    (post(body=b" " * 100_001), 413, "longer than 100000"),
    (post(body=b" " * 3_000_000), 413, "longer than 100000"),
    (post(model="\ud800"), 404, "does not exist"),
    (post(prompt=[1e400]), 400, "expected a text or a list of ids"),
    (post("/v1/nothing"), 404, "Not Found"),
    (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "Not Allowed"),
    (post().replace(b"application/json", b"text/plain"), 415, "application/json"),
    (post().replace(b"Content-Type: application/json\r\n", b""), 415, "application/json"),
]


@pytest.fixture(scope="module")
def strict(it):
    served = service(it, blocks=256, body=100_000, seconds=1.0, concurrency=4)
    with running(served) as address:
        host, port = address.removeprefix("http://").split(":")
        yield served, (host, int(port))


@pytest.mark.parametrize(("raw", "status", "says"), NONSENSE, ids=lambda v: str(v)[:40])
def test_nonsense_is_refused_and_changes_nothing(strict, raw, status, says):
    """Catches a body that is kept whole before it is refused, an error without OpenAI's shape, one that ends the server."""
    served, address = strict
    got, body = asks(address, raw)
    assert (got, says in body["error"]["message"]) == (status, True) and set(body) == {"error"}
    assert empty(served)


def test_a_body_that_stops_coming(strict):
    """Catches a place that is held for ever by a client that promised more than it sends; and one that goes in between."""
    served, address = strict
    with connected(address) as s:
        s.sendall(post()[:-3])
        assert b"408" in everything(s).split(b"\r\n")[0]
    with connected(address) as s:
        s.sendall(post()[:-3])
    for _ in range(5):  # more than there are places
        assert asks(address, post(max_tokens=2))[0] == 200
    assert empty(served)


def test_too_many_at_once_are_told_so(strict, monkeypatch):
    """Catches a limit that counts requests and not their choices, or one that is not given back."""
    served, address = strict
    going, step = threading.Event(), served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda **how: step(**how) if going.is_set() else [])
    with connected(address) as s:
        s.sendall(post(max_tokens=50, n=3, stream=True))
        assert s.recv(10)  # taken, and no further
        status, body = asks(address, post(max_tokens=2, n=2))
        assert (status, body["error"]["type"], body["error"]["code"]) == (
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        )
        going.set()
        assert everything(s).count(b'"finish_reason": "length"') == 3
    assert asks(address, post(max_tokens=2, n=5))[0] == 400  # never
    assert asks(address, post(max_tokens=2, n=4))[0] == 200 and empty(served)


def test_closing_in_the_midst_of_answers(it):
    """Catches a shutdown that waits for its clients, and threads or blocks that outlive it."""
    served, before = service(it, blocks=4096), set(threading.enumerate())
    sock = listen("127.0.0.1", 0, 60)
    server = create_server(served)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    with sock, connected(sock.getsockname()) as s, connected(sock.getsockname()) as t:
        s.sendall(post(max_tokens=LONG, n=8, stream=True))
        assert s.recv(10)
        t.sendall(post(max_tokens=LONG))
        server.should_exit = True
        streamed, whole = everything(s), everything(t)
        thread.join(60)
    assert b"[DONE]" not in streamed and b"the server is closing" in streamed
    assert whole == b"" or b" 503 " in whole.split(b"\r\n")[0]  # it may not have been read at all
    assert set(threading.enumerate()) <= before
    assert not len(served.engine) and served.engine.pages.blocks.free == 4096
