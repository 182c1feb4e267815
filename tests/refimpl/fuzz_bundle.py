"""More damaged checkpoints than a test run has time for: python tests/refimpl/fuzz_bundle.py --inputs 20000

Every input is one seed of `judge` in test_bundle.py, so that --first SEED --inputs 1 repeats the one that failed. The
exit status is 1 if any did.
"""

import argparse
import collections
import sys
import tempfile
import time
import traceback
from pathlib import Path

# This folder comes first on the path of a script that lies in it.
import test_bundle

from refimpl import bundle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    asked = parser.parse_args()
    bundle.crc32c(bytes(1 << 20))
    counts, failed, start = collections.Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for done in range(1, asked.inputs + 1):
            seed = asked.first + done - 1
            try:
                counts[test_bundle.judge(Path(folder), seed)] += 1
            except Exception:
                traceback.print_exc()
                failed.append(seed)
            if done % 1000 == 0 or done == asked.inputs:
                seconds = time.monotonic() - start
                print(f"{done} of {asked.inputs} inputs, {len(failed)} failures, {seconds:.0f} s", flush=True)
    for level in test_bundle.LEVELS:
        print(f"{level:12} refused {counts[level, 'refused']:6}   read {counts[level, 'read']:6}")
    if failed:
        print(f"failed: seeds {', '.join(map(str, failed[:20]))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
