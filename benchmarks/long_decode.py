"""Decoding at 128K tokens and prefill of 32K, with two layers of DeepSeek-V3's attention shapes (128 heads, latent 512 + 64).

    python benchmarks/long_decode.py                  all, about ten minutes on one core, 4 GiB of memory
    python benchmarks/long_decode.py --heads 8 --most 8192          smaller

Through the engine's pages and `forward`, in float32, random weights; feed-forward and vocabulary are small. The pages are filled
with random latents (time and memory do not depend on what they hold). Prints the pages' memory, the memory beside them
(tracemalloc) and the time per token with its straight line in T; then chunks of prefill at several places, with 128 heads, from
which the whole is extrapolated, and all chunks with fewer heads, measured, beside the same extrapolation.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from refimpl import Impl
from refimpl.infer.engine import Pages, Piece
from refimpl.infer.engine.core import KEYS, SCORES
from refimpl.infer.engine.forward import forward
from refimpl.layers import Config
from refimpl.model import expected_tensors

MIB, BLOCK, LAYERS = 2**20, 64, 2


def config(heads: int) -> Config:
    """V3's attention; what is around it small."""
    return Config(
        vocab_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        n_routed_experts=0,
        first_k_dense_replace=LAYERS,
        num_nextn_predict_layers=0,
    )


def loaded(heads: int, most: int) -> tuple[Impl, Pages]:
    """A model with random weights, and pages for `most` tokens that hold random latents."""
    c, rng = config(heads), np.random.default_rng(0)
    weights = {}
    for name, shape in expected_tensors(c).items():
        w = rng.standard_normal(shape, np.float32)
        w *= np.float32(0.02)
        weights[name] = w if len(shape) > 1 else np.ones(shape, np.float32)
    impl = Impl().load(c, weights)
    pages = Pages(impl, blocks=most // BLOCK, size=BLOCK)
    for layer in range(LAYERS):
        for a in range(0, most, KEYS):
            n = min(KEYS, most - a)
            latent, key = (rng.standard_normal((n, k), np.float32) for k in (c.kv_lora_rank, c.qk_rope_head_dim))
            pages.write(layer, np.arange(a, a + n), latent, key)
    return impl, pages


def run(impl: Impl, pages: Pages, start: int, n: int) -> None:
    """n tokens at positions start, start + 1, ..."""
    tokens = np.random.default_rng(start).integers(0, 256, n).tolist()
    forward(impl.model, [Piece(tokens, start, range(-(-(start + n) // BLOCK)))], pages)


def measured(call: Callable[[], None], times: int) -> tuple[float, float]:
    """Smallest CPU time of a call, and the MiB that it holds at most beside what was there."""
    tracemalloc.start()
    found = []
    for _ in range(times):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(found), most / MIB


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """y = a + b x by least squares -> a, b, the largest residual over y."""
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(max(abs(a + b * np.array(x) - y) / np.array(y)))


def decode(heads: int, most: int) -> None:
    """Time and memory of one token at several T."""
    impl, pages = loaded(heads, most)
    c = impl.model.config
    latents = LAYERS * most * (c.kv_lora_rank + c.qk_rope_head_dim) * 4
    print(f"decode, {heads} heads, {LAYERS} layers: pages hold {pages.nbytes / MIB:.1f} MiB; ", end="")
    print(f"{LAYERS} layers x {most} tokens x (512 + 64) x 4 bytes = {latents / MIB:.1f} MiB\n")
    print("| T | s a token | G operations/s | MiB beside the pages |\n|---|---|---|---|")
    at = [most * k // 8 for k in (1, 2, 4, 6, 8)]
    times = []
    for t in at:
        taken, beside = measured(partial(run, impl, pages, t - 1, 1), 3)
        times.append(taken)
        work = LAYERS * t * heads * 2 * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        print(f"| {t:,} | {times[-1]:.3f} | {work / times[-1] / 1e9:.0f} | {beside:.1f} |", flush=True)
    a, b, off = line(at, times)
    print(f"\ntime = {a:.3f} s + {1e6 * b:.3f} us x T; largest residual {100 * off:.1f} % of the time\n", flush=True)


def predicted(c: Config, n: int) -> float:
    """MiB that a chunk of n tokens holds at most. While heads are expanded: the stream and its norm, latents of queries and keys,
    all queries and outputs; a block of keys, its heads' keys and values, their queries, sums, scores twice, and the mask. With
    few heads it is five arrays of the stream's size around a norm: a layer's input, attention's output, their sum, the norm's two.
    """
    h, d, v = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    latent, block = c.kv_lora_rank + c.qk_rope_head_dim, min(h, max(1, SCORES // (KEYS * n)))
    whole = n * (2 * c.hidden_size + (c.q_lora_rank or 0) + latent + h * (d + c.qk_rope_head_dim + v))
    keys = KEYS * (latent + block * (c.qk_nope_head_dim + v))
    attention = 4 * (whole + keys + block * n * (d + 2 * v + 2 * KEYS)) + n * KEYS
    return max(attention, 4 * 5 * n * c.hidden_size) / MIB


def prefill(heads: int, most: int, chunk: int, *, whole: bool) -> None:
    """Time and memory of chunks; of all of them, if `whole`."""
    impl, pages = loaded(heads, most)
    starts = list(range(0, most, chunk))
    few = [round(k * (len(starts) - 1) / 3) for k in range(4)]
    chosen = list(range(len(starts))) if whole else few
    found = {k: measured(partial(run, impl, pages, starts[k], chunk), 1) for k in chosen}
    a, b, off = line([starts[k] for k in few], [found[k][0] for k in few])
    print(
        f"prefill of {most:,}, {heads} heads, chunks of {chunk}:\n\n| chunk at | s | MiB beside the pages |\n|---|---|---|"
    )
    for k in few:
        print(f"| {starts[k]:,} | {found[k][0]:.1f} | {found[k][1]:.0f} |")
    print(
        f"\npredicted from shapes: {predicted(impl.model.config, chunk):.0f} MiB; largest of {len(found)} chunks ",
        end="",
    )
    print(f"{max(m for _, m in found.values()):.0f} MiB")
    print(f"time = {a:.2f} s + {1e6 * b:.0f} us x start; largest residual {100 * off:.1f} % of the time; ", end="")
    print(f"all {len(starts)} chunks by that line: {sum(a + b * s for s in starts):.0f} s", end="")
    print(f", measured: {sum(t for t, _ in found.values()):.0f} s\n" if whole else "\n", flush=True)


def main() -> None:
    """Decode, then prefill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--fewer", type=int, default=4, help="heads of the prefill that is measured whole")
    parser.add_argument("--most", type=int, default=131072, help="T of the longest decode step; prefill is a quarter")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--only", choices=("decode", "prefill", "fewer"), help="one part of the three")
    args = parser.parse_args()
    if args.only in (None, "decode"):
        decode(args.heads, args.most)
    if args.only in (None, "prefill"):
        prefill(args.heads, args.most // 4, args.chunk, whole=False)
    if args.only in (None, "fewer"):
        prefill(args.fewer, args.most // 4, args.chunk, whole=True)


if __name__ == "__main__":
    main()
