"""What an engine showed, as a file: our own form (schema refimpl-shown/1), or a reply as it came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require, where
from refimpl.checkpoint import Transaction, json_object

from .replies import Words, whole
from .shown import Entry, Place, Shown, logprob, number

SCHEMA = "refimpl-shown/1"


def read(path: str | Path, tokens: list[list[int]]) -> Shown:
    """A JSON file: ours (schema refimpl-shown/1), or an OpenAI-compatible reply whose choices are the case's rows. SpecError for
    anything else, and for other tokens than the case's.
    """
    path = Path(path)
    d = json_object(path)
    with where(f"while reading {path}"):
        if "choices" in d:
            require(isinstance(d["choices"], list), "choices is no list")
            require(len(d["choices"]) == len(tokens), f"{len(d['choices'])} choices; the case has {len(tokens)} rows")
            rows = [whole(d, b, row, Words()) for b, row in enumerate(tokens)]
            return Shown(tokens, {(b, t): e for b, r in enumerate(rows) for t, e in r.items()}, source=f"reply {path}")
        require(d.get("schema") == SCHEMA, f"schema {d.get('schema')!r}; expected {SCHEMA!r}, or a reply with choices")
        require(d.get("tokens") == tokens, "its tokens are not those of the case")
        places = dict(_places(d.get("logprobs"), tokens))
        chosen = {p: int(e) for p, e in _grid(d.get("chosen"), tokens, "chosen") if isinstance(e, int)}
        require(isinstance(d.get("unnamed", []), list), "unnamed is no list of token ids")
        unnamed = frozenset([number(i, "token id") for i in d.get("unnamed", [])])
        return Shown(tokens, places, chosen, source=str(d.get("source") or path), unnamed=unnamed)


def write(shown: Shown, path: str | Path) -> None:
    """The file that `read` takes; what was asked again is left out."""
    rows = [[shown.places.get((b, t)) for t in range(len(row))] for b, row in enumerate(shown.tokens)]
    chosen = [[shown.chosen.get((b, t)) for t in range(len(row))] for b, row in enumerate(shown.tokens)]
    texts = [[None if e is None else {str(i): x for i, x in e.items()} for e in row] for row in rows]
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "source": shown.source,
        "tokens": shown.tokens,
        "logprobs": texts,
        "chosen": chosen,
    }
    content["unnamed"] = sorted(shown.unnamed)
    with Transaction() as files, files.new(Path(path)) as f:
        f.write(json.dumps(content).encode() + b"\n")


def _places(rows: Any, tokens: list[list[int]]) -> Iterator[tuple[Place, Entry]]:
    for place, entry in _grid(rows, tokens, "logprobs"):
        if entry is not None:
            require(
                isinstance(entry, dict),
                f"logprobs of row {place[0]}, position {place[1]}: {entry!r}; expected an object",
            )
            yield place, {number(i, "token id"): logprob(x) for i, x in entry.items()}


def _grid(rows: Any, tokens: list[list[int]], what: str) -> Iterator[tuple[Place, Any]]:
    rows = [[]] * len(tokens) if rows is None else rows
    fit = isinstance(rows, list) and len(rows) == len(tokens) and all(isinstance(r, list) for r in rows)
    require(fit, f"{what} is no list of {len(tokens)} rows")
    for b, row in enumerate(rows):
        require(len(row) <= len(tokens[b]), f"{what}: row {b} has {len(row)} entries for {len(tokens[b])} tokens")
        yield from (((b, t), entry) for t, entry in enumerate(row))
