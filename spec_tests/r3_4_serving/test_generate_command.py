"""`refimpl generate`: what it prints, where, and with which exit code."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import refimpl
from refimpl import Checkpoint, Impl
from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import save
from refimpl.cli import main
from refimpl.infer import Request, Settings, Tokenizer, beam_search, generate
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.strategies.models import make_weights

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
PROMPT = [3, 1, 4, 1, 5]
IDS = "3,1,4,1,5"


@pytest.fixture(scope="module")
def tiny():
    checkpoint = Checkpoint.open(TINY)
    return Impl().load(checkpoint.config, checkpoint)


def run(capsys, *args):
    code = main(["generate", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def expected(impl, prompt=PROMPT, **settings):
    return generate(impl, [Request(prompt, Settings(**settings))])[0]


def test_ids_in_and_out(capsys, tiny):
    """Catches rates on standard output, a default that samples, tokens of the prompt in the result."""
    code, out, err = run(capsys, TINY, "--tokens", IDS, "--max-tokens", 9)
    assert code == 0 and [int(t) for t in out.split()] == expected(tiny, temperature=0, max_tokens=9).tokens
    assert out.count("\n") == 1 and "5 + 9 tokens" in err
    assert run(capsys, TINY, "--tokens", IDS, "--max-tokens", 9, "--stream")[1].split() == out.split()


def test_every_setting_arrives(capsys, tiny):
    """Catches an option that is parsed and forgotten, a seed shared by the prompts of a batch."""
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "logprobs": 2}
    args = [a for k, v in options.items() for a in (f"--{k.replace('_', '-')}", v)]
    code, out, _ = run(
        capsys, TINY, "--tokens", IDS, "--tokens", "7 8", "--max-tokens", 12, "--seed", 6, "--json", *args
    )
    lines = [json.loads(line) for line in out.splitlines()]
    for i, (line, prompt) in enumerate(zip(lines, (PROMPT, [7, 8]), strict=True)):
        whole = expected(tiny, prompt, **options, max_tokens=12, seed=6 + i)
        assert (line["prompt"], line["tokens"], line["finish"]) == (i, whole.tokens, "length")
        np.testing.assert_allclose(line["logprobs"], whole.logprobs, atol=1e-4)  # a batch of two in float32 against one
        assert [len(t) for t in line["top"]] == [2] * 12
    assert code == 0


def test_tokens_that_stream_as_json(capsys, tiny):
    """Catches tokens of two prompts that cannot be told apart."""
    args = (TINY, "--tokens", IDS, "--tokens", "9", "--max-tokens", 4, "--stream", "--json")
    pieces = [json.loads(line) for line in run(capsys, *args)[1].splitlines()]
    for i, prompt in enumerate((PROMPT, [9])):
        assert [p["token"] for p in pieces if p["prompt"] == i] == expected(
            tiny, prompt, temperature=0, max_tokens=4
        ).tokens
    assert [p["finish"] for p in pieces] == [None] * 6 + ["length"] * 2


def test_speculation_changes_the_rates_and_not_the_text(capsys, tmp_path):
    """Catches --speculative that drafts nothing, or that changes greedy text."""
    config = SMALL.replace(num_nextn_predict_layers=1, vocab_size=3)
    weights = make_weights(config.to_dict(), np.random.default_rng(0), mtp=1)
    save(tmp_path / "m", {n: w.astype(np.float32) for n, w in weights.items()}, config, dtype="float32")
    plain = run(capsys, tmp_path / "m", "--tokens", "1,2")
    for args in (["--speculative"], ["--speculative", "3", "--recycle"]):
        code, out, err = run(capsys, tmp_path / "m", "--tokens", "1,2", *args)
        assert (code, out) == (0, plain[1])
        assert "tokens a step, drafts stood" in err and "drafts" not in plain[2]
    assert run(capsys, tmp_path / "m", "--tokens", "1,2", "--speculative", "2")[0] == 3


def test_beams(capsys, tiny):
    """Catches another search than the library's."""
    found = beam_search(tiny, PROMPT, beams=3, max_tokens=4)
    code, out, _ = run(capsys, TINY, "--tokens", IDS, "--max-tokens", 4, "--beams", 3, "--json")
    assert code == 0 and [json.loads(line)["tokens"] for line in out.splitlines()] == [list(b.tokens) for b in found]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_best_beams_before_an_interruption_are_printed(capsys, tiny, monkeypatch, form):
    """Catches a long search that is lost at Ctrl-C: the beams of the tokens so far, and a word that the search was cut short."""
    advance, runs = Impl.advance, []

    def interrupted(self, *args, **how):
        runs.append(0)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return advance(self, *args, **how)

    monkeypatch.setattr(Impl, "advance", interrupted)
    code, out, err = run(capsys, TINY, "--tokens", IDS, "--max-tokens", 9, "--beams", 3, *form)
    monkeypatch.undo()
    found = [list(b.tokens) for b in beam_search(tiny, PROMPT, beams=3, max_tokens=3)]
    lines = [json.loads(line)["tokens"] if form else [int(t) for t in line.split()] for line in out.splitlines()]
    assert (code, lines) == (130, found if form else found[:1]) and "interrupted after 3 tokens" in err


