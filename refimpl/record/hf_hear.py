"""Hearing of functions that are called while transformers' model runs: torch's, its cache's, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .hf_probes import Seen

See = Callable[[str, Seen], None]
"""Is told of a call: the function's name, and what went in and came out."""


def hearing_torch(see: See) -> Any:
    """A context in which `see` is told of every torch function that is called, but for those it calls itself."""
    from torch.overrides import TorchFunctionMode

    class Functions(TorchFunctionMode):  # type: ignore[misc, unused-ignore]  # Any where torch is absent
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            see(getattr(func, "__name__", ""), Seen(args, kwargs or {}, out))
            return out

    return Functions()


@contextmanager
def hearing_cache(cache: Any, see: See) -> Iterator[None]:
    """`cache.update`: what is new went in, what the cache holds then came out. None: there is no cache."""
    if cache is None:
        yield
        return
    update = cache.update

    def call(*args: Any, **kwargs: Any) -> Any:
        out = update(*args, **kwargs)
        see("cache.update", Seen(args, kwargs, out))
        return out

    cache.update = call
    try:
        yield
    finally:
        del cache.update


@contextmanager
def hearing_flex(kernel: str, see: See) -> Iterator[None]:
    """transformers' call of FlexAttention, which is compiled: torch's own function mode would be compiled into it."""
    if kernel != "flex_attention":
        yield
        return
    import torch
    import transformers.integrations.flex_attention as home

    name = "compile_friendly_flex_attention"
    original = getattr(home, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            out = original(*args, **kwargs)
        see(name, Seen(args, kwargs, out))
        return out

    setattr(home, name, call)
    try:
        yield
    finally:
        setattr(home, name, original)
