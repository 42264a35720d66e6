"""Chapter 10, DualPipe: three exercises. `pytest docs/book -k chapter10` says how far you are."""


def one_f_one_b(ranks, micro_batches, rank):
    """The 1F1B order of one rank: a list of words F0, F1, ..., B0, B1, ...

    First as many forwards as there are ranks behind this one (or all, if there are fewer), then one forward and one backward in
    turn while there are forwards, then the backwards that are left.
    """
    raise NotImplementedError("exercise 10.1")


def makespan(orders, forward, backward):
    """When the last rank is done. orders: for each rank its list of words as above; the stage of rank r is r.

    A step starts when the rank's step before it has ended and its input is there: F of micro-batch j on rank r needs F of j on
    rank r-1; B of j on rank r needs B of j on rank r+1, and on the last rank its own F of j. Messages take no time. -> float
    """
    raise NotImplementedError("exercise 10.2")


def peak_live(line):
    """The most chunks whose forward is done and whose backward (B, or I for the input) is not.

    line: one rank's steps as `print(schedule)` shows them, "F0.0 F0.1|B1.0 I1.2 W1.2". In a pair the forward counts first. -> int
    """
    raise NotImplementedError("exercise 10.3")
