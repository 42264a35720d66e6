"""What a simulated call and a simulated step cost, for 8, 64, 512 and 2048 ranks: `python benchmarks/simulator.py`.

call    a barrier: everything that meets in the hub costs this much, per rank
switch  one lock released and one taken, in a ring of as many threads: what the operating system takes, with no hub at all
step    a small mixture-of-experts step on every rank: alltoallv out, two matmuls, alltoallv back, send and receive round
        a ring, barrier; all ranks together, the communication log included
local   the same step's matmuls alone, without ranks

Times are process CPU time, the best of several runs: threads that hand a baton on use one core between them, so this is
the wall time of an idle machine, and what else runs on a busy one counts little. REFERENCE is the prototype that chose
this design, measured on another 2-core machine; the ratios step / local and call / switch carry over between machines,
the milliseconds do not.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import numpy as np

from refimpl.parallel_emulation.comm import Comm, Log, spmd

RANKS = (8, 64, 512, 2048)
CALL_US = dict(zip(RANKS, (9.4, 10.9, 15.0, 26.0), strict=True))  # REFERENCE
STEP_MS = dict(zip(RANKS, (0.98, 7.1, 117.0, 1137.0), strict=True))
LOCAL_MS = dict(zip(RANKS, (0.3, 2.2, 16.0, 64.0), strict=True))
TOKENS, WIDTH, INNER, TOP = 16, 128, 128, 2


def best(run: Callable[[], object], times: int) -> float:
    """Shortest CPU seconds of a few runs."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def per_repetition(run: Callable[[int], object], few: int, many: int, times: int) -> float:
    """CPU seconds of one repetition, starting and ending the ranks not counted."""
    return (best(lambda: run(many), times) - best(lambda: run(few), times)) / (many - few)


def barriers(comm: Comm, times: int) -> None:
    """Nothing but meeting."""
    for _ in range(times):
        comm.barrier()


def ring_of_locks(n: int, rounds: int) -> None:
    """Hand a baton round n threads: the floor under any design with one thread per rank."""
    locks = [threading.Lock() for _ in range(n + 1)]
    for lock in locks:
        lock.acquire()

    def hand_on(me: int) -> None:
        for _ in range(rounds):
            locks[me].acquire()
            locks[(me + 1) % n].release()

    before = threading.stack_size(512 * 1024)
    threads = [threading.Thread(target=hand_on, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    threading.stack_size(before)
    locks[0].release()
    for thread in threads:
        thread.join()


def experts(rows: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The local work of a rank."""
    return np.maximum(rows @ up, 0) @ down


def steps(comm: Comm, times: int, up: np.ndarray, down: np.ndarray) -> None:
    """The mixture-of-experts step, as every rank sees it."""
    n, rank = comm.size, comm.rank
    to = np.sort((rank * 7 + np.arange(TOKENS * TOP) * 13) % n)
    rows, counts = np.full((len(to), WIDTH), rank, np.float32), np.bincount(to, minlength=n)
    for _ in range(times):
        there, received = comm.alltoallv(rows, counts, "dispatch")
        back, _ = comm.alltoallv(experts(there, up, down), received, "combine")
        comm.send(back[0], (rank + 1) % n, "ring")
        comm.recv((rank - 1) % n, "ring")
        comm.barrier("end of step")


def measure(n: int, times: int) -> str:
    """One line of the table."""
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(s).astype(np.float32) for s in ((WIDTH, INNER), (INNER, WIDTH)))
    rows = np.ones((TOKENS * TOP, WIDTH), np.float32)
    calls, several = 1 + max(10, 4000 // n), 1 + max(3, 1000 // n)
    call = per_repetition(lambda k: spmd(n, barriers, k), 1, calls, times) / n * 1e6
    switch = per_repetition(lambda k: ring_of_locks(n, k), 1, calls, times) / n * 1e6
    step = per_repetition(lambda k: spmd(n, steps, k, up, down, log=Log()), 1, several, times) * 1e3
    local = best(lambda: [experts(rows, up, down) for _ in range(n)], times) * 1e3
    return (
        f"| {n} | {call:.1f} | {CALL_US[n]} | {call / CALL_US[n]:.2f} | {switch:.1f} | {call / switch:.2f} "
        f"| {step:.2f} | {STEP_MS[n]} | {step / STEP_MS[n]:.2f} | {local:.2f} | {step / local:.1f} "
        f"| {STEP_MS[n] / LOCAL_MS[n]:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, choices=RANKS)
    parser.add_argument("--times", type=int, default=5, help="runs of which the best counts (default: 5)")
    args = parser.parse_args()
    print("| ranks | call us | reference | ratio | switch us | call/switch | step ms | reference | ratio | local ms "
          "| step/local | reference |\n|" + "---|" * 12)  # fmt: skip
    for n in args.ranks:
        print(measure(n, args.times), flush=True)


if __name__ == "__main__":
    main()
