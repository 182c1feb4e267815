"""Compiled with one number after another: torch.compile then takes the number for open, as it does sizes."""

import functools

import pytest
import torch
from torch.testing import assert_close

from torchimpl.ops import attention_kernel, linear_attention, lora, rope, whitening
from torchimpl.ops import mixed_chunk_attention as mca

SQUARED_RELU = functools.partial(attention_kernel.squared_relu_constant, length=1)
RULE = {"scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.su}


def numbers(*shape):
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.3).reshape(shape)


HEADS = (*(numbers(2, 7, 3) for _ in range(4)), numbers(2, 7, 5))
Q = numbers(2, 7, 1, 3)
W = numbers(24, 24)
ORDER = torch.tensor([1, 0])
START = mca.initial_state(batch=(2,), s=3, e=5)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: mca.bidirectional(*HEADS, chunk=c, **RULE),
        lambda c: mca.causal(*HEADS, chunk=c, **RULE),
        lambda c: mca.step(START, *HEADS, chunk=c, **RULE)[0],
        lambda c: linear_attention.chunked(Q, Q, numbers(2, 7, 1, 5), chunk_size=c, scale=0.5).output,
        lambda r: lora.additive_gradients(W, r=r)[0],
        lambda r: lora.additive_update(W, r=r, learning_rate=0.1),
        lambda h: rope.permute_projection(W, heads=h, order=ORDER),
        lambda s: rope.permute_gau(W, None, numbers(2, s), None, s=s, order=ORDER).w_in,
        lambda k: whitening.projection(W @ W.T, gamma=0.0, k=k).abs(),
    ],
)
def test_a_number_that_changes(call):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for number in (3, 4, 6):
        assert_close(compiled(number), call(number))
