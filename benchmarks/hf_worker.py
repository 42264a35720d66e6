"""What a user would run instead: transformers' DeepseekV3ForCausalLM on the CPU, float32. Extra `interop`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from configs import LENGTH, NODES, SIZES, chain_inputs, draw, tokens

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def build(size: str) -> Any:
    """The model of that size with the shared weights: eager attention, transformers' default experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**SIZES[size], attn_implementation="eager")
    model = DeepseekV3ForCausalLM(config).float().eval()
    places: dict[str, Any] = {}
    for name, parameter in model.state_dict().items():
        places |= _by_checkpoint_name(name, parameter)
    with torch.no_grad():
        for name, array in draw({n: tuple(p.shape) for n, p in places.items()}):
            places[name].copy_(torch.from_numpy(array))
    return model


def _by_checkpoint_name(name: str, parameter: Any) -> dict[str, Any]:
    """Checkpoint name -> view of a parameter; transformers 5 stacks the experts, gate rows before up rows."""
    stem, _, last = name.rpartition("experts.")
    if not stem or last not in ("gate_up_proj", "down_proj"):
        return {name: parameter}
    parts = {"down_proj": parameter}
    if last == "gate_up_proj":
        parts = dict(zip(("gate_proj", "up_proj"), parameter.chunk(2, dim=1), strict=True))
    return {f"{stem}experts.{e}.{p}.weight": view[e] for p, view in parts.items() for e in range(len(parameter))}


def first_logits(size: str) -> list[float]:
    """Some numbers of the first forward: start-up ends here, and both sides must give the same."""
    model = build(size)
    with torch.no_grad():
        return some(model(input_ids=torch.from_numpy(tokens(size)[:, :8])).logits)


def some(logits: Any) -> list[float]:
    """The first logits of the last position of the last sequence, for comparison."""
    return [float(v) for v in logits[-1, -1, :8]]


def cases(size: str) -> dict[str, Callable[[], Any]]:
    """Case name -> one call of it."""
    if size == "nodes":
        return {"nodes": chain}
    model, x = build(size), torch.from_numpy(tokens(size))
    caches: dict[int, Any] = {}

    def forward() -> list[float]:
        with torch.no_grad():
            return some(model(input_ids=x, use_cache=False).logits)

    def forward_backward() -> list[float]:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        one = model.model.layers[1].self_attn.kv_b_proj.weight.grad
        return [float(loss.detach()), float(one.abs().sum())]

    def decode(batch: int) -> list[float]:
        with torch.no_grad():
            if batch not in caches:
                caches[batch] = model(input_ids=x[:batch], use_cache=True).past_key_values
            cache = caches[batch]
            assert cache.get_seq_length() == LENGTH
            y = model(input_ids=x[:batch, :1], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return some(y)

    return {
        "forward": forward,
        "forward_backward": forward_backward,
        "decode_2": lambda: decode(2),
        "decode_1": lambda: decode(1),
    }


def chain() -> list[float]:
    """One forward and backward through NODES operations on 4 x 4 arrays -> the gradient's sum, for comparison."""
    x, a, b, floor = map(torch.from_numpy, chain_inputs())
    leaf = x.requires_grad_()
    y = leaf
    for _ in range((NODES - 1) // 3):
        y = torch.maximum(y * a + b, floor)
    y.sum().backward()
    return [float(leaf.grad.sum())]
