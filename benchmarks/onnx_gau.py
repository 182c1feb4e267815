"""Claim: a gated attention unit in ONNX Runtime runs at 0.75 or more of the rate of its own matrix products.

    python benchmarks/onnx_gau.py

gau.unit at batch 1, 512 tokens, width 768, expanded width 1536, key width 128, float32, 2 threads. Every round runs in
one process, one after the other: the unit with both kernels of the models, with and without a padding mask; a session
of the unit's four products and nothing else; the same four products in NumPy. Rates count the operations of the four
products only, so the ratio is that of the times. Ratios are formed within a round, and their median is printed.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

THREADS = 2
# Before NumPy is imported: its products are to have as many threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

from export import graph  # noqa: E402
from export.ops import attention_kernel, gau, rope  # noqa: E402

N, D, E, S = 512, 768, 1536, 128
OPERATIONS = 2 * N * (D * (2 * E + S) + N * S + N * E + E * D)
KERNELS = {
    "squared_relu_visible": attention_kernel.squared_relu_visible,
    "softmax_plus": partial(attention_kernel.softmax_plus, n_min=16),
}


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"w_in": (D, 2 * E + S), "gamma_q": (S,), "gamma_k": (S,), "w_out": (E, D)}
    return {name: (rng.standard_normal(shape) / 28).astype(np.float32) for name, shape in shapes.items()}


def unit(arrays: dict[str, np.ndarray], kernel: Callable, examples: dict[str, np.ndarray], *, opset: int) -> bytes:
    """The model: weights inside, x and, where there is one, the mask (b, 1, n) outside."""

    def call(x: graph.Value, mask: graph.Value | None = None) -> graph.Value:
        w_in, gamma_q, gamma_k, w_out = (graph.initializer(name, array) for name, array in arrays.items())
        positions, theta = graph.arange(x.size(1)), rope.frequencies(S, base=10000.0)
        return gau.unit(
            x, mask, None, positions, theta, w_in, None, gamma_q, None, gamma_k, None, w_out, None,
            rotate=rope.rotate_interleaved, kernel=kernel,
        )  # fmt: skip

    return graph.build(call, examples, opset=opset).model.SerializeToString()


def products(arrays: dict[str, np.ndarray], examples: dict[str, np.ndarray]) -> bytes:
    """The four products alone, of operands of the unit's sizes; the weights are inside as well."""

    def call(x: graph.Value, q: graph.Value, k: graph.Value, a: graph.Value, v: graph.Value) -> tuple:
        w_in, w_out = graph.initializer("w_in", arrays["w_in"]), graph.initializer("w_out", arrays["w_out"])
        return x @ w_in, q @ k, a @ v, v @ w_out

    return graph.build(call, examples, opset=20).model.SerializeToString()


def session(model: bytes, *, profile: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    # Several sessions in one process: the threads of one must not spin while another is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def print_profile(model: bytes, feeds: dict[str, np.ndarray], runs: int = 20) -> None:
    """Milliseconds of one run by operator."""
    with TemporaryDirectory() as folder:
        profiled = session(model, profile=str(Path(folder) / "gau"))
        for _ in range(runs):
            profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            shapes = " ".join("x".join(map(str, *s.values())) for s in event["args"]["output_type_shape"])
            spent[f"{event['args']['op_name']} {shapes}"].append(event["dur"] / 1e3)
    for name, taken in sorted(spent.items(), key=lambda item: -sum(item[1])):
        print(f"  {name:40s} {len(taken) // runs:2d} x {median(taken):7.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--opset", type=int, default=23, choices=graph.OPSETS)
    parser.add_argument("--profile", action="store_true", help="print where the time of each unit goes")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    arrays = weights(rng)
    x = rng.standard_normal((1, N, D)).astype(np.float32)
    mask = np.arange(N)[None, None] < N - 30
    shapes = {"x": (1, N, D), "q": (1, N, S), "k": (1, S, N), "a": (1, N, N), "v": (1, N, E)}
    operands = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    models, feeds = {}, {}
    for name, kernel in KERNELS.items():
        for label, given in ((name, {"x": x}), (f"{name}, mask", {"x": x, "mask": mask})):
            models[label], feeds[label] = unit(arrays, kernel, given, opset=options.opset), given
    runs = {label: partial(session(model).run, None, feeds[label]) for label, model in models.items()}
    runs["products in ONNX Runtime"] = partial(session(products(arrays, operands)).run, None, operands)

    def by_numpy() -> None:
        for one, other in (("x", "w_in"), ("q", "k"), ("a", "v"), ("v", "w_out")):
            operands[one][0] @ (arrays[other] if other in arrays else operands[other][0])

    runs["products in NumPy"] = by_numpy
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for round_ in range(options.rounds + 3):
        for label, run in runs.items():
            begin = time.perf_counter()
            run()
            # The first rounds warm up.
            if round_ >= 3:
                taken[label].append(time.perf_counter() - begin)
        # NumPy's threads go on spinning for tens of milliseconds, at the cost of what comes next.
        time.sleep(0.1)

    baselines = ("products in ONNX Runtime", "products in NumPy")
    print(f"{OPERATIONS / 1e9:.2f} GFLOP, {THREADS} threads, opset {options.opset}, {options.rounds} rounds; medians")
    print(f"{'':28s}      ms  GFLOP/s  of ONNX Runtime's products  of NumPy's")
    for label, times in taken.items():
        ratios = [median(b / t for b, t in zip(taken[base], times, strict=True)) for base in baselines]
        rate = OPERATIONS / median(times) / 1e9
        print(f"{label:28s} {median(times) * 1e3:7.2f}  {rate:7.1f}  {ratios[0]:26.2f}  {ratios[1]:10.2f}")
    for label in models if options.profile else ():
        print(label)
        print_profile(models[label], feeds[label])


if __name__ == "__main__":
    main()
