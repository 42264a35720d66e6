"""R 3.2.1, table 2: pipeline schedules as data, their bubbles, and the checker that a porter runs on their own."""

import argparse
import itertools
import json
import pathlib
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.cli import schedule as schedule_command
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.cost.cluster import Cluster, traffic
from refimpl.parallel_emulation.pipeline import SCHEDULES, Times, build, check, draw, facts, simulate
from refimpl.parallel_emulation.pipeline.bubbles import is_exact, published
from refimpl.parallel_emulation.pipeline.dualpipe import dualpipe, dualpipev
from refimpl.parallel_emulation.pipeline.schedule import Message, Schedule, parse, parse_steps, step_text
from refimpl.parallel_emulation.pipeline.schedules_1f1b import gpipe, interleaved, one_f_one_b, zb1p

# ---- Orders

WRITTEN_OUT = {
    ("gpipe", 2, 3): "F0 F1 F2 B0 B1 B2 / F0 F1 F2 B0 B1 B2",
    ("1f1b", 3, 4): "F0 F1 F2 B0 F3 B1 B2 B3 / F0 F1 B0 F2 B1 F3 B2 B3 / F0 B0 F1 B1 F2 B2 F3 B3",
    ("1f1b", 3, 1): "F0 B0 / F0 B0 / F0 B0",
    ("zb1p", 3, 4): "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 / F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3"
    " / F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
}


@pytest.mark.parametrize("size", WRITTEN_OUT)
def test_small_orders_written_out_by_hand(size):
    """Catches a warm-up one forward too long or short, and weight parts postponed by the wrong number."""
    expected = re.sub(r"([FBIW])(\d)", r"\g<1>0.\2", WRITTEN_OUT[size])
    assert f"{build(*size)}".split("\n") == expected.split(" / ")


def test_interleaved_order_written_out_by_hand():
    """Two ranks, two chunks each, four micro-batches. Catches chunks taken in the wrong order in the backward."""
    assert f"{interleaved(2, 4, 2)}".split("\n") == [
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3",
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3",
    ]


def greedy_1f1b(p, m):
    """An oracle with no formula in it: in each tick a rank takes a backward if one is ready, else a forward if fewer
    than P-r are alive.
    """
    forward, backward, orders = [[] for _ in range(p)], [[] for _ in range(p)], [[] for _ in range(p)]
    for _ in range(4 * (m + p)):
        known_f, known_b = [list(x) for x in forward], [list(x) for x in backward]
        for r in range(p):
            f, b = len(forward[r]), len(backward[r])
            if b < f and (r == p - 1 or b in known_b[r + 1]) and b in known_f[r]:
                backward[r].append(b)
                orders[r].append(f"B0.{b}")
            elif f < m and f - b < p - r and (r == 0 or f in known_f[r - 1]):
                forward[r].append(f)
                orders[r].append(f"F0.{f}")
    return [" ".join(order) for order in orders]


@given(st.integers(1, 7), st.integers(1, 12))
@settings(deadline=None)
def test_1f1b_is_what_greedy_ranks_do(p, m):
    """Catches an order that is not 1F1B for few micro-batches."""
    assert f"{one_f_one_b(p, m)}".split("\n") == greedy_1f1b(p, m)


@pytest.mark.parametrize("name", ["DualPipe", "dual-pipe", "Interleaved 1F1B", "interleaved", "1F1B", "ZB1P"])
def test_a_name_may_be_spelt_as_people_spell_it(name):
    """Catches a command that knows DualPipe and not dualpipe."""
    assert build(name, 2, 4).name in name.lower().replace("-", "")


# ---- Bubbles and memory

ONE_STAGE_PER_RANK = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zb1p}
whole = st.integers(1, 6)


def bubbles(schedule, times, **how):
    timeline = simulate(schedule, times, **how)
    return {timeline.bubble(rank) for rank in range(schedule.layout.n_ranks)}


