"""One page a stage, written when the site is built: equation, source, shapes, dialect points, known bugs, tests, other names."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dtype_contract import contract

from refimpl.diff.corpus import MUTANTS
from refimpl.diff.names import frameworks
from refimpl.layers import STAGES, Dialect, variants
from refimpl.layers.stage import Stage
from refimpl.record.catalogue import Entry, everything
from refimpl.record.catalogue_text import COMPARED, GROUPS, group
from refimpl.spec_tests.sections import ids

DOCS = Path(__file__).parents[1]
REPOSITORY = DOCS.parent
assert variants.__doc__  # imported so that its stages are there
OF_WEIGHTS = {s.tap.removeprefix("weight"): s.name for s in STAGES.values() if s.tap.startswith("weight.")}
"""End of a tap -> its stage, where the tap begins with a weight's name: `.exp_avg` -> `optim.exp_avg`."""


def pages() -> dict[str, str]:
    """File name -> page, with an index that groups them."""
    told = tomllib.loads((DOCS / "equations.toml").read_text(encoding="utf-8"))
    tests, named = tests_of_stages(), {test: id for id, test in ids().items()}
    entries = everything()
    written = {
        f"{e.stage.name}.md": "\n".join(_page(e, told, list(_said(tests[e.stage.name], named)))) for e in entries
    }
    return written | {"index.md": "\n".join(_index(entries))}


def _page(e: Entry, told: dict[str, Any], tests: list[str]) -> Iterator[str]:
    stage, what = e.stage, e.stage.what
    yield from (f"# `{stage.name}`", "", f"{what[0].upper()}{what[1:]}. Report: {stage.eq}.", "")
    yield from ("$$", told["stages"][stage.name], "$$", "")
    yield from ("## In code", "", "```{literalinclude} ../../" + source_of(stage.fn))
    yield from (":language: python", f":pyobject: {stage.fn.__name__}", "```", "")
    yield from ("## What goes in and out", "", "| | |", "|---|---|")
    yield f"| axes | {stage.shape or 'a scalar'} |"
    yield f"| compared | {_cell(COMPARED[stage.compare])} |"
    yield f"| tap | `{e.tap}` |"
    yield f"| computed from | {', '.join(f'`{s}`' for s in e.sources) or 'nothing recorded'} |"
    yield from (
        "",
        *contract(e),
        *_dialect(stage.name, told["dialect"]),
        *_bugs(stage.name),
        *_elsewhere(e.tap),
        *tests,
    )


def source_of(fn: Any) -> str:
    """The file of a stage's function, from the root of the repository."""
    return inspect.unwrap(fn).__code__.co_filename.removeprefix(f"{REPOSITORY}/")


def _dialect(stage: str, points: dict[str, list[str]]) -> Iterator[str]:
    chosen = [point for point, stages in points.items() if stage in stages]
    if chosen:
        said = _sentences(Dialect)
        yield from (
            "## Where implementations may differ",
            "",
            "| point | values, ours first | evidence |",
            "|---|---|---|",
        )
        for point in chosen:
            values = ", ".join(f"`{v}`" for v in Dialect.choices()[point])
            yield f"| `{point}` | {values} | {said[point]} |"
        yield ""


@cache
def _sentences(of: type) -> dict[str, str]:
    """Field -> the string below it."""
    (body,) = ast.parse(inspect.getsource(of)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def _bugs(stage: str) -> Iterator[str]:
    known = [m for m in MUTANTS.values() if stage in (m.stage, *m.also)]
    if known:
        yield from ("## Known bugs", "", "| id | what is wrong | where it happened | shows with |", "|---|---|---|---|")
        yield from (f"| {m.id} | {_cell(m.title)} | {_cell('; '.join(m.threads))} | {_cell(m.regime)} |" for m in known)
        yield ""


def _elsewhere(tap: str) -> Iterator[str]:
    names = {f.name: f.says(tap) for f in frameworks() if f.says(tap)}
    if names:
        yield from ("## In other implementations", "", "| implementation | name |", "|---|---|")
        yield from (f"| {name} | {_cell(said)} |" for name, said in names.items())
        yield ""


def _said(tests: list[str], named: dict[str, str]) -> Iterator[str]:
    """Tests as the lines of a list, with their ids."""
    yield from ("## Tests that mention it", "")
    for test in tests:
        id = named.get(re.sub(r"^.*/test_(\w+)\.py::test_", r"\1::", test))
        yield f"- `{test}` ({id})" if id else f"- `{test}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def tests_of_stages() -> dict[str, list[str]]:
    """Stage -> path::test of every test function that names it, in a string or as the thing itself."""
    found: dict[str, list[str]] = {name: [] for name in STAGES}
    for file in sorted((REPOSITORY / "spec_tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known = dict(_known(tree))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for name in _words(node, known) & found.keys():
                    found[name].append(f"{file.relative_to(REPOSITORY).as_posix()}::{node.name}")
    claims = (REPOSITORY / "spec_tests/conformance/ids.txt").read_text(encoding="utf-8").split("\n")
    for name, tests in found.items():
        tests += [f"conformance {c.split()[0]}" for c in claims if c.startswith(f"ST-{name} ")]
    return found


def _known(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Name in the file -> what of the layers it is, or the words of the constant that it is."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("refimpl.layers"):
            module = import_module(node.module)
            yield from ((a.asname or a.name, getattr(module, a.name)) for a in node.names)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, _words(node.value, {})


def _words(node: ast.AST, known: dict[str, Any]) -> set[str]:
    """The words of strings, `cache.positions` and what else has an attribute, and the names of the stages that are used."""
    words: set[str] = set()
    for part in ast.walk(node):
        used: Any = None
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            words |= {w for found in re.findall(r"[\w.]+", part.value) for w in (found, f"variant.{found}")}
            words |= {name for end, name in OF_WEIGHTS.items() if part.value.endswith(end)}
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            words.add(f"{part.value.id}.{part.attr}")
            used = getattr(known.get(part.value.id), part.attr, None)
        elif isinstance(part, ast.Name):
            used = known.get(part.id)
        words |= {used.name} if isinstance(used, Stage) else used if isinstance(used, set) else set()
    return words


def _index(entries: list[Entry]) -> Iterator[str]:
    yield from (
        "# Stages",
        "",
        "The model is a list of stage calls. A stage's name is never used again for anything else.",
        "",
    )
    for key, title in GROUPS.items():
        chosen = [e.stage.name for e in entries if group(e) == key]
        if chosen:
            yield from (f"## {title.partition(' (')[0]}", "", "```{toctree}", ":maxdepth: 1", "", *chosen, "```", "")


def written(name: str, made: dict[str, str]) -> None:
    """docs/NAME/ holds these pages and no others; what did not change is not touched, so that a second build is short."""
    folder = DOCS / name
    folder.mkdir(exist_ok=True)
    for old in set(folder.glob("*.md")) - {folder / page for page in made}:
        old.unlink()
    for page, text in made.items():
        if not (folder / page).exists() or (folder / page).read_text(encoding="utf-8") != text:
            (folder / page).write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Before Sphinx looks for pages."""
    app.connect("builder-inited", lambda app: written("stages", pages()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
