"""What users copy runs: adapters are judged, property tests pass, and the failing one shows its counter-example."""

import subprocess
import sys
from pathlib import Path

from conformance import report, runner

EXAMPLES = Path(__file__).parent.parent / "examples"


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
