"""LoRA on models: golden runs of PEFT, PEFT itself, hand values, merging bit for bit, folders that are refused."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from refimpl.check import DomainError
from refimpl.models import roformer
from torchimpl import lora
from torchimpl.lora import LoraError
from torchimpl.models.roformer import Roformer
from torchimpl.ops import lora as ops

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_lora"
RULES = {
    "linear_r4_a8": ({"lr": 0.1}, {"lr": 0.01}),
    "linear_r4_a8_rslora": ({"lr": 0.1}, {"lr": 0.01}),
    "linear_r3_a5_nobias": (
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
}
PLAIN = {"r": 3, "alpha": 6, "rslora": False}
SIZES = roformer.dialect(
    "bert4keras-0.11.5", vocab_size=13, segments=2, embedding_size=10, hidden_size=10, layers=2, heads=1,
    intermediate_size=7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_weights_every_time():
    torch.manual_seed(0)


class Two(nn.Module):
    """The model of the golden adapters."""

    def __init__(self, d=8, middle=12, e=5):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, middle), nn.Linear(middle, e, bias=False)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Tagger(nn.Module):
    """An embedding, named layers, a kernel (in, out) of the module itself, and things that are no matrices."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 6), "up_proj": nn.Linear(6, 6)}) for _ in "ab")
        self.norm = nn.LayerNorm(6)
        self.kernel = nn.Parameter(torch.randn(6, 4))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["up_proj"](torch.tanh(layer["proj"](x))))
        return self.norm(x) @ self.kernel


class Words(nn.Module):
    """What PEFT and we can both adapt: an embedding and linear layers whose names end alike."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=2)
        self.proj, self.up_proj = nn.Linear(6, 7), nn.Linear(7, 6)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 5)})

    def forward(self, ids):
        return self.block["proj"](torch.tanh(self.up_proj(torch.tanh(self.proj(self.words(ids))))))


def seeded(number):
    return torch.Generator().manual_seed(number)


def close(found, expected, tolerance=1e-12):
    assert_close(found.detach(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def random_factors(model, deviation=0.3, seed=5):
    """Factors that are both far from zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for adapter in lora.adapters(model).values():
            for factor in (adapter.A, adapter.B):
                factor.copy_(deviation * torch.randn(factor.shape, generator=generator))
    return lora.adapters(model)


def linear(name):
    """The golden layer with its adapter, both factors as PEFT had them."""
    data = golden(name)
    e, d = data["W"].shape
    model = nn.Sequential(nn.Linear(d, e, bias="bias" in data, dtype=torch.float64))
    model[0].load_state_dict({"weight": data["W"]} | ({"bias": data["bias"]} if "bias" in data else {}))
    options = {"r": int(data["r"]), "alpha": float(data["lora_alpha"]), "rslora": bool(data["use_rslora"])}
    (adapter,) = lora.attach(model, ["0"], **options).values()
    with torch.no_grad():
        adapter.A.copy_(data["lora_A"].T)
        adapter.B.copy_(data["lora_B"].T)
    return data, model, adapter


@pytest.mark.parametrize("name", sorted(RULES))
class TestGoldenLayer:
    def test_forward_gradients_merge(self, name):
        data, model, adapter = linear(name)
        assert adapter.scale == pytest.approx(data["scaling"].item(), rel=1e-15)
        x = data["x"].clone().requires_grad_()
        y = model(x)
        close(y, data["y"])
        loss = ((y - data["target"]) ** 2).mean()
        loss.backward()
        close(loss, data["loss"])
        close(adapter.A.grad.T, data["grad_A"])
        close(adapter.B.grad.T, data["grad_B"])
        close(x.grad, data["grad_x"])
        assert model[0].weight.grad is None
        lora.merge(model)
        close(model[0].weight, data["merged_weight"])
        close(model[0].weight - data["W"], data["delta_weight"])
        close(model(data["x"]), data["merged_y"])
        lora.unmerge(model)
        assert torch.equal(model[0].weight, data["W"])
        lora.detach(model)
        close(model(data["x"]), data["y_base"])

    @pytest.mark.parametrize("rule", ["sgd", "adamw"])
    def test_three_steps(self, name, rule):
        data, model, adapter = linear(name)
        options = RULES[name][rule == "adamw"]
        kind = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
        for step in (1, 2, 3):
            optimizer.zero_grad()
            loss = ((model(data["x"]) - data["target"]) ** 2).mean()
            loss.backward()
            optimizer.step()
            close(loss, data[f"{rule}_loss_before_step{step}"])
            close(adapter.A.T, data[f"{rule}_A_after_step{step}"])
            close(adapter.B.T, data[f"{rule}_B_after_step{step}"])


