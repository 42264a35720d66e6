"""The specification as a benchmark worker. See pairs.py for what a worker is."""

from __future__ import annotations

import functools
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np

runpy.run_path(str(pathlib.Path(__file__).parents[1] / "conftest.py"))  # time this tree, installed or not

from configs import GAMMA, LENGTH, LR, NODES, SIZES, chain_inputs, draw, prompt, prompts, tokens  # noqa: E402

from refimpl.autograd import Tensor, backward, ops  # noqa: E402
from refimpl.layers.config import Config  # noqa: E402
from refimpl.layers.precision import FLOAT32  # noqa: E402
from refimpl.model import ForCausalLM, expected_tensors  # noqa: E402
from refimpl.train import AdamW, Recipe, State, step  # noqa: E402


def build(size: str) -> ForCausalLM:
    """The model of that size with the shared weights."""
    config = Config.from_dict(SIZES[size] | {"num_nextn_predict_layers": 0})
    return ForCausalLM.from_weights(config, dict(draw(expected_tensors(config, mtp=False))))


def first_logits(size: str) -> list[float]:
    """Some numbers of the first forward: start-up ends here, and both sides must give the same."""
    model = build(size)
    return some(model(model.inputs(tokens(size)[:, :8])).logits)


def some(logits: Any) -> list[float]:
    """The first logits of the last position of the last sequence, for comparison."""
    return [float(v) for v in np.asarray(logits[-1, -1, :8])]


def cases(size: str) -> dict[str, Callable[[], Any]]:
    """Case name -> one call of it."""
    if size == "nodes":
        return {"nodes": chain}
    model, x = build(size), tokens(size)
    inputs, tracked = model.inputs(x, labels=x), model.with_gradients()
    one, many = prompt(size), prompts(size, 8)
    caches: dict[int, Any] = {}

    def forward() -> list[float]:
        return some(model(inputs).logits)

    def forward_backward() -> list[float]:
        loss, _ = tracked.loss(inputs)
        grads = backward(loss)
        one = grads[tracked.model.layers[1].self_attn.kv_b_proj.weight]
        return [float(loss.data), float(np.abs(one).sum())]

    def prefill() -> list[float]:
        return some(model(model.inputs(one), at=np.array([one.shape[1] - 1])).logits)

    def decode(batch: int) -> list[float]:
        rows = many[:batch]
        if batch not in caches:
            caches[batch] = model(model.inputs(rows)).cache
        cache = caches[batch]
        assert len(cache) == LENGTH
        return some(model(model.inputs(rows[:, :1], cache=cache), cache).logits)

    return {
        "forward": forward,
        "forward_backward": forward_backward,
        "train_step": functools.partial(train_step, model, x, []),
        "prefill_512": prefill,
        **{f"decode_{b}": functools.partial(decode, b) for b in (1, 2, 8)},
    }


def train_step(model: ForCausalLM, x: Any, kept: list[State]) -> list[float]:
    """One step on the same batch: forward, backward, clip, AdamW, the balancing bias by load (R 2.1.2) -> loss, norm."""
    if not kept:
        kept.append(State(dict(model.named_weights())))
    recipe = Recipe(plan=FLOAT32, opt=AdamW(lr=LR), gamma=GAMMA)
    kept[0], report = step(model.config, kept[0], x, recipe, in_place=True)
    return [report.loss, report.norm]


def chain() -> list[float]:
    """One forward and backward through NODES operations on 4 x 4 arrays -> the gradient's sum, for comparison."""
    x, a, b, floor = chain_inputs()
    leaf = Tensor(x)
    y: Any = leaf
    for _ in range((NODES - 1) // 3):
        y = ops.maximum(y * a + b, floor)
    return [float(backward(ops.sum(y))[leaf].sum())]
