"""Documents into rows (R 4.1), what is done to them before, and the order of rows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.train.data import (
    SENTINELS,
    Altering,
    Bytes,
    Permutation,
    Place,
    Splitter,
    best_fit,
    concatenate,
    documents,
    lay_out,
)

BOS, EOS, PAD, BEGIN, HOLE, END = (Bytes.ids[name] for name in SENTINELS)
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


# ---- Packing


def best_fit_slowly(lengths, size):
    """(row, at, document, start, length), by looking at every row for every piece."""
    cut = [(d, s, min(size, n - s)) for d, n in enumerate(lengths) for s in range(0, n, size)]
    full, rest = [p for p in cut if p[2] == size], [p for p in cut if p[2] < size]
    rows, found = [], []
    for document, start, length in full + sorted(rest, key=lambda p: -p[2]):
        fitting = [(room, r) for r, room in enumerate(rows) if room >= length]
        if fitting:
            _, row = min(fitting)
        else:
            row = len(rows)
            rows.append(size)
        found.append((row, size - rows[row], document, start, length))
        rows[row] -= length
    return sorted(found)


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 16))
def test_best_fit_is_best_fit_decreasing(lengths, size):
    """Catches first-fit or worst-fit in its place, a heap that forgets a row, ties that go to a later row."""
    assert [tuple(p) for p in best_fit(lengths, size)] == best_fit_slowly(lengths, size)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 16), pack=st.sampled_from([best_fit, concatenate]))
def test_packing_keeps_every_token_once(lengths, size, pack):
    """Catches tokens lost, doubled, or put over each other, spans that lie; best-fit cuts only what is longer than a row."""
    ids = itertools.count(1)
    texts = [np.array([next(ids) for _ in range(n)]) for n in lengths]
    pieces = pack(lengths, size)
    tokens, spans = lay_out(pieces, texts, size, 0, "uint16")
    assert tokens.dtype == np.uint16 and tokens.shape[1] == size
    flat = tokens.reshape(-1)
    assert sorted(flat[flat > 0].tolist()) == list(range(1, sum(lengths) + 1))
    for (first, last), piece in zip(spans.T.tolist(), pieces, strict=True):
        whole = texts[piece.document]
        assert flat[first:last].tolist() == whole[piece.start : piece.start + piece.length].tolist()
        assert first // size == (last - 1) // size
    assert (np.diff(spans.T.reshape(-1)) >= 0).all()
    if pack is best_fit:
        assert all(p.length == min(size, lengths[p.document]) or lengths[p.document] > size for p in pieces)


@given(lengths=lengths_of_documents, size=st.integers(1, 16))
def test_concatenation_is_one_stream_cut_anywhere(lengths, size):
    """Catches padding between documents: only the last row may have any."""
    texts = [np.arange(n) + 100 * d + 1 for d, n in enumerate(lengths)]
    tokens, _ = lay_out(concatenate(lengths, size), texts, size, 0, "uint32")
    stream = np.concatenate(texts)
    np.testing.assert_array_equal(tokens.reshape(-1)[: len(stream)], stream)
    assert tokens.size - len(stream) < size


# ---- Before packing


def altered(texts, first=0, seed=0, tokenizer=None, splitter=None, **how):
    return Altering(**how)(texts, first, seed, tokenizer or Bytes(), splitter or Splitter({}))


TEXTS = [f"document {i}: größer als {i}\n" * (1 + i % 3) for i in range(1000)]


def test_fill_in_the_middle_is_prefix_suffix_middle():
    """Catches suffix and middle exchanged, a sentinel in another place, an <eos> missing, cuts that lose a character."""
    for text, ids in zip(TEXTS, altered(TEXTS, fim=1.0), strict=True):
        ids = ids.tolist()
        assert [ids.count(s) for s in (BEGIN, HOLE, END, EOS, BOS, PAD)] == [1, 1, 1, 1, 0, 0]
        assert (ids[0], ids[-1]) == (BEGIN, EOS)
        hole, end = ids.index(HOLE), ids.index(END)
        prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]
        assert bytes(prefix + middle + suffix).decode() == text


def test_the_rate_is_that_of_documents_and_the_cuts_are_uniform():
    """Catches a rate of tokens, a rate that is ignored, cuts always at the ends: 5 sigma of the binomial with 1,000 documents."""
    holes = [BEGIN in ids for ids in altered(TEXTS, fim=0.1)]
    assert abs(sum(holes) - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5
    shares = [(len(ids) - 1 - list(ids).index(END) - 1) / len(ids) for ids in altered(["x" * 300] * 1000, fim=1.0)]
    assert (
        abs(np.mean(shares) - 1 / 3) < 5 * (1 / 18 / 1000) ** 0.5 + 4 / 300
    )  # |a - b| of two uniform numbers; 4 sentinels
    assert not any(BEGIN in ids for ids in altered(TEXTS, fim=0.0))


def test_a_document_is_altered_the_same_wherever_a_batch_begins():
    """Catches one generator for the whole build: a build that was interrupted would go on with other random numbers."""
    whole = altered(TEXTS[:20], fim=0.5, seed=3)
    parts = altered(TEXTS[:7], fim=0.5, seed=3) + altered(TEXTS[7:20], first=7, fim=0.5, seed=3)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    other = altered(TEXTS[:20], fim=0.5, seed=4)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(whole, other, strict=True))


def test_truncation():
    """Catches a cut document that ends with <eos> as if it were whole, and a hole whose filling is cut off."""
    (ids,) = altered(["abcdef"], most=4)
    assert ids.tolist() == list(b"abcd")
    assert altered(["abc"], most=4)[0].tolist() == [*b"abc", EOS]
    for most in (9, 10):  # 6 bytes and 4 sentinels
        (ids,) = altered(["abcdef"], fim=1.0, most=most)
        assert (BEGIN in ids) == (most == 10)
        assert len(ids) == (10 if most == 10 else 7)


VOCABULARY = ("a", ".", " ", "\n", ".\n", " )\r\n", "a\n", "!!\n\n", "\ufffd\n", ")", "\r", "!")


class Letters:
    """A tokenizer of letters with three combined tokens, and some that only look like it."""

    fingerprint, vocab_size = "letters", len(VOCABULARY) + len(SENTINELS)
    ids = {name: len(VOCABULARY) + i for i, name in enumerate(SENTINELS)}  # noqa: RUF012

    def encode(self, texts):
        return [np.array([VOCABULARY.index(c) for c in t], np.int64) for t in texts]

    def decode(self, ids):
        return "".join(VOCABULARY[i] for i in ids)


def test_combined_tokens_are_split_between_punctuation_and_line_break():
    """Catches letters taken for punctuation, a split inside the line breaks, a rate that splits all or none (R 4.1)."""
    tokenizer, rng = Letters(), np.random.default_rng(0)
    splitter = Splitter.of(tokenizer)
    assert {i: tokenizer.decode(p) for i, p in splitter.parts.items()} == {4: ".\n", 5: " )\r\n", 7: "!!\n\n"}
    ids = rng.integers(0, 12, 4000)
    for rate in (0.0, 0.3, 1.0):
        out = splitter(ids, rate, rng)
        assert tokenizer.decode(out) == tokenizer.decode(ids)
        joint, left = np.isin(ids, [4, 5, 7]).sum(), np.isin(out, [4, 5, 7]).sum()
        assert abs(left - (1 - rate) * joint) <= 5 * (joint * rate * (1 - rate)) ** 0.5
    assert splitter(np.array([0, 4, 0, 7]), 1.0, rng).tolist() == [0, 1, 3, 0, 11, 11, 3, 3]


# ---- Documents


def write(folder: Path):
    (folder / "a.txt").write_text("one\ntwo\n\n \nthree ü\nfour\n\n", encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "five"}\n\n{"n": 1, "text": "six\\n"}\n', encoding="utf-8")
    (folder / "empty.txt").write_text(" \n")
    return [folder / "a.txt", folder / "empty.txt", folder / "b.jsonl"]


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("file", ["one\ntwo\n\n \nthree ü\nfour\n\n", "five", "six\n"]),
        ("line", ["one\n", "two\n", "three ü\n", "four\n", "five", "six\n"]),
        ("paragraph", ["one\ntwo\n\n", "three ü\nfour\n\n", "five", "six\n"]),
    ],
)
def test_documents_and_going_on_from_every_place(tmp_path, split, found):
    """Catches a blank document, a last one without its line break lost, a place that skips or repeats a document."""
    files = write(tmp_path)
    all_of_them = list(documents(files, split=split))
    assert [t for t, _ in all_of_them] == found
    for k, (_, place) in enumerate(all_of_them):
        assert list(documents(files, Place(*place), split=split)) == all_of_them[k + 1 :]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl, byte 14: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n["text"]\n', "x.jsonl, byte 14: no text under the key 'text'"),
        ("x.jsonl", b'{"text": 5}\n', "x.jsonl, byte 0: no text"),
        ("x.txt", b"ab\xff", "x.txt, byte 0: not UTF-8: byte 2 of the document"),
    ],
)
def test_a_bad_document_is_named_by_file_and_byte(tmp_path, name, content, message):
    """Catches a traceback after hours of building, or a document that is silently left out."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        list(documents([tmp_path / name]))
    with pytest.raises(SpecError, match="nowhere: cannot be read"):
        list(documents([tmp_path / "nowhere"]))


