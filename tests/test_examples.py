"""What users copy runs: adapters are judged, property tests pass, and the failing one shows its counter-example."""

import re
import subprocess
import sys
from pathlib import Path

from conformance import report, runner

EXAMPLES = Path(__file__).parent.parent / "examples"
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def pytest_of(name):
    """Run one example in a process of its own, as a user does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(EXAMPLES),
        "--import-mode=prepend",
    ]
    return subprocess.run([*command, str(EXAMPLES / name)], capture_output=True, text=True, cwd=EXAMPLES)


def test_the_adapter_of_the_readme_passes_and_is_short():
    assert len((EXAMPLES / "my_rope.py").read_text().splitlines()) <= 15
    run = runner.check(f"python:{EXAMPLES / 'my_rope.py'}")
    assert run.ok, [runner.message(v) for v in run.failures]


def test_the_wrong_adapter_fails_and_its_bug_is_named():
    run = runner.check(f"python:{EXAMPLES / 'wrong_rope.py'}")
    assert not run.ok
    assert any("clipped at 2047" in bug for v in run.failures for bug in v.equals)
    assert "rope.rotate_interleaved" in report.markdown(run)


def test_property_tests_of_a_user_pass():
    done = pytest_of("test_my_rope.py")
    assert done.returncode == 0, done.stdout


def test_a_failing_law_shows_the_shrunk_case():
    done = pytest_of("failing_rope.py")
    assert done.returncode == 1
    for part in ("test_impulse_response(", "LawFailed", "law impulse_response"):
        assert part in done.stdout


def section(title):
    """The Python blocks and the `refimpl` commands of a section of the README, in order."""
    text = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    made = []
    for language, block in re.findall(r"```(python)?\n(.*?)```", text, flags=re.DOTALL):
        if language:
            made.append([sys.executable, "-c", block])
        else:
            lines = [line.partition("#")[0].split() for line in block.splitlines()]
            made += [[sys.executable, "-m", "refimpl.cli", *line[1:]] for line in lines]
    return made


def test_a_model_as_the_readme_trains_exports_and_serves_it(tmp_path):
    for command in section("A model: train, export, serve"):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip("[]\n ").split("]\n [")
    # The first row holds a 7, the second does not.
    assert float(first.split()[1]) > float(first.split()[0])
    assert float(second.split()[1]) < float(second.split()[0])


def test_the_operators_as_the_readme_calls_them(tmp_path):
    commands = section("The operators in PyTorch and in ONNX") + section("In Python")
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "rms_norm.onnx").is_file() and (tmp_path / "out" / "gau_unit.onnx").is_file()
