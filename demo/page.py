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
        agree=all(s["served"].result["equal"] == s["served"].result["images"] for _, s in models),
        cases=sum(found["judged"] for found in results),
        families=families(results),
        columns=columns(results),
        squares=squares(results),
        operators={row["operator"] for found in results for row in found["rows"]},
        third=[found | {"rows": deviating(found)} for found in results if found["adapter"] not in judging.OWN],
        word=judging.word,
        ratio=judging.ratio,
        figure=report.figure,
        heat=report.heat,
        seconds={name: sum(s.seconds for s in everything if name in s.name) for name in ("judging", "trained")},
        total=sum(s.seconds for s in everything),
    )


def deviating(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is to say about an adapter: rows with a convention, a reason, or another verdict than pass."""
    rows = [r for r in found["rows"] if r["convention"] or r["reasons"] or r["outcome"] != "pass"]
    return [r | {"precisions": judging.precisions(r, found)} for r in judging.merged(rows, "reasons")]


def columns(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(adapter, precision) of every column of the heat map."""
    return [(found["adapter"], head) for found in results for head in found["columns"]]


def squares(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Operator (and variant) -> column -> the row that tells about it."""
    made: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for found in results:
        for row in found["rows"]:
            made.setdefault(row["row"], {})[found["adapter"], row["column"]] = row
    return dict(sorted(made.items()))


def families(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Family -> column -> the worst of its operators, and their names."""
    made: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for cells in squares(results).values():
        for column, row in cells.items():
            family = made.setdefault(row["operator"].partition(".")[0], {})
            known = family.setdefault(column, {"outcome": "skipped", "ratio": None, "operators": set()})
            known["operators"].add(row["operator"])
            known["outcome"] = min(known["outcome"], row["outcome"], key=ORDER.index)
            if row["ratio"] is not None and (known["ratio"] is None or row["ratio"] > known["ratio"]):
                known["ratio"] = row["ratio"]
    return made