# ---- Order


def feistel_slowly(n, seed, position):
    """The same network on Python's integers, number by number."""

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    bits = max((n - 1).bit_length(), 2)
    while True:
        a, b = bits // 2, bits - bits // 2
        left, right = position >> b, position % 2**b
        for key in np.random.SeedSequence(seed).generate_state(8, np.uint64).tolist():
            left, right = right, left ^ mixed(right ^ key) % 2**a
            a, b = b, a
        position = left << b | right
        if position < n:
            return position


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_the_order_is_a_permutation(n, seed, epoch):
    """Catches a network that is not invertible, halves of unequal size mixed up, a walk that leaves the domain."""
    found = Permutation(n, (seed, epoch))(np.arange(n))
    assert sorted(found.tolist()) == list(range(n))
    assert found[n // 2] == feistel_slowly(n, (seed, epoch), n // 2)


@pytest.mark.parametrize("n", [2**33 + 12345, 10**12 + 39, 2**61 - 1])
def test_the_order_of_many_samples(n):
    """Catches arithmetic that overflows where nobody can enumerate."""
    where = np.array([0, 1, n // 3, n - 1])
    assert Permutation(n, (7,))(where).tolist() == [feistel_slowly(n, (7,), int(i)) for i in where]


def test_the_order_never_changes():
    """Catches another order for the same seed in a later version: cursors in old checkpoints would point elsewhere."""
    assert Permutation(1000, (0, 0))(np.arange(8)).tolist() == RECORDED


RECORDED = [0, 136, 123, 595, 967, 77, 980, 755]


def test_the_order_is_spread():
    """Catches a network too weak to move samples far: over 2,000 seeds each of 5 samples comes first equally often (5 sigma), and
    neighbours in the order are not neighbours in the data.
    """
    first = np.array([int(Permutation(5, (s,))(np.array([0]))[0]) for s in range(2000)])
    assert (abs(np.bincount(first, minlength=5) - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5).all()
    order = Permutation(100_000, (1,))(np.arange(100_000))
    gap = np.abs(np.diff(order)).mean()
    assert abs(gap - 100_000 / 3) < 5 * 100_000 * (1 / 18) ** 0.5 / 100_000**0.5
