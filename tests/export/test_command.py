"""`refimpl export`: what it says of itself, of a written file and of everything that stops it, and its exit status."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refimpl import cli
from refimpl import model as specification
from refimpl.check import DomainError
from refimpl.models import gau_alpha
from refimpl.models._heads import SequenceClassifier

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
testing = pytest.importorskip("typer.testing")
# Only now: these need the packages above.
MODULES = ("export.command", "export.model", "export.parity", "torchimpl.checkpoint")
command, model, parity, checkpoint = map(importlib.import_module, MODULES)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = gau_alpha.Config(
    vocab_size=11, segments=3, hidden_size=7, layers=2, expanded_size=13, key_size=4, rotary_base=10000.0,
    n_min=1, epsilon=1e-12,
)  # fmt: skip
MODEL = specification.Model(CONFIG, (SequenceClassifier(labels=5, pooling="mean_of_tokens"),), "bidirectional")
PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": None}


@pytest.fixture
def folder(tmp_path):
    drawn = np.random.default_rng(0)
    shapes = specification.shapes(MODEL)
    weights = {name: torch.from_numpy(drawn.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    checkpoint.save(tmp_path / "gau", MODEL, weights)
    return tmp_path / "gau"


def export(*words):
    return testing.CliRunner().invoke(command.app, ["export", *map(str, words)], env=PLAIN)


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if "gau" not in path.parts)


def metadata(file):
    return {entry.key.removeprefix("refimpl."): entry.value for entry in onnx.load(file).metadata_props}


FIGURES = (
    r"onnx \S+ ReferenceEvaluator, float64: worst error \S+e-1[3-6] of the largest element \(bound 1e-12, 26 requests; "
    r"\w+, length \d+, batch \d, mask: [\w ]+\)\n"
    r"onnxruntime \S+, {dtype}: worst error \S+ of the largest element \(bound \de-\d\d, 26 requests; .*\)\n"
)


# Without escape, [red] would be taken for a style.
@pytest.mark.parametrize("name", ["gau.onnx", "new/[red]gau.onnx"])
def test_it_writes_the_file_and_says_how_far_off_it_is(folder, tmp_path, name):
    out = tmp_path / "files" / name
    done = export(folder, out)
    assert (done.exit_code, done.stderr) == (0, "")
    last = rf"{re.escape(str(out))}: opset 23, float32, 0\.0\d MB\n"
    assert re.fullmatch(FIGURES.format(dtype="float32") + last, done.stdout)
    assert metadata(out)["opset"] == "23"


def test_every_option_arrives(folder, tmp_path):
    out = tmp_path / "twin.onnx"
    done = export(folder, out, "--opset", 20, "--dtype", "float64", "--inline")
    assert re.fullmatch(FIGURES.format(dtype="float64") + r".*twin.onnx: opset 20, float64, 0\.0\d MB\n", done.stdout)
    told = metadata(out)
    assert (told["opset"], told["dtype"], len(onnx.load(out).functions)) == ("20", "float64", 0)


def test_help_teaches():
    done = export("--help")
    assert done.exit_code == 0
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    for text in (
        "Write a trained model as an ONNX file, after holding the graph against the specification.",
        "Exit status 1, and no file, where the graph leaves its bound.",
        "A model folder, as training writes it.",
        "The file to write.",
        "23, or 20 for older runtimes. [default: 23]",
        "float32, or float64 for a twin to verify with. [default: float32]",
        "Without local functions, for readers that do not know them.",
    ):
        assert text in said


@pytest.mark.parametrize("words", [[], ["gau"], ["gau", "gau.onnx", "more"], ["gau", "gau.onnx", "--opset", "new"]])
def test_words_that_are_missing_or_too_many_are_named_with_the_usage(words):
    done = export(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage:" in done.stderr and "--help" in done.stderr


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def occupied(folder):
    (folder.parent / "out").write_text("mine")


# What is done to the model folder before, the words after it, what is said.
UNABLE = {
    "no model": (None, ["../absent", "a.onnx"], "checkpoint: .*absent is no model folder: it has no manifest.json"),
    "a file": (None, ["gau/config.json", "a.onnx"], ".*Not a directory: .*config.json.*"),
    "damaged": (damaged, ["gau", "a.onnx"], "checkpoint: .*model.safetensors is not the file that was written: .*"),
    "opset": (None, ["gau", "a.onnx", "--opset", "21"], r"export: expected an opset among \(20, 23\), received 21"),
    "dtype": (None, ["gau", "a.onnx", "--dtype", "int8"], "export: expected a dtype among .*, received 'int8'"),
    "a folder": (None, ["gau", "gau"], "export: expected the name of a file to write, received the folder .*gau"),
    "below a file": (occupied, ["gau", "out/a.onnx"], ".*out.*"),
}


@pytest.mark.parametrize("case", UNABLE)
def test_what_cannot_be_done_is_one_line_and_status_2(folder, monkeypatch, case):
    before, words, message = UNABLE[case]
    if before:
        before(folder)
    monkeypatch.chdir(folder.parent)
    held = below(folder.parent)
    done = export(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(f"refimpl: {message}\n", done.stderr)
    assert below(folder.parent) == held


def test_a_graph_that_leaves_its_bound_is_one_line_status_1_and_no_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "BOUNDS", {"float64": 1e-20, "float32": 1e-2})
    monkeypatch.setattr(parity, "MARGIN", 0)
    done = export(folder, tmp_path / "new" / "a.onnx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(
        r"refimpl: export: onnx \S+ ReferenceEvaluator \(float64\): \w+, length \d+, batch \d, mask: [\w ]+: the error "
        r"is \S+ of the largest element, the bound 1\.0e-20\n",
        done.stderr,
    )
    assert below(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "refimpl: stopped; nothing was written\n"),
        (OSError(28, "No space left on device"), 2, "refimpl: [Errno 28] No space left on device\n"),
        # Not a style.
        (parity.ParityError("the [red] graph"), 1, "refimpl: the [red] graph\n"),
        (model.ExportError("the [red] model"), 2, "refimpl: the [red] model\n"),
        (DomainError("gau_alpha.Config: even"), 2, "refimpl: gau_alpha.Config: even\n"),
    ],
)
def test_what_stops_it_is_said_in_one_line(folder, tmp_path, monkeypatch, error, status, said):
    def stopped(*arguments, **named):
        raise error

    monkeypatch.setattr(model, "export", stopped)
    done = export(folder, tmp_path / "a.onnx")
    assert (done.exit_code, done.stdout, done.stderr) == (status, "", said)
    assert below(tmp_path) == []


@pytest.mark.skipif("export" not in cli.registered(), reason="refimpl is not installed with its commands")
def test_the_installed_command(folder, tmp_path):
    def run(*words):
        environment = {name: value for name, value in (os.environ | PLAIN).items() if value is not None}
        whole = [sys.executable, "-m", "refimpl.cli", "export", *map(str, words)]
        return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run(folder, tmp_path / "a.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3
    assert metadata(tmp_path / "a.onnx")["format"] == "2"
    done = run(tmp_path, tmp_path / "b.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("refimpl: checkpoint: .* is no model folder: it has no manifest.json\n", done.stderr)
    assert below(tmp_path) == ["a.onnx"]
