"""Inference: samplers as distributions, generation with the latent cache, drafts by MTP and their verification."""

from .drafter import Speculation
from .draws import Draw, by_inverse, by_race, seeded
from .settings import Request, Settings
from .streaming import Completion, Token, generate, greedy, stream
from .verify import Tally, expected_tokens

__all__ = [
    "Completion",
    "Draw",
    "Request",
    "Settings",
    "Speculation",
    "Tally",
    "Token",
    "by_inverse",
    "by_race",
    "expected_tokens",
    "generate",
    "greedy",
    "seeded",
    "stream",
]
