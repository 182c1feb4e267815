"""How a run is shown: failures of one model as one text, and the keys of JSON lines."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance import report, runner
from conformance.command import app

BUG = "positions off by one behind the first, in layer 1"


def adapter(tmp_path, body, **claims):
    listed = ", ".join(f"{name!r}: {expression}" for name, expression in claims.items())
    text = f"from conformance.models import flash, gau_alpha\n{body}\nIMPLEMENTS = {{{listed}}}\n"
    (tmp_path / "mine.py").write_text(text + "PROFILE = {'float64': 'strict'}\n")
    return f"python:{tmp_path / 'mine.py'}"


def test_a_failing_model_is_one_text_with_a_line_for_the_first_state_that_is_off(tmp_path):
    run = runner.check(adapter(tmp_path, "", gau_alpha=f"gau_alpha.WRONG[{BUG!r}]"), names=["gau_alpha"], examples=0)
    assert len(run.failures) == 9
    ((name, text),) = report.failures(run)
    head, line = text.splitlines()
    assert name == "mine.py" and head.startswith("gau_alpha (float64 strict): 9 of 11 cases fail: logic. Reproduce: ")
    assert "refimpl repro gau_alpha/padded python:" in head
    assert line.strip().startswith("9 cases (padded, rows-without-tokens, no-segment-ids, ")
    assert "): x_2, behind layer 1, is the first that is off. padded: x_2[" in line
    assert line.endswith(f'x the bound. Equals the known bug "{BUG}"')


def test_laws_and_errors_of_a_model_are_lines_of_their_own(tmp_path):
    body = (
        "def fails(*_, config, **__):\n    raise KeyError('no such weight')\n"
        "def head(*given, **options):\n    made = flash.model(*given, **options)\n    return (2 * made[0], *made[1:])\n"
    )
    run = runner.check(adapter(tmp_path, body, gau_alpha="fails", flash="head"), names=["flash", "gau_alpha"])
    (_, of_flash), (_, of_gau_alpha) = report.failures(run)
    lines = of_flash.splitlines()
    assert "14 of 14 cases and " in lines[0] and " laws fail: logic." in lines[0]
    assert (
        lines[1].strip().startswith("14 cases (all): every hidden state is right, the head is off. one-layer: logits[")
    )
    assert len(lines) > 2 and all(line.strip().startswith("law ") for line in lines[2:])
    assert "  11 cases (all): errored. KeyError: 'no such weight'" in of_gau_alpha
    assert of_gau_alpha.count("KeyError") == 2
    shown = CliRunner().invoke(app, ["check", run.adapter, "--op", "gau_alpha"])
    assert shown.exit_code == 1 and shown.stdout.count("KeyError") == 2


def test_one_failure_and_those_of_operators_are_told_as_before(tmp_path):
    body = "def wide(x, **_):\n    return x + 1\n"
    run = runner.check(adapter(tmp_path, body, **{"norm.rms_norm": "wide"}), examples=0)
    assert len(report.failures(run)) == len(run.failures) > 1
    first = run.failures[0]
    assert report.failures(run)[0] == ("mine.py", runner.message(first, (), run.adapter))


@pytest.mark.parametrize(
    ("kind", "key"), [("model", "padded"), ("law", "padding")], ids=["a case of a model", "a law of a model"]
)
def test_json_lines_hold_what_the_documentation_says(tmp_path, kind, key):
    run = runner.check(adapter(tmp_path, "", gau_alpha="gau_alpha.model"), names=["gau_alpha"])
    lines = [json.loads(line) for line in report.json_lines(run).splitlines()]
    (line,) = [line for line in lines if line.get(kind) == key]
    assert line["operator"] == "gau_alpha"
    assert line["ratio"] == "nan" if kind == "law" else 0 < line["ratio"] < 1
    text = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
    told = text.partition("## JSON lines")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in told for name in line) and "the model's where a whole model was judged" in told
