"""A finding as a folder that anybody can run: a script that needs NumPy alone, and the smallest inputs that still show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction
from refimpl.layers.stage import Call

from .examined import Examined
from .gradients import gradient_name
from .part import Index, Part, smallest
from .plain import function_of, literal, plain
from .tangents import along, ends, is_gradient, seeds
from .tolerance import comparable

_KINDS = {
    "value": '''
def measure(x, e):
    """How far x is from e, relative to the size of the row that they belong to."""
    x, e = comparable(x, e)
    return float(np.linalg.norm(x - e)) / SIZE
''',
    "lean": '''
def measure(x, e):
    """By how much all of x leans one way: a - 1 in x = a e."""
    x, e = comparable(x, e)
    return abs(float(np.sum((x - e) * e)) / float(np.sum(e * e)))
''',
    "set": '''
def measure(x, e):
    """0 if both hold the same, in whatever order, else 1."""
    return float(not np.array_equal(np.sort(x, axis=-1), np.sort(e, axis=-1)))
''',
    "exact": '''
def measure(x, e):
    """How many numbers differ."""
    return float(np.sum(np.asarray(x) != e))
''',
}


@dataclass(frozen=True)
class Repro:
    """The script, the arrays of inputs.npz, and what they show."""

    script: str
    arrays: dict[str, Array]
    shown: str
    differs: bool

    def write(self, folder: Path) -> None:
        """`repro.py` and `inputs.npz` in a folder, which is made; both or none."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"{folder}: cannot be made: {error.strerror or error}") from error
        with where(f"while writing {folder}"), Transaction() as files:
            with files.new(folder / "inputs.npz") as f:
                np.savez_compressed(f, **self.arrays)
            with files.new(folder / "repro.py") as f:
                f.write(self.script.encode())


def repro(x: Examined, at: Index | None = None) -> Repro:
    """The reproducer of a tap's finding: of its worst row (or of the row that `at` is in), cut to one number where that shows it
    too. SpecError for a stage that cannot be written out.
    """
    require(not x.finding.open, f"{x.finding.tap}: {x.finding.note}: there is no row to show")
    with np.errstate(all="ignore"):
        kind, part = _shrunk(x, at)
    candidate = part.of_result(x.candidate())
    arrays = {n: _stored(a) for n, a in part.leaves.items()} | {"candidate": _stored(candidate)}
    place = list(part.origin(part.tap, part.at)) if kind != "lean" else "all of it"
    script = _script(x, part, kind, str(place))
    limit = x.finding.allowed if kind == "value" else 0.0
    row = part.origin(part.tap, part.at)[: max(x.step.exact.ndim - 1, 0)]
    differs = kind == "lean" or float(x.errors()[row]) > limit
    return Repro(script, arrays, f"{part.tap} {place}, {_sizes(arrays)}", differs)


def _shrunk(x: Examined, at: Index | None) -> tuple[str, Part]:
    """How the finding is measured, and the smallest part that shows it."""
    f, compare = x.finding, x.stage.compare
    rows = x.errors()
    leans = compare not in ("set", "exact") and f.lean > f.upright and float(rows.max(initial=0)) <= f.allowed
    if leans and at is None:
        return "lean", x.part(())
    kind = compare if compare in ("set", "exact") else "value"
    row = x.worst_row() if at is None else at[:-1]
    one = x.worst_in(row) if at is None else at
    if kind == "set":
        return kind, smallest(x.part(row))
    if kind == "exact" or _alone(x, row, one):
        return kind, smallest(x.part(one))
    return kind, smallest(x.part(row))


def _alone(x: Examined, row: Index, one: Index) -> bool:
    """Whether the one number is by itself further off than its whole row may be."""
    a, e = (np.asarray(v[one], np.float64)[None] for v in (x.candidate(), x.step.exact))
    a, e = comparable(a, e)
    return bool(np.abs(a - e).max() > x.finding.allowed * x.size(row))


def _stored(a: Array) -> Array:
    """In a dtype that NumPy alone can read, and no wider than the numbers need."""
    a = np.asarray(a)
    if a.dtype.kind in "iub":
        return a
    with np.errstate(over="ignore"):
        narrow = a.astype(np.float32)
    return (
        narrow
        if np.array_equal(narrow.astype(np.float64), a.astype(np.float64), equal_nan=True)
        else a.astype(np.float64)
    )


def _sizes(arrays: Mapping[str, Array]) -> str:
    return f"{len(arrays) - 1} inputs of {sum(a.size for a in arrays.values()) - arrays['candidate'].size} numbers"


