"""A run from end to end: adapters from files, expected failures, reports, exit status."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import report, runner, vectors
from conformance.adapters import AdapterError, Implementation, load
from conformance.budget import Profile
from conformance.case import families
from refimpl.ops import norm

RIGHT = """
import numpy as np
def rms(x, epsilon):
    y = x.astype(np.float64)
    return (y / np.sqrt((y * y).mean(-1, keepdims=True) + max(epsilon, 1e-300))).astype(x.dtype)
IMPLEMENTS = {"norm.rms_norm": rms}
PROFILE = {"float64": "strict", "float32": "strict", "bfloat16": "strict"}
"""
# A row of zeros gives NaN, as it does in the known bug.
WRONG = RIGHT.replace(".mean(", ".sum(").replace("max(epsilon, 1e-300)", "epsilon")


@pytest.fixture
def right(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    return f"python:{tmp_path / 'right.py'}"


@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    return f"python:{tmp_path / 'wrong.py'}"


def test_a_right_file_passes_and_the_rest_is_not_claimed(right):
    run = runner.check(right)
    assert run.ok and run.judged == run.promised > 0
    assert "norm.layer_norm" in run.unclaimed and "norm.rms_norm" not in run.unclaimed
    assert {v.op for v in run.verdicts} == {"norm.rms_norm"}


def test_a_wrong_file_fails_and_the_bug_is_named(wrong):
    run = runner.check(wrong, examples=3)
    assert not run.ok
    laws = report.failing_laws(run)["wrong.py", "norm.rms_norm", run.failures[0].dtype]
    text = runner.message(run.failures[0], laws, wrong)
    for part in ("norm.rms_norm case", "logic", "should be", "x the bound", "known bug", "Reproduce: refimpl repro"):
        assert part in text, text


def test_fewer_cases_than_promised_is_not_green(right, monkeypatch):
    loaded = runner.load_vectors
    monkeypatch.setattr(runner, "load_vectors", lambda *a: loaded(*a)[1:])
    run = runner.check(right, names=["norm.rms_norm"], examples=0)
    assert not run.failures and run.judged < run.promised and not run.ok


def test_nothing_compared_is_not_green(tmp_path):
    (tmp_path / "all.py").write_text(
        "from conformance.case import Unsupported\n"
        "def f(**_):\n    raise Unsupported('later')\n"
        "IMPLEMENTS = {'norm.rms_norm': f}\n"
    )
    run = runner.check(f"python:{tmp_path / 'all.py'}", examples=0)
    assert not run.failures and not run.ok


def expectations(tmp_path, text):
    path = tmp_path / "xfails.txt"
    path.write_text(text)
    return runner.read_expected_failures(path)


def test_expected_failures_are_strict(tmp_path, right, wrong):
    every = expectations(tmp_path, "norm.rms_norm/*   # sums instead of averaging, to be mended\n")
    run = runner.check(wrong, examples=3, expected=every)
    assert run.ok and not run.failures and set(run.expected.values()) == {"sums instead of averaging, to be mended"}
    assert not runner.check(right, examples=3, expected=every).ok, "a mended bug must be struck off the list"
    idle = expectations(tmp_path, "norm.rms_norm/no-such-case  # never\n")
    assert "matches no case" in runner.check(right, examples=0, expected=idle).complaints[0]


def test_an_expectation_can_be_for_one_format(tmp_path, wrong):
    one = expectations(tmp_path, "norm.rms_norm/* float64  # known\n")
    run = runner.check(wrong, examples=0, expected=one)
    assert {v.dtype for v in run.failures} == {"float32", "bfloat16"}


def test_an_expectation_without_reason_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="xfails.txt:2"):
        expectations(tmp_path, "# a comment\nnorm.rms_norm/grid\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("x = 1\n", "expected IMPLEMENTS"),
        ("IMPLEMENTS = {'norm.no_such': len}\n", "which is no operator"),
        ("IMPLEMENTS = {'norm.rms_norm': 3}\n", "not callable"),
        ("IMPLEMENTS = {'norm.rms_norm': len}\nPROFILE = {'float8': 'strict'}\n", "float8"),
        ("IMPLEMENTS = {'norm.rms_norm': len}\nPROFILE = {'float32': 'sloppy'}\n", "sloppy"),
        ("import no_such_module\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, complaint):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(AdapterError, match=complaint):
        load(f"python:{tmp_path / 'bad.py'}")


def test_unknown_adapters_and_operators_are_named():
    with pytest.raises(AdapterError, match="expected one of spec"):
        load("no-such")
    with pytest.raises(AdapterError, match="no such file"):
        load("python:no-such.py")
    with pytest.raises(AdapterError, match="no operator or family 'ropes'"):
        runner.check("spec", names=["ropes"])


def test_reports_agree_with_the_run(wrong):
    run = runner.check(wrong, examples=2)
    lines = [json.loads(line) for line in report.json_lines(run).splitlines()]
    assert lines[0]["corpus"] == vectors.read_manifest()["sha256"]
    assert sum(x["event"] == "verdict" for x in lines) == len(run.verdicts)
    assert lines[-1]["event"] == "summary" and lines[-1]["ok"] is False
    suites = ElementTree.fromstring(report.junit(run))
    assert sum(int(s.get("tests")) for s in suites) == len(run.verdicts)
    assert sum(int(s.get("failures")) + int(s.get("errors")) for s in suites) == len(run.failures)
    assert "| norm.rms_norm |" in report.markdown(run)


def test_the_html_page_is_self_contained_and_escaped(wrong):
    page = report.html([runner.check(wrong, examples=0)])
    assert page.startswith("<!doctype html>") and "norm.rms_norm" in page and "logic" in page
    for outside in ("http://", "<script", "<link", "@import"):
        assert outside not in page
    assert "&lt;" in report.html([runner.check(wrong, examples=0)], [("<b>", "x")])


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_report_appears_only_when_whole(tmp_path, monkeypatch, content):
    def stopped(*_):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(report.os, "replace", stopped)
        report.write(tmp_path / "r.html", content)
    assert list(tmp_path.iterdir()) == []
    report.write(tmp_path / "r.html", content)
    assert (tmp_path / "r.html").read_bytes() in (b"text", b"bytes")


def command(*words):
    return subprocess.run([sys.executable, "-m", "conformance", *words], capture_output=True, text=True)


def test_exit_status_and_files(tmp_path, right, wrong):
    outputs = [f"--{kind}={tmp_path / kind}" for kind in ("json", "junit", "markdown", "html")]
    done = command("check", wrong, "--examples=0", *outputs)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".py" and p.is_file()) == sorted(
        ["json", "junit", "markdown", "html"]
    )
    assert command("check", right, "--examples=2").returncode == 0
    missing = command("check", "python:no-such.py")
    assert missing.returncode == 2 and "no such file" in missing.stderr and "Traceback" not in missing.stderr


def test_repro_shows_the_worst_elements(wrong):
    done = command("repro", "norm.rms_norm/grid", wrong, "--dtype", "float32")
    assert done.returncode == 1 and "worst elements" in done.stdout and "logic" in done.stdout
    unknown = command("repro", "norm.rms_norm/no-such", wrong)
    assert unknown.returncode == 2 and "there are:" in unknown.stderr.replace("\n", " ")


def test_ops_prints_a_stub_that_can_be_filled_in(tmp_path):
    done = command("ops", "norm.rms_norm", "--stub", str(tmp_path / "mine.py"))
    assert done.returncode == 0 and "C1." in done.stdout and "epsilon" in done.stdout
    text = (tmp_path / "mine.py").read_text()
    assert len(text.splitlines()) <= 15
    assert command("check", f"python:{tmp_path / 'mine.py'}", "--examples=0").returncode == 1
    # A row of zeros with epsilon = 0 gives zeros: 0 / 1e-150.
    body = "return x / np.sqrt((x * x).mean(-1, keepdims=True) + max(epsilon, 1e-300))"
    (tmp_path / "mine.py").write_text(text.replace("raise NotImplementedError  # return y", body))
    assert command("check", f"python:{tmp_path / 'mine.py'}", "--examples=0", "--dtype=float64").returncode == 0


def test_a_file_may_hold_dataclasses_of_postponed_types(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    (tmp_path / "mine.py").write_text(text + RIGHT + "__version__ = (1, 2)\n")
    assert load(f"python:{tmp_path / 'mine.py'}")[0].version == "(1, 2)"


@pytest.mark.parametrize("profile", ["['float32']", "{}", "None"])
def test_a_profile_that_is_no_table_says_so(tmp_path, profile):
    (tmp_path / "bad.py").write_text(f"IMPLEMENTS = {{'norm.rms_norm': len}}\nPROFILE = {profile}\n")
    with pytest.raises(AdapterError, match="expected PROFILE"):
        load(f"python:{tmp_path / 'bad.py'}")


def test_a_file_that_leaves_while_it_is_imported_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(AdapterError, match="SystemExit"):
        load(f"python:{tmp_path / 'bad.py'}")


def test_leaving_with_status_0_is_not_success(tmp_path):
    (tmp_path / "leave.py").write_text("import sys\nIMPLEMENTS = {'norm.rms_norm': lambda **_: sys.exit(0)}\n")
    assert command("check", f"python:{tmp_path / 'leave.py'}", "--examples=2", "--dtype=float32").returncode == 1


def test_a_process_that_dies_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os\nIMPLEMENTS = {'norm.rms_norm': lambda **_: os._exit(0)}\n")
    monkeypatch.setattr(runner, "PARALLEL_FROM", 1)
    with pytest.raises(AdapterError, match="ended without a verdict"):
        runner.check(f"python:{tmp_path / 'dies.py'}", examples=0)


def test_two_processes_judge_as_one(wrong, monkeypatch):
    one = runner.check(wrong, dtype="bfloat16", profile="eager", examples=0)
    monkeypatch.setattr(runner, "PARALLEL_FROM", 1)
    two = runner.check(wrong, dtype="bfloat16", profile="eager", examples=0)
    assert one.verdicts == two.verdicts and {v.profile for v in two.verdicts} == {"eager"}


@settings(max_examples=60)
@given(
    rows=st.lists(st.booleans(), min_size=1, max_size=5), operators=st.integers(1, 7), slow=st.sets(st.integers(0, 6))
)
def test_two_processes_take_every_job_once(rows, operators, slow):
    """Whatever rows have laws, and whichever of the two is held up by an operator."""

    def judged(job):
        time.sleep(0.001 * (int(job[1]) in slow))
        return [job]

    implementations = [
        Implementation(str(n), {}, Profile("float64", "strict", "A64"), laws=laws) for n, laws in enumerate(rows)
    ]
    jobs = [(n, str(op)) for n in range(len(rows)) for op in range(operators)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "PARALLEL_FROM", 1)
        patch.setattr(runner, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
        patch.setattr(runner, "_judge", judged)
        judging = runner._Judging("any", tuple(implementations), (), None)
        found = list(runner._each(judging, jobs, None, None))
    assert sorted(found) == [(i, [job]) for i, job in enumerate(jobs)]


def test_jobs_with_laws_keep_an_operator_s_together_and_the_rest_their_order():
    """The specification's sample of a law is drawn for one operator at a time, in all formats."""
    rows = [Implementation(str(n), {}, Profile("float64", "strict", "A64"), laws=n != 1) for n in range(3)]
    jobs = [(n, op) for n in range(3) for op in ("norm.rms_norm", "rope.angles")]
    held, rest = runner._lists(runner._Judging("any", tuple(rows), (), None), jobs)
    assert [jobs[i] for i in held] == [
        (0, "norm.rms_norm"),
        (2, "norm.rms_norm"),
        (0, "rope.angles"),
        (2, "rope.angles"),
    ]
    assert [jobs[i] for i in rest] == [(1, "norm.rms_norm"), (1, "rope.angles")]


