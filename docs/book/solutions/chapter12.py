"""Chapter 12: one way to do it."""


def blocks_needed(prompts, size):
    """A full block is its whole prefix."""
    full = {tuple(p[: i + size]) for p in prompts for i in range(0, len(p) - size + 1, size)}
    return len(full) + sum(len(p) % size > 0 for p in prompts)


def schedule(requests, rows, tokens):
    """Running first, then the queue."""
    left = [list(r) for r in requests]  # tokens of the prompt, tokens of the answer
    queue, running, steps = list(range(len(requests))), [], []
    while queue or running:
        step, budget = [], tokens
        for who in list(running):
            budget = _run(who, left, budget, step)
        while queue and len(running) < rows and budget:
            running.append(queue.pop(0))
            budget = _run(running[-1], left, budget, step)
        running = [who for who in running if left[who][1]]
        steps.append(step)
    return steps


def _run(who, left, budget, step):
    n = min(left[who][0] or 1, budget)
    if not n:
        return budget
    step.append((who, n))
    left[who][0] = max(left[who][0] - n, 0)
    left[who][1] -= left[who][0] == 0
    return budget - n


def touched(experts, k, tokens):
    """One minus the chance that all pass it by."""
    return experts * (1 - (1 - k / experts) ** tokens)
