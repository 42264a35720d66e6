"""How much does speculative decoding by MTP give? A small model with one MTP module, trained on text, held against R 5.4.3.

    python benchmarks/speculative.py --steps 1000 --model bytes_model       trains (or reads what is there), then measures

The text is `corpus.txt.gz`, one token per byte, the last tenth held out. Prints, for several temperatures and depths, the part
of the drafts that stood by depth, tokens per run of the model, what Leviathan et al. 2023 eq 1 expects of the first depth's
acceptance, and the time per token relative to plain decoding of the same requests. `--deep` measures the time alone, on 16 layers,
`--rates` there too, with drafts that stand as often as they are told to (after the modules have run, so that they cost what they
cost), beside what the formula makes of one measured step.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
import time
from typing import Any
from unittest import mock

import numpy as np
from fp8_training import SMALL, schedule, text

from refimpl import Checkpoint, Impl
from refimpl.checkpoint import save
from refimpl.infer import Request, Settings, Speculation, Tally, expected_tokens, generate, streaming
from refimpl.infer.distribution import one_hot
from refimpl.infer.drafter import Drafter
from refimpl.infer.verify import Draft
from refimpl.layers.precision import FLOAT32
from refimpl.train import AdamW, Recipe, init, text_batches, train

CONFIG = SMALL.replace(num_nextn_predict_layers=1)
DEEP = CONFIG.replace(
    num_hidden_layers=16,
    hidden_size=512,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_attention_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    q_lora_rank=192,
    kv_lora_rank=128,
)
PROMPT, TOKENS = 64, 128


def trained(folder: pathlib.Path, corpus: bytes, steps: int) -> None:
    """Train with R's MTP weight 0.3 and save."""
    opt, recipe = AdamW(lr=2e-3), functools.partial(schedule, steps=steps)
    batches = text_batches(corpus, batch=8, length=64, steps=steps)
    how = Recipe(plan=FLOAT32, opt=opt, schedule=recipe, mtp_weight=0.3)
    weights = {}
    for state, report in train(CONFIG, init(CONFIG, std=0.03), batches, how):
        if report.step % 100 == 0:
            print(f"step {report.step} loss {report.loss:.3f}", file=sys.stderr)
        weights = state.weights
    save(folder, weights, CONFIG, dtype="float32")


def prompts(held_out: bytes, n: int) -> list[list[int]]:
    """n windows of text that was not trained on."""
    starts = np.random.default_rng(1).integers(0, len(held_out) - PROMPT, n)
    return [list(held_out[s : s + PROMPT]) for s in starts]


def measured(impl: Impl, requests: list[Request], how: Speculation | None, *, batch: int) -> tuple[float, Tally]:
    """Seconds for all requests, and the tally."""
    tally, start = Tally(), time.process_time()
    for i in range(0, len(requests), batch):
        generate(impl, requests[i : i + batch], speculate=how, tally=tally)
    return time.process_time() - start, tally


def deep() -> None:
    """The cost of a step with drafts, the module being one layer of 17: untrained, so that temperature sets the acceptance."""
    impl = Impl().load(DEEP, init(DEEP, std=0.05))
    rows = [list(np.random.default_rng(i).integers(0, 256, PROMPT)) for i in range(4)]
    print("| stood | tokens a run | time per token |\n|---|---|---|")
    for temperature in (0.5, 1.0, 1.5, 2.0, 4.0):
        requests = [Request(p, Settings(temperature=temperature, max_tokens=64, seed=i)) for i, p in enumerate(rows)]
        plain, _ = measured(impl, requests, None, batch=1)
        seconds, tally = measured(impl, requests, Speculation(1), batch=1)
        print(
            f"| {100 * tally.acceptance[0]:.0f} % | {tally.tokens_per_step:.2f} | {seconds / plain:.2f} |", flush=True
        )


class Told(Drafter):
    """Drafts that stand with chance `rate` each: the modules run, then the right token takes their token's place, or another."""

    def __init__(self, impl: Impl, how: Speculation, *, right: list[int], rate: float) -> None:
        super().__init__(impl, how)
        self._right, self._rate, self._rng = right, rate, np.random.default_rng(0)

    def propose(self, rows: Any, hidden: Any, tokens: Any, draft: Any, most: int) -> list[list[Draft]]:
        """The drafts of one row that decodes greedily, as told."""
        (drafts,) = super().propose(rows, hidden, tokens, draft, most)
        coming = self._right[len(tokens[0]) :][: len(drafts)]
        told = [t if self._rng.random() < self._rate else (t + 1) % 256 for t in coming]
        return [[Draft(t, one_hot(t, len(d.q))) for t, d in zip(told, drafts, strict=False)]]


