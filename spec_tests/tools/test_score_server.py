"""A server that is asked for log-probabilities: one that answers as real ones do, and others that answer badly.

The engine behind it is `Impl` in float32, as in test_score.py; the server is the standard library's, on the loopback.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from refimpl.autograd.errors import SpecError
from refimpl.cli import main
from refimpl.score import measure
from refimpl.score.asking import ask
from refimpl.score.client import Client, Refused
from refimpl.score.replies import Words
from refimpl.score.spelling import Spelling

from .test_refimpl_tap import TINY
from .test_score import case, e, right, top

__all__ = ["case", "e", "right"]  # fixtures
IDS = Spelling(None, Words())


class Server:
    """An engine on the loopback; `answer(body)` gives what is sent: bytes, or an object; an int is a status."""

    def __init__(self, answer):
        self.asked, self.paths, server = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(server.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.paths.append(self.path)
                self.reply(answer(body))

            def reply(self, said):
                if callable(said):
                    return said(self)
                status = said if isinstance(said, int) else 200
                raw = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.models = {"data": [{"id": "tiny"}]}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that gave up
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def engine(case, x, kind, broken=lambda body, entry: entry):
    """Answers as vLLM (prompt_logprobs), as the completions' echo, or with one more token's list alone."""

    def answer(body):
        tokens = body["prompt"]
        row = next((b for b, t in enumerate(case.tokens) if t[: len(tokens)] == tokens), None)
        wants = body.get("prompt_logprobs" if kind == "prompt" else "logprobs")
        if not wants or (kind == "echo") != bool(body.get("echo")):
            return {"choices": [{"text": "?", "logprobs": None}]}
        if wants > 10:
            return 400
        if row is None:
            return {"choices": [{"text": "?"}]}
        lists = [broken(body, top(x[row, t], wants, tokens[t + 1 : t + 2])) for t in range(len(tokens))]
        if kind == "prompt":
            said = {"prompt_logprobs": [None, *({str(i): {"logprob": v} for i, v in e.items()} for e in lists[:-1])]}
        else:
            keyed = [None, *({f"token_id:{i}": v for i, v in e.items()} for e in lists)]
            said = {"logprobs": {"top_logprobs": keyed if kind == "echo" else keyed[-1:]}}
        return {"choices": [{"index": 0, "text": "?", **said}], "usage": {"prompt_tokens": len(tokens)}}

    return answer


@pytest.mark.parametrize(("kind", "shown"), [("prompt", 46), ("echo", 48), ("next", 48)])
def test_a_server_is_asked_in_the_way_it_answers(case, e, right, kind, shown):
    """Catches one protocol taken for all, a number of tokens that a server refuses, and an entry of another place."""
    with Server(engine(case, right, kind)) as s:
        found = measure(ask(Client(s.url, timeout=20), case.tokens, IDS), e)
        assert s.asked[-1]["model"] == "tiny" and s.asked[-1]["temperature"] == 0
    assert found.verdict == "CONSISTENT" and len(found.settled) == shown
    assert [a.how for a in found.again] == ["twice", "in a batch", "after a prefix"]
    assert all(a.largest == 0 for a in found.again)


def test_a_server_is_not_asked_what_it_has_just_completed(case, e, right):
    """Catches beginnings asked for from the shortest on: mlx-lm's server keeps a prompt and what it generated and ends when that is
    the next prompt. This one generates the case's own next token always, and keeps ten.
    """
    answers, kept, ended = engine(case, right, "next"), [], []

    def answer(body):
        tokens = body["prompt"]
        ended.extend([tokens] if tokens in kept[-10:] else [])
        if ended:
            return 404
        said = answers(body)
        if said != 400:
            kept.append(
                next((t[: len(tokens) + 1] for t in case.tokens if t[: len(tokens)] == tokens and t != tokens), [])
            )
        return said

    with Server(answer) as s:
        found = measure(ask(Client(s.url, timeout=20), case.tokens, IDS), e)
    assert found.verdict == "CONSISTENT" and not ended


def test_a_stale_prefix_is_found(case, e, right):
    """Catches a client that never asks behind another prompt: here the engine answers otherwise from the third time on."""
    seen = []

    def broken(body, entry):
        seen.append(len(body["prompt"]) > 1)
        late = len(seen) > 24 * 7  # behind the probes and both rows alone, 24 lists each
        return {i: v - 0.5 for i, v in entry.items()} if late else entry

    with Server(engine(case, right, "echo", broken)) as s:
        found = measure(ask(Client(s.url, timeout=20), case.tokens, IDS), e)
    assert found.verdict == "INCONSISTENT" and not found.breaks and not all(a.ok for a in found.again)


def test_the_command_scores_a_server(case, right, tmp_path, capsys):
    """Catches a command that cannot reach what its parts can, and a saved file that scores otherwise."""
    with Server(engine(case, right, "prompt")) as s:
        assert (
            main(["score", str(TINY), s.url + "/api/v1", "--save", str(tmp_path / "s.json"), "--header", "X: y"]) == 0
        )
        assert set(s.paths) == {"/api/v1/completions"}
    said = capsys.readouterr().out
    assert "prompt_logprobs, 10 most likely, prompts as ids" in said and "\nCONSISTENT (" in said
    assert main(["score", str(TINY), str(tmp_path / "s.json"), "--precision", "bfloat16"]) == 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda body: 500, "status 500"),
        (lambda body: b"not json{", "no JSON"),
        (lambda body: {"choices": [{"text": "a", "logprobs": None}]}, "neither log-probabilities nor tokens"),
        (lambda body: {"choices": "none"}, "no choice"),
        (
            lambda body: {"choices": [{"text": "a", "prompt_logprobs": [None, *[{"5": float("nan")}] * 23]}]},
            "log-probability nan; expected a number that is not positive",
        ),
        (lambda body: {"choices": [{}], "usage": {"prompt_tokens": 25}}, "counts 25 tokens in a prompt of 24"),
    ],
)
def test_a_server_that_answers_badly_is_bad_input(answer, says, capsys):
    """Catches a verdict, a trace of Python or an endless try where a server fails, and one that adds a token of its own."""
    with Server(answer) as s:
        assert main(["score", str(TINY), s.url, "--retries", "0"]) == 3
    assert says in capsys.readouterr().err


def test_a_way_that_fails_is_not_tried_again():
    """Catches seconds of pauses for each way in which a server does not answer."""
    pauses = []
    with Server(lambda body: 500) as s:
        with pytest.raises(SpecError, match="status 500"):
            ask(Client(s.url, timeout=20, pause=pauses.append), [[1, 2]], IDS)
        assert len(s.asked) == 4 * 4 + 1 and not pauses  # four numbers of tokens in each of four ways, and none


def test_a_folder_to_serve_needs_its_library(tmp_path, monkeypatch, capsys):
    """Catches half a folder, or a trace of Python, where the tokenizers' library is absent; options without --servable."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["case", str(tmp_path / "c"), "--servable", "--from", str(TINY)]) == 3
    assert "[text]" in capsys.readouterr().err and not (tmp_path / "c").exists()
    for options in (["--gguf"], ["--from", str(TINY)]):
        assert main(["case", str(tmp_path / "c"), *options]) == 3


