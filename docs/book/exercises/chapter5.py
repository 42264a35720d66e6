"""Chapter 5, the router: three exercises. `pytest docs/book -k chapter5` says how far you are."""


def route(s, b, k, n_group, topk_group):
    """The experts of one token, best first. s (E,) affinities, b (E,) biases -> list of k ints.

    A group of E / n_group consecutive experts is worth the sum of its two largest s + b; the best topk_group groups stay, and
    of their experts the k with the largest s + b are chosen. Of equals the lower index comes first, in groups and in experts.
    """
    raise NotImplementedError("exercise 5.1")


def imbalance(ids, experts):
    """Largest load / mean load - 1. ids (N, K) int, each below `experts` -> float; experts without a token count too."""
    raise NotImplementedError("exercise 5.2")


def steps_until(load_of, experts, gamma, limit, most=10_000):
    """The number of bias updates until the imbalance of load_of(b) is at most `limit`, beginning with b = 0 (E,).

    An update is b + gamma for experts below the mean load, b - gamma for those above, b for those at it. 0 if the start is
    balanced already, None if `most` updates do not suffice.
    """
    raise NotImplementedError("exercise 5.3")
