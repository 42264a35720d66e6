"""Recordings of programs of several ranks: the header says which rank it is, the dims what it holds, the folder is one trace."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.diff.marks import marks_of
from refimpl.record import refimpl_tap, trace_case
from refimpl.record.ranks import Spread, dims_of, parallel_of, spread_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
NUMBERS = {"B": 2, "S": 24, "N": 48, "H": 4, "Dn": 12, "Dr": 8, "Dv": 10, "D": 48}


def joined(rank, world):
    """What stands for torch in a process of several."""
    distributed = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: world
    )
    return types.SimpleNamespace(distributed=distributed)


class Mesh:
    """Two by three ranks, of which this is the one at dp 1, tp 2."""

    mesh_dim_names = ("dp", "tp")

    def size(self, i=None):
        return 6 if i is None else (2, 3)[i]

    def get_coordinate(self):
        return [1, 2]


def shard(dim):
    return types.SimpleNamespace(is_shard=lambda: True, is_partial=lambda: False, dim=dim)


PARTIAL = types.SimpleNamespace(is_shard=lambda: False, is_partial=lambda: True)
REPLICA = types.SimpleNamespace(is_shard=lambda: False, is_partial=lambda: False)


@pytest.mark.parametrize(
    ("shape", "shares", "axes", "expected"),
    [
        ((2, 24, 4, 20), (("tp", 2),), "B S H Dn+Dr", "B S H@tp Dn+Dr"),
        ((48, 40), (("dp", 0), ("tp", 1)), "B S H Dv", "(B@dp S) (H@tp Dv)"),
        ((48, 48), (("dp", 0), ("sp", 0)), "N D", "N@dp@sp D"),
        ((24, 2, 48), (("tp", None),), "S B D", "S B D +tp"),
        ((2, 24, 47), (("tp", 2),), "B S D", ""),
        ((2, 24), (("tp", 1),), "B S D", ""),
    ],
)
def test_dims_say_what_a_rank_holds(shape, shares, axes, expected):
    """Catches a mark on another axis, merged axes without brackets, a sum told as a share, dims made up for what does not fit."""
    found = dims_of(Spread(shape, shares), axes.split(), NUMBERS)
    assert found == expected
    if found:
        assert marks_of(found).along == shares and marks_of(found).axes == len(shape)


def test_a_distributed_tensor_tells_its_shares():
    """Catches a negative axis, a replica called a share, an axis of ranks under another name."""
    x = types.SimpleNamespace(placements=[PARTIAL, shard(-1)], device_mesh=Mesh(), ndim=3, shape=(2, 24, 48))
    assert spread_of(x) == Spread((2, 24, 48), (("dp", None), ("tp", 2)))
    x.placements = [REPLICA, REPLICA]
    assert spread_of(x) is None and spread_of(np.zeros(3)) is None


def test_the_header_says_which_rank_it_is(monkeypatch):
    """Catches ranks that all claim to be alone, and a mesh whose axes are not told."""
    assert parallel_of(None) == {}
    monkeypatch.setitem(sys.modules, "torch", joined(5, 6))
    assert parallel_of(None) == {"rank": 5, "ranks": 6, "axes": {"ranks": [5, 6]}}
    weight = types.SimpleNamespace(device_mesh=Mesh())
    module = types.SimpleNamespace(parameters=lambda: [np.zeros(2), weight])
    assert parallel_of(module) == {"rank": 5, "ranks": 6, "axes": {"dp": [1, 2], "tp": [2, 3]}}
    state = types.SimpleNamespace(model_parallel_is_initialized=lambda: True)
    for kind, pair in {"tensor_model": (2, 3), "pipeline_model": (1, 2), "context": (0, 1), "data": (0, 1)}.items():
        for word, value in zip(("rank", "world_size"), pair, strict=True):
            setattr(state, f"get_{kind}_parallel_{word}", lambda value=value: value)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    assert parallel_of(None)["axes"] == {"tp": [2, 3], "pp": [1, 2], "cp": [0, 1], "dp": [0, 1]}
    monkeypatch.setitem(sys.modules, "torch", joined(0, 1))
    assert parallel_of(module) == {}


def test_recordings_of_two_ranks_are_one_trace(monkeypatch, tmp_path):
    """Catches ranks that overwrite each other's file, and a folder that `refimpl diff` does not read as one run."""
    whole, out = trace_case(Case.read(TINY)), tmp_path / "out.safetensors"
    for rank in range(2):
        monkeypatch.setitem(sys.modules, "torch", joined(rank, 2))
        dims = {"fwd/L1/mla.ctx": "B S H@ranks Dv"}
        with refimpl_tap.recording(out, TINY, dims=dims):
            for name, x in whole.taps.items():
                refimpl_tap.tap(name, x[:, :, 2 * rank : 2 * rank + 2] if name in dims else x)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "rank-0-of-2.safetensors",
        "rank-1-of-2.safetensors",
    ]
    monkeypatch.delitem(sys.modules, "torch")
    judgement = judge(Case.read(TINY), Trace.read(tmp_path / "out"))
    assert judgement.verdict == "CONFORMS", render(judgement)
    ranks = next(g.text for g in judgement.gates if g.name == "ranks")
    assert ranks.startswith("2 ranks: 1 taps put together") and "bit for bit" in ranks


_RANK = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from refimpl.record import torch_map
from refimpl.record.build_transformers import build as whole

rank, store, case, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)

def build(case):
    made = whole(case)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    columns = ColwiseParallel(use_local_output=False)
    plan = {"gate_proj": columns, "up_proj": columns, "down_proj": RowwiseParallel()}
    plan = {f"model.layers.0.mlp.{name}": how for name, how in plan.items()}
    parallelize_module(made.module, mesh, plan | {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return made

sys.modules["build_two"] = sys.modules["__main__"]
torch_map.record(case, out, map_name="transformers", build="build_two:build")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_torch_are_one_trace(tmp_path):
    """Catches a recorder that cannot read distributed tensors, or does not say which part of a tap a rank holds: transformers with
    its first feed-forward split over two processes.
    """
    pytest.importorskip("torch", reason="comes with the extra 'torch'")
    pytest.importorskip("transformers", reason="comes with the extra 'interop'; CI runs these tests with it")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    arguments = [str(tmp_path / "store"), str(TINY), str(tmp_path / "out.safetensors")]
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *arguments], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    trace = Trace.read(tmp_path / "out")
    judgement = judge(Case.read(TINY), trace)
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert next(g.text for g in judgement.gates if g.name == "ranks").startswith("2 ranks: 3 taps put together")
    assert trace.taps["fwd/L0/mlp.act"].shape == (
        2,
        24,
        json.loads((TINY / "config.json").read_text())["intermediate_size"],
    )
