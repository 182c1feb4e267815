"""Writing graphs: indexing, broadcasting, open sizes, local functions, loops, errors."""

from functools import partial
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from export import graph
from export.graph import GraphError, Value, build, function

X = np.arange(2 * 3 * 5, dtype=np.float64).reshape(2, 3, 5)
OTHER = np.arange(7 * 1 * 5, dtype=np.float64).reshape(7, 1, 5)


def ran(call, *, opset=20, **arrays):
    """The results of `call`, written as a graph and evaluated by onnx itself; the file is valid."""
    model = build(call, arrays, opset=opset).model
    onnx.checker.check_model(model, full_check=True)
    found = ReferenceEvaluator(model).run(None, arrays)
    return found[0] if len(found) == 1 else found


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (slice(None), 1),
        (..., 2),
        (..., None, slice(None)),
        (None, 1, ..., None),
        (slice(1, None), slice(None, -1), slice(None, None, 2)),
        (..., slice(None, None, -1)),
        (slice(None), slice(2, 0, -1), -2),
        (0, slice(None), None, slice(1, 3)),
        (slice(None), [2, 0, 0]),
    ],
    ids=str,
)
def test_indexing_is_numpys(index):
    assert np.array_equal(ran(lambda x: x[index], x=X), X[index])


def test_a_slice_may_end_at_a_value_of_the_graph():
    assert np.array_equal(ran(lambda x, m: x[:, : m.size(0)], x=X, m=np.zeros(2)), X[:, :2])


def test_too_many_indices_are_refused():
    with pytest.raises(GraphError, match="4 indices"):
        build(lambda x: x[0, 0, 0, 0], {"x": X}, opset=20)


def test_numbers_take_the_dtype_of_the_value():
    found = ran(lambda x: 2 * x + 0.5 - (1 - x) / 4, x=X.astype(np.float32))
    assert found.dtype == np.float32
    assert np.array_equal(found, (2 * X + 0.5 - (1 - X) / 4).astype(np.float32))


def test_a_fraction_does_not_become_an_integer():
    with pytest.raises(GraphError, match="cast the integers first"):
        build(lambda n: n * 0.5, {"n": np.arange(3)}, opset=20)


def test_two_dtypes_do_not_meet():
    with pytest.raises(GraphError, match="one dtype"):
        build(lambda x, y: x + y, {"x": X, "y": X.astype(np.float32)}, opset=20)


def test_a_value_is_no_condition():
    with pytest.raises(GraphError, match="not known while the graph is written"):
        build(lambda x: x if x.sum(0) > 0 else -x, {"x": X}, opset=20)


def test_sizes_stay_open_until_they_are_asked_for():
    built = build(lambda x: x.reshape(x.size(0), -1), {"x": X}, opset=20)
    assert built.fixed == {}
    found = ReferenceEvaluator(built.model).run(None, {"x": OTHER})[0]
    assert found.shape == (7, 5)


def test_a_size_that_was_asked_for_is_fixed():
    built = build(lambda x: x.reshape(x.size(0), int(x.shape[1]) * int(x.shape[2])), {"x": X}, opset=20)
    assert built.fixed == {("x", 1): 3, ("x", 2): 5}
    declared = [d.dim_param or d.dim_value for d in built.model.graph.input[0].type.tensor_type.shape.dim]
    assert declared == ["x_0", 3, 5]


