"""A run's metrics as TensorBoard event files, RUN/tensorboard (extra `tensorboard`)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
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
        files, purge = folder / "tensorboard", done + 1 if done else None
        self._writer: Any = SummaryWriter(str(files), purge_step=purge, filename_suffix=_suffix(files, done))

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


def _suffix(files: Path, done: int) -> str:
    """The end of a new file's name, ".00002.step-00000400": how many there were before, and the step it goes on from.

    tensorboardX begins names with the second, and writes over what is there; TensorBoard reads files in the order of names.
    So the number makes a name new, and last among those of its second, whatever step a run goes back to.
    """
    names = [path.name for path in files.glob("*.tfevents.*")]
    free = next(n for n in count(len(names)) if not any(f".{n:05}.step-" in name for name in names))
    return f".{free:05}.step-{done:08}"
