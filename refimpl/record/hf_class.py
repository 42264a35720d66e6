"""Which class of transformers a case is run by: its DeepSeek-V3, its DeepSeek-V2, or a class of the user's own file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from refimpl.autograd.errors import SpecError, require
from refimpl.layers.config import Config

from .torch_arrays import libraries


def is_v2(c: Config) -> bool:
    """Whether the config chooses experts as DeepSeek-V2 does: by softmax scores alone."""
    return c.scoring_func == "softmax" and c.topk_method in ("greedy", "group_limited_greedy")


def model_class(c: Config, named: str | None = None) -> Any:
    """The class that `named` says (`pkg.mod:Class`, `path/modeling.py:Class`, or a path whose file defines one ...ForCausalLM),
    else that of transformers. SpecError if there is none, or it is not one of transformers' models.
    """
    _, transformers = libraries()
    if named is None:
        return transformers.DeepseekV2ForCausalLM if is_v2(c) else transformers.DeepseekV3ForCausalLM
    place, _, name = named.rpartition(":") if not named.endswith(".py") else (named, "", "")
    module = _module(named, place)
    name = name or _only(named, module)
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        raise SpecError(f"--model {named}: {place} has no class {name}")
    ok = issubclass(found, transformers.PreTrainedModel)
    way = "record torch --build takes any torch module"
    require(ok, f"--model {named}: {name} is none of transformers' models (PreTrainedModel); refimpl {way}")
    return found


def _module(named: str, place: str) -> ModuleType:
    require(bool(place), f"--model {named!r}; expected pkg.mod:Class, or the path of a file, path/modeling.py:Class")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        spec = importlib.util.spec_from_file_location(f"refimpl_model_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise SpecError(f"--model {named}: there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # transformers looks a class's module up by its name
        spec.loader.exec_module(module)
    except SpecError:
        raise
    except Exception as error:  # the user's file may raise anything
        raise SpecError(f"--model {named}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _only(named: str, module: ModuleType) -> str:
    own = [n for n, x in vars(module).items() if inspect.isclass(x) and x.__module__ == module.__name__]
    fitting = [n for n in own if n.endswith("ForCausalLM")]
    require(
        len(fitting) == 1,
        f"--model {named}: it defines {', '.join(fitting) or 'no class ...ForCausalLM'}; say which: {named}:Class",
    )
    return fitting[0]
