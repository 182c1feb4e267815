"""The repository keeps the rules of tests/layout.py, and each rule is shown a folder that breaks it."""

import subprocess
from pathlib import Path

import pytest

from tests import layout

ROOT = Path(__file__).resolve().parent.parent
RULES = [
    layout.arrows,
    layout.third_parties,
    layout.same_path,
    layout.file_lengths,
    layout.machine_paths,
    layout.import_weight,
    layout.judge_weight,
    layout.runtime_weight,
    layout.import_time,
]
# Split, so that this file does not itself break the rule.
A_HOME = "/" + "home/ada/data"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule):
    breaches = rule(ROOT)
    assert not breaches, f"{rule.__doc__}\n" + "\n".join(breaches)


def plant(root: Path, files: dict[str, str] | None = None) -> Path:
    """A small repository that keeps every rule, with `files` (path without .py: text) added or replaced."""
    sound = {
        "refimpl/__init__": "",
        "refimpl/ops/__init__": "",
        "refimpl/ops/rope": "import numpy as np\nfrom refimpl import check",
        "refimpl/check": "import numpy",
        "conformance/__init__": "",
        "conformance/ops/__init__": "",
        "conformance/ops/rope": "import hypothesis\nfrom refimpl.ops import rope",
        "conformance/adapters/__init__": "",
        "conformance/adapters/pytorch": "def call():\n    import torch\n    import torchimpl.ops.rope",
        "tests/refimpl/ops/test_rope": "from conformance.ops import rope",
    }
    for name, text in {**sound, **(files or {})}.items():
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_repository_breaks_nothing(tmp_path, rule):
    assert rule(plant(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("refimpl/ops/gau", "import conformance", "refimpl/ops/gau.py:1 imports conformance"),
        ("refimpl/ops/gau", "def f():\n    from torchimpl.ops import gau", "gau.py:2 imports torchimpl.ops"),
        ("refimpl/x", "import importlib\nimportlib.import_module('runtime.batch')", "x.py:2 imports runtime.batch"),
        ("torchimpl/checkpoint", "from export import model", "torchimpl/ may import refimpl and nothing else"),
        ("runtime/session", "import numpy, torchimpl", "runtime/session.py:1 imports torchimpl"),
        ("export/model", "from conformance.verdict import judge", "may import refimpl and torchimpl and nothing else"),
        ("conformance/report", "def f():\n    import runtime", "conformance/report.py:2 imports runtime"),
        ("conformance/adapters/x", "import runtime", "inside a function"),
    ],
)
def test_an_arrow_against_the_stream_is_named(tmp_path, file, text, named):
    (breach,) = layout.arrows(plant(tmp_path, {file: text}))
    assert named in breach


def test_a_relative_import_is_resolved(tmp_path):
    text = "from . import rope\nfrom .. import check\nfrom ..check import real\nfrom ...conformance import case"
    root = plant(tmp_path, {"refimpl/ops/gau": text})
    assert [name for name, _, _ in layout._imports(root / "refimpl/ops/gau.py", root)] == [
        "refimpl.ops",
        "refimpl",
        "refimpl.check",
        "conformance",
    ]
    (breach,) = layout.arrows(root)
    assert "gau.py:4 imports conformance. refimpl/ may import nothing else of this project" in breach


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("refimpl/ops/gau", "import torch", "may use jaxtyping, numpy, scipy"),
        ("refimpl/ops/gau", "def f():\n    import mpmath", "gau.py:2 imports mpmath"),
        ("refimpl/ops/gau", "from scipy import linalg", "inside the function that calls it"),
        ("conformance/case", "def f():\n    import onnx", "Only conformance/adapters/ may"),
        ("conformance/adapters/x", "import sklearn.decomposition", "an adapter imports what it adapts inside"),
        ("runtime/session", "def f():\n    import torch", "runtime/ must run without it"),
    ],
)
def test_a_package_in_the_wrong_folder_is_named(tmp_path, file, text, named):
    (breach,) = layout.third_parties(plant(tmp_path, {file: text}))
    assert named.lower() in breach.lower()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("refimpl/cli", "def f():\n    import typer"),
        ("refimpl/ops/gau", "def f():\n    from scipy import special"),
        ("conformance/case", "import mpmath, ml_dtypes, safetensors"),
        ("runtime/session", "import onnxruntime"),
    ],
)
def test_a_package_in_its_place_is_no_breach(tmp_path, file, text):
    assert layout.third_parties(plant(tmp_path, {file: text})) == []


