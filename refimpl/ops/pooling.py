"""One vector per sentence from one vector per token.

masked_mean: y = sum_n mask_n x_n / max(sum_n mask_n, 1)

Source: kexue.fm/archives/8069 and /8321, whose four poolings are: P1 first(last block), P2 pooler_linear(last block)
or pooler_tanh(last block), P3 masked_mean(last block), P4 first_last_average(first block, last block).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check


def first(x: Shaped[np.ndarray, "*b n d"]) -> Float[np.ndarray, "*b d"]:
    """The vector at position 0 of the array, where [CLS] stands.

    y = x[..., 0, :]

    C1. It must be array position 0, whatever a mask says.
    C2. It must equal the input bit for bit.
    Raises: ShapeError for rank < 2 or without any token.
    Precision: exact.
    Source: kexue.fm/archives/8321 (P1).
    Differs: with left padding, position 0 is padding and some servers take the first unmasked token instead.
    """
    x = check.real("pooling.first", "x", x)
    check.shape("pooling.first", x.ndim >= 2 and x.shape[-2] >= 1, "x of shape (..., n, d) with n >= 1", x=x)
    return x[..., 0, :]


def masked_mean(x: Shaped[np.ndarray, "*b n d"], mask: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "*b d"]:
    """The mean of the unmasked tokens, [CLS] and [SEP] included.

    y = sum_n mask_n x_n / max(sum_n mask_n, 1)

    C1. Masked tokens must not enter the sum, whatever they hold.
    C2. The divisor must be the number of unmasked tokens, not the length of the array.
    C3. A row without any unmasked token (n = 0 included) must give zeros.
    Raises: ShapeError unless x is (..., n, d) and mask (..., n); DomainError for a mask that is not boolean.
    Precision: sum in float64; the budget is measured against sum_n mask_n abs(x_n) / max(sum_n mask_n, 1).
    Source: kexue.fm/archives/8069 (P3, applied to the last block).
    Differs: several PyTorch ports of BERT-whitening average over the padding as well; sentence-transformers floors
    the divisor at 1e-9 instead of 1, which gives the same zeros.
    """
    return _masked_mean("pooling.masked_mean", "x", x, mask)


def first_last_average(
    first: Shaped[np.ndarray, "*b n d"], last: Shaped[np.ndarray, "..."], mask: Shaped[np.ndarray, "..."]
) -> Float[np.ndarray, "*b d"]:
    """The average of the masked means of two blocks' outputs.

    y = (masked_mean(first, mask) + masked_mean(last, mask)) / 2

    C1. With first = last it must equal masked_mean; exchanging first and last must change nothing.
    C2. Masked tokens of either array must not enter.
    C3. A row without any unmasked token must give zeros.
    Raises: ShapeError unless first and last have one shape (..., n, d) and mask is (..., n); DomainError for a mask
    that is not boolean.
    Precision: as masked_mean, against half the sum of both magnitudes.
    Source: kexue.fm/archives/8069 (P4).
    Differs: "first" is the output of the first transformer block. SimCSE up to January 2022 and other code that reads
    hidden_states[0] average the embeddings instead.
    """
    first = check.real("pooling.first_last_average", "first", first)
    last = check.real("pooling.first_last_average", "last", last)
    check.shape("pooling.first_last_average", first.shape == last.shape, "equal shapes", first=first, last=last)
    return 0.5 * (
        _masked_mean("pooling.first_last_average", "first", first, mask)
        + _masked_mean("pooling.first_last_average", "last", last, mask)
    )


def pooler_linear(
    x: Shaped[np.ndarray, "*b n d"], kernel: Shaped[np.ndarray, "_d e"], bias: Shaped[np.ndarray, " _e"]
) -> Float[np.ndarray, "*b e"]:
    """A dense layer on the vector at position 0.

    y = x[..., 0, :] kernel + bias

    C1. kernel must be read as (in, out).
    C2. Only position 0 must enter.
    Raises: ShapeError without any token or unless kernel is (d, e) and bias (e,).
    Precision: products and sum in float64; the budget is measured against abs(x) abs(kernel) + abs(bias).
    Source: kexue.fm/archives/8321 (P2); bert4keras with_pool="linear".
    Differs: PyTorch checkpoints store the transposed kernel (out, in).
    """
    return _pooler("pooling.pooler_linear", x, kernel, bias)


def pooler_tanh(
    x: Shaped[np.ndarray, "*b n d"], kernel: Shaped[np.ndarray, "_d e"], bias: Shaped[np.ndarray, " _e"]
) -> Float[np.ndarray, "*b e"]:
    """BERT's pooler: pooler_linear followed by tanh.

    y = tanh(x[..., 0, :] kernel + bias)

    C1. It must equal the tanh of pooler_linear, element by element.
    C2. Only position 0 must enter.
    Raises: as pooler_linear.
    Precision: as pooler_linear, times 1 - y^2.
    Source: Devlin et al. 2018, arXiv:1810.04805; bert4keras with_pool=True.
    Differs: BERT-whitening and bojone/SimCSE leave the tanh out, Hugging Face's BertPooler has it.
    """
    return np.tanh(_pooler("pooling.pooler_tanh", x, kernel, bias))


def _masked_mean(operation: str, name: str, x: Any, mask: Any) -> np.ndarray:
    x = check.real(operation, name, x)
    mask = check.boolean(operation, "mask", mask)
    check.shape(
        operation,
        x.ndim >= 2 and mask.shape == x.shape[:-1],
        f"{name} of shape (..., n, d) and mask of shape (..., n)",
        **{name: x, "mask": mask},
    )
    count = mask.sum(axis=-1)[..., None]
    return (x * mask[..., None]).sum(axis=-2) / np.maximum(count, 1)


def _pooler(operation: str, x: Any, kernel: Any, bias: Any) -> np.ndarray:
    x = check.real(operation, "x", x)
    kernel = check.real(operation, "kernel", kernel)
    bias = check.real(operation, "bias", bias)
    check.shape(
        operation,
        x.ndim >= 2
        and x.shape[-2] >= 1
        and kernel.ndim == 2
        and kernel.shape[0] == x.shape[-1]
        and bias.shape == kernel.shape[1:],
        "x of shape (..., n, d) with n >= 1, kernel (d, e) and bias (e,)",
        x=x,
        kernel=kernel,
        bias=bias,
    )
    return x[..., 0, :] @ kernel + bias
