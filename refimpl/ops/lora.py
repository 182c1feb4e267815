"""Low-rank adaptation, as a parameterisation and as an update rule of the dense weight.

    W' = W + scale A B,    y = x W + scale (x A) B

Source: Hu et al., arXiv:2106.09685; the gradient view is https://kexue.fm/archives/9590.
Here A (d, r) meets the input and B (r, e) makes the output, as in the article. PEFT keeps the transposes, lora_A (r, d)
and lora_B (e, r), beside a weight (e, d): see from_peft. Every function takes 1 <= r, also r > min(d, e): the product
is then redundant but defined, and PEFT trains it without a word. G is dL/dW (d, e); dy is dL/dy.
Precision: all in float64; budgets are measured against the same expression on absolute values, scale included.
"""

import functools
import math
from numbers import Real
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

# Run-time type checkers do not take an int where the annotation says float.
Number = int | float
# Inputs, named by their shapes. A whole shape carries the name, so that a misfit reaches the check of the operator;
# outputs are tied to inputs by the same names.
DR = Shaped[np.ndarray, "*d_r"]
RE = Shaped[np.ndarray, "*r_e"]
DE = Shaped[np.ndarray, "*d_e"]
Array = Shaped[np.ndarray, "..."]


class Factors(NamedTuple):
    """The pair of factors, or of their gradients."""

    A: np.ndarray
    B: np.ndarray


class AdamW(NamedTuple):
    """One parameter array with the running means of its gradient (m) and of its square (v)."""

    parameter: np.ndarray
    m: np.ndarray
    v: np.ndarray


class AdamWFactors(NamedTuple):
    """Both factors with their optimiser states."""

    A: np.ndarray
    B: np.ndarray
    m_A: np.ndarray
    v_A: np.ndarray
    m_B: np.ndarray
    v_B: np.ndarray


class PeftWeights(NamedTuple):
    """A base weight and its factors in the orientation of torch.nn.Linear."""

    W_t: np.ndarray
    lora_A: np.ndarray
    lora_B: np.ndarray


class Weights(NamedTuple):
    """A base weight and its factors for row vectors."""

    W: np.ndarray
    A: np.ndarray
    B: np.ndarray


def scale_lora(*, alpha: Number, r: int) -> float:
    """The factor of the original paper: alpha / r.

    C1. alpha has no default: a configuration without alpha is an error, not scale 1.
    C2. Division is by r, once.
    Raises: DomainError unless alpha is finite and r a positive integer.
    Source: Hu et al. section 4.1. Differs: the article sets it to 1; scale_rslora.
    """
    return _number("lora.scale_lora", "alpha", alpha) / _count("lora.scale_lora", "r", r)


def scale_rslora(*, alpha: Number, r: int) -> float:
    """The rank-stabilised factor: alpha / sqrt(r).

    C1. alpha has no default.
    C2. Equal to scale_lora at r = 1 only (alpha = 0 apart).
    Raises: DomainError as scale_lora.
    Source: Kalajdzievski, arXiv:2312.03732; PEFT use_rslora.
    """
    return _number("lora.scale_rslora", "alpha", alpha) / math.sqrt(_count("lora.scale_rslora", "r", r))


def delta(A: DR, B: RE, *, scale: Number) -> Float[np.ndarray, "d e"]:
    """The change that the factors make to the weight: scale A B.

    C1. Linear in scale.
    C2. Unchanged by A -> A R, B -> R^-1 B.
    C3. Zero where A or B is zero.
    C4. Rank at most r.
    Raises: ShapeError where the r of A and B differ or r = 0; DomainError for NaN, infinity or a non-finite scale.
    Precision: gamma_{r+2} |scale| |A||B|.
    Source: Hu et al. eq. 3. Differs: PEFT's get_delta_weight returns the transpose (e, d).
    """
    A, B = _factors("lora.delta", A, B)
    return _number("lora.delta", "scale", scale) * (A @ B)


