"""Elementwise activations and the positive feature map, written so that their tails keep full relative accuracy.

silu(x) = x sigmoid(x),  gelu(x) = x Phi(x),  elu_plus_one(x) = elu(x) + 1

Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (gelu, silu); Katharopoulos et al. 2020, arXiv:2006.16236, eq. 7
(elu + 1); kexue.fm/archives/8934 (silu on every part of a gated attention unit).
"""

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

# Coefficient of the cubic term in the tanh form of gelu; Hendrycks and Gimpel 2016.
GELU_CUBIC = 0.044715


def relu(x: Shaped[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """The positive part of x, element by element.

    y = max(x, 0)

    C1. Negative input must give 0; positive input must come back unchanged, bit for bit.
    Raises: DomainError for NaN, infinite or non-real input.
    Precision: exact.
    Source: RoFormerV2's feed-forward, kexue.fm/archives/8998.
    Differs: nobody; the sign of a zero result is not specified.
    """
    return np.maximum(check.real("activation.relu", "x", x), 0.0)


def silu(x: Shaped[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """x times its own logistic function (swish with beta = 1), element by element.

    y = x / (1 + exp(-x))

    C1. silu(x) - silu(-x) = x must hold.
    C2. The negative tail must approach x exp(x), not 0: silu(-30) is about -2.8e-12.
    C3. Large input must neither overflow nor warn: silu(1000) = 1000, silu(-1000) = 0.
    Raises: DomainError for NaN, infinite or non-real input.
    Precision: one exponential of a non-positive number; relative error of a few units at every x.
    Source: Hendrycks and Gimpel 2016; Elfwing et al. 2017, arXiv:1702.03118.
    Differs: nobody in value; "swish" with a trained beta is another function.
    """
    x = check.real("activation.silu", "x", x)
    return _gate(x, x)


def gelu_erf(x: Shaped[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """x times the standard normal distribution function, element by element.

    y = x Phi(x) = x erfc(-x / sqrt(2)) / 2

    C1. gelu_erf(x) - gelu_erf(-x) = x must hold.
    C2. It must not be the tanh form: the two differ by up to 4.73e-4, near abs(x) = 2.70.
    Raises: DomainError for NaN, infinite or non-real input.
    Precision: relative accuracy at every x here; the budget is measured against abs(x), so that 1 + erf passes.
    Source: Hendrycks and Gimpel 2016.
    Differs: bert4keras and PyTorch default to this form; Google's BERT code, GPT-2 and oneDNN's plain "gelu" use the
    tanh form. Forms by 1 + erf return exactly 0 below about -5.5 in float32.
    """
    from scipy.special import erfc

    x = check.real("activation.gelu_erf", "x", x)
    return 0.5 * x * erfc(x * -np.sqrt(0.5))


def gelu_tanh(x: Shaped[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """The tanh approximation of gelu, element by element.

    y = x (1 + tanh(z)) / 2 = x sigmoid(2 z),  z = sqrt(2 / pi) (x + 0.044715 x^3)

    C1. gelu_tanh(x) - gelu_tanh(-x) = x must hold.
    C2. It must not be the erf form: the two differ by up to 4.73e-4, near abs(x) = 2.70.
    C3. Large input must neither overflow nor warn.
    Raises: DomainError for NaN, infinite or non-real input.
    Precision: relative accuracy at every x here; the budget is measured against abs(x), so that 1 + tanh passes.
    Source: Hendrycks and Gimpel 2016.
    Differs: the cruder x sigmoid(1.702 x) is a third function ("quick gelu").
    """
    x = check.real("activation.gelu_tanh", "x", x)
    # A cube beyond float64 saturates the sigmoid, which is the right limit.
    with np.errstate(over="ignore"):
        z = np.sqrt(2.0 / np.pi) * x * (1.0 + GELU_CUBIC * x * x)
        return _gate(x, 2.0 * z)


def elu_plus_one(x: Shaped[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """The positive feature map of linear attention, element by element.

    y = elu(x) + 1 = x + 1 for x > 0, exp(x) otherwise

    C1. Above 0 the result must be x + 1, at 0 it must be 1.
    C2. Below 0 the result must be exp(x): never negative, never 0 for x > -10.
    Raises: DomainError for NaN, infinite or non-real input.
    Precision: relative accuracy at every x here; the budget is measured against 1 + abs(x), so that elu(x) + 1 passes.
    Source: Katharopoulos et al. 2020, eq. 7.
    Differs: other linear attentions take a softmax of queries and keys in its place (kexue.fm/archives/7546).
    """
    x = check.real("activation.elu_plus_one", "x", x)
    return np.maximum(x, 0.0) + np.exp(np.minimum(x, 0.0))


def _gate(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    # x sigmoid(z) by exponentials of non-positive numbers only, so nothing overflows and no tail cancels.
    return x * np.exp(np.minimum(z, 0.0)) / (1.0 + np.exp(-np.abs(z)))
