"""What the demonstration says about a run of the judge, and that nothing unexplained passes for success."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from conformance import runner
from conformance.adapters import AdapterError
from conformance.runner import ExpectedFailure
from demo import judging, page
from demo.judging import Part
from demo.terminal import Bars

# A norm that is one per cent too large, and a rotation that is right.
STRANGER = """
import numpy as np

def too_large(x, epsilon):
    square = (x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + epsilon
    return (1.01 * x / np.sqrt(square + (square == 0))).astype(x.dtype)

def rotate(x, positions, base):
    d = x.shape[-1]
    angles = positions[..., None, None] * float(base) ** (-2.0 * np.arange(d // 2) / d)
    z = (x[..., 0::2] + 1j * x[..., 1::2].astype(np.float64)) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape).astype(x.dtype)

IMPLEMENTS = {"norm.rms_norm": too_large, "rope.rotate_interleaved": rotate}
PROFILE = {"float32": "strict A64", "float64": "strict A64"}
"""
WHY = "it is one per cent [too] large"
EXPECTED = [ExpectedFailure("norm.rms_norm/*", "*", WHY, 1)]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    file = tmp_path_factory.mktemp("stranger") / "norm.py"
    file.write_text(STRANGER)
    return f"python:{file}"


@pytest.fixture(scope="module")
def failing(stranger):
    return runner.check(stranger, examples=0)


@pytest.fixture(scope="module")
def explained(stranger):
    return runner.check(stranger, examples=0, expected=EXPECTED)


def rows(told):
    return {(row["operator"], row["column"]): row for row in told["rows"]}


def said(results, width=140):
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(judging.table(results))
    judging.explain(results, console)
    return text.getvalue()


def test_what_is_told_of_a_failure(failing, stranger):
    told = judging.told(failing)
    assert (told["adapter"], told["ok"], told["columns"]) == (stranger, False, ["float32", "float64"])
    found = rows(told)
    assert set(found) == {(op, d) for op in ("norm.rms_norm", "rope.rotate_interleaved") for d in told["columns"]}
    for dtype in told["columns"]:
        bad, good = found["norm.rms_norm", dtype], found["rope.rotate_interleaved", dtype]
        assert (bad["outcome"], bad["reasons"], bad["row"]) == ("logic", [], "norm.rms_norm")
        assert bad["ratio"] > 1000
        assert 0 < bad["failed"] <= bad["cases"]
        assert good["outcome"] == "pass"
        assert 0 <= good["ratio"] <= 1
        assert good["failed"] == 0
    assert found["rope.rotate_interleaved", "float32"]["convention"] == "interleaved, counter-clockwise, base 10000"
    assert len(told["failures"]) == sum(row["failed"] for row in told["rows"])
    assert "Reproduce: refimpl repro norm.rms_norm/" in told["failures"][0]
    assert told["judged"] == failing.judged == sum(row["cases"] for row in told["rows"])
    assert json.loads(json.dumps(told, allow_nan=True)) == told


def test_a_deviation_that_is_explained_is_no_failure(explained):
    told = judging.told(explained)
    assert told["ok"]
    assert told["failures"] == []
    for (op, _), row in rows(told).items():
        bad = op == "norm.rms_norm"
        assert (judging.word(row), row["reasons"]) == (("deviates", [WHY]) if bad else ("pass", []))
        assert row["failed"] == 0


def test_a_line_that_nothing_meets_fails_the_run(stranger):
    idle = [*EXPECTED, ExpectedFailure("rope.rotate_interleaved/grid", "*", "it was so once", 2)]
    told = judging.told(runner.check(stranger, examples=0, expected=idle))
    assert not told["ok"]
    (complaint,) = told["complaints"]
    assert "rope.rotate_interleaved/grid is expected to fail and does not (it was so once)" in complaint
    assert f"-[x] {complaint}" in said([told])


def test_failures_are_said_and_not_all_of_them(failing):
    told = judging.told(failing)
    assert len(told["failures"]) > 5
    text = said([told])
    assert text.count("-[x] norm.rms_norm case") == 5
    assert "deviates" not in text


def test_every_reason_is_said_once(explained, stranger):
    text = said([judging.told(explained)])
    assert text.count(f"-[deviates] {stranger} norm.rms_norm: {WHY}\n") == 1
    assert text.count(WHY) == 1
    assert "-[x]" not in text


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_has_a_line_for_every_operator_and_verdict(explained, width):
    lines = said([judging.told(explained) | {"adapter": "stranger"}], width).splitlines()
    assert lines[0].rstrip() == "implementation x operator"
    (norm,) = (line.split() for line in lines if line.startswith("  norm.rms_norm "))
    assert norm[:4] == ["norm.rms_norm", "all", "2", "deviates"]
    (rope,) = (line.split() for line in lines if line.startswith("  rope.rotate_interleaved "))
    assert rope[:4] == ["rope.rotate_interleaved", "all", "2", "pass"]
    assert float(rope[4]) <= 1
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("-["))]
    # Nothing is cut off: the last words of the convention stand in the table.
    assert "…" not in "".join(table)
    assert "10000" in "".join(table)
    assert max(map(len, table)) <= width


def test_verdicts_that_differ_have_lines_of_their_own(explained):
    told = judging.told(explained)
    rows(told)["norm.rms_norm", "float64"] |= {"outcome": "pass", "ratio": 0.25, "reasons": [], "convention": ""}
    lines = [line.split() for line in said([told]).splitlines() if line.startswith("  norm.rms_norm ")]
    assert [line[1:3] for line in lines] == [["float32", "deviates"], ["float64", "pass"]]
    assert lines[1][3] == "0.25"


@pytest.mark.parametrize("ratios", [(0.2, 0.9), (0.9, 0.2), (None, 0.9), (0.9, None)])
def test_a_line_tells_the_worst_ratio(explained, ratios):
    told = judging.told(explained)
    for dtype, ratio in zip(told["columns"], ratios, strict=True):
        rows(told)["rope.rotate_interleaved", dtype]["ratio"] = ratio
    (line,) = (line.split() for line in said([told]).splitlines() if line.startswith("  rope"))
    assert line[:5] == ["rope.rotate_interleaved", "all", "2", "pass", "0.9"]


def test_80_columns_hold_the_longest_of_everything(explained):
    told = judging.told(explained) | {"adapter": "stranger"}
    row = rows(told)["norm.rms_norm", "float32"]
    row |= {"operator": "linear_attention.recurrent", "column": "bfloat16 eager", "ratio": 7e11}
    row |= {"convention": "interleaved, counter-clockwise, base 10000"}
    twin = row | {"outcome": "pass", "column": "float16 fused", "convention": ""}
    lines = said([told | {"rows": [row, twin]}], width=80).splitlines()
    (first,) = (line.split() for line in lines if "deviates " in line)
    assert first == ["linear_attention.recurrent", "bfloat16", "deviates", "7e11", "interleaved,"]
    assert [sum(words in line for line in lines) for words in ("counter-clockwise,", "base 10000")] == [1, 1]


def test_our_own_are_one_line(explained):
    told = judging.told(explained) | {"adapter": "torchimpl"}
    lines = [line.split() for line in said([told]).splitlines() if line.startswith("torchimpl")]
    # What deviates does not fail.
    assert [line[:5] for line in lines] == [["torchimpl,", "all", "2", d, "pass"] for d in ("float32", "float64")]


def test_our_own_failures_are_counted(failing):
    told = judging.told(failing) | {"adapter": "torchimpl"}
    failed = rows(told)["norm.rms_norm", "float32"]["failed"]
    (line,) = (line for line in said([told]).splitlines() if line.startswith("torchimpl, all 2") and "float32" in line)
    assert f"{failed} failed" in line


def test_variants_are_rows_of_the_same_operator(explained):
    twin = [replace(verdict, variant="compiled") for verdict in explained.verdicts]
    expected = explained.expected | {i + len(twin): reason for i, reason in explained.expected.items()}
    told = judging.told(replace(explained, verdicts=(*explained.verdicts, *twin), expected=expected))
    assert len(told["rows"]) == 8
    assert {row["operator"] for row in told["rows"]} == {"norm.rms_norm", "rope.rotate_interleaved"}
    compiled = [row for row in told["rows"] if row["row"] == "norm.rms_norm (compiled)"]
    assert [row["reasons"] for row in compiled] == [[WHY], [WHY]]
    column = (told["adapter"], "float32")
    assert page.families([told])["norm"][column]["operators"] == {"norm.rms_norm"}
    assert set(page.squares([told])) == {
        "norm.rms_norm", "norm.rms_norm (compiled)", "rope.rotate_interleaved", "rope.rotate_interleaved (compiled)"
    }  # fmt: skip


def test_a_square_of_the_heat_map_is_the_worst_of_its_family():
    def row(op, outcome, ratio):
        return {"operator": op, "row": op, "column": "float32", "outcome": outcome, "ratio": ratio}

    found = {"adapter": "x", "rows": [
        row("rope.a", "pass", 0.5), row("rope.b", "expected", 3.0), row("rope.c", "skipped", None),
        row("can.a", "pass", None), row("can.b", "pass", 0.0), row("lora.a", "expected", 9.0),
        row("lora.b", "logic", 2.0),
    ]}  # fmt: skip
    made = page.families([found])
    told = {
        name: (s["outcome"], s["ratio"], len(s["operators"])) for name, cells in made.items() for s in cells.values()
    }
    assert told == {"can": ("pass", 0.0, 2), "lora": ("logic", 9.0, 2), "rope": ("expected", 3.0, 3)}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """The stages of other people's adapters, of which there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm.py").write_text(STRANGER)
    monkeypatch.setattr(judging, "OWN", {})

    def stages(adapter="python:norm.py", **options):
        monkeypatch.setattr(judging, "THIRD_PARTIES", {adapter: Part("float32", 0)})
        return list(judging.judge(tmp_path / "out", Bars(Console(file=io.StringIO())), **options))

    return stages


def test_a_failing_adapter_is_judged_again_and_an_explained_one_is_not(judge, failing, explained, monkeypatch):
    def check(adapter, *, dtype, examples, expected, progress):
        assert (adapter, dtype, examples) == ("python:norm.py", "float32", 0)
        progress(1, 2)
        return explained if expected else failing

    monkeypatch.setattr(judging.runner, "check", check)
    assert not judge()[0].result["ok"]
    (failed,) = judge()
    assert (failed.result["ok"], failed.taken_up) == (False, False)
    monkeypatch.setattr(judging, "deviations", lambda adapter: EXPECTED)
    (first,) = judge(adapters=("python:norm.py",))
    assert (first.name, first.result["ok"], first.taken_up) == ("judging/python:norm.py", True, False)
    assert judge() == [first._replace(taken_up=True)]
    assert not judge(fresh=True)[0].taken_up
    assert judge(adapters=("scikit-learn",)) == []


def test_what_cannot_be_loaded_is_absent(judge):
    (stage,) = judge("python:nowhere.py")
    assert stage.result == {
        "adapter": "python:nowhere.py", "ok": True, "absent": "adapter python:nowhere.py: no such file"
    }  # fmt: skip


def test_what_breaks_while_it_is_judged_is_not_absent(judge, monkeypatch):
    def broken(*arguments, **options):
        raise AdapterError("check: a process that ran python:norm.py ended without a verdict")

    monkeypatch.setattr(judging.runner, "check", broken)
    with pytest.raises(AdapterError, match="ended without a verdict"):
        judge()


def test_every_adapter_exists_and_explains_itself():
    from conformance.adapters import ADAPTERS, DEVIATIONS

    judged = {**judging.OWN, **judging.THIRD_PARTIES}
    assert set(judged) <= set(ADAPTERS)
    assert {file.stem for file in DEVIATIONS.glob("*.txt")} <= set(judged)
