"""Claim: streamed moments of 1,000,000 x 768 float64 rows at 0.7 or more of the rate of dsyrk itself, in O(d^2) memory.

    python benchmarks/whitening.py

The moments and the bare dsyrk over the same rows alternate, block by block, in one process; the ratio is that of
their times. The rows come from a pool much larger than the caches, so both read them from memory.
"""

import argparse
import resource
import time

import numpy as np
from scipy.linalg.blas import dsyrk

from refimpl.ops import whitening


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--block", type=int, default=8192, help="rows of a block of the stream")
    parser.add_argument("--pool", type=int, default=8, help="different blocks in memory, served round and round")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    pool = [rng.standard_normal((options.block, options.width)) * 1e-2 + 1e4 for _ in range(options.pool)]
    gram = np.zeros((options.width, options.width), order="F")
    spent = {"moments": 0.0, "dsyrk": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stream():
        """Blocks of the pool; the time that dsyrk takes between two of them is not the stream's."""
        nonlocal gram
        for start in range(0, options.rows, options.block):
            block = pool[start // options.block % options.pool][: options.rows - start]
            begin = time.perf_counter()
            gram = dsyrk(1.0, block.T, beta=1.0, c=gram, overwrite_c=1)
            spent["dsyrk"] += time.perf_counter() - begin
            yield block

    begin = time.perf_counter()
    m = whitening.moments_streamed(stream())
    spent["moments"] = time.perf_counter() - begin - spent["dsyrk"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    flops = options.rows * options.width * (options.width + 1)
    for name, taken in spent.items():
        print(f"{name}: {taken:.2f} s, {flops / taken / 1e9:.1f} GFLOP/s")
    print(f"ratio {spent['dsyrk'] / spent['moments']:.2f}; peak memory grew by {grown / 1024:.0f} MiB; {m.count} rows")
    sample = np.concatenate(pool)
    error = abs(m.scatter / m.count - np.cov(sample.T, bias=True)).max() / m.scatter.max() * m.count
    if options.rows % (options.block * options.pool) == 0:
        print(f"covariance differs from one shot by {error:.1e} of its largest entry")


if __name__ == "__main__":
    main()
