"""Python functions that a map names, wrapped where the file that defines a module's class looks them up."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .watch import Watch

Told = Callable[[str, Any, Any, Any], None]
"""Hears of a call: the function's name, its arguments, keyword arguments, and what it gave."""


@contextmanager
def wrapped_functions(watch: Watch, modules: Mapping[str, Any], told: Told) -> Iterator[set[str]]:
    """Wrap those functions of the map that are names in the file of their module's class -> which ones; undone on leaving."""
    originals: dict[tuple[str, str], Any] = {}
    try:
        for path, name in watch.keys:
            home = type(modules[path]).__module__
            found = vars(sys.modules[home]).get(name) if name and home in sys.modules else None
            if callable(found) and (home, name) not in originals:
                originals[home, name] = found
                setattr(sys.modules[home], name, _telling(found, name, told))
        yield {name for _, name in originals}
    finally:
        for (home, name), original in originals.items():
            setattr(sys.modules[home], name, original)


def _telling(original: Callable[..., Any], name: str, told: Told) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        told(name, args, kwargs, out)
        return out

    return functools.update_wrapper(call, original)
