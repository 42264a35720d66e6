"""Shards on disk: built, interrupted at every write, gone on with, checked, refused; and `refimpl data`."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.spec_tests.oracles.shards import documents_of
from refimpl.train.data import Altering, Build, Bytes, Shards, build

EOS = 257
ONE_CRC = {"name": "000000", "rows": 1, "pieces": 1, "tokens": 1, "crc": [0]}
HOW = Build(16, altering=Altering(fim=0.3), shard_tokens=96, split="line", seed=5)


def corpus(folder, lines=40):
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("".join(f"line {i} " + "x" * (i * 7 % 23) + "\n" for i in range(lines)))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"no {i} ü"}) + "\n" for i in range(lines)))
    return [folder / "a.txt", folder / "b.jsonl"]


def files_of(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def made(tmp_path, how=HOW):
    return list(build(tmp_path / "out", corpus(tmp_path / "in"), Bytes(), how))


def test_shards_hold_every_document_of_the_input(tmp_path):
    """Catches a document lost between two shards, doubled, or in the wrong dtype. Oracle: the text itself, in one stream."""
    done = made(tmp_path, Build(16, "concatenate", shard_tokens=96, split="line"))
    s = Shards(tmp_path / "out", tokenizer="bytes/1", vocab_size=262)
    lines = (tmp_path / "in" / "a.txt").read_text().splitlines(keepends=True) + [f"no {i} ü" for i in range(40)]
    expected = [t for line in lines for t in [*line.encode(), EOS]]
    rows, documents = s.rows(np.arange(len(s))), documents_of(s)
    assert rows[documents >= 0].tolist() == expected
    assert (rows[documents < 0] == Bytes.ids["<｜▁pad▁｜>"]).all() and s.padded
    assert len(s.shards) > 5 and (done[-1].documents, done[-1].tokens, done[-1].rows) == (80, len(expected), len(s))
    assert done[-1].done == done[-1].total == sum(f.stat().st_size for f in (tmp_path / "in").iterdir())
    assert s.tokens(0).dtype == np.uint16 and [x.name for x in s.verify()] == [f"{i:06d}" for i in range(len(s.shards))]


def test_documents_of_rows_are_their_pieces(tmp_path):
    """Catches a piece too few at the end of a row, padding taken for a document. Oracle: every span, token by token."""
    made(tmp_path)
    s = Shards(tmp_path / "out")
    assert s.padded
    which, owners = np.random.default_rng(0).permutation(len(s)), documents_of(s)
    counts, ends = (a.tolist() for a in s.ends(which))
    for count, owner in zip(counts, owners[which].tolist(), strict=True):
        own, ends = ends[: count + 1], ends[count + 1 :]
        assert own[-1] == 16 and [sum(i >= end for end in own) for i in range(own[-2] if count else 0)] == [
            number for number in owner if number >= 0
        ]
    assert not ends and not s.ends(which[:0])[1].size


def without_first(folder):
    """The folder as it was before there was a file of first pieces."""
    index = json.loads((folder / "index.json").read_text())
    for s in index["shards"]:
        s["crc"] = s["crc"][:2]
        (folder / f"{s['name']}.first").unlink()
    (folder / "index.json").write_text(json.dumps(index))
    return Shards(folder)


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
def test_first_pieces_are_what_a_search_finds(tmp_path, packing):
    """Catches a file of first pieces that is off by one or of another shard, old shards that are refused, a run that does not go
    on after they were built again.
    """
    made(tmp_path, Build(16, packing, shard_tokens=96, split="line"))
    s = Shards(tmp_path / "out")
    which = np.random.default_rng(1).integers(0, len(s), 200)
    found, name = s.ends(which), s.fingerprint
    old = without_first(tmp_path / "out")
    assert len(list(old.verify())) == len(old.shards) > 5 and old.fingerprint == name
    for ours, searched in zip(found, old.ends(which), strict=True):
        np.testing.assert_array_equal(ours, searched)


@pytest.mark.parametrize(("row", "at", "value"), [(0, 0, -1), (0, 1, 10**6), (1, 2, -5)])
def test_first_pieces_that_are_not_there_are_refused(tmp_path, row, at, value):
    """Catches a damaged file that ends as a bug, or as another row's documents."""
    made(tmp_path, Build(16, "concatenate", shard_tokens=96, split="line"))
    first = np.fromfile(tmp_path / "out" / "000000.first", "<i8")
    first[at] = value
    first.tofile(tmp_path / "out" / "000000.first")
    with pytest.raises(
        SpecError, match=r"(000000.first: pieces that are not there|a row of -?\d+ pieces): (a|the) shard was damaged"
    ):
        Shards(tmp_path / "out").ends(np.array([row]))


