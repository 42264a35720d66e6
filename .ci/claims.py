"""Write docs/claims.md from docs/claims/*.toml: what articles say of DeepSeek-V3, held against what is published and measured.

    python .ci/claims.py            rewrites the page
    python .ci/claims.py --check    exits 1 if the page is not what the rows say

One TOML file an article. A `[[claim]]` has an id that is never reused, the place it stands `in` (", code" behind it for code),
what it `says`, a `verdict`, and evidence: `report` (sections, equations, tables), `config` (keys of the released config.json),
`why` (a sentence), `run` with what it `gives` (a command and text that it prints), `shown` (tests). `here` names stages, files or
functions that hold the mechanism all the same. spec_tests/tools/test_claims.py checks every one of them.
"""

import argparse
import os
import pathlib
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
VERDICTS = ("true of V3", "false", "not verifiable")
TESTS = "spec_tests/tools/test_claims_code.py"
HEAD = """\
<!-- generated: `python .ci/claims.py` from docs/claims/*.toml; edit those -->

# Claims

What five widely read articles say of DeepSeek-V3, statement by statement, held against what is published and what can be
measured here. R is the [technical report](https://arxiv.org/abs/2412.19437); `key` = value is the released `config.json`; a
command prints what stands behind it. Where this repository has the mechanism all the same, its stage, file or function is named.

- **true of V3**: the report, the released config or code says so, or we measured it. Benchmark scores are quoted, not measured.
- **false**: one of them says otherwise, or the statement contradicts itself. What an article says the report says is false if the
  report does not say it. What is recommended for V3, or told of it, and differs from how V3 is made is false as a statement of V3.
- **not verifiable**: nothing published decides it; numbers without a source, other products, general advice.

Claims are translated and shortened; code is described, not quoted, with what it would really compute; the tests named run a NumPy
translation of it.
"""


def articles() -> list[dict[str, Any]]:
    """The files' contents, in the order of their names."""
    return [tomllib.loads(f.read_text(encoding="utf-8")) for f in sorted((DOCS / "claims").glob("*.toml"))]


def rendered() -> str:
    """The whole page."""
    found = articles()
    parts = [HEAD, *summary(found)]
    for number, article in enumerate(found, 1):
        parts += section(number, article)
    return "\n".join(parts)


def summary(found: list[dict[str, Any]]) -> Iterator[str]:
    """Claims per article and verdict, as a table."""
    yield f"| article | claims | {' | '.join(VERDICTS)} |\n|---|---|---|---|---|"
    every: Counter[str] = Counter()
    for number, article in enumerate(found, 1):
        counts = Counter(c["verdict"] for c in article["claim"])
        every += counts
        yield row(f"{number}. {article['english']}", counts)
    yield row("all", every) + "\n"


def row(name: str, counts: Counter[str]) -> str:
    """A line of the summary."""
    return f"| {name} | {counts.total()} | {' | '.join(str(counts[v]) for v in VERDICTS)} |"


def section(number: int, article: dict[str, Any]) -> Iterator[str]:
    """An article: its title and origin, then its claims by section, in its own order."""
    yield f"## {number}. {article['english']}\n"
    yield textwrap.fill(f"{article['title']}; {article['origin']}.", 120) + "\n"
    last = ""
    for claim in article["claim"]:
        place, _, kind = claim["in"].partition(", ")
        if place != last:
            yield f"### {place}\n"
            last = place
        yield item(claim, kind)


def item(claim: dict[str, Any], kind: str) -> str:
    """One claim as a list item: id, verdict, statement; then the evidence; then where the mechanism is."""
    first = f"- **{claim['id']}** *{claim['verdict']}*{f' ({kind})' if kind else ''}: {claim['says']}"
    lines = [first, *evidence(claim)]
    if "here" in claim:
        lines.append("Here: " + ", ".join(f"`{h.replace(':', '`, `')}`" for h in claim["here"]) + ".")
    wrapped = [
        textwrap.fill(x, 138, initial_indent="  " if i else "", subsequent_indent="  ") for i, x in enumerate(lines)
    ]
    return "\\\n".join(wrapped) + "\n"


def evidence(claim: dict[str, Any]) -> Iterator[str]:
    """Reference and reason on one line, the command on another, the tests on a third."""
    said = [f"R {r}" for r in claim.get("report", [])]
    said += [f"`{key}` = {value}" for key, value in claim.get("config", {}).items()]
    grounds = ", ".join(said) + "." if said else ""
    if grounds or "why" in claim:
        yield " ".join(filter(None, [grounds, claim.get("why", "")]))
    if "run" in claim:
        yield f"`{claim['run']}` prints " + " and ".join(f"`{g}`" for g in claim["gives"]) + "."
    if "shown" in claim:
        yield "Shown by " + ", ".join(f"`{s if '::' in s else TESTS + '::' + s}`" for s in claim["shown"]) + "."


def main() -> int:
    """See above."""
    p = argparse.ArgumentParser(description="Write docs/claims.md from docs/claims/*.toml.")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    page, text = DOCS / "claims.md", rendered()
    if p.parse_args().check:
        return int(page.read_text(encoding="utf-8") != text)
    beside = page.with_name(".claims.md.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
