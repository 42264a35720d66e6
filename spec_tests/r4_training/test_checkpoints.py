"""A resumed run is one that never stopped, bit for bit; any mesh reads what any other wrote; what is damaged is named."""

import itertools
import json
import shutil
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.layers.precision import plan
from refimpl.layers.presets import TINY
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.parallel_emulation.comm import spmd
from refimpl.parallel_emulation.pipeline import build
from refimpl.spec_tests.cases.killed_writer import content, snap
from refimpl.train import AdamW, Recipe, State, init, step
from refimpl.train import parallel as pt
from refimpl.train.checkpoints import Keeper, Retention, Saved, Snapshot, facts, mesh, serial
from refimpl.train.checkpoints.disk import Disk
from refimpl.train.checkpoints.pieces import Piece, Place, assembled, is_narrow, narrowed, widened
from refimpl.train.checkpoints.random_states import generator, random_state

SMALL = TINY.replace(num_hidden_layers=2, num_nextn_predict_layers=1)


def falling(t):
    return 1.0 / (1 + t)


def recipe(precision, **changes):
    opt = AdamW(lr=3e-3, moments="fp32" if precision.startswith("float") else "bf16")
    return Recipe(plan(precision), opt, falling, mtp_weight=0.3, aux_weight=1e-2, gamma=1e-2, **changes)


class Run:
    """Training with all that a run carries: state, an EMA of the weights, a loader with a cursor, two random streams."""

    def __init__(self, how, state, ema, cursor, random):
        self.how, self.state, self.ema, self.cursor, self.random = how, state, ema, cursor, random

    @classmethod
    def new(cls, how):
        streams = {"data": np.random.default_rng(5), "noise": np.random.Generator(np.random.MT19937(6))}
        weights = init(SMALL, std=0.1)
        return cls(how, State(weights), dict(weights), {"read": 0}, streams)

    @classmethod
    def resumed(cls, how, saved):
        r = serial.resume(saved, SMALL)
        return cls(how, r.state, r.ema, r.cursor, r.random)

    def go(self, steps):
        for _ in range(steps):
            tokens = self.random["data"].integers(0, SMALL.vocab_size, (2, 9))
            tokens[0, 0] = self.cursor["read"] + self.random["noise"].integers(0, 8)
            self.cursor["read"] += 2
            self.state, _ = step(SMALL, self.state, tokens, self.how)
            self.ema = {n: np.float32(0.9) * e + np.float32(0.1) * self.state.weights[n] for n, e in self.ema.items()}
        return self

    def snapshot(self):
        told = facts(SMALL, cursor=self.cursor, random=self.random, counters={"tokens": 18 * self.state.adam.t})
        return serial.snapshot(self.state, told, ema=self.ema)

    def bits(self):
        kinds = {"w": self.state.weights, "m": self.state.adam.m, "v": self.state.adam.v, "ema": self.ema}
        return {f"{k}/{n}": (x.dtype, x.tobytes()) for k, held in kinds.items() for n, x in held.items()}


# ---- Resume


@pytest.mark.parametrize(
    ("precision", "how"),
    [
        ("float32", "save"),
        ("bf16", "begin"),
        *[pytest.param(*p, marks=pytest.mark.slow) for p in (("fp8", "begin"), ("float64", "save"))],
    ],
)
def test_a_resumed_run_never_stopped(tmp_path, precision, how):
    """Catches anything left out (a moment, the bias, the EMA, the step that the schedule and the bias correction count,
    a random stream, the cursor) or rounded on the way: six steps, with and without three stops, have the same bits.
    """
    whole = Run.new(recipe(precision)).go(6)
    run = Run.new(recipe(precision))
    for steps in (1, 2, 3):
        run.go(steps)
        with Keeper(tmp_path) as keeper:
            getattr(keeper, how)(run.snapshot())
        run = Run.resumed(recipe(precision), Keeper(tmp_path).newest().saved)
    assert run.bits() == whole.bits() and run.state.adam.t == whole.state.adam.t == 6
    assert run.cursor == whole.cursor == {"read": 12}
    for name, rng in whole.random.items():
        np.testing.assert_array_equal(run.random[name].random(3), rng.random(3))


