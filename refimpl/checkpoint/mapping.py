"""A checkpoint as a mapping from canonical (Hugging Face) names to arrays, whatever its files look
like.

Opening reads headers only; a tensor is mapped, joined or dequantised when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, where
from refimpl.layers.numerics.quantisation import dequantize_blocks, quantization_settings

from .names import BIAS, SCALE, config_from_deepseek, is_deepseek_config, near
from .safetensors import Array
from .shards import Layout, Naming, find, json_object
from .sources import Source

_CODES = ("F8_E4M3", "F8_E5M2")


class Unscaled(SpecError):
    """FP8 codes whose scales are nowhere: no numbers."""


class Checkpoint(Mapping[str, Array]):
    """Canonical name -> array. FP8 weights come as float32, dequantised; everything else as it is
    stored.

    Arrays are read-only views of the mapped files where a tensor is stored in one piece. `dtype`,
    `shape`, `nbytes` and `in` cost nothing; `raw` gives FP8 codes with their scales. Scales that
    belong to an FP8 weight are not names of their own; a scale without one is, so that `check`
    reports it.
    """

    def __init__(self, path: Path, layout: Layout, config: dict[str, Any] | None) -> None:
        self.path = path
        self.config = config
        self.naming: Naming = layout.naming
        self.files, self.absent = tuple(f.path for f in layout.files), layout.absent
        self._mapped = tuple(layout.files)
        self.block, self.scale_fmt = quantization_settings(config or {})
        self._scales, self._sources = _pair_scales(layout.sources, self.block)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, partial: bool = False) -> Checkpoint:
        """Open a .safetensors file, a folder with one, an index with shards, or DeepSeek's
        model{rank}-mp{world} parts.

        `config` is config.json beside the weights in Hugging Face's keys (DeepSeek's own keys are
        mapped), or None. Raises SpecError for anything inconsistent: the message names file,
        tensor, and what was expected. partial: go on where files of the index are not there;
        `absent` then has what it places in them.
        """
        path = Path(path)
        layout = find(path, partial=partial)
        has_bias = any(name.endswith(BIAS) for name in layout.sources)
        with where(f"while opening {path}"):
            return cls(path, layout, _read_config(layout.folder / "config.json", has_bias))

    def __getitem__(self, name: str) -> Array:
        """The tensor; float32 if it is stored as FP8 codes. Raises SpecError for a bad scale,
        naming the block.
        """
        codes, scales = self.raw(name)
        if scales is None:
            return codes
        with where(f"while loading {name} from {self._files_of(name)}"):
            return dequantize_blocks(codes, scales, self.block)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor, as `[name]` gives them; only the blocks that hold them are decoded."""
        codes, scales = self.raw(name)
        if scales is None:
            return codes[start:stop]
        high = self.block[0]
        first, last = start // high, -(-stop // high)
        with where(f"while loading {name} from {self._files_of(name)}"):
            w = dequantize_blocks(codes[first * high : stop], scales[first:last], self.block)
        return w[start - first * high :]

    def let_go(self) -> None:
        """Give the memory back that mapped files have taken by being read; nothing else changes."""
        for file in self._mapped:
            file.let_go()

    def raw(self, name: str) -> tuple[Array, Array | None]:
        """The tensor as stored, and the scales of its blocks if it is FP8. Raises Unscaled for
        codes without scales.
        """
        source, scales = self.source(name), self._scales.get(name)
        with where(f"while loading {name} from {self._files_of(name)}"):
            if self.unscaled(name):
                other = near(name + SCALE, (n for n in self._sources if "scale" in n))
                hint = f"; is it {other!r}?" if other else ""
                raise Unscaled(f"{source.dtype} codes without {name + SCALE}{hint}")
            return source.read(), None if scales is None else scales.read()

    def dtype(self, name: str) -> str:
        """The stored dtype as safetensors names it: "BF16", "F8_E4M3", ..."""
        return self.source(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, model-parallel parts joined."""
        return self.source(name).shape

    def nbytes(self, name: str) -> int:
        """Stored bytes of the tensor without its scales."""
        return self.source(name).nbytes

    def scale(self, name: str) -> Source | None:
        """Where the scales of an FP8 tensor lie, None for any other."""
        return self._scales.get(name)

    def unscaled(self, name: str) -> bool:
        """Whether the tensor is FP8 codes without scales, which stand for no numbers."""
        return self.dtype(name) in _CODES and name not in self._scales

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def source(self, name: str) -> Source:
        """Where the tensor lies, without its scales. KeyError with a near name if there is none."""
        if name not in self._sources:
            other = near(name, self._sources)
            raise KeyError(f"{self.path} has no tensor {name!r}" + (f"; did you mean {other!r}?" if other else ""))
        return self._sources[name]

    def _files_of(self, name: str) -> str:
        return ", ".join(str(piece.file.path) for piece in self._sources[name].pieces)


def _read_config(path: Path, has_bias: bool) -> dict[str, Any] | None:
    if not path.exists():
        return None
    config = json_object(path)
    return config_from_deepseek(config, has_bias=has_bias) if is_deepseek_config(config) else config


def _pair_scales(sources: Mapping[str, Source], block: tuple[int, int]) -> tuple[dict[str, Source], dict[str, Source]]:
    """(scales by the name of their weight, all other tensors)."""
    codes = {name for name, source in sources.items() if source.dtype in _CODES}
    scales = {name: sources[name + SCALE] for name in codes if name + SCALE in sources}
    for name in scales:
        fused, rows = sources[name].pieces[0].part, sources[name].shape[0]
        if fused and rows % block[0] and not name.endswith("down_proj.weight"):
            raise SpecError(f"{name}: with {rows} rows, a block of {block[0]} would hold gate and up")
    rest = {name: s for name, s in sources.items() if name.removesuffix(SCALE) not in scales or name in scales}
    return scales, rest
