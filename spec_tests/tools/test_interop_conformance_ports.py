"""Other people's implementations held to the claims, by the names under which they come with us: what each does otherwise is
listed, and nothing else fails. Their verdicts by the diff: test_interop_adapters.py.
"""

import json
import subprocess

import pytest

from refimpl.conformance.shipped import SHIPPED, profiles_of
from refimpl.conformance.suite import command, environment

NEEDS = {
    "transformers": ("torch", "transformers"),
    "mlx": ("mlx.core", "mlx_lm"),
    "llama.cpp": ("gguf", "llama_cpp"),
}
KNOWN = {
    "transformers": {"RJ-001-missing", "RJ-001-misspelt"},
    "mlx": {
        *("FW-001@bias-negative", "FW-002@bias-negative", "RN-008", "FW-001@extreme-logits", "FW-002@extreme-logits"),
        "RJ-002",
    },
    "llama.cpp": {"FW-001@extreme-logits", "FW-002@extreme-logits", "FW-004-two-mscales"},
}
"""What the quick run sees of the lists; regimes of the whole run have their entries there, too."""
pytestmark = pytest.mark.slow


def told(name, tmp_path, **options):
    """The report of a quick run, by claim@regime -> state."""
    for library in NEEDS[name]:
        pytest.importorskip(library, reason=f"{library} comes with an extra; CI runs these tests with it")
    out = tmp_path / "report.json"
    asked = {"--impl": name, "--profile": ",".join(profiles_of(name)), "--conformance-json": out} | options
    ran = subprocess.run(command(asked, slow=False), env=environment(), capture_output=True, text=True)
    assert out.is_file(), ran.stdout + ran.stderr
    report = json.loads(out.read_text())
    states = {}
    for o in report["outcomes"]:
        states.setdefault(f"{o['id']}@{o['regime']}".rstrip("@"), set()).add(o["state"])
    return report, states, ran


@pytest.mark.parametrize("name", NEEDS)
def test_it_does_otherwise_what_is_listed_and_nothing_else(name, tmp_path):
    """Catches a deviation that went away and stays listed, one that is new, a claim that is skipped for no reason, a framework's
    exception that passes for a deviation.
    """
    report, states, ran = told(name, tmp_path)
    assert report["conforms"] and report["stale"] == [] and ran.returncode == 0, ran.stdout
    assert {c for c, found in states.items() if "known" in found} == KNOWN[name]
    assert all(found["conforms"] for found in report["profiles"].values())
    for claim in ("FW-001@plain", "FW-004-another-factor", "RN-001", "RN-002", "PA-002-heads", "PA-002-experts"):
        assert states[claim] == {"passed"}, (claim, ran.stdout)
    texts = {o["text"] for o in report["outcomes"] if o["state"] == "skipped"}
    assert all(text.startswith("NOT-IMPLEMENTED") for text in texts), texts


def test_without_the_list_the_same_claims_fail(tmp_path):
    """Catches a list that is applied to what would have passed."""
    empty = tmp_path / "none.txt"
    empty.write_text("# nothing\n")
    report, states, ran = told("mlx", tmp_path, **{"--xfails-file": empty})
    assert {c for c, found in states.items() if "failed" in found} == KNOWN["mlx"]
    assert not report["conforms"] and ran.returncode == 1


def test_the_process_that_comes_with_us_is_one():
    """Catches llama.cpp held in this process, where nobody else's engine could be."""
    assert SHIPPED["llama.cpp"].command and not SHIPPED["llama.cpp"].impl