def test_what_no_server_is_told_of_is_not_served(tmp_path, capsys):
    """Catches a folder of a case with padding, which a score would refuse only when the server runs."""
    assert main(["case", str(tmp_path / "c"), "--servable", "--regime", "padding"]) == 3
    assert "the case has padding" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_slow_server_is_given_up_in_time(capsys):
    """Catches a client that waits for ever, and one that tries a hanging server again and again."""
    over = threading.Event()

    def slow(body):
        over.wait(20)
        return 500

    with Server(slow) as s:
        assert main(["score", str(TINY), s.url, "--timeout", "0.2"]) == 3
        over.set()
        assert len(s.asked) == 1
    assert "no answer within 0.2 s" in capsys.readouterr().err


def test_a_server_that_drips_is_given_up_in_time(capsys):
    """Catches a time that starts anew with every byte."""
    over = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not over.wait(0.01):
            handler.wfile.write(b" ")

    with Server(lambda body: drip) as s:
        assert main(["score", str(TINY), s.url, "--timeout", "0.2"]) == 3
        over.set()
    assert "no answer within 0.2 s" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_bad_input(capsys):
    """Catches a refused connection that is a trace of Python, or that comes behind complaints about a tokenizer; and, of a server
    that answers, what it said behind them.
    """
    with Server(lambda body: 500) as s:
        assert main(["score", str(TINY), s.url, "--retries", "0"]) == 3
        said = capsys.readouterr().err
        assert said.index("status 500") < said.index("prompts as text: ")
        url = s.url
    assert main(["score", str(TINY), url, "--retries", "0"]) == 3
    said = capsys.readouterr().err
    assert "refused" in said.lower() and said.startswith(f"refimpl: {url}/v1/completions: ") and "tokenizer" not in said


def test_retries_are_few_and_only_where_they_may_help():
    """Catches retries without end, without a pause, and of what will be refused again."""
    pauses, answers = [], iter([503, 429, {"fine": 1}, 400, 503, 503, 503])
    with Server(lambda body: next(answers)) as s:
        client = Client(s.url, timeout=20, retries=2, pause=pauses.append)
        assert client.post("/x", {}) == {"fine": 1} and pauses == [0.5, 1.0]
        with pytest.raises(Refused, match="status 400"):
            client.post("/x", {})
        with pytest.raises(Refused, match="status 503"):
            client.post("/x", {})
        assert len(s.asked) == 7 and pauses == [0.5, 1.0, 0.5, 1.0]


NO_ADDRESS = (
    "ftp://127.0.0.1",
    "http://",
    "http:///v1",
    "http://127.0.0.1:port",
    "http://127.0.0.1:99999",
    "http://[::1",
)


@pytest.mark.parametrize("url", NO_ADDRESS)
def test_an_address_that_is_none_is_refused(url):
    """Catches a client that fails on its first request with Python's words."""
    with pytest.raises(SpecError):
        Client(url)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("ftp://127.0.0.1:1", "'ftp://127.0.0.1:1'; expected http://HOST:PORT"),
        ("absent.json", "cannot be read: No such file or directory\n  while reading absent.json\n"),
    ],
)
def test_neither_an_address_nor_a_file_is_said_once(what, says, capsys):
    """Catches an address of another scheme looked for on the disk, and the file's name told twice."""
    assert main(["score", str(TINY), what]) == 3
    assert capsys.readouterr().err == f"refimpl: {says.rstrip()}\n"
