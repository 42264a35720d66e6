"""A variant of a stage, held against the one of the specification: `python own_stage.py CASE`.

Here a gate whose affinities are a softmax over a temperature. A stage is a function with a name; a `Patch` puts another in its
place for a run, whoever calls it: the model, the diff, a training step.
"""

import sys

import numpy as np

from refimpl import Impl, observing
from refimpl.autograd import nn_ops
from refimpl.diff import Case
from refimpl.layers.stage import Patch, stage

if len(sys.argv) != 2:
    sys.exit(__doc__)


@stage("mine.softmax_scores", what="affinities over a temperature", eq="my paper, eq 3", shape="B S E")
def softmax_scores(z, *, func, temperature=2.0):
    """softmax(z / temperature), whatever the config asks for.  z (B, S, E) -> (B, S, E)."""
    return nn_ops.softmax(z / temperature)


case = Case.read(sys.argv[1])
impl = Impl().load(case.config, case.weights())
plain = impl.forward(case.tokens, taps=["L*/router.ids"])
with observing(Patch("router.scores", softmax_scores)):
    other = impl.forward(case.tokens, taps=["L*/router.ids"])
for tap in plain:
    if tap.endswith("router.ids"):
        pairs = zip(plain[tap].reshape(-1, 4), other[tap].reshape(-1, 4), strict=True)
        print(f"{tap}: {np.mean([len(set(a) & set(b)) / 4 for a, b in pairs]):.0%} of the chosen experts stay")
print(f"logits move by {np.abs(plain['logits'] - other['logits']).max():.2f}")
