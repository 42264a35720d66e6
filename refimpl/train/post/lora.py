"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A, A and B trained, W frozen. Described in articles,
not in V3.

The sum is made on the tape, before the model runs: the same function as PEFT's W x + (alpha / r) B (A x), which makes two thin
products instead and so never holds a gradient of W's size. Every stage, expert and precision plan works unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array

A, B = ".lora_A.weight", ".lora_B.weight"
"""What PEFT's names add to a module's: A (r, D), B (F, r)."""


@dataclass(frozen=True)
class Lora:
    """Rank, alpha, and the modules to adapt: a module's name, or what it ends in after a dot (as PEFT matches them)."""

    r: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        require(isinstance(self.r, int) and self.r >= 1, f"r is {self.r!r}; expected a whole number from 1")
        require(self.alpha > 0, f"alpha is {self.alpha}; it must be positive")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.r

    def modules(self, names: Sequence[str]) -> list[str]:
        """The modules adapted, of weights by checkpoint name. SpecError for a target that fits none."""
        found = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
        fits = {t: [m for m in found if m == t or m.endswith("." + t)] for t in self.target_modules}
        for target, modules in fits.items():
            require(modules, f"no module is called {target!r}, or ends in it")
        return [m for m in found if any(m in modules for modules in fits.values())]


def init(lora: Lora, weights: Mapping[str, Array], *, seed: int = 0) -> dict[str, Array]:
    """Adapters that change nothing yet: B is 0, A uniform in +-1/sqrt(D) (PEFT's; the paper has a normal one) -> by name."""
    rng, adapters = np.random.default_rng(seed), {}
    for module in lora.modules(list(weights)):
        f, d = _matrix(module, weights)
        adapters[module + A] = rng.uniform(-(d**-0.5), d**-0.5, (lora.r, d)).astype(np.float32)
        adapters[module + B] = np.zeros((f, lora.r), np.float32)
    return adapters


def adapted(weights: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """W + scale B A for every adapted module, the others as they are: on the tape if the adapters are leaves, merged if they are
    arrays.  A (r, D), B (F, r), W (F, D).
    """
    new = dict(weights)
    for module in adapted_modules(adapters):
        a, b, (f, d) = adapters[module + A], adapters[module + B], _matrix(module, weights)
        fits = a.shape[0] == b.shape[1] and (b.shape[0], a.shape[1]) == (f, d)
        require(fits, f"{module}: A {a.shape} and B {b.shape} do not make its {(f, d)}")
        new[module + ".weight"] = weights[module + ".weight"] + (b @ a) * scale
    return new


def merge(weights: Mapping[str, Array], adapters: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """Weights with the adapters taken in, in the weights' dtypes."""
    return {n: w.astype(weights[n].dtype, copy=False) for n, w in adapted(weights, adapters, scale).items()}


def unmerge(weights: Mapping[str, Array], adapters: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """W - scale B A: what `merge` was given, up to one rounding of the merged weight and one of the difference."""
    return merge(weights, adapters, -scale)


def adapted_modules(adapters: Mapping[str, Any]) -> list[str]:
    """The modules that have both matrices. SpecError for a matrix without the other, or a name that is none."""
    modules = [n.removesuffix(A) for n in adapters if n.endswith(A)]
    with where("in the adapters"):
        odd = set(adapters) ^ {m + part for m in modules for part in (A, B)}
        require(not odd, f"not a pair of LoRA's A and B: {', '.join(sorted(odd)[:3])}")
    return modules


def _matrix(module: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    w = weights.get(module + ".weight")
    require(w is not None and w.ndim == 2, f"{module} is no linear layer of the model")
    assert w is not None
    return int(w.shape[0]), int(w.shape[1])
