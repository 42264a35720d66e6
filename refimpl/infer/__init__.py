"""Inference: samplers as distributions, generation with the latent cache, drafts by MTP and their verification."""

from .beam import Beam, beam_search, search_beams
from .drafter import Speculation
from .draws import Draw, by_inverse, by_race, seeded
from .row import Token
from .settings import Request, Settings
from .streaming import Completion, generate, greedy, stream
from .tokenizer import Tokenizer, eos_of
from .verify import Tally, expected_tokens

__all__ = [
    "Beam",
    "Completion",
    "Draw",
    "Request",
    "Settings",
    "Speculation",
    "Tally",
    "Token",
    "Tokenizer",
    "beam_search",
    "by_inverse",
    "by_race",
    "eos_of",
    "expected_tokens",
    "generate",
    "greedy",
    "search_beams",
    "seeded",
    "stream",
]
