"""Chapter 6, multi-token prediction: three exercises. `pytest docs/book -k chapter6` says how far you are."""


def targets(tokens, k):
    """(embedded, foretold): two lists for the positions at which module k has a target. tokens: a list of ids.

    At position i (from 0) the module embeds tokens[i + k] and foretells tokens[i + k + 1].
    """
    raise NotImplementedError("exercise 6.1")


def step_distribution(p, q):
    """(out, stands): the distribution of the first token when a draft from q is checked against p, and the chance that it stands.

    p, q (V,), both sum to 1 -> out (V,), float. Build `out` from its two branches (stood; fell and drawn anew), do not return p.
    Where nothing can fall, the second branch has weight 0.
    """
    raise NotImplementedError("exercise 6.2")


def tokens_a_run(chances):
    """Expected tokens of one run of the main model with len(chances) drafts. chances[d]: that draft d stands, if all before did.

    A draft that falls is replaced by one token and ends the run; if all stand, one more token comes.
    """
    raise NotImplementedError("exercise 6.3")
