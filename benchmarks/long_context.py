"""Context extension at small scale (R 4.3): a toy trained at 64 tokens, extended to 512 and 2,048 by the recipe's two stages.

    python benchmarks/long_context.py --json long_context.json             trains and measures
    python benchmarks/long_context_page.py long_context.json --docs docs   tables and pictures of what is there (extra: plot)

The toy is a small DeepSeek-V3 (latent attention, experts) on the language of haystack.py. Pre-training is the recipe deepseek-v3
scaled to sequences of 64, extension the recipe deepseek-v3-context scaled by the same factor, with YaRN (s = 40 over 64 tokens);
beside it the same stages on the same texts with RoPE as it is (plain extrapolation), and with all positions divided by 40
(position interpolation, Chen et al. 2023). Results are written after every part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import haystack
import numpy as np
from haystack import Array

from refimpl.autograd.tensor import backward, data_of
from refimpl.checkpoint import Transaction
from refimpl.layers import Config, rope
from refimpl.layers.precision import FLOAT32
from refimpl.layers.rope import RopeScaling
from refimpl.model import ForCausalLM
from refimpl.train import Recipe, init
from refimpl.train.recipe import Run, load, read, scaled
from refimpl.train.training import Report, State, loads, named, parts, update

LENGTH, LR = 64, 5e-3
METHODS = ("YaRN", "plain", "interpolated")
LENGTHS, DEPTHS = (64, 128, 256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 0.95)
BINS = (0, 64, 128, 256, 512, 1024, 2048)
TOY = Config(
    vocab_size=haystack.VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    max_position_embeddings=4096,
    rope_theta=100.0,
    rope_scaling=None,
    num_nextn_predict_layers=0,
)
"""theta = 100 over 64 tokens: the slowest of 8 pairs turns 0.2 times, V3's of 32 pairs 0.09 times over 4,096."""


def pretraining(tokens: int) -> Run:
    """V3's pre-training, small."""
    whole = load("deepseek-v3")
    first = replace(whole, phases=whole.phases[:1])
    return read(scaled(first, tokens=tokens, sequence=LENGTH, batch=16, lr=LR))


def extension(tokens: int) -> Run:
    """V3's two stages, small: sequences by the same factor, the learning rate at which pre-training ended."""
    return read(
        scaled(load("deepseek-v3-context"), tokens=tokens, sequence=8 * LENGTH, batch=4, lr=LR * 7.3e-6 / 2.2e-4)
    )


def yarn(run: Run) -> RopeScaling:
    """What the recipe's stages put into the config."""
    found = run.config(0, TOY).rope_scaling
    assert found is not None
    return found


def how(method: str, factor: float) -> AbstractContextManager[None]:
    """Position interpolation is no setting of the specification: it divides every frequency by the factor."""
    own = rope.inv_freq
    if method != "interpolated":
        return nullcontext()
    return mock.patch.object(rope, "inv_freq", lambda *args: own(*args) / factor)


# ---- Training


def trained(c: Config, state: State, run: Run, phase: int, seed: int) -> State:
    """All steps of a phase on texts of its length."""
    rng, first = np.random.default_rng([seed, phase]), sum(len(p.steps) for p in run.phases[:phase])
    for k in range(first, first + len(run.phases[phase].steps)):
        s = run.at(k)
        tokens, labels, _ = haystack.texts(rng, s.batch, s.sequence)
        state, report = step(c, state, tokens, labels, replace(run.recipe(k), plan=FLOAT32))
        if sys.stderr.isatty():
            print(f"\r{s.phase.name} step {k + 1} of {len(run)} loss {report.loss:.3f} ", end="", file=sys.stderr)
    return state


def step(c: Config, state: State, tokens: Array, labels: Array, recipe: Recipe) -> tuple[State, Report]:
    """As `train.step` in float32, where no plan observes the stages: attention is fused, a quarter of the time at 2,048."""
    model = ForCausalLM.from_weights(c, state.weights).with_gradients()
    out = model.forward_and_loss(model.inputs(tokens, labels=labels), aux_weight=recipe.aux_weight)
    found = named(model, backward(out.loss))
    return update(c, state, float(data_of(out.loss)), found, loads(c, out.routing), recipe, parts(out.losses))


# ---- Measuring


