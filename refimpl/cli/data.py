"""`refimpl data`: text to packed token shards, a tokenizer for them, and what a folder of shards is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.train.data import Progress

_TEXT = """Make training data (R 4.1).

  refimpl data tokenizer books/*.txt --vocab 4096 -o tokenizer.json     learn a byte-level BPE (extra: data)
  refimpl data build books/*.txt more.jsonl.gz -o shards --length 4096 --tokenizer tokenizer.json --fim 0.1 --split 0.1
  refimpl data check shards                                             read every byte, compare checksums

`--tokenizer bytes` needs no library: one token a byte."""
_BUILD = """Pack documents into rows of one length and write them as shards that are read by memory mapping.

  refimpl data build books/*.txt -o shards --length 4096 --documents paragraph

Interrupted by Ctrl-C, a kill or a power cut, the same command goes on after the last finished shard, and ends with the
same bytes. V3's own settings: --packing best-fit --fim 0.1; the rate of --split is not published.

exit code: 0; 3 bad input; 130 interrupted"""


def add(commands: Commands) -> None:
    """Add `data` with `build`, `tokenizer` and `check`."""
    raw = argparse.RawDescriptionHelpFormatter
    data = commands.add_parser(
        "data", help="make token shards from text or JSONL", description=_TEXT, formatter_class=raw
    )
    parts = data.add_subparsers(required=True, metavar="build|tokenizer|check")
    b = parts.add_parser("build", help="text or JSONL to shards", description=_BUILD, formatter_class=raw)
    _inputs(b)
    b.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER", help="where the shards go; goes on if half-done"
    )
    b.add_argument("--length", type=int, required=True, metavar="S", help="tokens of a row")
    b.add_argument("--tokenizer", default="bytes", metavar="FILE", help="a tokenizer.json, or bytes (default)")
    b.add_argument("--packing", choices=["best-fit", "concatenate"], default="best-fit", help="default best-fit")
    b.add_argument(
        "--fim", type=float, default=0.0, metavar="RATE", help="of documents with a hole to fill (V3: 0.1; default 0)"
    )
    b.add_argument(
        "--split",
        type=float,
        default=0.0,
        metavar="RATE",
        help="of split tokens of punctuation + line break (default 0)",
    )
    b.add_argument("--most", type=int, metavar="N", help="cut documents to N tokens")
    b.add_argument("--seed", type=int, default=0, help="of --fim and --split (default 0)")
    b.add_argument("--shard-tokens", default="16M", metavar="N", help="tokens of a shard, about (default 16M)")
    b.set_defaults(run=_build)
    t = parts.add_parser("tokenizer", help="learn a byte-level BPE with V3's pre-tokenizer and sentinels (extra: data)")
    _inputs(t)
    t.add_argument("--vocab", type=int, required=True, metavar="N", help="tokens of the vocabulary")
    t.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    t.set_defaults(run=_tokenizer)
    c = parts.add_parser("check", help="what a folder of shards is, and whether it is whole")
    c.add_argument("folder", type=Path)
    c.set_defaults(run=_check)


def _inputs(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "inputs", nargs="+", type=Path, metavar="FILE", help=".jsonl (a document a line) or text; .gz of either"
    )
    p.add_argument(
        "--documents",
        choices=["file", "line", "paragraph"],
        default="file",
        help="what a text's documents are (default file)",
    )
    p.add_argument("--key", default="text", help="of a document's text in JSONL (default text)")


def _build(args: argparse.Namespace) -> int:
    from refimpl.train.data import Altering, Build, build, load_tokenizer
    from refimpl.train.recipe import amount

    altering = Altering(args.fim, args.split, args.most)
    tokens = int(amount(args.shard_tokens))
    how = Build(args.length, args.packing, altering, args.seed, tokens, args.documents, args.key)
    done = 0
    try:
        with _bar() as show:
            for p in build(args.out, args.inputs, load_tokenizer(args.tokenizer), how):
                done += 1
                show(p)
    except KeyboardInterrupt:
        print(
            f"refimpl: {done} shards are finished in {args.out}; the same command goes on after them", file=sys.stderr
        )
        raise
    return _describe(args.out)


def _tokenizer(args: argparse.Namespace) -> int:
    from refimpl.train.data import documents, train_tokenizer

    texts = (text for text, _ in documents(args.inputs, split=args.documents, key=args.key))
    deliver(train_tokenizer(texts, args.vocab), args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from refimpl.train.data import Shards

    from .common import progress

    shards = Shards(args.folder)
    found = shards.verify()
    for _ in progress("checking")(list(range(len(shards.shards)))):
        next(found)
    return _describe(args.folder)


def _describe(folder: Path) -> int:
    from refimpl.train.data import Shards

    s = Shards(folder)
    tokens, altering = sum([x.tokens for x in s.shards]), s.index["altering"]
    print(
        f"{folder}: {len(s.shards)} shards, {len(s):,} rows of {s.length}, {s.index['documents']:,} documents, {tokens:,} tokens"
    )
    print(
        f"padding {1 - tokens / (len(s) * s.length):.3%}, {s.index['packing']}, {s.dtype.name}, vocabulary {s.vocab_size:,}"
    )
    print(f"fill-in-the-middle {altering['fim']:g}, split {altering['split']:g}, longest {altering['most'] or 'any'}")
    print(f"tokenizer {s.tokenizer}\nfingerprint {s.fingerprint}")
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Progress by input bytes on standard error if a person is watching, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda p: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building", total=None)

        def show(p: Progress) -> None:
            text = f"{p.documents:,} documents, {p.tokens:,} tokens"
            bar.update(task, completed=min(p.done, p.total), total=p.total, description=text)

        yield show