@pytest.mark.slow
def test_the_run_above_needs_all_that_is_saved(tmp_path):
    """Catches a test that would pass with less: leaving out any kind of tensor or fact changes the end."""
    run = Run.new(recipe("bf16")).go(2)
    s = run.snapshot()
    end = Run(
        run.how, run.state, run.ema, dict(run.cursor), {n: generator(random_state(r)) for n, r in run.random.items()}
    )
    end = end.go(2).bits()
    for i, kind in enumerate(("adam.m", "adam.v", "ema", "cursor", "data", "noise", "step")):
        kept = {n: p for n, p in s.pieces.items() if not n.startswith(f"{kind}/")}
        told = {**s.facts, "random": {n: x for n, x in s.facts["random"].items() if n != kind}}
        told |= {"cursor": {"read": 0}} if kind == "cursor" else {}
        with Keeper(tmp_path / str(i)) as keeper:
            keeper.save(Snapshot(1 if kind == "step" else 2, kept, told))
            run = Run.resumed(recipe("bf16"), keeper.newest().saved)
        run.random = {n: run.random.get(n, np.random.default_rng(0)) for n in ("data", "noise")}
        assert run.go(2).bits() != end, kind


def test_moments_in_bf16_take_two_bytes(tmp_path):
    """Catches moments of the report's recipe stored as wide as the masters."""
    run = Run.new(recipe("bf16")).go(1)
    with Keeper(tmp_path) as keeper:
        keeper.save(run.snapshot())
        f = keeper.newest().saved._files["rank-00000-of-00001.safetensors"]
    assert {f.header[n].dtype for n in f if n.startswith("adam.")} == {"BF16"}
    assert "F32" in {f.header[n].dtype for n in f if n.startswith("master/")}


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_random_streams_go_on_where_they_were(kind):
    """Catches a state of which JSON keeps a part: the buffered half of a 64-bit draw, 128-bit numbers, arrays."""
    rng = np.random.Generator(getattr(np.random, kind)(3))
    rng.integers(0, 9, 3, dtype=np.uint32)
    again = generator(json.loads(json.dumps(random_state(rng))))
    for draw in (lambda g: g.integers(0, 99, 5, dtype=np.uint32), lambda g: g.standard_normal(5)):
        np.testing.assert_array_equal(draw(again), draw(rng))


def test_what_json_cannot_give_back_is_refused_before_anything_is_written():
    """Catches a cursor whose tuple comes back a list, a NaN, a NumPy number."""
    for bad in ({"a": (1, 2)}, {"a": float("nan")}, {"a": np.int64(3)}, {1: 2}):
        with pytest.raises(SpecError, match="facts of a checkpoint"):
            Snapshot(1, {}, {"cursor": bad})
    with pytest.raises(SpecError, match="random state of 'LCG'"):
        generator({"bit_generator": "LCG"})
    with pytest.raises(SpecError, match="that PCG64 does not take"):
        generator({"bit_generator": "PCG64", "state": 7})


# ---- Writing in a thread


class SlowDisk(Disk):
    """Opens its first file when it is told to."""

    def __init__(self):
        self.go = threading.Event()

    def create(self, path):
        assert self.go.wait(30)
        return super().create(path)


def test_a_state_changed_after_begin_is_not_torn(tmp_path):
    """Catches a writer that reads the arrays while training changes them: here they change in place before it opens its
    file.
    """
    arrays = content(1)
    disk = SlowDisk()
    with Keeper(tmp_path, disk=disk) as keeper:
        keeper.begin(Snapshot(1, {n: Piece.whole(x) for n, x in arrays.items()}))
        for x in arrays.values():
            x[...] = -1
        assert keeper.steps() == []
        disk.go.set()
        keeper.finish()
        saved = keeper.newest().saved
    for name, x in content(1).items():
        np.testing.assert_array_equal(saved.whole(name), x)


