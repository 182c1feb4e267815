"""torchimpl.dense: products by oneDNN are those of torch.nn.functional.linear, with the same derivatives."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from refimpl.ops import attention as specification
from torchimpl import dense
from torchimpl.ops import attention

pytestmark = pytest.mark.skipif(not dense.ONEDNN, reason="this build of torch has no oneDNN")
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every product counts as large; the shapes of the weights that oneDNN was given."""
    made: list[tuple[int, ...]] = []

    def spied(x: Tensor, w: Tensor, b: Tensor | None, real=dense.by_onednn) -> Tensor:
        made.append(tuple(w.shape))
        return real(x, w, b)

    monkeypatch.setattr(dense, "LEAST", 1)
    monkeypatch.setattr(dense, "by_onednn", spied)
    return made


def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return functional.linear(x, w.T, b)


def given(*leading: int, width: int = 24, out: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((*leading, width), (width, out), (out,))
    x, w, b = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return x, w, b


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 5), (2, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_linear(calls, leading, biased):
    x, w, b = given(*leading)
    bias, inputs = (b, (x, w, b)) if biased else (None, (x, w))
    found, expected = dense.linear(x, w, bias), plain(x, w, bias)
    # A product without rows has nothing to multiply.
    assert calls == ([] if 0 in leading else [(24, 40)])
    close(found, expected)
    upstream = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    for mine, theirs in pairs:
        close(mine, theirs)
    if 0 not in leading:
        assert calls[1:] == [(40, 24)], "dx is a product of oneDNN's, dW is not"


@pytest.mark.parametrize("arranged", ["rows", "columns", "part"])
def test_weights_in_any_arrangement(calls, arranged):
    x, w, _ = given(3, 5)
    wide = torch.randn(24, 100)
    kept = {"rows": w.detach(), "columns": w.detach().T.contiguous().T, "part": wide[:, 30:70]}[arranged]
    close(dense.linear(x, kept, None), plain(x, kept, None))
    assert calls == [(24, 40)]


def test_only_what_is_asked_for_is_formed(calls):
    x, w, b = given(5)
    dense.linear(x.detach(), w, b.detach()).sum().backward()
    assert (x.grad, b.grad, calls) == (None, None, [(24, 40)])
    close(w.grad, x.detach().sum(dim=0)[:, None].expand(24, 40))


@pytest.mark.parametrize("biased", [True, False])
def test_the_gradient_of_an_embedding_that_is_also_the_last_layer_has_its_layout(calls, biased):
    embedding, (x, _, b) = torch.randn(40, 24, requires_grad=True), given(3, 5)
    layer = (x, embedding.T, b if biased else None)
    (found,) = torch.autograd.grad(dense.linear(*layer).tanh().sum(), embedding)
    (expected,) = torch.autograd.grad(plain(*layer).tanh().sum(), embedding)
    close(found, expected)
    # Otherwise it is copied when the gradient of the lookup is added to it.
    assert found.is_contiguous()
    assert calls == [(24, 40), (40, 24)]


def test_second_derivatives(calls):
    def twice(layer):
        x, w, b = given(3, 5)
        (dx,) = torch.autograd.grad(layer(x, w, b).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w, b))

    for mine, theirs in zip(twice(dense.linear), twice(plain), strict=True):
        close(mine, theirs)
    assert len(calls) > 2


def test_transforms_of_torch_func_are_left_to_torch(calls):
    x, w, b = (tensor.detach() for tensor in given(3, 5))

    def each(layer):
        loss = torch.func.grad(lambda weight, row: layer(row, weight, b).square().sum())
        return torch.func.vmap(loss, in_dims=(None, 0))(w, x)

    close(each(dense.linear), each(plain))
    push = torch.ones_like(x)
    close(torch.func.jvp(lambda x: dense.linear(x, w, b), (x,), (push,))[1], push @ w)
    assert calls == []


def test_forward_derivatives_are_left_to_torch(calls):
    x, w, b = (tensor.detach() for tensor in given(3, 5))
    push = torch.ones_like(x)
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(dense.linear(forward_ad.make_dual(x, push), w, b))
    close(made.tangent, push @ w)
    assert calls == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(monkeypatch, dynamic):
    monkeypatch.setattr(dense, "LEAST", 1)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs):
        seen.extend(
            str(node.target) for module in graph.modules() for node in getattr(module, "graph", torch.fx.Graph()).nodes
        )
        return graph

    x, w, b = given(3, 5)
    compiled = torch.compile(dense.linear, fullgraph=True, dynamic=dynamic, backend=backend)
    close(compiled(x, w, b), plain(x, w, b))
    assert any("refimpl.dense" in name for name in seen), seen
    for mine, theirs in zip(
        torch.autograd.grad(compiled(x, w, b).sum(), (x, w, b)),
        torch.autograd.grad(plain(x, w, b).sum(), (x, w, b)),
        strict=True,
    ):
        close(mine, theirs)


def test_compiled_by_inductor(monkeypatch):
    monkeypatch.setattr(dense, "LEAST", 1)
    x, w, b = given(3, 5)
    compiled = torch.compile(dense.linear, fullgraph=True)
    found, expected = compiled(x, w, b), plain(x, w, b)
    close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b)), strict=True
    ):
        close(mine, theirs)


def test_the_operator_is_sound_for_torch():
    x, w, b = (tensor.detach() for tensor in given(3, 5))
    torch.library.opcheck(dense._operator, (x, w, b))
    torch.library.opcheck(dense._operator, (x, w[:, :30], None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_formats_are_left_to_torch(calls, dtype):
    x, w, b = (tensor.detach().to(dtype) for tensor in given(3, 5))
    assert torch.equal(dense.linear(x, w, b), plain(x, w, b))
    assert calls == []


def test_small_products_autocast_and_meta_tensors_are_left_to_torch(calls, monkeypatch):
    x, w, b = given(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.linear(x, w, b).dtype == torch.bfloat16
    assert dense.linear(*(tensor.to("meta") for tensor in (x, w, b))).device.type == "meta"
    monkeypatch.setattr(dense, "LEAST", x.numel() * 40 + 1)
    dense.linear(x, w, b)
    assert calls == []
    monkeypatch.setattr(dense, "LEAST", x.numel() * 40)
    dense.linear(x, w, b)
    assert calls == [(24, 40)]


def test_an_exported_graph_names_operators_of_torch_only(calls):
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return dense.linear(x, w, None)

    x, w, _ = (tensor.detach() for tensor in given(3, 5))
    names = {str(node.target) for node in torch.export.export(Layer(), (x, w)).graph.nodes}
    assert names and not any("refimpl" in name or "mkldnn" in name for name in names), names


def test_a_layer_of_training_size_is_within_the_bound_of_its_roundings():
    """|error| <= gamma_(k+1) (|x| |W| + |b|), for any order of the sums (Higham, 2002, section 3.1)."""
    x, w, b = (tensor.detach() for tensor in given(4, 128, width=384, out=384))
    assert x.numel() * 384 >= dense.LEAST
    arrays = [tensor.double().numpy() for tensor in (x, w, b)]
    expected = specification.project(*arrays)
    size = specification.project(*map(np.abs, arrays))
    steps = (384 + 1) * UNIT_ROUNDOFF
    error = np.abs(attention.project(x, w, b).numpy() - expected)
    assert (error <= steps / (1 - steps) * size).all()
    assert error.max() > 0
