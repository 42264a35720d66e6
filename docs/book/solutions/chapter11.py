"""Chapter 11: one way to do it."""


def loads(tokens, slots, gpus):
    """Each slot's share, added up GPU by GPU."""
    room = len(slots) // gpus
    shares = [tokens[e] / slots.count(e) for e in slots]
    return [sum(shares[g * room : (g + 1) * room]) for g in range(gpus)]


def copies(tokens, slots):
    """Greedy; `max` takes the first of equals."""
    count = [1] * len(tokens)
    for _ in range(slots - len(tokens)):
        count[max(range(len(tokens)), key=lambda e: tokens[e] / count[e])] += 1
    return count


def pack(weights, packs):
    """Longest job first; `sorted` and `min` keep the lower index first."""
    place, load, room = [0] * len(weights), [0] * packs, [len(weights) // packs] * packs
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        p = min((p for p in range(packs) if room[p]), key=lambda p: load[p])
        place[i], load[p], room[p] = p, load[p] + weights[i], room[p] - 1
    return place
