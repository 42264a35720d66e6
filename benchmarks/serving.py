"""Which policy serves whom, and when? Step times measured on the engine, then every policy under the same traces in simulated time.

    python benchmarks/serving.py --plot docs/serving.svg

A model of the `mini` preset's sizes, untrained (times do not depend on the weights), float32. Measures steps of many loads and fits
`StepTime` on half of them; prints its error on the other half; replays the first requests of a trace on the engine and in
simulated time, side by side; the cost of the batch-invariant mode; then the table of policies.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np

from refimpl import Impl
from refimpl.infer import Request, Settings
from refimpl.infer.engine import (
    POLICIES,
    Engine,
    Limits,
    Load,
    Pages,
    Piece,
    StepTime,
    Tiled,
    arrivals,
    fit,
    simulate,
    summary,
    worst,
)
from refimpl.infer.engine.forward import forward
from refimpl.layers import PRESETS
from refimpl.layers.stage import observing
from refimpl.train import init

SIZE, BLOCKS, LIMITS = 16, 512, Limits(rows=32, tokens=128)


def timed(impl: Impl, pages: Pages, pieces: list[Piece], tiled: Tiled | None = None) -> float:
    """CPU seconds of a step, the least of three: the machine is shared."""
    found = []
    for _ in range(3):
        start = time.process_time()
        with observing(*([tiled] if tiled else [])):
            forward(impl.model, pieces, pages, singly=tiled is not None)
        found.append(time.process_time() - start)
    return min(found)


def pieces_of(rng: np.random.Generator, shape: list[tuple[int, int]], vocabulary: int) -> list[Piece]:
    """(tokens, keys before) a piece, each with blocks of its own."""
    found, free = [], iter(range(BLOCKS))
    for n, start in shape:
        table = [next(free) for _ in range(-(-(start + n) // SIZE))]
        found.append(Piece(rng.integers(0, vocabulary, n).tolist(), start, table))
    return found


def samples(impl: Impl, pages: Pages, n: int, tiled: Tiled | None = None) -> list[tuple[Load, float]]:
    """Steps as an engine makes them: some decode, up to two read a piece of a prompt."""
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        shape = [(1, int(rng.integers(16, 300))) for _ in range(rng.integers(0, 25))]
        shape += [
            (int(rng.integers(8, 97)), int(rng.integers(0, 200))) for _ in range(rng.integers(0 if shape else 1, 3))
        ]
        pieces = pieces_of(rng, shape, impl.model.config.vocab_size)
        pairs = sum((p.start + 1 + p.stop) * len(p.tokens) // 2 for p in pieces)
        load = Load(sum(len(p.tokens) for p in pieces), pairs, len(pieces))
        found.append((load, timed(impl, pages, pieces, tiled)))
    return found


def replay(impl: Impl, times: StepTime) -> tuple[float, float]:
    """CPU seconds that 24 requests take, all at once, on the engine and in simulated time."""
    trace = [type(a)(0.0, a.prompt, a.output) for a in arrivals(1.0, 24, np.random.default_rng(3))]
    requests = [Request([t % 8192 for t in a.prompt], Settings(temperature=0, max_tokens=a.output)) for a in trace]
    engine = Engine(impl, Pages(impl, blocks=BLOCKS, size=SIZE), limits=LIMITS)
    start = time.process_time()
    engine.submit_all(requests)
    for _ in engine.drain():
        pass
    took = time.process_time() - start
    served = simulate(trace, times, blocks=BLOCKS, size=SIZE, limits=LIMITS, policy=POLICIES["first-come"])
    return took, max(s.last for s in served)


def main() -> None:
    """The whole benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    config = PRESETS["mini"].replace(num_nextn_predict_layers=0)
    impl = Impl().load(config, init(config, std=0.03))
    pages = Pages(impl, blocks=BLOCKS, size=SIZE)
    found = samples(impl, pages, args.samples)
    times = fit(found[::2])
    print(f"{times}; worst error on the other half {100 * worst(times, found[1::2]):.0f} %")
    print("24 requests at once: engine {:.2f} s, simulated {:.2f} s".format(*replay(impl, times)))
    exact = samples(impl, pages, max(4, args.samples // 4), Tiled())
    ratio = [e / p for (_, e), (_, p) in zip(exact, found, strict=False)]
    print(
        f"batch-invariant mode: {min(ratio):.1f} to {max(ratio):.1f} times a step's time, median {np.median(ratio):.1f}"
    )
    alone = times.seconds(Load(1, 200, 1))
    print(f"decoding alone {1 / alone:.0f} tokens/s; 32 together {32 / times.seconds(Load(32, 6400, 32)):.0f} tokens/s")
    policies(times, args)


def policies(times: StepTime, args: argparse.Namespace) -> None:
    """The table, and the figure."""
    from refimpl.infer.engine.plot import svg

    results: dict[str, dict[str, list]] = {}
    at_once = arrivals(1e9, args.requests, np.random.default_rng(0))
    how = {"blocks": BLOCKS, "size": SIZE, "limits": LIMITS}
    most = args.requests / max(s.last for s in simulate(at_once, times, **how, policy=POLICIES["first-come"]))
    print(f"requests a second at most {most:.2f}; the traces below have 0.7 of that")
    print(
        "| trace | policy | tokens/s | TTFT p50 | p99 | TPOT p50 | p99 | sent away |\n|---|---|---|---|---|---|---|---|"
    )
    for name, part, cv in (("all at once", None, 1.0), ("Poisson", 0.7, 1.0), ("bursty, cv 4", 0.7, 4.0)):
        trace = arrivals(part * most if part else 1e9, args.requests, np.random.default_rng(0), cv=cv)
        for policy in POLICIES.values():
            served = simulate(trace, times, **how, policy=policy)
            results.setdefault(name, {})[policy.name] = served
            s = summary(served)
            print(
                f"| {name} | {policy.name} | {s.throughput:.1f} | {s.ttft_p50:.2f} | {s.ttft_p99:.2f} | {1e3 * s.tpot_p50:.0f} ms "
                f"| {1e3 * s.tpot_p99:.0f} ms | {s.preempted} |"
            )
    if args.plot:
        args.plot.write_bytes(svg(results))


if __name__ == "__main__":
    main()