def test_the_missing_twin_is_named(tmp_path):
    root = plant(tmp_path, {"refimpl/ops/gau": ""})
    assert [breach.partition(" is missing")[0] for breach in layout.same_path(root)] == [
        "conformance/ops/gau.py",
        "tests/refimpl/ops/test_gau.py",
    ]
    plant(root, {"conformance/ops/gau": "", "tests/refimpl/ops/test_gau": "", "refimpl/ops/_kept_apart": ""})
    assert layout.same_path(root) == []
    plant(root, {"tests/refimpl/ops/test_head": ""})
    assert [breach.partition(" is missing")[0] for breach in layout.same_path(root)] == [
        "refimpl/ops/head.py",
        "conformance/ops/head.py",
    ]


def test_a_folder_joins_the_same_path_rule_on_the_day_it_exists(tmp_path):
    root = plant(tmp_path, {"torchimpl/finetune": ""})
    assert layout.same_path(root) == []
    plant(root, {"torchimpl/ops/gau": ""})
    missing = {breach.partition(" is missing")[0] for breach in layout.same_path(root)}
    assert missing == {
        "torchimpl/ops/rope.py",
        "refimpl/ops/gau.py",
        "conformance/ops/gau.py",
        "tests/refimpl/ops/test_gau.py",
    }


def test_models_follow_the_same_path_rule(tmp_path):
    (first, second) = layout.same_path(plant(tmp_path, {"refimpl/models/roformer": ""}))
    assert first.startswith("conformance/models/roformer.py is missing: refimpl/models/roformer.py exists")
    assert second.startswith("tests/refimpl/models/test_roformer.py is missing")


def test_the_long_operator_file_is_named(tmp_path):
    assert layout.file_lengths(plant(tmp_path, {"refimpl/ops/rope": "x = 1\n" * 220})) == []
    (breach,) = layout.file_lengths(plant(tmp_path, {"refimpl/ops/rope": "x = 1\n" * 221}))
    assert "refimpl/ops/rope.py has 221 lines" in breach


@pytest.mark.parametrize("line", [f"x = '{A_HOME}'", A_HOME, f"see ({A_HOME}/x.npz)", f"a={A_HOME}"])
@pytest.mark.parametrize("versioned", [True, False])
def test_a_path_of_one_machine_is_named(tmp_path, line, versioned):
    root = plant(tmp_path, {"refimpl/check": f"# ok\n# {line}\n"})
    (root / "picture.bin").write_bytes(b"\xff\xfe" + A_HOME.encode())
    if versioned:
        (root / ".gitignore").write_text("out/\n")
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        (root / "out").mkdir()
        (root / "out" / "log.txt").write_text(A_HOME)
    (breach,) = layout.machine_paths(root)
    assert breach.startswith(f"refimpl/check.py:2 names {A_HOME.rsplit('/', 1)[0]}")


@pytest.mark.parametrize("line", ["https://example.org" + A_HOME, "../.." + A_HOME, "#!/usr/bin/env bash", "a / b"])
def test_an_address_is_no_path_of_one_machine(tmp_path, line):
    assert layout.machine_paths(plant(tmp_path, {"refimpl/check": line})) == []


def test_a_heavy_import_is_named(tmp_path):
    root = plant(tmp_path, {"refimpl/ops/rope": "import heavy_thing", "heavy_thing": ""})
    (breach,) = layout.import_weight(root)
    assert "loads heavy_thing" in breach


def test_a_judge_that_loads_what_it_judges_is_named(tmp_path):
    root = plant(tmp_path, {"conformance/case": "import helper", "helper": "import peft", "peft": ""})
    (breach,) = layout.judge_weight(root)
    assert "loads peft" in breach
    plant(root, {"conformance/case": "", "conformance/adapters/lora": "import peft"})
    assert layout.judge_weight(root) == []


def test_what_the_runtime_loads_by_a_detour_is_named(tmp_path):
    root = plant(tmp_path, {"onnx": "", "helper": "import onnx", "runtime/__init__": "", "runtime/x": "import helper"})
    (breach,) = layout.runtime_weight(root)
    assert "loads onnx" in breach
    plant(root, {"helper": ""})
    assert layout.runtime_weight(root) == []


def test_a_slow_import_is_named(tmp_path):
    root = plant(tmp_path, {"refimpl/__init__": "import time\ntime.sleep(0.06)"})
    (breach,) = layout.import_time(root, limit=0.05, tries=2)
    assert breach.startswith("`import refimpl` takes 0.0")
