"""Reports for programs (JSON with its schema, SARIF) and for a person's terminal."""

import ast
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from refimpl.cli import main, terminal
from refimpl.diff import render, to_json
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import judge
from refimpl.diff.report import wrapped
from refimpl.diff.sarif import to_sarif
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import trace_case

from .test_diff_partial import SETS, TINY, case, only, recording
from .tree import CODE, interpreter, tree_of

jsonschema = pytest.importorskip("jsonschema")  # in the extra `test`


@functools.cache
def judgements():
    """One of every kind: clean, blamed with and without a known cause, undecided, in a gauge, contested, NaN, unusable taps."""
    clean, fn = recording("hf-float32"), STAGES["mla.ctx"].fn

    def spoilt(p, kv, *, v_dim):
        y = np.array(fn(p, kv, v_dim=v_dim))
        y[0, 3, 1, 2] = np.nan
        return y

    with np.errstate(all="ignore"):
        nan = trace_case(case(), patches=[Patch("mla.ctx", spoilt)])
    scaled = {t: a * 2 if t.endswith("mla.q_rope") else a for t, a in clean.taps.items()}
    halved = {t: half(a) if t.endswith(("mla.q_rope", "mla.k_rope")) else a for t, a in clean.taps.items()}
    cut = dict(clean.taps) | {"fwd/L0/resid": clean.taps["fwd/L0/resid"][..., :-1], "strange": np.zeros(3, np.float32)}
    contested = judge(case(), clean)
    contested.contested["moe_weights"] = "late"
    return {
        "clean": judge(case(), clean),
        "bug": judge(case(), recording("hf-bug")),
        "undecided": judge(case(), only(clean, SETS["logits"])),
        "doubtful": judge(case(), only(recording("hf-bfloat16"), SETS["logits"])),
        "gauge": judge(case(), dataclasses.replace(clean, taps=halved)),
        "contested": contested,
        "nan": judge(case(), nan),
        "unexplained": judge(case(), dataclasses.replace(clean, taps=scaled)),
        "unusable": judge(case(), dataclasses.replace(clean, taps=cut)),
    }


def half(a):
    return np.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)


KINDS = ["clean", "bug", "undecided", "doubtful", "gauge", "contested", "nan", "unexplained", "unusable"]

# ---- JSON


@functools.cache
def schema():
    """What `refimpl diff --schema` prints."""
    out = pathlib.Path(sys.modules["refimpl.diff"].__file__).parent / "report.schema.json"
    return json.loads(out.read_text(encoding="utf-8"))


def errors(of, document):
    return [e.message for e in jsonschema.validators.validator_for(of)(of).iter_errors(document)]


@pytest.mark.parametrize("kind", KINDS)
def test_json_is_what_its_schema_says(kind):
    """Catches a field that was added, lost or given another type without the schema, which is closed at every level."""
    assert errors(schema(), json.loads(to_json(judgements()[kind]))) == []


def test_the_schema_refuses_what_it_does_not_know():
    """Catches an open schema, with which the test above could not fail: an object with one field more, or one less."""
    jsonschema.Draft202012Validator.check_schema(schema())
    report = json.loads(to_json(judgements()["bug"]))
    for part in (report, report["gates"][0], report["findings"][3], report["causes"][0]):
        part["surprise"] = 1
        assert any("surprise" in e for e in errors(schema(), report))
        del part["surprise"]
        for key in list(part):
            value = part.pop(key)
            assert any(repr(key) in e for e in errors(schema(), report)), key
            part[key] = value
    assert errors(schema(), report) == []
    assert all("description" in p for p in schema()["properties"].values())


