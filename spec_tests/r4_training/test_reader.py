"""Batches by a cursor: every sample once an epoch on any number of ranks, elastic, in constant memory."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import train
from refimpl.autograd import SpecError
from refimpl.layers.precision import FLOAT64
from refimpl.layers.presets import TINY
from refimpl.spec_tests.oracles.shards import documents_of
from refimpl.train.data import Bytes, Cursor, Permutation, Reader, Shards, build, random_generator, random_state
from refimpl.train.data import shards as store
from refimpl.train.data.building import Build
from refimpl.train.data.shards import index_of
from refimpl.train.recipe import load, read, scaled


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """About a hundred rows in several shards; some end in padding."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("".join(f"{i} " + "abcdefg"[: i % 7] * (i % 5) + "\n" for i in range(200)))
    list(build(folder / "out", [folder / "a.txt"], Bytes(), Build(16, split="line", shard_tokens=300)))
    return Shards(folder / "out")


# ---- Order, ranks, cursor


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_every_sample_once_an_epoch_at_any_number_of_ranks(shards, plan, seed):
    """Catches a sample that two ranks get or none, a share that depends on the batch before, an epoch that begins anew after a
    change of ranks. The run is saved (as JSON) and goes on with another batch and another number of ranks after every batch.
    """
    reader = Reader(shards, seed, epochs=2)
    cursor, seen, k = reader.start(), [], 0
    while cursor.samples < reader.end:
        batch, ranks = plan[k % len(plan)]
        parts = [reader.take(cursor, batch, rank=r, ranks=ranks) for r in range(ranks)]
        sizes = [len(b.tokens) for b, _ in parts]
        assert max(sizes) - min(sizes) <= 1 and len({c for _, c in parts}) == 1
        seen += [row for b, _ in parts for row in b.tokens.tolist()]
        cursor, k = Cursor.from_dict(json.loads(json.dumps(parts[0][1].to_dict()))), k + 1
    n = len(shards)
    everything = shards.rows(np.arange(n)).tolist()
    expected = [everything[i] for epoch in (0, 1) for i in Permutation(n, (seed, epoch))(np.arange(n))]
    assert seen == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "rank", "ranks"), [(3, 0, 1), (7, 1, 3), (40, 0, 1)])
def test_batches_read_ahead_are_those_read_alone(shards, masked, batch, rank, ranks):
    """Catches a share or a cursor of another batch, rows given twice or left out where what was read ahead ends, and an array that
    two batches have in common: what is written into one is seen in none that comes after, nor when it is read again.
    """
    ahead, n = Reader(shards, 5, epochs=2, masked=masked), 0
    at = ahead.start()
    while at.samples < ahead.end:
        expected = Reader(shards, 5, epochs=2, masked=masked).take(at, batch, rank=rank, ranks=ranks)
        for _ in range(1 + n % 5 // 4):  # now and then the same batch again
            found, after = ahead.take(at, batch, rank=rank, ranks=ranks)
            assert after == expected[1] and found.inputs().keys() == expected[0].inputs().keys()
            for name, x in expected[0].inputs().items():
                np.testing.assert_array_equal(found.inputs()[name], x)
                found.inputs()[name][:] = -7
        at, n = after, n + 1


def test_small_batches_are_read_together(shards, monkeypatch):
    """Catches a reader that goes to its shards for every small batch (Python costs more there than the tokens do), and one that
    reads more than it was asked for when somebody only looks, or asks for something else every time.
    """
    read, whole = [], Shards.rows
    monkeypatch.setattr(Shards, "rows", lambda self, which, *placed: read.append(len(which)) or whole(self, which))
    reader = Reader(shards, epochs=None)
    at = reader.start()
    for batch in (2, 3, 4):
        _, at = reader.take(at, batch)
    assert read == [2, 3, 4]
    _, at = reader.take(at, 4)
    for _ in range(100):
        _, at = reader.take(at, 4)
    assert len(read) == 4


def test_epochs_and_seeds_have_their_own_orders(shards):
    """Catches the same order in every epoch."""
    n = len(shards)
    orders = [Reader(shards, s, epochs=None).samples(e * n, e * n + n).tolist() for s in (0, 1) for e in (0, 1, 7)]
    assert all(sorted(o) == list(range(n)) for o in orders)
    assert len({tuple(o) for o in orders}) == 6


def test_blocks_are_no_seams(shards, monkeypatch):
    """Catches an order that restarts at the end of a block of positions."""
    from refimpl.train.data import reader as room

    n = len(shards)
    whole = Reader(shards, 4, epochs=3).samples(0, 3 * n)
    monkeypatch.setattr(room, "BLOCK", 7)
    room._block.cache_clear()
    try:
        np.testing.assert_array_equal(Reader(shards, 4, epochs=3).samples(5, 3 * n), whole[5:])
    finally:
        room._block.cache_clear()


def test_a_cursor_that_does_not_fit_is_refused(shards):
    """Catches a run that goes on in other data, in another order, or beyond the last sample."""
    reader = Reader(shards, 1)
    cursor = reader.start()
    _, end = reader.take(cursor, 10**6)
    assert end.samples == len(shards)
    with pytest.raises(SpecError, match=f"at its end: all {len(shards)} samples"):
        reader.take(end, 1)
    for wrong, message in (
        (
            Cursor(len(shards) + 1, 1, cursor.data),
            f"past the end: {len(shards) + 1} samples consumed, there are {len(shards)}",
        ),
        (Cursor(0, 2, cursor.data), "the order of seed 2, not 1"),
        (Cursor(0, 1, "sha256:0"), "the cursor is of shards sha256:0"),
    ):
        with pytest.raises(SpecError, match=message):
            reader.take(wrong, 1)
    for bad in (
        {},
        [],
        {**cursor.to_dict(), "samples": -1},
        {**cursor.to_dict(), "samples": True},
        {**cursor.to_dict(), "data": 5},
    ):
        with pytest.raises(SpecError, match="not a cursor"):
            Cursor.from_dict(bad)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), drawn=st.integers(0, 50))
