"""`refimpl batch`: requests in, results out, bad lines named."""

import json
import pathlib
import re

import pytest

import refimpl
from refimpl import Checkpoint, Impl
from refimpl.cli import main
from refimpl.infer import Request, Settings, generate

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
LINES = [
    {"tokens": [3, 1, 4, 1, 5], "max_tokens": 7},
    {"tokens": [3, 1, 4, 1, 5, 9], "max_tokens": 3, "temperature": 1.5, "top_k": 40, "seed": 5},
    {"tokens": [2, 7], "max_tokens": 5, "repetition_penalty": 1.3},
]


def run(capsys, file, *args):
    code = main(["batch", str(TINY), str(file), *map(str, args)])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


@pytest.mark.parametrize(
    "how", [(), ("--invariant",), ("--blocks", 6, "--block-size", 3, "--step-tokens", 4, "--rows", 2)]
)
def test_every_line_gets_its_result(capsys, tmp_path, how):
    """Catches settings of one line used for another, results under the wrong number, an option that is parsed and forgotten."""
    file = tmp_path / "requests.jsonl"
    file.write_text("\n\n".join(map(json.dumps, LINES)))
    code, results, err = run(capsys, file, *how)
    checkpoint = Checkpoint.open(TINY)
    settings = [{"temperature": 0} | {k: v for k, v in o.items() if k != "tokens"} for o in LINES]
    whole = generate(
        Impl().load(checkpoint.config, checkpoint),
        [Request(o["tokens"], Settings(**s)) for o, s in zip(LINES, settings, strict=True)],
    )
    assert code == 0 and "steps" in err and sorted(r["request"] for r in results) == [0, 1, 2]
    for r in results:
        assert (r["tokens"], r["finish"]) == (whole[r["request"]].tokens, "length")
        assert r["logprobs"] == pytest.approx(whole[r["request"]].logprobs, abs=1e-4)  # float32, other shapes
    assert [r["request"] for r in results] != [0, 1, 2]  # as they end


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no requests"),
        ('{"tokens": [1]}\n{', "not JSON.*in line 2 of"),
        ("[1]", "a list; expected an object"),
        ('{"tokens": [1], "topk": 3}', "unknown keys: topk"),
        ('{"max_tokens": 3}', "expected either tokens or prompt"),
        ('{"tokens": 5}', "tokens is 5"),
        pytest.param("[" * 100_000, "not JSON.*in line 1", id="deep"),
        pytest.param('{"tokens": [' + "1" * 5000 + "]}", "not JSON.*in line 1", id="long"),
        ('{"tokens": [1], "stop": ["a\u2028b"]}\n', "has no tokenizer.json"),
        ('{"tokens": [1], "temperature": -1}', "temperature is -1.*in line 1"),
        ('{"tokens": [1]}\n{"tokens": [999]}', "token id 999.*in request 1"),
        ('{"tokens": [1], "max_tokens": 9999}', "max_tokens|can never run"),
    ],
)
def test_bad_requests(capsys, tmp_path, text, says):
    """Catches a traceback, a bad line found after others were run."""
    file = tmp_path / "requests.jsonl"
    file.write_text(text)
    code, results, err = run(capsys, file)
    assert (code, results) == (3, [])
    assert re.search(says, err, re.DOTALL)


def test_bad_options(capsys, tmp_path):
    """Catches a policy that falls back silently, a file that is not there."""
    file = tmp_path / "r.jsonl"
    file.write_text('{"tokens": [1]}')
    assert "known: first-come" in run(capsys, file, "--policy", "best")[2]
    assert "cannot be read" in run(capsys, tmp_path / "none")[2]
    assert "rows is 0" in run(capsys, file, "--rows", 0)[2]
    for blocks in (10**13, 10**30):
        assert "than there is memory for" in run(capsys, file, "--blocks", blocks)[2]
