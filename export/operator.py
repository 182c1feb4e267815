"""One operator as an ONNX model, from example arguments.

from export import operator
from export.ops import norm
made = operator.model(norm.rms_norm, {"x": np.ones((2, 3, 8), np.float32), "epsilon": 1e-12}, opset=23)
onnx.save(made.model, "rms_norm.onnx")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.graph import Built, build


def model(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, opset: int, outputs: Sequence[str] | None = None
) -> Built:
    """`function` of export.ops as a model: arrays become inputs of that rank and dtype, the rest is part of the graph.

    Sizes stay open except those that the operator needs as numbers (`fixed` of the result says which): widths, heads.
    outputs: names for the results, in order.
    Raises: GraphError for an opset that is not 20 or 23, ShapeError and DomainError as the specification.
    """
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    return build(lambda **inputs: function(**inputs, **rest), arrays, opset=opset, outputs=outputs)
