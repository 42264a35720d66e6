"""R 3.2: all axes together. A small V3 with MTP trained on a mesh is the same model as on one rank."""

import importlib.util
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.layers.precision import FLOAT64, plan
from refimpl.parallel_emulation.axes import mesh
from refimpl.parallel_emulation.axes.mesh import Mesh, Place
from refimpl.parallel_emulation.comm import Log, launcher, split_into, spmd
from refimpl.parallel_emulation.pipeline import build
from refimpl.train import AdamW
from refimpl.train import parallel as pt
from refimpl.train import training as train


def slower(step):
    """3/4, 1/2, 1/4: a learning rate that tells the steps apart."""
    return 0.75 - 0.25 * step


RECIPE = train.Recipe(FLOAT64, AdamW(lr=4e-3), slower, mtp_weight=0.3, aux_weight=1e-2, gamma=1e-2, max_norm=0.5)
CONFIG = pt.DEMO
WEIGHTS = train.init(CONFIG, std=0.1)
STEPS, SEQUENCES, LENGTH = 3, 32, 8
BATCHES = [np.random.default_rng([7, t]).integers(0, CONFIG.vocab_size, (SEQUENCES, LENGTH)) for t in range(STEPS)]

# Only the order of float64 sums differs: of at most 32 x 8 tokens on 16 ranks, ten layers deep, 1e-13 of a gradient. AdamW
# divides a gradient by its own size, so a weight moves by lr times the same relative error, but for elements whose
# gradient is nearly 0 beside the rounding: there eps = 1e-8 bounds it by lr x 1e-15 / 1e-8, 3e-10 a step.
CLOSE = 1e-9
SHARP = 1e-11  # of loss and norm, sums over everything


def trains(comm, shape, schedule, recipe=RECIPE, config=CONFIG, batches=BATCHES):
    """Train on a mesh -> where I am, my weights by checkpoint name, the reports."""
    weights = {n: w for n, w in WEIGHTS.items() if config.num_nextn_predict_layers or ".layers.4." not in n}
    rank = pt.start(comm, config, weights, recipe, shape, schedule)
    reports = []
    for tokens in batches:
        rank, report = pt.step(rank, tokens)
        reports.append(report)
    return rank.groups.place, rank.named, reports


def trains_on_rows(comm, shape, schedule, rows):
    """One step on a mesh, on padded rows with documents -> where I am, my weights, the report."""
    rank, report = pt.step(pt.start(comm, CONFIG, WEIGHTS, RECIPE, shape, schedule), **rows)
    return rank.groups.place, rank.named, [report]


def whole(results):
    """All ranks' weights as one model; copies must be the same bits, slices of tensor parallelism are put together."""
    found = defaultdict(dict)
    for place, weights, _ in results:
        for name, w in weights.items():
            kept = found[name].setdefault(place.tp, w)
            np.testing.assert_array_equal(kept, w, err_msg=f"{name} differs between its copies, at {place}")
    return {name: _join(name, [parts[t] for t in sorted(parts)]) for name, parts in found.items()}


def _join(name, parts):
    if parts[0].shape == WEIGHTS[name].shape:
        return parts[0]
    return np.concatenate(parts, axis=next(i for i in range(2) if parts[0].shape[i] != WEIGHTS[name].shape[i]))


def serial(recipe=RECIPE, batches=BATCHES):
    """refimpl.train on one rank, with no parallel code at all -> weights at the end, reports."""
    weights = {n: w.astype(recipe.plan.dtype) for n, w in WEIGHTS.items()}
    states, reports = zip(*train.train(CONFIG, weights, batches, recipe), strict=True)
    return states[-1].weights, reports


def same_training(results, weights, reports, close=CLOSE, sharp=SHARP):
    """Losses, norms, expert loads of every step and all weights at the end are those of one rank."""
    for place, _, mine in results:
        for got, want in zip(mine, reports, strict=True):
            np.testing.assert_allclose([got.loss, got.norm], [want.loss, want.norm], rtol=sharp, err_msg=str(place))
            for at, load in got.load.items():
                np.testing.assert_array_equal(load, want.load[at], err_msg=f"{at} at {place}")
    assert {at for _, _, mine in results for at in mine[0].load} == set(reports[0].load)
    found = whole(results)
    assert set(found) == set(weights)
    for name, w in found.items():
        np.testing.assert_allclose(w, weights[name], rtol=0, atol=close, err_msg=name)


# ---- Training