def test_the_schema_is_printed(capsys):
    """Catches a schema that needs a case to be seen, that is not in the package, or that goes to standard error."""
    with pytest.raises(SystemExit) as ended:
        main(["diff", "--schema"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema() and printed["properties"]["schema"] == {
        "const": "refimpl-diff/1",
        "description": "raised when a field goes or changes its meaning; fields may be added without",
    }


def gate_names():
    """The name in every call of Gate, of all modules."""
    files = [file for file in CODE.values() if "Gate(" in file.read_text(encoding="utf-8")]
    calls = [n for file in files for n in ast.walk(tree_of(file)) if isinstance(n, ast.Call)]
    return {ast.literal_eval(n.args[0]) for n in calls if isinstance(n.func, ast.Name) and n.func.id == "Gate"}


def test_the_schema_knows_every_gate():
    """Catches a gate that only folders of ranks or converted weights have, and that the schema has not."""
    name = schema()["properties"]["gates"]["items"]["properties"]["name"]
    assert set(name["enum"]) == gate_names()


def test_json_has_no_numbers_that_json_has_not():
    """Catches NaN and Infinity, which Python writes and nothing else reads."""
    report = json.loads(to_json(judgements()["nan"]), parse_constant=lambda name: pytest.fail(name))
    (bad,) = [f for f in report["findings"] if not f["ok"]]
    assert bad["error"] is None and bad["stage"] == "mla.ctx"


# ---- SARIF

MESSAGE = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}


def closed(**properties):
    """An object of these properties and no others; a name that ends in _ is required."""
    named = {k.rstrip("_"): v for k, v in properties.items()}
    needed = [k.rstrip("_") for k in properties if k.endswith("_")]
    return {"type": "object", "properties": named, "required": needed, "additionalProperties": False}


def many(of, least=0):
    return {"type": "array", "items": of, "minItems": least}


TEXT, NUMBER, BAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "object"}
RULE = closed(id_=TEXT, shortDescription_=MESSAGE, fullDescription=MESSAGE, properties=BAG)
LOCATION = closed(
    logicalLocations=many(closed(name=TEXT, fullyQualifiedName_=TEXT, kind_=TEXT), 1),
    physicalLocation=closed(artifactLocation_=closed(uri_={"type": "string", "format": "uri-reference"})),
)
RESULT = closed(
    ruleId_=TEXT,
    ruleIndex_=NUMBER,
    kind_={"enum": ["fail", "open", "review"]},
    level_={"enum": ["error", "none"]},
    message_=MESSAGE,
    locations=many(LOCATION, 1),
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    taxa=many(closed(id_=TEXT, toolComponent_=closed(name_=TEXT)), 1),
    properties=BAG,
)
RUN = closed(
    tool_=closed(driver_=closed(name_=TEXT, version_=TEXT, rules_=many(RULE))),
    invocations_=many(closed(executionSuccessful_={"type": "boolean"}, exitCode=NUMBER, exitCodeDescription=TEXT), 1),
    results_=many(RESULT),
    taxonomies=many(closed(name_=TEXT, version_=TEXT, taxa_=many(RULE, 1)), 1),
)
STRUCTURE = closed(**{"$schema_": TEXT, "version_": {"const": "2.1.0"}, "runs_": many(RUN, 1)})
"""What we write, in the terms of OASIS SARIF 2.1.0 plus errata 01, sections 3.13 to 3.58."""