def apply(x: Array, W: DE, A: DR, B: RE, *, scale: Number) -> Float[np.ndarray, "*b_n e"]:
    """The adapted projection of x (..., d): y = x W + scale (x A) B.

    C1. Equal to x (W + scale A B) in exact arithmetic.
    C2. Low-rank order (x A) B: A B is never formed.
    C3. scale = 0 or a zero factor gives x W.
    C4. Each row on its own; no rows give no rows.
    Raises: ShapeError, DomainError as delta. Dropout and bias are the caller's.
    Precision: gamma_{d+r+4} (|x||W| + |scale| |x||A||B|).
    Source: Hu et al. eq. 3. Differs: PEFT's dropout acts on the x that meets A only.
    """
    op = "lora.apply"
    A, B, W = _factors(op, A, B, W=W)
    x = _rows(op, "x", x, "d", A.shape[0])
    return x @ W + _number(op, "scale", scale) * ((x @ A) @ B)


def merge(W: DE, A: DR, B: RE, *, scale: Number) -> Float[np.ndarray, "*d_e"]:
    """The dense weight that acts like the adapted one: W + scale A B.

    C1. x merge(W, A, B) = apply(x, W, A, B).
    C2. A new array: W is neither changed nor aliased.
    Merging the result again adds the change twice; who stores weights must refuse that (PEFT does since its PR 1355).
    Raises: ShapeError, DomainError as delta.
    Precision: gamma_{r+3} (|W| + |scale| |A||B|); in 16 bits a change below half an ulp of W is lost whole.
    Source: Hu et al. section 4.1.
    """
    A, B, W = _factors("lora.merge", A, B, W=W)
    return W + _number("lora.merge", "scale", scale) * (A @ B)


def unmerge(W: DE, A: DR, B: RE, *, scale: Number) -> Float[np.ndarray, "*d_e"]:
    """The base weight recovered from a merged one: W - scale A B.

    C1. unmerge(merge(W)) = W in exact arithmetic.
    C2. Not bit exact: the sum W + scale A B was rounded, and the bits
    dropped there cannot come back. A cycle costs up to half an ulp of the merged weight and half an ulp of W, and
    cycles with a changing adapter add up: keep W itself.
    C3. A new array.
    Raises: ShapeError, DomainError as delta. Precision, Source: as merge.
    """
    A, B, W = _factors("lora.unmerge", A, B, W=W)
    return W - _number("lora.unmerge", "scale", scale) * (A @ B)


def merge_symmetric(W: DE, A: DR, B: RE, A_0: Array, B_0: Array, *, scale: Number) -> Float[np.ndarray, "*d_e"]:
    """The dense weight when both factors start non-zero: W - scale A_0 B_0 + scale A B.

    C1. Equal to W at the start (A = A_0, B = B_0), to rounding.
    C2. A_0 = 0 or B_0 = 0 gives merge.
    C3. A_0, B_0 are the values at initialisation and stay; the ranks of the two pairs may differ.
    Raises: ShapeError, DomainError as delta.
    Precision: gamma_{r+4} (|W| + |scale| (|A_0||B_0| + |A||B|)).
    Source: the article, on initialisation.
    """
    op = "lora.merge_symmetric"
    A, B, W = _factors(op, A, B, W=W)
    A_0, B_0, W = _factors(op, A_0, B_0, W=W)
    scale = _number(op, "scale", scale)
    return W - scale * (A_0 @ B_0) + scale * (A @ B)


def gradients_dense(G: DE, A: DR, B: RE, *, scale: Number) -> Factors:
    """The gradients of the factors from the gradient of the dense weight: dA = scale G B^T, dB = scale A^T G.

    C1. A zero B gives dA = 0, and a zero A gives dB = 0: both zero never leaves zero.
    C2. Linear in G and in scale.
    Raises: ShapeError, DomainError as delta.
    Precision: gamma_{e+2} |scale| |G||B|^T, gamma_{d+2} |scale| |A|^T|G|.
    Source: the article, first formula.
    """
    op = "lora.gradients_dense"
    A, B, G = _factors(op, A, B, G=G)
    scale = _number(op, "scale", scale)
    return Factors(scale * (G @ B.T), scale * (A.T @ G))


