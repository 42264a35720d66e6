"""Chapter 4, latent attention: three exercises. `pytest docs/book -k chapter4` says how far you are."""


def cache_bytes(c, tokens, kind):
    """Bytes of the cache of all layers in bfloat16. c a Config; kind "mha", "gqa8", "mqa" or "mla" -> int.

    The first three keep a key and a value of v_head_dim channels each, for every head, for 8 groups, for all heads together;
    "mla" keeps the latent and the rotated key.
    """
    raise NotImplementedError("exercise 4.1")


def absorb(q, w_uk):
    """Queries in latent space: W_UK^T q for every head. q (S, H, Dn), w_uk (H, Dn, C) -> (S, H, C)."""
    raise NotImplementedError("exercise 4.2")


def cheaper(c, new, keys):
    """ "expanded" or "absorbed": the form with fewer multiplications, for `new` queries that all see `keys` keys of one layer.

    Expanded: unfold every key's latent, then scores and values. Absorbed: move the queries in, scores and values in latent
    space, move the results out. Of equals "expanded".
    """
    raise NotImplementedError("exercise 4.3")
