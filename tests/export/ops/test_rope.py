"""Graphs of rotary positions: layouts told apart, angles far out, one graph for every length, permuted weights."""

from functools import partial

import numpy as np
import pytest

from export.graph import build, op
from export.ops import rope
from refimpl.check import DomainError, ShapeError
from refimpl.ops import rope as spec

B, N, H, D = 3, 5, 2, 6
BASE = 10000.0
ROTATIONS = ("rotate_interleaved", "rotate_half_split", "rotate_proportional")
DTYPES = [np.float32, np.float64]


def made(*shape, dtype=np.float64):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


def rotated(name, heads=True, width=D, module=rope):
    """x, positions -> x turned, by this name of a module."""

    def call(x, positions):
        angles = module.angles(positions, module.frequencies(width, base=BASE))
        angles = angles[..., None, :] if heads else angles
        return getattr(module, name)(x, angles)

    return call


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True], ids=["common positions", "own positions"])
@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
@pytest.mark.parametrize("name", ROTATIONS)
def test_one_graph_for_every_size(Graph, name, heads, own, dtype, opset):
    call, expected = rotated(name, heads), rotated(name, heads, module=spec)

    def given(b, n):
        positions = np.random.default_rng(b * n).integers(-2000, 2000, (b, n) if own else (n,))
        return {"x": made(*((b, n, H, D) if heads else (b, n, D)), dtype=dtype), "positions": positions}

    graph = Graph(call, opset, **given(B, N))
    assert {axis for name, axis in graph.fixed if name == "x"} <= {2, 3}
    assert not any(name == "positions" for name, _ in graph.fixed)
    for b, n in ((1, 1), (1, 7), (2, 0), (5, 2)):
        arrays = given(b, n)
        graph.gives(expected(**arrays), **arrays)


