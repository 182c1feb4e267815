"""The demonstration in miniature: its report, a second run, a run that was stopped, and its command."""

import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.adapters import AdapterError
from demo import classifiers, command, digits, judging, run, stage
from demo.stage import StageError
from demo.terminal import Bars
from export.parity import ParityError
from tests.demo.conftest import MODELS
from torchimpl import checkpoint
from torchimpl.training.loop import TrainError

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


class Page(HTMLParser):
    """Tags in pairs, what the page would load, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(whole):
    return Page(whole.report)


def files(folder):
    """Every file but the report, with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".html"
    }


def test_the_run_succeeds_and_tells_every_stage(whole):
    assert whole.ok
    lines = whole.said.splitlines()
    assert sum(line.startswith("-[ok] ") for line in lines) == 1 + 4 * len(MODELS)
    assert "-[x]" not in whole.said
    assert "done before" not in whole.said
    for word in ("trained", "exported", "served", "read"):
        assert [sum(f"-[ok] {word} {c.title}" in line for line in lines) for c in MODELS] == [1] * len(MODELS)
    assert f"majority baseline: {digits.majority(digits.load().first(70)):.1%} of the test images" in lines
    assert re.sub(r"\s", "", whole.said).endswith(f"report:{whole.out}/report.html")


def test_the_report_is_one_whole_page(page, whole):
    assert page.open == []
    assert whole.report.startswith("<!doctype html>")
    assert whole.report.rstrip().endswith("</html>")
    assert page.tags.count("html") == page.tags.count("body") == 1
    assert page.tags.count("svg") == 3
    text = " ".join(" ".join(page.words).split())
    for classifier in MODELS:
        assert classifier.title in text
    for words in ("210 of 210", "The graph against the specification", "scikit-learn", "Whitening"):
        assert words in text
    assert not re.search(r"\bnan\b|\bNone\b|\{\{|\{%|Undefined", text)


def test_the_report_loads_nothing(page, whole):
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "img"}
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.loads)
    assert not re.search(r"@import|url\((?!#)", whole.report)


def test_the_report_names_no_folder_of_this_machine(whole):
    assert str(whole.out) not in whole.report
    assert str(stage.ROOT) not in whole.report


def test_nothing_unfinished_is_left(whole):
    names = [path.name for path in whole.out.rglob("*")]
    assert not [name for name in names if name.startswith(".") or ".part" in name or name.endswith(".tmp")]
    for classifier in MODELS:
        for part in ("trained", "exported", "served", "read"):
            assert (whole.out / classifier.model.config.model / part / "stage.json").is_file()


@pytest.fixture
def copy(whole, tmp_path):
    """The finished miniature in a folder of its own."""
    return Path(shutil.copytree(whole.out, tmp_path / "demo"))


def test_a_second_run_takes_up_everything(whole, copy, again):
    (copy / "report.html").unlink()
    before = files(copy)
    second = again(copy, drawn=True)
    assert second.ok
    lines = [line for line in second.said.splitlines() if line.startswith("-[")]
    assert len(lines) == 9
    assert all(line.startswith("-[ok] done before: ") for line in lines)
    assert second.report == whole.report
    assert files(copy) == before


def test_another_recipe_trains_that_model_alone(copy, again):
    second = again(copy, models=(MODELS[0], MODELS[1].shortened(2)))
    old = [line.split()[2:4] == ["before:", "trained"] for line in second.said.splitlines() if " trained " in line]
    assert old == [True, False]
    assert second.said.count("done before") == 1 + 4


def test_what_depends_on_a_damaged_file_is_made_anew(copy, again):
    model = copy / "gau_alpha" / "exported" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    second = again(copy, models=MODELS[:1], adapters=())
    assert second.ok
    marks = [line.split()[1] for line in second.said.splitlines() if line.startswith("-[ok]")]
    # The same file comes out again, so that what was read from its answers still holds.
    assert marks == ["done", "exported", "done", "done"]


def test_a_configuration_that_leaves_the_weights_alone_is_exported_and_served_anew(copy, data):
    trained = copy / "gau_alpha" / "trained"
    told = stage.Stage("gau_alpha/trained", {"sha256": checkpoint.load(trained / "model").sha256}, trained, 0.0, True)
    exported = classifiers.export(copy, told)
    assert exported.taken_up
    assert classifiers.serve(copy, told, exported, data).taken_up
    held = checkpoint.load(trained / "model")
    other = replace(held.model, config=replace(held.model.config, n_min=2))
    checkpoint.save(trained / "model", other, held.weights)
    assert checkpoint.load(trained / "model").sha256 == held.sha256
    exported = classifiers.export(copy, told)
    assert not exported.taken_up
    # Another file, though the weights are the same.
    assert not classifiers.serve(copy, told, exported, data).taken_up


@contextmanager
def stopping(at, error, real=Bars.training):
    """Training that is stopped after so many of its steps."""

    @contextmanager
    def training(self, title):
        with real(self, title) as show:

            def count(now):
                show(now)
                if now.step == at:
                    raise error

            yield count

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bars, "training", training)
        yield