def test_a_second_checkpoint_waits_for_the_first(tmp_path):
    """Catches two writers at once, or the first one forgotten."""
    with Keeper(tmp_path) as keeper:
        for s in (1, 2, 3):
            keeper.begin(snap(s))
    assert keeper.steps() == [1, 2, 3]


# ---- Which stay


@given(st.sets(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 5), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_retention(steps, last, every):
    """Catches the newest dropped, or a kept multiple counted among the last. Oracle: what stays, said in sets."""
    steps = sorted(steps)
    stays = set(steps[-last:]) | {s for s in steps if every and s % every == 0}
    assert set(steps) - set(Retention(last, every).dropped(steps)) == stays


def test_old_checkpoints_are_let_go(tmp_path):
    """Catches a policy that nobody applies: of steps 1 to 7 the last two stay, and the multiples of three."""
    with Keeper(tmp_path, keep=Retention(last=2, every=3)) as keeper:
        for s in range(1, 8):
            keeper.save(snap(s))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{s}" for s in (3, 6, 7)]


@pytest.mark.parametrize("bad", [{"last": 0}, {"every": -1}])
def test_a_policy_that_keeps_nothing_is_refused(bad):
    """Catches a run whose checkpoints all vanish."""
    with pytest.raises(SpecError):
        Retention(**bad)


def test_a_step_behind_the_newest_is_refused(tmp_path):
    """Catches two branches of a run in one folder, of which the older would be the newest."""
    with Keeper(tmp_path) as keeper:
        keeper.save(snap(5))
        for s in (4, 5):
            with pytest.raises(SpecError, match=rf"holds step 5; step {s} is not newer"):
                keeper.save(snap(s))


# ---- Elastic


RECIPE = Recipe(plan("float64"), AdamW(lr=4e-3), falling, mtp_weight=0.3, aux_weight=1e-2, gamma=1e-2, max_norm=0.5)
CONFIG = pt.DEMO
WEIGHTS = init(CONFIG, std=0.1)
BATCHES = [np.random.default_rng([7, t]).integers(0, CONFIG.vocab_size, (32, 8)) for t in range(3)]
MESHES = {
    1: (Mesh(), "gpipe", 4),
    2: (Mesh(pp=2), "1f1b", 4),
    4: (Mesh(pp=2, ep=2), "dualpipe", 4),
    8: (Mesh(pp=2, dp=2, tp=2), "dualpipe", 4),
}
CLOSE = 1e-9  # as in r3_2_parallel/test_mesh.py: the order of float64 sums, through AdamW


def trained(comm, folder, n, batches, how=RECIPE, config=CONFIG, weights=WEIGHTS, shape=None):
    """Train on n ranks from the folder's newest checkpoint, or from the start; save -> weights of the end, by name."""
    shape, schedule, m = shape or MESHES[n]
    with Keeper(folder, comm=comm) as keeper:
        saved, schedule = keeper.newest().saved, build(schedule, shape.pp, m)
        if saved:
            rank = mesh.resume(saved, comm, config, how, shape, schedule)
        else:
            rank = pt.start(comm, config, weights, how, shape, schedule)
        for tokens in batches:
            rank, _ = pt.step(rank, tokens)
        keeper.save(mesh.snapshot(rank, facts(rank.config)))


def tensors(folder):
    saved = Keeper(folder).newest().saved
    return {f"{kind}/{n}": saved.tensors(kind)[n] for kind in saved.kinds() for n in saved.tensors(kind)}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    """Two steps on four ranks."""
    folder = tmp_path_factory.mktemp("four")
    spmd(4, trained, folder, 4, BATCHES[:2])
    return folder


def copied(folder, to):
    """The checkpoint as if it were of one step less, so that saving at once is saving something newer."""
    shutil.copytree(folder, to)
    old, new = to / "step-00000002", to / "step-00000001"
    old.rename(new)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("n", MESHES)
def test_any_mesh_holds_the_same_bits(tmp_path, on_four, n):
    """Catches a piece cut off, put elsewhere, left to the padding, or held by no rank: saved on 4 ranks, resumed on n and
    saved at once, all masters, moments and biases have their bits; with pipeline, expert, data and tensor parallelism.
    """
    spmd(n, trained, copied(on_four, tmp_path / "run"), n, [])
    want, got = tensors(on_four), tensors(tmp_path / "run")
    assert set(want) == set(got) and {n.partition("/")[0] for n in want} == {"master", "adam.m", "adam.v"}
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("n", MESHES)
def test_a_run_goes_on_on_any_mesh(tmp_path, on_four, n):
    """Catches moments or biases of other weights, a step counted anew: the third step on n ranks is that of four."""
    shutil.copytree(on_four, tmp_path / "four")
    spmd(4, trained, tmp_path / "four", 4, BATCHES[2:])
    shutil.copytree(on_four, tmp_path / "n")
    spmd(n, trained, tmp_path / "n", n, BATCHES[2:])
    want, got = tensors(tmp_path / "four"), tensors(tmp_path / "n")
    for name, x in want.items():
        if n == 4:
            np.testing.assert_array_equal(got[name], x)
        np.testing.assert_allclose(got[name], x, rtol=0, atol=CLOSE, err_msg=name)


@pytest.mark.slow
def test_where_the_order_of_sums_is_fixed_another_mesh_gives_the_same_bits(tmp_path):
    """Catches a difference that a bound would excuse: without MTP, balance loss and clipping a 1F1B pipeline adds up as one
    rank does, so saved on 4 ranks and resumed on 1 and 2 the end has the bits of 4 throughout.
    """
    how = Recipe(plan("float64"), max_norm=1e9, gamma=1e-2)
    config, weights = (
        CONFIG.replace(num_nextn_predict_layers=0),
        {n: w for n, w in WEIGHTS.items() if ".4." not in n[:15]},
    )
    four = (Mesh(pp=4), "1f1b", 4)
    spmd(4, trained, tmp_path / "begin", 4, BATCHES[:2], how, config, weights, four)
    ends = []
    for n, shape in ((4, four), (2, MESHES[2]), (1, MESHES[1])):
        shutil.copytree(tmp_path / "begin", tmp_path / str(n))
        spmd(n, trained, tmp_path / str(n), n, BATCHES[2:], how, config, weights, shape)
        ends.append({name: x.tobytes() for name, x in tensors(tmp_path / str(n)).items()})
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
def test_one_rank_reads_what_the_plain_step_wrote_and_the_other_way(tmp_path, on_four):
    """Catches two formats: `refimpl.train.step` and the mesh read each other's checkpoints."""
    resumed = serial.resume(Keeper(on_four).newest().saved, CONFIG)
    state, _ = step(CONFIG, resumed.state, BATCHES[2], RECIPE)
    with Keeper(tmp_path) as keeper:
        keeper.save(serial.snapshot(resumed.state, facts(CONFIG)))
    spmd(2, trained, tmp_path, 2, BATCHES[2:])
    got = tensors(tmp_path)
    for name, x in state.weights.items():
        # the plain step rounds gradients to float32: see test_one_rank_does_what_the_plain_training_step_does
        np.testing.assert_allclose(got[f"master/{name}"], x, rtol=0, atol=3e-7, err_msg=name)


def test_ranks_divide_the_bytes(tmp_path):
    """Catches copies: on four data-parallel ranks no shard is larger than a quarter, beside headers and biases."""
    spmd(4, trained, tmp_path, 4, BATCHES[:1], RECIPE, CONFIG, WEIGHTS, (Mesh(dp=4), "gpipe", 1))
    saved = Keeper(tmp_path).newest().saved
    sizes = [sum(t.nbytes for t in f.header.values()) for f in saved._files.values()]
    assert len(sizes) == 4 and max(sizes) < 1.02 * sum(sizes) / 4


# ---- Pieces


@st.composite
def divided(draw):
    """A tensor, cut into boxes along one axis and each box into runs."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    x = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    axis = draw(st.integers(0, len(shape) - 1))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, shape[axis]), max_size=3))), shape[axis]]
    pieces = []
    for a, b in itertools.pairwise(cuts):
        if a < b:
            box = x.take(range(a, b), axis)
            start = tuple(a if i == axis else 0 for i in range(len(shape)))
            ends = [0, *sorted(draw(st.sets(st.integers(1, box.size), max_size=3))), box.size]
            pieces += [
                Piece(Place(shape, start, box.shape, p, q), box.reshape(-1)[p:q])
                for p, q in itertools.pairwise(ends)
                if p < q
            ]
    return x, draw(st.permutations(pieces))


@given(divided())
@settings(max_examples=150, deadline=None)
def test_pieces_make_the_tensor_again(case):
    """Catches runs put together in the order of files, a box written along another axis; JSON gives places back."""
    x, pieces = case
    np.testing.assert_array_equal(assembled(pieces), x)
    assert [Place.from_json(json.loads(json.dumps(p.place.to_json()))) for p in pieces] == [p.place for p in pieces]


@given(divided(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_missing_or_doubled_piece_is_refused(case, data):
    """Catches memory that nobody wrote handed out as a weight."""
    _, pieces = case
    i = data.draw(st.integers(0, len(pieces) - 1))
    broken = [p for j, p in enumerate(pieces) if j != i]
    if broken:
        with pytest.raises(SpecError, match=r"missing|hold"):
            assembled(broken)
    with pytest.raises(SpecError, match=r"twice|missing|overlap|hold"):
        assembled([*pieces, pieces[i]])


@pytest.mark.parametrize(
    "x", [np.array([1.5, -0.0, np.inf, np.nan, 2**-130], np.float32), np.zeros((0, 3), np.float32)]
)
def test_narrow_numbers_come_back_bit_for_bit(x):
    """Catches a sign of zero, a NaN, a subnormal lost in two bytes."""
    there = narrowed(x)
    assert there.dtype.itemsize == 2 and widened(there, x.dtype).tobytes() == x.tobytes()
    odd = np.float32([1.0, 1.0 + 2**-20])
    assert is_narrow(x) and not is_narrow(odd)


# ---- Damage


@pytest.fixture
def ranks_of_four(tmp_path):
    """A checkpoint of four ranks, and one before it."""
    for s in (1, 2):
        spmd(4, lambda comm, s=s: Keeper(tmp_path, comm=comm).save(snap(s, comm.rank, comm.size)))
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


THIRD = "rank-00002-of-00004.safetensors"
DAMAGE = {
    "a flipped bit in a tensor": (lambda d: flip(d / THIRD, -1), rf"in {THIRD} is damaged: its checksum differs"),
    "a flipped bit in a header": (lambda d: flip(d / THIRD, 12), THIRD),
    "a flipped bit in the padding of a header": (
        lambda d: flip(d / THIRD, 8 + int.from_bytes((d / THIRD).read_bytes()[:8], "little") - 1),
        THIRD,
    ),
    "another dtype in a header": (
        lambda d: (d / THIRD).write_bytes((d / THIRD).read_bytes().replace(b'"dtype":"F64"', b'"dtype":"I64"', 1)),
        f"the header of {THIRD} is damaged",
    ),
    "a truncated shard": (lambda d: (d / THIRD).write_bytes((d / THIRD).read_bytes()[:-5]), r"has \d+ bytes; expected"),
    "an empty shard": (lambda d: (d / THIRD).write_bytes(b""), r"has 0 bytes; expected \d+: truncated"),
    "a missing rank's shard": (lambda d: (d / THIRD).unlink(), rf"the shard {THIRD} is missing, one of 4"),
    "a shard of another step": (
        lambda d: shutil.copy(d.parent / "step-00000001" / THIRD, d / THIRD),
        "checksum differs",
    ),
    "a truncated manifest": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text()[:-40]),
        "not UTF-8 JSON",
    ),
    "a flipped digit in the manifest": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace('"step": 2', '"step": 3')),
        "manifest.json is damaged",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "holds no manifest.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(ranks_of_four, what):
    """Catches a run that goes on from noise, or stops although it has a good checkpoint; the damaged one is kept aside."""
    harm, says = DAMAGE[what]
    harm(ranks_of_four / "step-00000002")
    with pytest.raises(SpecError, match=says):
        Saved(ranks_of_four / "step-00000002")
    with Keeper(ranks_of_four) as keeper:
        found = keeper.newest()
        assert found.saved.step == 1 and list(found.passed_over) == ["step-00000002"]
        assert (ranks_of_four / "step-00000002.damaged").is_dir()
        keeper.save(snap(2))
        assert keeper.newest().saved.step == 2


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    Keeper(folder).save(snap(1))
    return folder / "step-00000001"


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_flipped_bit_is_seen(one_checkpoint, data):
    """Catches bytes that no checksum covers: any bit of any file."""
    folder = one_checkpoint
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    before = path.read_bytes()
    at = data.draw(st.integers(0, 8 * len(before) - 1))
    harmed = bytearray(before)
    harmed[at // 8] ^= 1 << at % 8
    same = path.name == "manifest.json" and _same_json(before, harmed)
    path.write_bytes(bytes(harmed))
    try:
        if not same:
            with pytest.raises(SpecError):
                Saved(folder)
    finally:
        path.write_bytes(before)


def _same_json(a, b):
    """Whether two texts say the same: a blank that became another blank is no damage."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_a_manifest_cannot_lie_about_places(ranks_of_four):
    """Catches a piece outside its tensor that a good checksum vouches for: the manifest is input like any other."""
    path = ranks_of_four / "step-00000002" / "manifest.json"
    whole = json.loads(path.read_text())
    piece = next(iter(whole["content"]["shards"][THIRD]["pieces"].values()))
    piece[2][4] = 10**6
    text = json.dumps(whole["content"], sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"checksum": zlib.crc32(text), "content": whole["content"]}))
    with pytest.raises(SpecError, match="lies outside its tensor"):
        Saved(path.parent)