@pytest.mark.parametrize("name", ["adapter", "adapter_rslora"])
def test_golden_folder(name, tmp_path):
    folder, base = GOLDEN / name / "adapter", load_file(GOLDEN / name / "base_model.safetensors")
    io = golden(f"{name}/io")
    model = Two().eval()
    model.load_state_dict(base)
    close(model(io["x"]), io["y_base"], 1e-6)
    lora.load(model, folder)
    close(model(io["x"]), io["y"], 1e-6)
    lora.save(model, tmp_path / "again")
    theirs, ours = (load_file(place / lora.WEIGHTS) for place in (folder, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype for key, tensor in theirs.items())
    written, read = (json.loads((place / lora.CONFIG).read_text()) for place in (tmp_path / "again", folder))
    assert written | read == read | {"task_type": None}
    wide = Two().double().eval()
    wide.load_state_dict(base)
    lora.load(wide, folder, dtype=torch.float64)
    close(wide(io["x"].double()), io["y_float64"])
    lora.merge(wide)
    close(wide.fc1.weight, io["merged_fc1_weight"])
    close(wide.fc2.weight, io["merged_fc2_weight"])
    close(wide(io["x"].double()), io["y_float64"])


class TestAttach:
    def test_it_changes_nothing_at_first_and_trains_the_factors_alone(self):
        model, ids = Tagger(), torch.arange(10).reshape(2, 5)
        expected = model(ids)
        found = lora.attach(model, ["embed", "proj", "kernel"], **PLAIN, generator=seeded(1))
        assert list(found) == ["kernel", "embed", "layers.0.proj", "layers.1.proj"]
        assert torch.equal(model(ids), expected)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {
            *(f"{path}.lora_weight.{x}" for path in ("embed", "layers.0.proj", "layers.1.proj") for x in "AB"),
            *("lora_kernel.A", "lora_kernel.B"),
        }
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            model(ids).square().sum().backward()
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == learning

    def test_start_is_that_of_peft(self):
        model = Words()
        found = lora.attach(model, ["proj", "words"], **PLAIN, generator=seeded(7))
        drawn = seeded(7)
        # In the order of the model: the embedding first.
        assert not found["words"].A.any()
        assert torch.equal(found["words"].B, torch.randn(6, 3, generator=drawn).T)
        for name in ("proj", "block.proj"):
            uniform = nn.init.kaiming_uniform_(torch.empty(3, 6), a=5**0.5, generator=drawn)
            close(found[name].A, uniform.T, 1e-6)
            assert not found[name].B.any()
        again = lora.attach(Words(), ["proj", "words"], **PLAIN, generator=seeded(7))
        assert all(torch.equal(again[name].A, found[name].A) for name in found)

    def test_bound_of_the_start(self):
        # in = 16: 1 / sqrt(in) = 1/4, of in and not of out or r.
        model = nn.ModuleDict({"x": nn.Linear(16, 3)})
        A = lora.attach(model, ["x"], r=500, alpha=1, rslora=False, generator=seeded(0))["x"].A
        assert 0.249 < A.abs().max() <= 0.25 and A.shape == (16, 500)

    @pytest.mark.parametrize(
        ("targets", "names"),
        [
            (["up_proj"], ["layers.0.up_proj", "layers.1.up_proj"]),
            (["proj"], ["layers.0.proj", "layers.1.proj"]),
            (["1.proj", "kernel"], ["kernel", "layers.1.proj"]),
            (["embed", "kernel"], ["kernel", "embed"]),
            (r".*\.1\.\w*proj", ["layers.1.proj", "layers.1.up_proj"]),
            (r"layers\.\d\.proj", ["layers.0.proj", "layers.1.proj"]),
            ("kernel", ["kernel"]),
        ],
    )
    def test_targets(self, targets, names):
        assert list(lora.attach(Tagger(), targets, **PLAIN)) == names

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (
                ["q_proj"],
                r"no matrix is named q_proj; the model has kernel, embed, layers\.0\.proj, layers\.0\.up_proj",
            ),
            (["proj", "oj"], "no matrix is named oj; "),
            ("proj", "no matrix is named proj; "),
            (["norm"], "expected a matrix as target, received norm, a LayerNorm"),
            (["norm.weight"], r"received norm\.weight, of shape \(6,\)"),
            (r"layers\.0.*", r"received layers\.0, a ModuleDict"),
        ],
    )
    def test_targets_that_are_none(self, targets, message):
        model = Tagger()
        names = list(model.state_dict())
        with pytest.raises(LoraError, match=f"^lora.attach: .*{message}"):
            lora.attach(model, targets, **PLAIN)
        assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())

    def test_patterns(self):
        found = lora.attach(
            Tagger(), ["proj", "up_proj"], r=2, alpha=8, rslora=False,
            rank_pattern={"proj": 1, r"layers\.0\.up_proj": 4, "up_proj": 5}, alpha_pattern={r"1\..*": 30},
        )  # fmt: skip
        ranks = {name: (adapter.A.shape[1], adapter.scale) for name, adapter in found.items()}
        assert ranks == {
            "layers.0.proj": (1, 8), "layers.0.up_proj": (4, 2), "layers.1.proj": (1, 30), "layers.1.up_proj": (5, 6),
        }  # fmt: skip
        (adapter,) = lora.attach(Two(), ["fc1"], r=2, alpha=8, rslora=True, rank_pattern={"c1": 2, "f.1": 4}).values()
        assert (adapter.A.shape, adapter.scale) == ((8, 4), 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 0}, "r an integer >= 1, received r=0"),
            ({"r": 2.0}, "r an integer"),
            ({"alpha": float("nan")}, "alpha a finite number"),
            ({"alpha": True}, "alpha a number"),
            ({"rslora": 1}, "rslora true or false"),
            ({"dropout": 1.0}, "dropout from 0 to below 1"),
            ({"rank_pattern": {"x": 0}}, "r an integer >= 1, received r=0"),
            ({"alpha_pattern": {"x": "8"}}, "alpha a number"),
            ({"rank_pattern": {"(": 1}}, "a regular expression, received pattern='?[(]"),
            ({"targets": []}, "targets a tuple of names or one regular expression"),
            ({"targets": [""]}, "targets a tuple"),
            ({"targets": "fc[1"}, "a regular expression"),
            ({"dtype": torch.int32}, "a floating dtype"),
        ],
    )
    def test_options(self, options, message):
        options = {"targets": ["fc1"]} | PLAIN | options
        with pytest.raises(DomainError, match=message):
            lora.attach(Two(), **options)

    def test_attach_twice_shared_and_taken(self):
        model = Two()
        lora.attach(model, ["fc1"], **PLAIN)
        with pytest.raises(LoraError, match="has adapters already"):
            lora.attach(model, ["fc2"], **PLAIN)
        tied = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        tied["head"].weight = tied["words"].weight
        with pytest.raises(LoraError, match=r"words\.weight, head\.weight are one tensor"):
            lora.attach(tied, ["head"], **PLAIN)
        model = Two()
        model.fc1.lora_weight = nn.Identity()
        with pytest.raises(LoraError, match="fc1 has lora_weight beside it already"):
            lora.attach(model, ["fc1"], **PLAIN)
        model = Two()
        nn.utils.parametrizations.weight_norm(model.fc1)
        with pytest.raises(LoraError, match="fc1 is no parameter but computed from others"):
            lora.attach(model, ["fc1"], **PLAIN)
        for function in (lora.adapters, lora.merge, lora.unmerge, lora.detach, lora.merged_weights):
            with pytest.raises(LoraError, match=rf"^lora\.{function.__name__}: the model has no adapters"):
                function(Two())

    def test_detach_leaves_the_model_as_it_was(self):
        model, ids = Tagger(), torch.arange(10).reshape(2, 5)
        model.norm.weight.requires_grad_(False)
        names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
        expected, weights = model(ids), list(model.parameters())
        lora.attach(model, ["embed", "up_proj", "kernel"], **PLAIN)
        random_factors(model)
        assert not torch.allclose(model(ids), expected)
        assert [name for name in model.state_dict() if ".lora_" not in f".{name}"] == names
        lora.detach(model)
        assert list(model.state_dict()) == names and type(model) is Tagger and not model.embed._forward_hooks
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
        assert torch.equal(model(ids), expected)
        lora.attach(model, ["embed", "up_proj", "kernel"], **PLAIN)

    def test_dropout_meets_the_input_of_A_in_training_only(self):
        model = nn.Sequential(nn.Linear(400, 1, bias=False))
        lora.attach(model, ["0"], r=1, alpha=1, rslora=False, dropout=0.25)
        adapter = lora.adapters(model)["0"]
        with torch.no_grad():
            model[0].weight.fill_(1.0)
            adapter.A.copy_(torch.eye(400)[:, :1])
            adapter.B.fill_(3.0)
        x = torch.ones(2000, 400)
        torch.manual_seed(0)
        values = model(x).unique()
        # 400 of W whole, and 3 times what is left of one feature: nothing, or 1 / (1 - 0.25).
        assert values.tolist() == [400.0, 404.0]
        assert (model.eval()(x) == 403).all()
        with pytest.raises(LoraError, match="dropout acts on the input of an nn.Linear; kernel is held by its module"):
            lora.attach(Tagger(), ["kernel"], **PLAIN, dropout=0.1)

    def test_sixteen_bits(self):
        """The adapter is float32 beside bfloat16, and its part is added before the output is rounded."""
        model = nn.Sequential(nn.Linear(64, 8, bias=False, dtype=torch.bfloat16))
        adapter = random_factors(model) if lora.attach(model, ["0"], **PLAIN) else {}
        assert adapter["0"].A.dtype == torch.float32
        x = torch.randn(5, 64, dtype=torch.bfloat16, generator=seeded(3))
        y = model(x)
        base = functional.linear(x, model[0].weight)
        change = ops.delta(adapter["0"].A, adapter["0"].B, scale=2.0).double()
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, (base.double() + x.double() @ change).to(torch.bfloat16))
        lora.detach(model)
        assert lora.attach(model, ["0"], **PLAIN, dtype=torch.bfloat16)["0"].B.dtype == torch.bfloat16
        assert model(x).dtype == torch.bfloat16

    def test_a_copy_is_independent(self):
        model, ids = Tagger(), torch.arange(10)
        lora.attach(model, ["up_proj", "kernel", "embed"], **PLAIN)
        random_factors(model)
        other = copy.deepcopy(model)
        expected = model(ids)
        assert torch.equal(other(ids), expected)
        random_factors(other, seed=6)
        assert not torch.allclose(other(ids), expected)
        lora.detach(other)
        assert torch.equal(model(ids), expected) and not torch.allclose(other(ids), expected)
        lora.merge(model)
        lora.detach(model)
        close(model(ids), expected, 1e-5)

    def test_modules_that_do_not_call_their_linear_layers(self):
        """In evaluation a TransformerEncoderLayer computes with the weights at once; attention always does."""
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
        x = torch.randn(2, 3, 8, generator=seeded(2))
        with torch.no_grad():
            base = model(x)
            for targets in (["linear1"], ["out_proj"], ["in_proj_weight"]):
                lora.attach(model, targets, **PLAIN)
                random_factors(model)
                adapted = model(x)
                assert not torch.allclose(adapted, base, atol=1e-3)
                lora.merge(model)
                close(model(x), adapted, 1e-5)
                lora.unmerge(model)
                lora.detach(model)
                assert torch.equal(model(x), base)


