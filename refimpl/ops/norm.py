"""Normalisation of the last axis by its standard deviation or by its root mean square.

layer_norm: y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias
rms_norm:   y = x / sqrt(mean(x^2) + epsilon)

Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467; kexue.fm/archives/8998.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

# Largest magnitude whose square, summed over up to 1e8 features, stays inside float64 (1.8e308).
LARGEST = 1e150


def rms_norm(x: Shaped[np.ndarray, "*b d"], *, epsilon: float) -> Float[np.ndarray, "*b d"]:
    """Each row divided by its root mean square: no centring, no scale, no bias.

    y = x / sqrt(mean(x^2) + epsilon)

    C1. The mean of squares must run over the last axis only and divide by its length d.
    C2. epsilon must be added inside the square root.
    C3. With epsilon = 0 the result must not change when a row is multiplied by a positive number.
    C4. A row of zeros must give zeros, with epsilon = 0 too; width 0 must give an empty result.
    Raises: DomainError for epsilon < 0, non-finite input, or abs(x) > 1e150; ShapeError for a scalar x.
    Precision: mean square and root in float64; the budget is relative to abs(y). A row whose mean square
    underflows (abs(x) < 1e-154) counts as a row of zeros when epsilon = 0.
    Source: kexue.fm/archives/8998 (RoFormerV2); Zhang and Sennrich 2019, eq. 4.
    Differs: epsilon is 1e-12 in bert4keras up to 0.11.3, the PyTorch ports, PaddleNLP and bert4torch; 1e-7 in
    bert4keras from 0.11.4 on and in keras-hub; 1e-5 by default in ONNX RMSNormalization. bert4keras and ONNX give 0
    for 0/0, a plain division gives NaN. In float16 an epsilon of 1e-12 is 0 and the square overflows beyond 255.
    """
    x, epsilon = _row("norm.rms_norm", x, epsilon)
    return _over_root(x, epsilon)


def rms_norm_scaled(
    x: Shaped[np.ndarray, "*b d"], scale: Shaped[np.ndarray, " _d"], *, epsilon: float
) -> Float[np.ndarray, "*b d"]:
    """rms_norm followed by a trained scale per feature.

    y = x / sqrt(mean(x^2) + epsilon) * scale

    C1. With scale = 1 it must equal rms_norm.
    C2. scale must multiply after the division and must not enter the mean of squares.
    Raises: ShapeError unless scale has shape (d,); otherwise as rms_norm.
    Precision: as rms_norm, relative to abs(y).
    Source: Zhang and Sennrich 2019, eq. 4.
    Differs: keras-hub's RoFormerV2 trains a scale, every other RoFormerV2 has none; some models store scale - 1.
    """
    x, epsilon = _row("norm.rms_norm_scaled", x, epsilon)
    scale = _feature("norm.rms_norm_scaled", "scale", scale, x)
    return _over_root(x, epsilon) * scale


def layer_norm(
    x: Shaped[np.ndarray, "*b d"],
    scale: Shaped[np.ndarray, " _d"],
    bias: Shaped[np.ndarray, " _d"],
    *,
    epsilon: float,
) -> Float[np.ndarray, "*b d"]:
    """Each row centred, divided by its standard deviation, then scaled and shifted per feature.

    y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias,  var(x) = mean((x - mean(x))^2)

    C1. The variance must be the population variance (divided by d, not d - 1).
    C2. epsilon must be added inside the square root.
    C3. The result must not change when one number is added to a whole row.
    C4. A constant row must give bias, with epsilon = 0 too; width 0 must give an empty result.
    Raises: DomainError for epsilon < 0, non-finite input, or abs(x) > 1e150; ShapeError for a scalar x or unless
    scale and bias have shape (d,).
    Precision: two passes in float64 (mean, then centred squares); the budget is measured against
    abs(scale) (abs(x) + mean(abs(x))) / sqrt(var + epsilon) + abs(bias).
    Source: Ba et al. 2016, eq. 4.
    Differs: epsilon is 1e-12 in BERT, in RoFormer of Hugging Face and JunnYu and in bert4keras up to 0.11.3;
    bert4keras from 0.11.4 on has 1e-7 except 1e-12 in BERT and in the transform norm of the masked-language head;
    PyTorch and ONNX default to 1e-5. Implementations by mean(x^2) - mean(x)^2 fail under a large common offset.
    """
    x, epsilon = _row("norm.layer_norm", x, epsilon)
    scale = _feature("norm.layer_norm", "scale", scale, x)
    bias = _feature("norm.layer_norm", "bias", bias, x)
    # The rounded mean of equal numbers need not equal them, and epsilon = 0 would blow that residue up to 1.
    varies = (x != x[..., :1]).any(axis=-1, keepdims=True)
    return _over_root((x - _mean(x)) * varies, epsilon) * scale + bias


def _row(operation: str, x: Any, epsilon: float) -> tuple[np.ndarray, float]:
    x = check.real(operation, "x", x)
    check.shape(operation, x.ndim >= 1, "x of shape (..., d)", x=x)
    largest = np.abs(x).max(initial=0.0)
    check.domain(operation, bool(largest <= LARGEST), f"abs(x) at most {LARGEST:g}", largest=float(largest))
    check.domain(operation, bool(np.isfinite(epsilon) and epsilon >= 0), "a finite epsilon >= 0", epsilon=epsilon)
    return x, epsilon


def _feature(operation: str, name: str, values: Any, x: np.ndarray) -> np.ndarray:
    values = check.real(operation, name, values)
    check.shape(operation, values.shape == x.shape[-1:], f"{name} of shape (d,)", x=x, **{name: values})
    return values


def _mean(x: np.ndarray) -> np.ndarray:
    return x.sum(axis=-1, keepdims=True) / max(x.shape[-1], 1)


def _over_root(x: np.ndarray, epsilon: float) -> np.ndarray:
    root = np.sqrt(_mean(x * x) + epsilon)
    # 0/0 counts as 0: where the root is 0, the numerator is dropped and the denominator is 1.
    return x * (root > 0) / (root + (root == 0))
