"""Pre-training: whole words are hidden at the rates of the definition, the loss is by hand, and both kinds learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refimpl import model as specification
from refimpl.check import DomainError, ShapeError
from refimpl.models import _heads, roformer_v2
from tests.torchimpl.training.test_loop import CONFIG
from torchimpl import model as modules
from torchimpl.training import loop, pretrain

RULE = pretrain.Masking(mask_id=4, vocab_size=50)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_words_are_hidden_whole_or_not_at_all(seed, rate):
    random = np.random.default_rng(seed)
    starts = torch.from_numpy(random.integers(0, 2, (3, 17))).cumsum(1)
    words = torch.where(torch.from_numpy(random.random((3, 17)) < 0.8), starts - 1, -1)
    ids = torch.from_numpy(random.integers(5, 50, (3, 17)))
    batch = {"token_ids": ids, "words": words, "mask": words >= 0}
    hidden = pretrain.hide(batch, replace(RULE, rate=rate), drawn(seed))
    chosen = hidden["targets"] != pretrain.NO_TARGET
    assert not chosen[words < 0].any()
    for row in range(3):
        for word in set(words[row].tolist()) - {-1}:
            assert len(set(chosen[row][words[row] == word].tolist())) == 1
    assert torch.equal(hidden["targets"][chosen], ids[chosen])
    assert torch.equal(hidden["token_ids"][~chosen], ids[~chosen])
    assert rate < 1 or torch.equal(chosen, words >= 0)


def test_the_rates_are_those_of_the_definition():
    """20000 words of three tokens: each figure is within five standard deviations."""
    ids = torch.full((2000, 30), 7)
    words = (torch.arange(30) // 3).expand(2000, 30)
    hidden = pretrain.hide({"token_ids": ids, "words": words, "mask": words >= 0}, RULE, drawn(0))
    chosen = hidden["targets"] != pretrain.NO_TARGET
    number = int(chosen.sum())
    assert number / ids.numel() == pytest.approx(0.15, abs=5 * math.sqrt(0.15 * 0.85 / 20000))
    told = hidden["token_ids"][chosen]
    deviation = 5 * math.sqrt(0.16 / number)
    assert (told == 4).double().mean() == pytest.approx(0.8 + 0.1 / 49, abs=deviation)
    assert (told == 7).double().mean() == pytest.approx(0.1 + 0.1 / 49, abs=deviation)
    # Every id but 0, which is padding.
    assert set(told.tolist()) == set(range(1, 50))
    # Tokens of one word meet different fates.
    fates = hidden["token_ids"][:, ::3] != hidden["token_ids"][:, 1::3]
    assert 0.2 < fates[chosen[:, ::3]].double().mean() < 0.5


@pytest.mark.parametrize(("masked", "random", "kept"), [(1.0, 0.0, {4}), (0.0, 0.0, {7}), (0.5, 0.0, {4, 7})])
def test_the_shares_of_the_rule_are_read(masked, random, kept):
    rule = pretrain.Masking(4, 50, rate=1.0, masked=masked, random=random)
    batch = {"token_ids": torch.full((4, 9), 7), "words": torch.arange(9).expand(4, 9), "mask": torch.ones(4, 9) > 0}
    assert set(pretrain.hide(batch, rule, drawn(0))["token_ids"].flatten().tolist()) == kept


@pytest.mark.parametrize("change", [
    {"mask_id": 50}, {"mask_id": -1}, {"vocab_size": 1}, {"rate": 0.0}, {"masked": 0.8, "random": 0.3},
    {"random": -0.1},
])  # fmt: skip
def test_a_rule_that_cannot_be_is_refused(change):
    with pytest.raises(DomainError, match="pretrain.Masking"):
        replace(RULE, **change)


def test_what_follows_by_hand():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    followed = pretrain.follow({"token_ids": ids, "mask": ids > 0, "words": ids})
    no = pretrain.NO_TARGET
    assert followed["targets"].tolist() == [[6, 7, 8, no], [10, no, no, no]]
    assert pretrain.targets(followed) == 4


class Fixed(nn.Module):
    """Logits that depend on nothing."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, token_ids, segment_ids, mask, *, told):
        return {"mlm_logits": self.logits.expand(*token_ids.shape, -1)[told]}


