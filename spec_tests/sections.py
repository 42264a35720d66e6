"""Which section of the report (R) every test is about, its id, and the table of sentences.

A test's section is the first "R 2.1.2" of its own docstring, else of its file's, else that of its folder: `r2_1_...` is 2.1. Ids
are given once and never again (ids.txt); sentences.toml has the report's sentences and which tests hold us to them.
"""

import ast
import functools
import pathlib
import re
import textwrap
import tomllib
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
IDS, SENTENCES = HERE / "ids.txt", HERE / "sentences.toml"
GONE, NEXT = "gone", "next"
HEAD = """\
<!-- generated: `python .ci/sections.py` from spec_tests/sentences.toml and the tests; edit those -->

# Section, sentence, tests

The [technical report](https://arxiv.org/abs/2412.19437) sentence by sentence, as short as it goes, and the tests that hold this
specification to it. `pytest --section 2.1.2` runs what is about a section; `pytest --collect-only -qq --claims` lists all claims;
`file::name` below is `test_name` of `test_file.py`, its id behind it.
"""


class Test(NamedTuple):
    """file::name without `test_`; the folder's section and its own; what it catches."""

    key: str
    folder: str
    section: str
    catches: str


def folder_section(folder: str) -> str:
    """`r2_1_attention_and_experts` -> 2.1; "" for what is no section's."""
    found = re.match(r"r(\d(?:_\d)*)_[a-z]", folder)
    return found[1].replace("_", ".") if found else ""


def section_of(folder: str, *docs: str | None) -> str:
    """The first section that a docstring names and that lies in the folder's part of R, else the folder's."""
    own = folder_section(folder)
    for text in docs:
        for named in re.findall(r"\bR (\d(?:\.\d+)*)", text or ""):
            if own and named.startswith(own):
                return named
    return own


@functools.cache
def tests() -> tuple[Test, ...]:
    """Every test function of the report's sections, in the order of the files."""
    found = []
    for path in sorted(HERE.glob("r[0-9]*/test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                doc, folder = ast.get_docstring(node), path.parent.name
                key = f"{path.stem.removeprefix('test_')}::{node.name.removeprefix('test_')}"
                section = section_of(folder, doc, ast.get_docstring(tree))
                found.append(Test(key, folder_section(folder), section, (doc or "").partition("\n")[0]))
    return tuple(found)


def ids() -> dict[str, str]:
    """id -> test, `gone` or, for the last of each section, `next`."""
    return dict(line.split(" ", 1) for line in IDS.read_text(encoding="utf-8").splitlines())


def renewed(told: dict[str, str]) -> dict[str, str]:
    """The ids with new tests behind the old; what is no test any more is gone, and so is its id."""
    there, found = {f"{t.folder} {t.key}" for t in tests()}, {}
    for folder in sorted({t.folder for t in tests()}):
        old = [v for k, v in told.items() if k.rpartition("-")[0] == folder and v != NEXT]
        kept = [v if f"{folder} {v}" in there else GONE for v in old]
        new = [t.key for t in tests() if t.folder == folder and t.key not in old]
        found |= {f"{folder}-{i:03}": v for i, v in enumerate([*kept, *new, NEXT], 1)}
    return found


def sentences() -> dict[str, dict]:
    """id -> eq, says, tests, and `open` where there are none."""
    return tomllib.loads(SENTENCES.read_text(encoding="utf-8"))


def rendered() -> str:
    """docs/sections.md."""
    named, told = {v: k for k, v in ids().items()}, {k: s for k, s in sentences().items() if "gone" not in s}
    parts = [HEAD, "| section | sentences | with tests | tests |\n|---|---|---|---|"]
    tops = list(dict.fromkeys(_top(k) for k in told))
    for top in tops:
        here = [s for k, s in told.items() if _top(k) == top]
        about = sum(1 for t in tests() if t.section.startswith(top))
        parts.append(f"| {top} | {len(here)} | {sum(bool(s['tests']) for s in here)} | {about} |")
    parts += ["", "## Gaps\n", *[_gap(k, s) for k, s in told.items() if not s["tests"]]]
    for top in tops:
        parts += [f"\n## {top}\n", "| | eq | says | tests |\n|---|---|---|---|"]
        for k, s in told.items():
            if _top(k) == top:
                held = "<br>".join(f"`{t}` ({named[t]})" for t in s["tests"]) or s["open"]
                parts.append(f"| {k} | {s.get('eq', '')} | {s['says']} | {held} |")
    return "\n".join(parts) + "\n"


def _top(id: str) -> str:
    return ".".join(id.partition("-")[0].split(".")[:2])


def _gap(id: str, s: dict) -> str:
    return textwrap.fill(f"- {id}, {s['says']}: {s['open']}", 138, subsequent_indent="  ")


def mark(items, pytest, wanted: str) -> list:
    """Give every collected test the marker of its section; -> those of the wanted one, all if none is."""
    kept = []
    for item in items:
        doc, module = getattr(item, "function", item).__doc__, getattr(item, "module", None)
        section = section_of(item.path.parent.name, doc, getattr(module, "__doc__", None))
        if section:
            item.add_marker(pytest.mark.section(section))
        if not wanted or section == wanted or section.startswith(f"{wanted}."):
            kept.append(item)
    return kept


def claims(items) -> list[str]:
    """Lines: a heading for every section, then each test function's id and name as words; what is no section's by its folder."""
    named, lines = {v: k for k, v in ids().items()}, {}
    for item in items:
        found = item.get_closest_marker("section")
        at = f"R {found.args[0]}" if found else item.path.parent.name
        name = getattr(item, "originalname", item.name).removeprefix("test_")
        id = named.get(f"{item.path.stem.removeprefix('test_')}::{name}", "")
        lines.setdefault(at, {})[f"  {id:<8}{name.replace('_', ' ')}"] = None
    return [line for at in sorted(lines) for line in (at, *lines[at])]
