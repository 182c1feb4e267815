"""Is an exported graph the model that the specification means? Every output, over lengths, batches and masks.

The float64 twin of the graph in onnx's ReferenceEvaluator, then the file itself in ONNX Runtime, as it is used. An
error is a share of the largest element of the expected output: at most 1e-12 in float64 and 5e-6 in float32, or, for
a model that amplifies roundings, MARGIN times what one rounding of every weight changes.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

# Error that any model may show, as a share of the largest element of the output; roundoff of the format.
BOUNDS = {"float64": 1e-12, "float32": 5e-6}
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}
# Runs in float32 were 0.6 to 2.3 times as far off as the specification with every weight one rounding away.
MARGIN = 16
# Relative change of every weight by which the sensitivity is measured: large against float64, small against float32.
PROBE = 2.0**-30
# One token, two, lengths beside the borders that a power of two may set somewhere, and a long one.
LENGTHS = (1, 2, 63, 64, 65)
LONG = 512

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
    # The output, length, batch and mask where the error came nearest to its bound.
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
    moved = sensitivity(forward, config, weights, asked, expected)
    return tuple(
        compare(
            runtime,
            dtype,
            run,
            asked,
            expected,
            bounds={
                name: max(BOUNDS[dtype], MARGIN * ROUNDOFF[dtype] * share)
                for name, share in zip(names, moved, strict=True)
            },
        )
        for (runtime, dtype), run in runs.items()
    )


def sensitivity(
    forward: Callable[..., Sequence[np.ndarray]],
    config: Any,
    weights: Mapping[str, np.ndarray],
    asked: Sequence[Case],
    expected: Sequence[Sequence[np.ndarray]],
) -> list[float]:
    """For each output: the largest relative change per relative change of all weights, each up or down at random."""
    drawn = np.random.default_rng(0)
    moved = {name: array * (1 + PROBE * drawn.choice([-1, 1], array.shape)) for name, array in weights.items()}
    found = [
        [
            _relative(now, before) / PROBE
            for now, before in zip(forward(moved, **c.inputs, config=config), e, strict=True)
        ]
        for c, e in zip(asked, expected, strict=True)
    ]
    return [max(shares) for shares in zip(*found, strict=True)]


def compare(
    runtime: str,
    dtype: str,
    run: Callable[[Inputs], Sequence[np.ndarray]],
    asked: Sequence[Case],
    expected: Sequence[Sequence[np.ndarray]],
    *,
    bounds: Mapping[str, float],
) -> Parity:
    """The error of `run` over all requests that comes nearest to its bound. bounds: one for each output, in order.

    Raises: ParityError as `check`.
    """
    nearest, worst, bound, where = 0.0, 0.0, max(bounds.values()), "nowhere: equal bit for bit"
    for case, references in zip(asked, expected, strict=True):
        for (name, allowed), received, reference in zip(bounds.items(), run(case.inputs), references, strict=True):
            place = f"{name}, {case.name}"
            if received.shape != reference.shape:
                raise ParityError(
                    f"export: {runtime}: {place}: shape {received.shape}, the specification has {reference.shape}"
                )
            error = _relative(received, reference)
            # Not a number fails as well.
            if not error <= allowed:
                raise ParityError(
                    f"export: {runtime} ({dtype}): {place}: the error is {error:.2g} of the largest element, the bound "
                    f"{allowed:.1e}"
                )
            if error / allowed > nearest:
                nearest, worst, bound, where = error / allowed, error, allowed, place
    return Parity(runtime, dtype, len(asked), float(f"{bound:.1e}"), float(f"{worst:.1e}"), where)


def cases(config: Any) -> Iterator[Case]:
    """Random ids at every length, for one row with all tokens real, with a padded tail, one token, none; for all four.

    Lengths beside the borders of chunks join where the model has chunks; the long one has only real tokens.
    """
    chunk = getattr(config, "chunk", 0)
    beside = (chunk - 1, chunk, chunk + 1, 2 * chunk + 1) if chunk else ()
    for n in sorted({n for n in (*LENGTHS, *beside, LONG) if n >= 1}):
        drawn = np.random.default_rng(n)
        at = np.arange(n)
        masks = {"every token": at < n}
        if n != LONG:
            # The one token is in the middle: a mask is not only how many tokens there are.
            masks |= {"all but a tail": at < (n + 1) // 2, "one token": at == n // 2, "no token": at < 0}
            masks["each"] = np.stack(list(masks.values()))
        for name, mask in masks.items():
            mask = np.atleast_2d(mask)
            token_ids = drawn.integers(0, config.vocab_size, mask.shape)
            segment_ids = drawn.integers(0, config.segments, mask.shape)
            inputs = {"token_ids": token_ids, "segment_ids": segment_ids, "mask": mask}
            yield Case(f"length {n}, batch {len(mask)}, mask: {name}", inputs)


def _relative(received: np.ndarray, reference: np.ndarray) -> float:
    largest = float(np.abs(reference).max(initial=0.0))
    error = float(np.abs(received - reference).max(initial=0.0))
    return error / largest if largest else error
