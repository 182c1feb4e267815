"""Whole models: the specification's outputs, names of weights both ways, compilation, and several processes."""

import dataclasses

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from refimpl import model as spec
from refimpl.check import DomainError, ShapeError
from refimpl.models import _heads
from tests.refimpl.test_model import ANSWER, CAUSAL, CLASSES, EFFICIENT, ENCODERS, ENTITIES, NEXT, POOLER, TIED, text
from torchimpl import model
from torchimpl.model import Model
from torchimpl.training import loop

EMBEDDING = _heads.SentenceEmbedding("first_last_average")
SETS = {
    "classes": (POOLER, NEXT, CLASSES, ENTITIES, ANSWER),
    "choices": (_heads.Pooler("linear"), _heads.MultipleChoice("pooler"), EMBEDDING, EFFICIENT),
}


def whole_of(name, visible="bidirectional", heads="classes"):
    config = CAUSAL if name == "flash" and visible == "causal" else ENCODERS[name]
    lm = _heads.TransformedLM() if name == "roformer" and heads == "classes" else TIED
    return spec.Model(config, (lm, *SETS[heads]), visible)


def module_of(whole, dtype=torch.float64, **options):
    torch.manual_seed(1)
    module = Model(whole, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            # Biases too, and away from the identity.
            parameter.add_(torch.randn_like(parameter) / 3)
    return module.eval()


def given(*lead, positions=True):
    ids, segments, mask = (torch.tensor(array) for array in text(*lead))
    # Nothing real: for the head that chooses, no choice.
    mask[-1, -1] = False
    return ids, segments, mask, (torch.arange(9) * 2 - 5 if positions else None)


@pytest.mark.parametrize("heads", SETS)
@pytest.mark.parametrize("visible", ["bidirectional", "causal", "unilm"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_output_is_that_of_the_specification(name, visible, heads):
    if (name, visible) == ("flash", "unilm"):
        pytest.skip("flash knows no unilm")
    whole = whole_of(name, visible, heads)
    inputs = given(2, 3)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        module = module_of(whole, dtype)
        weights = {key: tensor.double().numpy() for key, tensor in module.weights().items()}
        expected = spec.forward(weights, *(tensor.numpy() for tensor in inputs), model=whole)
        with torch.no_grad():
            found = module(*inputs)
        assert tuple(found) == tuple(expected) == spec.outputs(whole)
        for key, array in expected.items():
            due = torch.tensor(array)
            scale = due[due.isfinite()].abs().max().item()
            torch.testing.assert_close(found[key].double(), due, rtol=0, atol=bound * scale)


def test_without_segments_mask_and_positions():
    module = module_of(whole_of("gau_alpha"))
    ids, segments, mask, _ = given(2)
    explicit = module(ids, 0 * segments, mask | True, torch.arange(9))
    for key, tensor in module(ids).items():
        torch.testing.assert_close(tensor, explicit[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_of_the_tokens_that_are_wanted(name):
    module = module_of(whole_of(name))
    inputs = given(2, 3)
    told = torch.zeros(inputs[0].shape, dtype=torch.bool)
    told[0, 1, 2] = told[1, 2, 0] = told[1, 2, -1] = True
    every, some = module(*inputs), module(*inputs, told=told)
    torch.testing.assert_close(some["mlm_logits"], every["mlm_logits"][told], rtol=0, atol=1e-12)
    assert torch.equal(some["last_hidden_state"], every["last_hidden_state"])
    assert module(*inputs, told=told & False)["mlm_logits"].shape == (0, 23)
    with pytest.raises(ShapeError, match="told as token_ids"):
        module(*inputs, told=told[..., 1:])
    with pytest.raises(DomainError, match="told"):
        module(*inputs, told=inputs[0])


@pytest.mark.parametrize("name", ENCODERS)
def test_weights_go_both_ways_under_the_names_of_the_specification(name):
    whole = whole_of(name)
    module = module_of(whole)
    assert {key: tuple(tensor.shape) for key, tensor in module.weights().items()} == spec.shapes(whole)
    assert list(module.weights()) == list(spec.shapes(whole))
    assert model.names(whole)["embedding.token"] == "encoder.embedding.token"
    assert model.names(whole)["classifier.bias"] == "heads.sequence_classifier.classifier.bias"
    assert model.names(whole)["pooler.kernel"] == "heads.pooler.pooler.kernel"
    # The tied table is no weight of the head, and is counted once.
    assert sum(parameter.numel() for parameter in module.parameters()) == spec.parameters(whole)
    other = Model(whole).double()
    other.load_weights(module.weights())
    for key, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    assert model.nested(whole, model.flat(whole, module.state_dict())).keys() == module.state_dict().keys()


def test_names_that_are_missing_or_unknown_are_named():
    whole = whole_of("gau_alpha")
    held = module_of(whole).weights()
    with pytest.raises(ShapeError, match=r"model.nested: expected \d+ weights, .*=\['pooler.bias'\], unknown=\[\]"):
        model.nested(whole, {key: tensor for key, tensor in held.items() if key != "pooler.bias"})
    with pytest.raises(ShapeError, match=r"model.flat: .*=\['encoder.embedding.segment', .*unknown=\['classifier"):
        model.flat(whole, held)


def test_new_weights_are_the_encoders_and_then_the_heads():
    whole = whole_of("gau_alpha")
    torch.manual_seed(5)
    module = Model(whole)
    torch.manual_seed(5)
    alone = model.encoder(whole.config)
    for key, tensor in alone.state_dict().items():
        assert torch.equal(module.encoder.state_dict()[key], tensor)
    assert (module.heads["pooler"].pooler.bias == 0).all()


def test_options_reach_the_encoder_and_the_head_that_drops():
    def dropouts(module):
        return {part.p for part in module.modules() if isinstance(part, nn.Dropout)}

    assert dropouts(Model(whole_of("gau_alpha"))) == {0.1}
    assert dropouts(Model(whole_of("gau_alpha"), hidden_dropout=0.0, attention_dropout=0.25)) == {0.0, 0.25}
    assert dropouts(Model(whole_of("flash"), hidden_dropout=0.5)) == {0.5}
    with pytest.raises(TypeError, match="attention_dropout"):
        Model(whole_of("flash"), attention_dropout=0.5)


def test_the_table_learns_from_both_of_its_ends():
    whole = spec.Model(ENCODERS["gau_alpha"], (TIED,), "bidirectional")
    module = module_of(whole)
    module(torch.tensor([[1, 2, 3]]))["mlm_logits"].log_softmax(dim=-1)[..., 5].sum().backward()
    assert (module.encoder.embedding.token.grad != 0).any(dim=-1).all()
    assert [key for key, _ in module.named_parameters() if "token" in key] == ["encoder.embedding.token"]


def test_one_graph_serves_all_batches():
    # One encoder of one layer: test_encoder.py and test_roformer.py capture the others.
    torch.compiler.reset()
    config = dataclasses.replace(ENCODERS["gau_alpha"], layers=1)
    module, graphs = module_of(spec.Model(config, (TIED, POOLER, CLASSES, ANSWER), "causal")), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (4, 3):
            inputs = given(rows)
            found = compiled(*inputs)
            for key, tensor in module(*inputs).items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-12)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_it_is_trained_by_several_processes(tmp_path):
    # One process, with everything that more of them need: the parts of an output are found in its dict.
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        whole = spec.Model(ENCODERS["roformer_v2"], (TIED, POOLER, NEXT, CLASSES, ANSWER), "bidirectional")
        module = module_of(whole, hidden_dropout=0.0)
        together = DistributedDataParallel(module)
        for _ in range(2):
            module.zero_grad()
            found = together(*given(3))
            sum(tensor[tensor.isfinite()].square().sum() for tensor in found.values()).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert together.module.specification is whole
    finally:
        distributed.destroy_process_group()


def test_what_does_not_fit_is_refused():
    choosing, module = module_of(whole_of("gau_alpha", heads="choices")), module_of(whole_of("gau_alpha"))
    with pytest.raises(ShapeError, match=r"model.forward: expected token_ids \(..., k, n\) for multiple_choice"):
        choosing(torch.tensor([1, 2, 3]))
    with pytest.raises(DomainError, match="gau_alpha.hidden_states: token_ids must be a tensor of integers"):
        module(torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"gau_alpha.hidden_states: expected positions \(n,\)"):
        module(torch.ones(2, 3, dtype=torch.int64), positions=torch.arange(4))


def test_predictions_are_those_of_all_batches_by_name():
    module, (ids, segments, mask, _) = module_of(whole_of("gau_alpha")), given(5)
    examples = loop.Labelled(ids, torch.zeros(5), segments, mask)
    expected = module(ids, segments, mask)
    module.train()
    found = loop.predict(module, examples, batch_size=2)
    assert module.training and tuple(found) == tuple(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key].detach(), rtol=0, atol=1e-12)
    assert list(loop.predict(module, examples, outputs=("embedding", "logits"))) == ["embedding", "logits"]
    with pytest.raises(loop.TrainError, match="the model gives last_hidden_state, .*; it does not give choice_logits"):
        loop.predict(module, examples, outputs=("choice_logits",))
