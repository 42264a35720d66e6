"""Between torch's tensors and ours, bit for bit, and torch as quiet and repeatable as it gets.

torch and transformers come with the extra `interop` and are imported only when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array

from .candidate import library

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def libraries() -> tuple[Any, Any]:
    """torch and transformers; SpecError says how to install them."""
    return library("torch", "interop"), library("transformers", "interop")


def to_torch(array: Array) -> Any:
    """A tensor with the array's bits, in memory of its own. torch knows no ml_dtypes: bfloat16 goes by way of int16."""
    import torch

    a = np.array(array, order="C")
    if a.dtype == _BFLOAT16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def to_numpy(tensor: Any) -> Array:
    """An array with the tensor's bits, in memory of its own."""
    torch, _ = libraries()
    t = tensor.detach().cpu().contiguous()
    if t.dtype == torch.bfloat16:
        return np.array(t.view(torch.int16).numpy()).view(_BFLOAT16)
    return np.array(t.numpy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread, a fixed seed and no gradients, and leave its settings as they were."""
    torch = library("torch", "interop")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
