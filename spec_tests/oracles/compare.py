"""Comparing recorded taps: sets as sets, slots in the order of their experts, the rest by norm."""

import numpy as np

# Chosen experts and groups: sets, whose order means nothing.
SETS = ("router.ids", "router.groups")


def distance(tap, ours, theirs):
    """Relative normwise difference |ours - theirs| / |theirs| of one tap; ours and theirs are {tap:
    array}.

    Sets count as 0 or infinity, and so does another pattern of -inf.
    """
    a, b = canonical(tap, ours), canonical(tap, theirs)
    if a.shape != b.shape:
        raise AssertionError(f"{tap} has shape {a.shape}, the oracle's is {b.shape}")
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or (tap.endswith(SETS) and (a != b).any()):
        return np.inf
    scale = np.linalg.norm(b[finite])
    return float(np.linalg.norm(a[finite] - b[finite]) / (scale or 1.0))


def canonical(tap, taps):
    """The tap as float64, chosen experts ascending and weights in that order."""
    value = np.asarray(taps[tap], np.float64)
    if tap.endswith(SETS):
        return np.sort(value, axis=-1)
    if tap.endswith("router.weights"):
        order = np.argsort(taps[tap.replace("router.weights", "router.ids")], axis=-1)
        return np.take_along_axis(value, order, axis=-1)
    return value


def differing(ours, theirs, taps, limit):
    """{tap: distance} of the taps that are farther apart than limit (or not a number), in their order."""
    distances = {tap: distance(tap, ours, theirs) for tap in taps}
    return {tap: d for tap, d in distances.items() if not d <= limit}


def routing_margin(config, taps):
    """The closest call of all routings: last chosen minus first rejected, over groups and experts."""
    margins = [1.0]
    for tap, choice in taps.items():
        if tap.endswith("router.choice"):
            unit = tap.removesuffix("router.choice")
            if unit + "router.groups" in taps:
                margins.append(_gap(taps[unit + "router.group_scores"], config["topk_group"]))
                choice = np.where(_kept(config, taps[unit + "router.groups"]), choice, -np.inf)
            margins.append(_gap(choice, config["num_experts_per_tok"]))
    return min(margins)


def _gap(values, count):
    ordered = -np.sort(-values, axis=-1)
    if count == ordered.shape[-1]:
        return np.inf
    return float((ordered[..., count - 1] - ordered[..., count]).min())


def _kept(config, groups):
    """(..., E) is the expert in one of the kept groups (..., topk_group)?"""
    group_of = np.arange(config["n_routed_experts"]) // (config["n_routed_experts"] // config["n_group"])
    return (groups[..., None] == group_of).any(-2)
