"""Small float64 models for claims about stages: every mechanism of V3, drawn large so mistakes show."""

import numpy as np

from refimpl.autograd import Parameter, Tensor, backward
from refimpl.layers import loss as losses
from refimpl.model import ForCausalLM
from refimpl.spec_tests.strategies.models import make_weights

from .configs import SMALL

# Two orders of float64 sums through two layers: 1e-13 of the logits, which are of order 1.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def small(seed=0, dtype=np.float64, **changes):
    """A model of SMALL with changed config keys, random weights of that dtype."""
    config = SMALL.replace(**changes)
    mtp = config.num_nextn_predict_layers
    weights = make_weights(config.to_dict(), np.random.default_rng(seed), mtp=mtp)
    return ForCausalLM.from_weights(config, {n: w.astype(dtype) for n, w in weights.items()})


def some_tokens(batch=2, length=9, seed=1):
    """Random token ids (B, S) of SMALL's vocabulary."""
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, (batch, length))


def logits(model, tokens, **how):
    """Logits of a run without cache; `how` goes to model.inputs, or to the model if it is `attend`."""
    attend = how.pop("attend", "auto")
    return model(model.inputs(tokens, **how), attend=attend).logits


def gradients(model, tokens, attend="auto"):
    """{checkpoint name: gradient} of the next-token loss, all weights, with a choice of attention."""
    tracked = model.with_gradients()
    out = tracked(tracked.inputs(tokens), attend=attend)
    grads = backward(losses.main(out.logits, tokens))
    return {n: grads[w] for n, w in tracked.named_weights() if isinstance(w, Parameter)}


def pull(f, *args, seed=0):
    """(value, gradients of <dy, f(args)> for a random dy), for every float argument."""
    leaves = [Tensor(a) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a for a in args]
    y = f(*leaves)
    dy = np.random.default_rng(seed).standard_normal(y.shape)
    grads = backward(y, dy)
    return y.data, [grads.get(t) for t in leaves if isinstance(t, Tensor)]
