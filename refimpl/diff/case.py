"""A case: what both sides run. A folder with config.json, weights.safetensors (checkpoint names) and tokens.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint, json_object
from refimpl.layers.config import Config


@dataclass(frozen=True)
class Case:
    """config (config.json as it is), the checkpoint beside it (lazy), tokens (B, S), positions and valid or None."""

    path: Path
    raw_config: dict[str, Any]
    checkpoint: Checkpoint
    tokens: list[list[int]]
    positions: list[list[int]] | None = None
    valid: list[list[int]] | None = None

    @classmethod
    def read(cls, path: str | Path) -> Case:
        """Open a case folder; SpecError says which of its files is missing or unsound."""
        path = Path(path)
        with where(f"while reading case {path}"):
            require(path.is_dir(), "not a folder; a case holds config.json, weights.safetensors and tokens.json")
            run, config = json_object(path / "tokens.json"), json_object(path / "config.json")
            require("tokens" in run, 'tokens.json must be {"tokens": [[...], ...]}')
            return cls(path, config, Checkpoint.open(path), run["tokens"], run.get("positions"), run.get("valid"))

    @property
    def config(self) -> Config:
        """The config, checked."""
        with where(f"in {self.path / 'config.json'}"):
            return Config.from_dict(self.raw_config)

    def weights(self) -> dict[str, Array]:
        """Every tensor under its checkpoint name, dequantised."""
        return {n: self.checkpoint[n] for n in self.checkpoint}
