"""RoFormer and RoFormerV2: the specification, laws of training, compilation, every refusal.

What the two models share is tested on both here; what is RoFormerV2's alone in test_roformer_v2.py; the originals'
figures in test_originals.py.
"""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from refimpl.check import DomainError, ShapeError
from refimpl.model import Model
from refimpl.models import _encoder as specified
from refimpl.models import roformer as spec
from refimpl.models import roformer_v2 as spec_v2
from refimpl.ops import attention
from torchimpl import checkpoint
from torchimpl.models import _encoder
from torchimpl.models.roformer import Roformer
from torchimpl.models.roformer_v2 import RoformerV2

DOUBLE = 1e-12
SIZES = {
    "vocab_size": 31, "segments": 2, "embedding_size": 11, "hidden_size": 30, "layers": 2, "heads": 3,
    "intermediate_size": 17,
}  # fmt: skip
BATCH, N = 5, 13
MODELS = {
    "roformer": (Roformer, spec, spec.dialect("bert4keras-0.11.5", **SIZES)),
    "roformer_v2": (RoformerV2, spec_v2, spec_v2.dialect("bert4keras-0.11.5", **SIZES)),
}
both = pytest.mark.parametrize("name", MODELS)
makers = pytest.mark.parametrize("visible", ["bidirectional", "causal", "unilm"])


def weights_of(name, config=None, seed=1):
    rng = np.random.default_rng(seed)
    shapes = MODELS[name][1].shapes(config or MODELS[name][2])
    drawn = {key: rng.normal(0, 0.5, shape) for key, shape in shapes.items()}
    return {key: 1 + array / 3 if key.endswith("scale") else array for key, array in drawn.items()}


def module_of(name, config=None, dtype=torch.float64, **options):
    """A model in eval mode with random weights of all names."""
    module = MODELS[name][0](config or MODELS[name][2], **options).to(dtype)
    module.load_state_dict({key: torch.tensor(array) for key, array in weights_of(name, module.config).items()})
    return module.eval()


