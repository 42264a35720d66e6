"""Chapter 12, serving: three exercises. `pytest docs/book -k chapter12` says how far you are."""


def blocks_needed(prompts, size):
    """How many blocks of `size` tokens hold all prompts, if full blocks at the beginning of equal prefixes are shared.

    prompts: a list of lists of ints. A block is shared by prompts that agree in all tokens up to and including it; a block that is
    not full is never shared. -> int
    """
    raise NotImplementedError("exercise 12.1")


def schedule(requests, rows, tokens):
    """The steps of a first-come scheduler: a list of steps, each a list of (request, tokens run).

    requests: a list of (prompt length, answer length), all there at the start, in this order; blocks never run out. A step runs at
    most `tokens` tokens. Those who run go on in the order they began: each runs what it lacks (the rest of its prompt, then one
    token a step), or what is left of the budget; nobody begins behind a prompt that is not read to its end. Then new ones begin
    while there are fewer than `rows` and budget is left. The step that ends the prompt decides the first token of the answer;
    a request with all its answer decided is gone.
    """
    raise NotImplementedError("exercise 12.2")


def touched(experts, k, tokens):
    """Expected number of different experts that `tokens` tokens choose, each k different ones, evenly, independently. -> float"""
    raise NotImplementedError("exercise 12.3")