class TestKernels:
    TARGETS = ("w_q", "w_v", "feed_forward.w_in")

    @pytest.fixture
    def model(self):
        torch.manual_seed(1)
        return Roformer(SIZES).eval()

    def adapted(self, model):
        lora.attach(model, self.TARGETS, **PLAIN)
        return random_factors(model)

    def test_every_use_sees_the_sum_and_gradients_are_projected(self, model):
        ids = torch.arange(12).reshape(2, 6)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = self.adapted(model)
        assert list(found)[:3] == ["layers.0.attention.w_q", "layers.0.attention.w_v", "layers.0.feed_forward.w_in"]
        plain = Roformer(SIZES).eval()
        summed = {name: weights[name] + 2.0 * (a.A @ a.B).detach() for name, a in found.items()}
        plain.load_state_dict(weights | summed)
        expected, y = plain(ids), model(ids)
        close(y, expected.detach(), 1e-5)
        upstream = torch.randn(y.shape, generator=seeded(4))
        y.backward(upstream)
        expected.backward(upstream)
        for name, adapter in found.items():
            dA, dB = ops.gradients_dense(plain.get_parameter(name).grad, adapter.A, adapter.B, scale=2.0)
            close(adapter.A.grad, dA.detach(), 1e-4)
            close(adapter.B.grad, dB.detach(), 1e-4)

    def test_weights_for_a_checkpoint(self, model, tmp_path):
        ids, names = torch.arange(12).reshape(2, 6), set(model.state_dict())
        self.adapted(model)
        expected = model(ids)
        for merged in (False, True):
            if merged:
                lora.merge(model)
            weights = lora.merged_weights(model)
            assert set(weights) == names
            plain = Roformer(SIZES).eval()
            plain.load_state_dict(weights)
            close(plain(ids), expected.detach(), 1e-5)
        lora.detach(model)
        close(model(ids), expected.detach(), 1e-5)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    def test_folder(self, model, tmp_path):
        ids = torch.arange(12).reshape(2, 6)
        other = copy.deepcopy(model)
        self.adapted(model)
        lora.save(model, tmp_path)
        told = json.loads((tmp_path / lora.CONFIG).read_text())
        assert told["fan_in_fan_out"] is True
        tensors = load_file(tmp_path / lora.WEIGHTS)
        assert tensors["base_model.model.layers.1.feed_forward.w_in.lora_B.weight"].shape == (7, 3)
        lora.load(other, tmp_path)
        assert torch.equal(other(ids), model(ids))

    def test_captured_whole(self):
        ids, model = torch.arange(12).reshape(2, 6), Roformer(dataclasses.replace(SIZES, layers=1)).eval()
        self.adapted(model)
        close(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids).detach(), 1e-5)

    def test_sixteen_bits_are_rounded_once(self):
        model = Tagger().bfloat16()
        with torch.no_grad():
            model.kernel.fill_(1.0)
        (adapter,) = lora.attach(model, ["kernel"], r=2, alpha=2, rslora=False).values()
        with torch.no_grad():
            # Each half of the change is below half an ulp (2^-9 at 1) and the sum is above it.
            adapter.A.fill_(1.0)
            adapter.B.fill_(2**-8 * 0.75)
        assert (model.kernel == 1 + 2**-7).all()


