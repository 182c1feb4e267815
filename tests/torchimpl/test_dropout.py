"""torchimpl.dropout: how often, by how much, and the same mask forwards and backwards."""

import math

import pytest
import torch
from torch import nn

from torchimpl.dropout import Dropout


def masked(p, *shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 3 / 2**16])
def test_the_share_of_zeros_is_the_probability_in_every_lane_of_a_draw(p):
    made = masked(p, 400_000).view(-1, 4)
    exact = round(p * 2**16) / 2**16
    deviation = math.sqrt(exact * (1 - exact) / 100_000)
    for lane in range(4):
        assert abs((made[:, lane] == 0).double().mean().item() - exact) < 5 * deviation
    # Two lanes of a draw are both zero as often as independent ones are.
    both = ((made[:, 0] == 0) & (made[:, 1] == 0)).double().mean().item()
    assert abs(both - exact**2) < 5 * math.sqrt(exact**2 / 100_000) + 1e-9


def test_what_is_kept_is_divided_by_the_probability_that_is_drawn_with():
    made = masked(0.5, 1000, dtype=torch.float64)
    assert set(made.tolist()) == {0.0, 2.0}
    # round(0.1 * 65536) = 6554; 65536 / (65536 - 6554)
    made = masked(0.1, 1000, dtype=torch.float64)
    assert set(made.tolist()) == {0.0, 65536 / 58982}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_format(shape, dtype):
    made = masked(0.5, *shape, dtype=dtype)
    assert (made.shape, made.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(made, masked(0.5, *shape, dtype=dtype))
    assert ((made == 0) | (made == 2)).all()


def test_another_seed_is_another_mask():
    assert not torch.equal(masked(0.5, 100), masked(0.5, 100, seed=1))


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.ones(50, requires_grad=True)
    made = Dropout(0.5)(x)
    made.sum().backward()
    assert torch.equal(x.grad, made.detach())


def test_not_in_evaluation_and_nothing_or_everything_at_the_ends():
    x = torch.ones(1000)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    # Nearer to 0, and to 1, than a draw of 16 bits can be.
    assert torch.equal(Dropout(1e-9)(x), x)
    assert not Dropout(1.0)(x).any()


def test_it_is_a_dropout_to_whom_asks():
    assert isinstance(Dropout(0.1), nn.Dropout)
    with pytest.raises(ValueError, match="probability"):
        Dropout(1.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_torchs_own_without_a_break():
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(Dropout(0.5), fullgraph=True, backend=backend)(torch.ones(8))
    assert any("dropout" in name for name in nodes)
