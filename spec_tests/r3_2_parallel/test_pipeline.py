"""R 3.2.1, 3.2.3: schedules run with real V3 layers. Losses and gradients are those of the model on one rank."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import Parameter, SpecError, Tensor, ops, primitive
from refimpl.layers import Config
from refimpl.parallel_emulation.axes import mesh
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.pipeline import SCHEDULES, Layout, build, check, executor, facts, parse
from refimpl.spec_tests.cases.pipeline import SHARED, case, cases, even, in_turn, program, sequential, together
from refimpl.train import pipeline_parts

SMALLEST = {
    "gpipe": (2, 3),
    "1f1b": (3, 4),
    "interleaved": (2, 4),
    "zb1p": (3, 5),
    "dualpipe": (4, 8),
    "dualpipev": (2, 5),
}
assert set(SMALLEST) == set(SCHEDULES)


def expected(found, name, layout):
    """A weight's gradient: micro-batches in turn within a stream, then the streams."""
    m = layout.chunks
    streams = [found[s * m : (s + 1) * m] for s in range(layout.streams)]
    return in_turn(in_turn(grads[name] for _, grads in stream) for stream in streams)


def weights_of(inputs):
    """Each micro-batch's share of the sequences: they differ, so a micro-batch taken for another shows."""
    total = sum(len(i.tokens) for i in inputs)
    return [len(i.tokens) / total for i in inputs]


# ---- The same numbers


@given(cases(), st.integers(0, 99), st.sampled_from(["buffered", "synchronous"]))
@settings(max_examples=25, deadline=None)
def test_every_schedule_gives_the_losses_and_gradients_of_one_rank(given_case, seed, mode):
    """Catches a micro-batch taken for another, a stage run on the other stage's weights, a weight part left out or run
    twice, a gradient that enters at the wrong end, order that depends on timing.

    Bit for bit: every weight that a micro-batch uses once, since both add up micro-batches in turn, direction by
    direction. Embedding and head have up to 1 + n_mtp uses per micro-batch, in another order of sums: within
    2 roundings for each term.
    """
    schedule, model, inputs = given_case
    weight, n_mtp = weights_of(inputs), model.n_mtp
    results = spmd(
        schedule.layout.n_ranks,
        lambda comm: program(comm, schedule, model, inputs, weight, mtp_weight=0.3),
        seed=seed,
        send_mode=mode,
    )
    losses, grads = together(results)
    found = sequential(model, inputs, weight, mtp_weight=0.3)
    assert losses == {j: loss for j, (loss, _) in enumerate(found)}
    assert set(grads) == set(found[0][1])
    for name, g in grads.items():
        want = expected(found, name, schedule.layout)
        if name in SHARED and n_mtp:
            terms = (1 + n_mtp) * len(inputs)
            size = sum(np.abs(one[name]).max() for _, one in found)
            np.testing.assert_allclose(g, want, rtol=0, atol=2 * terms * np.finfo(g.dtype).eps * size, err_msg=name)
        else:
            np.testing.assert_array_equal(g, want, err_msg=name)


@pytest.mark.parametrize("name", SMALLEST)
def test_balance_losses_of_every_stage_count(name):
    """Catches the balance loss of a stage in the middle that is lost, or added once per later stage.

    The scores of a router get gradients from three places, added in another order than in the whole graph: a few
    roundings of float64 in each of some ten layers, 1e-12 of the largest element.
    """
    schedule, model, inputs = case(name, *SMALLEST[name], seed=5)
    how = {"mtp_weight": 0.3, "aux_weight": 0.7}
    weight = weights_of(inputs)
    n = schedule.layout.n_ranks
    losses, grads = together(spmd(n, lambda comm: program(comm, schedule, model, inputs, weight, **how)))
    found = sequential(model, inputs, weight, **how)
    for j, (loss, _) in enumerate(found):
        np.testing.assert_allclose(losses[j], loss, rtol=1e-14)
    for name, g in grads.items():
        want = expected(found, name, schedule.layout)
        np.testing.assert_allclose(g, want, rtol=0, atol=1e-12 * np.abs(want).max(), err_msg=name)
    plain = sequential(model, inputs, weight, mtp_weight=0.3)
    assert all(abs(a[0] - b[0]) > 1e-3 * abs(b[0]) for a, b in zip(found, plain, strict=True))  # the losses are felt


