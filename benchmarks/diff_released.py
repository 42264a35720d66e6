"""Judge three layers of the released model's shapes (one dense, two of 256 experts) from a sharded FP8 checkpoint on disk.

    python benchmarks/diff_released.py FOLDER [--tokens 64]

Writes a case with synthetic weights into FOLDER once (about 27 GB), records our own float32 run of it, then judges that trace in a
process of its own and prints seconds, peak memory and the verdict. Weights are random FP8 codes: what is measured is reading,
decoding, replaying and comparing, none of which looks at what the numbers are.
"""

from __future__ import annotations

import argparse
import json
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # this tree, installed or not

from refimpl.checkpoint import save  # noqa: E402
from refimpl.checkpoint.names import is_fp8  # noqa: E402
from refimpl.diff import Case, Header, Trace  # noqa: E402
from refimpl.diff.dims import Sizes  # noqa: E402
from refimpl.diff.judge import judge  # noqa: E402
from refimpl.diff.lanes import Recorded  # noqa: E402
from refimpl.diff.program import program_of  # noqa: E402
from refimpl.diff.replay import replay  # noqa: E402
from refimpl.diff.streamed import StageWeights  # noqa: E402
from refimpl.diff.tolerance import Noise  # noqa: E402
from refimpl.layers import PRESETS  # noqa: E402
from refimpl.layers.precision import FLOAT32  # noqa: E402
from refimpl.model import expected_tensors, read_inputs  # noqa: E402
from refimpl.model.phases import named  # noqa: E402

LAYERS, DENSE = 3, 1
CONFIG = PRESETS["deepseek-v3"].replace(
    num_hidden_layers=LAYERS, first_k_dense_replace=DENSE, num_nextn_predict_layers=0
)


class Synthetic(Mapping[str, Any]):
    """Random weights of the right shapes, made when they are asked for; FP8 codes as a checkpoint has them."""

    block, scale_fmt = (128, 128), None

    def __init__(self) -> None:
        self.shapes = expected_tensors(CONFIG, mtp=False)
        rng = np.random.default_rng(0)
        codes = rng.standard_normal(1 << 24).astype(np.float32) * 40
        self.codes = codes.astype(ml_dtypes.float8_e4m3fn)

    def shape(self, name: str) -> tuple[int, ...]:
        """The released tensor's."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """As the release stores it."""
        return "F8_E4M3" if is_fp8(name) else "BF16"

    def raw(self, name: str) -> tuple[Any, Any]:
        """Codes and scales, or the tensor and None."""
        shape = self.shapes[name]
        if not is_fp8(name):
            return self[name], None
        n, start = int(np.prod(shape)), len(name) * 4096
        codes = np.resize(np.roll(self.codes, start), n).reshape(shape)
        grid = tuple(-(-s // 128) for s in shape)
        return codes, np.full(grid, 1 / (40 * np.sqrt(shape[1])), np.float32)

    def __getitem__(self, name: str) -> Any:
        shape, rng = self.shapes[name], np.random.default_rng(len(name))
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
        scale = np.float32(1 if "embed" in name else shape[1] ** -0.5)
        block = rng.standard_normal(1 << 22, np.float32) * scale
        return np.resize(block, int(np.prod(shape))).reshape(shape).astype(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make_case(folder: Path, tokens: int) -> None:
    """Write the checkpoint, in shards, and the tokens."""
    if not (folder / "config.json").exists():
        save(folder, Synthetic(), CONFIG, dtype="fp8", max_shard_bytes=5 << 30)
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, tokens))
    (folder / "tokens.json").write_text(json.dumps({"tokens": ids.tolist()}))


def record(folder: Path, out: Path) -> None:
    """Our own float32 run, read a stage at a time, as a trace."""
    case = Case.read(folder)
    inputs = read_inputs(case.config, case.tokens)
    parts = Sizes.whole(1, len(case.tokens[0])).parts
    program, taps = program_of(case.config, inputs, n_mtp=0, parts=parts), {}
    weights = StageWeights(case.checkpoint, {})
    noise = Noise(lambda tap: 0.0, lambda call: "fp32")
    for _ in replay(program, Recorded({}, named(inputs, parts), weights, FLOAT32, noise), taps.__setitem__):
        pass
    Trace(Header(config=case.raw_config, tokens=case.tokens), taps).write(out)


def main() -> None:
    """The benchmark, or one of its steps in a process of its own, so that its peak is its own."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--step", choices=["make", "record", "judge"])
    args = p.parse_args()
    trace = args.folder / "trace.safetensors"
    for step in [args.step] if args.step else ["make", "record", "judge"]:
        start = time.perf_counter()
        if not args.step:
            subprocess.run(
                [sys.executable, __file__, str(args.folder), "--tokens", str(args.tokens), "--step", step], check=True
            )
            continue
        said = ""
        if step == "make":
            make_case(args.folder, args.tokens)
        elif step == "record":
            record(args.folder, trace)
        else:
            found = judge(Case.read(args.folder), Trace.read(trace))
            said = f", {found.verdict}, {len(found.culprits)} of {len(found.findings)} taps blamed"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{step:<8}{time.perf_counter() - start:8.1f} s   peak {peak:5.2f} GiB{said}", flush=True)


if __name__ == "__main__":
    main()