def text(seed=2):
    """Ids, segments and a mask: texts of all lengths, one of them of padding only."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SIZES["vocab_size"], (BATCH, N))
    segments = (np.arange(N) >= rng.integers(3, N - 2, (BATCH, 1))).astype(int)
    return ids, segments, np.arange(N) < np.array([[N], [7], [1], [0], [10]])


def tensors(*arrays):
    return tuple(None if array is None else torch.tensor(array) for array in arrays)


def agree(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.detach().double().numpy(), other, rtol=0, atol=tolerance)


# The specification


@both
@makers
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_float64_equals_the_specification(name, visible, padding):
    ids, segments, mask = text()
    mask = {"none": None, "right": mask, "left": mask[:, ::-1].copy()}[padding]
    shuffled = np.random.default_rng(3).permutation(3 * N)[:N]
    counted = np.tile(np.arange(N), (BATCH, 1)) if mask is None else attention.positions_from_mask(mask)
    for positions in (None, shuffled, counted):
        expected = MODELS[name][1].hidden_states(
            weights_of(name), ids, segments, mask, positions,
            config=MODELS[name][2], visible=getattr(specified, visible),
        )  # fmt: skip
        given = tensors(ids, segments, mask, positions)
        module = module_of(name)
        states = module.hidden_states(*given, visible=getattr(_encoder, visible))
        agree(states, expected, DOUBLE)
        assert torch.equal(module(*given, visible=getattr(_encoder, visible)), states[-1])


@both
@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("embedding_size", [11, 30])
def test_every_activation_and_an_embedding_that_is_not_mapped(name, activation, embedding_size):
    config = dataclasses.replace(MODELS[name][2], activation=activation, embedding_size=embedding_size, epsilon=0.1)
    ids, _, _ = text()
    expected = MODELS[name][1].hidden_states(weights_of(name, config), ids, config=config)
    agree(module_of(name, config).hidden_states(torch.tensor(ids)), expected, DOUBLE)


@both
@makers
def test_no_batch_axis_two_batch_axes_and_no_token(name, visible):
    ids, segments, mask = tensors(*text())
    module, visible = module_of(name), getattr(_encoder, visible)
    batch = module(ids, segments, mask, visible=visible)
    one = module(ids[1], segments[1], mask[1], visible=visible)
    torch.testing.assert_close(one, batch[1], rtol=0, atol=DOUBLE)
    whole = module(ids[1], visible=visible)
    two = module(*(given[:4].reshape(2, 2, N) for given in (ids, segments, mask)), visible=visible)
    torch.testing.assert_close(two, batch[:4].reshape(2, 2, N, -1), rtol=0, atol=DOUBLE)
    torch.testing.assert_close(module(ids[None], visible=visible)[0, 1], whole, rtol=0, atol=DOUBLE)
    assert module(torch.zeros(2, 0, dtype=torch.int64), visible=visible).shape == (2, 0, 30)


@makers
def test_mask_makers_are_those_of_the_specification(visible):
    _, segments, mask = text()
    for given in (mask, np.ones_like(mask)):
        expected = getattr(specified, visible)(given, segments)
        np.testing.assert_array_equal(getattr(_encoder, visible)(*tensors(given, segments)).numpy(), expected)
    if visible == "bidirectional":
        assert _encoder.bidirectional(None, torch.tensor(segments)) is None
    else:
        unmasked = getattr(_encoder, visible)(None, torch.tensor(segments))
        np.testing.assert_array_equal(unmasked.expand(BATCH, N, N).numpy(), expected)


def test_the_mask_that_bert4keras_derives():
    ids = np.array([[2, 5, 0, 7, 0], [0, 3, 0, 0, 0]])
    found = _encoder.mask_from_ids_bert4keras(torch.tensor(ids))
    np.testing.assert_array_equal(found.numpy(), specified.mask_from_ids_bert4keras(ids))
    with pytest.raises(DomainError, match="encoder.mask_from_ids_bert4keras: token_ids must be a tensor of integers"):
        _encoder.mask_from_ids_bert4keras(torch.ones(3))
    with pytest.raises(ShapeError, match="encoder.mask_from_ids_bert4keras: expected token_ids"):
        _encoder.mask_from_ids_bert4keras(torch.tensor(3))


# Formats, devices and what is computed at all


@both
@makers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_give_finite_results_nearby(name, visible, dtype):
    inputs, visible = tensors(*text()), getattr(_encoder, visible)
    right = module_of(name).hidden_states(*inputs, visible=visible)
    states = module_of(name, dtype=getattr(torch, dtype)).hidden_states(*inputs, visible=visible)
    unit = torch.finfo(getattr(torch, dtype)).eps
    for state, other in zip(states, right, strict=True):
        assert state.dtype == getattr(torch, dtype)
        # Random weights that are ten times those of a trained model: roundings grow from layer to layer.
        torch.testing.assert_close(state.double(), other, rtol=0, atol=20 * unit * other.abs().max().item())


@both
@makers
def test_nothing_waits_for_the_device_and_nothing_is_made_elsewhere(name, visible):
    # A tensor of the meta device has no numbers to wait for, and meets no tensor of the CPU.
    module = module_of(name).to("meta")
    inputs = (tensor.to("meta") for tensor in tensors(*text()))
    last = module(*inputs, visible=getattr(_encoder, visible))
    assert last.shape == (BATCH, N, 30) and last.device.type == "meta"


@both
def test_attention_is_fused_and_has_no_mask_where_nothing_is_hidden(name, monkeypatch):
    fused, masks = functional.scaled_dot_product_attention, []

    def recorded(*arguments, attn_mask, **options):
        masks.append(attn_mask)
        return fused(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    ids, segments, mask = tensors(*text())
    module = module_of(name, attention_dropout=0.2)
    module(ids, segments)
    assert masks == [None, None]
    module(ids, segments, mask)
    assert [part.shape for part in masks[2:]] == [(BATCH, 1, 1, N)] * 2
    module(ids, segments, visible=_encoder.causal)
    assert [part.shape for part in masks[4:]] == [(1, 1, N, N)] * 2
    module.train()(ids)
    assert len(masks) == 6
    module_of(name, attention_dropout=0.0).train()(ids)
    assert masks[6:] == [None, None]


# Initialiser


def test_weights_start_as_berts():
    config = dataclasses.replace(
        MODELS["roformer"][2], vocab_size=701, embedding_size=192, hidden_size=384, layers=2, intermediate_size=512
    )
    torch.manual_seed(0)
    module = Roformer(config)
    for key, parameter in module.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if key.endswith("scale") else 0)).all(), key
        elif key != "embedding.segment":
            values = parameter.detach().double()
            # 0.02 is the deviation before the cut at two of them, and 0.8796 of it what is left: 0.017593.
            assert values.std().item() == pytest.approx(0.017593, rel=0.02), key
            assert abs(values.mean().item()) < 0.02 * 0.0176
            assert 0.0398 < values.abs().max().item() <= 0.04 * (1 + 1e-6), key
    assert not torch.equal(module.layers[0].attention.w_q, module.layers[1].attention.w_q)
    before = module.layers[0].attention.w_q.clone()
    torch.manual_seed(0)
    module.reset_parameters()
    assert torch.equal(module.layers[0].attention.w_q, before)


# Dropout


@both
def test_dropout_acts_in_training_only(name):
    module, inputs = module_of(name), tensors(*text())
    still = module(*inputs)
    assert torch.equal(still, module(*inputs))
    module.train()
    assert not torch.equal(module(*inputs), module(*inputs))
    places = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    # One at the embedding, and two in every layer, of which one is used twice.
    assert [place.p for place in places] == [0.1] * 5
    for place in places:
        place.p = 0.0
    assert torch.equal(still, module(*inputs))


def test_hidden_dropout_stands_behind_the_embeddings_norm_and_before_its_mapping():
    embedding = module_of("roformer", dataclasses.replace(MODELS["roformer"][2], embedding_size=30)).embedding
    inputs = _encoder.Inputs(*tensors(*text()), torch.arange(N))
    whole = embedding(inputs)
    embedding.train().dropout.p = 0.5
    torch.manual_seed(0)
    dropped = embedding(inputs)
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-12, atol=0)
    embedding = module_of("roformer").embedding.train()
    embedding.dropout.p = 1.0
    assert (embedding(inputs) == embedding.mapping.bias).all()


def test_hidden_dropout_acts_before_both_residual_sums():
    module, inputs = module_of("roformer", hidden_dropout=1.0).train(), tensors(*text())
    states = module.hidden_states(*inputs)
    for layer, one, other in zip(module.layers, states[:-1], states[1:], strict=True):
        torch.testing.assert_close(other, layer.feed_forward_norm(layer.attention_norm(one)), rtol=0, atol=DOUBLE)


def test_attention_dropout_acts_on_the_weights():
    # All values are 1: a head gives the sum of the weights that are left, the same in all of its features.
    attention_ = module_of("roformer", attention_dropout=0.5).layers[0].attention.train()
    with torch.no_grad():
        attention_.w_v.zero_()
        attention_.b_v.fill_(1)
        attention_.w_o.copy_(torch.eye(30))
        attention_.b_o.zero_()
    torch.manual_seed(0)
    x = torch.randn(2, N, 30, dtype=torch.float64)
    sums = attention_(x, None, torch.arange(N), torch.ones(5, dtype=torch.float64)).unflatten(-1, (3, 10))
    torch.testing.assert_close(sums, sums[..., :1].expand_as(sums), rtol=1e-12, atol=1e-12)
    assert sums[..., 0].unique().numel() > 2 * N * 3 - 5
    assert 0.8 < sums.mean() < 1.2 and sums.max() > 1.2


# Gradients


@both
@makers
def test_gradients_are_those_of_the_function(name, visible):
    sizes = {"vocab_size": 7, "embedding_size": 3, "hidden_size": 6, "intermediate_size": 5, "layers": 1}
    module = module_of(name, dataclasses.replace(MODELS[name][2], **sizes))
    ids, segments, mask = (given[:4, :5] for given in tensors(*text()))
    parameters = dict(module.named_parameters())

    def last(*given):
        arguments = (ids % 7, segments, mask)
        state = dict(zip(parameters, given, strict=True))
        return functional_call(module, state, arguments, {"visible": getattr(_encoder, visible)})

    given = tuple(parameter.detach().requires_grad_() for parameter in parameters.values())
    assert torch.autograd.gradcheck(last, given, fast_mode=True, eps=1e-7, atol=1e-5)


@both
@makers
def test_every_weight_learns_and_texts_of_padding_do_no_harm(name, visible):
    for attention_dropout in (0.0, 0.1):
        module = module_of(name, dtype=torch.float32, attention_dropout=attention_dropout).train()
        torch.manual_seed(1)
        last = module(*tensors(*text()), visible=getattr(_encoder, visible))
        (last * torch.randn_like(last)).sum().backward()
        for key, parameter in module.named_parameters():
            assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any(), key


@both
def test_a_model_learns_a_rule(name):
    # Class 1 holds token 2 somewhere, class 0 does not.
    torch.manual_seed(0)
    module = MODELS[name][0](MODELS[name][2])
    head = torch.nn.Linear(30, 2)
    ids, labels = torch.randint(3, 13, (64, 7)), torch.arange(64) % 2
    ids[labels == 1, torch.randint(0, 7, (32,))] = 2
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.005)
    for _ in range(60):
        optimiser.zero_grad()
        functional.cross_entropy(head(module(ids)[:, 0]), labels).backward()
        optimiser.step()
    assert (head(module.eval()(ids)[:, 0]).argmax(dim=-1) == labels).all()


# Compilation, copies, files, refusals


@pytest.fixture
def no_graphs_of_other_tests():
    """torch keeps a few graphs for a line of code, whatever module runs it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


