"""R 3.4: `refimpl eplb`: files of loads and maps, the drawing, exit codes."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.cli.dispatch import main
from refimpl.parallel_emulation import eplb_draw
from refimpl.parallel_emulation.eplb import rebalance_experts
from refimpl.parallel_emulation.eplb_draw import matrix, matrix_in_order, text
from refimpl.parallel_emulation.eplb_files import read_loads, read_maps

LOADS = np.random.default_rng(0).integers(1, 100, (2, 12))
SIZES = ["--gpus", "4", "--nodes", "2", "--groups", "4"]


@pytest.fixture
def loads(tmp_path):
    path = tmp_path / "loads.npy"
    np.save(path, LOADS)
    return path


def run(*args):
    return main(["eplb", *map(str, args)])


def test_every_kind_of_file_gives_the_same_loads(tmp_path):
    """Catches a transposed CSV, SGLang's steps not added up, a header read as numbers."""
    written = {
        "a.json": json.dumps(LOADS.tolist()),
        "b.json": json.dumps({"loads": LOADS.tolist()}),
        "c.json": json.dumps({"logical_count": [(LOADS - 1).tolist(), np.ones_like(LOADS).tolist()]}),
        "d.csv": "# expert 0, 1, ...\n" + "\n".join(",".join(map(str, row)) for row in LOADS) + "\n\n",
    }
    np.save(tmp_path / "e.npy", LOADS)
    for name, content in written.items():
        (tmp_path / name).write_text(content)
    for name in [*written, "e.npy"]:
        np.testing.assert_array_equal(read_loads(tmp_path / name), LOADS)


