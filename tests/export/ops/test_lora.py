"""lora as graphs: equal to the specification at every size, adapters as inputs, float64 beside a MatMul, errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from export import graph
from export.ops import lora
from refimpl.check import DomainError, ShapeError
from refimpl.ops import lora as spec

RULE = {"step": 3, "learning_rate": 0.3, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3, "weight_decay": 0.1}
# Neither factor nor rate is a power of two: float32 does not hold them.
NUMBERS = {"scale": 5 / 3, "learning_rate": 0.3}
AXES = {
    "x": "nd", "dy": "ne", "W": "de", "G": "de", "A": "dr", "B": "re", "A_0": "dr", "B_0": "re", "A_new": "dr",
    "B_new": "re", "m_A": "dr", "v_A": "dr", "m_B": "re", "v_B": "re", "W_t": "ed", "lora_A": "rd", "lora_B": "er",
    "parameter": "de", "gradient": "de", "m": "de", "v": "de",
}  # fmt: skip
# The arrays of every function, and its numbers.
CALLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "delta": ("A B", ("scale",)),
    "apply": ("x W A B", ("scale",)),
    "merge": ("W A B", ("scale",)),
    "unmerge": ("W A B", ("scale",)),
    "merge_symmetric": ("W A B A_0 B_0", ("scale",)),
    "gradients_dense": ("G A B", ("scale",)),
    "gradients_factored": ("x dy A B", ("scale",)),
    "gradient_input": ("dy W A B", ("scale",)),
    "update": ("A B A_new B_new", ("scale",)),
    "sgd": ("A B G", ("scale", "learning_rate")),
    "sgd_update": ("A B G", ("scale", "learning_rate")),
    "sgd_frozen": ("A B G", ("scale", "learning_rate")),
    "sgd_frozen_update": ("A G", ("scale", "learning_rate")),
    "random_projection_update": ("G A B", ("learning_rate",)),
    "adamw_array": ("parameter gradient m v", tuple(RULE)),
    "adamw": ("A B G m_A v_A m_B v_B", ("scale", *RULE)),
    "from_peft": ("W_t lora_A lora_B", ()),
    "to_peft": ("W A B", ()),
    "additive_delta": ("A B", ()),
}
TRACED = {"n": 2, "d": 6, "e": 9, "r": 3}
# One row, one feature, a rank above both widths, no rows; r divides d and e where additive_delta is asked.
SIZES = ({"n": 1, "d": 2, "e": 4, "r": 1}, {"n": 7, "d": 10, "e": 5, "r": 5}, {"n": 0, "d": 4, "e": 2, "r": 2})
REDUNDANT = {"n": 3, "d": 2, "e": 3, "r": 5}


def arrays_of(function: str, sizes: dict[str, int], dtype: Any = np.float64, *, batch: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(len(function) + sum(sizes.values()))
    made = {}
    for name in CALLS[function][0].split():
        shape = [sizes[axis] for axis in AXES[name]]
        if batch and name in ("x", "dy"):
            shape = [batch, *shape]
        array = rng.standard_normal(shape).astype(dtype)
        made[name] = abs(array) if name.startswith("v") else array
    return made


def numbers_of(function: str) -> dict[str, Any]:
    return {name: (NUMBERS | RULE)[name] for name in CALLS[function][1]}


def sessions(model: onnx.ModelProto) -> list[Callable[..., list[np.ndarray]]]:
    """ONNX Runtime, everything optimised, and onnx's own evaluator."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = {i.name for i in session.get_inputs()}
    evaluator = ReferenceEvaluator(model)
    return [
        lambda **arrays: session.run(None, {k: v for k, v in arrays.items() if k in names}),
        lambda **arrays: evaluator.run(None, arrays),
    ]


def built(call: Callable[..., Any], examples: dict[str, Any]) -> graph.Built:
    made = graph.build(call, examples, opset=20)
    onnx.checker.check_model(made.model, full_check=True)
    return made


