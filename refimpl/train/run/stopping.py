"""Asking a run to stop from outside: RUN/stop. Whoever sees the folder can write it, on any machine; the run ends after its step.

A signal does not reach every run: Open MPI's mpiexec kills its processes half a second after a Ctrl-C, and nothing sets that time.
"""

from __future__ import annotations

from pathlib import Path

from refimpl.autograd.errors import SpecError, require

from . import alone

FILE = "stop"


def ask(folder: Path) -> str:
    """Ask the run in a folder to save and end -> who that is. SpecError where nobody trains."""
    require(folder.is_dir(), f"{folder} is no folder of a run")
    who = alone.owner(folder)
    require(who, f"nobody trains in {folder}; there is nothing to stop")
    try:
        (folder / FILE).touch()
    except OSError as error:
        raise SpecError(f"{folder / FILE}: {error.strerror}") from error
    return who


def asked(folder: Path) -> bool:
    """Whether somebody asks for it."""
    return (folder / FILE).exists()


def forget(folder: Path) -> None:
    """It was heard, or meant for a run before this one."""
    (folder / FILE).unlink(missing_ok=True)
