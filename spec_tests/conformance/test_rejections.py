"""What must be refused: an implementation that runs on it computes something that nobody asked for."""

import numpy as np
import pytest

from refimpl.conformance.process import Lacking

from .plugin import claim


def refused(bench, weights):
    """Whether loading these weights is an error."""
    case = bench.case()
    try:
        bench.of.hold(case.raw_config, weights)
    except Lacking:
        raise
    except Exception:
        return True
    return False


WRONG = {
    "missing": lambda w: {n: a for n, a in w.items() if n != "model.layers.1.mlp.gate.weight"},
    "misspelt": lambda w: {
        n.replace("layers.1.mlp.gate.weight", "layers.1.mlp.router.weight"): a for n, a in w.items()
    },
    "transposed": lambda w: (
        w | {"model.layers.0.mlp.down_proj.weight": np.asarray(w["model.layers.0.mlp.down_proj.weight"]).T}
    ),
    "short": lambda w: w | {"model.norm.weight": np.asarray(w["model.norm.weight"])[:-1]},
}


@pytest.mark.parametrize("which", WRONG)
@claim("RJ-001-{which}", "core", "R18")
def test_weights_of_another_model_are_refused(bench, which):
    """Catches loaders that leave a weight at its random start, or reshape what does not fit (R17, R18)."""
    assert refused(bench, WRONG[which](bench.case().weights()))


@claim("RJ-002", "core", "vocab_size")
def test_a_token_beyond_the_vocabulary_is_refused(bench):
    """Catches an index that wraps around or is cut off."""
    case = bench.loaded()
    with pytest.raises(Exception):  # noqa: B017 - whatever the implementation raises
        bench.of.logits([[0, case.config.vocab_size]])
