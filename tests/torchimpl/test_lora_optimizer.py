"""LoRA as an optimiser: PEFT's golden steps, the module form step by step, torch's own rules, 16 bits, taking up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from refimpl.check import DomainError
from torchimpl import lora
from torchimpl.lora import LoraError
from torchimpl.lora_optimizer import LoRAAdamW, LoRASGD, state_bytes
from torchimpl.ops import lora as ops

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_lora"
SGD = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.02}
ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
RULES = {
    "linear_r4_a8": ({"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.01}),
    "linear_r4_a8_rslora": ({"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.01}),
    "linear_r3_a5_nobias": (
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
}
RANK = {"r": 3, "alpha": 5, "rslora": True}
KINDS = [(LoRASGD, torch.optim.SGD, SGD), (LoRAAdamW, torch.optim.AdamW, ADAMW)]


def seeded(number):
    return torch.Generator().manual_seed(number)


def close(found, expected, tolerance=1e-12):
    assert_close(found.detach(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


class Net(nn.Module):
    """A kernel (in, out) of the module itself and a linear layer, all sizes different."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = seeded(11)
        self.kernel = nn.Parameter(torch.randn(7, 11, generator=generator, dtype=torch.float64).to(dtype))
        self.out = nn.Linear(11, 5, bias=False, dtype=dtype)
        with torch.no_grad():
            self.out.weight.copy_(torch.randn(5, 11, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return self.out(torch.tanh(x @ self.kernel))


def loss(model, step):
    """A new batch every step."""
    generator = seeded(100 + step)
    weight = model.out.weight
    x = torch.randn(13, 7, generator=generator, dtype=torch.float64).to(weight.dtype)
    target = torch.randn(13, 5, generator=generator, dtype=torch.float64).to(weight.dtype)
    return (model(x) - target).square().mean()


def groups(model):
    return [{"params": [model.kernel], "layout": "in_out"}, {"params": [model.out.weight], "layout": "out_in"}]


def started(kind, model, options, seed=3, **more):
    rule = RANK | {"layout": "in_out"} | options | more
    return kind(groups(model), **rule, generator=seeded(seed))


def run(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_golden_steps(name, layout, rule):
    """The factors are those that PEFT's layer had, and W is its merged weight, after every step."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        data = {key: torch.from_numpy(archive[key]) for key in archive.files}
    rank = {"r": int(data["r"]), "alpha": float(data["lora_alpha"]), "rslora": bool(data["use_rslora"])}
    A, B, scale = data["lora_A"].T, data["lora_B"].T, data["scaling"].item()
    # The golden run starts from both factors; the weight that they stand for is the one to move.
    start = data["W"].T + scale * A @ B
    p = nn.Parameter((start if layout == "in_out" else start.T).clone())
    kind = LoRASGD if rule == "sgd" else LoRAAdamW
    optimizer = kind([p], layout=layout, **rank, **RULES[name][rule == "adamw"])
    state = optimizer.state[p]
    state["A"], state["B"] = A.clone(), B.clone()
    for step in (1, 2, 3):
        W = p if layout == "in_out" else p.T
        value = ((data["x"] @ W + data.get("bias", 0.0) - data["target"]) ** 2).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        close(value, data[f"{rule}_loss_before_step{step}"])
        A, B = (data[f"{rule}_{x}_after_step{step}"].T for x in "AB")
        close(state["A"], A)
        close(state["B"], B)
        close(p if layout == "in_out" else p.T, data["W"].T + scale * A @ B)


@pytest.mark.parametrize(("ours", "theirs", "options"), KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_the_module_form_step_by_step(ours, theirs, options, rslora):
    moved, adapted = Net(), Net()
    optimizer = started(ours, moved, options, rslora=rslora)
    factors = lora.attach(adapted, ["kernel", "out"], r=3, alpha=5, rslora=rslora, generator=seeded(3))
    reference = theirs([p for p in adapted.parameters() if p.requires_grad], **options)
    base = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    for step in range(50):
        run(moved, optimizer, [step])
        run(adapted, reference, [step])
        weights = lora.merged_weights(adapted)
        for name, W in (("kernel", moved.kernel), ("out.weight", moved.out.weight)):
            close(W, weights[name])
        for p, name in ((moved.kernel, "kernel"), (moved.out.weight, "out")):
            close(optimizer.state[p]["A"], factors[name].A.detach())
            close(optimizer.state[p]["B"], factors[name].B.detach())
    # It went somewhere, with both factors, and the change has their rank.
    for name in base:
        change = weights[name] - base[name]
        assert change.abs().max() > 0.1
        assert torch.linalg.matrix_rank(change, rtol=1e-10) == 3
    assert loss(moved, 0) < 0.9 * loss(Net(), 0)


def test_first_steps_by_hand():
    # d = 1, e = 2, r = 1, scale 2: G = (1, 3), A = a, B = 0; dA = 2 G B' = 0, dB = 2 a G.
    p = nn.Parameter(torch.tensor([[10.0, 20.0]], dtype=torch.float64))
    optimizer = LoRASGD([p], lr=0.1, r=1, alpha=2, rslora=False, layout="in_out")
    optimizer.state[p]["A"].fill_(0.5)
    for _ in range(2):
        p.grad = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
        optimizer.step()
    # B: -0.1 (1, 3), then -0.2 (1, 3); A: 0.5, then 0.5 + 0.1 * 2 * 0.1 * 10 = 0.7. 2 A B = -0.28 (1, 3).
    close(optimizer.state[p]["A"], torch.tensor([[0.7]], dtype=torch.float64))
    close(optimizer.state[p]["B"], torch.tensor([[-0.2, -0.6]], dtype=torch.float64))
    close(p, torch.tensor([[9.72, 19.16]], dtype=torch.float64))


@pytest.mark.parametrize(("ours", "theirs", "options"), KINDS)
def test_a_group_without_r_is_trained_whole_as_torch_does(ours, theirs, options):
    one, other = Net(), Net()
    optimizer = ours(one.parameters(), r=None, alpha=1, rslora=False, layout="in_out", **options)
    reference = theirs(other.parameters(), **options)
    run(one, optimizer, range(20))
    run(other, reference, range(20))
    for p, expected in zip(one.parameters(), other.parameters(), strict=True):
        close(p, expected.detach())
    vector = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [vector]})
    vector.grad = torch.ones(3)
    optimizer.step()
    assert (vector < 1).all()


def test_start():
    """A uniform within 1 / sqrt(in) and B zero, `in` by the layout; nothing is moved."""
    p = nn.Parameter(torch.ones(4, 100))
    for layout, inputs, outputs in (("in_out", 4, 100), ("out_in", 100, 4)):
        optimizer = LoRAAdamW([p], lr=1.0, r=60, alpha=1, rslora=False, layout=layout, weight_decay=0.0)
        state = optimizer.state[p]
        assert state["A"].shape == (inputs, 60) and state["B"].shape == (60, outputs)
        assert 0.9 < state["A"].abs().max() * inputs**0.5 <= 1 and not state["B"].any()
        optimizer.step()
        assert (p == 1).all() and state["step"] == 0


class TestSixteenBits:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("kind", "_", "options"), KINDS)
    def test_weights_are_the_rounded_sum_of_the_first_and_the_factors(self, dtype, kind, _, options):
        model, first = Net(dtype), Net(dtype)
        optimizer = started(kind, model, options | {"lr": 0.003})
        run(model, optimizer, range(10))
        for p, start, lying in ((model.kernel, first.kernel, 0), (model.out.weight, first.out.weight, 1)):
            state = optimizer.state[p]
            assert all(tensor.dtype == torch.float32 for key, tensor in state.items() if key not in ("step", "base"))
            assert state["base"].dtype == dtype and torch.equal(state["base"], start)
            A, B = state["A"].double(), state["B"].double()
            change = 5 / 3**0.5 * (A @ B)
            wide = start.double() + (change.T if lying else change)
            # Rounded once: half an ulp, and what float32 leaves.
            half = 2.0 ** -(11 if dtype == torch.float16 else 8)
            assert_close(p.double(), wide, rtol=half * 1.001, atol=1e-7)

    def test_steps_below_half_an_ulp_add_up(self):
        p = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
        optimizer = LoRASGD([p], lr=1.0, r=1, alpha=1, rslora=False, layout="in_out")
        optimizer.state[p]["A"].fill_(1.0)
        for _ in range(64):
            p.grad = torch.full_like(p, -(2.0**-12))
            optimizer.step()
        # 64 steps of 2^-12 are 2^-6, an ulp of 1 is 2^-7; each alone rounds to nothing.
        assert 1 + 2**-6 <= p.item() <= 1 + 2**-5

    def test_a_gradient_is_projected_in_float32(self):
        p = nn.Parameter(torch.zeros(4, 1, dtype=torch.bfloat16))
        optimizer = LoRASGD([p], lr=1.0, r=1, alpha=1, rslora=False, layout="in_out")
        optimizer.state[p]["A"].copy_(torch.tensor([[1.0], [1.0], [2**-10], [2**-10]]))
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[p]["B"].item() == -(2 + 2**-9)


class TestTakenUp:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("kind", "_", "options"), KINDS)
    def test_bit_for_bit(self, dtype, kind, _, options, tmp_path):
        straight = Net(dtype)
        optimizer = started(kind, straight, options)
        run(straight, optimizer, range(10))

        first = Net(dtype)
        optimizer = started(kind, first, options)
        run(first, optimizer, range(4))
        file = tmp_path / "state.pt"
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        held = torch.load(file, weights_only=True)
        second = Net(dtype)
        second.load_state_dict(held["model"])
        # Other factors and another rate, which the state replaces.
        resumed = started(kind, second, options | {"lr": 1.0}, seed=8)
        resumed.load_state_dict(held["optimizer"])
        run(second, resumed, range(4, 10))
        assert torch.equal(second.kernel, straight.kernel) and torch.equal(second.out.weight, straight.out.weight)
        # The state was copied, not shared.
        assert held["optimizer"]["state"][0]["step"] == 4 and resumed.state[second.kernel]["step"] == 10
        run(first, optimizer, range(4, 10))
        assert torch.equal(first.kernel, straight.kernel)

    def test_states_that_do_not_fit(self):
        one, other = Net(), Net()
        state = started(LoRAAdamW, one, ADAMW).state_dict()
        optimizer = started(LoRASGD, other, SGD)
        plain = torch.optim.AdamW(other.parameters())
        run(other, plain, [0])
        with pytest.raises(LoraError, match=r"expected \['A', 'B', 'step'\] of a parameter, received \['exp_avg'"):
            optimizer.load_state_dict(plain.state_dict())
        swapped = LoRAAdamW(
            [{"params": [one.kernel], "layout": "out_in"}, {"params": [one.out.weight]}],
            layout="out_in", weight_decay=0.1, lr=0.1, **RANK,
        ).state_dict()  # fmt: skip
        swapped["param_groups"][0]["layout"] = "in_out"
        with pytest.raises(
            LoraError, match=r"expected A and B of \(7, 3\) and \(3, 11\), received \(\(11, 3\), \(3, 7"
        ):
            started(LoRAAdamW, one, ADAMW).load_state_dict(swapped)
        fewer = LoRAAdamW([one.kernel], layout="in_out", weight_decay=0.1, lr=0.1, **RANK)
        with pytest.raises(ValueError, match="parameter group"):
            fewer.load_state_dict(state)
        del state["state"][0]["m_A"]
        with pytest.raises(LoraError, match=r"expected \['A', 'B', 'm_A'.*received \['A', 'B', 'm_B'"):
            started(LoRAAdamW, one, ADAMW).load_state_dict(state)


def test_bytes_of_the_state():
    """Per matrix (d, e): A and B, for AdamW three times that, and the counter of steps; beside 16 bits W as it was."""
    factors = 3 * ((7 + 11) + (11 + 5))
    for dtype, width, base in ((torch.float64, 8, 0), (torch.float32, 4, 0), (torch.bfloat16, 4, 2 * (77 + 55))):
        assert state_bytes(started(LoRAAdamW, Net(dtype), ADAMW)) == 3 * width * factors + 2 * 8 + base
        assert state_bytes(started(LoRASGD, Net(dtype), {"lr": 0.1})) == width * factors + 2 * 8 + base
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, optimizer, [0])
    # Two moments per weight, and torch's counter of four bytes.
    assert state_bytes(optimizer) == 2 * 8 * (77 + 55) + 2 * 4


class TestRefused:
    OPTIONS = RANK | {"lr": 0.1, "layout": "in_out"}

    def test_what_is_no_matrix(self):
        with pytest.raises(
            LoraError, match=r"matrices in a group with r=3, received parameter 1 of shape \(5,\); a gro"
        ):
            LoRASGD([nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(5))], **self.OPTIONS)
        optimizer = LoRASGD([nn.Parameter(torch.ones(2, 5))], **self.OPTIONS)
        with pytest.raises(LoraError):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 0}, "r an integer >= 1"),
            ({"alpha": float("inf")}, "alpha a finite number"),
            ({"rslora": None}, "rslora true or false"),
            ({"layout": "fan_in"}, 'layout "in_out" or "out_in", received layout='),
            ({"lr": -0.1}, "lr >= 0"),
            ({"lr": float("nan")}, "lr >= 0"),
            ({"momentum": 1.0}, "momentum below 1"),
            ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(DomainError, match=rf"^lora\..*{message}"):
            LoRASGD([nn.Parameter(torch.ones(2, 5))], **self.OPTIONS | options)

    @pytest.mark.parametrize(("options", "message"), [({"betas": (0.9, 1.0)}, "betas in"), ({"eps": 0.0}, "eps > 0")])
    def test_options_of_adamw(self, options, message):
        with pytest.raises(DomainError, match=message):
            LoRAAdamW([nn.Parameter(torch.ones(2, 5))], weight_decay=0.0, **self.OPTIONS | options)

    def test_sparse_gradients(self):
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = LoRASGD(table.parameters(), **self.OPTIONS)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(LoraError, match=r"^lora\.LoRASGD: sparse gradients are not supported"):
            optimizer.step()


def test_parameters_without_a_gradient_and_a_closure():
    model = Net()
    optimizer = started(LoRASGD, model, SGD)
    held = model.out.weight.clone()

    def closure():
        optimizer.zero_grad()
        value = model.kernel.square().sum()
        value.backward()
        return value

    expected = model.kernel.square().sum()
    close(optimizer.step(closure), expected.detach())
    assert torch.equal(model.out.weight, held) and not torch.equal(model.kernel, Net().kernel)
    assert optimizer.state[model.out.weight]["step"] == 0


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_any_step_is_the_update_of_the_operator(seed, r):
    """Whatever the factors and the gradient: W moves by scale (A' B' - A B)."""
    generator = seeded(seed)
    p = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    optimizer = LoRAAdamW([p], lr=0.1, r=r, alpha=2, rslora=False, layout="in_out", weight_decay=0.3)
    state = optimizer.state[p]
    for name in "AB":
        state[name].normal_(generator=generator)
    p.grad = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    A, B, W = state["A"].clone(), state["B"].clone(), p.detach().clone()
    optimizer.step()
    close(p, W + 2 / r * (state["A"] @ state["B"] - A @ B))
    dA, dB = ops.gradients_dense(p.grad, A, B, scale=2 / r)
    # The first step of AdamW is decay and a move of 0.1 against the sign.
    close(state["A"], 0.97 * A - 0.1 * dA / (dA.abs() + 1e-8))
    close(state["B"], 0.97 * B - 0.1 * dB / (dB.abs() + 1e-8))
