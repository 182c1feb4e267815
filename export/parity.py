"""Is an exported graph the model that the specification means? Every output, over lengths, batches and masks.

float64: the graph in onnx's ReferenceEvaluator, within 1e-12 of the largest element of the expected output.
The file itself, in ONNX Runtime as it is used: within 5e-6 of it in float32, within 1e-12 in float64.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

# Largest error allowed, as a share of the largest element of the output.
BOUNDS = {"float64": 1e-12, "float32": 5e-6}
# One token, two, and lengths beside the borders that a power of two may set somewhere.
LENGTHS = (1, 2, 63, 64, 65)

Inputs = Mapping[str, np.ndarray]


class ParityError(ValueError):
    """A graph that does not compute what the specification says."""


class Parity(NamedTuple):
    """What was run, in which format, on how many inputs; the worst error as a share of the largest element."""

    runtime: str
    dtype: str
    cases: int
    bound: float
    worst: float
    # The output, length, batch and mask where it was found.
    where: str


class Case(NamedTuple):
    """One request and what it is called."""

    name: str
    inputs: Inputs


def check(
    model: onnx.ModelProto, twin: onnx.ModelProto, config: Any, weights: Mapping[str, np.ndarray]
) -> tuple[Parity, ...]:
    """The float64 `twin` in the ReferenceEvaluator, then `model` in ONNX Runtime, against refimpl.models.

    weights: those of the graphs, in float64.

    Raises: ParityError for the first output that leaves its bound, with the request that shows it.
    """
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    forward = importlib.import_module(f"refimpl.models.{config.model}").forward
    asked = list(cases(config))
    expected = [forward(weights, **case.inputs, config=config) for case in asked]
    kind = onnx.helper.tensor_dtype_to_np_dtype(model.graph.output[0].type.tensor_type.elem_type).name
    options = onnxruntime.SessionOptions()
    # The order of sums, and with it the last digit of what is written into the file, depends on the threads.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(twin)
    runs: dict[tuple[str, str], Callable[[Inputs], Sequence[np.ndarray]]] = {
        (f"onnx {onnx.__version__} ReferenceEvaluator", "float64"): lambda i: evaluator.run(None, dict(i)),
        (f"onnxruntime {onnxruntime.__version__}", kind): lambda i: session.run(None, dict(i)),
    }
    names = [output.name for output in model.graph.output]
    return tuple(compare(runtime, dtype, run, asked, expected, names=names) for (runtime, dtype), run in runs.items())


def compare(
    runtime: str,
    dtype: str,
    run: Callable[[Inputs], Sequence[np.ndarray]],
    asked: Sequence[Case],
    expected: Sequence[Sequence[np.ndarray]],
    *,
    names: Sequence[str],
) -> Parity:
    """The worst error of `run` over all requests.

    Raises: ParityError as `check`.
    """
    worst, where = 0.0, "nowhere: equal bit for bit"
    for case, references in zip(asked, expected, strict=True):
        for name, received, reference in zip(names, run(case.inputs), references, strict=True):
            place = f"{name}, {case.name}"
            if received.shape != reference.shape:
                raise ParityError(
                    f"export: {runtime}: {place}: shape {received.shape}, the specification has {reference.shape}"
                )
            error = _relative(received, reference)
            # Not a number fails as well.
            if not error <= BOUNDS[dtype]:
                raise ParityError(
                    f"export: {runtime} ({dtype}): {place}: the error is {error:.2g} of the largest element, the bound "
                    f"{BOUNDS[dtype]:.0e}"
                )
            if error > worst:
                worst, where = error, place
    return Parity(runtime, dtype, len(asked), BOUNDS[dtype], float(f"{worst:.1e}"), where)


def cases(config: Any) -> Iterator[Case]:
    """Random ids at every length, for one row with all tokens real, with a padded tail, with one token; for all three.

    Lengths beside the borders of chunks join where the model has chunks.
    """
    chunk = getattr(config, "chunk", 0)
    beside = (chunk - 1, chunk, chunk + 1, 2 * chunk + 1) if chunk else ()
    for n in sorted({n for n in (*LENGTHS, *beside) if n >= 1}):
        drawn = np.random.default_rng(n)
        at = np.arange(n)
        masks = {"none": at[None] < n, "a tail": at[None] < (n + 1) // 2, "one token": at[None] < 1}
        masks["each"] = np.concatenate(list(masks.values()))
        for name, mask in masks.items():
            token_ids = drawn.integers(0, config.vocab_size, mask.shape)
            segment_ids = drawn.integers(0, config.segments, mask.shape)
            inputs = {"token_ids": token_ids, "segment_ids": segment_ids, "mask": mask}
            yield Case(f"length {n}, batch {len(mask)}, mask: {name}", inputs)


def _relative(received: np.ndarray, reference: np.ndarray) -> float:
    largest = float(np.abs(reference).max(initial=0.0))
    error = float(np.abs(received - reference).max(initial=0.0))
    return error / largest if largest else error