# ---- Another run


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    """Catches weights that fit by chance: another number of experts per token changes no shape."""
    with Keeper(tmp_path) as keeper:
        keeper.save(Run.new(recipe("bf16")).snapshot())
        saved = keeper.newest().saved
    with pytest.raises(SpecError, match="checkpoint of another config: num_experts_per_tok was 4, is 3"):
        serial.resume(saved, SMALL.replace(num_experts_per_tok=3))
    longer = SMALL.replace(max_position_embeddings=2 * SMALL.max_position_embeddings)
    with pytest.raises(SpecError, match="max_position_embeddings was"):
        serial.resume(saved, longer)
    assert serial.resume(saved, longer, changed=["max_position_embeddings"]).state.weights


def test_a_mesh_refuses_another_config_and_another_dtype(on_four):
    """Catches float32 masters that take over a float64 run, or a model with other layers."""
    saved = Keeper(on_four).newest().saved
    args = (Mesh(), build("gpipe", 1, 4))
    with pytest.raises(SpecError, match="has masters in float64, the plan bf16 keeps float32"):
        spmd(1, lambda comm: mesh.resume(saved, comm, CONFIG, replace(RECIPE, plan=plan("bf16")), *args))
    with pytest.raises(SpecError, match="another config: norm_topk_prob was True"):
        spmd(1, lambda comm: mesh.resume(saved, comm, CONFIG.replace(norm_topk_prob=False), RECIPE, *args))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    """Catches an error where a run simply begins."""
    found = Keeper(tmp_path / "new").newest()
    assert found.saved is None and not found.passed_over