MESHES = [
    (Mesh(pp=4), "zb1p", 4),
    (Mesh(pp=2, ep=2), "dualpipev", 4),
    (Mesh(dp=2, ep=2), "gpipe", 2),
    (Mesh(ep=2, tp=2), "gpipe", 2),
]
SIXTEEN = [
    (Mesh(pp=4, dp=2, ep=2), "dualpipe", 8),
    (Mesh(pp=4, ep=4), "1f1b", 4),
    (Mesh(pp=2, dp=2, ep=2, tp=2), "dualpipe", 4),
    (Mesh(pp=2, ep=4, tp=2), "interleaved", 2),
]


def described(value):
    return str(value).replace(" ", "") if isinstance(value, Mesh) else None


@pytest.fixture(scope="module")
def one_rank():
    """The rank program on one rank."""
    ((_, weights, reports),) = spmd(1, trains, Mesh(), build("gpipe", 1, 4))
    return weights, reports


def test_one_rank_does_what_the_plain_training_step_does(one_rank):
    """Catches a program that agrees with itself only. The plain step rounds gradients to float32, 6e-8 of each, so an
    element moves by 3e-3 x 6e-8 otherwise in a step, and the next gradients see all of these at once: 1e-4 of a step are
    allowed. Micro-batches of 8 sequences against all 32 at once.
    """
    weights, reports = serial()
    same_training([(Place(0, 0, 0, 0), *one_rank)], weights, reports, close=3e-7, sharp=1e-7)


@pytest.mark.parametrize(
    ("shape", "name", "micro_batches"),
    [*MESHES, *[pytest.param(*m, marks=pytest.mark.slow) for m in SIXTEEN]],
    ids=described,
)
def test_training_on_a_mesh_is_training_on_one_rank(one_rank, shape, name, micro_batches):
    """Catches gradients of experts scaled or added up over the wrong ranks, an embedding that drifts apart between first
    and last stage, squares counted twice in the norm, a bias moved by one rank's loads, tokens trained twice.

    Three steps with MTP and balance loss; 16 ranks: DualPipe x data x expert parallel, and with tensor parallelism.
    """
    same_training(spmd(shape.size, trains, shape, build(name, shape.pp, micro_batches), seed=3), *one_rank)


