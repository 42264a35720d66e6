"""Small V3 models on a pipeline, and what one rank computes from the same micro-batches with the plain model."""

from collections import defaultdict

import numpy as np
from hypothesis import strategies as st

from refimpl.autograd import Parameter, backward
from refimpl.parallel_emulation.pipeline import build, executor
from refimpl.train import pipeline_parts

from .small_models import small

SHARED = ("model.embed_tokens.weight", "lm_head.weight")
"""What MTP uses once more; every other weight is used once per micro-batch."""


def case(name, pp, micro_batches, *, per_stage=1, n_mtp=1, seed=0, dtype=np.float64):
    """(schedule, model, inputs): as many layers as the schedule has stages, times `per_stage`."""
    schedule = build(name, pp, micro_batches)
    layers = schedule.layout.n_stages * per_stage
    model = small(seed, dtype, num_hidden_layers=layers, num_nextn_predict_layers=n_mtp)
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, model.config.vocab_size, (rng.integers(1, 3), 6)) for _ in range(micro_batches)]
    return schedule, model, [model.inputs(t, labels=t) for t in tokens]


@st.composite
def cases(draw):
    """Any schedule, 1 to 4 ranks, any number of micro-batches that it takes."""
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]))
    pp = draw(st.sampled_from([2, 4])) if name == "dualpipe" else draw(st.integers(1, 3))
    least = 2 * pp if name.startswith("dualpipe") else 1
    m = draw(st.integers(least, least + 4))
    m = {"dualpipe": m + m % 2, "interleaved": m * pp}.get(name, m)
    more = {"per_stage": draw(st.integers(1, 2)) if pp < 3 else 1, "n_mtp": draw(st.integers(0, 2))}
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return case(name, pp, min(m, 12), seed=draw(st.integers(0, 99)), dtype=dtype, **more)


def sequential(model, inputs, weight, **losses):
    """(loss, {name: gradient}) of each micro-batch alone, by the plain model."""
    found = []
    for one, w in zip(inputs, weight, strict=True):
        tracked = model.with_gradients()
        loss = tracked.loss(one, **losses)[0] * w
        grads = backward(loss)
        leaves = [(n, leaf) for n, leaf in tracked.named_weights() if isinstance(leaf, Parameter)]
        found.append((loss.data, {n: grads[leaf] for n, leaf in leaves if leaf in grads}))
    return found


def in_turn(terms):
    """((a + b) + c) + ..."""
    total = None
    for t in terms:
        total = t if total is None else total + t
    return total


def even(weight):
    """Shares of micro-batches of which every part of the loss counts alike."""
    return [dict.fromkeys(("main", "mtp1", "mtp2", "balance"), w) for w in weight]


def program(comm, schedule, model, inputs, weight, wrap=lambda part: part, **losses):
    """One rank of the pipeline: loss by micro-batch, gradients by name, peaks."""
    cut = pipeline_parts.cut(model.config, schedule.layout.n_stages)
    held = schedule.layout.stages[comm.rank]
    mine = cut.only(model, held).with_gradients()
    parts = [wrap(pipeline_parts.Stage(mine, cut, s, inputs, even(weight), **losses)) for s in held]
    out = executor.run(comm, schedule, parts)
    leaves = pipeline_parts.trained(mine)
    grads = {n: out.grads[leaf] for n, leaf in leaves.items() if leaf in out.grads}
    return out.losses, grads, (out.peak_live, out.peak_until_weight, out.peak_queue)


def together(results):
    """All ranks' losses by micro-batch, and gradients by name, added up in rank order."""
    losses, grads = defaultdict(list), defaultdict(list)
    for by_batch, by_name, _ in results:
        for j, loss in by_batch.items():
            losses[j].append(loss)
        for name, g in by_name.items():
            grads[name].append(g)
    return {j: in_turn(x) for j, x in losses.items()}, {n: in_turn(g) for n, g in grads.items()}
