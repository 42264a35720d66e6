"""transformers' DeepSeek for the tap map `transformers`."""

from __future__ import annotations

from typing import Any

from refimpl.diff import Case

from .candidate import Candidate
from .hf import positions_of
from .hf_load import checkpoint_names, load_model
from .hf_run import Batch, run_batch


def build(case: Case) -> Candidate:
    """The model as `refimpl record hf` loads it, in float32."""
    model, positions = load_model(case.raw_config, case.weights()), positions_of(case)

    def call(module: Any, tokens: list[list[int]]) -> Any:
        return run_batch(module, Batch(tokens, positions, case.valid))[0]

    return Candidate(model, call, weights=checkpoint_names(model, model.state_dict()))
