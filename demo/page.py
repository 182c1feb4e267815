"""The report: one self-contained HTML file."""

import os
import platform
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

import refimpl
from conformance import report
from demo import digits, judging, plots, stage
from demo.classifiers import Classifier
from demo.digits import Digits
from demo.stage import Stage

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "scikit-learn")
# From the worst to the best, as a square of the heat map tells it when it stands for several operators.
ORDER = ("logic", "errored", "precision", "expected", "unverifiable", "pass", "skipped")


def html(
    judged: list[Stage], models: list[tuple[Classifier, dict[str, Stage]]], answers: dict[str, Any], data: Digits
) -> str:
    """The page of a whole run. models: a classifier with its stages trained, exported, served, read."""
    environment = Environment(
        loader=PackageLoader("demo", "templates"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True
    )
    trained = {c.title: stages["trained"].result for c, stages in models}
    reading = {c.title: stages["read"].result for c, stages in models}
    results = [s.result for s in judged if "absent" not in s.result]
    everything = [*judged, *(s for _, stages in models for s in stages.values())]
    return environment.get_template("report.html.j2").render(
        version=refimpl.__version__,
        versions=stage.versions(*PACKAGES),
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        sizes=[len(part.labels) for part in data],
        majority=digits.majority(data),
        models=models,
        reading=reading,
        learning=plots.learning(trained, digits.majority(data)),
        whitening=plots.whitening({title: told["whitening"] for title, told in reading.items()}),
        pictures=plots.digits(data.test, answers),
        judged=judged,
        ok=all(s.result["ok"] for s in judged),
        cases=sum(found["judged"] for found in results),
        families=families(results),
        columns=columns(results),
        operators=squares(results),
        third=[found for found in results if found["adapter"] not in judging.OWN],
        word=judging.word,
        ratio=judging.ratio,
        figure=report.figure,
        heat=report.heat,
        seconds={name: sum(s.seconds for s in everything if name in s.name) for name in ("judging", "trained")},
        total=sum(s.seconds for s in everything),
    )


def columns(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(adapter, precision) of every column of the heat map."""
    return [(found["adapter"], head) for found in results for head in found["columns"]]


def squares(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Operator -> column -> the row that tells about it."""
    made: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for found in results:
        for row in found["rows"]:
            made.setdefault(row["operator"], {})[found["adapter"], row["column"]] = row
    return dict(sorted(made.items()))


def families(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Family -> column -> the worst of its operators, their number, and how many deviate or fail."""
    made: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for op, cells in squares(results).items():
        for column, row in cells.items():
            family = made.setdefault(op.partition(".")[0], {})
            known = family.setdefault(column, {"outcome": "skipped", "ratio": None, "operators": 0, "deviate": 0})
            known["operators"] += 1
            known["deviate"] += row["outcome"] not in ("pass", "skipped", "unverifiable")
            known["outcome"] = min(known["outcome"], row["outcome"], key=ORDER.index)
            if row["ratio"] is not None and (known["ratio"] is None or row["ratio"] > known["ratio"]):
                known["ratio"] = row["ratio"]
    return made