def test_all_forms_are_captured_whole():
    model, ids = Tagger(), torch.arange(10).reshape(2, 5)
    lora.attach(model, ["embed", "up_proj", "kernel"], **PLAIN)
    random_factors(model)
    gradients = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(ids).sin().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert gradient.any()
        close(gradients[1][name], gradient, 1e-4)


class TestMerge:
    TARGETS = ("embed", "up_proj", "kernel")

    def model(self):
        torch.manual_seed(3)
        model = Tagger().bfloat16()
        lora.attach(model, self.TARGETS, **PLAIN)
        random_factors(model)
        return model

    def test_out_of_order(self):
        model = self.model()
        with pytest.raises(LoraError, match=r"^lora\.unmerge: the adapters are not merged"):
            lora.unmerge(model)
        lora.merge(model)
        held = model.embed.weight.clone()
        with pytest.raises(LoraError, match=r"^lora\.merge: the adapters are merged already; lora\.unmerge restores"):
            lora.merge(model)
        assert torch.equal(model.embed.weight, held)
        lora.unmerge(model)
        with pytest.raises(LoraError, match="are not merged"):
            lora.unmerge(model)

    def test_merged_weight_is_the_rounded_sum(self):
        model = self.model()
        found, base = lora.adapters(model), model.layers[0]["up_proj"].weight.clone()
        adapter = found["layers.0.up_proj"]
        lora.merge(model)
        wide = base.double() + 2.0 * (adapter.A.double() @ adapter.B.double()).T
        assert_close(model.layers[0]["up_proj"].weight.double(), wide, rtol=2**-8, atol=1e-7)
        assert (model.layers[0]["up_proj"].weight.double() - wide).abs().max() > 0

    def test_a_thousand_cycles_of_a_changing_adapter_restore_every_bit(self):
        model = self.model()
        names = ("embed.weight", "layers.0.up_proj.weight", "kernel")
        held = dict(model.named_parameters())
        base = {name: held[name].detach().clone() for name in names}
        generator, naive = seeded(9), base["embed.weight"].clone()
        for _ in range(1000):
            for adapter in lora.adapters(model).values():
                for factor in (adapter.A, adapter.B):
                    factor.data.normal_(generator=generator)
            adapter = lora.adapters(model)["embed"]
            naive = ops.unmerge(ops.merge(naive, adapter.A, adapter.B, scale=2.0), adapter.A, adapter.B, scale=2.0)
            lora.merge(model)
            assert not torch.equal(model.embed.weight, base["embed.weight"])
            # The adapter may go on while it is merged.
            adapter.A.data.add_(1.0)
            lora.unmerge(model)
        assert all(torch.equal(held[name], bits) for name, bits in base.items())
        # Without the kept bits the same cycles wear the weight away.
        assert not torch.equal(naive.detach(), base["embed.weight"])

    @given(st.integers(0, 10**6), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    def test_a_cycle_restores_every_bit(self, seed, dtype):
        model = nn.Sequential(nn.Linear(5, 3, dtype=dtype))
        with torch.no_grad():
            # Weights of every size, and signed zeros.
            exponents = torch.randint(-8, 8, (3, 5), generator=seeded(seed))
            model[0].weight.copy_(torch.randn(3, 5, generator=seeded(seed)) * 2.0**exponents)
            model[0].weight[0, :2] = torch.tensor([0.0, -0.0])
        bits = model[0].weight.detach().clone()
        lora.attach(model, ["0"], **PLAIN)
        random_factors(model, 10.0, seed)
        lora.merge(model)
        lora.unmerge(model)
        assert torch.equal(model[0].weight, bits)
        assert torch.equal(model[0].weight.signbit(), bits.signbit())

    def test_a_merged_state_is_not_taken_for_an_unmerged_one(self):
        model, other = self.model(), self.model()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lora.merge(model)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*embed\.lora_weight\.base"):
            other.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key.*embed\.lora_weight\.base"):
            model.load_state_dict(state)
        lora.merge(other)
        other.load_state_dict(model.state_dict())
        lora.unmerge(other)
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())

    def test_merged_it_learns_nothing(self):
        model = self.model().float()
        lora.merge(model)
        assert not model(torch.arange(5)).requires_grad


