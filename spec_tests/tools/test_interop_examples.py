"""docs/examples that need a framework: the traces that they write conform as far as they go."""

import importlib.util

import pytest

from refimpl.cli import main
from refimpl.diff import Trace

from .test_examples import TINY, example
from .tree import in_repository


def needs(*names):
    missing = [n for n in names if importlib.util.find_spec(n) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed: pip install {' '.join(names)}"
    )


@in_repository
@pytest.mark.parametrize(
    ("name", "taps"),
    [
        pytest.param("trace_torch.py", 10, marks=needs("torch", "transformers")),
        pytest.param("trace_jax.py", 5, marks=needs("jax")),
    ],
)
def test_the_trace_of_an_example_has_nothing_wrong(name, taps, tmp_path, capsys):
    """Catches hooks on modules that moved, taps under names that are none, values of another run. torch: 3 a layer and logits."""
    out = tmp_path / "out.safetensors"
    example(name, TINY, out)
    assert len(Trace.read(out).taps) == taps
    assert main(["diff", str(TINY), str(out)]) in (0, 2)
    said = capsys.readouterr().out
    assert f"{taps} taps replayed" in said and "FAIL" not in said
