"""Chapter 11, EPLB: three exercises. `pytest docs/book -k chapter11` says how far you are."""


def loads(tokens, slots, gpus):
    """Load of each GPU: an expert's tokens are shared equally by its copies.

    tokens: a list of E numbers. slots: a list of R experts, slot s is on GPU s // (R / gpus). -> list of `gpus` floats
    """
    raise NotImplementedError("exercise 11.1")


def copies(tokens, slots):
    """How many copies each expert gets: one each, every further slot to the largest tokens / copies; ties: the lower index.

    tokens: a list of E numbers. slots >= E. -> list of E ints
    """
    raise NotImplementedError("exercise 11.2")


def pack(weights, packs):
    """The pack of each item: heaviest first (ties: lower index), into the lightest pack with room (ties: lower pack).

    weights: a list of n whole numbers, n divisible by packs; a pack has room for n / packs. -> list of n ints
    """
    raise NotImplementedError("exercise 11.3")
