"""Does the FP8 recipe train? The same small model on the same text and seed, once in BF16 and in each FP8 variant.

    python benchmarks/fp8_training.py --steps 300 --out fp8_training.json [--plot docs/fp8_training.svg]

The text is `corpus.txt.gz` (sources of autograd/ and layers/ on the day it was made), one token per byte; the learning rate
warms up, holds, and falls to a tenth over the second half. Prints, for each variant, the loss relative to BF16 averaged over
the last third of the run (R App. B.1 reports less than 0.25 % for 16B and 230B models). Results are written after every
variant; an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np

from refimpl.layers import Config
from refimpl.layers.fp8 import BLOCK
from refimpl.layers.precision import BF16, FLOAT32, FP8, FP8_HOPPER, Plan, fp8_plan
from refimpl.plotting import drawn
from refimpl.train import AdamW, Recipe, init, text_batches, train

SMALL = Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    first_k_dense_replace=1,
    rope_scaling=None,
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
)
PLANS: dict[str, Plan] = {
    "bf16": BF16,
    "fp8": FP8,
    "fp8_hopper": FP8_HOPPER,
    "fp8_block_gradients": fp8_plan("fp8_block_gradients", gradient_tile=BLOCK),
    "float32": FLOAT32,
}


def text() -> bytes:
    """The corpus."""
    return gzip.decompress((pathlib.Path(__file__).parent / "corpus.txt.gz").read_bytes())


def schedule(step: int, *, steps: int) -> float:
    """Up over a tenth of the steps, constant to the half, then a cosine down to a tenth."""
    late = max(0.0, 2 * step / steps - 1)
    return min(1.0, (step + 1) / (0.1 * steps)) * (0.55 + 0.45 * np.cos(np.pi * late))


def run(plan: Plan, corpus: bytes, steps: int) -> list[float]:
    """The loss of every step."""
    opt = AdamW(lr=5e-4, moments="bf16")
    batches = text_batches(corpus, batch=8, length=64, steps=steps)
    recipe = Recipe(plan=plan, opt=opt, schedule=functools.partial(schedule, steps=steps))
    losses, start = [], time.time()
    for _, report in train(SMALL, init(SMALL, std=0.03), batches, recipe):
        losses.append(report.loss)
        if sys.stderr.isatty():
            print(
                f"\r{plan.name} step {report.step} loss {report.loss:.3f} {time.time() - start:.0f} s",
                end="",
                file=sys.stderr,
            )
    return losses


def summary(results: dict[str, list[float]]) -> list[str]:
    """One line per variant: loss at the end, and relative to BF16 over the last third."""
    base, lines = np.array(results["bf16"]), []
    last = len(base) // 3
    for name, losses in results.items():
        relative = np.mean(np.array(losses[-last:]) / base[-last:]) - 1
        lines.append(f"{name:<22} final {np.mean(losses[-last:]):.4f}   relative to bf16 {100 * relative:+.3f} %")
    return lines


def draw(figure: Any, results: dict[str, list[float]]) -> None:
    """Loss curves, and their smoothed distance from BF16."""
    left, right = figure.subplots(1, 2)
    window = np.ones(25) / 25
    for name, losses in results.items():
        left.plot(losses, label=name, linewidth=0.8)
        relative = 100 * (np.array(losses) / np.array(results["bf16"]) - 1)
        right.plot(np.convolve(relative, window, "valid"), label=name)
    left.set(xlabel="step", ylabel="loss (nats per byte)")
    right.set(xlabel="step", ylabel="loss relative to bf16, %, mean of 25 steps")
    right.legend(handlelength=4)


def main() -> None:
    """Run what is missing in --out, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("fp8_training.json"))
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--variants", default=",".join(PLANS))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    corpus = text()
    for name in args.variants.split(","):
        if len(results.get(name, [])) != args.steps:
            results[name] = run(PLANS[name], corpus, args.steps)
            args.out.write_text(json.dumps(results))
    print("\n".join(summary(results)))
    if args.plot:
        args.plot.write_bytes(drawn(lambda f: draw(f, results), size=(10, 4), salt="training"))


if __name__ == "__main__":
    main()
