"""Checks that torch.compile traces: shapes are compared where some sizes are open and others are not."""

import pytest
import torch

from refimpl.check import ShapeError
from torchimpl import check
from torchimpl.ops import attention_kernel


@pytest.mark.parametrize(
    ("x", "y", "fits"),
    [
        ((), (2, 3), True), ((3,), (2, 3), True), ((1, 1), (2, 3), True), ((2, 1), (2, 3), True),
        ((2, 3), (2, 3), True),
        ((2,), (2, 3), False), ((2, 3), (3,), False), ((1, 2, 3), (2, 3), False), ((4, 3), (1, 3), False),
        ((0,), (1,), False), ((1,), (0,), True),
    ],
)  # fmt: skip
def test_broadcasts(x, y, fits):
    assert check.broadcasts(torch.Size(x), torch.Size(y)) is fits


def test_an_argument_that_comes_after_the_sizes_are_open():
    """The first two calls leave n open; the mask of the third has a size that is still a constant."""
    captured = torch.compile(attention_kernel.softmax, fullgraph=True, backend="eager")
    for n, mask in ((3, None), (4, None), (5, torch.ones(5, 5, dtype=torch.bool))):
        scores = torch.randn(2, n, n, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(captured(scores, mask), torch.softmax(scores, dim=-1))
    with pytest.raises(ShapeError, match="a mask that broadcasts"):
        attention_kernel.softmax(torch.zeros(2, 5, 5), torch.ones(4, 5, dtype=torch.bool))
