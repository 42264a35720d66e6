"""A pipeline schedule of one's own, judged: `python own_schedule.py > mine.txt`, then

refimpl schedule 1f1b --pp 4 --microbatches 8 --check mine.txt
"""

RANKS, MICRO_BATCHES = 4, 8


def rank(r):
    """1F1B: RANKS - 1 - r forwards to warm up, then one forward and one backward in turn, then what is left."""
    ahead = RANKS - 1 - r
    order = [f"F0.{m}" for m in range(ahead)]
    for m in range(MICRO_BATCHES - ahead):
        order += [f"F0.{m + ahead}", f"B0.{m}"]
    return order + [f"B0.{m}" for m in range(MICRO_BATCHES - ahead, MICRO_BATCHES)]


for r in range(RANKS):
    print(" ".join(rank(r)))
