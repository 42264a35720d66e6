"""The conformance machine: the protocol, the process on the other end, reports, exceptions by file, and what is killed."""

import io
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

import refimpl.spec_tests
from refimpl import SpecError
from refimpl.checkpoint import save
from refimpl.cli import main
from refimpl.conformance import Lacking, subject
from refimpl.conformance.bench import Bench
from refimpl.conformance.innocent import INNOCENTS
from refimpl.conformance.kills import Kill, kill, page, read, regimes_of, subjects, suite_command, unusable
from refimpl.conformance.process import Process
from refimpl.conformance.report import Outcome, Report, listed
from refimpl.conformance.serve import serve
from refimpl.conformance.stages import ground, stage_findings
from refimpl.conformance.subject import Subject
from refimpl.conformance.survivors import SURVIVORS
from refimpl.conformance.wire import put, take
from refimpl.diff.corpus import MUTANTS
from refimpl.layers import PRESETS
from refimpl.model import expected_tensors
from refimpl.spec_tests.conformance.test_stages import FORWARD

SERVE = f"{sys.executable} -m refimpl.conformance.serve refimpl.model:Impl"
C_SERVER = Path(refimpl.spec_tests.__file__).parent / "cases" / "stage_server.c"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bench for ourselves."""
    return Bench(subject(), tmp_path_factory.mktemp("cases"))


@pytest.fixture
def environment(monkeypatch):
    """Child processes find us, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(refimpl.__file__).parent.parent))


def wrong(name, bench):
    """Stages that the named implementation gets wrong on the plain case."""
    of = subject(f"refimpl.conformance.mutated:{name}")
    found = stage_findings(of, ground(bench.case(), of.precision))
    return {s for s, calls in found.items() if not all(getattr(f, "ok", False) for f in calls)}


@pytest.mark.parametrize("id", ["R04", "A12-q_a_norm-1e-05", "A17", "T01"])
def test_a_known_bug_fails_its_own_stage_alone(plain, id):
    """Catches a rung 3 that blames what follows a wrong stage, or that passes whatever is given."""
    assert wrong(id, plain) == {MUTANTS[id].stage}


@pytest.mark.slow
@pytest.mark.parametrize("id", INNOCENTS)
def test_an_innocent_rewrite_fails_no_stage(plain, id):
    """Catches limits so tight that a correct port with other roundings is called wrong."""
    assert wrong(id, plain) == set()
    changed = INNOCENTS[id]
    assert any(c.stage == changed.stage for c in ground(plain.case(), {"storage": "float32"}).program)


def test_a_process_answers_as_the_object_does(plain, environment):
    """Catches arrays that change on the way: dtype, order, shape, the cache's name, absent arguments."""
    case = plain.loaded()
    there = subject(command=SERVE)
    try:
        there.load(case)
        tokens = np.asarray(case.tokens)
        np.testing.assert_array_equal(there.logits(tokens), plain.of.logits(tokens))
        caches = {}, {}
        for of, cache in zip((there, plain.of), caches, strict=True):
            of.logits(tokens[:, :-1], cache=cache)
        last = [
            np.asarray(of.call("step", tokens[:, -1], c)["logits"])
            for of, c in zip((there, plain.of), caches, strict=True)
        ]
        np.testing.assert_array_equal(*last)
        with pytest.raises(SpecError, match="no stage"):
            there.stage("nothing", {}, {})
        with pytest.raises(SpecError, match="token id"):
            there.logits([[10**6]])
        np.testing.assert_array_equal(there.logits(tokens), plain.of.logits(tokens))
    finally:
        there.impl.close()
    assert not there.impl.folder.exists()


def test_codes_reach_the_other_end_as_codes(tmp_path):
    """Catches weights that our loader has dequantised, which would be credited to the implementation."""

    class Keeper:
        def load(self, config, weights):
            self.held = dict(weights)

    keeper, name = Keeper(), "model.layers.0.self_attn.o_proj.weight"
    config = PRESETS["tiny"].replace(num_nextn_predict_layers=0)
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in expected_tensors(config).items()}
    save(tmp_path / "case", weights, config, dtype="fp8")
    lines = [
        {"seq": 1, "do": "info", "folder": str(tmp_path)},
        {"seq": 2, "do": "load", "folder": str(tmp_path / "case")},
    ]
    out = io.StringIO()
    serve(Subject(keeper), io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), out)
    assert [json.loads(line)["status"] for line in out.getvalue().splitlines()] == ["ok", "ok"]
    assert keeper.held[name].dtype.name == "float8_e4m3fn" and keeper.held[name + "_scale_inv"].dtype == np.float32
    assert (
        keeper.held["model.norm.weight"].dtype.name == "bfloat16" and "model.norm.weight_scale_inv" not in keeper.held
    )


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("pass", "ended"),
        ("print('hello')", "no JSON"),
        ('print(\'{"seq": 7, "status": "ok"}\')', "expected seq 1"),
        ('print(\'{"seq": 1, "status": "error", "text": "no GPU"}\')', "no GPU"),
        ("print('[1]')", "expected seq 1"),
    ],
)
def test_a_process_that_does_not_speak_the_protocol_is_named(script, says):
    """Catches a client that hangs, or shows a traceback of json, where the other end is wrong."""
    process = Process(f'{sys.executable} -c "{script.replace(chr(34), chr(92) + chr(34))}"')
    with pytest.raises(SpecError, match=says):
        process.info()
    process.close()


