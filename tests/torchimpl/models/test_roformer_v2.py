"""RoFormerV2 alone: a model worked out by hand, its initialiser and the place of its dropout.

What it shares with RoFormer is tested on both in test_roformer.py.
"""

import dataclasses
import math

import pytest
import torch

from refimpl.models import roformer_v2 as spec
from torchimpl.models import _encoder
from torchimpl.models.roformer_v2 import RoformerV2

SMALL = spec.dialect(
    "bert4keras-0.11.5", vocab_size=31, segments=2, embedding_size=30, hidden_size=30, layers=2, heads=3,
    intermediate_size=17,
)  # fmt: skip


def inputs():
    torch.manual_seed(0)
    return torch.randint(0, 31, (5, 13)), torch.randint(0, 2, (5, 13))


def test_one_token_and_one_layer_by_hand():
    config = spec.Config(
        vocab_size=2, segments=1, embedding_size=2, hidden_size=2, layers=1, heads=1, intermediate_size=2,
        activation="relu", epsilon=0.0, rotary_base=10000.0,
    )  # fmt: skip
    weights = {
        # (0.5, 4) + (0.5, 3) = (1, 7) has the root mean square 5: x_0 = (0.2, 1.4).
        "embedding.token": [[9.0, 9.0], [0.5, 4.0]],
        "embedding.segment": [[0.5, 3.0]],
        # One token attends to itself: o = (0.8, -2.4), and the sum (1, -1) has the root mean square 1.
        "layers.0.attention.w_q": [[3.0, 1.0], [2.0, 5.0]],
        "layers.0.attention.w_k": [[1.0, 0.0], [7.0, 1.0]],
        "layers.0.attention.w_v": [[4.0, 0.0], [0.0, 2.0]],
        "layers.0.attention.w_o": [[1.0, -0.5], [0.0, -5 / 7]],
        # relu((4, -1)) = (4, 0), and (6, 2) + (1, -1) = (7, 1) becomes (1.4, 0.2).
        "layers.0.feed_forward.w_in": [[3.0, 0.0], [-1.0, 1.0]],
        "layers.0.feed_forward.w_out": [[1.5, 0.5], [9.0, 9.0]],
    }
    module = RoformerV2(config).double().eval()
    module.load_state_dict({name: torch.tensor(rows, dtype=torch.float64) for name, rows in weights.items()})
    embedded, last = module.hidden_states(torch.tensor([[1]]))
    expected = torch.tensor([[[0.2, 1.4]]], dtype=torch.float64)
    torch.testing.assert_close(embedded, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(last, expected.flip(-1), rtol=1e-14, atol=0)


def test_there_is_no_bias_and_no_scale():
    names = RoformerV2(SMALL).state_dict()
    assert all(tensor.ndim == 2 for tensor in names.values()) and len(names) == 2 + 2 * 6


def test_weights_start_with_their_deviation_and_within_two_sigma():
    config = dataclasses.replace(
        SMALL, vocab_size=701, embedding_size=192, hidden_size=288, layers=3, intermediate_size=480
    )
    torch.manual_seed(0)
    module = RoformerV2(config)
    # 3^(-1/2) over the root of the input's width, which is that of the table for a table.
    widths = {"token": 192, "kernel": 192, "w_q": 288, "w_k": 288, "w_v": 288, "w_o": 288, "w_in": 288, "w_out": 480}
    for key, parameter in module.named_parameters():
        if key == "embedding.segment":
            continue
        due = 3**-0.5 / math.sqrt(widths[key.rpartition(".")[2]])
        values = parameter.detach().double()
        assert values.std().item() == pytest.approx(due, rel=0.01), key
        assert abs(values.mean().item()) < 0.02 * due
        sigma = 1.13684723 * due
        assert 1.99 * sigma < values.abs().max().item() <= 2 * sigma * (1 + 1e-6), key
    assert not torch.equal(module.layers[0].attention.w_q, module.layers[1].attention.w_q)


def test_the_deviations_of_the_published_base_model():
    # 12^(-1/2) / √768 and / √3072.
    gain = _encoder.gain(12, _encoder.TRANSFORMER_ORDER)
    assert gain / math.sqrt(768) == pytest.approx(0.010417, abs=1e-6)
    assert gain / math.sqrt(3072) == pytest.approx(0.005208, abs=1e-6)


def test_small_and_large_axes_are_no_exceptions():
    # bert4keras takes the other axis of a kernel whose input is below 10 wide.
    config = dataclasses.replace(SMALL, hidden_size=6, embedding_size=6, intermediate_size=9001, layers=1)
    torch.manual_seed(0)
    assert RoformerV2(config).layers[0].feed_forward.w_in.std().item() == pytest.approx(6**-0.5, rel=0.02)


def test_hidden_dropout_stands_before_the_embeddings_norm():
    embedding = RoformerV2(SMALL).double().embedding.train()
    embedding.dropout.p = 0.5
    embedded = embedding(_encoder.Inputs(*inputs(), None, torch.arange(13)))
    # Features are missing, and the rows are normalised nevertheless.
    assert 0.4 < (embedded == 0).double().mean() < 0.6
    square = (embedded**2).mean(dim=-1)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=0)


def test_hidden_dropout_acts_before_both_residual_sums():
    module = RoformerV2(SMALL, hidden_dropout=1.0).double().train()
    module.embedding.dropout.p = 0.0
    embedded, *states = module.hidden_states(*inputs())
    # The norm of what is normed already.
    for state in states:
        torch.testing.assert_close(state, embedded, rtol=0, atol=1e-4)


def test_attention_dropout_leaves_the_feed_forward():
    module = RoformerV2(SMALL, hidden_dropout=0.0, attention_dropout=1.0).double().train()
    layer, x = module.layers[0], torch.randn(2, 7, 30, dtype=torch.float64)
    arguments = (None, torch.arange(7), torch.ones(5, dtype=torch.float64))
    assert (layer.attention(x, *arguments) == 0).all()
    assert (layer.feed_forward(x) != 0).any()
