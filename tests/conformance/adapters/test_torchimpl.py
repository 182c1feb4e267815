"""The adapter of the project's PyTorch operators: what asks for a graph of its own, and what is declined."""

import numpy as np
import pytest

from conformance.case import Unsupported

torch = pytest.importorskip("torch")

from conformance.adapters.torchimpl import compiled  # noqa: E402


def counting(captured):
    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    return backend


def test_one_graph_is_captured_for_a_set_of_numbers_in_whatever_order_they_come():
    captured = []
    run = compiled(lambda x, y, scale: x - scale * y, counting(captured), dynamic=None, most=1)
    given = {"x": np.array([3.0, 4.0]), "y": np.array([1.0, 2.0]), "scale": 2.0}
    assert run(**given).tolist() == [1.0, 0.0]
    assert run(**dict(reversed(given.items()))).tolist() == [1.0, 0.0]
    assert len(captured) == 1
    with pytest.raises(Unsupported, match="1 graph"):
        run(**{**given, "scale": 3.0})


def test_sizes_are_captured_as_they_are_then_open_and_no_third_time():
    captured = []
    run = compiled(lambda x: 2 * x, counting(captured), dynamic=None, most=1)
    for size in (2, 3, 5, 2):
        assert run(x=np.ones(size)).tolist() == [2.0] * size
    assert len(captured) == 2
    # An axis of one is never open to PyTorch.
    with pytest.raises(Unsupported, match="third graph"):
        run(x=np.ones(1))
    assert run(x=np.ones(7)).tolist() == [2.0] * 7 and len(captured) == 2
    every = compiled(lambda x: 2 * x, counting(captured), dynamic=None)
    assert [every(x=np.ones(size)).size for size in (2, 3, 1)] == [2, 3, 1] and len(captured) == 5


def test_an_error_of_a_captured_operator_is_no_declined_case():
    def wrong(x):
        if x.shape[0] == 3:
            raise RuntimeError("three")
        return x + 1

    run = compiled(wrong, "eager", dynamic=None, most=1)
    assert run(x=np.ones(2)).tolist() == [2.0, 2.0]
    with pytest.raises(Exception, match="three"):
        run(x=np.ones(3))