@given(st.integers(1, 5), st.integers(1, 9), whole, whole, whole)
@settings(deadline=None)
def test_gpipe_and_1f1b_idle_exactly_by_their_formula(p, m, f, i, w):
    """(P-1)(F+B) for any times and any m. Catches a timeline that starts a step before its input is there."""
    times = Times(F=f, B=i + w, W=w)
    for make in (gpipe, one_f_one_b):
        assert bubbles(make(p, m), times) == {(p - 1) * (f + i + w)}
        assert is_exact(make(p, m), times)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), whole, whole)
@settings(deadline=None)
def test_interleaving_divides_the_bubble_by_the_chunks(p, groups, v, f, b):
    """(P-1)(F+B)/v with F, B of the whole rank. Catches a warm-up that ignores the chunks."""
    of_a_rank = v * f, v * b
    times = Times(F=f, B=b, W=0)
    assert bubbles(interleaved(p, p * groups, v), times) == {(p - 1) * sum(of_a_rank) / v}


@given(st.integers(2, 5), st.integers(0, 4), whole, whole, whole)
@settings(deadline=None)
def test_zb1p_idles_exactly_by_its_formula_only_where_it_says(p, more, f, i, w):
    """(P-1)(F+B-2W) if and only if W <= F, W <= I (m >= P here). Catches a domain stated too wide or too narrow."""
    schedule, times = zb1p(p, p + more), Times(F=f, B=i + w, W=w)
    inside = w <= f and w <= i
    assert (bubbles(schedule, times) == {(p - 1) * (f + i + w - 2 * w)}) == inside == is_exact(schedule, times)


def test_zb1p_with_fewer_micro_batches_than_ranks_idles_longer():
    """Why m >= P is in the domain. Catches a formula quoted for the start of a batch ramp."""
    assert bubbles(zb1p(4, 2), Times()) == {5}
    assert published(zb1p(4, 2), Times()) == 3
    assert not is_exact(zb1p(4, 2), Times())


@given(st.integers(1, 4), st.integers(0, 5), whole, whole, st.integers(0, 6))
@settings(deadline=None)
def test_dualpipe_idles_exactly_by_its_formula_inside_its_conditions(n, more, f, w, extra):
    """(PP/2-1)(F&B+B-3W) if F = I, F&B = F+B, W <= F. Catches conditions that are not sufficient."""
    f, w = max(f, w), min(f, w)
    times = Times(F=f, B=f + w, W=w, FB=2 * f + w)
    for schedule in (dualpipe(2 * n, 4 * n + 2 * more), dualpipev(n, 2 * n + extra)):
        assert is_exact(schedule, times)
        assert bubbles(schedule, times) == {published(schedule, times)} == {(n - 1) * (2 * f + w + f + w - 3 * w)}


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_dualpipe_is_not_said_to_be_exact_where_it_is_not(name):
    """On a grid of times, at 4 and 8 stages. Catches conditions that are not kept."""
    schedule = build(name, 4, 16)
    for f, i, w, more in itertools.product([1, 2, 3], [1, 2, 3], [1, 2, 3], [-1, 0, 1]):
        times = Times(F=f, B=i + w, W=w, FB=f + i + w + more)
        if is_exact(schedule, times):
            assert bubbles(schedule, times) == {published(schedule, times)}
        elif f != i and w <= f:
            assert bubbles(schedule, times) != {published(schedule, times)}


@given(st.integers(1, 6), st.integers(0, 6))
@settings(deadline=None)
def test_live_activations_of_table_2(p, more):
    """1F1B: P-r; ZB1P: P until the weight part; GPipe: m. Catches a peak counted before the backward is taken off."""
    m = p + more
    assert facts(one_f_one_b(p, m)).peak_live == tuple(range(p, 0, -1))
    assert facts(zb1p(p, m)).peak_until_weight == (p,) * p
    assert facts(gpipe(p, m)).peak_live == (m,) * p


