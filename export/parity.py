"""Is an exported graph the model that the specification means? Every output, over lengths, batches and masks.

The float64 twin of the graph in onnx's ReferenceEvaluator, then the file itself in ONNX Runtime, as it is used. An
error is a share of the largest finite element of the expected output, of this request or of the median one, whichever
is larger (a single logit may be near 0 by chance), and infinities must stand where they are expected. It is at most
1e-12 in float64 and 5e-6 in float32, or, for a model that amplifies roundings, MARGIN times what one rounding of every
weight changes. Where that is more than the ceiling of the format, nothing could be told from the comparison, and the
model is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from refimpl import model as specification
from refimpl.model import Model

# Error that any model may show, as a share of the largest element of the output; roundoff of the format.
BOUNDS = {"float64": 1e-12, "float32": 5e-6}
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}
# Runs in float32 were 0.6 to 2.3 times as far off as the specification with every weight one rounding away.
MARGIN = 16
# The largest bound that still tells a right graph from a wrong one. In float32 it is reached where one rounding of
# every weight moves an output by 6e-4 of its largest element, 10,500 roundings: the file would be right and its second
# digit in doubt. What is wrong in graphs in practice (a mask, a position, a norm, a floor of a count) moves outputs by
# more than 1e-2. In float64 the smallest thing that is told apart is an epsilon of 1e-12 for one of 1e-7, which moves
# vectors of unit scale by 5e-8; 1e-9 is below it by a factor of 50, and is reached at 560,000 roundings.
CEILINGS = {"float64": 1e-9, "float32": 1e-2}
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
    graph: onnx.ModelProto, twin: onnx.ModelProto, model: Model, weights: Mapping[str, np.ndarray]
) -> tuple[Parity, ...]:
    """The float64 `twin` in the ReferenceEvaluator, then `graph` in ONNX Runtime, against refimpl.model.

    weights: those of the graphs, in float64; the twin need not hold them.

    Raises: ParityError for the first output that leaves its bound, with the request that shows it, and for a model
        that amplifies roundings by so much that a bound would pass its ceiling.
    """
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    def forward(weights: Mapping[str, np.ndarray], inputs: Inputs) -> tuple[np.ndarray, ...]:
        return tuple(specification.forward(weights, **inputs, model=model).values())

    asked = list(cases(model))
    expected = [forward(weights, case.inputs) for case in asked]
    kind = onnx.helper.tensor_dtype_to_np_dtype(graph.graph.output[0].type.tensor_type.elem_type).name
    options = onnxruntime.SessionOptions()
    # The order of sums, and with it the last digit of what is written into the file, depends on the threads.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(twin)
    beside = {} if twin.graph.initializer else dict(weights)
    runs: dict[tuple[str, str], Callable[[Inputs], Sequence[np.ndarray]]] = {
        (f"onnx {onnx.__version__} ReferenceEvaluator", "float64"): lambda i: evaluator.run(None, {**beside, **i}),
        (f"onnxruntime {onnxruntime.__version__}", kind): lambda i: session.run(None, dict(i)),
    }
    names = specification.outputs(model)
    moved = sensitivity(forward, weights, asked, expected)
    allowed = {dtype: bounds(dtype, dict(zip(names, moved, strict=True))) for _, dtype in runs}
    return tuple(
        compare(runtime, dtype, run, asked, expected, bounds=allowed[dtype]) for (runtime, dtype), run in runs.items()
    )


def bounds(dtype: str, moved: Mapping[str, float]) -> dict[str, float]:
    """The error that each output may show in a format, from its sensitivity.

    Raises: ParityError where that is more than the ceiling of the format.
    """
    amplified = {name: MARGIN * ROUNDOFF[dtype] * share for name, share in moved.items()}
    # Not a number is no smaller than the floor, and beyond every ceiling.
    made = {name: BOUNDS[dtype] if bound <= BOUNDS[dtype] else bound for name, bound in amplified.items()}
    for name, bound in made.items():
        if not bound <= CEILINGS[dtype]:
            raise ParityError(
                f"export: the model amplifies roundings: {name} moves {moved[name]:.2g} times as much as its weights, "
                f"so that a right {dtype} graph may be {bound:.1e} of the largest element off and a wrong one could "
                f"not be told (ceiling {CEILINGS[dtype]:g}). In {dtype} this model can be neither verified nor relied "
                "on" + ("; --dtype float64 may do" if dtype == "float32" else "")
            )
    return made


def sensitivity(
    forward: Callable[[Mapping[str, np.ndarray], Inputs], Sequence[np.ndarray]],
    weights: Mapping[str, np.ndarray],
    asked: Sequence[Case],
    expected: Sequence[Sequence[np.ndarray]],
) -> list[float]:
    """For each output: the largest relative change per relative change of all weights, each up or down at random."""
    drawn = np.random.default_rng(0)
    moved = {name: array * (1 + PROBE * drawn.choice([-1, 1], array.shape)) for name, array in weights.items()}
    found = [
        [_share(now, before, scale) / PROBE for now, before, scale in zip(forward(moved, c.inputs), e, s, strict=True)]
        for c, e, s in zip(asked, expected, scales(expected), strict=True)
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
    for case, references, sizes in zip(asked, expected, scales(expected), strict=True):
        given = run(case.inputs)
        if not len(given) == len(references) == len(bounds):
            raise ParityError(
                f"export: {runtime}: {case.name}: {len(given)} outputs, the specification has {len(references)}: "
                f"{', '.join(bounds)}"
            )
        parts = zip(bounds.items(), given, references, sizes, strict=True)
        for (name, allowed), received, reference, scale in parts:
            place = f"{name}, {case.name}"
            if received.shape != reference.shape:
                raise ParityError(
                    f"export: {runtime}: {place}: shape {received.shape}, the specification has {reference.shape}"
                )
            error = _share(received, reference, scale)
            # Not a number fails as well.
            if not error <= allowed:
                raise ParityError(
                    f"export: {runtime} ({dtype}): {place}: the error is {error:.2g} of the largest element, the bound "
                    f"{allowed:.1e}"
                )
            if error / allowed > nearest:
                nearest, worst, bound, where = error / allowed, error, allowed, place
    return Parity(runtime, dtype, len(asked), float(f"{bound:.1e}"), float(f"{worst:.1e}"), where)


def cases(model: Model) -> Iterator[Case]:
    """Random ids at every length, for one row with all tokens real, with a padded tail, one token, none; for all four.

    Lengths beside the borders of chunks join where the model has chunks; the long one has only real tokens. Where the
    model chooses, a row is a question of one choice, and all four with two of them again are two questions of three.
    """
    config = model.config
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
            if model.choosing:
                mask = mask[None] if len(mask) == 1 else mask[[0, 1, 2, 3, 1, 0]].reshape(2, 3, n)
            token_ids = drawn.integers(0, config.vocab_size, mask.shape)
            segment_ids = drawn.integers(0, config.segments, mask.shape)
            inputs = {"token_ids": token_ids, "segment_ids": segment_ids, "mask": mask}
            batch = " x ".join(map(str, mask.shape[:-1]))
            yield Case(f"length {n}, batch {batch}, mask: {name}", inputs)


def scales(expected: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
    """For each request and output the size that errors are a share of; 1 where everything expected is 0."""
    largest = np.array([[np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in request] for request in expected])
    found = np.maximum(largest, np.median(largest, axis=0))
    made: list[list[float]] = np.where(found == 0, 1.0, found).tolist()
    return made


def _share(received: np.ndarray, reference: np.ndarray, scale: float) -> float:
    # Infinities that are expected are equal, and no difference of two of them is formed.
    with np.errstate(invalid="ignore"):
        error = np.where(received == reference, 0.0, np.abs(received - reference))
    return float(error.max(initial=0.0)) / scale
