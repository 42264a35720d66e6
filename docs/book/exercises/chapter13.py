"""Chapter 13, long context: three exercises. `pytest docs/book -k chapter13` says how far you are."""


def yarn(dim, theta, factor, original, fast, slow):
    """YaRN's frequencies: a list of dim / 2 floats.

    Pair i has theta ** (-2 i / dim). The pair that makes r turns in `original` tokens is
    corr(r) = dim ln(original / (2 pi r)) / (2 ln theta), a real number. low = floor(corr(fast)), at least 0; high =
    ceil(corr(slow)), at most dim - 1; if they are equal, high is 0.001 more. ramp = (i - low) / (high - low), cut to [0, 1].
    A pair is divided by factor as far as the ramp says: freq * (1 - ramp) + freq / factor * ramp.
    """
    raise NotImplementedError("exercise 13.1")


def rotate(x, position, freqs):
    """Interleaved pairs (x[2i], x[2i + 1]) turned by position * freqs[i], counter-clockwise.

    x: a list of 2 n floats -> list of 2 n floats
    """
    raise NotImplementedError("exercise 13.2")


def scores(tokens, length):
    """(sequences, scores) when `tokens` tokens are cut into sequences of `length`.

    How many whole sequences there are, and how many pairs of a query and a key that it may see (itself included) they have
    together. -> two ints
    """
    raise NotImplementedError("exercise 13.3")
