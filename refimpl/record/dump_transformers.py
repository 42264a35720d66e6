"""The folder of transformers' model-addition debugger, made with use_repr=False: one safetensors file for what went into a module,
and for what came out of those that have no modules inside. They are read by name, so layers that its JSON leaves out are found.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import safetensors
from refimpl.diff import Case

from .dump import Dump
from .tapmap import Part

_JSON = "_debug_tree_FULL_TENSORS.json"


def fits(path: Path) -> bool:
    """Whether it is such a folder, or the JSON in one."""
    return bool(_trees(path))


def open_dump(path: Path, case: Case) -> Dump:
    """The dump. SpecError for one whose tensors were printed instead of stored."""
    trees = _trees(path)
    require(
        len(trees) == 1, f"it holds the runs of {len(trees)} models: name one of {', '.join(t.name for t in trees)}"
    )
    folder, model = trees[0].parent, trees[0].name.removesuffix(_JSON)
    stored = any(folder.glob(f"{model}.*_inputs_*.safetensors"))
    again = "model_addition_debugger_context(model, debug_path=..., use_repr=False)"
    require(stored, f"its tensors were printed in short, not stored: make it again with {again}")

    def find(part: Part) -> Array | None:
        if part.function or part.nth > 1:
            return None
        side = f"inputs_{'args' if part.arg.isdigit() else 'kwargs'}_{part.arg}" if part.input else "outputs"
        file = folder / f"{model}.{part.path}_{side}{f'_{part.item}' if part.item else ''}.safetensors"
        return np.array(safetensors.open_file(file)["data"]) if file.is_file() else None

    return Dump(find, tokens=find(Part("model.embed_tokens", input=True)))


def _trees(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob(f"*{_JSON}"))
    return [path] if path.name.endswith(_JSON) else []