def test_a_process_that_says_nothing_is_given_up():
    """Catches a suite that waits for ever."""
    process = Process(f'{sys.executable} -c "import sys; sys.stdin.read()"', seconds=0.2)
    with pytest.raises(SpecError, match="within 0\\.2 s"):
        process.info()
    process.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json", "implementation json; expected pkg.mod:Class"),
        ("no_such_port:Impl", "implementation no_such_port:Impl: No module"),
        ("json:Impl", "no attribute 'Impl'"),
        ("raising_port:Impl", "raising_port cannot be imported: ZeroDivisionError"),
    ],
)
def test_an_implementation_that_is_none_is_named(tmp_path, monkeypatch, name, says):
    """Catches a traceback for a name that is misspelt, and for a port whose module raises."""
    (tmp_path / "raising_port.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match=says):
        subject(name)


def test_a_command_that_is_none_is_named():
    """Catches a traceback of subprocess."""
    with pytest.raises(SpecError, match="cannot be started"):
        Process("no-such-engine --spec")


@pytest.mark.parametrize(
    "changes",
    [{"shape": [3]}, {"shape": [-1]}, {"dtype": "complex64"}, {"path": "/etc/hostname"}, {"shape": "2"}],
    ids=lambda c: next(iter(c.items()))[0],
)
def test_arrays_that_are_not_what_they_say_are_refused(tmp_path, changes):
    """Catches files read beyond their end, and paths that lead out of the folder."""
    told = put(np.arange(4, dtype=np.int32), tmp_path, [0])
    np.testing.assert_array_equal(take(told, tmp_path), np.arange(4))
    with pytest.raises(SpecError, match=r"expected|no such file|protocol has"):
        take(told | changes, tmp_path)


def test_arrays_keep_their_bits_and_their_places(tmp_path):
    """Catches axes in another order, bfloat16 as something else, arrays inside lists and dicts that are lost."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    given = {"a": [rng.normal(size=(2, 3)).T, None], "b": {"c": rng.normal(size=5).astype(ml_dtypes.bfloat16)}, "n": 3}
    found = take(json.loads(json.dumps(put(given, tmp_path, [0]))), tmp_path)
    assert found["n"] == 3 and found["a"][1] is None
    np.testing.assert_array_equal(found["a"][0], given["a"][0])
    assert found["b"]["c"].tobytes() == given["b"]["c"].tobytes()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_page_of_c_serves_a_stage(plain, tmp_path):
    """Catches a protocol that only Python can speak; and a wrong stage in another language must be seen."""
    for wrong_by, expected in ((1.0, True), (1.01, False)):
        exe = tmp_path / f"server{wrong_by}"
        subprocess.run(["cc", "-O1", f"-DWRONG={wrong_by}", str(C_SERVER), "-o", str(exe), "-lm"], check=True)
        there = subject(command=str(exe))
        try:
            found = stage_findings(there, ground(plain.case(), there.precision))
            asked = [f for s in ("attn_norm", "ffn_norm", "final_norm") for f in found[s]]
            assert [f.ok for f in asked] == [expected] * len(asked)
            assert all(isinstance(f, Lacking) for f in found["embed"])
        finally:
            there.impl.close()


def report(*states, certified=False):
    """A report of one profile with these states."""
    outcomes = [Outcome(f"X-{i}", "", "core", "R 1", "A sentence.", s, "why") for i, s in enumerate(states)]
    return Report("me 1", "0", certified, outcomes)


@pytest.mark.parametrize(
    ("states", "certified", "conforms"),
    [
        (["passed"], True, True),
        (["passed", "skipped"], False, True),
        (["passed", "skipped"], True, False),
        (["passed", "failed"], False, False),
        (["passed", "blocked"], False, False),
        (["passed", "known"], False, True),
        (["passed", "known"], True, False),
        (["skipped"], False, False),
        ([], False, False),
    ],
)
def test_a_profile_passes_only_if_something_passed_and_nothing_failed(states, certified, conforms):
    """Catches "conforms" for an implementation that skipped everything, or whose failures were listed away under --certified."""
    found = report(*states, certified=certified)
    assert found.conforms is conforms
    assert json.loads(found.to_json())["conforms"] is conforms
    badge = ET.fromstring(found.badge())
    assert ("of" in badge.attrib["aria-label"].split(": ")[1]) is (bool(states) and not conforms) or not states


def test_a_claim_is_as_bad_as_its_worst_regime():
    """Catches a claim that counts as passed because another regime passed."""
    two = [Outcome("X", r, "core", "R", "S.", s) for r, s in (("plain", "passed"), ("ties", "failed"))]
    found = Report("me", "0", outcomes=two)
    assert found.of("core")["failed"] == 1 and found.of("core")["passed"] == 0
    assert "X@ties" in found.table()


def test_exceptions_have_reasons():
    """Catches a comment taken for an id."""
    assert listed("# head\nRN-001 # slow\n\nST-*@ties#tie rule\nRN-002\n") == {
        "RN-001": "slow",
        "ST-*@ties": "tie rule",
        "RN-002": "",
    }


def run_suite(tmp_path, *extra, impl="refimpl.conformance.mutated:R09"):
    """The suite in a process of its own, on the plain case -> (exit code, report, text)."""
    out = tmp_path / "r.json"
    command = suite_command(impl, ["plain"], tmp_path / "cases", out)
    done = subprocess.run([*command, *extra], capture_output=True, text=True)
    return done.returncode, json.loads(out.read_text()) if out.is_file() else None, done.stdout + done.stderr


@pytest.mark.slow
def test_the_suite_on_a_bug_says_which_claims_failed(tmp_path, environment):
    """Catches a report that disagrees with pytest, exceptions that are not applied, stale entries that go unsaid."""
    code, found, text = run_suite(tmp_path, "--profile=core")
    failed = {o["id"] for o in found["outcomes"] if o["state"] == "failed"}
    assert code == 1 and not found["conforms"] and {"ST-router.weights", "FW-002"} <= failed
    known = tmp_path / "known.txt"
    known.write_text("".join(f"{i}  # R01\n" for i in failed) + "ZZ-001  # nothing\n")
    code, found, text = run_suite(tmp_path, "--profile=core", f"--xfails-file={known}")
    assert found["stale"] == ["ZZ-001"] and code == 1 and "matches no claim: ZZ-001" in text
    assert {o["id"] for o in found["outcomes"] if o["state"] == "known"} == failed
    known.write_text("ST-embed\n")
    assert run_suite(tmp_path, f"--skips-file={known}")[0] == 4  # no reason


@pytest.mark.slow
def test_kills_go_on_where_they_stopped(tmp_path, environment):
    """Catches rows that are run twice, lost, or that a page leaves out."""
    rows = [kill(i, suite_command, tmp_path / "cases") for i in ("R09", "silu")]
    assert rows[0].located and rows[0].as_it_should and not rows[1].claims
    assert "ST-router.weights@plain" in page(rows) and "called wrong: 0 of 1" in page(rows)
    (tmp_path / "bad.jsonl").write_text('{"id": "R01"}\n')
    with pytest.raises(SpecError, match="line 1"):
        read(tmp_path / "bad.jsonl")


@pytest.mark.slow
def test_as_a_gate_a_bug_is_asked_its_own_stage_first(tmp_path, environment):
    """Catches a gate that asks everything, and one that stops though the bug's own stage says nothing."""
    found = [kill(i, suite_command, tmp_path, gate=True) for i in ("R09", "A20-absorbed")]
    assert [r.claims for r in found] == [["ST-router.weights@plain"], ["RN-001", "RN-002"]]


def test_who_may_survive_is_a_bug_with_a_reason_and_nothing_else():
    """Catches a reason for a bug that is gone, one that covers bugs of other stages, and a listed bug that is killed unsaid."""
    listed = {p: [i for i in MUTANTS if fnmatchcase(i, p)] for p in SURVIVORS}
    assert all(ids and len(ids) <= 3 for ids in listed.values()), listed
    row = Kill("L05", False, "router.counts", "", ["plain"], [], False)
    assert row.as_it_should and not replace(row, claims=["TR-001"]).as_it_should
    assert not replace(row, id="L06").as_it_should and SURVIVORS["L05"] in page([row])


def test_the_command_says_what_is_not_as_it_should_be(tmp_path, capsys):
    """Catches a gate that lets a survivor, a killed one of the list or a rewrite called wrong pass, and a page without the rows."""
    rows = [
        Kill(i, i == "silu", "s", "t", ["plain"], ["TR-001"] * n, False)
        for i, n in (("R02", 1), ("L05", 0), ("silu", 0))
    ]
    asked = ["mutants", "--ids", "R02,L05,silu", "--out", str(tmp_path / "k.jsonl")]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
    assert (
        main([*asked, "--page", str(tmp_path / "page.md")]) == 0
        and "3 of 3 as they should be" in capsys.readouterr().out
    )
    assert "1 of 2 killed" in (tmp_path / "page.md").read_text()
    turned = [replace(r, claims=[] if r.claims else ["TR-002"]) for r in rows]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in turned))
    assert main(asked) == 1
    said = capsys.readouterr().out
    assert (
        "R02: survives" in said
        and "silu: called wrong by TR-002" in said
        and "L05: is listed as one that survives" in said
    )
    assert main([*asked, "--gate", "--page", "x"]) == 3 and main(["mutants", "--list"]) == 0
    assert "not run: R01: reads" in capsys.readouterr().out


