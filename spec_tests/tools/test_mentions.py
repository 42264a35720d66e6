"""Everything public has a test that names it: stages, primitives, fields of the config, dialect points, collectives, commands.

A name counts where a test uses it: as a name, an attribute, a keyword or a string. A loop over all of a table is no mention: it
goes on passing if what it loops over loses half of its entries.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
import re

import pytest

from refimpl.autograd import ops
from refimpl.cli.dispatch import COMMANDS
from refimpl.layers import Config
from refimpl.layers.config import Dialect
from refimpl.layers.stage import STAGES
from refimpl.parallel_emulation.collectives import collectives, duals, two_hop
from refimpl.spec_tests.strategies.primitives import primitives

from .tree import FILES, tree_of


def words_of(tree: ast.Module) -> set[str]:
    """Names, attributes, imported names, keywords, and every word of strings that are no docstrings."""
    found: set[str] = set()
    docs: set[int] = set()
    for node in ast.walk(tree):  # an expression comes before the constant that it is
        if isinstance(node, ast.Expr):
            docs.add(id(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= set(re.findall(r"[\w.-]+", node.value))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{(node.module or '').rpartition('.')[2]}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, f"{node.value.id}.{node.attr}"} if isinstance(node.value, ast.Name) else {node.attr}
        else:
            found |= {getattr(node, a) for a in ("id", "arg", "name") if isinstance(getattr(node, a, None), str)}
    return found


@functools.cache
def mentioned() -> frozenset[str]:
    """Of all tests, and what they are made of; this file says no name of its own."""
    files = [p for name, p in FILES.items() if name.startswith("refimpl.spec_tests.") and p.name != "test_mentions.py"]
    return frozenset().union(*map(words_of, map(tree_of, files)))


def own_functions(module) -> list[str]:
    """The public functions that a module defines."""
    source = ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8"))
    return [n.name for n in source.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def forms_of(name: str, stage) -> set[str]:
    """A stage's own name, without the prefix of a variant, and what it is in its module and package (`q_a` of mla.py)."""
    module = importlib.import_module(stage.fn.__module__)
    *_, package, file = module.__name__.split(".")
    here = next((k for k, v in vars(module).items() if v is stage), "")
    return {name, name.removeprefix("variant."), f"{file}.{here}", f"{package}.{here}"}


KINDS = {
    "stage": [(name, forms_of(name, s)) for name, s in STAGES.items()],
    "primitive": [(name, {name}) for name in primitives()],
    "config field": [(f.name, {f.name}) for f in dataclasses.fields(Config)],
    "dialect point": [(f.name, {f.name}) for f in dataclasses.fields(Dialect)],
    "collective": [(n, {n}) for m in (collectives, duals, two_hop) for n in own_functions(m)],
    "command": [(n, {n}) for c in COMMANDS for n in [c.__name__.rpartition(".")[2].replace("_", "-")]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_public_is_named_by_a_test(kind):
    """Catches a stage, a command, an option that was added without a test that is about it."""
    assert len(KINDS[kind]) > 10
    assert not [name for name, forms in KINDS[kind] if not forms & mentioned()]


def test_a_docstring_or_a_comment_is_no_mention():
    """Catches a meta-test that takes words about a thing for a test of it."""
    text = '"""router.weights"""\n# softmax\ndef f(x):\n    "take_rows"\n    return g(x.shape, scale=1, name="loss.main, too")\n'
    found = words_of(ast.parse(text))
    assert {"f", "x", "g", "shape", "x.shape", "scale", "name", "loss.main", "too"} <= found
    assert not {"router.weights", "softmax", "take_rows"} & found
    assert ops.__name__ not in found