@given(whole, whole, whole, st.integers(-2, 2))
def test_dualpipe_on_two_stages_never_idles(f, i, w, more):
    """Catches a formula that is not 0 for PP = 2."""
    times = Times(F=f, B=i + w, W=w, FB=f + i + w + more)
    for schedule in (dualpipe(2, 6), dualpipev(1, 5)):
        assert is_exact(schedule, times)
        assert bubbles(schedule, times) == {published(schedule, times)} == {0}


# ---- The timeline against a clock that ticks


def ticked(schedule, times, message):
    """Start of every step by walking time in units: a rank starts its next step once what it needs has arrived."""
    layout, finished, starts = schedule.layout, {}, [[] for _ in schedule.ranks]
    busy_until = [0] * layout.n_ranks
    length = {"F": times.F, "B": times.B, "I": times.B - times.W, "W": times.W}
    for now in range(2000):
        for r, steps in enumerate(schedule.ranks):
            if now < busy_until[r] or len(starts[r]) == len(steps):
                continue
            step = steps[len(starts[r])]
            arrived = []
            for op in step:
                stage = layout.stages[r][op.direction] + (-1 if op.kind == "F" else 1)
                outside = op.kind == "W" or not 0 <= stage < layout.n_stages
                key = (op.kind == "F", stage, layout.stream(op.direction), op.chunk)
                end, rank = finished.get(key, (10**9, r))
                arrived.append(outside or now >= end + (message if rank != r else 0))
            if all(arrived):
                took = times.overlapped if len(step) == 2 else length[step[0].kind]
                starts[r].append(now)
                busy_until[r] = now + took
                for op in step:
                    if op.kind != "W":
                        place = (op.kind == "F", layout.stages[r][op.direction], layout.stream(op.direction), op.chunk)
                        finished[place] = now + took, r
    return starts


@given(
    st.sampled_from(sorted(SCHEDULES)), st.integers(1, 2), whole, whole, whole, st.integers(0, 3), st.integers(-2, 2)
)
@settings(deadline=None, max_examples=40)
def test_the_event_simulation_is_what_a_ticking_clock_sees(name, half, f, i, w, message, more):
    """Catches a message that takes no time, or takes it inside a rank too, and an F&B charged as F + B."""
    schedule, times = build(name, 2 * half, 4 * half), Times(f, i + w, w, f + i + w + more, message)
    spans = simulate(schedule, times).spans
    assert [[span.start for span in row] for row in spans] == ticked(schedule, times, message)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"zb1p"}))
def test_rendezvous_batches_do_not_widen_the_bubble(name):
    """Catches batches that wait for a partner who is not there yet (ZB1P's do: its W sits between I and its send)."""
    schedule = build(name, 4, 16)
    assert bubbles(schedule, Times(), synchronous=True) == bubbles(schedule, Times())


# ---- The same object as a rank program


def walk(comm, schedule):
    """What an executor does, with the name of each result, (is forward, stage, micro-batch), instead of a tensor."""
    layout, rank = schedule.layout, comm.rank
    for batch, _ in schedule.program(rank):
        out = [m for m in batch if m.verb == "s"]
        into = [m for m in batch if m.verb == "r"]
        sends = [(m.peer, np.array([m.kind == "F", layout.stage(rank, m), layout.micro_batch(m)])) for m in out]
        received = comm.exchange(sends, [m.peer for m in into])
        for m, name in zip(into, received, strict=True):
            before = layout.stage(rank, m) + (-1 if m.kind == "F" else 1)
            assert name.tolist() == [m.kind == "F", before, layout.micro_batch(m)]


