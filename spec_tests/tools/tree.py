"""The tree that the tests of the house read: package name -> folder, from pyproject.toml in the repository, from disk in a
wheel; module name -> file.
"""

import ast
import functools
import gc
import pathlib
import subprocess
import sys
import tomllib

import pytest

HERE = pathlib.Path(__file__).resolve().parents[1]  # spec_tests
ROOT = HERE.parent if (HERE.parent / "pyproject.toml").is_file() else None
BASE = ROOT or HERE.parent  # the repository, or the installed package; a path under it can be built in both
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


@functools.cache
def tree_of(file: pathlib.Path) -> ast.Module:
    gc.disable()  # of a syntax tree nothing is garbage, and looking for it takes three times as long as parsing
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    finally:
        gc.freeze()  # it is kept to the end, and there are hundreds
        gc.enable()


def shown(file: pathlib.Path) -> str:
    return str(file.relative_to(BASE))


def python(code: str, *, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that sees what this one sees."""
    return subprocess.run(interpreter(code), cwd=cwd, capture_output=True, text=True, timeout=120)


def interpreter(code: str) -> list[str]:
    """The command that does so."""
    if ROOT is not None:  # in a bare clone the folder map is not installed
        code = f"import runpy; runpy.run_path({str(ROOT / 'conftest.py')!r})\n{code}"
    return [sys.executable, "-c", code]
