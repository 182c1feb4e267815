"""Optimisers: LAMB step by step, and which weights are decayed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from refimpl.check import DomainError
from tests.torchimpl.training.test_loop import CONFIG
from torchimpl.training import optim


def stepped(gradients, **options):
    """The weight (3, 4) after one step per gradient."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = optim.Lamb([weight], **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return weight.detach().numpy()


def test_the_first_step_by_hand():
    # m = 0.1 g, v = 0.001 g², corrected g and g²: u = (1, -1), |u| = √2, |x| = 5.
    moved = 0.1 * 5 / math.sqrt(2)
    assert stepped([[2.0, -7.0]], lr=0.1, eps=0.0) == pytest.approx([3 - moved, 4 + moved], abs=1e-12)


def test_without_bias_correction_by_hand():
    # u = 0.1 g / (√0.001 |g|): its length does not matter, until epsilon or decay stands beside it.
    moved = 0.1 * 5 / math.sqrt(2)
    assert stepped([[2.0, -7.0]], lr=0.1, eps=0.0, bias_correction=False) == pytest.approx([3 - moved, 4 + moved])
    long = 0.1 / math.sqrt(0.001)
    u = np.array([long + 0.5 * 3, -long + 0.5 * 4])
    expected = np.array([3.0, 4.0]) - 0.1 * 5 / np.linalg.norm(u) * u
    found = stepped([[2.0, -7.0]], lr=0.1, eps=0.0, weight_decay=0.5, bias_correction=False)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("corrected", [True, False])
def test_three_steps_in_numpy(corrected):
    gradients = [[1.0, -2.0], [0.5, 3.0], [-4.0, 0.25]]
    x, m, v = np.array([3.0, 4.0]), np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(map(np.array, gradients), start=1):
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        one, two = (1 - 0.8**t, 1 - 0.95**t) if corrected else (1, 1)
        u = (m / one) / (np.sqrt(v / two) + 0.01) + 0.3 * x
        x = x - 0.05 * np.sqrt(x @ x) / np.sqrt(u @ u) * u
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3, "bias_correction": corrected}
    assert stepped(gradients, **options) == pytest.approx(x, abs=1e-12)


def test_without_the_ratio_it_is_adamw():
    """The decay of AdamW is the rate times the weight before the step, as here."""
    gradients = [[1.0, -2.0], [0.5, 3.0], [-4.0, 0.25]]
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    adam = torch.optim.AdamW([weight], lr=0.05, eps=1e-3, weight_decay=0.2)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
    mine = stepped(gradients, lr=0.05, eps=1e-3, weight_decay=0.2, adapt=False)
    assert mine == pytest.approx(weight.detach().numpy(), abs=1e-12)


def test_nothing_to_measure_by_is_a_ratio_of_one():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = optim.Lamb([weight], lr=0.1, eps=0.0)
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.1, 0.1])
    still = nn.Parameter(torch.ones(2))
    still.grad = torch.zeros(2)
    optim.Lamb([still, nn.Parameter(torch.ones(3))], lr=0.1).step()
    assert still.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": 1.0, "eps": -1.0}, {"lr": 1.0, "betas": (0.9, 1.0)}])
def test_lamb_refuses(options):
    with pytest.raises(DomainError, match="optim.Lamb: expected"):
        optim.Lamb([nn.Parameter(torch.ones(1))], **options)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.gamma = nn.Parameter(torch.ones(2, 3))
        self.frozen = nn.Parameter(torch.ones(5, 5), requires_grad=False)


@pytest.mark.parametrize(("name", "kind"), [
    ("adamw", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor), ("lamb", optim.Lamb),
])  # fmt: skip
def test_matrices_are_decayed_and_scales_are_not(name, kind):
    model = Scaled()
    made = optim.build(model, replace(CONFIG, optimizer=name, beta1=0.8, epsilon=1e-4, bias_correction=False))
    assert type(made) is kind
    first, second = made.param_groups
    assert [id(p) for p in first["params"]] == [id(model.line.weight)]
    assert [id(p) for p in second["params"]] == [id(model.gamma), id(model.line.bias)]
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    if name != "adafactor":
        assert first["betas"] == (0.8, 0.999) and first["eps"] == 1e-4
    if name == "lamb":
        assert (first["adapt"], second["adapt"], first["bias_correction"]) == (True, False, False)


def test_a_model_without_weights_to_train_is_refused():
    with pytest.raises(DomainError, match="a model with weights that have gradients"):
        optim.build(nn.Linear(2, 2).requires_grad_(False), CONFIG)