def padded(sequences):
    """Rows that end in padding, each somewhere else, of two documents whose first tokens are no labels."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, CONFIG.vocab_size, (sequences, LENGTH))
    ends, cuts = rng.integers(2, LENGTH + 1, (sequences, 1)), rng.integers(1, LENGTH, (sequences, 1))
    at = np.arange(LENGTH)[None].repeat(sequences, axis=0)
    labels = np.where((at < ends) & (at != cuts) & (at > 0), tokens, -100)
    documents = np.where(at >= ends, -1, (at >= cuts) * 1)
    return {"tokens": tokens, "labels": labels, "valid": (at < ends) * 1, "documents": documents}


@pytest.mark.parametrize(
    ("shape", "name", "micro_batches"),
    [(Mesh(dp=2), "gpipe", 2)]
    + [pytest.param(*p, marks=pytest.mark.slow) for p in [(Mesh(2, ep=2), "dualpipe", 4), (Mesh(2, tp=2), "zb1p", 2)]],
    ids=str,
)
def test_padded_rows_count_by_what_they_hold(shape, name, micro_batches):
    """Catches micro-batches averaged whatever they hold, shares of my rank's labels alone, padding or documents lost on the way, a
    part of the loss summed over copies. Oracle: `train.step` on the whole batch, whose gradients are float32: 6e-8 each, less
    in their norm.
    """
    rows = padded(16)
    weights = {n: w.astype(RECIPE.plan.dtype) for n, w in WEIGHTS.items()}
    state, report = train.step(CONFIG, train.State(weights), recipe=RECIPE, **rows)
    schedule = build(name, shape.pp, micro_batches)
    results = spmd(shape.size, trains_on_rows, shape, schedule, rows)
    same_training(results, state.weights, [report], sharp=1e-8)
    for _, _, (mine,) in results:
        assert set(mine.parts) == set(report.parts) == {"main", "mtp1", "balance"}
        for part, loss in report.parts.items():
            np.testing.assert_allclose(mine.parts[part], loss, rtol=SHARP, err_msg=part)


def test_a_pipeline_alone_changes_no_bit():
    """Catches any difference that rounding would excuse: without MTP and balance loss, 1F1B adds up micro-batches in turn
    as one rank does, so all weights have the same bits after three steps. The norm adds squares rank by rank, and clips:
    so it is not used here.
    """
    config, recipe = CONFIG.replace(num_nextn_predict_layers=0), train.Recipe(FLOAT64, max_norm=1e9, gamma=1e-2)
    runs = [spmd(pp, trains, Mesh(pp=pp), build("1f1b", pp, 4), recipe, config) for pp in (1, 2, 4)]
    for other in runs[1:]:
        want, got = whole(runs[0]), whole(other)
        for name, w in want.items():
            np.testing.assert_array_equal(got[name], w, err_msg=name)


@pytest.mark.parametrize(
    ("precision", "shape", "rtol"),
    [("float32", Mesh(pp=2, ep=2), 1e-6), ("bf16", Mesh(pp=2, dp=2), 3e-5)],
    ids=described,
)
def test_lower_precisions_train_alike(precision, shape, rtol):
    """Catches ranks that do not follow the plan: bf16 and float32 differ by 3e-4 in the loss and 1e-3 in the norm.

    The first step: float32 sums in another order, a few 1e-8, and losses that are added up in float32. In bf16 products of
    smaller batches now and then round to the neighbouring number, 2^-8 of a single element.
    """
    recipe = train.Recipe(plan(precision), AdamW(lr=3e-3), mtp_weight=0.3, max_norm=0.5)
    results = spmd(4, trains, shape, build("dualpipe", 2, 4), recipe, CONFIG, BATCHES[:1])
    _, (want,) = serial(recipe, BATCHES[:1])
    for _, _, (got,) in results:
        np.testing.assert_allclose([got.loss, got.norm], [want.loss, want.norm], rtol=rtol)
    _, (other,) = serial(replace(recipe, plan=plan("bf16" if precision == "float32" else "float32")), BATCHES[:1])
    assert abs(other.loss / want.loss - 1) > 5 * rtol


@pytest.mark.slow
def test_the_order_of_ranks_changes_no_bit():
    """Catches a sum in the order of arrival."""
    shape, schedule = Mesh(pp=2, dp=2, ep=2), build("dualpipe", 2, 4)
    runs = [
        spmd(8, trains, shape, schedule, seed=seed, send_mode=mode)
        for seed, mode in ((1, "buffered"), (2, "synchronous"))
    ]
    for (_, first, _), (_, second, _) in zip(*runs, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_each_axis_sends():
    """Catches a gradient all-reduced over ranks that hold other weights, experts that travel instead of tokens.

    ZeRO-1 moves each weight a rank holds once out and once in, (d-1)/d of it each over d ranks that share it.
    """
    log, shape = Log(), Mesh(pp=2, dp=2, ep=2)
    results = spmd(8, trains, shape, build("1f1b", 2, 4), RECIPE, CONFIG, BATCHES[:1], log=log)
    for place, weights, _ in results:
        rank = place.pp * 4 + place.dp * 2 + place.ep
        trained = {n: w.size for n, w in weights.items() if not n.endswith("bias")}
        experts = sum(n for name, n in trained.items() if ".experts." in name)
        embedding = trained["model.embed_tokens.weight"]
        dense = sum(trained.values()) - experts - embedding
        want = sum(8 * (d - 1) * -(-n // d) for n, d in ((experts, 2), (dense, 4), (embedding, 8)))
        for phase in ("zero1.scatter", "zero1.gather"):
            assert log.bytes(rank=rank, label=phase) == want


# ---- Groups


def test_v3_is_on_2048_ranks():
    """R 3.2: PP16, EP64 over 8 nodes, ZeRO-1 data parallel. Catches axes in another order: a stage's ranks would be spread
    over all nodes. 128 dense copies and 2 copies of an expert per stage follow from 2048 = 16 x 128, 128 = 2 x 64.
    """
    v3 = Mesh(pp=16, dp=2, ep=64)
    assert v3.size == 2048 and v3.place(2047) == Place(15, 1, 63, 0)
    assert len(v3.groups("pp")) == 128 and {len(g) for g in v3.groups("pp")} == {16}
    experts = v3.groups("ep")
    assert experts[0] == tuple(range(64)) and len({r // 8 for r in experts[0]}) == 8  # 8 whole nodes
    assert v3.groups("dp", "ep")[1] == tuple(range(128, 256))
    mirrored = v3.groups("dp", "ep", pipes=[(r, 15 - r) for r in range(8)])
    assert mirrored[0] == (*range(128), *range(1920, 2048))


@given(st.tuples(*[st.integers(1, 4)] * 4), st.sets(st.sampled_from(Place._fields)))
@settings(max_examples=60, deadline=None)
def test_groups_are_the_lines_and_planes_of_the_mesh(shape, axes):
    """Catches a rank in two groups or in none, and a group whose ranks differ on another axis: held against NumPy's own
    way to number a grid.
    """
    grid = np.arange(np.prod(shape)).reshape(shape)
    other = [i for i, axis in enumerate(Place._fields) if axis not in axes]
    kept = [i for i in range(4) if i not in other]
    want = grid.transpose(other + kept).reshape(-1, int(np.prod([shape[i] for i in kept], dtype=int)))
    found = Mesh(*shape).groups(*axes)
    assert sorted(found) == sorted(map(tuple, want.tolist()))
    for rank in range(grid.size):
        assert Mesh(*shape).place(rank) == tuple(int(i[0]) for i in np.nonzero(grid == rank))


@given(
    st.dictionaries(
        st.frozensets(st.integers(0, 5), min_size=1).map(lambda g: tuple(sorted(g))), st.just(("w",)), max_size=8
    )
)
@settings(max_examples=60, deadline=None)
def test_divisions_hold_every_group_once(held):
    """Catches names that are counted twice, in their own division and beside a later one."""
    found = mesh.divisions(held, 6)
    assert sorted(g for d in found for g, names in d.items() if names) == sorted(held)
    for division in found:
        assert sorted(r for g in division for r in g) == list(range(6))


# ---- Bad input


def test_a_run_of_the_wrong_size_is_refused():
    """Catches ranks that wait for others who do not exist."""
    with pytest.raises(SpecError, match="the mesh pp 2 x dp 1 x ep 2 x tp 1 takes 4 ranks, the run has 3"):
        spmd(3, trains, Mesh(pp=2, ep=2), build("1f1b", 2, 4))


@pytest.mark.parametrize(
    ("shape", "schedule", "complaint"),
    [
        (Mesh(pp=2), ("1f1b", 4, 4), "1f1b is for 4 pipeline ranks, the mesh is pp 2"),
        (Mesh(pp=3), ("1f1b", 3, 4), "4 layers do not divide among 3 stages"),
        (Mesh(ep=3), ("gpipe", 1, 4), "16 experts do not divide among 3 ranks"),
        (Mesh(dp=3), ("gpipe", 1, 4), "32 sequences for 3 data-parallel ranks with 4 micro-batches each"),
        (Mesh(tp=8), ("gpipe", 1, 4), "4 heads for 8 tensor-parallel ranks: each needs one at least"),
    ],
    ids=described,
)
def test_what_does_not_fit_together_is_refused(shape, schedule, complaint):
    """Catches layers, experts, heads or sequences that are silently left out."""
    with pytest.raises(SpecError) as caught:
        spmd(shape.size, trains, shape, build(*schedule))
    assert complaint in str(caught.value)


def test_groups_that_overlap_are_refused():
    """Catches a rank that would add up with two groups at once."""
    with pytest.raises(SpecError, match=r"groups of pipeline ranks .* overlap or leave out some of 4"):
        Mesh(pp=4).groups("dp", pipes=[(0, 3), (1, 2), (2,)])
    with pytest.raises(SpecError, match=r"overlap or leave out"):
        Mesh(pp=4).groups("dp", pipes=[(0, 3), (1,)])
    with pytest.raises(SpecError, match="the groups overlap in ranks 1"):
        spmd(3, lambda comm: split_into(comm, [(0, 1), (1, 2)]))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Mesh(pp=0), "at least one place on every axis"),
        (lambda: Mesh(ep=2).place(2), "rank 2 on a mesh of 2"),
        (lambda: Mesh().groups("cp"), "axis cp; a mesh has pp, dp, ep, tp"),
        (lambda: Mesh.parse("pp=2,pp=4"), "'pp=4' in mesh 'pp=2,pp=4'"),
        (lambda: Mesh.parse("pp=two"), "expected pp, dp, ep, tp at most once each"),
        (lambda: mesh.divisions({(0, 7): ("w",)}, 4), "pipeline ranks 0, 7 of 4"),
        (lambda: mesh.holders(build("gpipe", 2, 1).layout, [["w"]]), "names of 1 stages, the schedule has 2"),
    ],
)
def test_impossible_meshes_are_refused(make, complaint):
    """Catches a typing error that becomes another layout."""
    with pytest.raises(SpecError) as caught:
        make()
    assert complaint in str(caught.value)


def test_a_mesh_is_written_in_short():
    """Catches axes mixed up in the reading."""
    assert Mesh.parse("ep=3,pp=2") == Mesh(pp=2, ep=3)


# ---- MPI


FOUND = importlib.util.find_spec("mpi4py") is not None and (
    (Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")
)


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")
@pytest.mark.parametrize(
    "args",
    [("pp=2,ep=2", "dualpipe", "4"), ("pp=2,tp=2", "zb1p", "4"), ("pp=4", "dualpipe", "8")],
)
def test_training_on_four_processes_gives_the_bits_of_the_simulator(args):
    """Catches anything of the above that only works where ranks share a process."""
    name = "refimpl.train.parallel:demo"
    want = launcher.simulate(4, [name], args[0], args[1], int(args[2]))
    assert launcher.launch(4, [name], args, timeout=240) == want
    assert len(set(want[name])) == 4