def gradients_factored(x: Array, dy: Array, A: DR, B: RE, *, scale: Number) -> Factors:
    """The same gradients from the rows x (..., d) and dy (..., e): dA = scale x^T (dy B^T), dB = scale (x A)^T dy.

    C1. Equal to gradients_dense at G = x^T dy.
    C2. G is never formed: 2 n r (d + e) multiplications.
    C3. All leading axes are summed; no rows give zeros.
    Raises: ShapeError also where the leading axes of x and dy differ; DomainError as delta.
    Precision: gamma_{n+e+3} |scale| |x|^T|dy||B|^T, gamma_{n+d+3} |scale| |A|^T|x|^T|dy|.
    Source: chain rule on apply.
    """
    op = "lora.gradients_factored"
    A, B = _factors(op, A, B)
    x = _rows(op, "x", x, "d", A.shape[0])
    dy = _rows(op, "dy", dy, "e", B.shape[1])
    check.shape(op, x.shape[:-1] == dy.shape[:-1], "x (..., d) and dy (..., e) with equal leading axes", x=x, dy=dy)
    n = math.prod(x.shape[:-1])
    x, dy = x.reshape(n, x.shape[-1]), dy.reshape(n, dy.shape[-1])
    scale = _number(op, "scale", scale)
    return Factors(scale * (x.T @ (dy @ B.T)), scale * ((x @ A).T @ dy))


def gradient_input(dy: Array, W: DE, A: DR, B: RE, *, scale: Number) -> Float[np.ndarray, "*b_n d"]:
    """The gradient of the input, from dy (..., e): dx = dy W^T + scale (dy B^T) A^T.

    C1. Equal to dy merge(W, A, B)^T.
    C2. Zero factors give dy W^T, not zero.
    Raises: ShapeError, DomainError as delta.
    Precision: gamma_{e+r+4} (|dy||W|^T + |scale| |dy||B|^T|A|^T).
    Source: chain rule on apply.
    """
    op = "lora.gradient_input"
    A, B, W = _factors(op, A, B, W=W)
    dy = _rows(op, "dy", dy, "e", B.shape[1])
    return dy @ W.T + _number(op, "scale", scale) * ((dy @ B.T) @ A.T)


def update(A: DR, B: RE, A_new: Array, B_new: Array, *, scale: Number) -> Float[np.ndarray, "d e"]:
    """What any step of the factors does to the weight: scale (A_new B_new - A B).

    C1. Under sgd it is sgd_update.
    C2. Under adamw it has no shorter form, and is not AdamW on G.
    C3. Unmoved factors give zero; rank at most 2 r.
    Raises: ShapeError, DomainError as delta.
    Precision: gamma_{r+3} |scale| (|A_new||B_new| + |A||B|): the two products cancel, so accumulate W in wide format.
    Source: the article, second formula.
    """
    op = "lora.update"
    A, B = _factors(op, A, B)
    A_new, B_new = _factors(op, A_new, B_new)
    same = A.shape == A_new.shape and B.shape == B_new.shape
    check.shape(op, same, "new factors of the shapes of the old", A=A, A_new=A_new, B=B, B_new=B_new)
    return _number(op, "scale", scale) * (A_new @ B_new - A @ B)