def by_position(model: ForCausalLM, rows: int, seed: int) -> dict[str, list[float]]:
    """Mean loss of filler, and loss and accuracy of answers, in each bin of positions of texts of the longest length."""
    tokens, labels, answers = haystack.texts(np.random.default_rng([seed, 99]), rows, BINS[-1])
    z = np.concatenate([model(model.inputs(row[None])).logits for row in tokens]).astype(np.float64)[:, :-1]
    top = z.max(-1, keepdims=True)
    loss = np.log(np.exp(z - top).sum(-1)) + top[..., 0] - np.take_along_axis(z, labels[:, 1:, None], -1)[..., 0]
    right, asked = z.argmax(-1) == labels[:, 1:], answers[:, 1:]
    found: dict[str, list[float]] = {"filler": [], "answers": [], "accuracy": []}
    for a, b in itertools.pairwise(BINS):
        here = np.zeros(asked.shape, bool)
        here[:, a:b] = True
        text = here & (labels[:, 1:] < haystack.FILLER)
        for name, of, where in (
            ("filler", loss, text),
            ("answers", loss, here & asked),
            ("accuracy", right, here & asked),
        ):
            found[name].append(float(of[where].mean()))
    return found


def grid(model: ForCausalLM, rows: int, seed: int) -> list[list[float]]:
    """Part of the needles that are found, by length and depth."""
    return [[found(model, n, depth, rows, seed) for depth in DEPTHS] for n in LENGTHS]


def found(model: ForCausalLM, length: int, depth: float, rows: int, seed: int) -> float:
    """Part of the needles at one depth that are found."""
    tokens, answers = haystack.needles(np.random.default_rng([seed, length, round(100 * depth)]), rows, length, depth)
    last = np.concatenate([model(model.inputs(row[None])).logits[:, -1] for row in tokens])
    return float((last.argmax(-1) == answers).mean())


def measured(c: Config, weights: dict[str, Array], rows: int, seed: int) -> dict[str, Any]:
    """Everything about one model."""
    model = ForCausalLM.from_weights(c, weights)
    return {"position": by_position(model, rows, seed), "grid": grid(model, rows, seed)}


# ---- The whole


def facts(first: Run, long: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What was trained, for the page."""
    scaling = yarn(long)
    phases = [
        {
            "name": p.name,
            "sequence": p.sequence,
            "batch": p.steps.batch(len(p.steps) - 1),
            "steps": len(p.steps),
            "tokens": p.tokens,
            "lr": max(max(piece.start, piece.end) for piece in p.schedules["lr"].pieces),
        }
        for p in (*first.phases, *long.phases)
    ]
    language = {"values": haystack.VALUES, "assignments": haystack.ASSIGNMENTS}
    yarn_facts = {"factor": scaling.factor, "original": scaling.original_max_position_embeddings}
    return {"seed": args.seed, "rows": args.rows, "phases": phases} | yarn_facts | language


class Results:
    """A file of results that is filled part by part."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def keep(self, name: str, value: Any) -> None:
        """One more part, at once in the file."""
        self.found[name] = value
        with Transaction() as files, files.new(self.path) as f:
            f.write(json.dumps(self.found, indent=1).encode())


def everything(results: Results, args: argparse.Namespace) -> None:
    """Train all, then measure all."""
    start, first, long = time.process_time(), pretraining(args.tokens), extension(args.extension)
    results.keep("facts", facts(first, long, args))
    base = trained(TOY, State(init(TOY, seed=args.seed, std=0.12)), first, 0, args.seed)
    models = {}
    for method in METHODS:
        c, state = TOY.replace(rope_scaling=yarn(long)) if method == "YaRN" else TOY, State(base.weights)
        models[f"{method} 0"] = c, state.weights
        for stage in range(len(long.phases)):
            with how(method, yarn(long).factor):
                state = trained(c, state, long, stage, args.seed + 1)
            models[f"{method} {stage + 1}"] = c, state.weights
    results.keep("training seconds", time.process_time() - start)
    for name, (c, weights) in models.items():
        with how(name.split()[0], yarn(long).factor):
            results.keep(name, measured(c, weights, args.rows, args.seed))
        print(f"{name}: {_short(results.found[name])}", flush=True)
    results.keep("seconds", time.process_time() - start)


def _short(r: dict[str, Any]) -> str:
    return f"needles {np.mean(r['grid'], axis=1).round(2).tolist()}, filler {np.round(r['position']['filler'], 2).tolist()}"


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("long_context.json"))
    parser.add_argument("--tokens", type=int, default=600_000, help="of pre-training")
    parser.add_argument("--extension", type=int, default=120_000, help="of both stages of the extension together")
    parser.add_argument("--rows", type=int, default=8, help="texts a cell of the grid, and of the loss by position")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    everything(Results(args.json), args)


if __name__ == "__main__":
    main()
