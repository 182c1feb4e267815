"""A miniature of the whole demonstration, made once: few images, few epochs, one adapter that is quickly judged."""

import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from demo import classifiers, digits, plots, run, stage

MODELS = tuple(
    replace(whole.shortened(epochs), model=replace(whole.model, config=replace(whole.model.config, layers=1)))
    for whole, epochs in ((classifiers.GAU, 2), (classifiers.FLASH, 1))
)
# More than answers in one batch.
IMAGES = 70


class Ran(NamedTuple):
    """A finished run: whether nothing failed, what it printed, where it wrote."""

    ok: bool
    said: str
    out: Path

    @property
    def report(self) -> str:
        return (self.out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def one_state_of_the_code():
    """A file of the project that is saved while its tests run changes no stage from one run to the next."""
    real, root, seen = stage.code, stage.ROOT, {}

    def code(*folders):
        if root != stage.ROOT:
            return real(*folders)
        if folders not in seen:
            seen[folders] = real(*folders)
        return seen[folders]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "code", code)
        yield


@pytest.fixture(scope="session")
def data():
    return digits.load().first(IMAGES)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    return miniature(tmp_path_factory.mktemp("demo"), data)


def miniature(out, data, *, models=MODELS, adapters=("scikit-learn",), width=140, drawn=True):
    """A run of the miniature; without its pictures, which take the most time, where no test looks at them."""
    said = io.StringIO()
    console = Console(file=said, width=width)
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:
            for name in ("learning", "whitening", "digits"):
                patched.setattr(plots, name, lambda *arguments: "")
        ok = run.run(out, console, Console(file=io.StringIO()), models=models, data=data, adapters=adapters)
    return Ran(ok, said.getvalue(), out)


@pytest.fixture(scope="session")
def again(data):
    """The miniature once more, in a folder of the test's choice."""
    return lambda out, **options: miniature(out, data, **{"drawn": False, **options})
