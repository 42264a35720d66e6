"""Run a command block of the README exactly as it is printed there.

A block is a fenced `sh` block with a mark on the line before it:

    <!-- ci: tests -->                                    it must exit with 0
    <!-- ci: main exit=1 says="router.weights" -->        it must exit with 1 and print that text
    <!-- ci: none, needs the 671B checkpoint -->          it is not run, and this is why

A block that is meant to fail has to say what it prints: otherwise a failed installation, which
also exits with 1, would pass for the expected answer.

    python3 .ci/readme_commands.py README.md main         runs the block in the current folder
"""

import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?:<!-- ci: (?P<name>\w+)(?P<why>, [^>]+)?"
    r'(?: exit=(?P<exit>\d+))?(?: says="(?P<says>[^"]+)")? -->\n)?'
    r"^```(?:sh|bash|shell|console)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One command block: what to type, and what then has to happen."""

    body: str
    exit: int
    says: str


def blocks(text: str) -> dict[str, Block]:
    """The marked command blocks of a README, by name; ValueError for anything CI would miss."""
    found: dict[str, Block] = {}
    matches = list(BLOCK.finditer(text))
    for match in matches:
        name, body = match["name"], match["body"]
        if name is None:
            raise ValueError(f"command block without a `<!-- ci: ... -->` line before it:\n{body}")
        if name == "none":
            if not match["why"]:
                raise ValueError(f"`ci: none` without a reason:\n{body}")
            continue
        if name in found:
            raise ValueError(f"two command blocks are named {name!r}")
        found[name] = Block(body, int(match["exit"] or 0), match["says"] or "")
        if found[name].exit and not found[name].says:
            raise ValueError(f'block {name!r} is meant to fail: add says="..." to its mark')
    if text.count("<!-- ci:") != sum(match["name"] is not None for match in matches):
        raise ValueError("a `<!-- ci:` mark is not followed by a command block, or is misspelt")
    return found


def run(block: Block) -> str:
    """Type the block into bash in the current folder; "" if all is as promised, or a complaint."""
    print("".join(f"$ {line}\n" for line in block.body.splitlines()), end="", flush=True)
    output = ""
    with subprocess.Popen(
        ["bash", "-e", "-c", block.body],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        for line in shell.stdout:
            print(line, end="", flush=True)
            output += line
    if shell.returncode != block.exit:
        return f"it exited with {shell.returncode}, the README promises {block.exit}"
    if "Traceback (most recent call last)" in output:
        return "it printed a traceback"
    if block.says not in output:
        return f"it did not print {block.says!r}"
    return ""


if __name__ == "__main__":
    readme, wanted = sys.argv[1:]
    complaint = run(blocks(pathlib.Path(readme).read_text(encoding="utf-8"))[wanted])
    if complaint:
        sys.exit(f"README block {wanted!r}: {complaint}")