@pytest.mark.parametrize("kind", KINDS)
def test_sarif_is_what_the_standard_says(kind):
    """Catches a property that SARIF has not or requires, and what its schema cannot say: indices, levels of kinds, known taxa."""
    log = json.loads(to_sarif(judgements()[kind], pathlib.Path("a b/c.safetensors")))
    assert errors(STRUCTURE, log) == []
    if official := os.environ.get(
        "REFIMPL_SARIF_SCHEMA"
    ):  # the OASIS file; the npm package @microsoft/jest-sarif holds it
        assert errors(json.loads(pathlib.Path(official).read_text(encoding="utf-8")), log) == []
    (run,) = log["runs"]
    rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    taxa = {(t["name"], x["id"]) for t in run.get("taxonomies", []) for x in t["taxa"]}
    for r in run["results"]:
        assert rules[r["ruleIndex"]] == r["ruleId"]
        assert (r["kind"] == "fail") == (r["level"] != "none")  # 3.27.10: any other kind has level none
        assert {(x["toolComponent"]["name"], x["id"]) for x in r.get("taxa", [])} <= taxa
        assert all(
            place["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/c.safetensors" for place in r["locations"]
        )


def test_sarif_says_what_the_judgement_says():
    """Catches a blamed tap without a result, results of taps that conform, a cause or a gate that is passed over."""
    found = {kind: json.loads(to_sarif(judgements()[kind]))["runs"][0] for kind in KINDS}
    for kind, run in found.items():
        taps = [r for r in run["results"] if "partialFingerprints" in r]
        at = {r["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]: r for r in taps}
        blamed = {f.tap: f.stage for f in judgements()[kind].culprits}
        assert {t: r["ruleId"] for t, r in at.items() if r["kind"] == "fail"} == blamed
        assert run["invocations"][0]["exitCode"] == judgements()[kind].exit_code
    assert found["clean"]["results"] == []
    assert {x["id"] for r in found["bug"]["results"] for x in r["taxa"]} == {"R01"} <= set(MUTANTS)
    assert [r["ruleId"] for r in found["undecided"]["results"] if r["kind"] == "open"] == ["gate.coverage"]
    assert [(r["ruleId"], r["kind"]) for r in found["contested"]["results"]] == [("dialect", "review")]


def test_the_command_writes_sarif(tmp_path, capsys):
    """Catches a file that is not written whole, or that hides the verdict."""
    out = tmp_path / "r.sarif"
    assert main(["diff", str(TINY), str(TINY / "hf-bug.safetensors"), "--sarif", str(out), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("DIVERGES")
    results = json.loads(out.read_text())["runs"][0]["results"]
    assert len(results) == 2
    uri = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == (TINY / "hf-bug.safetensors").as_uri()
    two = [str(TINY / f"{n}.safetensors") for n in ("hf-bug", "hf-float32")]
    assert main(["diff", str(TINY), *two, "--sarif", str(out)]) == 3 and "--sarif with two" in capsys.readouterr().err


# ---- The terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
pty = pytest.importorskip("pty")  # Unix


def on_a_terminal(argv, width, height, **env):
    """Exit code and what a command writes to a terminal of that size, a real one."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")}
    command = interpreter(f"import sys; from refimpl.cli import main; sys.exit(main({argv!r}))")
    screen = {"stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=clean | {"TERM": "xterm-256color"} | env, **screen) as process:
        os.close(theirs)
        read = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while block := os.read(ours, 4096):
                read += block
    os.close(ours)
    return process.returncode, read.decode().replace("\r\n", "\n")


BUG = ["diff", str(TINY), str(TINY / "hf-bug.safetensors")]


@pytest.mark.slow
def test_colour_is_for_terminals_only(capsys, monkeypatch):
    """Catches escapes in a file, on a pipe, under NO_COLOR, or none where a person watches."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # which libraries take for a terminal
    assert main(BUG) == 1
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    code, shown = on_a_terminal(BUG, 400, 50)
    assert code == 1 and COLOUR.sub("", shown) == plain
    assert (
        "\x1b[1;31mFAIL\x1b[0m" in shown and "\x1b[1;31mDIVERGES\x1b[0m (" in shown and "\x1b[1;32mok\x1b[0m" in shown
    )
    assert on_a_terminal(BUG, 400, 50, NO_COLOR="1") == (1, plain)
    assert "\x1b[" in on_a_terminal(BUG, 400, 50, NO_COLOR="")[1]  # no-color.org: an empty one is none
    assert "\x1b" not in on_a_terminal([*BUG, "--json"], 80, 24)[1]
    assert "\x1b" not in on_a_terminal(BUG, 400, 50, TERM="dumb")[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 100])
def test_lines_are_as_wide_as_the_terminal(width):
    """Catches lines that the terminal breaks within words: in the report, in how a tolerance is explained, in a referee's words."""
    plain, files = [str(TINY / f"{n}.safetensors") for n in ("hf-bug", "hf-float32")], str(TINY)
    for argv in (BUG, [*BUG, "--explain-tolerance", "fwd/L1/router.weights"], ["diff", files, *plain]):
        lines = COLOUR.sub("", on_a_terminal(argv, width, 24)[1]).splitlines()
        assert len(lines) > 4
        for line in lines:
            assert len(line) <= width or len(line.split()) == 1, line  # one word that is longer itself


def test_a_screen_holds_it_with_the_verdict():
    """Catches a report whose beginning has scrolled away: fewer stages are detailed where fewer fit, the common cause stays."""
    patches = [
        Patch(s, lambda *a, s=s, **k: STAGES[s].fn(*a, **k) * 1.01)
        for s in ("attn_norm", "mla.kv_b", "ffn_norm", "final_norm")
    ]
    judgement = judge(case(), trace_case(case(), patches=patches))
    whole = render(judgement)
    fewer = [render(judgement, stages=n) for n in (4, 3, 2, 1)]
    assert fewer[0] == whole and [t.count("   error ") for t in fewer] == [4, 3, 2, 1]
    assert "... and 3 more stages (--all lists every tap)" in fewer[3]
    assert all(
        t.splitlines()[-1] == whole.splitlines()[-1] and t.splitlines()[-1].startswith("DIVERGES") for t in fewer
    )
    assert all(
        t.splitlines()[: whole.splitlines().index("")] == whole.splitlines()[: whole.splitlines().index("")]
        for t in fewer
    )


def test_causes_that_are_not_said_are_counted():
    """Catches causes that a screen has no room for and nobody learns of; JSON has each."""
    judgement, one = judgements()["bug"], judgements()["bug"].causes[0]
    for n in (1, 5, 6, 9):
        many = dataclasses.replace(judgement, diagnosis=lambda n=n: [one] * n)
        said = [line for line in render(many).splitlines() if line.startswith("cause") and "no known" not in line]
        assert len(said) == min(n, 5) + (n > 5)
        assert (f"... and {n - 5} more" in said[-1]) == (n > 5) and len(json.loads(to_json(many))["causes"]) == n


@pytest.mark.parametrize("height", [5, 18, 20, 24, 60])
def test_as_many_stages_as_fit(monkeypatch, height):
    """Catches a screen that is exceeded though less would fit, and one left empty though more would."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", str(height))
    text = terminal.screen(lambda n: "\n".join(["head"] * 10 + ["stage"] * 4 * n), 6)
    best = max([n for n in range(1, 7) if 10 + 4 * n + 1 <= height], default=1)
    assert text.count("stage") == 4 * best


def test_words_stay_whole_in_any_width():
    """Catches an error from a terminal that is narrower than the column of labels, and text behind its edge for that."""
    text = render(judgements()["bug"])
    for width in (1, 5, 10, 17, 30, 48):
        lines = wrapped(text, width).splitlines()
        assert " ".join(lines).split() == text.split()
        assert all(len(line) - len(line.lstrip()) <= 6 for line in lines) == (width < 48)
