"""The model: its inputs and cache, its weights under a precision plan, and `Impl`, the protocol other tools drive it by."""

from .by_rows import Streamed
from .causal_lm import ForCausalLM, Model, Output, expected_tensors
from .identity import identity
from .impl import Impl, KVState, Taps, introduce
from .inputs import Cache, Inputs, read_inputs
from .weights import effective

__all__ = [
    "Cache",
    "ForCausalLM",
    "Impl",
    "Inputs",
    "KVState",
    "Model",
    "Output",
    "Streamed",
    "Taps",
    "effective",
    "expected_tensors",
    "identity",
    "introduce",
    "read_inputs",
]
