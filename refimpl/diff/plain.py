"""Stages as plain NumPy: their own source, with everything it calls, as text that needs no package of ours.

Nothing is written a second time: the functions are read from where they are defined. What falls away is what serves the tape:
of a primitive its vjps, `data_of`, checks of shapes, annotations; calls through the precision seam (`gemm`) go to the plain
kernel. A name that stands for anything else than a function, a number or a text is refused.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import data_of
from refimpl.layers import gemm
from refimpl.layers.stage import STAGES, Stage

_SEAM = {fn: getattr(gemm.PLAIN, fn.__name__) for fn in (gemm.linear, gemm.grouped_linear, gemm.swiglu)}
_MODULES = {np: "np", math: "math"}
HEAD = "import math\nfrom types import SimpleNamespace\n\nimport numpy as np\n"
"""What the text of `plain` needs before it."""


def plain(stages: Iterable[str], more: Iterable[Callable[..., Any]] = ()) -> str:
    """Functions that need `HEAD` alone, each after those it calls: the stages, under their names with underscores (`function_of`),
    and further functions under their own. SpecError for one that cannot be written so.
    """
    collected = _Collected()
    for name in stages:
        collected.add(STAGES[name].fn, function_of(name))
    for fn in more:
        collected.add(fn, fn.__name__.lstrip("_"))
    return "\n\n\n".join(collected.texts)


def function_of(stage: str) -> str:
    """The name that a stage's function has in the text: router.weights -> router_weights."""
    return stage.replace(".", "_")


def literal(value: Any) -> str:
    """A setting of a stage as Python text: numbers, texts, dtypes, records (their fields and properties)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        of = type(value)
        names = [f.name for f in dataclasses.fields(value)]
        names += [n for n in vars(of) if isinstance(getattr(of, n), property)]
        return f"SimpleNamespace({', '.join(f'{n}={literal(getattr(value, n))}' for n in names)})"
    if isinstance(value, type | np.dtype) and value is not bool:
        return f"np.{np.dtype(value).name}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    require(value is None or isinstance(value, bool | int | float | str), f"a setting {value!r} cannot be written out")
    return repr(value)


class _Collected:
    """Functions as text, in the order of their definition; function -> its name in the text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.names: dict[Any, str] = {}

    def add(self, op: Any, name: str = "") -> str:
        """The function's name in the text, in which it is from now on."""
        op = op.fn if isinstance(op, Stage) else _SEAM.get(op, op)
        fn = inspect.unwrap(op)
        if fn in self.names and (not name or self.names[fn] == name):
            return self.names[fn]
        name = name or self._free(fn)
        self.names[fn] = name
        tree = _definition(fn)
        tree.decorator_list = []
        if hasattr(op, "raw"):
            _without_vjps(tree)
        tree = _Rewrite(self, fn, tree).visit(tree)
        tree.name = name
        self.texts.append(ast.unparse(ast.fix_missing_locations(tree)))
        return name

    def _free(self, fn: Callable[..., Any]) -> str:
        """The function's own name, or with its module's where another has it."""
        name = fn.__name__.lstrip("_")
        taken = {*self.names.values(), *map(function_of, STAGES), *dir(builtins)}
        return f"{name}_{fn.__module__.rpartition('.')[2]}" if name in taken else name


def _definition(fn: Callable[..., Any]) -> ast.FunctionDef:
    try:
        source = inspect.getsource(fn)
    except (OSError, TypeError) as error:
        raise SpecError(f"{fn!r} has no source that can be read") from error
    tree = ast.parse(textwrap.dedent(source)).body[0]
    require(isinstance(tree, ast.FunctionDef), f"{fn!r} is not defined by `def`")
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _without_vjps(tree: ast.FunctionDef) -> None:
    """`return y, (vjp, ...)` becomes `return y`, and what only the vjps needed goes."""
    for node in tree.body:
        if isinstance(node, ast.Return):
            assert isinstance(node.value, ast.Tuple), "a primitive returns (y, vjps)"
            node.value = node.value.elts[0]
    while idle := [node for node in tree.body if _idle(node, tree)]:
        tree.body = [node for node in tree.body if node not in idle]


def _idle(node: ast.stmt, tree: ast.FunctionDef) -> bool:
    """Whether a statement only defines a name that nothing else reads."""
    if isinstance(node, ast.FunctionDef):
        names = {node.name}
    elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets):
        names = {t.id for t in node.targets if isinstance(t, ast.Name)}
    else:
        return False
    others = [n for s in tree.body if s is not node for n in ast.walk(s)]
    return not any(isinstance(n, ast.Name) and n.id in names for n in others)


class _Rewrite(ast.NodeTransformer):
    """Global names become names of the text, or the numbers they stand for; annotations, checks and `data_of` go."""

    def __init__(self, collected: _Collected, fn: Callable[..., Any], tree: ast.FunctionDef) -> None:
        self.collected, self.fn = collected, fn
        nodes = list(ast.walk(tree))
        self.local = {n.arg for n in nodes if isinstance(n, ast.arg)}
        self.local |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local |= {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n is not tree}

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """A parameter without its annotation."""
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function without its return annotation."""
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """`x: T = y` as `x = y`."""
        assert node.value is not None
        return self.visit(ast.copy_location(ast.Assign([node.target], node.value), node))  # type: ignore[no-any-return]

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """No `require(...)`."""
        called = isinstance(node.value, ast.Call) and self._object(node.value.func)
        return None if called is require else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """No `if ...: raise SpecError(...)`, which is a `require` whose text is made only when it is needed."""
        (first, *more), refused = node.body, None
        if isinstance(first, ast.Raise) and isinstance(first.exc, ast.Call) and not more and not node.orelse:
            refused = self._object(first.exc.func)
        return None if refused is SpecError else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`data_of(x)` is x here."""
        if self._object(node.func) is data_of:
            return self.visit(node.args[0])  # type: ignore[no-any-return]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A global by its name in the text, or by its value."""
        found = self._object(node)
        return node if found is None else self._written(node, found)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`ops.add` of a module of ours, `fn` of a stage, by its name in the text."""
        owner = self._object(node.value)
        if isinstance(owner, Stage) and node.attr == "fn":
            return self._written(node, owner)
        if isinstance(owner, types.ModuleType) and owner not in _MODULES:
            return self._written(node, getattr(owner, node.attr))
        return self.generic_visit(node)

    def _object(self, node: ast.expr) -> Any:
        """What a global name, or an attribute of a global module, stands for; None for locals and builtins."""
        if isinstance(node, ast.Attribute):
            owner = self._object(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        if not isinstance(node, ast.Name) or node.id in self.local:
            return None
        return self.fn.__globals__.get(node.id)

    def _written(self, node: ast.expr, found: Any) -> ast.AST:
        if isinstance(found, types.ModuleType) and found in _MODULES:
            return ast.copy_location(ast.Name(_MODULES[found], ast.Load()), node)
        if isinstance(found, bool | int | float | str):
            return ast.copy_location(ast.parse(literal(found), mode="eval").body, node)
        ours = isinstance(found, Stage) or getattr(found, "__module__", "").startswith("refimpl.")
        if not ours or isinstance(found, type):
            raise SpecError(f"{self.fn.__name__} uses {ast.unparse(node)}, which is not plain NumPy")
        return ast.copy_location(ast.Name(self.collected.add(found), ast.Load()), node)
