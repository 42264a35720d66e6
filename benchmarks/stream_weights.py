"""The released model's shapes from disk: one layer, then whole passes, in bounded memory; bytes read beside the least possible.

    python benchmarks/stream_weights.py FOLDER [--layer 17] [--cache 0] [--tokens 2]

Writes a checkpoint of all 61 layers into FOLDER once. One layer, the embedding, all routers, norms and scales are real numbers
(14 GB on disk); the codes of the other layers are holes, which take no place and read as zeros: 671 GB of names, shapes, offsets
and reads, of which the disk holds 14. Routers choose by the real embedding, so experts differ from layer to layer and token to
token. Each step runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # this tree, installed or not

from refimpl.checkpoint import Checkpoint, Rows  # noqa: E402
from refimpl.checkpoint.names import SCALE, is_fp8, layer_of  # noqa: E402
from refimpl.checkpoint.safetensors import Pending, write_tensors  # noqa: E402
from refimpl.checkpoint.shards import INDEX  # noqa: E402
from refimpl.infer import Request, Settings, stream  # noqa: E402
from refimpl.infer.from_disk import DiskWeights, layer_bytes, load_from_disk, pass_bytes, run_layer  # noqa: E402
from refimpl.infer.from_disk.accounting import row_bytes  # noqa: E402
from refimpl.layers import PRESETS  # noqa: E402
from refimpl.layers.precision import FLOAT32  # noqa: E402
from refimpl.model import Impl, expected_tensors  # noqa: E402

CONFIG = PRESETS["deepseek-v3"].replace(num_nextn_predict_layers=0)
HOLE = 1 << 20
PROMPT = [3]


class Sparse:
    """A file in which a large tensor that was made of zeros is a hole."""

    def __init__(self, f: BinaryIO) -> None:
        self.f = f

    def write(self, data: bytes | memoryview) -> None:
        """The bytes, or room for them."""
        hole = len(data) >= HOLE and not any(data[:4096])
        self.f.seek(len(data), os.SEEK_CUR) if hole else self.f.write(data)


class Synthetic:
    """Tensors of the released shapes: `real` ones of random numbers, scaled so that activations stay of order 1."""

    def __init__(self, layer: int) -> None:
        self.layer, self.shapes = layer, expected_tensors(CONFIG, mtp=False)
        rng = np.random.default_rng(0)
        self.codes = (rng.standard_normal(1 << 24, np.float32) * 40).astype(ml_dtypes.float8_e4m3fn)
        self.plain = rng.standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)

    def pending(self, name: str) -> dict[str, Pending]:
        """The tensor to be written, with its scales."""
        shape = self.shapes[name]
        if not is_fp8(name):
            dtype = "F32" if name.endswith("bias") else "BF16"
            return {name: Pending(dtype, shape, partial(self._plain, name, shape))}
        grid = tuple([-(-s // 128) for s in shape])
        scale = np.full(grid, 1 / (40 * np.sqrt(shape[1])), np.float32)
        return {
            name: Pending("F8_E4M3", shape, partial(self._coded, name, shape)),
            name + SCALE: Pending("F32", grid, lambda: scale),
        }

    def _coded(self, name: str, shape: tuple[int, ...]) -> Any:
        if layer_of(name) != self.layer:
            return np.zeros(shape, ml_dtypes.float8_e4m3fn)
        start = int.from_bytes(name.encode()[-16:]) % len(self.codes)
        return np.resize(np.roll(self.codes, start), shape)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            value, dtype = (0, np.float32) if name.endswith("bias") else (1, ml_dtypes.bfloat16)
            return np.full(shape, value, dtype)
        if name == "lm_head.weight":
            return np.zeros(shape, ml_dtypes.bfloat16)
        start = int.from_bytes(name.encode()[-24:]) % len(self.plain)
        rows = np.resize(np.roll(self.plain, start), shape)
        return rows if "embed" in name else (rows * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def make(folder: Path, layer: int) -> None:
    """One shard a layer and one for the rest, the index, the config."""
    made, files = Synthetic(layer), {}
    for name in made.shapes:
        i = layer_of(name)
        files.setdefault("rest" if i is None else f"layer-{i:02}", []).append(name)
    index: dict[str, str] = {}
    for key, names in files.items():
        path = folder / f"{key}.safetensors"
        tensors = {n: p for name in names for n, p in made.pending(name).items()}
        with path.open("wb") as f:
            write_tensors(Sparse(f), tensors)
            f.truncate(f.seek(0, os.SEEK_CUR))
        index |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))


def forget(checkpoint: Checkpoint) -> None:
    """Take the files out of the operating system's cache, so that the next read is the disk's."""
    for path in checkpoint.files:
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def noted(weights: DiskWeights) -> Iterator[list[Callable[[], Rows]]]:
    """Every read that is made inside, to be made again."""
    reads, rows = [], weights.reader.rows

    def note(*args: Any) -> Rows:
        reads.append(partial(rows, *args))
        return rows(*args)

    weights.reader.rows = note  # type: ignore[method-assign]
    yield reads


def one_layer(checkpoint: Checkpoint, layer: int, budget: int) -> None:
    """One token through one layer, from the disk, and from the operating system's cache; and the reads alone."""
    for state in ("cold", "warm"):
        with DiskWeights(checkpoint, FLOAT32, budget=budget) as weights, noted(weights) as reads:
            if state == "cold":
                forget(checkpoint)
            start, cpu = time.perf_counter(), time.process_time()
            run = run_layer(weights, CONFIG, layer, [PROMPT])
            took, cpu, most = time.perf_counter() - start, time.process_time() - cpu, peak()
            experts = set(run.routing.ids.ravel().tolist()) if run.routing else set()
            least = layer_bytes(checkpoint, layer, experts) + row_bytes(checkpoint, "model.embed_tokens.weight")
            if state == "cold":
                forget(checkpoint)
            start = time.perf_counter()
            for read in list(reads):
                read()
            alone = time.perf_counter() - start
        print(
            f"layer {layer}, 1 token, {state}: {took:.2f} s ({cpu:.2f} s of CPU), the reads alone {alone:.2f} s, beyond them "
            f"{took - alone:.2f} s; {run.bytes_read:,} bytes read, least {least:,}; peak {most:.0f} MiB"
        )