def test_the_loss_by_hand():
    """Logits ln 1, ln 2, ln 5 at every place: -ln of 1/8, 2/8 and 5/8."""
    model = Fixed([0.0, math.log(2), math.log(5)])
    targets = torch.tensor([[0, -100, 2], [1, 2, -100]])
    batch = {"token_ids": targets * 0, "mask": targets > -200, "targets": targets}
    expected = (math.log(8) + math.log(4) + 2 * math.log(8 / 5)) / 4
    assert pretrain.loss(model, batch).item() == pytest.approx(expected, rel=1e-6)
    none = {**batch, "targets": torch.full_like(targets, -100)}
    assert pretrain.loss(model, none).item() == 0
    corpus = pretrain.corpus(torch.tensor([[0, 2, 2, 1]] * 70))
    with torch.no_grad():
        figures = pretrain.causal_lm(corpus, corpus).evaluate(model)
    # Told are 2, 2 and 1.
    assert figures == {
        "loss": pytest.approx((2 * math.log(8 / 5) + math.log(4)) / 3, rel=1e-6),
        "accuracy": pytest.approx(2 / 3),
    }
    alone = pretrain.corpus(torch.tensor([[1]]))
    with torch.no_grad():
        assert math.isnan(pretrain.causal_lm(corpus, alone).evaluate(model)["loss"])


def test_a_corpus_is_checked():
    ids = torch.ones(2, 3, dtype=torch.int32)
    made = pretrain.corpus(ids, torch.tensor([[True, True, False]] * 2))
    assert made.words.tolist() == [[0, 1, -1]] * 2
    # Columns behind the longest text are left out.
    assert made.take(slice(0, 1))["token_ids"].tolist() == [[1, 1]]
    with pytest.raises(ShapeError, match="pretrain.corpus"):
        pretrain.corpus(ids, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="not empty"):
        pretrain.corpus(torch.ones(0, 3, dtype=torch.int32))
    with pytest.raises(DomainError, match="a boolean mask"):
        pretrain.corpus(ids, ids)
    with pytest.raises(DomainError, match="token_ids to be integers"):
        pretrain.corpus(ids.float())
    with pytest.raises(DomainError, match="words below 3, received words=9"):
        pretrain.masked_lm(pretrain.corpus(ids, None, ids * 9), made, RULE)


def model(visible):
    sizes = {
        "vocab_size": 13, "segments": 1, "embedding_size": 16, "hidden_size": 16, "layers": 1, "heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    config = roformer_v2.dialect("bert4keras-0.11.5", **sizes)
    torch.manual_seed(0)
    whole = specification.Model(config, (_heads.TiedLM(),), visible)
    return modules.Model(whole, hidden_dropout=0.0, attention_dropout=0.0)


def counting(n):
    """Texts that count on from anywhere: every token tells all others."""
    first = torch.randint(0, 11, (n, 1), generator=drawn(3))
    return pretrain.corpus(2 + (first + torch.arange(8)) % 11)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_causal_model_learns_to_count(tmp_path, precision):
    config = replace(CONFIG, epochs=6, batch_size=16, learning_rate=0.02, weight_decay=0.0, precision=precision)
    told = []
    task = pretrain.causal_lm(counting(160), counting(20))
    fitted = loop.fit(model("causal"), task, config, tmp_path, told.append)
    # Eight tokens in every text.
    assert told[-1].tokens_per_second == pytest.approx(8 * told[-1].samples_per_second)
    assert fitted.best.figures["accuracy"] > 0.95
    assert fitted.best.figures["loss"] == min(epoch.figures["loss"] for epoch in fitted.epochs)
    assert {tensor.dtype for tensor in fitted.weights.values()} == {torch.float32}


def test_a_masked_model_learns_to_count(tmp_path):
    config = replace(CONFIG, epochs=10, batch_size=16, learning_rate=0.02, weight_decay=0.0, residual_warmup=0.1)
    rule = pretrain.Masking(1, 13, rate=0.3, masked=1.0, random=0.0)
    fitted = loop.fit(model("bidirectional"), pretrain.masked_lm(counting(160), counting(40), rule), config, tmp_path)
    # By chance it is 1 / 11.
    assert fitted.best.figures["accuracy"] > 0.4
    assert fitted.epochs[0].figures["accuracy"] < 0.2


def test_branches_learn_nothing_before_they_grow(tmp_path):
    moved = []

    def backward(work):
        told = loop.backward(work)
        moved.append(bool(work.model.encoder.layers[0].feed_forward.w_out.grad.any()))
        return told

    config = replace(CONFIG, batch_size=16, max_steps=4, residual_warmup=0.5)
    task = replace(pretrain.causal_lm(counting(64), counting(8)), backward=backward)
    loop.fit(model("causal"), task, config, tmp_path)
    # Scaled by 0, 1/2, 1 and 1.
    assert moved == [False, True, True, True]
