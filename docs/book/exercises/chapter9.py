"""Chapter 9, ranks: three exercises. `pytest docs/book -k chapter9` says how far you are."""


def copies(ids, home, experts, ranks, gpus):
    """(copies to other ranks, copies to other nodes) of one token: each rank, and each node, counts once.

    ids: its chosen experts. home: the rank it lives on. Expert e is on rank e // (experts / ranks), rank r in node r // gpus.
    """
    raise NotImplementedError("exercise 9.1")


def two_hops(home, targets, gpus):
    """The messages that bring a token from rank `home` to all ranks of `targets`: (first, second), sets of pairs (from, to).

    First hop: to each other node that is needed, to the rank with home's number in its node. Second hop: from the rank in a node at
    which the token is (home's own node included) to each target there. Nobody sends anything to himself.
    """
    raise NotImplementedError("exercise 9.2")


def all_reduce(comm, x):
    """The sum of all ranks' x, on every rank: a rank program.

    x (n,) float32, n a multiple of comm.size. Use comm.alltoallv once (each rank gets everybody's part of n / size numbers, and
    adds them up one after the other in rank order) and comm.allgather once. -> (n,) float32
    """
    raise NotImplementedError("exercise 9.3")
