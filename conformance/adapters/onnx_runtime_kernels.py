"""ONNX Runtime's own CPU kernels, one node a graph, with graph optimisation off.

Opset and IR version are pinned below what the newest onnx writes: the runtime refuses files newer than itself.
Attributes of ONNX are float32: an epsilon or a scale that float32 does not hold is declined in float64.
A second implementation writes the root-mean-square norm out in primitives and leaves optimisation at its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.budget import Profile
from conformance.case import Function, Unsupported

OPSET, IR_VERSION = 23, 10
CONTRIB = "com.microsoft"

# (operator, domain, attributes) -> one node of a graph.
Node = tuple[str, str, tuple[tuple[str, Any], ...]]


def node(kind: str, domain: str = "", **attributes: Any) -> Node:
    return kind, domain, tuple(sorted(attributes.items()))


def evaluate(made: Node, *inputs: np.ndarray | None, outputs: int = 1) -> Any:
    """The outputs of a one-node graph; None leaves an optional input out."""
    for name, value in made[2] if any(x is not None and x.dtype == np.float64 for x in inputs) else ():
        if isinstance(value, float) and float(np.float32(value)) != value:
            raise Unsupported(f"attributes of ONNX are float32, and {name}={value:g} is not one")
    kinds = tuple(None if x is None else (x.dtype.name, x.ndim) for x in inputs)
    results = _session(made, kinds, outputs).run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})
    return results[0] if outputs == 1 else tuple(results)


@lru_cache(maxsize=1024)
def _session(made: Node, kinds: tuple[tuple[str, int] | None, ...], outputs: int) -> Any:
    from onnx import helper

    kind, domain, attributes = made
    names = ["" if k is None else f"x{i}" for i, k in enumerate(kinds)]
    results = [f"y{i}" for i in range(outputs)]
    nodes = [helper.make_node(kind, names, results, domain=domain, **dict(attributes))]
    dtype = next(k[0] for k in kinds if k is not None)
    return _load(nodes, {n: k for n, k in zip(names, kinds, strict=True) if k is not None}, results, dtype)


def _load(
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[str, int]],
    outputs: Sequence[str],
    dtype: str,
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    optimised: bool = False,
) -> Any:
    """A session of its own for a graph whose sizes stay open."""
    import onnxruntime
    from onnx import helper, numpy_helper

    def value(name: str, kind: str, rank: int | None) -> Any:
        shape = None if rank is None else [f"{name}_{axis}" for axis in range(rank)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)

    graph = helper.make_graph(
        list(nodes),
        "one",
        [value(name, *kind) for name, kind in inputs.items()],
        [value(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# Activations.
def relu(x: np.ndarray) -> np.ndarray:
    return evaluate(node("Relu"), x)


def silu(x: np.ndarray) -> np.ndarray:
    return evaluate(node("QuickGelu", CONTRIB, alpha=1.0), x)


def gelu(x: np.ndarray, *, approximate: str) -> np.ndarray:
    return evaluate(node("Gelu", approximate=approximate), x)


# Norms.
def rms_norm(x: np.ndarray, epsilon: float, scale: np.ndarray | None = None) -> np.ndarray:
    scale = np.ones(x.shape[-1], x.dtype) if scale is None else scale
    return evaluate(node("RMSNormalization", epsilon=epsilon), x, scale)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    return evaluate(node("LayerNormalization", epsilon=epsilon), x, scale, bias)


# Rotary embedding, with tables of exact angles.
def rotate(
    x: np.ndarray, positions: np.ndarray, base: float, layout: str, rotary_width: int | None = None
) -> np.ndarray:
    b, n, h, d = x.shape
    width = d if rotary_width is None else rotary_width
    phi = _angles(positions, width, base, (b, n))
    made = node("RotaryEmbedding", interleaved=int(layout == "interleaved"), num_heads=h, rotary_embedding_dim=width)
    y = evaluate(made, x.reshape(b, n, h * d), np.cos(phi).astype(x.dtype), np.sin(phi).astype(x.dtype))
    return y.reshape(x.shape)


def rotate_proportional(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int) -> np.ndarray:
    b, n, h, d = x.shape
    # The pairs that pass through turn by an angle of zero.
    phi = _angles(positions, d, base, (b, n)) * (np.arange(d // 2) < rotary_width // 2)
    made = node("RotaryEmbedding", interleaved=0, num_heads=h)
    y = evaluate(made, x.reshape(b, n, h * d), np.cos(phi).astype(x.dtype), np.sin(phi).astype(x.dtype))
    return y.reshape(x.shape)


def _angles(positions: np.ndarray, width: int, base: float, rows: tuple[int, int]) -> np.ndarray:
    theta = base ** (-2.0 * np.arange(width // 2) / max(width, 1))
    return np.broadcast_to(positions[..., None] * theta, (*rows, width // 2))


# Attention.
def softmax(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    visible = scores if mask is None else np.where(mask, scores, scores.dtype.type(-np.inf))
    return evaluate(node("Softmax", axis=-1), visible)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, kernel: str, scale: float
) -> np.ndarray:
    if kernel != "softmax":
        raise Unsupported("Attention has the softmax kernel only")
    if scale <= 0:
        raise Unsupported("Attention refuses a scale that is not positive")
    (b, n, h, _), m = q.shape, k.shape[1]
    # The kernel broadcasts no mask along the queries.
    seen = None if mask is None else np.broadcast_to(mask, (b, h, n, m)).copy()
    q, k, v = (x.swapaxes(1, 2).copy() for x in (q, k, v))
    return evaluate(node("Attention", scale=scale), q, k, v, seen).swapaxes(1, 2)


def project(x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    y = evaluate(node("Gemm"), x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1]), w, b)
    return y.reshape(*x.shape[:-1], w.shape[1])


def classify(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return project(x, kernel, bias)


def pooler_linear(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return project(x[..., 0, :], kernel, bias)


def linear_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    cu_seqlens: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    if cu_seqlens is not None or scale == 0:
        raise Unsupported("LinearAttention has no packed documents, and reads the scale 0 as 1/sqrt(d)")
    b, n, h, _ = q.shape
    # A token that does not count adds nothing and decays nothing.
    k, v, log_decay = (_where(mask, x) for x in (k, v, log_decay))
    rule = "linear" if log_decay is None else "gated"
    made = node("LinearAttention", CONTRIB, update_rule=rule, scale=scale, q_num_heads=h, kv_num_heads=h)
    packed = [None if x is None else x.reshape(b, n, int(np.prod(x.shape[2:]))) for x in (q, k, v, log_decay)]
    y, state = evaluate(made, *packed[:3], initial_state, packed[3], outputs=2)
    return y.reshape(v.shape), state


def _where(mask: np.ndarray | None, x: Any) -> Any:
    """x with zeros at tokens outside the mask (b, n)."""
    if mask is None or x is None:
        return x
    return np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, x.dtype.type(0))


# Low-rank adaptation.
def lora_delta(A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    return evaluate(node("Gemm", alpha=scale), A, B)


def lora_merge(W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    return evaluate(node("Gemm", alpha=scale), A, B, W)


def lora_unmerge(W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: float) -> np.ndarray:
    return evaluate(node("Gemm", alpha=-scale), A, B, W)


# The root-mean-square norm in primitives, as models write it: optimisation looks for this pattern.
def rms_norm_pattern(x: np.ndarray, epsilon: float) -> np.ndarray:
    return _pattern(epsilon, x.dtype.name, x.shape[-1], x.ndim).run(None, {"x": x})[0]


@lru_cache(maxsize=256)
def _pattern(epsilon: float, dtype: str, width: int, rank: int) -> Any:
    from onnx import helper

    steps = {
        "square": ("Pow", "x", "two"),
        "mean": ("ReduceMean", "square", "last"),
        "sum": ("Add", "mean", "epsilon"),
        "root": ("Sqrt", "sum"),
        "quotient": ("Div", "x", "root"),
        "y": ("Mul", "quotient", "ones"),
    }
    nodes = [helper.make_node(kind, inputs, [output]) for output, (kind, *inputs) in steps.items()]
    numbers = {"two": np.array(2.0), "epsilon": np.array(epsilon), "ones": np.ones(width)}
    constants = {"last": np.array([-1]), **{name: value.astype(dtype) for name, value in numbers.items()}}
    return _load(nodes, {"x": (dtype, rank)}, ["y"], dtype, constants, optimised=True)


# Computed in float32 or better and rounded once.
SINGLE: dict[str, Function] = {
    "activation.relu": relu,
    "activation.silu": silu,
    "norm.rms_norm": rms_norm,
    "norm.rms_norm_scaled": rms_norm,
    "norm.layer_norm": layer_norm,
    "attention_kernel.softmax": softmax,
    "attention.project": project,
    "head.classify": classify,
    "pooling.pooler_linear": pooler_linear,
    "lora.delta": lora_delta,
    "lora.merge": lora_merge,
    "lora.unmerge": lora_unmerge,
}
# The same, without a kernel for double: Gelu fails for want of Erf.
NOT_DOUBLE: dict[str, Function] = {
    "activation.gelu_erf": partial(gelu, approximate="none"),
    "activation.gelu_tanh": partial(gelu, approximate="tanh"),
    "linear_attention.recurrent": linear_attention,
}
# In float16 the tables of angles, and the scores, are float16; for double there is no kernel.
FUSED: dict[str, Function] = {
    "rope.rotate_interleaved": partial(rotate, layout="interleaved"),
    "rope.rotate_half_split": partial(rotate, layout="half_split"),
    "rope.rotate_contiguous": rotate,
    "rope.rotate_proportional": rotate_proportional,
    "attention.attend": attend,
}
PATTERN: dict[str, Function] = {"norm.rms_norm": rms_norm_pattern}


def implementations() -> tuple[Implementation, ...]:
    """Optimisation off in three formats; then the written-out norm with the default optimisation."""
    import onnx
    import onnxruntime

    version = f"{onnxruntime.__version__}, onnx {onnx.__version__}"

    def made(name: str, dtype: str, profile: str, functions: Mapping[str, Function]) -> Implementation:
        return Implementation(name, functions, Profile(dtype, profile, "A64"), version)

    return (
        made("onnxruntime-kernels", "float64", "strict", SINGLE),
        made("onnxruntime-kernels", "float32", "strict", SINGLE | NOT_DOUBLE | FUSED),
        made("onnxruntime-kernels", "float16", "strict", SINGLE | NOT_DOUBLE),
        made("onnxruntime-kernels, float16 inside", "float16", "fused", FUSED),
        made("onnxruntime-kernels pattern, optimised", "float64", "strict", PATTERN),
        made("onnxruntime-kernels pattern, optimised", "float32", "strict", PATTERN),
    )
