"""What a run starts from: which heads stand on the encoder, and which weights are taken over."""

import pytest
import torch

from refimpl import model as specification
from refimpl.models import _heads
from tests.torchimpl.test_layers import CONFIGS
from torchimpl import checkpoint
from torchimpl import model as modules
from torchimpl.training import start
from torchimpl.training.run import TrainError

HEADS = (_heads.TiedLM(), _heads.SequenceClassifier(labels=3, pooling="first_token"))
WHOLE = specification.Model(CONFIGS["roformer_v2"], HEADS, "bidirectional")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    checkpoint.save(tmp_path / "model", WHOLE, modules.Model(WHOLE).weights())
    return tmp_path / "model"


def test_a_language_model_has_its_own_head_or_that_of_its_kind():
    assert start.language_model(WHOLE, "causal") == specification.Model(WHOLE.config, HEADS[:1], "causal")
    for name, head in (("roformer", _heads.TransformedLM()), ("gau_alpha", _heads.TiedLM())):
        bare = specification.Model(CONFIGS[name], (), "bidirectional")
        assert start.language_model(bare, "bidirectional").heads == (head,)
    flash = start.language_model(specification.Model(CONFIGS["flash"], (), "bidirectional"), "causal")
    assert (flash.visible, flash.config.mix) == ("causal", "causal")


def test_a_classifier_has_as_many_classes_as_there_are():
    made = start.classifier(WHOLE, 5, "mean_of_tokens")
    assert made.heads == (_heads.SequenceClassifier(labels=5, pooling="mean_of_tokens"),)
    pooled = start.classifier(WHOLE, 5, "pooler")
    assert pooled.heads[0] == _heads.Pooler(activation="tanh") and len(pooled.heads) == 2
    linear = specification.Model(WHOLE.config, (_heads.Pooler(activation="linear"),), "bidirectional")
    assert start.classifier(linear, 5, "pooler").heads[0] == _heads.Pooler(activation="linear")
    assert start.pooling(WHOLE) == "first_token" and start.pooling(linear) == "mean_of_tokens"


def test_weights_of_equal_parts_are_taken_over(folder):
    source = start.read(folder)
    assert source.model == WHOLE and len(source.sha256) == 64
    same = start.start(source, start.classifier(WHOLE, 3, "first_token"), seed=0).weights()
    assert same.keys() == {n for n in source.weights if not n.startswith("mlm")}
    assert all(torch.equal(tensor, source.weights[name]) for name, tensor in same.items())
    other = start.start(source, start.classifier(WHOLE, 3, "mean_of_tokens"), seed=0)
    assert torch.equal(other.weights()["embedding.token"], source.weights["embedding.token"])
    assert not torch.equal(other.weights()["classifier.kernel"], source.weights["classifier.kernel"])
    again = start.start(source, start.classifier(WHOLE, 3, "mean_of_tokens"), seed=0).weights()
    assert all(torch.equal(again[name], tensor) for name, tensor in other.weights().items())


def test_a_configuration_gives_new_weights_from_the_seed(tmp_path):
    specification.write(WHOLE, tmp_path / "model.json")
    source = start.read(tmp_path / "model.json")
    assert source == (WHOLE, {}, "")
    before = torch.get_rng_state()
    one, two, three = (start.start(source, WHOLE, seed=seed).weights()["embedding.token"] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TrainError, match="neither a model folder nor the JSON file"):
        start.read(tmp_path / "absent")


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_as_it_is_asked_for(name):
    whole = specification.Model(CONFIGS[name], (), "bidirectional")
    for given, expected in ((None, 0.1), (0.25, 0.25)):
        module = start.start(start.Source(whole, {}, ""), whole, seed=0, dropout=given)
        rates = {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {expected}