def _script(x: Examined, part: Part, kind: str, place: str) -> str:
    f = x.finding
    backwards = is_gradient(part.calls[-1])
    stages = list(dict.fromkeys([r.stage for c in part.calls for r in c.static.get("readers", (c,))]))
    limit = {"value": f.allowed, "lean": f.upright}.get(kind, 0.0)
    size = x.size(part.origin(part.tap, part.at)[: max(len(x.step.exact.shape) - 1, 0)]) if kind == "value" else 1.0
    helpers: list[Callable[..., Any]] = [comparable] if kind in ("value", "lean") else []
    helpers += [along] if backwards else []
    text = plain(stages, helpers)
    at = ", ".join(map(str, part.at)) or "..."
    return _TEMPLATE.format(
        title=f"{part.tap} {place}: {x.stage.what} ({x.stage.eq})",
        case=_provenance(x),
        imports=_imports(text),
        functions=text,
        lines=_backwards(part) if backwards else "\n".join(_line(c, last=c is part.calls[-1]) for c in part.calls),
        measure=_KINDS[kind].strip("\n"),
        at=at,
        size=repr(size),
        limit=repr(float(limit)),
        tap=part.tap,
        what={
            "value": "of the row's size",
            "lean": "of all of it, one way",
            "set": "sets that differ",
            "exact": "numbers that differ",
        }[kind],
    )


def _imports(text: str) -> str:
    """What the script needs of Python's own library."""
    used = {
        "import math": "math.",
        "import sys": "",
        "from pathlib import Path": "",
        "from types import SimpleNamespace": "yarn.",
    }
    return "\n".join([line for line, word in used.items() if word in text])


def _provenance(x: Examined) -> str:
    note = f"\nThe diff says: {x.finding.note}" if x.finding.note else ""
    return f"Stage {x.stage.name}, as `refimpl repro` found it in a recorded run.{note}"


def _backwards(part: Part) -> str:
    """The body of `expected` for a gradient: number by number, from how the forward values move with what it is by."""
    last, forward = part.calls[-1], [c for c in part.calls if not is_gradient(c)]
    name, shape = last.static["name"], part.shape
    steps, seen = [f't = {{"{name}": np.zeros({shape})}}', f't["{name}"][place] = 1'], {name}
    for call, r in seeds(part.calls):
        x = call.static["name"]
        step = f'along(lambda x: {_called(r, x)}, a["{x}"], t["{x}"])'
        steps.append(f't["{r.tap}"] = ' + (f't["{r.tap}"] + ' if r.tap in seen else "") + step)
        seen.add(r.tap)
    sums = [f'np.sum(t["{tap}"] * a["{gradient_name(tap)}"])' for tap in ends(part.calls)]
    body = [*steps, f"found[place] = {' + '.join(sums)}"]
    head = [f"found, wanted = np.zeros({shape}), np.zeros({shape}, bool)", "wanted[AT] = True"]
    lines = [_line(c, last=False).strip() for c in forward] + [*head, "for place in map(tuple, np.argwhere(wanted)):"]
    return "\n".join([f"    {line}" for line in lines] + [f"        {line}" for line in body] + ["    return found"])


def _line(call: Call, *, last: bool) -> str:
    """One call as a line of `expected`."""
    target = "return" if last else f'a["{call.tap}"] ='
    return f"    {target} {_called(call)}"


def _called(call: Call, x: str = "") -> str:
    """The call of a stage, what is called x in the place of that name."""
    args = [_argument(a, x) for a in call.args] + [f"{n}={literal(v)}" for n, v in call.static.items()]
    return f"{function_of(call.stage)}({', '.join(args)})"


def _argument(arg: Any, x: str = "") -> str:
    if isinstance(arg, tuple):
        return f"({''.join(f'{_argument(a, x)}, ' for a in arg)})"
    if x and arg == x:
        return "x"
    return f'a["{arg}"]' if isinstance(arg, str) else literal(arg)


_TEMPLATE = '''"""{title}

{case}

Run it beside inputs.npz: `python repro.py`. It needs NumPy and nothing else, and exits 1 while the candidate differs from
the specification, 0 once it does not. Put your own function in the place of `candidate`.
"""

{imports}

import numpy as np

AT = np.s_[{at}]  # what is compared, of the arrays here
SIZE = {size}  # of the row that it belongs to
ALLOWED = {limit}


# ---- The specification, in its own words


{functions}


# ---- This call


def expected(a):
    """{tap} by the specification, from the inputs `a` (float64)."""
{lines}


def candidate(a):
    """What was recorded. Return your implementation's output for the inputs `a` instead, in the shape of `expected`."""
    return a["candidate"]


{measure}


def main():
    with np.load(Path(__file__).with_name("inputs.npz"), allow_pickle=False) as file:
        given = {{n: file[n] for n in file.files}}
    exact = {{n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in given.items() if n != "candidate"}}
    with np.errstate(all="ignore"):
        e, x = np.asarray(expected(dict(exact)))[AT], np.asarray(candidate(given))[AT]
        off = measure(x, e)
    print("{tap}", AT)
    print("expected  ", np.array2string(np.asarray(e), threshold=12))
    print("candidate ", np.array2string(np.asarray(x), threshold=12))
    with np.errstate(all="ignore"):
        print("difference", np.array2string(np.asarray(x, np.float64) - e, threshold=12))
    print(f"off by     {{off:.3e}} {what}, allowed {{ALLOWED:.3e}}")
    print("DIFFERS" if not off <= ALLOWED else "agrees")
    return int(not off <= ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
'''