@pytest.mark.parametrize("mode", ["buffered", "synchronous"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_receives_what_its_next_step_needs(name, mode):
    """On the simulator, untagged, also where a send waits for its receive. Catches a batch that only buffering saves."""
    schedule, log = build(name, 4, 12), Log()
    spmd(4, walk, schedule, send_mode=mode, log=log)
    sent = facts(schedule).sent
    assert [log.bytes(rank=rank) for rank in range(4)] == [24 * n for n in sent]  # three int64 a message
    links = traffic(Cluster(4, gpus_per_node=2), log.matrix(4))
    assert (links.nvlink_out + links.ib_out).tolist() == [24 * n for n in sent]


# ---- The checker


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3), st.integers(2, 4))
@settings(deadline=None)
def test_every_schedule_passes_its_own_check(name, half, groups):
    """Catches an untagged message out of order and a circular wait, buffered or rendezvous, at any size."""
    check(build(name, 2 * half, 2 * half * groups))


def edited(schedule, rank, old, new):
    """The schedule with one rank's line changed, messages derived afresh."""
    lines = str(schedule).split("\n")
    assert f" {old} " in f" {lines[rank]} "
    lines[rank] = f" {lines[rank]} ".replace(f" {old} ", f" {new} " if new else " ", 1).strip()
    return parse("\n".join(lines), schedule.layout)


PLANTED = {
    "a lost forward": (one_f_one_b(3, 4), 1, "F0.2", "", "chunk 0.2 has 0 forwards"),
    "a forward twice": (one_f_one_b(3, 4), 1, "F0.2", "F0.2 F0.2", "chunk 0.2 has 2 forwards"),
    "a backward twice": (zb1p(3, 4), 2, "I0.1", "I0.1 B0.1", "chunk 0.1 has 1 full backwards and 1"),
    "no weight part": (zb1p(3, 4), 0, "W0.3", "", "chunk 0.3 has 0 weight parts and 1"),
    "a weight part of a full backward": (one_f_one_b(3, 4), 0, "B0.3", "B0.3 W0.3", "chunk 0.3 has 1 weight parts"),
    "a backward first": (one_f_one_b(3, 4), 2, "F0.1 B0.1", "B0.1 F0.1", "B0.1 needs F0.1 in a step before it"),
    "a pair of one chunk": (one_f_one_b(3, 4), 2, "F0.1 B0.1", "F0.1|B0.1", "F0.1|B0.1 needs F0.1"),
    "a weight part first": (zb1p(3, 4), 0, "I0.1 W0.1", "W0.1 I0.1", "W0.1 needs I0.1 in a step before it"),
    "the younger weight part": (zb1p(3, 4), 2, "W0.1 W0.2", "W0.2 W0.1", "W0.2 is computed while W0.1 is the oldest"),
    "an unknown chunk": (gpipe(2, 3), 0, "F0.2", "F0.3", "F0.3: there are 1 directions and 3 chunks"),
    "a sender out of step": (gpipe(2, 3), 0, "F0.1 F0.2", "F0.2 F0.1", "message 1 from rank 0 to rank 1: sent is F of"),
    "a receiver out of step": (gpipe(2, 3), 0, "B0.1 B0.2", "B0.2 B0.1", "message 1 from rank 1 to rank 0"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_checker_finds_a_planted_mistake(mistake):
    """Catches a checker that accepts anything; each message names the op."""
    schedule, rank, old, new, complaint = PLANTED[mistake]
    with pytest.raises(SpecError, match=re.escape(complaint)):
        check(edited(schedule, rank, old, new))


def test_the_checker_finds_a_circular_wait():
    """Two ranks that each do their backward of the other's direction first. Catches a checker without a run."""
    schedule = dualpipe(2, 4)
    with pytest.raises(
        SpecError, match=r"wait for each other(.|\n)*rank 0, step 0 \(F1.0\) waits for F of stage 0, micro"
    ):
        turned = edited(edited(schedule, 0, "F0.0 F1.0", "F1.0 F0.0"), 1, "F1.0 F0.0", "F0.0 F1.0")
        check(turned, rendezvous=False)


def test_interleaved_needs_its_paired_batches():
    """With a batch per op the ring waits in a circle when sends are not buffered. Catches that reaching a real engine."""
    schedule = interleaved(2, 4, 2)
    plain = parse(str(schedule), schedule.layout)
    check(plain, rendezvous=False)
    with pytest.raises(SpecError, match=r"wait for each other(.|\n)*with batches as rendezvous"):
        check(plain)


def with_batches(schedule, change):
    """The schedule with rank 0's batches changed in place by `change(list of lists)`."""
    lists = [list(batch) for batch in schedule.batches[0]]
    change(lists)
    first = tuple(tuple(batch) for batch in lists)
    return Schedule(schedule.name, schedule.layout, schedule.ranks, (first, *schedule.batches[1:]))


def first(batches, verb):
    return next((i, m) for i, batch in enumerate(batches) for m in batch if m.verb == verb)


def drop_send(batches):
    i, message = first(batches, "s")
    batches[i].remove(message)


def send_early(batches):
    i, message = first(batches, "s")
    batches[i].remove(message)
    batches[i - 1].append(message)


def receive_late(batches):
    i, message = first(batches, "r")
    batches[i].remove(message)
    batches[i + 1].append(message)


def send_twice(batches):
    i, message = first(batches, "s")
    batches[i].append(message)


def wrong_peer(batches):
    i, message = first(batches, "s")
    batches[i][batches[i].index(message)] = Message("s", "F", 0, 0, 2)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop_send, "sF0.0@1 is posted 0 times; expected 1"),
        (send_early, "sF0.0@1 is posted before it is computed"),
        (receive_late, "B0.0 is computed before rB0.0@1 is posted"),
        (send_twice, "sF0.0@1 is posted 2 times; expected 1"),
        (wrong_peer, "sF0.0@2 is posted before it is computed"),
    ],
)
def test_the_checker_finds_a_message_gone_wrong(change, complaint):
    """Catches a lost, early, late, doubled or misdirected message."""
    with pytest.raises(SpecError, match=complaint):
        check(with_batches(one_f_one_b(3, 4), change))


