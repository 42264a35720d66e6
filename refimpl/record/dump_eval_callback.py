"""The text of llama.cpp's eval-callback (llama-eval-callback, llama-debug): nodes with their numbers, four decimals of each.

Of a tensor with more than six entries along an axis the program prints the first and last three, which is no tensor; only those
that are printed whole are used. Four decimals are known to 5e-5: a tap is declared to be of the narrowest dtype that errs by as
much in its smallest row, and left out if that is none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case

from .dump import Dump
from .tapmap import Part

_NODE = re.compile(r":\s+(\S[^=]*?) = \((\w+)\)\s+\S+\(.*\) = \{(\d+), (\d+), (\d+), (\d+)\}\s*$")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.\d+|inf|nan)(?![\w.])")
_DECIMALS = 0.5e-4
_UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-9}


def fits(path: Path) -> bool:
    """Whether it is a text with such nodes in its first lines."""
    if not path.is_file() or path.suffix in (".pt", ".pkl", ".safetensors", ".gguf"):
        return False
    with path.open(encoding="utf-8", errors="replace") as f:
        return any(_NODE.search(line) for line, _ in zip(f, range(2000), strict=False))


def open_dump(path: Path, case: Case) -> Dump:
    """The dump. SpecError for a case of several sequences, and where nothing is printed whole."""
    require(len(case.tokens) == 1, f"it shows one sequence; the case has {len(case.tokens)}")
    whole: dict[tuple[str, int], Array] = {}
    short, coarse, count = set[str](), set[str](), Counter[str]()
    with path.open(encoding="utf-8", errors="replace") as f:
        for name, kind, ne, numbers in _nodes(f):
            count[name] += 1
            if len(numbers) != np.prod(ne):
                short.add(name)
            else:
                exact = kind.startswith("i")
                whole[name, count[name]] = np.array(numbers, np.int64 if exact else np.float32).reshape(ne[::-1])
    require(
        whole,
        f"{len(short)} nodes, all of them printed in short: `refimpl record llamacpp --gguf FILE` records them whole",
    )

    def find(part: Part) -> Array | None:
        x = whole.get((part.path, part.nth))
        return None if x is None or (x.dtype.kind == "f" and not dtype_of(x)) else x

    kept = {name for name, _ in whole}
    coarse |= {name for (name, _), x in whole.items() if x.dtype.kind == "f" and not dtype_of(x)}
    notes = [f"{len(short - kept)} nodes are printed in short and were left out"] if short - kept else []
    notes += [f"four decimals say too little of {', '.join(sorted(coarse))}"] if coarse else []
    return Dump(find, notes=notes, precision_of=dtype_of)


def dtype_of(x: Array) -> str:
    """The dtype whose roundoff covers four decimals in the row with the smallest numbers; "" if that is none."""
    size = float(np.sqrt(np.mean(np.square(np.where(np.isfinite(x), x, 0)), axis=-1)).min(initial=np.inf))
    return next((name for name, unit in _UNITS.items() if unit * size >= _DECIMALS), "")


def _nodes(lines: Iterator[str]) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """(name, type, ne, the numbers that are printed) of every node."""
    head: re.Match[str] | None = None
    numbers: list[float] = []
    for line in lines:
        found = _NODE.search(line)
        if found or line.lstrip().startswith("sum ="):
            if head:
                yield head[1].strip(), head[2], [int(head[i]) for i in (3, 4, 5, 6)], numbers
            head, numbers = found, []
        elif head:
            numbers += [float(n) for n in _NUMBER.findall(line)]
    if head:
        raise SpecError(f"it ends in the middle of node {head[1].strip()!r}")
