"""The adapter of the project's PyTorch operators: what asks for a graph of its own, and what is declined."""

import numpy as np
import pytest

from conformance.case import Unsupported

torch = pytest.importorskip("torch")

from conformance.adapters.torchimpl import compiled  # noqa: E402


def test_one_graph_is_captured_for_a_set_of_numbers_in_whatever_order_they_come():
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    run = compiled(lambda x, y, scale: x - scale * y, backend, dynamic=None, most=1)
    given = {"x": np.array([3.0, 4.0]), "y": np.array([1.0, 2.0]), "scale": 2.0}
    assert run(**given).tolist() == [1.0, 0.0]
    assert run(**dict(reversed(given.items()))).tolist() == [1.0, 0.0]
    assert len(captured) == 1
    with pytest.raises(Unsupported, match="1 graph"):
        run(**{**given, "scale": 3.0})