def test_the_checker_finds_messages_out_of_order():
    """Two sends of one batch exchanged: without tags the receiver takes the wrong one. Catches set comparison."""
    schedule = dualpipe(4, 8)

    def swap(batches):
        batch = next(b for b in batches if len([m for m in b if m.verb == "s"]) == 2)
        batch[0], batch[1] = batch[1], batch[0]

    with pytest.raises(SpecError, match="message 4 from rank 0 to rank 1: sent is B of stage"):
        check(with_batches(schedule, swap))


# ---- Notation, pictures, command


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3))
@settings(deadline=None)
def test_the_notation_reads_back(name, half):
    """Catches a pair split, an op lost, chunks beyond 9 cut off."""
    schedule = build(name, 2 * half, 12)
    assert parse(str(schedule), schedule.layout).ranks == schedule.ranks


@pytest.mark.parametrize(
    "word", ["F0", "F0.", "G0.1", "F0.1|F0.2", "B0.1|F0.2", "F0.1|", "F0.1|B0.2|W0.1", "f0.1", "-"]
)
def test_malformed_notation_is_refused(word):
    """Catches a typo read as something else."""
    with pytest.raises(SpecError, match="is not a step"):
        parse_steps(f"F0.0 {word}")


def test_notation_for_other_ranks_is_refused():
    """Catches a file for another pipeline; the rank is named."""
    layout = gpipe(2, 1).layout
    with pytest.raises(SpecError, match="1 lines of ops for 2 ranks"):
        parse("F0.0 B0.0", layout)
    with pytest.raises(SpecError, match="rank 1: 'X' is not a step"):
        parse("F0.0 B0.0\nX", layout)
    with pytest.raises(SpecError, match=r"rank 1, F1\.0: it has 1 directions"):
        parse("F0.0 B0.0\nF1.0", layout)


