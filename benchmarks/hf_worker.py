"""What a user would run instead: transformers' DeepseekV3ForCausalLM on the CPU, float32. Extra `interop`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from configs import GAMMA, LENGTH, LR, NODES, SIZES, chain_inputs, draw, prompt, prompts, tokens

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
    one, many = torch.from_numpy(prompt(size)), torch.from_numpy(prompts(size, 8))
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

    def prefill() -> list[float]:
        with torch.no_grad():
            return some(model(input_ids=one, use_cache=True, logits_to_keep=1).logits)

    def decode(batch: int) -> list[float]:
        rows = many[:batch]
        with torch.no_grad():
            if batch not in caches:
                caches[batch] = model(input_ids=rows, use_cache=True, logits_to_keep=1).past_key_values
            cache = caches[batch]
            assert cache.get_seq_length() == LENGTH
            y = model(input_ids=rows[:, :1], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return some(y)

    return {
        "forward": forward,
        "forward_backward": forward_backward,
        "train_step": functools.partial(train_step, model, x, []),
        "prefill_512": prefill,
        **{f"decode_{b}": functools.partial(decode, b) for b in (1, 2, 8)},
    }


def train_step(model: Any, x: Any, kept: list[Any]) -> list[float]:
    """One step on the same batch: forward, backward, clip, AdamW, the balancing bias by load (R 2.1.2) -> loss, norm."""
    if not kept:
        kept += [torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1), {}]
        for layer in model.model.layers[model.config.first_k_dense_replace :]:
            layer.mlp.gate.register_forward_hook(lambda gate, _, out: kept[1].update({gate: out[2]}))
    optimizer, chosen = kept
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for gate, ids in chosen.items():
        load = torch.bincount(ids.reshape(-1), minlength=gate.num_experts).float()
        gate.e_score_correction_bias += GAMMA * torch.sign(load.mean() - load)
    return [float(loss.detach()), float(norm)]


def chain() -> list[float]:
    """One forward and backward through NODES operations on 4 x 4 arrays -> the gradient's sum, for comparison."""
    x, a, b, floor = map(torch.from_numpy, chain_inputs())
    leaf = x.requires_grad_()
    y = leaf
    for _ in range((NODES - 1) // 3):
        y = torch.maximum(y * a + b, floor)
    y.sum().backward()
    return [float(leaf.grad.sum())]
