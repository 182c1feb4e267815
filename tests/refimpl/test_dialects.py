"""Dialects: what they are, a Config in another one, and how far they are from each other when they are run."""

import pytest

from refimpl import dialects
from refimpl.check import DomainError
from refimpl.models import gau_alpha, roformer

MODELS = ("roformer", "roformer_v2", "gau_alpha")


def test_a_config_in_another_dialect_keeps_sizes_and_activation():
    sizes = roformer.SIZES["base-char"]
    held = roformer.dialect("huggingface", **sizes)
    other = dialects.replaced(roformer.Config(**{**held.__dict__, "activation": "gelu_tanh"}), "bert4keras-0.11.5")
    assert (other.epsilon, other.mlm_epsilon, other.activation, other.layers) == (1e-7, 1e-12, "gelu_tanh", 12)
    with pytest.raises(DomainError, match="expected one of bert4keras-0.11.3"):
        dialects.replaced(held, "bert")


@pytest.mark.parametrize("model", MODELS)
def test_equal_constants_are_no_difference_and_others_are(model):
    known = dialects.of(model)
    for one in dialects.measured(model, known["junnyu"]):
        equal = known[one.dialect] == known["junnyu"]
        assert (one.hidden_long == 0) == (one.hidden_short == 0) == (one.logits_long == 0) == equal


def test_the_activation_is_that_of_the_configuration_in_every_dialect():
    reference = {**roformer.DIALECTS["junnyu"], "activation": "gelu_tanh"}
    assert [one.dialect for one in dialects.measured("roformer", reference) if not one.hidden_long] == [
        "bert4keras-0.11.3", "junnyu", "huggingface",
    ]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_an_epsilon_of_1e_7_shows_in_the_sixth_digit_on_new_vectors(model):
    """The mean square of N(0, 0.02²) + N(0, 0.02²) is 8e-4, so that 1e-7 changes the first norm by 6e-5."""
    (far,) = [one for one in dialects.measured(model, dialects.of(model)["junnyu"]) if one.dialect.endswith("0.11.4")]
    assert 1e-6 < far.hidden_long < 1e-4
    assert 1e-6 < far.logits_long < 1e-4


def test_n_min_shows_on_short_texts_alone():
    known = gau_alpha.DIALECTS
    (far,) = [one for one in dialects.measured("gau_alpha", known["bert4keras-0.11.4"]) if one.dialect[-1] == "5"]
    assert far.hidden_long < 1e-12
    # ln 16 / ln 6 - 1: the scores of a text of 6 tokens are multiplied by 1.55.
    assert far.hidden_short > 1e-3


def test_the_same_seed_gives_the_same_figures():
    reference = gau_alpha.DIALECTS["junnyu"]
    assert dialects.measured("gau_alpha", reference) == dialects.measured("gau_alpha", reference)
    assert dialects.measured("gau_alpha", reference, seed=1) != dialects.measured("gau_alpha", reference)


@pytest.mark.parametrize("model", MODELS)
def test_what_differs_besides_is_told_of_every_dialect(model):
    assert all(dialects.besides(model, name) for name in dialects.of(model))


def test_flash_has_no_dialects():
    with pytest.raises(DomainError, match="expected a model with dialects: roformer, roformer_v2, gau_alpha"):
        dialects.of("flash")
