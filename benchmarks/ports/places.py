"""Where in a framework's source a deviation is: lines that places.toml tells how to find."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

from ports import PORTS

_FILE = Path(__file__).with_name("places.toml")


def places(port: str, seen: list[str]) -> dict[str, list[str]]:
    """Title of a known mistake, or stage -> `package/file.py:line` in words; nothing for what nobody has looked up."""
    found: dict[str, list[str]] = {}
    for entry in tomllib.loads(_FILE.read_text(encoding="utf-8"))["place"]:
        if entry["port"] == port and entry["at"] in seen:
            found.setdefault(entry["at"], []).extend(_there(entry))
    return found


def _there(entry: dict[str, Any]) -> list[str]:
    if "module" in entry:
        return _lines(entry["module"], entry["text"], entry.get("after", ""))
    (name, version), *_ = PORTS[entry["port"]].versions().items()
    return [f"`{entry['file']}:{entry['line']}` of {name} {version}'s sdist"] if version == entry["version"] else []


def _lines(module: str, text: str, after: str) -> list[str]:
    """Every line of an installed module that holds the text, or the first behind one that holds `after`."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, "the framework has just run"
    path = Path(spec.origin)
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((n for n, line in enumerate(lines) if after in line), len(lines))
    hits = [n for n, line in enumerate(lines, 1) if text in line and n > start]
    file = "/".join((*module.split(".")[:-1], path.name))
    return [f"`{file}:{', '.join(map(str, hits[:1] if after else hits))}`"] if hits else []