def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, whole, again):
    for at in (4, 5):
        with stopping(at, Stopped()), pytest.raises(Stopped):
            again(tmp_path, models=MODELS[:1], adapters=())
        assert not (tmp_path / "gau_alpha" / "trained" / "stage.json").exists()
        assert not (tmp_path / "report.html").exists()
    seen = []
    real = Bars.training

    @contextmanager
    def training(self, title):
        with real(self, title) as show:
            yield lambda now: (seen.append(now.step), show(now))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bars, "training", training)
        ran = again(tmp_path, models=MODELS[:1], adapters=())
    # Three steps an epoch: the first epoch was kept, and one that was complete is not made again.
    assert seen == [4, 5, 6]
    assert ran.ok
    folder = Path("gau_alpha", "trained")
    for name in ("model/model.safetensors", "model/config.json", "answers.npz", "run/steps.csv", "run/epochs.csv"):
        assert (tmp_path / folder / name).read_bytes() == (whole.out / folder / name).read_bytes()
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith(".") or ".part" in name or name.endswith(".tmp")]
    assert sorted(files(tmp_path)) == sorted(n for n in files(whole.out) if n.startswith("gau_alpha"))


def test_an_adapter_that_is_absent_is_no_failure(copy, again, monkeypatch):
    def absent(name):
        raise AdapterError(f"adapter {name}: x is not installed; pip install 'refimpl[demo]'")

    monkeypatch.setattr(judging, "load", absent)
    ran = again(copy, models=MODELS[:1], adapters=("scikit-learn", "peft"))
    assert ran.ok
    assert "-[skip] adapter peft: x is not installed; pip install 'refimpl[demo]'" in ran.said
    assert "adapter peft: x is not installed" in " ".join(Page(ran.report).words)


def test_an_adapter_that_fails_makes_the_run_not_ok(copy, again, monkeypatch):
    (copy.parent / "wrong.py").write_text(
        "import numpy as np\nIMPLEMENTS = {'can.class_prior': lambda labels, classes, smoothing: np.ones(classes)}\n"
    )
    monkeypatch.chdir(copy.parent)
    monkeypatch.setattr(judging, "THIRD_PARTIES", {"python:wrong.py": judging.Part("float64", 0)})
    ran = again(copy, models=MODELS[:1], adapters=("python:wrong.py",))
    assert not ran.ok
    assert "-[x] python:wrong.py: " in ran.said
    assert "-[x] can.class_prior case" in ran.said
    text = " ".join(Page(ran.report).words)
    assert "something failed, see below" in text
    assert "can.class_prior case" in text


def test_answers_that_differ_make_the_run_not_ok(copy, again, monkeypatch):
    real = classifiers.serve

    def different(*arguments, **options):
        served = real(*arguments, **options)
        return served._replace(result=served.result | {"equal": served.result["equal"] - 1})

    monkeypatch.setattr(classifiers, "serve", different)
    ran = again(copy, models=MODELS[:1], adapters=())
    assert not ran.ok
    assert "-[x] done before: served GAU (quadratic) without torch: 209 of 210 predictions equal" in ran.said


def test_no_table_is_cut_off(whole, copy, again):
    for said, width in ((whole.said, 140), (again(copy, width=80).said, 80)):
        assert "…" not in said
        for words in ("FLASH (mixed chunks of 16)", "whitening.whiten", "the most frequent digit"):
            assert words in said
        tables = [line for line in said.splitlines() if not line.startswith(("-[", "report:", "majority"))]
        assert max(map(len, tables)) <= width
        assert [line.split()[-1] for line in tables if line.startswith(("GAU", "FLASH"))] == ["(64)", "(64)"]


def invoke(monkeypatch, outcome, *words):
    """The command, with a run that returns or raises this; its arguments are kept."""
    given = []

    def ran(*arguments, **options):
        given.append((*arguments[:1], options))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(run, "run", ran)
    return CliRunner().invoke(command.app, ["demo", *words], env={"COLUMNS": "80"}), given


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (True, 0, ""),
        (False, 1, ""),
        (ParityError("export: left its bound"), 1, "refimpl: export: left its bound\n"),
        (StageError("demo: a [bold] folder is in the way"), 2, "refimpl: demo: a [bold] folder is in the way\n"),
        (TrainError("train: the state is damaged"), 2, "refimpl: train: the state is damaged\n"),
        (AdapterError("check: ended " + 30 * "long "), 2, "refimpl: check: ended " + 30 * "long " + "\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "refimpl: [Errno 13] Permission denied: 'out'\n"),
        (KeyboardInterrupt(), 130, "refimpl: stopped; what is done is kept, and the next run takes it up\n"),
    ],
)
def test_the_exit_status(monkeypatch, outcome, status, message):
    done, _ = invoke(monkeypatch, outcome)
    assert (done.exit_code, done.stderr) == (status, message)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "out", "fresh"),
    [([], "out/demo", False), (["--fresh"], "out/demo", True), (["--out", "elsewhere"], "elsewhere", False)],
)
def test_the_options_of_the_command(monkeypatch, words, out, fresh):
    _, given = invoke(monkeypatch, True, *words)
    assert given == [(Path(out), {"fresh": fresh})]


def test_a_foreign_folder_is_one_line_of_the_command(tmp_path, monkeypatch):
    (tmp_path / "out" / "judging" / "spec").mkdir(parents=True)
    (tmp_path / "out" / "judging" / "spec" / "thesis.txt").write_text("the only copy")
    done = CliRunner().invoke(command.app, ["demo", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert re.fullmatch(r"refimpl: demo: \S+ is in the way: [^\n]*\n", done.stderr)
    assert (tmp_path / "out" / "judging" / "spec" / "thesis.txt").read_text() == "the only copy"


def test_help_teaches():
    done = CliRunner().invoke(command.app, ["demo", "--help"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    for words in (
        "Judge the operators",
        "a second run, or one after Ctrl-C, takes it up",
        "Exit status",
        "--fresh",
        "out/demo",
    ):
        assert words in text
