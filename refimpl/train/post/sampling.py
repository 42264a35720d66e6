"""Answers drawn from a model, as examples: what GRPO rewards and what a student learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from refimpl.autograd.tensor import Array
from refimpl.infer import Request, Settings, generate
from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT32, Plan
from refimpl.model import Impl

from .examples import Example


def sample(
    c: Config,
    weights: Mapping[str, Array],
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    plan: Plan = FLOAT32,
) -> list[Example]:
    """An answer to every prompt, each drawn with a seed of its own: settings.seed + its place."""
    impl = Impl(precision=plan).load(c, weights)
    asked = [Request(p, replace(settings, seed=settings.seed + i)) for i, p in enumerate(prompts)]
    return [Example(p, done.tokens) for p, done in zip(prompts, generate(impl, asked), strict=True)]