compiles = pytest.mark.usefixtures("no_graphs_of_other_tests")


def one_layer(name, **options):
    return module_of(name, dataclasses.replace(MODELS[name][2], layers=1), **options)


@compiles
@both
@makers
def test_one_graph_serves_all_lengths(name, visible):
    module, visible, graphs = one_layer(name), getattr(_encoder, visible), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    ids, segments, mask = tensors(*text())
    with torch.no_grad():
        for rows, length in ((4, 11), (3, 7), (2, 5)):
            given = tuple(tensor[:rows, :length].clone() for tensor in (ids, segments, mask))
            given = (*given, torch.arange(length) * 2)
            one, other = compiled(*given, visible=visible), module(*given, visible=visible)
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


@compiles
@both
@pytest.mark.parametrize("masked", [True, False])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(name, masked):
    module, (ids, segments, mask) = one_layer(name), tensors(*text())
    torch.manual_seed(0)
    weight, gradients = torch.randn(BATCH, N, 30, dtype=torch.float64), []
    for way in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        (way(ids, segments, mask if masked else None) * weight).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in module.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@compiles
@both
@pytest.mark.parametrize("still", ["hidden_dropout", "attention_dropout"])
def test_a_compiled_model_drops_out_in_training(name, still):
    module = one_layer(name, **{still: 0.0})
    compiled = torch.compile(module.train(), fullgraph=True, backend="eager")
    ids, segments, mask = tensors(*text())
    one, other = compiled(ids, segments, mask), compiled(ids, segments, mask)
    assert torch.isfinite(one).all() and not torch.equal(one, other)


