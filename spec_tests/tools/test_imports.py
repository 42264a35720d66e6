"""Who imports whom: the dependency order, no circles, no private names from elsewhere, NumPy and ml_dtypes only.

Everything is read from the source with `ast`, or done in a fresh interpreter.
"""

import ast
import fnmatch
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator

import pytest

from .tree import CODE, FILES, FOLDERS, python, shown, tree_of

ORDER = ["autograd", "layers", "parallel_emulation", "refimpl", "spec_tests"]
TESTS, CONSOLE = "refimpl.spec_tests.*", ("refimpl.cli*", "refimpl.__main__")
ADAPTERS = ("refimpl.record.*", "refimpl.spec_tests.*.test_interop*")
ANYWHERE = {"numpy": "*", "ml_dtypes": "*", "rich": CONSOLE, "pytest": TESTS, "hypothesis": TESTS}
ANYWHERE["torch"] = (
    "refimpl.spec_tests.cases.deepseek_inference"  # modules whose file the tap map looks functions up in
)
INSIDE_FUNCTIONS = {
    "torch": ADAPTERS,
    "transformers": ADAPTERS,
    "safetensors": (*ADAPTERS, TESTS),  # as an oracle: we read and write the format ourselves
    **dict.fromkeys(("gguf", "llama_cpp", "mlx", "mlx_lm", "torchtitan", "megatron"), ADAPTERS),
    **dict.fromkeys(("trl", "peft"), "refimpl.spec_tests.*.test_interop*"),
    "cupy": "*",
    "matplotlib": "refimpl*.plot*",
    "mpi4py": ("refimpl.parallel_emulation*", "refimpl.cli.jobs"),
    "tensorboardX": "refimpl.train.run.tensorboard",
    "tensorboard": "refimpl.spec_tests.*.test_interop*",
    "tokenizers": ("refimpl.infer.tokenizer", "refimpl.train.data*", *ADAPTERS),
    **dict.fromkeys(("starlette", "uvicorn"), ("refimpl.infer.server.app", "refimpl.spec_tests.*.test_interop*")),
    "openai": "refimpl.spec_tests.*.test_interop*",
    "jinja2": ("refimpl.infer.chat", "refimpl.spec_tests.*.test_interop*"),
}


@functools.cache
def import_statements(file: pathlib.Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import of a file, and whether that happens inside a function."""
    return [
        (n, inside) for n, inside in _statements(tree_of(file), False) if isinstance(n, ast.Import | ast.ImportFrom)
    ]


def imports(module: str, file: pathlib.Path) -> Iterator[tuple[str, int, bool]]:
    """(what is imported, line, whether that happens inside a function) for every import."""
    for node, inside in import_statements(file):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, inside
        else:
            source = source_of(node, module, file)
            for alias in node.names:  # `from refimpl import layers` imports refimpl.layers
                full = f"{source}.{alias.name}"
                yield full if full in FOLDERS else source, node.lineno, inside


def _statements(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Everything but expressions, which hold no import, and whether it lies inside a function."""
    yield node, inside
    inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _statements(child, inside)


def source_of(node: ast.ImportFrom, module: str, file: pathlib.Path) -> str:
    """The module that a `from` import takes from, dots resolved."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


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


# ---- Circles and private names


def graph(files: dict[str, pathlib.Path]) -> dict[str, set[str]]:
    """module -> the modules of ours it imports, those inside functions and for type checkers too."""
    edges = {}
    for module, file in files.items():
        found = set()
        for node, _ in import_statements(file):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            else:
                source = source_of(node, module, file)
                found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in files else source for a in node.names}
        edges[module] = {m for m in found if m in files and m != module}
    return edges


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    """Every node that some path of at least one step leads to."""
    seen, todo = set(), [start]
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def circles(edges: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach themselves and each other."""
    reach = {node: reached(edges, node) for node in edges}
    return sorted({tuple(sorted(m for m in reach[n] if n in reach[m])) for n in edges if n in reach[n]})


def test_no_file_imports_itself_by_a_detour():
    """Catches two files that cannot be read, tested or moved one without the other, lazy imports included."""
    assert not circles(graph(FILES))


def room(module: str) -> str:
    """The package a module lies in."""
    return module if module in FOLDERS else module.rpartition(".")[0]


def test_no_room_imports_itself_by_a_detour():
    """Catches rooms whose `__init__` would have to be half imported; the top package is the facade and takes no part."""
    edges: dict[str, set[str]] = {}
    for module, targets in graph(CODE).items():
        edges.setdefault(room(module), set()).update(room(t) for t in targets)
    inner = {r: {t for t in targets if t != r and t != "refimpl"} for r, targets in edges.items() if r != "refimpl"}
    nested = {
        r: {t for t in targets if not r.startswith(t + ".") and not t.startswith(r + ".")}
        for r, targets in inner.items()
    }
    assert not circles(nested)


def test_the_circle_finder_itself():
    """Catches a finder that finds nothing: a loop of three with a way in and a way out, beside a chain."""
    edges = {"in": {"a"}, "a": {"b"}, "b": {"c"}, "c": {"a", "out"}, "out": set(), "x": {"y"}, "y": {"z"}, "z": set()}
    assert circles(edges) == [("a", "b", "c")]
    assert not circles(edges | {"c": {"out"}})


def test_private_names_stay_in_their_room():
    """Catches `from refimpl.checkpoint.saving import _hf_files` elsewhere: what others use has a name without underscore."""
    taken = [
        f"{shown(file)}:{node.lineno}: {alias.name} of {source}"
        for module, file in FILES.items()
        for node, _ in import_statements(file)
        if isinstance(node, ast.ImportFrom)
        for source in [source_of(node, module, file)]
        for alias in node.names
        if source.startswith("refimpl") and alias.name.startswith("_") and not alias.name.startswith("__")
        if room(source) != room(module)
    ]
    assert not taken, "\n" + "\n".join(taken)
