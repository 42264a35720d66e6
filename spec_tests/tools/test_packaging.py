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
import json
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40

# ---- The tree: package name -> folder, from pyproject.toml in the repository, from disk in a wheel


HERE = pathlib.Path(__file__).resolve().parents[1]  # spec_tests
ROOT = HERE.parent if (HERE.parent / "pyproject.toml").is_file() else None
in_repository = pytest.mark.skipif(
    ROOT is None, reason="about the repository; this is an installed wheel, without pyproject.toml"
)
in_wheel = pytest.mark.skipif(ROOT is not None, reason="about an installed wheel; this is the repository")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folder_of(package: str, tops: dict[str, str]) -> pathlib.Path:
    """Where a package lies: a top folder's line of the map, or the folder of its name inside its parent's."""
    if package in tops:
        return ROOT / tops[package]
    parent, _, name = package.rpartition(".")
    return folder_of(parent, tops) / name


def package_folders() -> dict[str, pathlib.Path]:
    if ROOT is not None:
        setup = project()["tool"]["setuptools"]
        return {name: folder_of(name, setup["package-dir"]) for name in setup["packages"]}
    inits = HERE.parent.rglob("__init__.py")
    return {".".join(["refimpl", *i.relative_to(HERE.parent).parts[:-1]]): i.parent for i in inits}


FOLDERS = package_folders()
FILES = {  # module name -> file
    name if file.stem == "__init__" else f"{name}.{file.stem}": file
    for name, folder in sorted(FOLDERS.items())
    for file in sorted(folder.glob("*.py"))
}
CODE = {name: file for name, file in FILES.items() if not name.startswith("refimpl.spec_tests")}


def tree_of(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def shown(file: pathlib.Path) -> str:
    return str(file.relative_to(ROOT or HERE.parent))


def python(code: str, *, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that sees what this one sees."""
    if ROOT is not None:  # in a bare clone the folder map is not installed
        code = f"import runpy; runpy.run_path({str(ROOT / 'conftest.py')!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


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


@in_repository
def test_every_data_file_is_packaged():
    """Catches a golden file or a case that tests read in the tree and that no wheel contains."""
    patterns = project()["tool"]["setuptools"]["package-data"]
    forgotten = []
    for file in data_files():
        owner = max((n for n in FOLDERS if file.is_relative_to(FOLDERS[n])), key=len)
        inside = file.relative_to(FOLDERS[owner]).as_posix()
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


@in_wheel
def test_the_wheel_installs_nothing_but_refimpl():
    """Catches a bare top-level `autograd`, which would overwrite PyPI's without a word."""
    files = importlib.metadata.files("deepseek-v3-refimpl")
    tops = {f.parts[0] for f in files} - {".."}  # "..": the command, ../../../bin/refimpl
    assert {t for t in tops if not t.endswith(".dist-info")} == {"refimpl"}


# ---- Dependency order


ORDER = ["autograd", "layers", "parallel_emulation", "refimpl", "spec_tests"]
TESTS, CONSOLE = "refimpl.spec_tests.*", ("refimpl.cli*", "refimpl.__main__")
ADAPTERS = ("refimpl.record.*", "refimpl.spec_tests.*.test_interop*")
ANYWHERE = {"numpy": "*", "ml_dtypes": "*", "rich": CONSOLE, "pytest": TESTS, "hypothesis": TESTS}
INSIDE_FUNCTIONS = {
    "torch": ADAPTERS,
    "transformers": ADAPTERS,
    "safetensors": (*ADAPTERS, TESTS),  # as an oracle: we read and write the format ourselves
    "cupy": "*",
    "matplotlib": "refimpl*.plot*",
    "mpi4py": "refimpl.parallel_emulation*",
}


def imports(module: str, file: pathlib.Path) -> Iterator[tuple[str, int, bool]]:
    """(what is imported, line, whether that happens inside a function) for every import."""
    tree = tree_of(file)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {n for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in inside
        elif isinstance(node, ast.ImportFrom):
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            dots = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(dots, package)
            for alias in node.names:  # `from refimpl import layers` imports refimpl.layers
                full = f"{source}.{alias.name}"
                yield full if full in FOLDERS else source, node.lineno, node in inside


def rank(module: str) -> int:
    """Place of a module in the dependency order."""
    folder = module.removeprefix("refimpl.").partition(".")[0]
    return ORDER.index(folder if folder in ORDER else "refimpl")


def matches(module: str, patterns: str | tuple[str, ...]) -> bool:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(module, p) for p in patterns)


def objection(module: str, target: str, inside: bool) -> str:
    """Why `module` may not import `target`; "" if it may."""
    top = target.partition(".")[0]
    if top == "refimpl":
        upward = rank(target) > rank(module)
        return f"{ORDER[rank(module)]} must not depend on {ORDER[rank(target)]}" * upward
    if top in sys.stdlib_module_names or matches(module, ANYWHERE.get(top, ())):
        return ""
    if matches(module, INSIDE_FUNCTIONS.get(top, ())):
        return "" if inside else "an optional library is imported inside the function that needs it"
    return "not a library this module may use"


def test_imports_follow_the_dependency_order():
    """Catches a layer that knows the diff tool, a core that needs torch, an `import autograd`."""
    objections = [
        f"{shown(file)}:{line}: imports {target}: {why}"
        for module, file in FILES.items()
        for target, line, inside in imports(module, file)
        if (why := objection(module, target, inside))
    ]
    assert not objections, "\n" + "\n".join(objections)


@pytest.mark.parametrize(
    ("module", "target", "inside", "allowed"),
    [
        ("refimpl.layers.mla", "refimpl.autograd", False, True),
        ("refimpl.autograd.ops", "refimpl.layers", True, False),
        ("refimpl.layers.moe", "refimpl.parallel_emulation", True, False),
        ("refimpl.layers.moe", "refimpl", False, False),
        ("refimpl.diff.trace", "refimpl.layers.numerics.quantisation.blocks", False, True),
        ("refimpl.model.impl", "refimpl.spec_tests", True, False),
        ("refimpl.model.impl", "autograd", False, False),
        ("refimpl.cli.diff", "rich.table", False, True),
        ("refimpl.diff.report", "rich", True, False),
        ("refimpl.record.hf", "torch", True, True),
        ("refimpl.record.hf", "torch", False, False),
        ("refimpl.model.impl", "torch", True, False),
        ("refimpl.model.impl", "hypothesis", False, False),
    ],
)
def test_the_import_rules_themselves(module, target, inside, allowed):
    """Catches a rule table that has come to allow everything."""
    assert (objection(module, target, inside) == "") == allowed


def test_importing_refimpl_loads_numpy_and_ml_dtypes_only(tmp_path):
    """Catches `import refimpl` growing a hidden dependency, also through a third library."""
    names = [n for n in CODE if not matches(n, CONSOLE)]
    code = f"""
import importlib, json, sys
before = set(sys.modules)
for name in {names!r}:
    module = importlib.import_module(name)
    for export in getattr(module, "__all__", ()):
        getattr(module, export)
new = set(sys.modules) - before
imported = [n for n in new if getattr(sys.modules[n], "__spec__", None)]  # not Cython's inner ones
print(json.dumps(sorted({{n.partition(".")[0] for n in imported}})))
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    foreign = set(json.loads(done.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)
    assert foreign == {"refimpl", "numpy", "ml_dtypes"}


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
    assert doctest.testmod(importlib.import_module(name)).failed == 0


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
