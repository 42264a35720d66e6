"""The samples of a task: a JSONL file as token ids, packed in rows of one length, every row of one task only.

    {"prompt": "3 + 4", "answer": "7"}        cross-entropy: the answer is learned, and that it ends
    {"prompt": "a good day", "value": 0.9}    regression: the number is read off the prompt's last token

A row holds whole samples only: cutting one would separate an answer from its prompt. Ids of all samples are held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.loss import IGNORE
from refimpl.train.data import Tokenizer, best_fit
from refimpl.train.data.tokenizer import EOS
from refimpl.train.recipe import Task


@dataclass(frozen=True)
class Sample:
    """Ids of a prompt (n,), prefix in it; of an answer (m,), or none and the number to be told."""

    prompt: Array
    answer: Array
    value: float = float("nan")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def samples(path: Path, task: Task, tokenizer: Tokenizer) -> list[Sample]:
    """The samples of a file for a task. SpecError for a line that is none of this task: which, and what was expected."""
    lines = _lines(path)
    found = []
    for number, d in lines:
        with where(f"in {path}, line {number}"):
            found.append(_read(d, task))
    require(found, f"{path} holds no sample")
    prompts = tokenizer.encode([task.prefix + prompt for prompt, _ in found])
    if task.loss == "regression":
        return [Sample(p, np.empty(0, np.int64), float(v)) for p, (_, v) in zip(prompts, found, strict=True)]
    end = np.array([tokenizer.ids[EOS]])
    answers = tokenizer.encode([str(answer) for _, answer in found])
    return [Sample(p, np.concatenate([a, end])) for p, a in zip(prompts, answers, strict=True)]


def _lines(path: Path) -> list[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise SpecError(f"{path}, line {number}: not JSON: {error}") from error
    return found


def _read(d: Any, task: Task) -> tuple[str, str | float]:
    """(prompt, answer or value) of a line."""
    require(isinstance(d, Mapping), f"{d!r:.60}; expected an object")
    prompt, key = d.get("prompt"), "value" if task.loss == "regression" else "answer"
    require(isinstance(prompt, str) and task.prefix + prompt, f"prompt is {prompt!r}; expected a text")
    given = d.get(key)
    if key == "answer":
        require(isinstance(given, str), f"answer is {given!r}; a task of {task.loss} learns a text")
    else:
        fits = isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < float("inf")
        require(fits, f"value is {given!r}; a task of {task.loss} learns a finite number")
    return str(prompt), given if isinstance(given, str) else float(given)


class Rows:
    """The samples of a task packed in rows of `length`, longest first into the fullest row with room. SpecError for one that is
    longer than a row.
    """

    def __init__(self, found: Sequence[Sample], length: int, masked: bool, pad: int, source: str) -> None:
        for i, sample in enumerate(found, 1):
            fits = len(sample) <= length
            require(fits, f"{source}, sample {i}: {len(sample)} tokens; a row has {length}")
        self.length, self.masked, self.pad, self.source = length, masked, pad, source
        self._rows: list[list[tuple[Sample, int]]] = []
        for piece in best_fit([len(sample) for sample in found], length):
            if piece.row == len(self._rows):
                self._rows.append([])
            self._rows[piece.row].append((found[piece.document], piece.at))

    def __len__(self) -> int:
        return len(self._rows)

    def placed(self, row: int) -> list[tuple[Sample, int]]:
        """The samples of a row, each with the place of its first token."""
        return self._rows[row]

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same samples in the same rows only."""
        sums = sha256(json.dumps([self.length, self.masked]).encode())
        for row in self._rows:
            for sample, at in row:
                sums.update(
                    json.dumps([at, *sample.prompt.tolist(), -1, *sample.answer.tolist(), sample.value]).encode()
                )
        return "sha256:" + sums.hexdigest()

    def filled(self, rows: Array) -> dict[str, Array]:
        """tokens, labels (-100 but on answers), targets (NaN but where a number is told), valid, documents (B, S) of rows (B,).

        Samples of a row are documents 1, 2, ... of it, or one if the task is not masked; padding is 0.
        """
        shape = (len(rows), self.length)
        tokens, labels = np.full(shape, self.pad, np.int64), np.full(shape, IGNORE, np.int64)
        targets, documents = np.full(shape, np.nan), np.zeros(shape, np.int64)
        for b, row in enumerate(rows.tolist()):
            for number, (sample, at) in enumerate(self._rows[row], 1):
                middle, end = at + len(sample.prompt), at + len(sample)
                tokens[b, at:end] = np.concatenate([sample.prompt, sample.answer])
                labels[b, middle:end] = sample.answer
                targets[b, middle - 1] = sample.value
                documents[b, at:end] = number if self.masked else 1
        return {
            "tokens": tokens,
            "labels": labels,
            "targets": targets,
            "valid": (documents > 0).astype(np.int64),
            "documents": documents,
        }