def test_an_operator_that_the_corpus_does_not_hold_is_not_green(tmp_path, right):
    vectors.export(tmp_path / "part", names=["norm.layer_norm"])
    run = runner.check(right, examples=0, folder=tmp_path / "part")
    assert not run.ok and run.complaints == ("the corpus has no case of norm.rms_norm",)


def test_reports_survive_names_and_messages_of_any_kind(tmp_path):
    file = tmp_path / "[/red]<b>" / "a\x01[bold].py"
    file.parent.mkdir(parents=True)
    name = f"python:{file}"
    text = "def f(**_):\n    raise ValueError('\\x00 \\udcff \\ufffe <script> [/x]')\n"
    file.write_text(text + "IMPLEMENTS = {'norm.rms_norm': f}\n")
    run = runner.check(name, examples=0, dtype="float32")
    assert all(v.message.encode("utf-8") for v in run.verdicts)
    assert "[bold]" in ElementTree.fromstring(report.junit(run))[0][0].get("name")
    for kind in (report.json_lines, report.junit, report.markdown, lambda r: report.html([r])):
        report.write(tmp_path / "out", kind(run))
    assert "<script>" not in (tmp_path / "out").read_text()
    done = command("check", name, "--examples=0", "--dtype=float32")
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_repro_of_a_format_that_the_case_has_not_is_not_green(right):
    done = command("repro", "norm.rms_norm/dense", right, "--dtype", "bfloat16")
    assert done.returncode == 2 and "not judged" in done.stderr