def test_every_name_of_a_map_is_known(tmp_path):
    """SGLang's, vLLM's and vLLM-Ascend's files, and ragged replicas. Catches a name that is silently ignored."""
    p = rebalance_experts(LOADS, 16, 4, 2, 4)
    devices = [[{"device_expert": part.tolist()} for part in row.reshape(4, 4)] for row in p.phy2log]
    ragged = [[[s for s in e if s >= 0] for e in layer] for layer in p.log2phy.tolist()]
    files = {
        "sglang.json": {"physical_to_logical_map": p.phy2log.tolist()},
        "ascend.json": {"moe_layer_count": 2, "layer_list": [{"device_list": d} for d in devices]},
        "vllm.json": {"logical_to_physical_map": ragged, "logical_replica_count": p.logcnt.tolist()},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    np.savez(tmp_path / "ours.npz", **p._asdict())
    np.testing.assert_array_equal(read_maps(tmp_path / "sglang.json").phy2log, p.phy2log)
    np.testing.assert_array_equal(read_maps(tmp_path / "ascend.json").phy2log, p.phy2log)
    np.testing.assert_array_equal(read_maps(tmp_path / "vllm.json").log2phy, p.log2phy)
    np.testing.assert_array_equal(read_maps(tmp_path / "vllm.json").logcnt, p.logcnt)
    np.testing.assert_array_equal(read_maps(tmp_path / "ours.npz").logcnt, p.logcnt)


def test_a_plan_is_the_published_one_and_passes_its_own_check(loads, tmp_path, capsys):
    """Catches sizes handed over in another order, and a judge that cannot read what the planner writes."""
    plan = tmp_path / "plan.json"
    assert run(loads, *SIZES, "--slots", 16, "--json", "--out", plan) == 0
    told = json.loads(plan.read_text())
    assert told["phy2log"] == rebalance_experts(LOADS, 16, 4, 2, 4).phy2log.tolist()
    capsys.readouterr()
    assert run(loads, *SIZES, "--check", plan, "--slack", 0, "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["good"] and verdict["balance"]["reached"] == [b["after"] for b in told["balance"]]
    told["phy2log"][1][0] = -1
    plan.write_text(json.dumps(told))
    assert run(loads, *SIZES, "--check", plan) == 1
    out = capsys.readouterr().out
    assert "fault: layer 1: empty slot: slot 0 holds no expert" in out and out.endswith("faults\n")
    assert run(loads, *SIZES, "--check", plan, "--json") == 1
    assert json.loads(capsys.readouterr().out)["balance"]["reached"] is None


def test_the_drawing_has_every_replica_with_its_load(loads, tmp_path, capsys):
    """Cells of the SVG against a loop over slots. Catches a picture of another layer, loads not shared by replicas."""
    svg = tmp_path / "a.svg"
    assert run(loads, *SIZES, "--slots", 16, "--layer", 1, "--svg", svg) == 0
    p = rebalance_experts(LOADS, 16, 4, 2, 4)
    want = {}
    for slot, e in enumerate(p.phy2log[1]):
        want[(e, slot // 4)] = want.get((e, slot // 4), 0) + LOADS[1, e] / p.logcnt[1, e]
    titles = [t.text for t in ET.parse(svg).iter("{http://www.w3.org/2000/svg}title")]
    cells = [t for t in titles if t.startswith("expert")]
    assert sorted(cells[12:]) == sorted(f"expert {e} on GPU {g}: {x:g}" for (e, g), x in want.items())
    assert sorted(cells[:12]) == sorted(f"expert {e} on GPU {e // 3}: {LOADS[1, e]:g}" for e in range(12))
    out = capsys.readouterr().out
    heaviest = int(np.argmax(LOADS[1]))
    assert f"expert {heaviest:<7}" in out and "layer 1\nthe 12 heaviest of 12 experts; 4 GPUs across" in out


def rectangles(root):
    """(x, y, width, height, rest) of every rectangle of an SVG, in order."""
    for e in root.iter("{http://www.w3.org/2000/svg}rect"):
        yield *(float(e.get(k, 0)) for k in ("x", "y", "width", "height")), e


@pytest.mark.parametrize("gpus", [4, 12])
def test_every_cell_of_the_drawing_is_in_its_row_and_column(gpus):
    """Catches cells, bars or panels on top of one another or outside, and shades that are not loads."""
    p = rebalance_experts(LOADS, 24, 4, 2, gpus)
    panels = {"before": matrix_in_order(LOADS[0], gpus), "after": matrix(LOADS[0], p.phy2log[0], gpus)}
    paper, *rest = rectangles(ET.fromstring(eplb_draw.svg(panels, "t")))
    assert paper[:2] == (0, 0)
    for x, y, w, h, _ in rest:
        assert 0 <= x <= x + w <= paper[2] and 0 <= y <= y + h <= paper[3]
    frames = [r for r in rest if r[4].get("stroke") == "#ccc"]
    cells = iter([r for r in rest if r[4].get("fill") == "#274f8f"])
    bars = iter([r for r in rest if r[4].get("fill") == "#f4b860"])
    assert frames[0][0] + frames[0][2] < frames[1][0]
    most = max(np.nanmax(m) for m in panels.values())
    busiest = max(np.nansum(m, axis=0).max() for m in panels.values())
    for (left, top, width, height, _), m in zip(frames, panels.values(), strict=True):
        size = width / gpus, height / len(m)
        for g, load in enumerate(np.nansum(m, axis=0)):
            x, y, w, h, _ = next(bars)
            assert left + g * size[0] == x and w <= size[0] and y + h < top
            assert h == pytest.approx(54 * load / busiest, abs=0.06)  # one decimal is written
        for e, g in np.argwhere(~np.isnan(m)):
            x, y, w, h, cell = next(cells)
            assert (x, y, w, h) == (left + g * size[0], top + e * size[1], *size)
            assert float(cell.get("fill-opacity")) == pytest.approx(0.12 + 0.88 * m[e, g] / most, abs=6e-4)


def test_experts_without_load_are_drawn_pale():
    """Catches 0 / 0."""
    shades = {
        e.get("fill-opacity") for *_, e in rectangles(ET.fromstring(eplb_draw.svg({"none": np.zeros((2, 2))}, "t")))
    }
    assert shades == {None, "0.120"}


def test_loads_of_gpus_add_up_and_many_gpus_share_columns():
    """Catches load lost between a replica and its neighbour on the same GPU, and a picture wider than a screen."""
    w = np.array([9.0, 1, 1])
    shares = matrix(w, np.array([0, 0, 0, 1, 2, 0]), 3)
    np.testing.assert_allclose(np.nansum(shares, axis=1), w)
    np.testing.assert_allclose(np.nansum(shares, axis=0), [4.5, 3.25, 3.25])
    wide = {"before": matrix_in_order(np.ones(256), 144)}
    assert max(map(len, text(wide, 5).splitlines()[1:])) <= 14 + 40
    assert "4 a column" in text(wide, 5)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[[1, 2], [3]]", "not a rectangular array"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", '{"x": 1}', "an object without loads or weight or logical_count"),
        ("a.json", "[1, 2]", r"shape \(2,\)"),
        ("a.json", '[["a"]]', "expected numbers"),
        ("a.csv", "1,2\n1,x\n", "line 2: could not convert"),
        ("a.csv", "1,2\n1\n", "line 2 has 1 numbers, the first 2"),
        ("a.npy", "no", "cannot be read as .npy"),
        ("a.txt", "1", "are read from .json, .csv and .npy"),
        ("none.json", None, "cannot be read"),
    ],
)
def test_files_that_are_no_loads_are_refused(tmp_path, name, content, says):
    """Catches a traceback, and rows of a ragged file shifted."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SpecError, match=says):
        read_loads(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"logcnt": [[1]]}', "no expert map; expected one of phy2log"),
        ("[1]", "a list; expected an object of maps"),
        ('{"phy2log": [[0.5]]}', "phy2log is float64"),
        ('{"phy2log": [[[[0]]]]}', "expected 2 axes"),
        ('{"layer_list": [{}]}', "without device_list"),
        ('{"layer_list": 3}', "without device_list"),
        ('{"log2phy": [[[0], 1]]}', "not a rectangular array"),
    ],
)
def test_files_that_are_no_maps_are_refused(tmp_path, content, says):
    """Catches counts alone taken for maps, half experts, and a traceback."""
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(SpecError, match=says):
        read_maps(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--gpus", 0], "--gpus 0"),
        (["--gpus", 4, "--layer", 2], "--layer 2; the loads have 2"),
        (["--gpus", 4, "--rows", 0], "--rows 0"),
        (["--gpus", 4, "--slack", 0.1], "--slack is for --check"),
        (["--gpus", 5, "--slots", 16], "num_gpus=5 does not divide num_replicas=16"),
        ([], "--gpus"),
    ],
)
def test_bad_sizes_end_with_code_3(loads, capsys, args, says):
    """Catches exit code 1, which would read as a fault of the maps."""
    try:
        code = run(loads, *args)
    except SystemExit as end:
        code = end.code
    assert code == 3 and says in capsys.readouterr().err


def test_devices_of_different_sizes_have_empty_slots(tmp_path):
    """Three experts on one device and one on the other. Catches devices run together, so that the second half of four slots is
    taken for a device, and the maps for whole.
    """
    devices = [{"device_expert": [0, 1, 2]}, {"device_expert": [3]}]
    (tmp_path / "m.json").write_text(json.dumps({"layer_list": [{"device_list": devices}]}))
    assert read_maps(tmp_path / "m.json").phy2log.tolist() == [[0, 1, 2, 3, -1, -1]]


def test_no_slots_are_not_the_default(tmp_path):
    """Catches --slots 0 planned with as many slots as are needed."""
    np.save(tmp_path / "l.npy", LOADS)
    assert main(["eplb", str(tmp_path / "l.npy"), "--gpus", "2", "--slots", "0"]) == 3
