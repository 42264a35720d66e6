"""The conformance suite on an implementation in torch, written for the purpose (docs/examples/torch_port.py)."""

import json
import pathlib
import subprocess

import pytest

from refimpl.conformance.suite import command, environment

pytest.importorskip("torch", reason="torch is not installed")
EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "examples" / "torch_port.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.is_file(), reason="about the repository's examples; this is an installed wheel"),
]
FAULTS = {
    "a group's score is its best expert": ("members.topk(2, -1).values.sum(-1)", "members.max(-1).values"),
    "the bias is in the weights": ("g = s.gather(1, ids)", "g = a.gather(1, ids)"),
    "keys are rotated by the place in the chunk": (
        "torch.arange(past, past + s).expand(b, s) if positions",
        "torch.arange(0, s).expand(b, s) if positions",
    ),
    "mscale is not squared": ('mscale(s["factor"], all_dim) ** 2 if', 'mscale(s["factor"], all_dim) if'),
}


def outcomes(tmp_path, source):
    """What the suite says of a port with this source: claim@regime -> state, and whether it conforms by profile."""
    (tmp_path / "torch_port.py").write_text(source)
    out = tmp_path / "report.json"
    options = {"--impl": "torch_port:Port", "--profile": "core,yarn,cache,train,parallel", "--conformance-json": out}
    ran = subprocess.run(command(options, slow=False), env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert out.is_file(), ran.stdout + ran.stderr
    told = json.loads(out.read_text())
    states = {f"{o['id']}@{o['regime']}".rstrip("@"): o["state"] for o in told["outcomes"]}
    return states, {p: found["conforms"] for p, found in told["profiles"].items()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_example_conforms(tmp_path):
    """Catches a suite that only ourselves can pass, and an example that a porter would start from with a fault in it."""
    states, conforms = outcomes(tmp_path, EXAMPLE.read_text())
    assert conforms == dict.fromkeys(("core", "yarn", "cache", "train", "parallel"), True)
    assert states["FW-001@bias-negative"] == states["RN-002"] == states["RN-007-groups"] == "passed"
    assert states["ST-embed@plain"] == "skipped"
    assert states["PA-002-heads"] == states["PA-002-experts"] == states["FW-004-two-mscales"] == "passed"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_example_is_seen(tmp_path, fault):
    """Catches claims that pass whatever is computed."""
    old, new = FAULTS[fault]
    source = EXAMPLE.read_text()
    assert source.count(old) == 1
    states, _ = outcomes(tmp_path, source.replace(old, new))
    assert any(s == "failed" for s in states.values())