def test_a_report_that_cannot_be_written_says_so(tmp_path, right):
    (tmp_path / "folder").mkdir()
    done = command("check", right, "--examples=0", f"--json={tmp_path / 'folder'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_command_of_a_failure_can_be_pasted(tmp_path, wrong):
    run = runner.check(wrong, examples=0, dtype="float32")
    assert "'python:a b.py'" in runner.repro_command("python:a b.py", run.failures[0])


def test_an_expectation_on_no_operator_is_idle(tmp_path, right):
    lines = expectations(tmp_path, "norm.rmsnorm/grid  # misspelt\nnorm.layer_norm/grid  # not asked for\n")
    complaints = runner.check(right, examples=0, dtype="float32", expected=lines).complaints
    assert complaints == ("xfails line 1: norm.rmsnorm/grid matches no case that ran",)


def counted(monkeypatch, cap, **options):
    """A run over one operator whose adapter declares `cap`: the run, and how many cases each law saw."""
    seen = []
    checked = runner.check_law

    def check_law(name, function, law, *rest):
        calls = []

        def spy(implementation, case):
            calls.append(case)
            law.check(implementation, case)

        made = checked(name, function, type(law)(spy, law.operators, law.clauses), *rest)
        seen.append(len(calls))
        return made

    rms = {"norm.rms_norm": lambda **given: norm.rms_norm(given["x"], epsilon=given["epsilon"])}
    rows = (Implementation("dear", rms, Profile("float64", "strict", "A64"), examples=cap),)
    monkeypatch.setattr(runner, "check_law", check_law)
    monkeypatch.setattr(runner, "load", lambda _: rows)
    return runner.check("dear", names=["norm.rms_norm"], **options), seen


@pytest.mark.parametrize(
    ("cap", "asked", "drawn"),
    [(None, None, 10), (3, None, 3), (40, None, 10), (3, 10, 10), (3, 12, 12), (3, 2, 2), (None, 12, 12), (3, 0, None)],
)
def test_a_number_of_drawn_cases_that_is_asked_for_is_drawn(monkeypatch, cap, asked, drawn):
    """Without one, the default, which an adapter may lower and the report then tells."""
    run, seen = counted(monkeypatch, cap, examples=asked)
    laws = sum("norm.rms_norm" in law.operators for law in families()["norm"].LAWS)
    assert run.ok and seen == ([] if drawn is None else [drawn] * laws)
    told = f"({drawn} drawn cases a law instead of 10)"
    assert (told in report.summary(run)) == (drawn in (2, 3))
    assert json.loads(report.json_lines(run).splitlines()[0])["implementations"][0]["drawn"] == (drawn or 0)


def test_the_report_names_the_rows_that_drew_fewer(monkeypatch, right):
    rows = load(right)
    fewer = tuple(replace(i, examples=4 if i.profile.dtype == "float32" else None) for i in rows)
    monkeypatch.setattr(runner, "load", lambda _: fewer)
    text = report.summary(runner.check(right))
    assert "(4 drawn cases a law instead of 10 for right.py float32-strict)" in text


def test_the_project_s_own_operators_are_judged_by_as_many_cases_as_any():
    pytest.importorskip("torch")
    assert {runner.draws(i, None) for i in load("torchimpl")} == {runner.EXAMPLES}
