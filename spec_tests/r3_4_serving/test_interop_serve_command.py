"""`refimpl serve`: ready when it says so, ended by an interrupt, refused before anything is loaded."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial

import pytest

from refimpl import Checkpoint, Impl
from refimpl.cli import main
from refimpl.infer import Request, Settings, generate
from refimpl.spec_tests.cases.serving import TINY


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="come with the extra 'serve'; CI runs these tests with them")


@pytest.mark.parametrize("how", [(), ("--invariant", "--name", "oracle", "--blocks", "8", "--host", "localhost")])
def test_from_the_command_line_to_generate_s_tokens(how):
    """Catches an address that is printed too early or not flushed, an option that is forgotten, an interrupt that hangs."""
    command = [sys.executable, "-m", "refimpl", "serve", str(TINY), "--port", "0", *how]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background are started deaf to it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=heard, **pipes) as process:
        try:
            name, _, address = process.stdout.readline().split()
            fields = {"model": name, "prompt": [3, 1, 4], "max_tokens": 9, "temperature": 0}
            ask = urllib.request.Request(
                f"{address}/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(ask, timeout=60) as answer:
                got = json.load(answer)["choices"][0]["token_ids"]
            with urllib.request.urlopen(address.removesuffix("v1") + "health", timeout=60) as answer:
                blocks = 8 if how else 256
                assert json.load(answer) == {"status": "ok", "choices": 0, "blocks": blocks, "blocks_free": blocks}
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    case = Checkpoint.open(TINY)
    alone = generate(Impl().load(case.config, case), [Request([3, 1, 4], Settings(temperature=0, max_tokens=9))])[0]
    assert (got, name, out) == (alone.tokens, "oracle" if how else "tiny", "")
    assert process.returncode == 130 and "no tokenizer.json" in err and "Traceback" not in err


def test_what_cannot_be_served(capsys, monkeypatch):
    """Catches a port in use, or a number without meaning, that is noticed after the model was loaded."""
    monkeypatch.setattr(Impl, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for how, says in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "70000"], "port 70000"),
            (["--max-body", "0"], "body is 0"),
            (["--timeout", "-1"], "seconds is -1"),
            (["--timeout", "inf"], "seconds is inf"),
            (["--timeout", "1e6"], "seconds is 1000000.0"),
            (["--rows", "0"], "rows is 0"),
        ):
            assert main(["serve", str(TINY), *how]) == 3
            assert says in capsys.readouterr().err
