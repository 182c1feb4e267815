"""How long the judge takes: `refimpl check spec` over everything, and `import refimpl`."""

import subprocess
import sys
import time


def seconds(*command: str) -> float:
    """Wall-clock time of one process that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    python = sys.executable
    imports = [seconds(python, "-c", "import refimpl") for _ in range(7)]
    empty = [seconds(python, "-c", "pass") for _ in range(7)]
    print(f"import refimpl: {min(imports):.3f} s (an empty interpreter: {min(empty):.3f} s)")
    print(f"refimpl check spec: {seconds(python, '-m', 'conformance', 'check', 'spec'):.1f} s")
    print(f"refimpl vectors verify: {seconds(python, '-m', 'conformance', 'vectors', 'verify'):.1f} s")


if __name__ == "__main__":
    main()
