"""What NumPy makes of a model's answers: CAN on its predictions, whitening of its sentence vectors.

Every choice (threshold, beta, gamma, k) is made on the validation images and reported on the test images.
"""

from pathlib import Path
from typing import Any

import numpy as np

from demo import classifiers, digits, stage
from demo.digits import Digits
from demo.stage import Stage
from demo.terminal import Bars
from refimpl.ops import can, whitening

TOPS, THRESHOLDS, ALPHAS, ITERATIONS = (3, 2, 5, 10), (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), (1.0, 2.0), (1, 2, 3)
BETAS, GAMMAS = (0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)
KS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def read(out: Path, served: Stage, data: Digits, bars: Bars, *, fresh: bool = False) -> Stage:
    """CAN and whitening of one model's answers."""

    def make(_: Path) -> dict[str, Any]:
        answers = classifiers.read(served.folder)
        with bars.counting(f"whitening {served.name.partition('/')[0]}") as progress:
            whitened = nearest(answers, data, progress)
        return {"can": normalised(answers, data), "whitening": whitened}

    depends = {
        "code": stage.code("refimpl/ops/can.py", "refimpl/ops/whitening.py", "demo/reading.py"),
        "answers": stage.digest(served.folder / classifiers.ANSWERS),
        "labels": [part.labels.tolist() for part in data],
    }
    return stage.stage(out, f"{served.name.partition('/')[0]}/read", depends, make, fresh=fresh)


def normalised(answers: dict[str, tuple[np.ndarray, np.ndarray]], data: Digits) -> dict[str, Any]:
    """Accuracy before and after CAN with the prior of the training labels; the first of equally good settings."""
    prior = can.class_prior(data.train.labels, classes=digits.CLASSES, smoothing=0.0)
    grid: list[dict[str, Any]] = [
        {"top": top, "threshold": threshold, "alpha": alpha, "iterations": iterations}
        for iterations in ITERATIONS for alpha in ALPHAS for top in TOPS for threshold in THRESHOLDS
    ]  # fmt: skip
    p = {part: softmax(logits) for part, (logits, _) in answers.items()}

    def right(part: str, setting: dict[str, Any]) -> np.ndarray:
        return can.adjust(p[part], prior, **setting).probabilities.argmax(axis=1) == getattr(data, part).labels

    best = max(grid, key=lambda setting: float(right("validation", setting).mean()))
    told: dict[str, Any] = {"setting": best}
    for part in ("validation", "test"):
        before = p[part].argmax(axis=1) == getattr(data, part).labels
        after = right(part, best)
        told[part] = {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "uncertain": int(can.adjust(p[part], prior, **best).uncertain.sum()),
            "mended": int((after & ~before).sum()),
            "spoilt": int((before & ~after).sum()),
            "images": len(before),
        }
    return told


def nearest(answers: dict[str, tuple[np.ndarray, np.ndarray]], data: Digits, progress: Any) -> dict[str, Any]:
    """Accuracy of the nearest training image by cosine, before and after whitening, for every beta, gamma and k."""
    vectors = {part: np.asarray(embedding, np.float64) for part, (_, embedding) in answers.items()}
    m = whitening.moments(vectors["train"])
    ranks = [whitening.rank(whitening.spectrum(whitening.covariance(m, beta=beta)).values) for beta in BETAS]
    ks = [k for k in KS if k <= min(ranks)]
    total, on_test = len(BETAS) * len(GAMMAS) * len(ks), []

    def score(encode: Any) -> float:
        train = encode(vectors["train"])
        on_test.append(matched(train, encode(vectors["test"]), data, data.test.labels))
        progress(len(on_test), total)
        return matched(train, encode(vectors["validation"]), data, data.validation.labels)

    found = whitening.search(m, score, betas=BETAS, gammas=GAMMAS, ks=ks)
    plain = {part: whitening.normalize(array) for part, array in vectors.items()}
    trials = [[*trial, test] for trial, test in zip(found.trials, on_test, strict=True)]
    best = found.trials.index(found.best)
    before = {
        part: matched(plain["train"], plain[part], data, getattr(data, part).labels) for part in ("validation", "test")
    }
    return {"width": len(m.mean), "before": before, "best": trials[best], "trials": trials}


def matched(train: np.ndarray, asked: np.ndarray, data: Digits, labels: np.ndarray) -> float:
    """The share of rows whose most similar training row (by inner product) shows the same digit."""
    return float((data.train.labels[(asked @ train.T).argmax(axis=1)] == labels).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