def test_a_generator_goes_on_from_its_state(seed, drawn):
    """Catches the cached half of a 64-bit draw that a state without it would lose; the state passes through JSON."""
    rng = np.random.default_rng(seed)
    rng.integers(0, 100, drawn, dtype=np.uint32)
    again = random_generator(json.loads(json.dumps(random_state(rng))))
    assert rng.integers(0, 2**31, 9, dtype=np.uint32).tolist() == again.integers(0, 2**31, 9, dtype=np.uint32).tolist()
    for bad in ({}, {"bit_generator": "MT19937"}, {**random_state(rng), "state": {}}):
        with pytest.raises(SpecError, match="not the state"):
            random_generator(bad)


# ---- What a batch says to the model


def test_padding_is_no_label_and_documents_are_isolated(shards):
    """Catches a loss on padding, and (R 5.1) a document's first token predicted from the document before it."""
    n = len(shards)
    rows, documents = shards.rows(np.arange(n)), documents_of(shards)
    order = Reader(shards, 2).samples(0, n)
    plain, _ = Reader(shards, 2).take(Reader(shards, 2).start(), n)
    masked, _ = Reader(shards, 2, masked=True).take(Reader(shards, 2).start(), n)
    np.testing.assert_array_equal(plain.tokens, rows[order])
    np.testing.assert_array_equal(masked.documents, documents[order])
    assert plain.documents is None and (plain.valid == masked.valid).all()
    for tokens, docs, loose, tight, valid in zip(
        plain.tokens, masked.documents, plain.labels, masked.labels, plain.valid, strict=True
    ):
        for i, (token, document) in enumerate(zip(tokens, docs, strict=True)):
            first = i == 0 or docs[i - 1] != document
            assert valid[i] == (document >= 0)
            assert loose[i] == (token if document >= 0 else -100)
            assert tight[i] == (token if document >= 0 and not first else -100)


def test_a_masked_batch_trains_as_its_documents_alone(tmp_path):
    """Catches attention across documents, a label too many, padding that trains: the loss of a packed batch is the mean over what
    is predicted in its documents, each run alone. float64; sums in another order, hence 1e-12.
    """
    c = TINY.replace(vocab_size=262, num_nextn_predict_layers=0)
    (tmp_path / "a.txt").write_text("".join("abcdefghijklm"[: 3 + i % 9] + "\n" for i in range(12)))
    list(build(tmp_path / "out", [tmp_path / "a.txt"], Bytes(), Build(24, split="line")))
    reader = Reader(Shards(tmp_path / "out", vocab_size=c.vocab_size), masked=True)
    batch, _ = reader.take(reader.start(), 99)
    assert (batch.documents.max(axis=1) > 0).any() and (batch.valid == 0).any()
    state, recipe = train.State(train.init(c, std=0.1)), train.Recipe(FLOAT64)
    together = train.step(c, state, recipe=recipe, **batch.inputs())[1].loss
    total, count = 0.0, 0
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        for d in range(documents.max() + 1):
            alone = tokens[documents == d][None]
            predicted = alone.shape[1] - 1
            if predicted:
                total += train.step(c, state, alone, recipe)[1].loss * predicted
                count += predicted
    assert together == pytest.approx(total / count, rel=1e-12)