@both
def test_the_state_has_the_names_and_shapes_of_the_specification(name):
    kind, model, config = MODELS[name]
    for given in (config, dataclasses.replace(config, embedding_size=30)):
        state = kind(given).state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == model.shapes(given)
        assert sum(tensor.numel() for tensor in state.values()) == model.parameters(given)


@both
def test_a_model_folder_and_a_copy_give_the_same_model(name, tmp_path):
    module, inputs = module_of(name, dtype=torch.float32), tensors(*text())
    checkpoint.save(tmp_path / "model", Model(module.config, (), "bidirectional"), module.state_dict())
    read = checkpoint.load(tmp_path / "model")
    assert read.model.config == module.config
    for other in (checkpoint.module(read.model, read.weights).encoder.eval(), copy.deepcopy(module)):
        assert torch.equal(other(*inputs), module(*inputs))


def test_a_model_without_a_law_has_no_initialiser():
    config = SimpleNamespace(model="other", layers=2)
    with pytest.raises(DomainError, match="encoder.kernel_law: expected a model with an initialiser, .*'other'"):
        _encoder.kernel_law(config)


@both
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.ones(5, 13)}, DomainError, "token_ids must be a tensor of integers"),
        ({"token_ids": torch.tensor(3)}, ShapeError, "expected token_ids of shape (..., n)"),
        ({"token_ids": torch.ones(5, 12, dtype=torch.int64)}, ShapeError, "of one shape (..., n)"),
        ({"segment_ids": torch.ones(5, 13)}, DomainError, "segment_ids must be a tensor of integers"),
        ({"mask": torch.ones(5, 13, dtype=torch.int64)}, DomainError, "mask must be a boolean tensor"),
        ({"mask": torch.ones(5, 1, dtype=torch.bool)}, ShapeError, "of one shape (..., n)"),
        ({"positions": torch.ones(13)}, DomainError, "positions must be a tensor of integers"),
        ({"positions": torch.arange(12)}, ShapeError, "expected positions (n,) or (..., n), received positions of"),
        ({"positions": torch.zeros(1, 13, dtype=torch.int64)}, ShapeError, "token_ids of shape (5, 13)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, changes, error, message):
    inputs = dict(zip(("token_ids", "segment_ids", "mask"), tensors(*text()), strict=True)) | changes
    for method in (module_of(name), module_of(name).hidden_states):
        with pytest.raises(error) as raised:
            method(**inputs)
        assert str(raised.value).startswith(f"{name}.hidden_states: ") and message in str(raised.value)
