"""FLASH-Quad in PyTorch beside FLASH-pytorch, its step, its start, and the real way of a training.

What it shares with the other models is in test_encoder.py.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conformance.models import flash_quad as judged
from refimpl import model as specification
from refimpl.check import DomainError, ShapeError
from refimpl.models import _heads, flash_quad
from tests.torchimpl.models.test_encoder import inputs_of, module_of
from torchimpl import checkpoint
from torchimpl.model import Model
from torchimpl.models import _encoder
from torchimpl.models.flash_quad import FlashQuad
from torchimpl.training import command, job, journal, start

CASES = {case.name: case for case in judged.cases()}
TIED = _heads.TiedLM()
CONFIG = flash_quad.Config(
    vocab_size=21, segments=1, hidden_size=12, layers=2, expanded_size=18, key_size=6, kernel="squared_relu",
    divisor="array", length=0, rotation="half_split", rotary_base=10000.0, epsilon=1e-5,
)  # fmt: skip


# Against another implementation


def theirs(flash_pytorch, kernel, causal):
    """A unit of FLASH-pytorch with weights of any size, without the position bias that it always has."""
    made = flash_pytorch.GAU(
        dim=12, query_key_dim=6, expansion_factor=1.5, causal=causal, laplace_attn_fn=kernel == "laplace"
    ).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    torch.nn.init.zeros_(made.rel_pos_bias.relative_attention_bias.weight)
    return made


@torch.no_grad()
def taken_over(layer, unit):
    """Its value comes before its gate, and its keys have a dense layer of their own."""
    to_hidden, to_qk, offsets = unit.to_hidden[0], unit.to_qk[0], unit.offsetscale
    value, gate = to_hidden.weight.chunk(2)
    value_bias, gate_bias = to_hidden.bias.chunk(2)
    given = {
        "norm_scale": unit.norm.weight, "norm_bias": unit.norm.bias,
        "w_in": torch.cat([gate, value, to_qk.weight]).T, "b_in": torch.cat([gate_bias, value_bias, to_qk.bias]),
        "gamma_q": offsets.gamma[0], "beta_q": offsets.beta[0], "gamma_k": offsets.gamma[1], "beta_k": offsets.beta[1],
        "w_out": unit.to_out[0].weight.T, "b_out": unit.to_out[0].bias,
    }  # fmt: skip
    layer.load_state_dict(given)


@pytest.mark.parametrize("kernel", ["squared_relu", "laplace"])
@pytest.mark.parametrize("visible", ["bidirectional", "causal"])
def test_layers_are_units_of_flash_pytorch_which_divides_by_the_array(kernel, visible):
    flash_pytorch = pytest.importorskip("flash_pytorch")
    torch.manual_seed(0)
    module = FlashQuad(replace(CONFIG, kernel=kernel)).double().eval()
    units = [theirs(flash_pytorch, kernel, visible == "causal") for _ in range(2)]
    for layer, unit in zip(module.layers, units, strict=True):
        taken_over(layer, unit)
    ids, mask = torch.randint(0, 21, (3, 9)), torch.arange(9) < torch.tensor([[9], [5], [1]])
    # Their unit has no rotation: at one place nothing is turned.
    options = {"visible": _encoder.VISIBLE[visible]}
    embedded, first, last = module.hidden_states(ids, None, mask, torch.zeros(9, dtype=torch.int64), **options)
    x = embedded
    for unit in units:
        x = unit(x, mask=mask)
        if unit is units[0]:
            torch.testing.assert_close(first, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last, module.final_norm(x), rtol=1e-11, atol=1e-11)
    # Another divisor is another model: of FLASH-pytorch no text is what it is alone.
    other = FlashQuad(replace(CONFIG, kernel=kernel, divisor="visible")).double().eval()
    other.load_state_dict(module.state_dict())
    apart = (other.hidden_states(ids, None, mask, torch.zeros(9, dtype=torch.int64), **options)[-1] - last).abs()
    assert apart[1].max() > 1e-3


# The step


@pytest.mark.parametrize("case", ["causal", "constant, causal"])
def test_a_stream_is_the_text_in_the_whole_and_has_its_gradients(case):
    case = CASES[case]
    module, (ids, segments, mask) = module_of(case), inputs_of(case)
    whole = module.hidden_states(ids, segments, mask, visible=_encoder.causal)
    state, pieces = module.initial_state(batch=(4,)), []
    for at in (slice(0, 3), slice(3, 4), slice(4, 4), slice(4, 11)):
        made, state = module.step(state, ids[:, at], segments[:, at], mask[:, at])
        pieces.append(made)
    assert state.tokens == 11 and state.layers[0].k.shape == (4, 11, 4)
    for one, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), one, rtol=1e-11, atol=1e-12)
    told = torch.arange(whole[-1].numel()).reshape(whole[-1].shape)
    gradients = [
        torch.autograd.grad((last * told).sum(), list(module.parameters()))
        for last in (whole[-1], torch.cat([made[-1] for made in pieces], dim=1))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_what_counts_tokens_to_come_has_no_step():
    case = CASES["array, causal"]
    module, state = module_of(case), flash_quad.initial_state(CASES["causal"].config, batch=(4,))
    message = "expected the divisor visible or constant, since no token may read a later one, received divisor='array'"
    for call in (
        lambda: module.initial_state(batch=(4,)),
        lambda: module.step(_encoder.State(0, ()), torch.ones(4, 1, dtype=torch.int64)),
        lambda: flash_quad.initial_state(case.config, batch=(4,)),
        lambda: flash_quad.step(case.weights, state, case.token_ids, config=case.config),
    ):
        with pytest.raises(DomainError, match=message):
            call()
    other = module_of(CASES["causal"])
    ids = torch.ones(4, 2, dtype=torch.int64)
    with pytest.raises(ShapeError, match="flash_quad.step: expected a state of the same texts"):
        other.step(other.initial_state(batch=(3,)), ids)
    with pytest.raises(DomainError, match="flash_quad.step: expected a state of initial_state"):
        other.step(None, ids)


# Numbers


@pytest.mark.parametrize("divisor", ["array", "visible", "constant"])
def test_texts_without_tokens_and_batches_without_texts(divisor):
    module = FlashQuad(replace(CONFIG, divisor=divisor, length=3 * (divisor == "constant"))).eval()
    for shape in ((2, 0), (0, 3), (3,)):
        assert module(torch.ones(shape, dtype=torch.int64)).shape == (*shape, 12)


@pytest.mark.parametrize("case", ["array, padded", "constant", "rows without tokens", "array, causal"])
def test_gradients_are_those_of_the_function_under_every_divisor_and_kernel(case):
    case = CASES[case]
    module = module_of(case)
    inputs = tuple(t[:, :4] for t in inputs_of(case))
    names = [name for name, _ in module.named_parameters()]

    def last(*tensors):
        options = {"visible": _encoder.VISIBLE[case.visible]}
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), inputs, options)

    tensors = tuple(parameter.detach().requires_grad_() for parameter in module.parameters())
    assert torch.autograd.gradcheck(last, tensors, fast_mode=True, eps=1e-7, atol=1e-5)


def test_gammas_start_at_one_because_small_ones_have_no_gradient():
    """Under a constant of 512 a unit that starts at 0.02 adds nothing and learns nothing: its scores are squared."""
    ids = torch.randint(0, 21, (4, 16), generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, key_size=64, divisor="constant", length=512)

    def first_gradient(deviation):
        torch.manual_seed(0)
        module = Model(specification.Model(config, (TIED,), "causal"), hidden_dropout=0.0, attention_dropout=0.0)
        assert all((layer.gamma_q == 1).all() and (layer.gamma_k == 1).all() for layer in module.encoder.layers)
        if deviation:
            for layer in module.encoder.layers:
                for gamma in (layer.gamma_q, layer.gamma_k):
                    torch.nn.init.normal_(gamma, std=deviation)
        logits = module(ids)["mlm_logits"]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return module.encoder.layers[0].w_in.grad.abs().max().item()

    # Adam adds 1e-8 to what it divides a gradient by, LAMB 1e-6.
    assert first_gradient(None) > 1e-6 > 1e-8 > first_gradient(0.02)


# The whole model and its training


@pytest.mark.parametrize("visible", ["bidirectional", "causal", "unilm"])
def test_the_tied_head_in_every_mode_is_the_specifications(visible):
    whole = specification.Model(replace(CONFIG, segments=2, divisor="constant", length=7), (TIED,), visible)
    torch.manual_seed(3)
    module = Model(whole).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    ids, segments = torch.randint(0, 21, (2, 3, 8)), (torch.arange(8) >= 5).long().expand(2, 3, 8)
    mask = torch.rand(2, 3, 8) < 0.8
    found = module(ids, segments, mask)
    weights = {name: tensor.detach().numpy() for name, tensor in module.weights().items()}
    expected = specification.forward(weights, ids.numpy(), segments.numpy(), mask.numpy(), model=whole)
    assert list(found) == list(expected) == ["last_hidden_state", "mlm_logits"]
    for name, array in expected.items():
        atol = 1e-12 * np.abs(array).max()
        np.testing.assert_allclose(found[name].detach().numpy(), array, rtol=0, atol=atol)


TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("mlm", {"divisor": "visible"}),
        ("causal", {"divisor": "constant", "length": 16}),
        ("causal", {"kernel": "laplace"}),
        ("finetune", {"divisor": "visible", "kernel": "laplace"}),
    ],
)
def test_refimpl_train_trains_it_and_goes_on_from_what_was_kept(tmp_path, monkeypatch, task, changes):
    monkeypatch.setattr(journal, "plotted", lambda steps, epochs: b"<svg/>")
    whole = specification.Model(replace(CONFIG, segments=2, **changes), (), "bidirectional")
    specification.write(whole, tmp_path / "model.json")
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    rows = [" ".join(TOKENS[5 + (i + j) % 3] for j in range(3 + i % 5)) for i in range(24)]
    data = tmp_path / ("rows.tsv" if task == "finetune" else "corpus.txt")
    labelled = ["text\tlabel", *(f"{row}\t{'yes' if row[0] == 'a' else 'no'}" for row in rows)]
    data.write_text("\n".join(labelled if task == "finetune" else rows))

    def trained(model, out, *more):
        words = ["train", task, model, data, out, "--max-steps", 2, "--batch-size", 8, "--length", 10, *more]
        done = CliRunner().invoke(command.app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return checkpoint.load(out / "model")

    kept = trained(tmp_path / "model.json", tmp_path / "one", "--tokenizer", tmp_path / "vocab.txt")
    assert kept.model.config == whole.config
    assert kept.model.visible == ("causal" if task == "causal" else "bidirectional")
    due = ("last_hidden_state", *(("logits", "embedding") if task == "finetune" else ("mlm_logits",)))
    assert specification.outputs(kept.model) == due
    with (tmp_path / "one/run/steps.csv").open(newline="") as file:
        assert [np.isfinite(float(row["loss"])) for row in csv.DictReader(file)] == [True, True]
    # Something was learnt: the weights are those of the start no longer.
    begun = start.start(start.Source(kept.model, {}, ""), kept.model, seed=0).weights()
    assert all(torch.isfinite(tensor).all() for tensor in kept.weights.values())
    assert not torch.equal(begun["layers.1.gamma_q"], kept.weights["layers.1.gamma_q"])
    # What was kept is what answers, and can be trained on.
    module = checkpoint.module(kept.model, kept.weights).eval()
    ids = torch.tensor([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0]])
    weights = {name: tensor.double().numpy() for name, tensor in kept.weights.items()}
    expected = specification.forward(weights, ids.numpy(), None, (ids != 0).numpy(), model=kept.model)
    with torch.no_grad():
        found = module(ids, None, ids != 0)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=0, atol=2e-5 * np.abs(array).max())
    again = trained(tmp_path / "one/model", tmp_path / "two")
    assert again.model == kept.model
    assert not torch.equal(again.weights["layers.0.w_in"], kept.weights["layers.0.w_in"])


def test_adapters_find_their_matrices():
    assert job.LORA_TARGETS["flash_quad"] == ("w_in", "w_out")
    assert set(job.LORA_TARGETS) == set(specification.config.known())