def test_one_position_may_stand_for_the_whole_sequence(Graph):
    x, angles = made(B, N, D, dtype=np.float32), made(1, D // 2)
    for opset in (20, 23):
        graph = Graph(rope.rotate_interleaved, opset, x=x, angles=angles)
        graph.gives(spec.rotate_interleaved(x, angles), x=x, angles=angles)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("name", ROTATIONS[:2])
def test_other_ranks_are_written_out(Graph, name, rank):
    x = made(*(2, 3, 5, 7)[: rank - 1], D, dtype=np.float32)
    angles = made(*x.shape[:-1], D // 2)
    graph = Graph(getattr(rope, name), 23, x=x, angles=angles)
    assert "RotaryEmbedding" not in graph.operators
    graph.gives(getattr(spec, name)(x, angles), x=x, angles=angles)


def test_the_operator_is_half_split_unless_told(Graph, session):
    """ONNX RotaryEmbedding pairs x_i with x_(i+d/2) by default."""
    x, angles = made(B, N, D, dtype=np.float32), made(N, D // 2)
    given = {"x": x, "angles": angles}

    def by_default(x, angles):
        tables = (op(kind, angles.cast(np.float32)).broadcast_to(x.size(0), 1, 1) for kind in ("Cos", "Sin"))
        return op("RotaryEmbedding", x, *tables, num_heads=1)

    default = session(build(by_default, given, opset=23).model)(given)[0]
    assert np.allclose(default, spec.rotate_half_split(x, angles), atol=1e-6)
    assert not np.allclose(default, spec.rotate_interleaved(x, angles), atol=1e-1)
    for name in ROTATIONS[:2]:
        graph = Graph(getattr(rope, name), 23, **given)
        assert "RotaryEmbedding" in graph.operators
        graph.gives(getattr(spec, name)(x, angles), **given)
        assert "RotaryEmbedding" not in Graph(getattr(rope, name), 20, **given).operators


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROTATIONS)
def test_far_positions_and_position_0(Graph, name, dtype, opset):
    """A table of float32 angles would be off by 0.06 at position 2^20."""
    x = made(1, 4, H, D, dtype=dtype)
    positions = np.array([0, 2**20 + 1, -(2**20) - 1, 2**31 - 1])
    graph = Graph(rotated(name), opset, x=x, positions=positions)
    graph.gives(rotated(name, module=spec)(x, positions), x=x, positions=positions, tolerance=2e-6)
    assert np.array_equal(graph(x=x, positions=positions)[:, 0], x[:, 0])


def test_literal_values(Graph):
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    quarter = np.array([[np.pi / 2, 0.0]])
    for name, expected in (("rotate_interleaved", [-2.0, 1, 3, 4]), ("rotate_half_split", [-3.0, 2, 1, 4])):
        Graph(getattr(rope, name), x=x, angles=quarter).gives(np.array([expected]), x=x, angles=quarter)
    Graph(rope.rotate_proportional, x=x, angles=quarter[:, :1]).gives(
        np.array([[-3.0, 2, 1, 4]]), x=x, angles=quarter[:, :1]
    )
    Graph(lambda p: rope.angles(p, rope.frequencies(4, base=100.0)), p=np.array([3, -10])).gives(
        np.array([[3, 0.3], [-10, -1.0]]), p=np.array([3, -10])
    )


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("rotary", [0, 2, 4])
@pytest.mark.parametrize("inner", ROTATIONS[:2])
def test_a_contiguous_part(Graph, inner, rotary, opset):
    def call(x, positions, module=rope):
        angles = module.angles(positions, module.frequencies(rotary, base=BASE))[..., None, :]
        return module.rotate_contiguous(x, angles, getattr(module, inner))

    for dtype in DTYPES:
        x, positions = made(B, N, H, 7, dtype=dtype), np.arange(N)
        graph = Graph(call, opset, x=x, positions=positions)
        graph.gives(call(x, positions, module=spec), x=x, positions=positions)
        assert np.array_equal(graph(x=x, positions=positions)[..., rotary:], x[..., rotary:])


@pytest.mark.parametrize("rotary", [0, 2, 6])
def test_a_proportional_part(Graph, rotary):
    x, angles = made(B, N, D), made(N, rotary // 2)
    graph = Graph(rope.rotate_proportional, x=x, angles=angles)
    graph.gives(spec.rotate_proportional(x, angles), x=x, angles=angles)


def test_width_0_comes_back(Graph):
    for x, angles in ((np.zeros((2, 3, 0)), np.zeros((3, 0))), (np.zeros((2, 3, H, 0)), np.zeros((3, 1, 0)))):
        x = x.astype(np.float32)
        for opset in (20, 23):
            for name in ROTATIONS:
                Graph(getattr(rope, name), opset, x=x, angles=angles).gives(x, x=x, angles=angles)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("frequencies", {"width": 10, "base": 7.0}),
        ("frequencies", {"width": 0, "base": 7.0}),
        ("frequencies_linear", {"width": 6, "base": BASE, "factor": 3.5}),
        ("frequencies_ntk", {"width": 6, "base": BASE, "factor": 8.0}),
        ("frequencies_dynamic_ntk", {"width": 6, "base": BASE, "factor": 2.0, "length": 700, "max_length": 512}),
        ("frequencies_dynamic_ntk", {"width": 6, "base": BASE, "factor": 2.0, "length": 512, "max_length": 512}),
        ("frequencies_yarn", {"width": 64, "base": BASE, "factor": 4.0, "original_length": 2048, "beta_fast": 32.0,
                              "beta_slow": 1.0}),
        ("frequencies_yarn", {"width": 2, "base": 1e6, "factor": 4.0, "original_length": 16, "beta_fast": 32.0,
                              "beta_slow": 32.0}),
        ("yarn_magnitude", {"factor": 16.0}),
        ("yarn_magnitude", {"factor": 0.5}),
        ("half_split_order", {"width": 10}),
        ("interleaved_order", {"width": 10}),
    ],
)  # fmt: skip
def test_what_comes_from_numbers(Graph, name, given):
    x = np.zeros(1)
    graph = Graph(lambda x: (x, getattr(rope, name)(**given)), x=x)
    graph.gives((x, getattr(spec, name)(**given)), x=x)


def test_literal_frequencies_and_orders(Graph):
    x = np.zeros(1)

    def call(x):
        return rope.frequencies(4, base=100.0), rope.half_split_order(6), rope.interleaved_order(6)

    Graph(lambda x: (x, *call(x)), x=x).gives(
        (x, np.array([1, 0.1]), np.array([0, 2, 4, 1, 3, 5]), np.array([0, 3, 1, 4, 2, 5])), x=x
    )


@pytest.mark.parametrize("order", [spec.half_split_order(6), [1, 0], np.arange(0)], ids=str)
def test_permuted_weights(Graph, order):
    """The order may be a constant or a value of the graph."""
    index = np.array(order, np.int64)
    weight = np.arange(3 * 14).reshape(3, 14) / 4
    expected = spec.permute_projection(weight, heads=2, order=index)
    constant = Graph(partial(rope.permute_projection, heads=2, order=order), weight=weight)
    constant.gives(expected, weight=weight)
    Graph(partial(rope.permute_projection, heads=2), weight=weight, order=index).gives(
        expected, weight=weight, order=index
    )
    arrays = {"w_in": made(5, 17), "b_in": made(17), "gamma": made(2, 7), "beta": made(2, 7)}
    expected = spec.permute_gau(**arrays, s=7, order=index)
    Graph(partial(rope.permute_gau, s=7, order=order), **arrays).gives(tuple(expected), **arrays)
    # Without biases there are none in the result.
    plain = {name: arrays[name] for name in ("w_in", "gamma")}
    graph = Graph(lambda w_in, gamma: rope.permute_gau(w_in, None, gamma, None, s=7, order=order)[::2], **plain)
    graph.gives((expected.w_in, expected.gamma), **plain)


def test_the_half_split_layout_of_permuted_features_is_the_interleaved_one(Graph):
    x, positions = made(B, N, H, D), np.arange(N)

    def call(x, positions):
        turned = rotated("rotate_half_split")(x[..., spec.half_split_order(D).tolist()], positions)
        return turned[..., spec.interleaved_order(D).tolist()]

    expected = rotated("rotate_interleaved", module=spec)(x, positions)
    Graph(call, x=x, positions=positions).gives(expected, x=x, positions=positions)


def test_what_does_not_fit_is_refused():
    def refused(error, match, call, **given):
        with pytest.raises(error, match=match):
            build(call, given, opset=20)

    x, angles = made(2, 3, D), made(3, D // 2)
    for name in ROTATIONS[:2]:
        call = getattr(rope, name)
        refused(ShapeError, "an even rotary width", call, x=made(3, 5), angles=made(3, 2))
        refused(ShapeError, "angles for d/2 pairs", call, x=x, angles=made(3, 2))
        refused(ShapeError, "insert the head axis", call, x=made(3, D), angles=made(2, 3, D // 2))
        refused(ShapeError, "insert the head axis", call, x=made(2, 3, 5, D), angles=angles)
        refused(ShapeError, "angles \\(..., r\\)", call, x=x, angles=np.ones(()))
        refused(DomainError, "x must be a floating value", call, x=x.astype(int), angles=angles)
    refused(ShapeError, "an even rotary width", rope.rotate_proportional, x=made(3, 5), angles=made(3, 1))
    refused(ShapeError, "at most d/2 pairs", rope.rotate_proportional, x=x, angles=made(3, 4))
    refused(ShapeError, "insert the head axis", rope.rotate_proportional, x=x, angles=made(5, 1))
    contiguous = partial(rope.rotate_contiguous, rotate=rope.rotate_interleaved)
    refused(ShapeError, "at least 2r features", contiguous, x=x, angles=made(3, 4))
    refused(ShapeError, "frequencies of shape", rope.angles, positions=np.arange(3), frequencies=angles)
    refused(DomainError, "positions must be integers", rope.angles, positions=np.ones(3, bool), frequencies=angles[0])

    def number(name, **numbers):
        return lambda x: getattr(rope, name)(**numbers)

    yarn = {"width": 6, "factor": 2, "original_length": 9}
    for match, call in (
        ("even rotary width", number("frequencies", width=5, base=BASE)),
        ("even rotary width", number("half_split_order", width=-2)),
        ("even rotary width", number("interleaved_order", width=4.0)),
        ("base > 0", number("frequencies", width=4, base=0.0)),
        ("factor > 0", number("frequencies_linear", width=4, base=BASE, factor=np.inf)),
        ("at least 4", number("frequencies_ntk", width=2, base=BASE, factor=2)),
        ("length > 0", number("frequencies_dynamic_ntk", width=4, base=BASE, factor=2, length=0, max_length=9)),
        ("base > 1", number("frequencies_yarn", base=1.0, beta_fast=2, beta_slow=1, **yarn)),
        ("beta_fast >= beta_slow", number("frequencies_yarn", base=BASE, beta_fast=1, beta_slow=2, **yarn)),
        ("factor > 0", number("yarn_magnitude", factor=-1)),
    ):
        refused(DomainError, match, call, x=x)

    def permuted(order, heads=2):
        return partial(rope.permute_projection, heads=heads, order=order)

    weight = made(3, 14)
    refused(DomainError, "a permutation of 0 ... 1", permuted([0, 2]), weight=weight)
    refused(DomainError, "an order of integers", permuted([0.0, 1.0]), weight=weight)
    refused(ShapeError, "at most 7 indices", permuted(range(8)), weight=weight)
    refused(ShapeError, "4 equal heads", permuted([0], heads=4), weight=weight)
    refused(DomainError, "heads >= 1", permuted([0], heads=0), weight=weight)
    gau = partial(rope.permute_gau, beta=None, s=7, order=[1, 0])
    refused(ShapeError, "gamma with 7 features", gau, w_in=weight, b_in=made(14), gamma=made(6))
    refused(ShapeError, "b_in of shape", gau, w_in=weight, b_in=made(13), gamma=made(7))
    refused(ShapeError, "w_in with at least 7 features", gau, w_in=made(3, 5), b_in=made(5), gamma=made(7))
