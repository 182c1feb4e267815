"""Layers computed twice have the same gradients, and layers that grow in are as large as they should be."""

import numpy as np
import pytest
import torch
from torch import nn

from refimpl import model as specification
from refimpl.check import DomainError
from refimpl.models import _heads, flash, flash_quad, gau_alpha, roformer, roformer_v2
from torchimpl import layers
from torchimpl import model as modules
from torchimpl.ops import norm

SIZES = {"vocab_size": 23, "segments": 2, "hidden_size": 12, "layers": 2}
GATED = {"expanded_size": 14, "key_size": 6}
STACKED = {"embedding_size": 12, "heads": 3, "intermediate_size": 20}
CONFIGS = {
    "roformer": roformer.dialect("bert4keras-0.11.5", **SIZES, **STACKED),
    "roformer_v2": roformer_v2.dialect("bert4keras-0.11.5", **SIZES, **STACKED),
    "gau_alpha": gau_alpha.dialect("bert4keras-0.11.5", **SIZES, **GATED),
    "flash": flash.Config(
        **SIZES, **GATED, chunk=4, mix="bidirectional", kernel="squared_relu", divisor="root_key_size",
        normaliser="visible", rows="paper", rotation="interleaved", rotary_base=10000.0, epsilon=1e-6,
    ),
    "flash_quad": flash_quad.Config(
        **SIZES, **GATED, kernel="squared_relu", divisor="visible", length=0, rotation="half_split",
        rotary_base=10000.0, epsilon=1e-6,
    ),
}  # fmt: skip
IDS = torch.randint(0, 23, (3, 7), generator=torch.Generator().manual_seed(5))
MASK = torch.arange(7) < torch.tensor([[7], [5], [2]])


def module(name, dropout):
    options = {"hidden_dropout": dropout} | ({} if name == "flash" else {"attention_dropout": dropout})
    torch.manual_seed(0)
    return modules.Model(specification.Model(CONFIGS[name], (_heads.TiedLM(),), "bidirectional"), **options)


def gradients(model, seed, halves=False):
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        logits = model(IDS, None, MASK)["mlm_logits"]
    assert logits.dtype == (torch.bfloat16 if halves else torch.float32)
    logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_layers_have_the_same_gradients_bit_for_bit(name, halves):
    model, calls = module(name, 0.3), []
    found = layers.layers(model)
    assert found == list(model.encoder.layers)
    found[1].register_forward_pre_hook(lambda *_: calls.append("called"))
    dropouts = [m for m in found[1].modules() if isinstance(m, nn.Dropout)]
    dropouts[0].register_forward_pre_hook(lambda *_: calls.append("computed"))
    plain, once = gradients(model, 1, halves), calls.count("computed")
    with layers.recomputed(found):
        again = gradients(model, 1, halves)
        other = gradients(model, 2, halves)
    assert calls.count("computed") == 5 * once
    assert all(torch.equal(again[key], tensor) for key, tensor in plain.items())
    # Dropout does act.
    assert any(not torch.equal(other[key], tensor) for key, tensor in plain.items())
    del calls[:]
    gradients(model, 1, halves)
    assert calls.count("computed") == once


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_have_not_grown_do_nothing_but_normalise(name):
    model = module(name, 0.0).train()
    layer, x = model.encoder.layers[0], torch.randn(2, 7, 12)
    angles = torch.ones(CONFIGS[name].key_size // 2)
    arguments = (x, None, torch.arange(7), angles)
    whole = layer(*arguments)
    with layers.grown(layers.layers(model), torch.zeros(())):
        found = layer(*arguments)
        model.eval()
        # As it will be used, it is judged.
        torch.testing.assert_close(layer(*arguments), whole)
        model.train()
    epsilon = CONFIGS[name].epsilon
    expected = {
        "roformer": x.sub(x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt(),
        "roformer_v2": norm.rms_norm(x, epsilon=epsilon),
        "gau_alpha": norm.rms_norm(x, epsilon=epsilon),
        "flash": x,
        "flash_quad": x,
    }[name]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(*arguments), whole)


def test_half_grown_branches_by_hand():
    """RoFormerV2 with a feed-forward that has no kernel: norm(x + a attention(x)), in NumPy."""
    model = module("roformer_v2", 0.0)
    layer, x = model.encoder.layers[0], torch.randn(1, 5, 12)
    with torch.no_grad():
        layer.feed_forward.w_out.zero_()
    arguments = (x, None, torch.arange(5), torch.ones(2))
    branch = layer.attention(*arguments).detach().double().numpy()
    with layers.grown([layer], torch.tensor(0.25)):
        found = layer(*arguments).detach().numpy()
    summed = x.double().numpy() + 0.25 * branch
    epsilon = CONFIGS["roformer_v2"].epsilon
    once = summed / np.sqrt((summed**2).mean(-1, keepdims=True) + epsilon)
    twice = once / np.sqrt((once**2).mean(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(found, twice, atol=1e-6)


def test_what_has_no_layers_is_refused():
    with pytest.raises(DomainError, match="a model with layers"), layers.recomputed([]):
        pass
    for found in ([], [nn.Linear(2, 2)]):
        with pytest.raises(DomainError, match="branches end in a dropout"), layers.grown(found, torch.ones(())):
            pass
    assert layers.layers(nn.Linear(2, 2)) == []