def test_a_stage_may_have_no_layers_and_stages_may_differ():
    """Catches bounds off by one: sizes 0, 3, 1 for four layers."""
    _, model, inputs = case("gpipe", 4, 3)
    cut, schedule = pipeline_parts.cut(model.config, 3, (0, 3, 1)), build("1f1b", 3, 3)

    def rank(comm):
        mine = cut.only(model, [comm.rank]).with_gradients()
        out = executor.run(comm, schedule, [pipeline_parts.Stage(mine, cut, comm.rank, inputs, even([1.0] * 3), 0.3)])
        return out.losses, {n: out.grads[w] for n, w in pipeline_parts.trained(mine).items() if w in out.grads}, None

    losses, grads = together(spmd(3, rank))
    found = sequential(model, inputs, [1.0] * 3, mtp_weight=0.3)
    assert losses == {j: loss for j, (loss, _) in enumerate(found)} and set(grads) == set(found[0][1])
    name = "model.layers.2.self_attn.o_proj.weight"
    np.testing.assert_array_equal(grads[name], expected(found, name, schedule.layout))


# ---- What is alive, what travels


class Watched:
    """A stage that knows how many of the graphs that it has made are still there."""

    def __init__(self, part, made):
        self.part, self.made = part, made

    def __call__(self, x, j):
        y, loss = self.part(x, j)
        self.made["graphs"].append(weakref.ref(loss if y is None else y))
        alive = sum(1 for ref in self.made["graphs"] if ref() is not None)
        self.made["most"] = max(self.made["most"], alive)
        return y, loss


@pytest.mark.parametrize("name", SMALLEST)
def test_live_activations_peak_where_the_checker_says(name):
    """Catches a graph kept beyond its backward (memory that the schedule's order was made to save), and a count that is
    not that of the graphs: they are counted here as they really are, by weak references.
    """
    schedule, model, inputs = case(name, *SMALLEST[name])

    def rank(comm):
        made = {"graphs": [], "most": 0}
        gc.disable()  # what lives on only in a reference cycle is alive
        try:
            peaks = program(
                comm, schedule, model, inputs, [1.0] * len(inputs), lambda p: Watched(p, made), mtp_weight=0.3
            )[2]
        finally:
            gc.enable()
        return (*peaks, made["most"])

    f = facts(schedule)
    assert spmd(schedule.layout.n_ranks, rank) == list(
        zip(f.peak_live, f.peak_until_weight, f.peak_queue, f.peak_live, strict=True)
    )


@pytest.mark.parametrize("name", SMALLEST)
def test_only_hidden_states_and_their_gradients_travel(name):
    """Catches a message more than the schedule has, a mask or an MTP hidden sent along, a wrong stage in a label."""
    schedule, model, inputs = case(name, *SMALLEST[name])
    log = Log()
    spmd(schedule.layout.n_ranks, program, schedule, model, inputs, [1.0] * len(inputs), log=log)
    sent = dict.fromkeys(range(schedule.layout.n_ranks), 0)
    for rank in sent:
        for message in (m for batch in schedule.batches[rank] for m in batch if m.verb == "s"):
            sent[rank] += inputs[schedule.layout.micro_batch(message)].tokens.size * model.config.hidden_size * 8
    assert {r: log.bytes(rank=r) for r in sent} == sent
    assert {r.op for r in log} == {"exchange"}


def test_weight_gradients_wait_for_their_turn():
    """Catches I that computes what W is there for (no bubble would be filled), W that computes the input's too."""
    ran = []

    @primitive
    def times(x, w):
        return x * w, (lambda dy: ran.append("x") or dy * w, lambda dy: ran.append("w") or dy * x)

    layout = Layout(((0,), (1,)), 2)
    text = "F0.0 F0.1 B0.0 B0.1\nF0.0 I0.0 F0.1 I0.1 W0.0 W0.1"
    schedule = parse(text, layout)
    check(schedule)

    def rank(comm):
        w = Parameter(np.array([2.0 + comm.rank]))

        def part(x, j):
            y = times(Tensor(np.array([1.0 + j])) if x is None else x, w)
            if comm.rank == 1:
                ran.append(f"F{j}")
            return (None, ops.sum(y)) if comm.rank == 1 else (y, None)

        return executor.run(comm, schedule, [part]).grads[w]

    assert [g.tolist() for g in spmd(2, rank)] == [[3.0 * (1 + 2)], [2.0 * (1 + 2)]]
    last = [r for r in ran if r in ("F0", "F1")]
    assert last == ["F0", "F1"]
    on_last = ran[ran.index("F0") :]
    assert on_last.index("x") < on_last.index("F1") < on_last.index("w")


# ---- First and last stage share embedding and head


