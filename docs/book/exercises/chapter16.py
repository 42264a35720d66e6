"""Chapter 16, what the report does not say: three exercises. `pytest docs/book -k chapter16` says how far you are."""


def top_k(scores, k):
    """Indices of the k largest, largest first; of equals the lower index first. scores: a list of numbers -> list of k ints.

    -inf may occur; then too the lower index comes first.
    """
    raise NotImplementedError("exercise 16.1")


def softmax_scale(head_dim, factor, mscale_all_dim, longest, original, applies):
    """head_dim^-1/2, times m^2 with m = 0.1 mscale_all_dim ln(factor) + 1 where YaRN is in force. -> float

    factor <= 1, or mscale_all_dim 0: m is 1. applies "configured": in force always; "beyond_original": only if longest > original.
    """
    raise NotImplementedError("exercise 16.2")


def hidden_first(w):
    """eh_proj for [hidden; embedding] from one for [embedding; hidden]: w (D, 2 D) -> (D, 2 D), of the same products."""
    raise NotImplementedError("exercise 16.3")
