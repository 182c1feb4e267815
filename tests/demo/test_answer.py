"""Serving apart: a process that cannot import torch or onnx answers as the session in this one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo import classifiers
from demo.answer import FORBIDDEN, Forbidding
from runtime.session import Session

ROOT = Path(__file__).resolve().parents[2]


def answer(*arguments, folder=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "demo.answer", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", [*FORBIDDEN, "torch.nn", "onnx.helper", "torchimpl.ops.rope"])
def test_what_is_forbidden_is_named(name):
    with pytest.raises(ImportError, match=f"{name} must not be imported where a model is served"):
        Forbidding().find_spec(name, None)


@pytest.mark.parametrize("name", ["onnxruntime", "torchvision", "numpy", "exporter", "runtime.export"])
def test_what_only_sounds_so_is_not_forbidden(name):
    assert Forbidding().find_spec(name, None) is None


@pytest.fixture
def counterfeit(tmp_path):
    """A folder with a runtime of its own, which is found before ours."""

    def write(text):
        (tmp_path / "runtime").mkdir()
        (tmp_path / "runtime" / "__init__.py").write_text("")
        (tmp_path / "runtime" / "session.py").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "text", ["import torch", "from torch import nn", "import onnx.helper", "import torchimpl.training.loop"]
)
def test_a_runtime_that_needs_torch_is_refused(counterfeit, whole, tmp_path, text):
    model = whole.out / "gau_alpha" / "exported" / "model.onnx"
    asked = whole.out / "gau_alpha" / "served" / "asked.npz"
    done = answer(model, asked, tmp_path / "answers.npz", folder=counterfeit(text))
    assert done.returncode == 1
    assert "must not be imported where a model is served" in done.stderr
    assert not (tmp_path / "answers.npz").exists()


def test_answers_of_a_process_of_its_own(whole, data, tmp_path):
    folder = whole.out / "flash"
    model, asked = folder / "exported" / "model.onnx", folder / "served" / "asked.npz"
    done = answer(model, asked, tmp_path / "answers.npz")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["loaded"] == []
    assert told["batch"] == 64
    assert told["threads"] >= 1
    assert min(told[name] for name in ("load_ms", "one_ms", "batch_ms")) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["answers.npz"]
    (tmp_path / "answers.npz").rename(tmp_path / classifiers.ANSWERS)
    session, answers = Session(model), classifiers.read(tmp_path)
    for part in classifiers.PARTS:
        images = getattr(data, part)
        expected = session.run(images.token_ids, images.segment_ids)
        for received, name in zip(answers[part], ("logits", "embedding"), strict=True):
            np.testing.assert_allclose(received, expected[name], atol=1e-5)
    kept = classifiers.read(folder / "served")
    assert all((kept[part][i] == answers[part][i]).all() for part in kept for i in (0, 1))


def test_the_stage_tells_what_the_process_told(whole, data):
    for name in ("gau_alpha", "flash"):
        told = json.loads((whole.out / name / "served" / "stage.json").read_text())["result"]
        trained = json.loads((whole.out / name / "trained" / "stage.json").read_text())["result"]
        assert told["loaded"] == []
        assert told["images"] == told["equal"] == 210
        assert told["difference"] < 1e-4
        assert told["accuracy"] == trained["accuracy"]
        answers = classifiers.read(whole.out / name / "served")
        right = (answers["test"][0].argmax(axis=1) == data.test.labels).sum()
        assert told["accuracy"]["test"] == right / 70


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path):
    (tmp_path / "no.onnx").write_text("no model")
    np.savez(tmp_path / "asked.npz", a=np.zeros(1))
    done = answer(tmp_path / "no.onnx", tmp_path / "asked.npz", tmp_path / "answers.npz")
    assert done.returncode == 1
    assert "cannot be loaded" in done.stderr
    assert not (tmp_path / "answers.npz").exists()
