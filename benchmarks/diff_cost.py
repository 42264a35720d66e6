"""What judging a trace costs, beside one forward pass of the same tokens: CPU time, and peak memory.

    OPENBLAS_NUM_THREADS=1 python benchmarks/diff_cost.py [--precision bf16] [--layers]

Beside a pass that keeps every tap, as the judged trace does (its attention makes whole scores), and one that nobody observes.
Two sizes: mini with 2 x 256 tokens, where matrix products cost most, and tiny with 2 x 1024, where attention's squares do. The
trace is our own run, every tap recorded; `--foreign` moves each of its numbers by up to a unit in the last place, as another
implementation's would differ. Each measurement is a process of its own, and the shortest of several counts.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # this tree, installed or not

from refimpl.diff import Case, Trace  # noqa: E402
from refimpl.diff.judge import judge  # noqa: E402
from refimpl.diff.tolerance import UNIT  # noqa: E402
from refimpl.layers import PRESETS  # noqa: E402
from refimpl.layers.precision import FLOAT32  # noqa: E402
from refimpl.layers.stage import Recorder, observing  # noqa: E402
from refimpl.model import ForCausalLM, Inputs, effective  # noqa: E402
from refimpl.model.phases import parts_of, run_parts  # noqa: E402
from refimpl.record import new_case, trace_case  # noqa: E402

SIZES = (("mini", 2, 256), ("tiny", 2, 1024))
TRIES = 5
MIB = 1 << 20


def main() -> None:
    """The table, or one of its measurements."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    p.add_argument("--foreign", action="store_true", help="a trace whose numbers differ from ours in the last place")
    p.add_argument("--layers", action="store_true", help="tiny with 2, 4 and 8 layers instead: is it linear?")
    p.add_argument("--one", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(peak(args.one) if args.peak else seconds(args.one)))
        return
    sizes = [("tiny", 1, 256, n) for n in (2, 4, 8)] if args.layers else [(*s, None) for s in SIZES]
    print(f"{'':<22}{'forward':>10}{'recorded':>10}{'judged':>10}{'ratio to':>13} both{'peak':>10}{'allowed':>10}")
    for preset, batch, length, layers in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), preset, batch, length, layers, args.precision, args.foreign)
            got = {**measured(folder), **measured(folder, "--peak")}
        name = f"{preset} {batch} x {length}" + (f", {layers} layers" if layers else "")
        ms, mib = 1e3, MIB
        print(
            f"{name:<22}{got['forward'] * ms:7.0f} ms{got['recorded'] * ms:7.0f} ms{got['judged'] * ms:7.0f} ms"
            f"{got['judged'] / got['forward']:8.1f}, {got['judged'] / got['recorded']:8.1f}"
            f"{got['peak'] / mib:6.0f} MiB{got['allowed'] / mib:6.0f} MiB  {got['verdict']}",
            flush=True,
        )


def make(folder: Path, preset: str, batch: int, length: int, layers: int | None, precision: str, foreign: bool) -> None:
    """A case with random tokens, and a trace of our own run of it."""
    config = PRESETS[preset] if layers is None else PRESETS[preset].replace(num_hidden_layers=layers)
    new_case(folder / "case", config, seed=0, batch=1, length=4)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch, length)).tolist()
    (folder / "case" / "tokens.json").write_text(json.dumps({"tokens": tokens}))
    trace = trace_case(Case.read(folder / "case"), precision=precision)
    u = UNIT[{"bf16": "bfloat16"}.get(precision, precision)] if foreign else 0.0
    taps = {t: _moved(np.asarray(a), u, rng) if foreign else a for t, a in trace.taps.items()}
    Trace(trace.header, taps).write(folder / "trace.safetensors")


def _moved(a: Any, u: float, rng: np.random.Generator) -> Any:
    """Floating-point numbers moved by up to u of themselves."""
    if a.dtype.kind in "iub":
        return a
    return (a.astype(np.float64) * (1 + u * rng.uniform(-1, 1, a.shape))).astype(a.dtype)


def measured(folder: str, *more: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", folder, *more]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def seconds(folder: Path) -> dict[str, Any]:
    """CPU time of a forward pass, of one that is recorded, and of judging, the shortest of some, in turns."""
    case = Case.read(folder / "case")
    model = ForCausalLM.from_weights(case.config, effective(case.weights(), FLOAT32))
    inputs = model.inputs(case.tokens)
    forward, recorded, judged = [], [], []
    for _ in range(TRIES):
        forward.append(_time(lambda: model(inputs, with_mtp=bool(model.n_mtp))))
        recorded.append(_time(lambda: _recorded(model, inputs)))
        judged.append(_time(lambda: judge(case, Trace.read(folder / "trace.safetensors"))))
    return {"forward": min(forward), "recorded": min(recorded), "judged": min(judged)}


def _recorded(model: ForCausalLM, inputs: Inputs) -> None:
    """A forward pass whose taps are all kept, MTP's modules included, as the judged trace's are."""
    recorder = Recorder()
    with observing(recorder):
        run_parts(
            model, inputs, parts_of(["fwd"], inputs.tokens.shape[1], "expanded"), recorder, with_mtp=bool(model.n_mtp)
        )


def _time(fn: Callable[[], Any]) -> float:
    start = time.process_time()
    fn()
    return time.process_time() - start


def peak(folder: Path) -> dict[str, Any]:
    """The most memory that a judgement takes, all of the process counted, and what it may: 300 MiB, and the weights and taps of the
    largest layer.
    """
    case, trace = Case.read(folder / "case"), Trace.read(folder / "trace.safetensors")
    verdict = judge(case, trace).verdict
    status = Path(
        "/proc/self/status"
    ).read_text()  # Linux; getrusage's number is the largest of the parent's and this one's
    most = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    sizes: dict[str, int] = {}
    for name in case.checkpoint:
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        sizes[layer] = sizes.get(layer, 0) + case.checkpoint.nbytes(name)
    for tap, a in trace.taps.items():
        layer = tap.split("/")[1].removeprefix("L") if tap.count("/") > 1 else "rest"
        sizes[layer] = sizes.get(layer, 0) + a.nbytes
    largest = max(n for layer, n in sizes.items() if layer != "rest")
    return {"peak": most, "allowed": 300 * MIB + largest, "verdict": verdict}


if __name__ == "__main__":
    main()
