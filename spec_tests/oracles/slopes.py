"""Directional derivatives by central differences: what a gradient claims, measured."""

import numpy as np


def direction(weights, names, rng):
    """A random direction over the named weights, as large as the weights themselves."""
    return {n: rng.normal(size=weights[n].shape) * float(np.std(weights[n]) or 1.0) for n in names}


def slope(function, weights, along, step=1e-5):
    """(f(w + step along) - f(w - step along)) / (2 step), the other weights as they are."""

    def moved(t):
        return weights | {n: np.asarray(weights[n], np.float64) + t * along[n] for n in along}

    return (function(moved(step)) - function(moved(-step))) / (2 * step)


def inner(gradients, along):
    """(<gradients, along>, root of the sum of its squared terms): a slope and its scale."""
    terms = [np.ravel(np.asarray(gradients[n], np.float64) * along[n]) for n in along]
    return float(sum(t.sum() for t in terms)), float(np.linalg.norm(np.concatenate(terms)))