def rates(length: int = 128) -> None:
    """The speed-up of greedy decoding at set rates of acceptance; a step's cost is measured where all drafts stand."""
    impl, prompt = Impl().load(DEEP, init(DEEP, std=0.05)), list(range(PROMPT))
    request = [Request(prompt, Settings(temperature=0, max_tokens=length))]
    right = prompt + generate(impl, request)[0].tokens
    print("| depth | told | stood | tokens a run | expected | speed-up | by formula |\n|---|---|---|---|---|---|---|")
    for depth in (1, 2):
        how, cost = Speculation(depth, recycle=True), 0.0
        for rate in (1.0, 0.9, 0.8, 0.6):
            told = functools.partial(Told, right=right, rate=rate)
            pairs = []
            with mock.patch.object(streaming, "Drafter", told):
                for _ in range(3):
                    plain, _ = measured(impl, request, None, batch=1)
                    seconds, tally = measured(impl, request, how, batch=1)
                    pairs.append((plain / seconds, seconds / tally.steps / (plain / length)))
            gain, step = (statistics.median(x) for x in zip(*pairs, strict=True))
            cost = cost or step  # of a run with drafts, in plain ones
            expected = expected_tokens(rate, depth)
            print(
                f"| {depth} | {rate} | {', '.join(f'{a:.2f}' for a in tally.acceptance)} | {tally.tokens_per_step:.2f} "
                f"| {expected:.2f} | {gain:.2f} "
                f"| {expected / cost:.2f} |",
                flush=True,
            )


def held_out_loss(impl: Impl, rows: list[list[int]]) -> float:
    """Mean nats a byte on the prompts."""
    ids = np.array(rows)
    z = impl.model(impl.model.inputs(ids)).logits[:, :-1]
    top = z.max(-1, keepdims=True)
    loss = np.log(np.exp(z - top).sum(-1)) + top[..., 0] - np.take_along_axis(z, ids[:, 1:, None], -1)[..., 0]
    return float(loss.mean())


def table(impl: Impl, rows: list[list[int]], batch: int) -> None:
    """Print a row a temperature and way to draft, each against plain decoding of the same requests."""
    print(
        "| temperature | drafts | stood, by depth | tokens a run | expected | time per token |\n|---|---|---|---|---|---|"
    )
    for temperature in (0.0, 0.7, 1.0):
        settings = [Settings(temperature=temperature, max_tokens=TOKENS, seed=i) for i in range(len(rows))]
        requests = [Request(p, s) for p, s in zip(rows, settings, strict=True)]
        plain, _ = measured(impl, requests, None, batch=batch)
        for how in (
            Speculation(1),
            Speculation(2, recycle=True),
            Speculation(3, recycle=True),
            Speculation(1, greedy=True),
        ):
            if how.greedy and temperature == 0:
                continue
            seconds, tally = measured(impl, requests, how, batch=batch)
            stood = ", ".join(f"{100 * a:.0f} %" for a in tally.acceptance)
            kind = f"{how.depth}{', greedy' if how.greedy else ''}"
            expected = expected_tokens(tally.acceptance[0], how.depth)
            print(
                f"| {temperature} | {kind} | {stood} | {tally.tokens_per_step:.2f} | {expected:.2f} | {seconds / plain:.2f} |",
                flush=True,
            )


def main() -> None:
    """Train if there is no model yet, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("speculative_model"))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--deep", action="store_true", help="time only, on an untrained model of 16 layers")
    parser.add_argument(
        "--rates", action="store_true", help="the speed-up at set rates of acceptance, on the same model"
    )
    args = parser.parse_args()
    if args.deep or args.rates:
        return deep() if args.deep else rates()
    corpus = text()
    cut = len(corpus) * 9 // 10
    if not (args.model / "config.json").exists():
        trained(args.model, corpus[:cut], args.steps)
    checkpoint = Checkpoint.open(args.model)
    impl = Impl().load(checkpoint.config or {}, checkpoint)
    rows = prompts(corpus[cut:], args.requests)
    print(f"loss on the held-out prompts {held_out_loss(impl, rows):.3f} nats a byte")
    table(impl, rows, args.batch)


if __name__ == "__main__":
    main()
