"""What the README tells the reader to type is what CI types."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(),
    reason="about the repository's README; this is an installed wheel, without it",
)


def script() -> dict:
    return runpy.run_path(str(ROOT / ".ci" / "readme_commands.py"))


def test_ci_runs_exactly_the_commands_of_the_readme():
    """Catches a command that nothing executes, and a block that CI no longer finds."""
    in_readme = script()["blocks"]((ROOT / "README.md").read_text(encoding="utf-8"))
    in_ci = re.findall(r"^readme (\w+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert list(in_readme) == in_ci == ["main", "tests"]


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/README.md",
    "spec_tests/golden/README.md",
    "refimpl/cases/*/README.md",
]


def test_every_file_that_a_page_names_exists():
    """Catches a page that still sends the reader to where a file was before it moved."""
    folders = "autograd|layers|parallel_emulation|refimpl|spec_tests|benchmarks|docs"
    gone = {
        f"{page.relative_to(ROOT)}: {name}"
        for pattern in PAGES
        for page in ROOT.glob(pattern)
        for name in re.findall(rf"\b(?:{folders})/[\w./*-]*\w", page.read_text(encoding="utf-8"))
        if not list(ROOT.glob(name))
    }
    assert not gone


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nrefimpl --help\n```\n",
        "<!-- ci: main -->\n\n```sh\nrefimpl --help\n```\n",
        "<!-- ci: main exits=1 -->\n```sh\nrefimpl --help\n```\n",
        "<!-- ci: main exit=1 -->\n```sh\nrefimpl --help\n```\n",
        "<!-- ci: none -->\n```sh\nrefimpl --help\n```\n",
        "<!-- ci: a -->\n```sh\na\n```\n<!-- ci: a -->\n```sh\nb\n```\n",
    ],
    ids=["unmarked", "detached", "misspelt", "unexplained failure", "unexplained", "twice"],
)
def test_a_command_block_that_ci_would_miss_is_an_error(text):
    """Catches a README parser that silently runs fewer commands than the reader sees."""
    with pytest.raises(ValueError):
        script()["blocks"](text)


def test_a_failing_readme_command_is_reported(tmp_path, monkeypatch, capfd):
    """Catches a runner that takes a failed installation for the expected exit status."""
    blocks, run = script()["blocks"], script()["run"]
    monkeypatch.chdir(tmp_path)
    text = '<!-- ci: main exit=1 says="router.weights" -->\n```sh\n{}\nexit 1\n```\n'
    complaint = {
        command: run(blocks(text.format(command))["main"])
        for command in ("echo router.weights", "echo no network", "exit 2")
    }
    assert complaint["echo router.weights"] == ""
    assert complaint["echo no network"] == "it did not print 'router.weights'"
    assert complaint["exit 2"] == "it exited with 2, the README promises 1"
    assert "$ exit 1" in capfd.readouterr().out
