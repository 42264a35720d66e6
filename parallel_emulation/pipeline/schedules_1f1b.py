"""GPipe, 1F1B, interleaved 1F1B and ZB1P as lists of ops per rank; P ranks, m micro-batches, r counts from 0.

Orders follow Megatron-LM d98e8a6 (1F1B, interleaved) and the zero-bubble README 39f2c18 (ZB-H1, the "ZB1P" of R
table 2, in its handcrafted form; the tool of that name searches orders and may differ for unequal times).
"""

from __future__ import annotations

from collections.abc import Iterator

from refimpl.autograd.errors import require

from .schedule import Layout, Op, RankWriter, Schedule, Step, assemble, from_steps


def _straight(pp: int, micro_batches: int) -> Layout:
    """Rank r holds stage r."""
    require(pp >= 1, f"a pipeline of {pp} ranks; at least 1")
    require(micro_batches >= 1, f"{micro_batches} micro-batches; at least 1")
    return Layout(tuple((r,) for r in range(pp)), micro_batches)


def gpipe(pp: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards. Bubble (P-1)(F+B); m live chunks."""
    layout = _straight(pp, micro_batches)
    row: list[Step] = [(Op("F", 0, j),) for j in range(micro_batches)]
    row += [(Op("B", 0, j),) for j in range(micro_batches)]
    return from_steps("gpipe", layout, [row] * pp)


def one_f_one_b(pp: int, micro_batches: int) -> Schedule:
    """P-1-r forwards, then one forward and one backward in turn, then the backwards left.

    Bubble (P-1)(F+B); P-r live chunks on rank r.
    """
    layout = _straight(pp, micro_batches)
    rows = [[(op,) for op in _alternate(micro_batches, warm_up=pp - 1 - r)] for r in range(pp)]
    return from_steps("1f1b", layout, rows)


def _alternate(m: int, warm_up: int) -> Iterator[Op]:
    """w = min(warm_up, m) forwards, m-w pairs F B, w backwards; each kind in micro-batch order."""
    w = min(warm_up, m)
    for j in range(m + w):
        if j < m:
            yield Op("F", 0, j)
        if j >= w:
            yield Op("B", 0, j - w)


def zb1p(pp: int, micro_batches: int) -> Schedule:
    """1F1B with each backward split: W of micro-batch j after I of j+r, what is left at the end.

    Bubble (P-1)(F+B-2W); P chunks live until their W on every rank, since the first r weight parts are postponed.
    """
    layout = _straight(pp, micro_batches)
    rows = [[(op,) for op in _split(pp, micro_batches, r)] for r in range(pp)]
    return from_steps("zb1p", layout, rows)


def _split(pp: int, m: int, r: int) -> Iterator[Op]:
    for kind, direction, j in _alternate(m, warm_up=pp - 1 - r):
        if kind == "F":
            yield Op("F", direction, j)
        else:
            yield Op("I", direction, j)
            if j >= r:
                yield Op("W", direction, j - r)
    yield from (Op("W", 0, j) for j in range(max(0, m - r), m))


def interleaved(pp: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B over v = `chunks` stages per rank: direction c of rank r is stage c*P + r.

    Micro-batches go in groups of P: chunk 0 for the whole group, then chunk 1, ...; backwards likewise from the last
    chunk. Bubble (P-1)(F+B)/v with F, B of the whole rank. Raises SpecError unless P divides m: in this plain form
    the ranks would wait for each other in a circle.
    """
    require(chunks >= 1, f"{chunks} chunks per rank; at least 1")
    require(micro_batches >= 1 and pp >= 1, f"{pp} ranks and {micro_batches} micro-batches; at least 1 of each")
    divides = micro_batches % pp == 0
    require(divides, f"interleaved 1F1B with {micro_batches} micro-batches, not a multiple of the {pp} ranks")
    layout = Layout(tuple(tuple(c * pp + r for c in range(chunks)) for r in range(pp)), micro_batches)
    writers = [RankWriter(layout, r) for r in range(pp)]
    for r, writer in enumerate(writers):
        warm_up = 2 * (pp - 1 - r) + (chunks - 1) * pp
        virtual = _alternate(micro_batches * chunks, warm_up)
        _write_pairs(writer, [_real(op, pp, chunks) for op in virtual], warm_up)
    return assemble("interleaved", layout, writers)


def _real(op: Op, pp: int, v: int) -> Op:
    """Virtual micro-batch k -> (chunk, micro-batch): groups of P, inside them chunk after chunk."""
    group, rest = divmod(op.chunk, pp * v)
    chunk, j = divmod(rest, pp)
    return Op(op.kind, chunk if op.kind == "F" else v - 1 - chunk, group * pp + j)


def _write_pairs(writer: RankWriter, ops: list[Op], warm_up: int) -> None:
    """Exchange once per pair F B, as Megatron does: the ranks form a ring, and with one batch per op they would wait
    for each other in a circle wherever a send is not over before its receive is posted.
    """
    n_pairs = max(0, len(ops) // 2 - warm_up)
    pairs, end = ops[warm_up : warm_up + 2 * n_pairs], warm_up + 2 * n_pairs
    for op in ops[:warm_up] if n_pairs else ops:
        writer.compute(op)
    for f, b in zip(pairs[::2], pairs[1::2], strict=True):
        writer.receive(f)
        writer.receive(b)
        writer.compute(f, send=False)
        writer.compute(b, send=False)
        writer.send(f)
        writer.send(b)
    for op in ops[end:] if n_pairs else ():
        writer.compute(op)
