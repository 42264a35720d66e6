"""How sensitive the suite is: which claims kill which known bug, in which regime, and whether at the right stage.

One run of the suite a bug, in a process of its own, on the plain case and the regimes that the corpus says show it. Rows are
written as they come (JSON lines); a second run goes on where the first stopped.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from refimpl.autograd.errors import SpecError, require, where
from refimpl.diff.corpus import MUTANTS, NOT_STAGES
from refimpl.record.regimes import REGIMES

from .bench import PLAIN
from .innocent import INNOCENTS
from .mutated import usable
from .suite import command, environment
from .survivors import reason

Run = Callable[[str, list[str], Path, Path], list[str]]
"""What runs the suite: implementation, regimes, folder of cases, file for the report -> a command line."""


@dataclass(frozen=True)
class Kill:
    """One bug or rewrite: by which claims it was killed (`ID@regime`), and whether the claim of its own stage is one of them."""

    id: str
    innocent: bool
    stage: str
    title: str
    regimes: list[str]
    claims: list[str]
    located: bool

    @property
    def as_it_should(self) -> bool:
        """Killed if it is a bug and nobody says why it cannot be, left alone if it is innocent."""
        return bool(self.claims) != (self.innocent or bool(reason(self.id)))


def unusable() -> dict[str, str]:
    """Bugs of the corpus that are no implementation by themselves -> why."""
    reads = {i: f"reads {', '.join(m.reads)} beside its stage's arguments" for i, m in MUTANTS.items() if m.reads}
    parts = {
        i: f"{m.stage} is {'the optimiser' if m.stage.startswith('optim.') else 'a part of a quantised product'}"
        for i, m in MUTANTS.items()
        if not usable(m)
    }
    reads |= {i: "reads settings of the config that its stage does not see" for i, m in MUTANTS.items() if m.made}
    return parts | reads | dict(NOT_STAGES)


def subjects(only: Iterable[str] = ()) -> list[str]:
    """What is run: the ids asked for, or every innocent rewrite and usable bug."""
    every = [*INNOCENTS, *[i for i, m in MUTANTS.items() if usable(m)]]
    asked = list(only)
    unknown = sorted(set(asked) - set(every))
    require(not unknown, f"{', '.join(unknown)}: not among the bugs and rewrites; `refimpl mutants --list` lists them")
    return asked or every


def regimes_of(id: str) -> list[str]:
    """The plain case and those whose business a bug is; for a rewrite two that are hard."""
    if id in INNOCENTS:
        return [PLAIN, "bias-negative", "extreme-logits"]
    return [PLAIN, *[r.id for r in REGIMES.values() if any(id == s or id.startswith(f"{s}-") for s in r.shows)]]


def kill(id: str, run: Run, cases: Path, *, gate: bool = False) -> Kill:
    """Run the suite on one; as a `gate` all of it only if the claims of a bug's own stage do not kill it. SpecError if it did not
    report.
    """
    regimes, changed = regimes_of(id), MUTANTS.get(id) or INNOCENTS[id]
    command = partial(run, f"{__package__}.mutated:{id}", regimes, cases)
    with where(f"while testing {id}"):
        claims = _failed(command, ["-k", f"stage_gives and {changed.stage}"]) if gate and id in MUTANTS else []
        claims = claims or _failed(command)
    title = getattr(changed, "title", "") or getattr(changed, "what", "")
    located = any(c.partition("@")[0] == f"ST-{changed.stage}" for c in claims)
    return Kill(id, id in INNOCENTS, changed.stage, title, regimes, claims, located)


def _failed(command: Callable[[Path], list[str]], more: Sequence[str] = ()) -> list[str]:
    """The claims that failed, or could not be asked because another did."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        ran = subprocess.run([*command(out), *more], capture_output=True, text=True, env=environment())
        if not out.is_file():
            raise SpecError(f"no report (exit code {ran.returncode}): {ran.stdout[-500:]}{ran.stderr[-500:]}")
        told = json.loads(out.read_text())
    failed = [o for o in told["outcomes"] if o["state"] in ("failed", "blocked")]
    return list(dict.fromkeys(o["id"] + ("@" + o["regime"] if o["regime"] else "") for o in failed))


def kills(
    ids: list[str],
    run: Run,
    out: Path,
    cases: Path,
    *,
    jobs: int = 1,
    gate: bool = False,
    say: Callable[[Kill], None] = lambda k: None,
) -> list[Kill]:
    """All of them, in the order asked for; rows that `out` has already are not run again."""
    done = {k.id: k for k in read(out)} if out.is_file() else {}
    with ThreadPoolExecutor(jobs) as pool, out.open("a", encoding="utf-8") as f:
        for found in pool.map(lambda i: kill(i, run, cases, gate=gate), [i for i in ids if i not in done]):
            f.write(json.dumps(asdict(found)) + "\n")
            f.flush()
            done[found.id] = found
            say(found)
    return [done[i] for i in ids]


def read(path: Path) -> list[Kill]:
    """Rows of a file. SpecError for a line that is none."""
    found = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Kill(**json.loads(line)))
        except (ValueError, TypeError):
            raise SpecError(f"{path} line {n} is no row of kills; delete it or name another file") from None
    return found


def page(rows: list[Kill]) -> str:
    """The matrix in Markdown."""
    bugs, innocents = ([r for r in rows if r.innocent is kind] for kind in (False, True))
    killed = [r for r in bugs if r.claims]
    at_stage = sum(r.located for r in killed)
    lines = [
        "# What the suite kills",
        "",
        "Written by `refimpl mutants --page`; each row is one run of `spec_tests/conformance` on the specification with one",
        "stage replaced, on the plain case and the regimes that the corpus says show it.",
        "",
        f"Known bugs: {len(killed)} of {len(bugs)} killed, {at_stage} of these by the claim of their own stage.",
        f"Innocent rewrites called wrong: {sum(bool(r.claims) for r in innocents)} of {len(innocents)}.",
        "",
        "| bug | stage | what is wrong | killed by (of) |",
        "|---|---|---|---|",
        *[f"| {r.id} | `{r.stage}` | {r.title} | {_by(r)} |" for r in bugs],
        "",
        "| rewrite | stage | what is done instead | called wrong by |",
        "|---|---|---|---|",
        *[f"| {r.id} | `{r.stage}` | {r.title} | {_by(r) if r.claims else ''} |" for r in innocents],
        "",
        "Not run: " + "; ".join(f"{i} ({why.partition(';')[0]})" for i, why in unusable().items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _by(r: Kill) -> str:
    if not r.claims:
        return f"**survives**: {reason(r.id) or 'nobody says why'}"
    own = [c for c in r.claims if c.startswith(f"ST-{r.stage}@")]
    first = (own or r.claims)[:2]
    more = len(r.claims) - len(first)
    return ", ".join(first) + (f", +{more}" if more > 0 else "")


def suite_command(impl: str, regimes: list[str], cases: Path, out: Path) -> list[str]:
    """The suite that comes with us."""
    return command({"--impl": impl, "--regimes": ",".join(regimes), "--cases-dir": cases, "--conformance-json": out})