def sgd(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Factors:
    """One step of gradient descent on both factors: A - learning_rate dA, B - learning_rate dB.

    C1. Simultaneous: dB uses the old A.
    C2. learning_rate = 0 gives the factors back.
    Raises: ShapeError, DomainError as delta; DomainError for a negative learning_rate.
    Precision: gamma_{e+3} (|A| + learning_rate |dA|), gamma_{d+3} (|B| + learning_rate |dB|).
    Source: the article. Differs: LoRA+ (PEFT) gives B a larger learning rate than A.
    """
    op = "lora.sgd"
    A, B, G = _factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return Factors(A - rate * (G @ B.T), B - rate * (A.T @ G))


def sgd_update(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Float[np.ndarray, "*d_e"]:
    """What sgd does to the weight, exactly, first and second order:

        -learning_rate scale^2 (G B^T B + A A^T G) + learning_rate^2 scale^3 G B^T A^T G

    C1. Equal to update(A, B, *sgd(A, B, G)).
    C2. Both orders: there is no third.
    C3. Zero where G is zero.
    Raises: as sgd.
    Precision: gamma_{2d+2e+2r+6} times the formula on absolute values, all terms positive.
    Source: the article, who prints it at scale 1.
    """
    op = "lora.sgd_update"
    A, B, G = _factors(op, A, B, G=G)
    scale, rate = _number(op, "scale", scale), _at_least_zero(op, "learning_rate", learning_rate)
    GB, AG = G @ B.T, A.T @ G
    return rate**2 * scale**3 * (GB @ AG) - rate * scale**2 * (GB @ B + A @ AG)


def sgd_frozen(A: DR, B: RE, G: DE, *, scale: Number, learning_rate: Number) -> Float[np.ndarray, "*r_e"]:
    """One step with A frozen, as the new B: B - learning_rate scale A^T G.

    C1. The B of sgd.
    C2. Linear in G; B enters by addition only.
    Raises: as sgd.
    Source: LoRA-FA, arXiv:2308.03303. Differs: PEFT's LoRA-FA optimiser also applies (A^T A + delta I)^-1 / scale^2.
    """
    op = "lora.sgd_frozen"
    A, B, G = _factors(op, A, B, G=G)
    rate = _number(op, "scale", scale) * _at_least_zero(op, "learning_rate", learning_rate)
    return B - rate * (A.T @ G)


def sgd_frozen_update(A: DR, G: DE, *, scale: Number, learning_rate: Number) -> Float[np.ndarray, "*d_e"]:
    """What sgd_frozen does to the weight: -learning_rate scale^2 A (A^T G), a fixed projection of the gradient.

    C1. Equal to update(A, B, A, sgd_frozen(A, B, G)) for every B.
    C2. Exact: no second order.
    Raises: ShapeError where A and G disagree in d or r = 0; DomainError as sgd.
    Source: the article; LoRA-FA.
    """
    op = "lora.sgd_frozen_update"
    A, G = check.real(op, "A", A), check.real(op, "G", G)
    ok = A.ndim == G.ndim == 2 and A.shape[0] == G.shape[0] and A.shape[1] >= 1
    check.shape(op, ok, "A (d, r) and G (d, e) with r >= 1", A=A, G=G)
    rate = _at_least_zero(op, "learning_rate", learning_rate)
    return -rate * _number(op, "scale", scale) ** 2 * (A @ (A.T @ G))


def random_projection_update(G: DE, A: Array, B: Array, *, learning_rate: Number) -> Float[np.ndarray, "*d_e"]:
    """The update of W when fresh factors are drawn at every step: -(learning_rate / r) (A A^T G + G B^T B).

    C1. With independent entries of mean 0 and variance 1 its mean is -2 learning_rate G, for every r.
    C2. Deterministic: the caller draws A (d, r) and B (r, e).
    C3. The first order of sgd_update at scale 1/sqrt(r).
    Raises: as sgd.
    Source: the article, r = 1, who prints the shapes of the two vectors exchanged. Differs: Flora, arXiv:2402.03293,
    projects one side only (mean -learning_rate G).
    """
    op = "lora.random_projection_update"
    A, B, G = _factors(op, A, B, G=G)
    return -_at_least_zero(op, "learning_rate", learning_rate) / A.shape[1] * (A @ (A.T @ G) + (G @ B.T) @ B)


def adamw_array(
    parameter: Array,
    gradient: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamW:
    """One AdamW step of one array; `step` counts from 1 and includes this one, and the first m, v are zeros.

        m = beta_1 m + (1 - beta_1) g,  v = beta_2 v + (1 - beta_2) g^2
        p = p (1 - learning_rate weight_decay)
            - learning_rate m / (1 - beta_1^step) / (sqrt(v / (1 - beta_2^step)) + epsilon)

    C1. Decay is decoupled: it multiplies the parameter and never meets m or v.
    C2. epsilon is added after the
    bias-corrected root.
    C3. At step 1 the move is learning_rate g / (|g| + epsilon).
    C4. A zero gradient only decays.
    Raises: ShapeError where the four shapes differ; DomainError for step < 1, a beta outside [0, 1), epsilon <= 0,
    negative learning_rate, weight_decay or v.
    Precision: 12 u (|p| + learning_rate times the move with beta_1 |m| + (1 - beta_1) |g| as numerator).
    Source: Loshchilov and Hutter, arXiv:1711.05101; torch.optim.AdamW. Differs: torch also takes epsilon = 0 and then
    returns NaN at a zero gradient; some ports add epsilon before the correction, or decay through the gradient (Adam).
    """
    op = "lora.adamw_array"
    p, g = check.real(op, "parameter", parameter), check.real(op, "gradient", gradient)
    m, v = check.real(op, "m", m), check.real(op, "v", v)
    check.shape(op, p.shape == g.shape == m.shape == v.shape, "four equal shapes", parameter=p, gradient=g, m=m, v=v)
    check.domain(op, bool((v >= 0).all()), "v >= 0", v=float(v.min(initial=0)))
    step = _count(op, "step", step)
    rate, decay = _at_least_zero(op, "learning_rate", learning_rate), _at_least_zero(op, "weight_decay", weight_decay)
    beta_1, beta_2 = _number(op, "beta_1", beta_1), _number(op, "beta_2", beta_2)
    check.domain(op, 0 <= beta_1 < 1 and 0 <= beta_2 < 1, "beta_1 and beta_2 in [0, 1)", beta_1=beta_1, beta_2=beta_2)
    epsilon = _number(op, "epsilon", epsilon)
    check.domain(op, epsilon > 0, "epsilon > 0", epsilon=epsilon)
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * (g * g)
    move = (m / (1 - beta_1**step)) / (np.sqrt(v / (1 - beta_2**step)) + epsilon)
    return AdamW(p * (1 - rate * decay) - rate * move, m, v)


def adamw(
    A: DR,
    B: RE,
    G: DE,
    m_A: Array,
    v_A: Array,
    m_B: Array,
    v_B: Array,
    *,
    scale: Number,
    step: int,
    learning_rate: Number,
    beta_1: Number,
    beta_2: Number,
    epsilon: Number,
    weight_decay: Number,
) -> AdamWFactors:
    """One AdamW step of both factors: adamw_array on (A, dA) and on (B, dB), with gradients_dense at the old factors.

    C1. States have the shapes of the factors: they follow the projected gradient, so this is not AdamW on G projected.
    C2. From zero states a positive factor on scale meets only epsilon.
    C3. Frozen A: adamw_array on (B, dB) alone.
    Raises: as gradients_dense and adamw_array.
    Source: the article, on optimisers. Differs: GaLore keeps states in a subspace and updates all of W.
    """
    dA, dB = gradients_dense(G, A, B, scale=scale)
    rule = functools.partial(
        adamw_array,
        step=step,
        learning_rate=learning_rate,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        weight_decay=weight_decay,
    )
    new_A, new_B = rule(A, dA, m_A, v_A), rule(B, dB, m_B, v_B)
    return AdamWFactors(new_A.parameter, new_B.parameter, new_A.m, new_A.v, new_B.m, new_B.v)


def additive_delta(A: DR, B: RE) -> Float[np.ndarray, "d e"]:
    """The additive change of the weight: A [I_r ... I_r] + [I_r ; ... ; I_r] B, that is A[i, j mod r] + B[i mod r, j].

    C1. Linear in A and B together, rank at most 2 r.
    C2. r = 1: every column gets A, every row gets B.
    C3. A = B = 0 is a start that trains, unlike the product.
    Raises: ShapeError unless r divides d and e; otherwise as delta.
    Precision: one addition. Source: the article, last section.
    """
    A, B = _factors("lora.additive_delta", A, B)
    (d, r), e = A.shape, B.shape[1]
    check.shape("lora.additive_delta", d % r == e % r == 0, "A (d, r), B (r, e), r dividing d and e", A=A, B=B)
    return A[:, np.arange(e) % r] + B[np.arange(d) % r, :]


def additive_gradients(G: DE, *, r: int) -> Factors:
    """The gradients of the additive factors: G [I_r ... I_r]^T and [I_r ; ... ; I_r]^T G, sums over equal residues.

    C1. The adjoint of additive_delta: <G, additive_delta(A, B)> = <dA, A> + <dB, B>.
    C2. r = 1: row and column sums.
    Raises: ShapeError unless r divides both axes of G; DomainError for r < 1.
    Precision: gamma_{e/r} and gamma_{d/r} of the sums of absolute values. Source: the article, last section.
    """
    op = "lora.additive_gradients"
    G, r = check.real(op, "G", G), _count(op, "r", r)
    check.shape(op, G.ndim == 2 and G.shape[0] % r == G.shape[1] % r == 0, f"G (d, e), r={r} dividing d and e", G=G)
    d, e = G.shape
    return Factors(G.reshape(d, e // r, r).sum(axis=1), G.reshape(d // r, r, e).sum(axis=0))


def additive_update(G: DE, *, r: int, learning_rate: Number) -> Float[np.ndarray, "*d_e"]:
    """What a step of gradient descent on the additive factors does to the weight: exact, no second order.

    C1. Equal to -learning_rate additive_delta(*additive_gradients(G)).
    C2. Linear in G; A and B do not enter.
    Raises: as additive_gradients; DomainError for a negative learning_rate. Source: the article, last section.
    """
    rate = _at_least_zero("lora.additive_update", "learning_rate", learning_rate)
    return -rate * additive_delta(*additive_gradients(G, r=r))


def from_peft(W_t: Array, lora_A: Array, lora_B: Array) -> Weights:
    """The transposes (W_t^T, lora_A^T, lora_B^T): from W_t (e, d), lora_A (r, d), lora_B (e, r) to W, A, B.

    C1. Bit exact; to_peft undoes it.
    C2. Copies: nothing is aliased.
    C3. A is lora_A, the factor that meets the input.
    Raises: ShapeError, DomainError as delta. Precision: none is lost.
    Source: PEFT's linear layer. Differs: PEFT's embedding adapters keep the weight as (d, e), and start A, not B, at
    zero.
    """
    op = "lora.from_peft"
    W_t = check.real(op, "W_t", W_t)
    lora_A, lora_B = check.real(op, "lora_A", lora_A), check.real(op, "lora_B", lora_B)
    r = lora_A.shape[0] if lora_A.ndim == 2 else 0
    ok = r >= 1 and W_t.ndim == 2 and lora_A.shape == (r, W_t.shape[1]) and lora_B.shape == (W_t.shape[0], r)
    check.shape(op, ok, "W_t (e, d), lora_A (r, d), lora_B (e, r), r >= 1", W_t=W_t, lora_A=lora_A, lora_B=lora_B)
    return Weights(W_t.T.copy(), lora_A.T.copy(), lora_B.T.copy())


def to_peft(W: DE, A: DR, B: RE) -> PeftWeights:
    """The transposes (W^T, A^T, B^T): W_t (e, d), lora_A (r, d), lora_B (e, r).

    C1. Bit exact; from_peft undoes it.
    C2. Copies.
    C3. lora_B lora_A = (A B)^T.
    Raises: ShapeError, DomainError as delta. Precision, Source: as from_peft.
    """
    A, B, W = _factors("lora.to_peft", A, B, W=W)
    return PeftWeights(W.T.copy(), A.T.copy(), B.T.copy())


def _number(op: str, name: str, value: object) -> float:
    check.domain(op, isinstance(value, Real) and math.isfinite(value), f"{name} a finite number", **{name: value})
    # A Python float, so that the dtype of the arrays decides the dtype of the result.
    return float(value)  # type: ignore[arg-type]


def _at_least_zero(op: str, name: str, value: object) -> float:
    number = _number(op, name, value)
    check.domain(op, number >= 0, f"{name} >= 0", **{name: value})
    return number


def _count(op: str, name: str, value: object) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check.domain(op, whole and bool(value >= 1), f"{name} an integer >= 1", **{name: value})  # type: ignore[operator]
    return int(value)  # type: ignore[call-overload]


def _rows(op: str, name: str, value: object, letter: str, width: int) -> np.ndarray:
    rows = check.real(op, name, value)
    ok = rows.ndim >= 1 and rows.shape[-1] == width
    check.shape(op, ok, f"{name} (..., {letter}) with {letter}={width}", **{name: rows})
    return rows


def _factors(op: str, A: object, B: object, **dense: object) -> tuple[np.ndarray, ...]:
    """A (d, r), B (r, e) and the arrays of shape (d, e), checked against each other."""
    A, B = check.real(op, "A", A), check.real(op, "B", B)
    weights = {name: check.real(op, name, value) for name, value in dense.items()}
    ok = A.ndim == B.ndim == 2 and A.shape[1] == B.shape[0] >= 1
    ok = ok and all(w.shape == (A.shape[0], B.shape[1]) for w in weights.values())
    expected = "A (d, r), B (r, e)" + "".join(f", {name} (d, e)" for name in weights) + " with r >= 1"
    check.shape(op, ok, expected, A=A, B=B, **weights)
    return A, B, *weights.values()
