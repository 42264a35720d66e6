"""Chapter 3, rotating pairs: three exercises. `pytest docs/book -k chapter3` says how far you are."""


def turn(x, position, freq):
    """Channels (2i, 2i+1) of x turned by position * freq[i]. x (..., Dr), position int, freq (Dr/2,) -> (..., Dr)."""
    raise NotImplementedError("exercise 3.1")


def half_order(dim):
    """Indices p such that x[p] has half layout where x has interleaved layout. dim even -> (dim,) int."""
    raise NotImplementedError("exercise 3.2")


def interleaved_order(dim):
    """The inverse of half_order: x[half_order(dim)][interleaved_order(dim)] is x again. -> (dim,) int."""
    raise NotImplementedError("exercise 3.2")


def slowed(freq, factor, original, fast, slow):
    """YaRN's frequencies. freq (n,) falling by a constant ratio from 1, `original` the trained length -> (n,).

    The pair that makes r turns within `original` is number corr(r) = ln(original / (2 pi r)) / ln(freq[0] / freq[1]), not whole.
    Pairs up to floor(corr(fast)) keep their frequency, those from ceil(corr(slow)) on are divided by `factor`, and between them
    the share of the divided one rises linearly.
    """
    raise NotImplementedError("exercise 3.3")
