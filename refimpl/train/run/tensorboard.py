"""A run's metrics as TensorBoard event files, RUN/tensorboard (extra `tensorboard`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError


class Board:
    """Writes what a journal is given. What an earlier run wrote after step `done` is marked as gone, as TensorBoard does it."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            wanted = 'pip install "deepseek-v3-refimpl[tensorboard]"'
            raise SpecError(f"log.tensorboard needs tensorboardX: {wanted}") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Every number of a step under its name."""
        for name, x in record.items():
            if isinstance(x, int | float) and name != "step":
                self._writer.add_scalar(name, x, record["step"])
        self._writer.flush()

    def text(self, sample: Mapping[str, Any]) -> None:
        """A text that the model made."""
        self._writer.add_text(f"sample/{sample['prompt']}", sample["text"], sample["step"])

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
