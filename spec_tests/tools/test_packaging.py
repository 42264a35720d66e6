"""The house keeps its shape: packages, dependency order, sizes, documentation, guards.

Everything is read from the source with `ast`, or done in a fresh interpreter, so that no test here
depends on what another test has imported.  Run from an installed wheel, the tests that are about
the repository itself are skipped.
"""

import ast
import doctest
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import pathlib
import tomllib
from collections.abc import Iterator

import pytest

from .tree import CODE, FILES, FOLDERS, ROOT, in_repository, in_wheel, project, python, shown, tree_of

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40
COLLECTING = """
conformance.bench.Bench conformance.parallel.Theirs conformance.report.Report conformance.subject.Subject
diff.admission.Admitted diff.comparison.Comparison diff.judgement.Judgement diff.lanes.Lane diff.lanes.Recorded
diff.run.Run diff.wide.Wide infer.engine.job.Job infer.engine.loop.Counts infer.engine.scheduler.Step
infer.engine.simulate.Served infer.server.piece.Piece infer.split.decode.Answer infer.split.serve.Served
infer.streaming.Completion infer.verify.Tally parallel_emulation.comm.mailbox.Group
parallel_emulation.comm.mailbox.Message parallel_emulation.comm.mailbox.Ticket parallel_emulation.comm.mpi.Doing
record.drafts.Draft record.dump.Dump train.data.reader.Ahead train.run.engine.Beside train.tasks.step.Objective
vectors.entries.Store weights.holding._Pair
"""

# ---- The build map


@in_repository
def test_every_package_of_the_tree_is_in_the_build_map():
    """Catches a sub-package that works in the tree and is missing from the wheel."""
    setup = project()["tool"]["setuptools"]
    tops = [pathlib.Path(folder).parts[0] for folder in setup["package-dir"].values()]
    folders = {f.parent for top in set(tops) for f in (ROOT / top).rglob("*.py")}
    in_tree = {f for f in folders if "__pycache__" not in f.parts}
    assert in_tree == set(FOLDERS.values())
    assert set(setup["package-dir"]) <= set(setup["packages"]) == set(FOLDERS)
    assert setup["packages"] == sorted(setup["packages"]), "in alphabetical order, so that a merge shows a room twice"


@in_repository
@pytest.mark.parametrize("name", FOLDERS)
def test_a_package_is_installed_under_its_folders_name(name):
    """Catches a line of the build map that points at a neighbour, or a folder without its files."""
    path = shown(FOLDERS[name])
    assert name.removeprefix("refimpl.").replace(".", "/") == path.removeprefix("refimpl/")
    init = FOLDERS[name] / "__init__.py"
    assert init.is_file(), "a folder of modules without __init__.py"
    assert ast.get_docstring(tree_of(init)), "a room says what it is for"
    assert (FOLDERS["refimpl"] / "py.typed").is_file(), "without the top package's py.typed no types are seen (PEP 561)"