def test_every_bug_is_run_or_has_a_reason():
    """Catches a bug of the corpus that the matrix forgets."""
    assert set(MUTANTS) <= set(subjects()) | set(unusable())
    assert len(INNOCENTS) >= 14 and all(regimes_of(i) for i in subjects())
    with pytest.raises(SpecError, match="not among"):
        subjects(["R999"])


def test_every_stage_of_a_forward_pass_is_asked_for(plain):
    """Catches a claim about a stage that no case has, which would pass unasked, and a stage without a claim."""
    asked = {c.stage for c in ground(plain.case(), {"storage": "float32"}).program} - {"mtp.positions"}
    assert asked == set(FORWARD)


def test_claims_keep_their_ids():
    """Catches an id that was renamed or used again for another sentence: conformance/ids.txt only grows."""
    suite = Path(refimpl.spec_tests.__file__).parent
    assert ids() == (suite / "conformance" / "ids.txt").read_text().splitlines()


def ids():
    """`ID profile section: sentence` of every claim, sorted."""
    import importlib

    found = set()
    for file in sorted((Path(refimpl.spec_tests.__file__).parent / "conformance").glob("test_*.py")):
        module = importlib.import_module(f"refimpl.spec_tests.conformance.{file.stem}")
        for fn in [f for n, f in vars(module).items() if n.startswith("test_")]:
            found |= set(_ids_of(fn))
    return sorted(found)


