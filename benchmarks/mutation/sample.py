"""A seeded sample of general mutants, by cosmic-ray's operators: first a place and a kind of change, then one of that kind."""

from __future__ import annotations

import ast
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

FOLDERS = ("autograd", "layers", "refimpl/diff", "refimpl/checkpoint", "parallel_emulation")
NEED_SETTINGS = ("VariableReplacer", "VariableInserter")


@dataclass(frozen=True)
class Mutant:
    """A change: file from the root, operator, which of its places in the file, first and last line."""

    file: str
    operator: str
    occurrence: int
    first: int
    last: int

    @property
    def key(self) -> str:
        """What names it in rows."""
        return f"{self.file}:{self.first} {self.operator.removeprefix('core/')} {self.occurrence}"

    def source(self, root: Path) -> str:
        """The file with the change."""
        return mutate_code(
            (root / self.file).read_text(encoding="utf-8"), get_operator(self.operator)(), self.occurrence
        )

    def compiles(self, root: Path) -> bool:
        """Whether the changed file is Python at all."""
        try:
            compile(self.source(root), self.file, "exec")
        except SyntaxError:
            return False
        return True


def sampled(kept: Path, root: Path, n: int, seed: int) -> list[Mutant]:
    """The sample in a file; drawn and kept if there is none, which takes minutes."""
    if not kept.exists():
        kept.write_text("[\n" + ",\n".join(json.dumps(asdict(m)) for m in drawn(root, n, seed)) + "\n]\n")
    return [Mutant(**row) for row in json.loads(kept.read_text())][:n]


def drawn(root: Path, n: int, seed: int) -> list[Mutant]:
    """n mutants of FOLDERS; the same for the same sources and seed."""
    places: dict[tuple[str, tuple[int, int], str], list[MutationSpec]] = {}
    for spec in _all(root):
        places.setdefault((str(spec.module_path), spec.start_pos, spec.operator_name.split("_")[0]), []).append(spec)
    chance = random.Random(seed)
    keys = chance.sample(sorted(places), n)
    found = [_mutant(root, chance.choice(places[key])) for key in keys]
    left = sorted(set(places) - set(keys))
    chance.shuffle(left)
    further = (_mutant(root, chance.choice(places[key])) for key in left)
    found = [m for m in found if m.compiles(root)]  # a `*` between parameters is no product
    while len(found) < n:
        found += [m for m in islice(further, 1) if m.compiles(root)]
    return found


def _mutant(root: Path, spec: MutationSpec) -> Mutant:
    file = Path(spec.module_path).relative_to(root).as_posix()
    return Mutant(file, spec.operator_name, spec.occurrence, spec.start_pos[0], spec.end_pos[0])


def _all(root: Path) -> Iterator[MutationSpec]:
    """Every change of code that runs: none in annotations, which nobody evaluates, nor in strings."""
    files = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/all.sqlite", WorkDB.Mode.create) as db:
        init(files, db, {})
        specs = [spec for item in db.work_items for spec in item.mutations]
    silent = {file: set(_annotated(ast.parse(file.read_text(encoding="utf-8")))) for file in files}
    for spec in specs:
        inside = any(a <= spec.start_pos and spec.end_pos <= b for a, b in silent[Path(spec.module_path)])
        if not inside and not spec.operator_name.endswith(NEED_SETTINGS):
            yield spec


def _annotated(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                assert part.end_lineno is not None and part.end_col_offset is not None
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)