@pytest.fixture
def folder(tmp_path):
    model = Two()
    lora.attach(model, ["fc1", "fc2"], **PLAIN)
    random_factors(model)
    lora.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **values):
    told = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(told | values))


class TestFolder:
    def test_round_trip_keeps_the_dtype_and_the_configuration(self, tmp_path):
        model = Words()
        lora.attach(
            model, r".*(proj|words)", r=2, alpha=3.5, rslora=True, dropout=0.1, rank_pattern={"up_proj": 5},
            alpha_pattern={"words": 7}, dtype=torch.bfloat16,
        )  # fmt: skip
        random_factors(model)
        lora.save(model, tmp_path / "a")
        assert {file.name for file in (tmp_path / "a").iterdir()} == {lora.CONFIG, lora.WEIGHTS}
        other = Words()
        found = lora.load(other, tmp_path / "a")
        assert other.lora_attached.config == model.lora_attached.config
        for name, adapter in lora.adapters(model).items():
            assert torch.equal(adapter.A, found[name].A) and torch.equal(adapter.B, found[name].B)
            assert found[name].A.dtype == torch.bfloat16 and found[name].A.requires_grad
            assert found[name].scale == adapter.scale
        assert lora.load(Words(), tmp_path / "a", dtype=torch.float64)["proj"].B.dtype == torch.float64

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("use_dora", True), ("modules_to_save", ["fc2"]), ("lora_bias", True), ("bias", "all"),
            ("init_lora_weights", "pissa"), ("init_lora_weights", 1), ("layers_to_transform", [0]),
            ("exclude_modules", ["fc2"]), ("target_parameters", ["x"]), ("trainable_token_indices", [1]),
            ("peft_type", "LOHA"), ("loftq_config", {"loftq_bits": 4}), ("an_option_of_tomorrow", "on"),
        ],
    )  # fmt: skip
    def test_options_that_are_on_are_refused_by_name(self, folder, key, value):
        change(folder, **{key: value})
        model = Two()
        with pytest.raises(LoraError, match=rf"not supported, expected to be off: {key}="):
            lora.load(model, folder)
        assert not hasattr(model, "lora_attached")

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ({"r": None}, LoraError, "lacks r"),
            ({"target_modules": None}, LoraError, "lacks target_modules"),
            ({"target_modules": 3}, DomainError, "targets a tuple"),
            ({"target_modules": ["fc3"]}, LoraError, "no matrix is named fc3; the model has fc1, fc2"),
            ({"target_modules": ["fc1"]}, LoraError, r"missing: none; unknown: base_model\.model\.fc2\.lora_A\.weight"),
            ({"r": 4}, LoraError, r"fc1\.lora_A\.weight of shape \(4, 8\), received \(3, 8\)"),
            ({"rank_pattern": {"fc2": 2}}, LoraError, r"fc2\.lora_A\.weight of shape \(2, 12\), received \(3, 12\)"),
            ({"lora_alpha": float("inf")}, DomainError, "alpha a finite number"),
            ({"use_rslora": None}, DomainError, "rslora true or false"),
            ({"lora_alpha": 10**400}, DomainError, r"of at most 2\^53"),
            ({"r": 10**400}, DomainError, r"of at most 2\^53"),
        ],
    )
    def test_configurations_that_do_not_fit(self, folder, values, error, message):
        change(folder, **values)
        with pytest.raises(error, match=message):
            lora.load(Two(), folder)

    def test_targets_of_other_models_are_passed_over(self, folder):
        change(folder, target_modules=["fc1", "fc2", "q_proj"])
        assert list(lora.load(Two(), folder)) == ["fc1", "fc2"]

    def test_files_that_are_damaged(self, folder):
        tensors = load_file(folder / lora.WEIGHTS)
        first = min(tensors)

        def refused(message):
            with pytest.raises(LoraError, match=message):
                lora.load(Two(), folder)

        with pytest.raises(LoraError, match="expected .*fc1.lora_A.weight of shape"):
            lora.load(Two(d=9), folder)
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / lora.WEIGHTS)
        refused(rf"missing: {first}; unknown: none")
        save_file(tensors | {first: tensors[first] / 0}, folder / lora.WEIGHTS)
        refused(f"{first} holds numbers that are not finite")
        save_file(tensors | {first: tensors[first].bfloat16()}, folder / lora.WEIGHTS)
        refused("expected tensors of one floating dtype")
        save_file({name: tensor.int() for name, tensor in tensors.items()}, folder / lora.WEIGHTS)
        refused("expected tensors of one floating dtype")
        (folder / lora.WEIGHTS).write_bytes(b"\x80\x02" * 40)
        refused("is no safetensors file")
        (folder / lora.WEIGHTS).unlink()
        refused(r"adapter_model\.safetensors is missing$")
        (folder / "adapter_model.bin").write_bytes(b"")
        refused(r"is missing; adapter_model\.bin is not read, pickle runs code")
        (folder / lora.CONFIG).write_text("[1]")
        refused("expected a JSON object, received list")
        (folder / lora.CONFIG).write_text("{")
        refused("is no JSON")
        (folder / lora.CONFIG).write_text('{"r": ' + "1" * 5000 + "}")
        refused("is no JSON")
        (folder / lora.CONFIG).write_text("[" * 100_000)
        refused("is no JSON")
        (folder / lora.CONFIG).write_text(" " * (lora.LONGEST_CONFIG + 1))
        refused("has 1048577 bytes, expected at most 1048576")
        (folder / lora.CONFIG).unlink()
        refused(r"adapter is no adapter folder: it has no adapter_config\.json")

    def test_what_is_not_finite_is_not_written(self, folder):
        model = Two()
        lora.load(model, folder)
        model.fc2.lora_weight.B.data[0, 0] = torch.inf
        before = (folder / lora.CONFIG).read_bytes()
        with pytest.raises(LoraError, match=r"fc2\.lora_B\.weight holds numbers that are not finite"):
            lora.save(model, folder)
        assert (folder / lora.CONFIG).read_bytes() == before

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_save_that_is_stopped_leaves_no_mixture(self, folder, monkeypatch, count):
        model = Two()
        lora.attach(model, ["fc1"], **PLAIN)
        calls, real = [], os.replace

        def stopping(*arguments):
            calls.append(arguments)
            if len(calls) == count:
                raise KeyboardInterrupt
            real(*arguments)

        (folder / "README.md").write_text("mine")
        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            lora.save(model, folder)
        assert {file.name for file in folder.iterdir()} == {lora.WEIGHTS, "README.md"}
        with pytest.raises(LoraError, match="is no adapter folder"):
            lora.load(Two(), folder)
        monkeypatch.undo()
        lora.save(model, folder)
        assert list(lora.load(Two(), folder)) == ["fc1"]
        assert (folder / "README.md").read_text() == "mine"