def test_what_is_computed_from_an_open_size_fixes_it_only_when_it_is_used():
    def halves(x):
        half = x.shape[-1] // 2
        return x[..., : int(half)]

    assert build(lambda x: (x.shape[-1] // 2, x)[1], {"x": X}, opset=20).fixed == {}
    assert build(halves, {"x": X}, opset=20).fixed == {("x", 2): 5}


def test_a_broadcast_axis_takes_either_size():
    built = build(lambda x, mask: graph.where(mask, x, 0), {"x": X, "mask": X[:, :1] > 3}, opset=20)
    run = partial(ReferenceEvaluator(built.model).run, None)
    for mask in (X > 3, X[:, :1] > 3, X[:1] > 3):
        assert np.array_equal(run({"x": X, "mask": mask})[0], np.where(mask, X, 0))


class Both(NamedTuple):
    more: Value
    less: Value


@function
def shifted(x: Value, *, by: float) -> Both:
    return Both(x + by, x - by)


@function
def twice(x: Value, change) -> Value:
    return change(change(x))


def test_functions_with_the_same_body_are_one():
    model = build(lambda x: shifted(shifted(x, by=1.0).more, by=1.0), {"x": X}, opset=20).model
    assert [f.name for f in model.functions] == ["test_graph.shifted"]
    assert len(model.graph.node) == 4


def test_functions_with_other_numbers_are_told_apart():
    model = build(lambda x: shifted(shifted(x, by=1.0).more, by=2.0), {"x": X}, opset=20).model
    assert [f.name for f in model.functions] == ["test_graph.shifted", "test_graph.shifted_2"]
    assert np.array_equal(ran(lambda x: shifted(shifted(x, by=1.0).more, by=2.0).less, x=X), X - 1)


def test_a_function_takes_in_what_lies_around_it():
    found = ran(lambda x, y: twice(x, lambda t: t * y + shifted(y, by=1.0).less), x=X, y=X[:1])
    assert np.array_equal(found, (X * X[0] + X[0] - 1) * X[0] + X[0] - 1)


def test_a_loop_sees_what_lies_around_it():
    def sums(x, y):
        def body(states, elements):
            total = states[0] + elements[0] * y
            return [total], [total]

        (last,), (each,) = graph.scan(body, [y * 0], [x])
        return last, each

    last, each = ran(sums, x=X, y=X[0])
    assert np.array_equal(each, np.cumsum(X * X[0], axis=0))
    assert np.array_equal(last, each[-1])


def test_a_loop_inside_a_function():
    @function
    def total(x: Value) -> Value:
        return graph.scan(lambda s, e: ([s[0] + e[0]], []), [x[0] * 0], [x])[0][0]

    assert np.array_equal(ran(lambda x: total(x * 2), x=X), X.sum(0) * 2)


def test_small_parts():
    assert np.array_equal(ran(lambda x: graph.concat([x, x[:, :1]], axis=1), x=X), np.concatenate([X, X[:, :1]], 1))
    assert np.array_equal(ran(lambda x: graph.stack([x, -x], axis=-2), x=X), np.stack([X, -X], -2))
    assert np.array_equal(ran(lambda x: graph.arange(x.size(2)), x=X), np.arange(5))
    assert np.array_equal(ran(lambda x: graph.pad(x, [0, 0, 1], [0, 2, 0], 9), x=X),
                          np.pad(X, [(0, 0), (0, 2), (1, 0)], constant_values=9))  # fmt: skip
    assert np.array_equal(ran(lambda x: graph.cumsum(x, axis=1, exclusive=True), x=X), np.cumsum(X, 1) - X)
    assert np.array_equal(ran(lambda x: x.swap(1, 2) @ x, x=X), X.swapaxes(1, 2) @ X)
    assert np.array_equal(ran(lambda x: graph.einsum("bij,bkj->bik", x, x), x=X), X @ X.swapaxes(1, 2))
    assert np.array_equal(ran(lambda x: graph.full([x.size(0), 2], 3, np.int64), x=X), np.full((2, 2), 3))
    assert np.array_equal(ran(lambda x: ~((x < 4) | (x >= 9)) & (x != 5), x=X), (X >= 4) & (X < 9) & (X != 5))


def test_a_result_that_is_a_number():
    assert ran(lambda x: 0.25, x=X) == 0.25


def test_the_graph_is_written_by_build_only():
    with pytest.raises(GraphError, match=r"outside of export\.graph\.build"):
        shifted(None, by=1.0)


def test_an_unknown_opset_is_refused():
    with pytest.raises(GraphError, match="among"):
        build(lambda x: x, {"x": X}, opset=28)


def test_the_file_says_its_versions():
    for opset in graph.OPSETS:
        model = build(lambda x: x + 1, {"x": X}, opset=opset).model
        assert {i.domain: i.version for i in model.opset_import} == {"": opset, "refimpl": 1}
        assert model.ir_version == 10


def test_a_weight_keeps_its_name():
    model = build(lambda x: x + graph.initializer("w.bias", np.ones(5)), {"x": X}, opset=20).model
    assert [i.name for i in model.graph.initializer] == ["w.bias"]
    with pytest.raises(GraphError, match="main graph"):
        build(lambda x: twice(x, lambda t: t + graph.initializer("w", np.ones(5))), {"x": X}, opset=20)