def test_what_came_before_an_interruption_is_printed(capsys, tiny, monkeypatch):
    """Catches Ctrl-C that loses a long run: the tokens so far are on standard output, the exit code is that of an interruption."""
    advance, runs = Impl.advance, []

    def interrupted(self, *args, **how):
        runs.append(0)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return advance(self, *args, **how)

    monkeypatch.setattr(Impl, "advance", interrupted)
    code, out, _ = run(capsys, TINY, "--tokens", IDS)
    monkeypatch.undo()
    assert code == 130 and [int(t) for t in out.split()] == expected(tiny, temperature=0, max_tokens=4).tokens


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([TINY], "nothing to go on from"),
        ([TINY, "--prompt", "a"], "has no tokenizer.json; give token ids"),
        ([TINY, "--tokens", "3,x"], "expected ids such as"),
        ([TINY, "--tokens", ""], "no tokens"),
        ([TINY, "--tokens", "999"], "token id 999"),
        ([TINY, "--tokens", IDS, "--speculative"], "no MTP module"),
        ([TINY, "--tokens", IDS, "--recycle"], "--recycle is about drafts"),
        ([TINY, "--tokens", IDS, "--speculative", "0"], "depth is 0"),
        ([TINY, "--tokens", IDS, "--top-p", "7"], "top_p is 7"),
        ([TINY, "--tokens", IDS, "--tokens", IDS, "--stream"], "needs --json"),
        ([TINY, "--tokens", IDS, "--beams", "2", "--stream"], "--beams goes with"),
        ([TINY, "--tokens", IDS, "--beams", "2", "--temperature", "1"], "--beams goes with"),
        ([TINY, "--tokens", IDS, "--beams", "0"], "beams is 0"),
        ([TINY, "--tokens", IDS, "--beams", "2", "--top-k", "5"], "--beams goes with none of --top-k"),
        ([TINY, "--tokens", IDS, "--beams", "2", "--logprobs", "5", "--json"], "--beams goes with none of --logprobs"),
        ([TINY, "--tokens", IDS, "--chat"], "--chat is about texts"),
        ([TINY, "--tokens", IDS, "--system", "x"], "--system is a message of --chat"),
        ([TINY, "--tokens", IDS, "--logprobs", "2"], "shown by --json"),
        ([TINY, "--tokens", IDS, "--stop", "x"], "no tokenizer.json"),
        ([TINY / "nowhere", "--tokens", IDS], "nowhere"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x[1:])),  # no path of this machine
)
def test_bad_input_is_exit_code_3_and_says_why(capsys, args, says):
    """Catches a traceback, a plain run in spite of the option, output before the error."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (3, "") and says in err and "Traceback" not in err


def test_a_text_that_is_none_is_refused():
    """Bytes that are no UTF-8 come from a command line as lone surrogates. Catches the library's TypeError."""
    with pytest.raises(SpecError, match="at 1, which is no character"):
        Tokenizer(None, {}, None).encode("a\udcff")


def test_a_template_that_is_no_text_is_refused(tmp_path):
    """Catches a UnicodeDecodeError."""
    pytest.importorskip("tokenizers").Tokenizer(pytest.importorskip("tokenizers").models.BPE()).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SpecError, match=r"chat_template\.jinja: cannot be read"):
        Tokenizer.open(tmp_path)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_no_bug():
    """Catches a traceback, and the exit code 120 of a process whose last flush fails."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "refimpl", "generate", str(TINY), "--tokens", "3", "--max-tokens", "2"],
            cwd=TINY.parents[2],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3 and "cannot be written: No space left" in done.stderr and "Traceback" not in done.stderr
