"""The models of the demonstration: a GAU and a FLASH with mixed chunks, trained, exported, and asked without torch.

Sizes, epochs and rates were chosen on the validation images; the test images are read once, at the end.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conformance import report
from demo import digits, stage
from demo.digits import Digits, Images
from demo.stage import Stage
from demo.terminal import Bars
from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import flash, gau_alpha
from refimpl.models._heads import SequenceClassifier
from torchimpl.training.loop import TrainConfig


@dataclass(frozen=True)
class Classifier:
    """A model and how it is trained."""

    title: str
    model: Model
    recipe: TrainConfig
    # Of the module: dropout.
    options: dict[str, Any]

    def shortened(self, epochs: int) -> "Classifier":
        """The same, with fewer epochs."""
        return replace(self, recipe=replace(self.recipe, epochs=epochs))


RECIPE = TrainConfig(
    epochs=30, batch_size=32, learning_rate=5e-3, schedule="cosine", warmup=0.1, final=0.01, weight_decay=0.05,
    clip=1.0, seed=0, save_every=1000,
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": digits.SHADES, "segments": digits.ROWS, "hidden_size": 48, "layers": 3, "expanded_size": 96,
    "key_size": 16, "rotary_base": 10000.0,
}  # fmt: skip
HEADS = (SequenceClassifier(labels=digits.CLASSES, pooling="mean_of_tokens"),)
GAU = Classifier(
    "GAU (quadratic)",
    Model(gau_alpha.Config(**SIZES, n_min=1, epsilon=1e-12), HEADS, "bidirectional"),
    RECIPE,
    {"hidden_dropout": 0.0, "attention_dropout": 0.0},
)
FLASH = Classifier(
    "FLASH (mixed chunks of 16)",
    Model(
        flash.Config(
            **SIZES, chunk=16, mix="bidirectional", kernel="squared_relu", divisor="root_key_size",
            normaliser="visible", rows="paper", rotation="interleaved", epsilon=1e-6,
        ),
        HEADS, "bidirectional",
    ),
    RECIPE,
    {"hidden_dropout": 0.0},
)  # fmt: skip
PARTS = ("train", "validation", "test")
# Logits, sentence vectors and labels of every part, as an archive of plain arrays.
ANSWERS = "answers.npz"


def train(out: Path, classifier: Classifier, data: Digits, bars: Bars, *, fresh: bool = False) -> Stage:
    """Train, keep the epoch that is best on the validation images as a model folder, and answer for all images."""
    name = classifier.model.config.model

    def make(folder: Path) -> dict[str, Any]:
        import torch

        from torchimpl import checkpoint
        from torchimpl import model as modules
        from torchimpl.training import loop as training

        held = [_labelled(part) for part in data]
        task = training.classification(held[0], held[1], change=digits.jitter)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(classifier.recipe.seed)
            model = checkpoint.module(classifier.model, **classifier.options)
        with bars.training(f"training {classifier.title}") as progress:
            fitted = training.fit(model, task, classifier.recipe, folder / "run", progress)
        weights = modules.flat(classifier.model, fitted.weights)
        checkpoint.save(folder / "model", classifier.model, weights)
        model = checkpoint.module(classifier.model, weights)
        outputs = [training.predict(model, part, outputs=("logits", "embedding")) for part in held]
        answers = {p: (o["logits"].numpy(), o["embedding"].numpy()) for p, o in zip(PARTS, outputs, strict=True)}
        _keep(folder / ANSWERS, answers)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": fitted.seconds,
            "losses": [step.loss for step in fitted.steps],
            "epochs": [[e.epoch, e.step, e.loss, e.figures["loss"], e.figures["accuracy"]] for e in fitted.epochs],
            "best": fitted.best.epoch,
            "accuracy": {part: _accuracy(answers[part][0], getattr(data, part)) for part in PARTS},
            "sha256": checkpoint.load(folder / "model").sha256,
        }

    depends = {
        "code": stage.code("torchimpl", "refimpl", "demo/classifiers.py", "demo/digits.py"),
        "model": specification.to_dict(classifier.model),
        "recipe": asdict(classifier.recipe),
        "options": classifier.options,
        "data": _hash(data),
        "versions": stage.versions("numpy", "torch", "scikit-learn"),
    }
    return stage.stage(out, f"{name}/trained", depends, make, fresh=fresh)


def export(out: Path, trained: Stage, *, fresh: bool = False) -> Stage:
    """Two ONNX files, both held against the NumPy specification of the same weights: the newest, and the portable."""
    files = {"model.onnx": (23, False), "portable.onnx": (20, True)}

    def make(folder: Path) -> dict[str, Any]:
        from export import model

        told = {}
        for name, (opset, inline) in files.items():
            found = model.export(trained.folder / "model", folder / name, opset=opset, inline=inline)
            told[name] = {
                "opset": opset,
                "inlined": inline,
                "bytes": (folder / name).stat().st_size,
                "parity": [figures._asdict() for figures in found],
            }
        return told

    depends = {
        "code": stage.code("export", "refimpl", "torchimpl/checkpoint.py", "torchimpl/model.py", "demo/classifiers.py"),
        "weights": trained.result["sha256"],
        "config": stage.digest(trained.folder / "model" / "config.json"),
        "versions": stage.versions("numpy", "onnx", "onnxruntime", "onnxscript", "torch"),
    }
    return stage.stage(out, f"{trained.name.partition('/')[0]}/exported", depends, make, fresh=fresh)


def serve(out: Path, trained: Stage, exported: Stage, data: Digits, *, fresh: bool = False) -> Stage:
    """All images answered by the exported file in a process that cannot import torch; how long an image takes."""
    file = exported.folder / "model.onnx"

    def make(folder: Path) -> dict[str, Any]:
        asked = folder / "asked.npz"
        _keep(asked, {part: (getattr(data, part).token_ids, getattr(data, part).segment_ids) for part in PARTS})
        # -P: not what happens to lie in the folder of the caller.
        command = [sys.executable, "-P", "-m", "demo.answer", str(file), str(asked), str(folder / ANSWERS)]
        environment = {**os.environ, "PYTHONPATH": str(stage.ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
            raise stage.StageError(f"demo: {' '.join(command)} ended with {done.returncode}: {last}")
        told = json.loads(done.stdout)
        mine, theirs = read(folder), read(trained.folder)
        told["accuracy"] = {part: _accuracy(mine[part][0], getattr(data, part)) for part in PARTS}
        told["images"] = sum(len(logits) for logits, _ in mine.values())
        told["equal"] = sum(int((mine[p][0].argmax(1) == theirs[p][0].argmax(1)).sum()) for p in PARTS)
        told["difference"] = max(float(np.abs(mine[p][0] - theirs[p][0]).max()) for p in PARTS)
        return told

    depends = {
        "code": stage.code("runtime", "refimpl", "demo/answer.py", "demo/classifiers.py"),
        "files": [trained.result["sha256"], stage.digest(file)],
        "data": _hash(data),
        "versions": stage.versions("numpy", "onnxruntime"),
    }
    return stage.stage(out, f"{trained.name.partition('/')[0]}/served", depends, make, fresh=fresh)


def read(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits and sentence vectors of every part, as a stage kept them."""
    with np.load(folder / ANSWERS, allow_pickle=False) as held:
        return {part: (held[f"{part}/0"], held[f"{part}/1"]) for part in PARTS}


def _keep(file: Path, parts: Mapping[str, Sequence[np.ndarray]]) -> None:
    arrays: dict[str, Any] = {f"{name}/{i}": a for name, part in parts.items() for i, a in enumerate(part)}
    held = io.BytesIO()
    np.savez(held, **arrays)
    report.write(file, held.getvalue())


def _accuracy(logits: np.ndarray, images: Images) -> float:
    return float((logits.argmax(axis=1) == images.labels).mean())


def _labelled(images: Images) -> Any:
    import torch

    from torchimpl.training.loop import Labelled

    token_ids, segment_ids, labels = (torch.from_numpy(array) for array in images)
    return Labelled(token_ids, labels, segment_ids)


def _hash(data: Digits) -> str:
    import hashlib

    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for part in data for a in part)).hexdigest()