@pytest.mark.parametrize(
    ("name", "p", "m", "chunks", "complaint"),
    [
        ("2f2b", 4, 8, None, "known: gpipe, 1f1b"),
        ("", 4, 8, None, "schedule ''; known"),
        ("gpipe", 0, 4, None, "pipeline of 0 ranks"),
        ("1f1b", 4, 0, None, "0 micro-batches"),
        ("interleaved", 8, 20, None, "20 micro-batches, not a multiple of the 8 ranks"),
        ("interleaved", 4, 8, 0, "0 chunks per rank"),
        ("interleaved", 0, 8, 2, "0 ranks and 8"),
        ("1f1b", 4, 8, 2, "only 'interleaved'"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name, p, m, chunks, complaint):
    """Catches an incomplete or endless schedule instead of an error. (DualPipe's are in its own file.)"""
    with pytest.raises(SpecError, match=complaint):
        build(name, p, m, chunks)


@pytest.mark.parametrize("bad", [{"F": -1}, {"W": 3}, {"message": -1}, {"FB": float("nan")}, {"B": float("inf")}])
def test_impossible_times_are_refused(bad):
    """Catches a weight part longer than its backward, and time running backwards."""
    with pytest.raises(SpecError, match="time "):
        Times(**bad)


def command(*words):
    """Exit code of a command line, as refimpl's own main would dispatch it."""
    parser = argparse.ArgumentParser()
    schedule_command.add(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def test_the_command_prints_one_line_a_rank(capsys):
    """Catches step numbers or names in output that another program reads."""
    assert command("schedule", "dualpipe", "--pp", 2, "--microbatches", 4, "--format", "ops") == 0
    assert capsys.readouterr().out == (
        "F0.0 F1.0 F0.1 B1.0 F1.1|B0.0 B1.1 I0.1 W0.1\nF1.0 F0.0 F1.1 B0.0 F0.1|B1.0 B0.1 I1.1 W1.1\n"
    )


def test_the_text_picture_is_to_scale():
    """Catches a row that is shorter than its time, and a step drawn where another still runs."""
    timeline = simulate(one_f_one_b(2, 3), Times())
    assert draw.text(timeline).split("\n") == [
        "rank  1f1b, 12 time units",
        "0     F0 F1       B0--- F2 B1---    B2---",
        "1        F0 B0--- F1 B1--- F2 B2---",
    ]


PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "schedules.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="about the repository's documentation; this is an installed wheel")
def test_the_picture_in_the_documentation_is_the_commands():
    """Catches a page that shows another version of the schedule."""
    shown = re.search(r"```text\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown[1] == draw.text(simulate(dualpipe(4, 10), Times()))


def test_text_names_the_chunk_where_case_cannot():
    """More than two directions. Catches chunks 1 and 2 drawn alike."""
    assert "F2.1 " in draw.text(simulate(interleaved(2, 2, 3), Times()))
    assert "f1 " in draw.text(simulate(interleaved(2, 2, 2), Times()))


def test_the_svg_has_a_box_for_every_op_at_its_time():
    """Catches boxes lost or misplaced: hovering text gives the op and its span."""
    schedule = dualpipe(4, 8)
    timeline = simulate(schedule, Times())
    root = ET.fromstring(draw.svg(timeline))
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    spans = [span for row in timeline.spans for span in row]
    assert titles == [f"{step_text(s.step)}  {s.start:g} to {s.end:g}" for s in spans]
    boxes = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("height") == "22"]
    pairs = sum(len(span.step) == 2 for span in spans)
    assert len(boxes) == sum(len(span.step) for span in spans) + pairs
    assert max(float(e.get("x")) + float(e.get("width")) for e in boxes) <= float(root.get("width"))


@pytest.mark.parametrize("name", ["dualpipe", "zb1p"])
def test_time_goes_right_and_ranks_go_down(name):
    """Each box where its span says, by one scale for all; numbers inside. Catches rows on one another, and a drifting scale."""
    timeline = simulate(build(name, 4, 8), Times(F=1, B=2, W=0.5, FB=3))
    root = ET.fromstring(draw.svg(timeline))
    groups = iter(root.iter("{http://www.w3.org/2000/svg}g"))
    rows = {}
    scale = 26 / 0.5  # the shortest op is 26 pixels wide
    for rank, row in enumerate(timeline.spans):
        for span in row:
            group = next(groups)
            boxes = group.findall("{http://www.w3.org/2000/svg}rect")
            written = group.findall("{http://www.w3.org/2000/svg}text")
            part = (span.end - span.start) / len(span.step)
            for i, (op, box, text) in enumerate(zip(span.step, boxes, written, strict=False)):
                x, y, width = (float(box.get(k)) for k in ("x", "y", "width"))
                assert (x, width) == pytest.approx((64 + scale * (span.start + i * part), scale * part), abs=0.02)
                assert float(text.get("x")) == pytest.approx(x + width / 2, abs=0.02) and text.text == str(op.chunk)
                assert y < float(text.get("y")) < y + 22
                rows.setdefault(rank, set()).add(y)
    tops = [y for rank in range(4) for y in rows[rank]]
    assert tops == sorted(tops) and len(tops) == 4 and np.diff(tops).min() > 22
    labels = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if (e.text or "").startswith("rank ")]
    assert all(y < float(e.get("y")) < y + 22 for y, e in zip(tops, labels, strict=True))
    legend = [e for e in root.findall("{http://www.w3.org/2000/svg}rect") if e.get("height") == "14"]
    places = [float(e.get("x")) for e in legend]
    assert len(places) == 8 and np.diff(places).min() >= 14
    assert all(tops[-1] + 22 < float(e.get("y")) < float(root.get("height")) - 14 for e in legend)


def test_the_chrome_trace_holds_every_step_in_microseconds(tmp_path, capsys):
    """Catches seconds written as microseconds, and overlapping slices on one thread."""
    out = tmp_path / "trace.json"
    line = (
        "schedule",
        "zb1p",
        "--pp",
        3,
        "--microbatches",
        4,
        "--format",
        "chrome",
        "--times",
        "F=2,B=3,W=1",
        "-o",
        out,
    )
    assert command(*line) == 0
    events = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 3 * 4 * 3
    assert {e["name"][0]: e["dur"] for e in events} == {"F": 2000, "I": 2000, "W": 1000}
    for rank in range(3):
        mine = sorted((e["ts"], e["dur"]) for e in events if e["tid"] == rank)
        assert all(a + b <= c for (a, b), (c, _) in itertools.pairwise(mine))
    assert capsys.readouterr().out == f"{out}\n"


def test_check_judges_a_porters_order(tmp_path, capsys):
    """Catches a comparison that only says no: the first difference is named. Exit code 0 only for ours."""
    file = tmp_path / "theirs.txt"
    line = ("schedule", "1f1b", "--pp", 2, "--microbatches", 3, "--check", file)
    file.write_text("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF0.0 B0.0 F0.1 B0.1 F0.2 B0.2\n")
    assert command(*line) == 0
    file.write_text("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2\nF0.0 B0.0 F0.1 B0.1 F0.2 B0.2\n")
    assert command(*line) == 1
    assert "rank 0, step 2: F0.2; in 1f1b it is B0.0" in capsys.readouterr().out
    file.write_text("F0.0 F0.1 B0.0 F0.2 B0.1\nF0.0 B0.0 F0.1 B0.1 F0.2 B0.2\n")
    assert command(*line) == 1
    assert "chunk 0.2 has 0 full backwards" in capsys.readouterr().out
    with pytest.raises(SpecError, match="cannot be read"):
        command(*line[:-1], tmp_path / "absent")


@pytest.mark.parametrize("text", ["G=1", "F", "F=x", "F=1;B=2"])
def test_malformed_times_are_refused(text):
    """Catches a duration silently left at its default."""
    with pytest.raises(SpecError, match="--times"):
        command("schedule", "1f1b", "--pp", 2, "--microbatches", 3, "--times", text)
