"""Claim: mixed chunk attention in ONNX Runtime takes at most 2.2 times as long for 16,000 tokens as for 8,000.

    python benchmarks/onnx_mixed_chunk.py

And from 8,000 tokens on it is at least 8 times faster than full quadratic attention. Batch 1, key width 128, value
width 1536, float32, 2 threads, one graph for all lengths: bidirectional; causal with the prefix sum as CumSum, MatMul
and Scan; quadratic attention (scores, squared ReLU, values, no mask). Lengths and graphs alternate in one process,
ratios are formed within a round, and their median is printed. The peak of memory is that of a process of its own.
"""

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from statistics import median

import numpy as np
import onnxruntime

from export import graph
from export.ops import attention_kernel
from export.ops import mixed_chunk_attention as mca

THREADS, S, E = 2, 128, 1536
LENGTHS = (512, 1000, 2000, 4000, 8000, 16000)
MIXED = ("bidirectional", "causal", "causal_matmul_prefix", "causal_scan")
QUADRATIC = "quadratic"


def quadratic(q_quad: graph.Value, k_quad: graph.Value, v: graph.Value) -> graph.Value:
    scores = (q_quad * S**-0.5) @ k_quad.swap(-1, -2)
    return attention_kernel.squared_relu_array(scores, None) @ v


def session(name: str, chunk: int) -> onnxruntime.InferenceSession:
    examples = tokens(3)
    if name == QUADRATIC:
        call = quadratic
        examples = {key: examples[key] for key in ("q_quad", "k_quad", "v")}
    else:
        kernel = partial(attention_kernel.squared_relu_constant, length=1)
        rule = {"chunk": chunk, "scale": S**-0.5, "kernel": kernel, "normaliser": mca.visible}
        call = partial(getattr(mca, name), **rule)
    model = graph.build(call, examples, opset=20).model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    # Several sessions in one process: the threads of one must not spin while another is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def tokens(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    widths = {"q_quad": S, "k_quad": S, "q_lin": S, "k_lin": S, "v": E}
    return {name: rng.standard_normal((1, n, width), np.float32) for name, width in widths.items()}


def run(made: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return made.run(None, {i.name: arrays[i.name] for i in made.get_inputs()})[0]


def peak() -> float:
    """MiB; not ru_maxrss, which begins with what the parent had."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def print_peak(name: str, n: int, chunk: int) -> None:
    made, arrays = session(name, chunk), tokens(n)
    before = peak()
    begin = time.perf_counter()
    run(made, arrays)
    print(peak() - before, time.perf_counter() - begin)


def measured_peak(name: str, n: int, chunk: int) -> tuple[float, float]:
    """Peak above the inputs in MiB, and seconds of that first run, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(n), "--chunk", str(chunk)]
    grown, spent = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(grown), float(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quadratic-rounds", type=int, default=3, help="rounds that time quadratic attention too")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "N"), help="print the peak memory of one case and stop")
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), options.chunk)
        return

    sessions = {name: session(name, options.chunk) for name in (*MIXED, QUADRATIC)}
    inputs = {n: tokens(n) for n in LENGTHS}
    one, *others = (run(sessions[name], inputs[1000]) for name in MIXED[1:])
    print(f"the prefix sums agree to {max(abs(other - one).max() for other in others) / abs(one).max():.1e}")
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for round_ in range(options.rounds + 1):
        for n, arrays in inputs.items():
            for name, made in sessions.items():
                # 16,000 squared is a map of 1 GB: run once, in a process of its own.
                if name == QUADRATIC and (n > 8000 or round_ > options.quadratic_rounds):
                    continue
                begin = time.perf_counter()
                run(made, arrays)
                # The first round warms up.
                if round_:
                    taken[name, n].append(time.perf_counter() - begin)
    sessions.clear()

    def ratio(one: tuple[str, int], other: tuple[str, int]) -> float:
        return median(a / b for a, b in zip(taken[one], taken[other], strict=False))

    print(f"chunks of {options.chunk}, {THREADS} threads, {options.rounds} rounds; medians in ms")
    print(f"{'':22s}" + "".join(f"{n:>9d}" for n in LENGTHS) + "   16000/8000")
    for name in (*MIXED, QUADRATIC):
        cells = "".join(f"{median(taken[name, n]) * 1e3:9.1f}" if taken[name, n] else " " * 9 for n in LENGTHS)
        print(f"{name:22s}{cells}" + (f"{ratio((name, 16000), (name, 8000)):13.2f}" if name != QUADRATIC else ""))
    print("quadratic over mixed, and variants over CumSum")
    for name in MIXED:
        cells = "".join(f"{ratio((QUADRATIC, n), (name, n)):9.2f}" for n in LENGTHS[:-1])
        variant = f"{ratio((name, 16000), ('causal', 16000)):13.2f} x causal at 16000" if "_" in name else ""
        print(f"{name:22s}{cells}{variant}")
    print("peak memory above the inputs in MiB, and ms of that first run; v itself has 47 and 94 MiB")
    for name in (*MIXED, QUADRATIC):
        found = [measured_peak(name, n, options.chunk) for n in (8000, 16000)]
        print(f"{name:22s}" + "".join(f"{n:9d}: {grown:6.0f} MiB {spent * 1e3:6.0f} ms" for n, (grown, spent) in
                                      zip((8000, 16000), found, strict=True)))  # fmt: skip


if __name__ == "__main__":
    main()
