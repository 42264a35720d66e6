"""Which container a path is, told by its first bytes or by the names in it, and its tensors under checkpoint names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from refimpl.autograd.errors import SpecError, require
from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Held, Part, Stored
from refimpl.layers.config import Config
from refimpl.record import gguf_weights

from . import megatron, mlx, torchtitan

Restore = Callable[[Checkpoint, Config], Mapping[str, Part]]
CONTAINERS: tuple[tuple[str, str, Restore], ...] = (
    ("MLX", r".+\.(switch_mlp\..+|embed_q\..+|scales)", mlx.parts),
    ("torchtitan", r"tok_embeddings\.weight|layers\.\d+\.(attention|moe)\..+", torchtitan.parts),
    ("Megatron", r"(.+\.)?(decoder\.layers\.\d+\..+|embedding\.word_embeddings\.weight)", megatron.parts),
)
"""Name, a tensor's name that gives it away, reader; what none of them claims is a checkpoint (Hugging Face or DeepSeek)."""
_WAY_OUT = {
    ".pt": "save the state_dict with safetensors.torch.save_file",
    ".pth": "save the state_dict with safetensors.torch.save_file",
    ".bin": "save the state_dict with safetensors.torch.save_file",
    ".distcp": "load the distributed checkpoint where it was made and save the state_dict with safetensors.torch.save_file",
    ".npz": "mlx-lm writes safetensors since 0.0.3: convert again",
}


def open_weights(path: str | Path, config: Config) -> Held:
    """The weights of a file or folder, for a model of this config; reads headers only. SpecError for what is no container, is
    truncated, or is a pickle, with the way out.
    """
    path = Path(path)
    _refuse_pickles(path)
    if _is_gguf(path):
        return gguf_weights.read(path, config)
    ckpt = Checkpoint.open(path)
    for name, mark, restore in CONTAINERS:
        if any(re.fullmatch(mark, tensor) for tensor in ckpt):
            return Held(name, path, restore(ckpt, config))
    name = {"hf": "safetensors", "deepseek": "DeepSeek's converted files"}[ckpt.naming]
    return Held(name, path, {n: plain(ckpt, n) for n in ckpt})


def plain(ckpt: Checkpoint, name: str) -> Part:
    """A tensor of the checkpoint as it is; FP8 codes with their scales."""
    return Part(ckpt.shape(name), (Stored(ckpt.dtype(name), block=ckpt.block),), partial(ckpt.__getitem__, name))


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def _refuse_pickles(path: Path) -> None:
    require(path.exists(), f"{path} does not exist")
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    if any(n.endswith((".safetensors", ".gguf")) for n in names):
        ggufs = [n for n in names if n.endswith(".gguf")] if path.is_dir() else []
        require(not ggufs, f"{path} holds {', '.join(ggufs[:3])}; name the file")
        return
    for name in names:
        if way := _WAY_OUT.get(Path(name).suffix):
            raise SpecError(f"{path}: {name} is not read: it may hold a pickle, which can run anything; {way}")