# ---- Ten terabytes


@pytest.mark.slow
def test_ten_terabytes_in_constant_memory(tmp_path, monkeypatch):
    """Catches a table of samples, maps that are never given back, offsets that overflow: 250 sparse files of 40 GB, 610 million
    samples; what was put at 48 of them in the order of the seed comes back, in less than 8 MiB.
    """
    monkeypatch.setattr(store, "OPEN", 16)
    length, rows = 4096, 4 * 10**10 // (4 * 4096)
    names = [f"{i:06d}" for i in range(250)]
    facts = {"length": length, "dtype": "uint32", "vocab_size": 129280, "tokenizer": "sha256:0", "pad": 2}
    records = [{"name": n, "rows": rows, "pieces": 0, "tokens": rows * length, "crc": [0, 0]} for n in names]
    for name in names:
        (tmp_path / f"{name}.spans").touch()
        with (tmp_path / f"{name}.tokens").open("wb") as f:
            f.truncate(rows * length * 4)
    (tmp_path / "index.json").write_bytes(index_of(facts, records))
    shards = Shards(tmp_path)
    assert len(shards) * length * 4 > 0.99e13
    reader = Reader(shards, 11)
    start = Cursor(len(shards) - 480, 11, shards.fingerprint)
    marked = reader.samples(start.samples, len(shards))[::10]
    for row in marked.tolist():
        with (tmp_path / f"{names[row // rows]}.tokens").open("r+b") as f:
            f.seek(row % rows * length * 4)
            f.write(np.full(length, row % 129280, "<u4").tobytes())
    tracemalloc.start()
    cursor, found = start, []
    while cursor.samples < len(shards):
        batch, cursor = reader.take(cursor, 48)
        found += [int(t[0]) for t in batch.tokens if (t == t[0]).all() and t[0]]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [row % 129280 for row in marked.tolist() if row % 129280]
    maps = Path("/proc/self/maps")  # Linux
    if maps.exists():
        assert 0 < maps.read_text().count(str(tmp_path)) <= 16
    assert peak < 8 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_a_run_by_recipe_and_shards_goes_on_bit_for_bit(tmp_path):
    """Catches a state that neither cursor nor step number holds: five steps, then five from a saved cursor on two ranks' shares,
    are ten steps, with V3's own schedules scaled down to a growing batch and a falling learning rate.
    """
    c = TINY.replace(vocab_size=262)
    (tmp_path / "a.txt").write_text("".join(f"{i} " + "abcdefg"[: i % 7] * (i % 5) + "\n" for i in range(80)))
    list(build(tmp_path / "out", [tmp_path / "a.txt"], Bytes(), Build(16, split="line")))
    reader = Reader(Shards(tmp_path / "out"), seed=3, epochs=None)
    document = scaled(load("deepseek-v3"), tokens=1000, sequence=16, batch=8, lr=1e-2)
    document["optimizer"]["precision"] = "float32"
    run = read(document)
    assert (
        len(run) >= 10
        and len({run.at(k).batch for k in range(10)}) > 1
        and len({run.at(k).values["lr"] for k in range(10)}) > 3
    )

    def go(state, cursor, first, last, ranks):
        for k in range(first, last):
            parts = [reader.take(cursor, run.at(k).batch, rank=r, ranks=ranks) for r in range(ranks)]
            cursor = parts[0][1]
            given = [p.inputs() for p, _ in parts if len(p.tokens)]
            batch = {name: np.concatenate([g[name] for g in given]) for name in given[0]}
            state, _ = train.step(c, state, recipe=run.recipe(k), **batch)
        return state, cursor

    start = train.State(train.init(c, std=run.optimizer.init_std))
    whole, end = go(start, reader.start(), 0, 10, 1)
    half, saved = go(start, reader.start(), 0, 5, 1)
    again, there = go(half, Cursor.from_dict(json.loads(json.dumps(saved.to_dict()))), 5, 10, 2)
    assert there == end
    for name, w in whole.weights.items():
        np.testing.assert_array_equal(again.weights[name], w)
