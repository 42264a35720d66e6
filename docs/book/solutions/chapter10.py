"""Chapter 10: one way to do it."""


def one_f_one_b(ranks, micro_batches, rank):
    """Warm up, alternate, drain."""
    warm = min(ranks - 1 - rank, micro_batches)
    order = [f"F{j}" for j in range(warm)]
    for j in range(micro_batches - warm):
        order += [f"F{warm + j}", f"B{j}"]
    return order + [f"B{j}" for j in range(micro_batches - warm, micro_batches)]


def makespan(orders, forward, backward):
    """Go round the ranks; whoever can, does a step."""
    last, done, at, clock = len(orders) - 1, {}, [0] * len(orders), [0.0] * len(orders)
    while any(at[r] < len(orders[r]) for r in range(len(orders))):
        for r, order in enumerate(orders):
            while at[r] < len(order):
                kind, j = order[at[r]][0], order[at[r]][1:]
                need = ("F", j, r - 1) if kind == "F" else ("B", j, r + 1) if r < last else ("F", j, r)
                if need[2] >= 0 and need not in done:
                    break
                clock[r] = max(clock[r], done.get(need, 0.0)) + (forward if kind == "F" else backward)
                done[kind, j, r] = clock[r]
                at[r] += 1
    return max(clock)


def peak_live(line):
    """Count up and down."""
    live = most = 0
    for op in line.replace("|", " ").split():
        live += {"F": 1, "B": -1, "I": -1, "W": 0}[op[0]]
        most = max(most, live)
    return most