# ---- Interrupted builds


def crash_at(n, run):
    """Run in a child process that ends, without any clean-up, at the n-th call that writes, flushes or renames -> did it?"""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        left = [n]

        def counted(real, *args):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return real(*args)

        os.fsync, os.replace = partial(counted, os.fsync), partial(counted, os.replace)
        run()
    finally:
        os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_build_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path):
    """Catches a half-written shard taken for whole, a place that is ahead of its shard, random numbers that depend on the restart,
    temporary files left. Killed at every flush and rename, then at two in turn, then finished.
    """
    inputs = corpus(tmp_path / "in", 9)
    list(build(tmp_path / "whole", inputs, Bytes(), HOW))
    expected, out, killed = files_of(tmp_path / "whole"), tmp_path / "out", 0
    for n in range(1, 1000):
        shutil.rmtree(out, ignore_errors=True)
        if not crash_at(n, lambda: list(build(out, inputs, Bytes(), HOW))):
            break
        killed += 1
        if not (out / "index.json").exists():  # the last calls come after it
            with pytest.raises(SpecError):
                Shards(out)
        crash_at(3, lambda: list(build(out, inputs, Bytes(), HOW)))
        list(build(out, inputs, Bytes(), HOW))
        assert files_of(out) == expected, f"killed at call {n}"
    assert killed > 25


def test_a_build_stopped_between_shards_goes_on(tmp_path):
    """Catches shards that are made again although they are there: the second run finds their files untouched."""
    inputs, out = corpus(tmp_path / "in"), tmp_path / "out"
    run = build(out, inputs, Bytes(), HOW)
    first = [next(run), next(run)]
    run.close()
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    with pytest.raises(SpecError, match="the build was not finished; the same `refimpl data build` goes on"):
        Shards(out)
    assert list(build(out, inputs, Bytes(), HOW))[:2] == first
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    list(build(tmp_path / "whole", inputs, Bytes(), HOW))
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "made with seed = 5, not 6"),
        ({"length": 8}, "made with length = 16, not 8"),
        ({"altering": Altering(fim=0.2)}, "made with altering"),
        ({"inputs": True}, "made with inputs"),
    ],
)
def test_a_build_does_not_go_on_with_other_settings(tmp_path, change, message):
    """Catches a folder half made one way and half another."""
    next(build(tmp_path / "out", corpus(tmp_path / "in"), Bytes(), HOW))
    inputs = corpus(tmp_path / "in", 41 if "inputs" in change else 40)
    how = Build(**{**vars(HOW), **{k: v for k, v in change.items() if k != "inputs"}})
    with pytest.raises(SpecError, match=message):
        next(build(tmp_path / "out", inputs, Bytes(), how))