class TestPeft:
    """PEFT itself beside us, on a model with names that end alike."""

    OPTIONS = {"r": 3, "alpha": 5, "rank_pattern": {"proj": 2, "block.proj": 4}, "alpha_pattern": {"^words": 9}}
    TARGETS = ("proj", "up_proj", "words")

    @pytest.mark.parametrize("rslora", [False, True])
    def test_it_reads_our_folder(self, tmp_path, rslora):
        peft = pytest.importorskip("peft")
        model, ids = Words().double(), torch.arange(10).reshape(2, 5)
        theirs = copy.deepcopy(model)
        lora.attach(model, self.TARGETS, rslora=rslora, **self.OPTIONS)
        random_factors(model)
        lora.save(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, autocast_adapter_dtype=False)
        found = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "scaling")}
        assert found.keys() == lora.adapters(model).keys()
        for name, adapter in lora.adapters(model).items():
            assert found[name].r["default"] == adapter.A.shape[1]
            assert found[name].scaling["default"] == pytest.approx(adapter.scale, rel=1e-15)
        assert len({adapter.A.shape[1] for adapter in lora.adapters(model).values()}) == 2
        close(model(ids), theirs(ids).detach())
        merged = theirs.merge_and_unload()
        lora.merge(model)
        for name, tensor in lora.merged_weights(model).items():
            close(tensor, merged.state_dict()[name])

    @pytest.mark.parametrize("targets", [["proj", "up_proj", "words"], r"(block\.proj|up_.*)"])
    def test_we_read_its_folder_and_train_alike(self, tmp_path, targets):
        peft = pytest.importorskip("peft")
        model, ids = Words().double(), torch.arange(10).reshape(2, 5)
        config = peft.LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, target_modules=targets, rank_pattern={"up_proj": 2},
            init_lora_weights=False,
        )  # fmt: skip
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
        theirs.save_pretrained(tmp_path)
        start = {name: adapter.A[2].clone() for name, adapter in lora.load(model, tmp_path).items() if name == "words"}
        close(model(ids), theirs(ids).detach())
        optimizers = [
            torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
            for one in (model, theirs)
        ]
        for _ in range(5):
            for one, optimizer in zip((model, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                one(ids).square().mean().backward()
                optimizer.step()
        close(model(ids), theirs(ids).detach())
        if "words" in lora.adapters(model):
            assert torch.equal(lora.adapters(model)["words"].A[2], start["words"])
