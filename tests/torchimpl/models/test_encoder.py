"""Every model: agreement with the specification and its laws, names, initialiser, dropout, gradients, compilation."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch.func import functional_call

from conformance.budget import Profile
from conformance.models import _encoder as judge
from conformance.models import flash as judged_flash
from conformance.models import flash_quad as judged_flash_quad
from conformance.models import gau_alpha as judged_gau_alpha
from refimpl import config as configuration
from refimpl import model as specification
from refimpl.check import DomainError, ShapeError
from refimpl.models._heads import SequenceClassifier, TiedLM
from torchimpl.model import Model
from torchimpl.models import _encoder, _heads
from torchimpl.models.flash import Flash
from torchimpl.models.flash_quad import FlashQuad
from torchimpl.models.gau_alpha import GauAlpha

TIED = TiedLM()
MODELS = {
    "gau_alpha": (GauAlpha, judged_gau_alpha),
    "flash": (Flash, judged_flash),
    "flash_quad": (FlashQuad, judged_flash_quad),
}
CASES = [(name, case.name) for name, (_, judged) in MODELS.items() for case in judged.cases()]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def case_of(name, case="padded"):
    return next(c for c in MODELS[name][1].cases() if c.name == case)


def module_of(case, dtype=torch.float64, **options):
    """The module of a case, with its weights, in eval mode."""
    module = MODELS[case.config.model][0](case.config, **options).to(dtype)
    module.load_state_dict({name: torch.tensor(array) for name, array in case.weights.items()})
    return module.eval()


def inputs_of(case):
    given = (case.token_ids, case.segment_ids, case.mask)
    return tuple(None if array is None else torch.tensor(array) for array in given)


def arrays(dtype=torch.float64):
    """The module and the tied head as the judge calls a model."""

    def model(weights, token_ids, segment_ids, mask, positions, *, config, visible):
        case = judge.Case("", config, weights, token_ids, segment_ids, mask)
        seen = {} if config.model == "flash" else {"visible": _encoder.VISIBLE[visible]}
        module, head = module_of(case, dtype), _heads.TiedLM(config, TIED).eval()
        positions = None if positions is None else torch.tensor(positions)
        with torch.no_grad():
            states = module.hidden_states(*inputs_of(case), positions, **seen)
            assert torch.equal(module(*inputs_of(case), positions, **seen), states[-1])
            return [t.double().numpy() for t in (head(states[-1], module.embedding.token), *states)]

    return model


def _call(module, method, inputs):
    return module(*inputs) if method == "forward" else getattr(module, method)(*inputs)


# Agreement


def agree(found, specified, share):
    for one, other in zip(found, specified, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float64_equals_the_specification(name, case):
    judged, case = MODELS[name][1], case_of(name, case)
    profile = Profile("float64", "strict", "A64")
    agree(judge.run(arrays(), case, profile), judge.run(judged.model, case, profile), 1e-12)
    assert judge.worst(arrays(), judged.reference, case, profile) <= 1


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float32_stays_within_the_bound_of_float32(name, case):
    # The bound is what every order of float32 operations may do, handed from layer to layer in the worst direction.
    judged, case = MODELS[name][1], case_of(name, case)
    profile = Profile("float32", "strict", "A64")
    assert judge.worst(arrays(torch.float32), judged.reference, case, profile) <= 1
    # Roundings do not conspire: 8e-7 is reached, where the bound allows a thousand times more.
    agree(judge.run(arrays(torch.float32), case, profile), judge.run(judged.model, case, profile), 1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gau_alpha", "padded"),
        ("gau_alpha", "causal"),
        ("gau_alpha", "unilm"),
        ("flash", "padded"),
        ("flash", "causal"),
        ("flash_quad", "padded"),
        ("flash_quad", "causal"),
        ("flash_quad", "array, causal"),
    ],
)
def test_the_laws_hold(name, case, dtype):
    judged, case = MODELS[name][1], case_of(name, case)
    for law in judged.laws(case) if name.startswith("flash") else judge.LAWS:
        law(arrays(DTYPES[dtype]), case, judged.reference, Profile(dtype, "strict", "A64"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_layers_are_swapped_is_found_out(name):
    case, judged = case_of(name), MODELS[name][1]

    def model(weights, *arguments, **options):
        swapped = {n.replace("layers.0", "l").replace("layers.1", "layers.0").replace("l.", "layers.1."): w
                   for n, w in weights.items() if n.startswith("layers.")}  # fmt: skip
        return arrays()({**weights, **swapped}, *arguments, **options)

    assert judge.worst(model, judged.reference, case, Profile("float64", "strict", "A64")) > 1e6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_give_finite_results_nearby(name, dtype):
    case = case_of(name)
    _, *right = judge.run(arrays(), case, Profile("float64"))
    found = module_of(case, DTYPES[dtype]).hidden_states(*inputs_of(case))
    assert all(part.dtype == DTYPES[dtype] for part in found)
    unit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    agree([part.detach().double().numpy() for part in found], right, 20 * unit)


# Names and files


@pytest.mark.parametrize("name", MODELS)
def test_the_state_has_the_names_and_shapes_of_the_specification(name):
    case, (kind, judged) = case_of(name), MODELS[name]
    state = kind(case.config).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == judged.spec.shapes(case.config)
    assert sum(p.numel() for p in kind(case.config).parameters()) == judged.spec.parameters(case.config)


@pytest.mark.parametrize("name", MODELS)
def test_one_file_serves_both(name, tmp_path):
    kind, judged = MODELS[name]
    case = case_of(name)
    torch.manual_seed(3)
    module = kind(case.config).double().eval()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    configuration.write(module.config, tmp_path / "config.json")
    weights, config = load_file(tmp_path / "model.safetensors"), configuration.read(tmp_path / "config.json")
    specified = judged.spec.hidden_states(weights, case.token_ids, case.segment_ids, case.mask, config=config)
    for one, other in zip(module.hidden_states(*inputs_of(case)), specified, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, rtol=0, atol=1e-12)


# Initialiser


def test_the_deviations_of_the_release():
    # 24^(-1/3)/√768 and /√1536.
    gain = _encoder.gain(24, _encoder.GAU_ORDER)
    assert gain / math.sqrt(768) == pytest.approx(0.01251, abs=5e-6)
    assert gain / math.sqrt(1536) == pytest.approx(0.00885, abs=5e-6)
    # 1 / 0.87962566, as bert4keras has it.
    assert pytest.approx(1.13684723, abs=1e-8) == 1 / _encoder.CUT_DEVIATION


@pytest.mark.parametrize("name", MODELS)
def test_weights_start_with_their_deviation_and_within_two_sigma(name):
    sizes = {"vocab_size": 701, "hidden_size": 192, "layers": 3, "expanded_size": 384, "key_size": 64}
    config = configuration.from_dict(configuration.to_dict(case_of(name).config) | sizes)
    torch.manual_seed(0)
    module = MODELS[name][0](config)
    gain = 3 ** (-1 / 3)
    due = {"embedding.token": gain / math.sqrt(192)}
    due |= {f"layers.{i}.w_in": gain / math.sqrt(192) for i in range(3)}
    due |= {f"layers.{i}.w_out": gain / math.sqrt(384) for i in range(3)}
    for key, parameter in module.named_parameters():
        if key in due:
            values = parameter.detach().double()
            # At least 70000 numbers: their deviation is known to 0.2 %.
            assert values.std().item() == pytest.approx(due[key], rel=0.01), key
            assert abs(values.mean().item()) < 0.02 * due[key]
            sigma = 1.13684723 * due[key]
            assert 1.99 * sigma < values.abs().max().item() <= 2 * sigma * (1 + 1e-6), key
        elif key.endswith(("bias", "beta", "beta_q", "beta_k", "b_in", "b_out")):
            assert (parameter == 0).all(), key
        elif key.endswith("scale") or "gamma_" in key:
            assert (parameter == 1).all(), key
        elif key.endswith("gamma"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), key
        else:
            assert key == "embedding.segment"
    assert all(
        not torch.equal(one.w_in, other.w_in) for one, other in zip(module.layers[:-1], module.layers[1:], strict=True)
    )


# Dropout


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_only(name):
    case = case_of(name)
    module, inputs = module_of(case), inputs_of(case)
    torch.manual_seed(0)
    still = module(*inputs)
    assert torch.equal(still, module(*inputs))
    module.train()
    assert not torch.equal(module(*inputs), module(*inputs))
    assert {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    for dropout in (m for m in module.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    assert torch.equal(still, module(*inputs))


@pytest.mark.parametrize("name", MODELS)
def test_hidden_dropout_stands_before_the_embeddings_norm_and_on_the_unit(name):
    case = case_of(name)
    module, inputs = module_of(case).train(), inputs_of(case)
    torch.manual_seed(0)
    module.embedding.dropout.p = 0.5
    embedded = module.hidden_states(*inputs)[0]
    square = (embedded**2).mean(dim=-1)
    # Features are missing, and the rows are normalised nevertheless.
    assert 0.3 < (embedded == 0).double().mean() < 0.7
    torch.testing.assert_close(square[square > 0], torch.ones_like(square[square > 0]), rtol=1e-3, atol=0)
    module.embedding.dropout.p = 0.0
    # Without any unit the residual path alone is left.
    options = {"hidden_dropout": 1.0}
    module = module_of(case, **options).train()
    module.embedding.dropout.p = 0.0
    embedded, *states, last = module.hidden_states(*inputs)
    for state in states:
        torch.testing.assert_close(state, embedded, rtol=1e-10, atol=1e-10)
    expected = embedded if name == "gau_alpha" else module.final_norm(embedded)
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gau_alpha", "flash_quad"])
def test_attention_dropout_acts_on_the_weights(name):
    case = case_of(name)
    # What is not attended to leaves the bias alone.
    case = case.with_(weights={n: 0 * w if n.endswith("b_out") else w for n, w in case.weights.items()})
    module, inputs = module_of(case, hidden_dropout=0.0, attention_dropout=1.0).train(), inputs_of(case)
    embedded, *states = module.hidden_states(*inputs)
    for state in states if name == "gau_alpha" else states[:-1]:
        torch.testing.assert_close(state, embedded, rtol=1e-10, atol=1e-10)


# Gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_function(name):
    case = case_of(name, "rows without tokens")
    module, inputs = module_of(case), inputs_of(case)
    parameters = dict(module.named_parameters())
    names = [key for key in parameters if not key.startswith("layers.1")]
    inputs = tuple(t[:, :5] for t in inputs)

    def last(*tensors):
        return functional_call(module, {**parameters, **dict(zip(names, tensors, strict=True))}, inputs)

    tensors = tuple(parameters[key].detach().requires_grad_() for key in names)
    assert torch.autograd.gradcheck(last, tensors, fast_mode=True, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_learns_and_rows_without_tokens_do_no_harm(name):
    case = case_of(name, "rows without tokens")
    module = module_of(case, torch.float32).train()
    last = module(*inputs_of(case))
    (last * torch.arange(last.numel()).reshape(last.shape)).sum().backward()
    for key, parameter in module.named_parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any(), key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_a_rule(name):
    # Class 1 holds token 2 somewhere, class 0 does not.
    sizes = {"vocab_size": 13, "hidden_size": 24, "expanded_size": 48, "key_size": 8}
    config = configuration.from_dict(configuration.to_dict(case_of(name).config) | sizes)
    torch.manual_seed(0)
    module = Model(specification.Model(config, (SequenceClassifier(2, "mean_of_tokens"),), "bidirectional"))
    token_ids = torch.randint(3, 13, (64, 7))
    labels = torch.arange(64) % 2
    token_ids[labels == 1, torch.randint(0, 7, (32,))] = 2
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(token_ids)["logits"], labels)
        loss.backward()
        optimiser.step()
    assert (module.eval()(token_ids)["logits"].argmax(dim=-1) == labels).all()


# Compilation, copies, refusals


def one_layer(name, dtype=torch.float64):
    case = case_of(name)
    torch.manual_seed(0)
    return MODELS[name][0](dataclasses.replace(case.config, layers=1)).to(dtype).eval(), inputs_of(case)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_all_lengths(name):
    module, inputs = one_layer(name)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows, length in ((4, 11), (3, 7), (2, 5)):
            given = tuple(t[:rows, :length].clone() for t in inputs)
            torch.testing.assert_close(compiled(*given), module(*given), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_a_compiled_model_has_the_gradients_of_an_eager_one():
    module, inputs = one_layer("gau_alpha")
    gradients = []
    for way in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        last = way(*inputs)
        (last * torch.arange(last.numel()).reshape(last.shape)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_can_be_copied(name):
    case = case_of(name)
    module, inputs = module_of(case), inputs_of(case)
    assert torch.equal(copy.deepcopy(module)(*inputs), module(*inputs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.ones(4, 11)}, DomainError, "token_ids must be a tensor of integers"),
        ({"token_ids": torch.tensor(3)}, ShapeError, "expected token_ids of shape"),
        ({"token_ids": torch.ones(4, 10, dtype=torch.int64)}, ShapeError, "of one shape"),
        ({"segment_ids": torch.ones(4, 11)}, DomainError, "segment_ids must be a tensor of integers"),
        ({"segment_ids": torch.ones(1, 11, dtype=torch.int32)}, ShapeError, "of one shape"),
        ({"mask": torch.ones(4, 11, dtype=torch.int64)}, DomainError, "mask must be a boolean tensor"),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, ShapeError, "of one shape"),
        ({"positions": torch.ones(11)}, DomainError, "positions must be a tensor of integers"),
        ({"positions": torch.arange(10)}, ShapeError, r"expected positions \(n,\) or"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, changes, error, message):
    case = case_of(name)
    inputs = dict(zip(("token_ids", "segment_ids", "mask"), inputs_of(case), strict=True)) | changes
    for method in ("forward", "hidden_states"):
        with pytest.raises(error, match=message) as raised:
            _call(module_of(case), method, tuple(inputs.values()))
        assert str(raised.value).startswith(f"{name}.hidden_states: ")