def test_a_build_leaves_other_folders_alone(tmp_path):
    """Catches shards strewn into a folder that holds something else, and an empty corpus that gives an empty index."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(SpecError, match="is not empty"):
        next(build(tmp_path / "full", corpus(tmp_path / "in"), Bytes(), HOW))
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(SpecError, match="no document in the input"):
        list(build(tmp_path / "out", [tmp_path / "blank.txt"], Bytes(), HOW))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 4, "packing": "first-fit"}, "packing 'first-fit'; known: best-fit, concatenate"),
        ({"length": 4, "shard_tokens": 3}, "a shard of 3 tokens has no row of 4"),
        ({"length": 4, "altering": Altering(fim=1.5)}, "rates are in 0..1"),
        ({"length": 4, "altering": Altering(most=0)}, "at least 1"),
    ],
)
def test_impossible_settings(settings, message):
    """Catches an endless loop or an empty shard where a sentence would do."""
    with pytest.raises(SpecError, match=message):
        Build(**settings)


# ---- Shards that are not what they should be


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    """Catches training on ids that mean other texts, or that the embedding does not have."""
    made(tmp_path)
    with pytest.raises(SpecError, match="made by tokenizer bytes/1, not by sha256:0: its ids mean other texts"):
        Shards(tmp_path / "out", tokenizer="sha256:0")
    with pytest.raises(SpecError, match="of 262 ids; the model has only 128"):
        Shards(tmp_path / "out", vocab_size=128)


@pytest.mark.parametrize("name", ["000001.tokens", "000002.spans", "000003.first"])
def test_truncated_missing_and_damaged_shards(tmp_path, name):
    """Catches a shard that a full disk cut short, one that is not there, a flipped bit: the first two when opened."""
    made(tmp_path)
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:7] + bytes([whole[7] ^ 1]) + whole[8:])
    with pytest.raises(SpecError, match=rf"{name}: CRC-32 .* the file was damaged"):
        list(Shards(tmp_path / "out").verify())
    file.write_bytes(whole[:-1])
    with pytest.raises(
        SpecError, match=rf"{name} has {len(whole) - 1} bytes; the index says {len(whole)}: shard truncated"
    ):
        Shards(tmp_path / "out")
    file.unlink()
    with pytest.raises(SpecError, match=rf"{name} is missing: .*shard lost"):
        Shards(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [{"schema": "x"}, {"shards": []}, {"shards": [{}]}, {"shards": [ONE_CRC]}, {"length": "four"}, {"dtype": "no"}],
)
def test_a_wrong_index(tmp_path, change):
    """Catches a KeyError for a file that somebody edited."""
    made(tmp_path)
    index = tmp_path / "out" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(SpecError, match=r"while reading .*index.json"):
        Shards(tmp_path / "out")
    with pytest.raises(SpecError):
        Shards(tmp_path / "nowhere")


def test_rows_outside(tmp_path):
    """Catches a negative row that silently counts from the end."""
    made(tmp_path)
    s = Shards(tmp_path / "out")
    for bad in (-1, len(s)):
        with pytest.raises(SpecError, match=f"the shards have {len(s)}"):
            s.rows(np.array([0, bad]))


# ---- The command


def test_the_command(tmp_path, capsys):
    """Catches an option that does not reach the build, a check that checks nothing, a wrong exit code."""
    inputs = [str(f) for f in corpus(tmp_path / "in")]
    out = str(tmp_path / "out")
    options = "--length 16 --documents line --shard-tokens 0.1K --fim 0.3 --seed 5 --most 60 --packing concatenate"
    assert main(["data", "build", *inputs, "-o", out, *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "80 documents" in printed and "fill-in-the-middle 0.3" in printed and "longest 60" in printed
    list(
        build(
            tmp_path / "again",
            corpus(tmp_path / "in"),
            Bytes(),
            Build(16, "concatenate", Altering(0.3, 0.0, 60), 5, 100, "line"),
        )
    )
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    assert main(["data", "check", out]) == 0
    assert "vocabulary 262" in capsys.readouterr().out
    tokens = tmp_path / "out" / "000000.tokens"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    assert main(["data", "check", out]) == 3
    assert "damaged" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(tmp_path, capsys, monkeypatch):
    """Catches an interruption that leaves the user without a word on how to go on."""
    from refimpl.train.data import building

    real, calls = building._write, []

    def write(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(building, "_write", write)
    inputs = [str(f) for f in corpus(tmp_path / "in")]
    command = [
        "data",
        "build",
        *inputs,
        "-o",
        str(tmp_path / "out"),
        "--length",
        "16",
        "--documents",
        "line",
        "--shard-tokens",
        "96",
    ]
    assert main(command) == 130
    assert "2 shards are finished in" in capsys.readouterr().err
    assert main(command) == 0
