"""Reads the shapes in docstrings and checks calls against them.

The language: `name (A, B C, 2 D, ...)`, juxtaposition multiplies, `+ - /` and inner parentheses as
usual; `*` and `...` stand for any number of axes; `int` and `or None` may follow; `E times name (..)`
is a starred argument; the result comes after the last `->`, with or without a name. A letter means
one number within one docstring.
"""

import ast
import inspect
import re
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import data_of

WILD = ("*", "...")


class ShapeError(AssertionError):
    """A call that its docstring does not describe, or a docstring that describes no call."""


@dataclass(frozen=True)
class Described:
    """One shape of a docstring: its terms, whether it is said to be int, to be possibly None."""

    name: str
    terms: tuple
    is_int: bool
    optional: bool
    times: str | None


def closing(text, start):
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ShapeError(f"unclosed parenthesis in {text[start:]!r}")


def terms_of(text):
    """`H (Dn+Dr), Q` -> ("H (Dn+Dr)", "Q"), split at the commas outside parentheses."""
    parts, depth = [""], 0
    for ch in text:
        depth += {"(": 1, ")": -1}.get(ch, 0)
        if ch == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += ch
    return tuple(p.strip() for p in parts if p.strip())


def _described(doc, match, name, times=None):
    end = closing(doc, match.end() - 1)
    after = re.match(r"(?P<int> int\b)?(?P<none> or None\b)?", doc[end + 1 :])
    found = terms_of(doc[match.end() : end])
    return Described(name, found, bool(after["int"]), bool(after["none"]), times), end


def describe(fn, doc=None):
    """({parameter: Described}, Described result or None, whether shapes broadcast) of a function."""
    doc = " ".join((doc or fn.__doc__ or "").split())
    inputs, last = {}, 0
    for p in inspect.signature(fn).parameters.values():
        starred = p.kind is p.VAR_POSITIONAL
        name = p.name.removesuffix("s") if starred else p.name
        times = r"(?P<times>[A-Z]) times " if starred else ""
        pattern = rf"(?<![\w.^]){times}{name} \((?=[\w\s,+/().*-]*\))"  # what is in quotes is no shape
        match = re.search(pattern, doc)
        if match and p.kind is not p.KEYWORD_ONLY:
            count = match["times"] if starred else None
            inputs[p.name], end = _described(doc, match, p.name, count)
            last = max(last, end)
    match = re.compile(r"-> (\w+ )?\(").search(doc, last)
    result = _described(doc, match, "result")[0] if match else None
    return inputs, result, "broadcast" in doc


def value(term, letters):
    """The number a term stands for, or None if it has a letter without value."""
    text = re.sub(r"(?<=[\w)])\s*(?=[A-Z(])|(?<=\d)\s*(?=[a-z])|(?<=[\w)]) (?=\w)", "*", term)
    text = re.sub(r"([A-Za-z])\*([a-z])", r"\1\2", text)  # Dn is one letter
    names = {n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)}
    missing = names - letters.keys()
    if missing:
        return None if len(missing) > 1 else (text, missing.pop())
    return eval(text, {}, dict(letters))


def solve(term, size, letters):
    """Give the one unknown letter of a term its value; terms are linear in each letter."""
    text, unknown = term
    at0, at1 = (eval(text, {}, dict(letters) | {unknown: v}) for v in (0, 1))
    found = (size - at0) / (at1 - at0)
    if found != int(found) or found < 0:
        raise ShapeError(f"{text} cannot be {size}")
    letters[unknown] = int(found)


def spread(described, shape):
    """[(term, size)], with the axes of a wildcard as one pair (wildcard, tuple)."""
    terms = described.terms
    wild = [i for i, t in enumerate(terms) if t in WILD]
    if not wild:
        if len(terms) != len(shape):
            raise ShapeError(f"{described.name} is {shape}, described with {len(terms)} axes")
        return list(zip(terms, shape, strict=True))
    if len(wild) > 1 or len(shape) < len(terms) - 1:
        raise ShapeError(f"{described.name} is {shape}, described as {terms}")
    i, behind = wild[0], len(terms) - wild[0] - 1
    stop = len(shape) - behind
    return [
        *zip(terms[:i], shape[:i], strict=True),
        (terms[i], tuple(shape[i:stop])),
        *zip(terms[i + 1 :], shape[stop:], strict=True),
    ]


def bind(pairs, letters, broadcast=False):
    """Give every letter its value and every term its check. Leaves alone what two unknowns hide."""
    wild, pending = {}, []
    for term, size in pairs:
        if term not in WILD:
            pending.append((term, size))
        elif broadcast:
            wild[term] = np.broadcast_shapes(wild.get(term, ()), size)
        elif wild.setdefault(term, size) != size:
            raise ShapeError(f"{term} is {wild[term]} elsewhere but {size} here")
    while pending:
        left = []
        for term, size in pending:
            known = value(term, letters)
            if isinstance(known, tuple):
                solve(known, size, letters)
            elif known is None:
                left.append((term, size))
            elif known != size:
                raise ShapeError(f"{term} is {known:g} elsewhere but {size} here")
        if len(left) == len(pending):
            return letters
        pending = left
    return letters


def check_call(fn, args, out, doc=None, **letters):
    """The letters of a call fn(*args) -> out; ShapeError unless the docstring describes it."""
    inputs, result, broadcast = describe(fn, doc)
    pairs = []
    for p, values in _by_parameter(fn, args):
        described = inputs.get(p.name)
        for a in values:
            pairs += _of_argument(p.name, described, a)
        if described and described.times:
            pairs.append((described.times, len(values)))
    if result is not None:
        pairs += _of_argument("result", result, out)
    return bind(pairs, dict(letters), broadcast)


def _by_parameter(fn, args):
    """(parameter, [its arguments]): a starred one takes all that are left."""
    rest = list(args)
    for p in inspect.signature(fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            yield p, rest
        elif p.kind is not p.KEYWORD_ONLY and rest:
            yield p, [rest.pop(0)]


def _of_argument(name, described, a):
    if isinstance(a, tuple | int | float):  # scalars, settings
        return []
    if described is None:
        raise ShapeError(f"{name} has no shape in the docstring")
    if a is None:
        if not described.optional:
            raise ShapeError(f"{name} is None, which the docstring does not say")
        return []
    if described.is_int and data_of(a).dtype.kind not in "iu":
        raise ShapeError(f"{name} is {a.dtype}, the docstring says int")
    return spread(described, tuple(a.shape))