def test_every_test_file_is_read_in_a_wheel_too():
    """Catches a path under tree.ROOT that is built while a file is imported: in a wheel ROOT is None, and nothing is collected."""
    found = []
    for name in (n for n in FILES if n.startswith("refimpl.spec_tests")):
        outside = [n for n in tree_of(FILES[name]).body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
        imports = [n for n in outside if isinstance(n, ast.ImportFrom) and n.module == "tree"]
        if any(a.name == "ROOT" for n in imports for a in n.names):
            built = [b for n in outside for b in ast.walk(n) if isinstance(b, ast.BinOp)]
            found += [f"{name}: {ast.unparse(b)}" for b in built if ast.unparse(b.left) == "ROOT"]
    assert not found


@in_repository
def test_every_data_file_is_packaged():
    """Catches a golden file or a case that tests read in the tree and that no wheel contains."""
    folders, patterns = dict(FOLDERS), dict(project()["tool"]["setuptools"]["package-data"])
    for apart in (ROOT / "spec_tests").rglob("pyproject.toml"):  # a distribution of its own
        (name,) = (setup := tomllib.loads(apart.read_text())["tool"]["setuptools"])["packages"]
        folders[name] = apart.parent
        patterns[name] = [*setup["package-data"][name], apart.name]
    forgotten = []
    for file in data_files():
        owner = max((n for n in folders if file.is_relative_to(folders[n])), key=len)
        inside = file.relative_to(folders[owner]).as_posix()
        globs = [g.replace("**/", "") for g in patterns.get(owner, [])]
        if not any(fnmatch.fnmatchcase(inside, g) for g in globs):
            forgotten.append(shown(file))
    assert not forgotten, "not matched by [tool.setuptools.package-data]"


def data_files() -> Iterator[pathlib.Path]:
    for folder in {f for f in FOLDERS.values() if f.parent == ROOT}:
        for file in folder.rglob("*"):
            parts = file.relative_to(ROOT).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if file.is_file() and file.suffix != ".py" and not hidden:
                yield file


@in_repository
def test_the_distributions_of_one_release_have_one_version():
    """Catches recordings of another version than the tests that read them."""
    others = (ROOT / "spec_tests" / "golden").glob("*/pyproject.toml")
    versions = {tomllib.loads(f.read_text())["project"]["version"] for f in others}
    assert versions == {project()["project"]["version"]}


@in_wheel
def test_the_wheel_installs_nothing_but_refimpl():
    """Catches a bare top-level `autograd`, which would overwrite PyPI's without a word."""
    files = importlib.metadata.files("deepseek-v3-refimpl")
    tops = {f.parts[0] for f in files} - {".."}  # "..": the command, ../../../bin/refimpl
    assert {t for t in tops if not t.endswith(".dist-info")} == {"refimpl"}


# ---- Bare names


@in_repository
@pytest.mark.parametrize("folder", ["autograd", "layers", "parallel_emulation"])
def test_a_folder_refuses_to_be_imported_under_its_bare_name(folder):
    """Catches the tree shadowing PyPI's `autograd`, and two copies of every class."""
    done = python(f"import {folder}", cwd=ROOT)
    assert done.returncode != 0
    complaint = f"ImportError: this folder is the package refimpl.{folder}, not {folder}"
    assert complaint in done.stderr


# ---- Documentation and size


@pytest.mark.parametrize("name", CODE)
def test_the_module_imports_and_its_examples_run(name):
    """Catches an example in a docstring that no longer says what the code does."""
    runner = doctest.DocTestRunner()
    for found in doctest.DocTestFinder().find(importlib.import_module(name)):
        if found.examples:  # testmod would start a debugger for every docstring that has none
            runner.run(found)
    assert runner.summarize().failed == 0


def definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions, classes and methods: what a user can reach by name."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            overload = any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
            if not node.name.startswith("_") and not overload:
                yield node
                yield from definitions(node.body) if isinstance(node, ast.ClassDef) else ()
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from definitions([*node.body, *getattr(node, "orelse", [])])


def test_a_record_does_not_change_unless_it_is_one_that_collects():
    """Catches a value that several hold and one of them changes: a dataclass is frozen, or it is named here."""
    classes = {f"{m}.{c.name}": c for m, f in CODE.items() for c in ast.walk(tree_of(f)) if isinstance(c, ast.ClassDef)}
    made = {n: ast.unparse(d) for n, c in classes.items() for d in c.decorator_list}
    changing = {n for n, how in made.items() if how.startswith("dataclass") and "frozen=True" not in how}
    assert {n.removeprefix("refimpl.") for n in changing} == set(COLLECTING.split())


def test_everything_public_has_a_docstring():
    """Catches a stage, an op or a method whose equation and shapes are nowhere to be read."""
    silent = [
        f"{shown(file)}:{node.lineno}: {node.name}"
        for file in CODE.values()
        for node in definitions(tree_of(file).body)
        if not ast.get_docstring(node)
    ]
    assert not silent, "\n" + "\n".join(silent)


def test_files_and_functions_stay_small():
    """Catches the slow growth that nobody decides on."""
    too_long = []
    for file in CODE.values():
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{shown(file)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(tree_of(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    where = f"{shown(file)}:{node.lineno}: {node.name}"
                    too_long.append(f"{where}: {length} lines, at most {MAX_FUNCTION_LINES}")
    assert not too_long, "\n" + "\n".join(too_long)