def whole(checkpoint: Checkpoint, tokens: int, budget: int) -> None:
    """A prompt and some tokens through all layers."""
    impl, started = Impl(), time.perf_counter()
    with load_from_disk(impl, checkpoint, budget=budget) as weights:
        print(f"opened in {time.perf_counter() - started:.1f} s, {peak():.0f} MiB")
        passes: list[dict[int, set[int]]] = [{}]
        tell = weights.chosen

        def note(layer: int, ids: Any) -> None:
            passes[-1][layer] = set(ids.ravel().tolist())
            tell(layer, ids)

        for i, block in enumerate(impl.model.model.layers):
            if hasattr(block.mlp, "gate"):
                block.mlp.gate._tell = partial(note, i)
        fed, before, start = PROMPT, weights.bytes_read, time.perf_counter()
        for token in stream(impl, [Request(PROMPT, Settings(temperature=0, max_tokens=tokens))]):
            least = pass_bytes(checkpoint, CONFIG, passes[-1], fed)
            count = sum(map(len, passes[-1].values()))
            print(
                f"pass of {len(fed)}: {time.perf_counter() - start:.1f} s, {count} experts, {weights.bytes_read - before:,} bytes "
                f"read, least {least:,}; cache {weights.hot.size / 2**20:.0f} MiB, peak {peak():.0f} MiB",
                flush=True,
            )
            fed, before, start = [token.id], weights.bytes_read, time.perf_counter()
            passes.append({})


def peak() -> float:
    """MiB this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """The benchmark, or one of its steps."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--layer", type=int, default=17)
    p.add_argument("--cache", type=float, default=0, help="GiB")
    p.add_argument("--tokens", type=int, default=2)
    p.add_argument("--step", choices=["make", "layer", "whole"])
    args = p.parse_args()
    if args.step == "make":
        return make(args.folder, args.layer)
    if not args.step:
        steps = ["layer", "whole"] if (args.folder / INDEX).exists() else ["make", "layer", "whole"]
        for step in steps:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--step", step], check=True)
        return None
    print(f"before anything is opened {peak():.0f} MiB")
    checkpoint, budget = Checkpoint.open(args.folder), int(args.cache * 2**30)
    if args.step == "layer":
        one_layer(checkpoint, args.layer, budget)
    else:
        whole(checkpoint, args.tokens, budget)
    print(f"peak {peak():.0f} MiB with a cache of {args.cache:g} GiB", flush=True)


if __name__ == "__main__":
    main()