def _ids_of(fn):
    sentence = fn.__doc__.strip().split("\n")[0]
    marks = getattr(fn, "pytestmark", [])
    values = {m.args[0]: m.args[1] for m in marks if m.name == "parametrize"}
    for claim in [m.kwargs for m in marks if m.name == "claim"]:
        field = claim["id"].partition("{")[2].partition("}")[0]
        for value in values.get(field, [""]):
            yield _line(claim, claim["id"].replace(f"{{{field}}}", value), sentence)
    for claim in [m.kwargs for p in values.get("name", []) for m in p.marks]:
        yield _line(claim, claim["id"], sentence)


def _line(claim, id, sentence):
    return f"{id} {claim['profile']} {claim['section']}: {sentence}"


def test_the_command_gives_its_options_to_the_suite_and_says_what_came_of_it(monkeypatch):
    """Catches an option of `conform` that does not reach pytest, and pytest's own exit codes, of which 2 reads as inconclusive."""
    asked = []

    def run(command, env):
        asked.append(command)
        return subprocess.CompletedProcess(command, codes.pop())

    monkeypatch.setattr("refimpl.cli.conform.subprocess.run", run)
    codes = [4, 1, 0]
    arguments = ["my.port:Impl", "--profile", "core", "--certified", "--pytest", "-k 'RN-002 or FW' -x"]
    assert [main(["conform", *arguments, "--badge", "b.svg"]) for _ in range(3)] == [0, 1, 3]
    assert {"--impl=my.port:Impl", "--profile=core", "--certified", "RN-002 or FW", "-x", "--badge=b.svg"} <= set(
        asked[0]
    )
    assert not [a for a in asked[0] if a.startswith(("--impl-cmd", "--skips-file"))]
    codes = [0]
    main(["conform", "--quick"])
    assert asked[0][asked[0].index("-m", 3) + 1] == "" and asked[-1][asked[-1].index("-m", 3) + 1] == "not slow"