@pytest.mark.parametrize(
    ("name", "ranks"), [("dualpipe", (0, 3)), ("dualpipev", (0,)), ("1f1b", (0, 3)), ("zb1p", (0, 3))]
)
def test_shallowest_and_deepest_layers_are_on_one_rank_where_the_report_says(name, ranks):
    """R 3.2.3: DualPipe's first and last stage are on the same rank, so MTP shares embedding and head with the main
    model. Catches a layout that puts them elsewhere, an embedding that needs a group of its own there.
    """
    schedule, model, _ = case(name, 4, 8)
    cut = pipeline_parts.cut(model.config, schedule.layout.n_stages)
    names = [n for n, w in model.named_weights() if hasattr(w, "dtype")]
    held = [[n for n in names if cut.holds(s, n)] for s in range(cut.n_stages)]
    found = mesh.holders(schedule.layout, held)
    group = next(g for g, inside in found.items() if SHARED[0] in inside)
    assert group == ranks
    together_with_layers = any(".layers.0." in n for n in found[group])
    assert together_with_layers == name.startswith("dualpipe")
    assert len(mesh.divisions(found, 4)) == (1 if name.startswith("dualpipe") else 2)
    assert sorted({n for inside in found.values() for n in inside}) == sorted(names)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_both_uses_of_the_embedding_add_up_in_one_array(name):
    """Catches two leaves for one embedding on a rank that holds both ends: the gradient would be of one use only."""
    pp, m = SMALLEST[name]
    schedule, model, inputs = case(name, pp, m)
    results = spmd(pp, lambda c: program(c, schedule, model, inputs, [1.0] * m, mtp_weight=0.3))
    with_embedding = [r for r, (_, grads, _) in enumerate(results) if SHARED[0] in grads]
    assert with_embedding == ([0, pp - 1] if name == "dualpipe" else [0])
    main = together(spmd(pp, lambda c: program(c, schedule, model, inputs, [1.0] * m)))[1][SHARED[0]]
    both = together(results)[1][SHARED[0]]
    assert np.abs(both - main).max() > 1e-2  # MTP's use is in it


# ---- What does not fit


def test_layers_that_do_not_divide_are_refused():
    """Catches a layer silently left out."""
    c = Config(num_hidden_layers=61)
    with pytest.raises(SpecError, match="61 layers do not divide among 16 stages; give sizes"):
        pipeline_parts.cut(c, 16)
    with pytest.raises(SpecError, match=r"sizes .* for 16 stages and 61 layers"):
        pipeline_parts.cut(c, 16, [4] * 16)
    assert pipeline_parts.cut(c, 16, [4] * 15 + [1]).bounds[-2:] == (60, 61)


def one(y, loss):
    return lambda x, j: (y, loss)


LEAF = Parameter(np.ones(()))


@pytest.mark.parametrize(
    ("ranks", "text", "parts", "complaint"),
    [
        (2, "F0.0 B0.0", None, "is for 1 ranks, the group has 2"),
        (1, "F0.0 B0.0", [], "rank 0 holds 1 stages in given, not 0"),
        (1, "F0.0 B0.0", [one(LEAF, LEAF)], "the last stage gives a loss and no output"),
        (
            1,
            "F0.0 B0.0",
            [one(None, None)],
            "a stage gives Tensors; this one depends on no leaf\n  in F0.0, stage 0 on rank 0",
        ),
        (1, "B0.0 F0.0", [one(None, LEAF)], "its forward has not been computed\n  in B0.0"),
        (1, "F0.0", [one(None, LEAF)], "left at the end: 1 backwards, 0 weight parts"),
        (1, "F0.0 I0.0", [one(None, LEAF)], "left at the end: 0 backwards, 1 weight parts"),
        (1, "F0.0 W0.0 I0.0", [one(None, LEAF)], "no weight part is waiting"),
    ],
)
def test_what_does_not_fit_the_schedule_is_refused(ranks, text, parts, complaint):
    """Catches a wrong result where the program or its parts are wrong, and an error that does not say in which op."""
    schedule = parse(text, Layout(((0,),), 1))
    with pytest.raises(SpecError) as caught:
        spmd(ranks, lambda comm: executor.run(comm, schedule, parts or []))
    assert complaint in str(caught.value)


def test_a_stage_that_ignores_its_input_is_refused():
    """Catches a stage before it that is never trained."""
    schedule, w = build("gpipe", 2, 1), Parameter(np.ones(3))

    def rank(comm):
        part = one(w * 2.0, None) if comm.rank == 0 else one(None, ops.sum(w * 3.0))
        executor.run(comm, schedule, [part])

    with pytest.raises(SpecError, match="the stage does not depend on its input"):
        spmd(2, rank)