def leaves(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("function", CALLS)
def test_one_graph_answers_for_every_size(function):
    numbers = numbers_of(function)
    made = built(lambda **inputs: getattr(lora, function)(**inputs, **numbers), arrays_of(function, TRACED))
    assert made.fixed == {}
    for sizes in (TRACED, *SIZES) if function == "additive_delta" else (TRACED, *SIZES, REDUNDANT):
        arrays = arrays_of(function, sizes)
        expected = leaves(getattr(spec, function)(**arrays, **numbers))
        for run in sessions(made.model):
            for found, right in zip(run(**arrays), expected, strict=True):
                assert found.shape == right.shape
                np.testing.assert_allclose(found, right, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("function", CALLS)
def test_float32_stays_float32(function):
    numbers, arrays = numbers_of(function), arrays_of(function, TRACED, np.float32)
    made = built(lambda **inputs: getattr(lora, function)(**inputs, **numbers), arrays)
    expected = leaves(getattr(spec, function)(**arrays, **numbers))
    for found, right in zip(sessions(made.model)[0](**arrays), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("function", ["apply", "gradients_factored", "gradient_input"])
def test_leading_axes_are_batches(function):
    numbers = numbers_of(function)
    made = built(lambda **inputs: getattr(lora, function)(**inputs, **numbers), arrays_of(function, TRACED, batch=2))
    for batch, sizes in ((1, TRACED), (3, SIZES[0]), (3, SIZES[2])):
        arrays = arrays_of(function, sizes, batch=batch)
        expected = leaves(getattr(spec, function)(**arrays, **numbers))
        for found, right in zip(sessions(made.model)[0](**arrays), expected, strict=True):
            assert found.shape == right.shape
            np.testing.assert_allclose(found, right, rtol=1e-13, atol=1e-13)


def test_a_row_alone():
    arrays = arrays_of("apply", TRACED) | {"x": np.arange(6.0)}
    made = built(lambda **inputs: lora.apply(**inputs, scale=0.7), arrays)
    for run in sessions(made.model):
        np.testing.assert_allclose(run(**arrays)[0], spec.apply(**arrays, scale=0.7), rtol=1e-14)


def test_by_hand():
    A, B = np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])
    (run, _) = sessions(
        built(lambda A, B: (lora.delta(A, B, scale=0.5), lora.additive_delta(A, B)), {"A": A, "B": B}).model
    )
    product, additive = run(A=A, B=B)
    assert product.tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert additive.tolist() == [[4.0, 5.0], [5.0, 6.0]]
    # Step 1 from zero states: p (1 - 0.5 * 0.5) - 0.5 g / (|g| + 1).
    p, g, m, v = np.array([1.0, 2.0, -1.0]), np.array([3.0, -3.0, 0.0]), np.zeros(3), np.zeros(3)
    rule = {"step": 1, "learning_rate": 0.5, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 1.0, "weight_decay": 0.5}
    made = built(lambda p, g, m, v: lora.adamw_array(p, g, m, v, **rule), {"p": p, "g": g, "m": m, "v": v})
    found = sessions(made.model)[0](p=p, g=g, m=m, v=v)
    assert [f.tolist() for f in found] == [[0.375, 1.875, -0.75], [1.5, -1.5, 0.0], [2.25, 2.25, 0.0]]


@pytest.mark.parametrize("r", [1, 2, 3])
def test_additive_gradients_sum_equal_residues(r):
    made = built(lambda G: lora.additive_gradients(G, r=r), {"G": np.zeros((6, 6))})
    step = built(lambda G: lora.additive_update(G, r=r, learning_rate=0.3), {"G": np.zeros((6, 6))})
    assert made.fixed == step.fixed == {}
    for d, e in ((6, 12), (r, 2 * r)):
        G = np.arange(float(d * e)).reshape(d, e) ** 1.5
        for run, update in zip(sessions(made.model), sessions(step.model), strict=True):
            for found, right in zip(run(G=G), spec.additive_gradients(G, r=r), strict=True):
                np.testing.assert_allclose(found, right, rtol=1e-14)
            right = spec.additive_update(G, r=r, learning_rate=0.3)
            np.testing.assert_allclose(update(G=G)[0], right, rtol=1e-14)


def test_the_product_of_the_factors_is_not_formed():
    made = built(lambda **inputs: lora.apply(**inputs, scale=0.5), arrays_of("apply", TRACED))
    (body,) = (f for f in made.model.functions if f.name == "lora.apply")
    x, W, A, B = body.input
    (narrow,) = (n.output[0] for n in body.node if n.op_type == "MatMul" and list(n.input) == [x, A])
    products = {tuple(node.input) for node in body.node if node.op_type == "MatMul"}
    assert products == {(x, W), (x, A), (narrow, B)}


def test_adapter_as_input_equals_the_merged_graph_equals_the_specification():
    """One file takes adapters of every rank; another holds the merged weight; a third merges in the graph."""
    rng = np.random.default_rng(0)
    W, bias, x = rng.standard_normal((11, 7)), rng.standard_normal(7), rng.standard_normal((3, 5, 11))
    A, B, scale = rng.standard_normal((11, 3)), rng.standard_normal((3, 7)), 1 / 3

    def layer(weight):
        return lambda x: graph.matmul(x, graph.initializer("weight", weight)) + graph.initializer("bias", bias)

    def adapted(x, A, B):
        return lora.apply(x, graph.initializer("weight", W), A, B, scale=scale) + graph.initializer("bias", bias)

    def merging(x, A, B):
        return x @ lora.merge(graph.initializer("weight", W), A, B, scale=scale) + graph.initializer("bias", bias)

    with_input, inside = built(adapted, {"x": x, "A": A, "B": B}), built(merging, {"x": x, "A": A, "B": B})
    assert with_input.fixed == inside.fixed == {}
    adapter, merged_inside = sessions(with_input.model)[0], sessions(inside.model)[0]
    for r in (3, 1, 8, 17):
        A, B = rng.standard_normal((11, r)), rng.standard_normal((r, 7))
        merged = sessions(built(layer(spec.merge(W, A, B, scale=scale)), {"x": x}).model)[0]
        expected = spec.apply(x, W, A, B, scale=scale) + bias
        for found in (adapter(x=x, A=A, B=B), merged_inside(x=x, A=A, B=B), merged(x=x)):
            np.testing.assert_allclose(found[0], expected, rtol=1e-13, atol=1e-13)
    # Without an adapter, as an empty pair of factors: the base.
    base = adapter(x=x, A=np.zeros((11, 0)), B=np.zeros((0, 7)))[0]
    np.testing.assert_allclose(base, x @ W + bias, rtol=1e-13, atol=1e-13)


def test_a_scale_beside_a_product_keeps_float64():
    """ONNX Runtime would make 1/3 a float32 attribute of the MatMul: wrong by 1e-8."""
    A, B, x = np.ones((2, 3)), np.ones((3, 1)), np.ones((5, 2))
    made = built(lambda x, A, B: x @ lora.delta(A, B, scale=1 / 3), {"x": x, "A": A, "B": B})
    np.testing.assert_allclose(sessions(made.model)[0](x=x, A=A, B=B)[0], np.full((5, 1), 2.0), rtol=1e-15)


def test_scales_are_numbers():
    assert lora.scale_lora(alpha=5, r=3) == 5 / 3
    assert lora.scale_rslora(alpha=6, r=16) == 1.5
    for function in (lora.scale_lora, lora.scale_rslora):
        for wrong in ({"alpha": np.nan, "r": 1}, {"alpha": 1.0, "r": 0}, {"alpha": 1.0, "r": 2.0}):
            with pytest.raises(DomainError, match="lora.scale_"):
                function(**wrong)


@pytest.mark.parametrize("function", CALLS)
def test_opset_20_holds_nothing_newer(function):
    numbers = numbers_of(function)
    made = built(lambda **inputs: getattr(lora, function)(**inputs, **numbers), arrays_of(function, TRACED))
    assert {o.domain: o.version for o in made.model.opset_import} == {"": 20, "refimpl": 1}
    for node in (node for f in made.model.functions for node in f.node if node.domain == ""):
        assert onnx.defs.get_schema(node.op_type, 20).since_version <= 20


@pytest.mark.parametrize(
    ("function", "changes", "error"),
    [
        ("delta", {"B": (4, 7)}, ShapeError),
        ("delta", {"A": (5,)}, ShapeError),
        ("delta", {"A": (5, 0), "B": (0, 7)}, ShapeError),
        ("delta", {"scale": np.inf}, DomainError),
        ("delta", {"scale": "1"}, DomainError),
        ("apply", {"x": (2, 4)}, ShapeError),
        ("apply", {"W": (5, 6)}, ShapeError),
        ("merge_symmetric", {"A_0": (4, 3)}, ShapeError),
        ("gradients_factored", {"dy": (3, 7)}, ShapeError),
        ("gradients_factored", {"dy": (1, 2, 7)}, ShapeError),
        ("update", {"A_new": (5, 2), "B_new": (2, 7)}, ShapeError),
        ("sgd", {"learning_rate": -0.1}, DomainError),
        ("sgd_frozen_update", {"G": (4, 7)}, ShapeError),
        ("sgd_frozen_update", {"A": (5, 0)}, ShapeError),
        ("adamw_array", {"m": (5, 6)}, ShapeError),
        ("adamw_array", {"v": (5,)}, ShapeError),
        ("adamw_array", {"step": 0}, DomainError),
        ("adamw_array", {"beta_2": 1.0}, DomainError),
        ("adamw_array", {"epsilon": 0.0}, DomainError),
        ("adamw_array", {"weight_decay": -1.0}, DomainError),
        ("additive_delta", {}, ShapeError),
        ("from_peft", {"lora_A": (2, 5)}, ShapeError),
        ("from_peft", {"lora_A": (0, 5), "lora_B": (7, 0)}, ShapeError),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_errors_name_the_operation(function, changes, error):
    arrays, numbers = arrays_of(function, {"n": 2, "d": 5, "e": 7, "r": 3}), numbers_of(function)
    for name, change in changes.items():
        if name in arrays:
            arrays[name] = np.zeros(change)
        else:
            numbers[name] = change
    with pytest.raises(error, match=f"lora.{function}: expected"):
        graph.build(lambda **inputs: getattr(lora, function)(**inputs, **numbers), arrays, opset=20)


def test_additive_errors():
    for wrong, error in (({"r": 4}, ShapeError), ({"r": 0}, DomainError)):
        with pytest.raises(error, match="lora.additive_gradients"):
            graph.build(lambda G, wrong=wrong: lora.additive_gradients(G, **wrong), {"G": np.zeros((6, 9))}, opset=20)
    with pytest.raises(DomainError, match="learning_rate"):
        graph.build(lambda G: lora.additive_update(G, r=3, learning_rate=-1.0), {"G": np.zeros((6, 9))}, opset=20)


def test_integers_are_refused():
    with pytest.raises(DomainError, match="lora.delta: A must be a floating value"):
        graph.build(
            lambda A, B: lora.delta(A, B, scale=1.0), {"A": np.ones((2, 1), int), "B": np.ones((1, 2))}, opset=20
        )
