"""Interleaved timing of two implementations, each in a process of its own.

On a shared machine a time taken alone means little. So every case gets two fresh worker processes that are asked in
turn, one call each per round; what counts is the median over the rounds of the ratio of their CPU times (user +
system, all threads of the process), which other processes disturb least. Peak memory is that of the process that
ran nothing but this case.

A worker is a Python file with `cases(size) -> {case: callable}` and `first_logits(size) -> [float]`. What a call
returns, a few logits or the loss and a gradient, must be the same for both workers: they do the same work.

    python benchmarks/pairs.py                        # everything, 9 rounds, one thread
    python benchmarks/pairs.py --only mini/forward --rounds 3 --json results.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
WORKERS = {"hf": "hf_worker.py", "refimpl": "refimpl_worker.py"}  # ratios are to the first
MODEL_CASES = ("forward", "forward_backward", "train_step", "prefill_512", "decode_8", "decode_2", "decode_1")
CASES = [f"{size}/{case}" for size in ("mini", "tiny") for case in MODEL_CASES] + ["nodes/nodes", "tiny/startup"]
CALLS = {
    "tiny/decode_1": 10,
    "tiny/decode_2": 10,
    "tiny/decode_8": 10,
    "tiny/forward": 3,
    "nodes/nodes": 5,
}  # per timed call, for short ones
Row = dict[str, Any]


def load(file: str) -> Any:
    """The worker module in `file`."""
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("worker", HERE / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(file: str, size: str, case: str) -> None:
    """The worker's side: build, then one timed call per line read; answers are JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    call, calls = load(file).cases(size)[case], CALLS.get(f"{size}/{case}", 1)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            value = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([wall / calls, cpu / calls, peak, value]), file=answers, flush=True)


def environment(threads: int) -> dict[str, str]:
    """One thread count for every BLAS; read before the libraries are imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict(os.environ) | dict.fromkeys(names, str(threads))


class Worker:
    """A process that runs one case."""

    def __init__(self, file: str, size: str, case: str, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", file, size, case]
        pipe, env = subprocess.PIPE, environment(threads)
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self.answer()

    def answer(self) -> str:
        """The next line; RuntimeError if the worker died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker died: {self.process.args}")
        return line

    def call(self) -> Row:
        """One timed call."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return dict(zip(("wall", "cpu", "peak", "value"), json.loads(self.answer()), strict=True))

    def close(self) -> None:
        """End of input ends the worker."""
        self.process.communicate()


class Startup:
    """The same interface for start-up: every call is a fresh interpreter, from exec to the first tiny logits."""

    def __init__(self, file: str, size: str, case: str, threads: int) -> None:
        self.command, self.env = [sys.executable, __file__, "--startup", file, size], environment(threads)

    def call(self) -> Row:
        """One start; its time includes the interpreter's own."""
        wall = time.perf_counter()
        process = subprocess.Popen(self.command, env=self.env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"start-up failed: {self.command}")
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        return {"wall": time.perf_counter() - wall, "cpu": cpu, "peak": peak, "value": json.loads(out.splitlines()[-1])}

    def close(self) -> None:
        """Nothing is left running."""


def compare(name: str, rounds: int, threads: int) -> dict[str, Row]:
    """{worker: medians and ratios} of one case; raises RuntimeError if the two do not compute the same."""
    size, case = name.split("/")
    make = Startup if case == "startup" else Worker
    workers = {w: make(file, size, case, threads) for w, file in WORKERS.items()}
    try:
        for worker in workers.values():
            worker.call()  # warm: caches, lazy imports
        times: dict[str, list[Row]] = {w: [] for w in workers}
        for i in range(rounds):
            for w in list(workers)[:: 1 if i % 2 == 0 else -1]:
                times[w].append(workers[w].call())
    finally:
        for worker in workers.values():
            worker.close()
    same_work(name, [rows[-1]["value"] for rows in times.values()])
    return {w: summary(rows, times[next(iter(WORKERS))]) for w, rows in times.items()}


def same_work(name: str, values: list[Any]) -> None:
    """Both workers' results agree as two float32 programs do: logits of order 1, losses, sums of gradients."""
    for a, b in zip(*values, strict=True):
        if not abs(a - b) <= 1e-4 + 1e-3 * abs(b):
            raise RuntimeError(f"{name}: the implementations disagree, {a} against {b}")


def summary(rows: list[Row], base: list[Row]) -> Row:
    """Median wall and CPU seconds, peak MiB, and the medians of the per-round ratios to the base."""
    middle = {k: statistics.median(r[k] for r in rows) for k in ("wall", "cpu", "peak")}
    pairs = list(zip(rows, base, strict=True))
    ratios = {f"{k}_ratio": statistics.median(r[k] / b[k] for r, b in pairs) for k in ("wall", "cpu", "peak")}
    return middle | ratios


def shown(name: str, result: dict[str, Row]) -> str:
    """One line per worker."""
    line = "{:22s} {:8s} cpu {:10.3f} ms x{:5.2f}   wall {:10.3f} ms x{:5.2f}   peak {:6.0f} MiB x{:5.2f}"
    return "\n".join(
        line.format(
            name, w, 1e3 * r["cpu"], r["cpu_ratio"], 1e3 * r["wall"], r["wall_ratio"], r["peak"], r["peak_ratio"]
        )
        for w, r in result.items()
    )


def measure(names: list[str], rounds: int, threads: int) -> dict[str, dict[str, Row]]:
    """Every case in turn, printed as it is done."""
    results = {}
    for name in names:
        results[name] = compare(name, rounds, threads)
        print(shown(name, results[name]), flush=True)
    return results


def main() -> None:
    """The command line; --serve and --startup are the workers' side."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(*sys.argv[2:5])
    if sys.argv[1:2] == ["--startup"]:
        return print(json.dumps(load(sys.argv[2]).first_logits(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases, separated by commas; all: " + ",".join(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else CASES
    results = measure(names, options.rounds, options.threads)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1))
    return None


if __name__ == "__main__":
    main()
