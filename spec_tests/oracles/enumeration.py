"""Every run of a program that draws, and its probability: an exact distribution from the program itself, without chance."""

import collections

import numpy as np


def outcomes(run):
    """{result: probability} of `run(draw)` over all choices of all its draws. The program is run once per
    path; `draw(p)` gives each index of positive probability in turn."""
    found, todo = collections.defaultdict(float), [()]
    while todo:
        script, path, weight = todo.pop(), [], 1.0

        def draw(p, script=script, path=path):
            nonlocal weight
            assert abs(p.sum() - 1) < 1e-12 and (p >= 0).all(), p
            choices = np.flatnonzero(p > 0).tolist()
            if len(path) < len(script):
                choice = script[len(path)]
            else:
                choice = choices[0]
                todo.extend((*path, other) for other in choices[1:])
            path.append(choice)
            weight *= p[choice]
            return choice

        found[run(draw)] += weight
    return dict(found)
