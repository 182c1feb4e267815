"""Classification with alternating normalisation: uncertain predictions are re-normalised next to the confident ones.

    Y = [C; b];   repeat:  Y <- Y^alpha;   Y <- prior * Y / column sums;   Y <- Y / row sums;   y = last row of Y

Source: M. Jia, A. Reiter, S.-N. Lim, Y. Artzi, C. Cardie, "When in Doubt: Improving Classification Performance
with Alternating Normalization" (Findings of EMNLP 2021), as told in https://kexue.fm/archives/8728.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from refimpl import check

# Added to both denominators by the authors' code.
OFFICIAL_EPSILON = 1e-10
# Elements of the (confident rows, block of uncertain rows) array that the batched form holds at once: 32 MiB.
BLOCK_ELEMENTS = 2**22
# Factors of a row that leave the frame of the confident rows by more than this are handed to the loop.
FRAME_LIMIT = 2.0**-100


class Adjusted(NamedTuple):
    """Corrected probabilities, and which rows were found uncertain."""

    probabilities: Float[np.ndarray, "n k"]
    uncertain: Bool[np.ndarray, "n"]


def top_entropy(p: Shaped[np.ndarray, "*n k"], *, top: int) -> Float[np.ndarray, "*n"]:
    """Entropy of the `top` largest probabilities, renormalised among themselves, as a share of its maximum.

        t = min(top, k);   w = t largest of p / their sum;   u = -sum_i w_i ln w_i / ln t

    C1. The t largest must be renormalised and the logarithm be that of t, so that u reaches 1 for equal ones.
    C2. `top` must be clamped to the number of classes.
    C3. 0 ln 0 must be 0.
    C4. A row of zeros tells nothing: its uncertainty must be 1.

    Raises: ShapeError below two classes; DomainError for top < 2 (0/0) or a negative probability.
    Precision: sums of terms of one sign; u near 0 (one class near 1) is exact to 2^-52 absolutely.
    Source: kexue.fm 8728 (top 3, threshold 0.9).
    Differs: the article's snippet divides by ln top unclamped (two classes, top 3: u <= 0.631) and gets NaN from a
    zero; the authors' code replaces zeros by 1e-16.
    """
    op = "can.top_entropy"
    p = _probabilities(op, "p", p)
    top = min(_top(op, "top", top), p.shape[-1])
    largest = np.sort(p, axis=-1)[..., -top:]
    total = largest.sum(axis=-1, keepdims=True)
    share = (largest + (total == 0)) / (total + top * (total == 0))
    return -_x_log_x(share).sum(axis=-1) / math.log(top)


def top_entropy_unnormalized(p: Shaped[np.ndarray, "*n k"], *, top: int) -> Float[np.ndarray, "*n"]:
    """The paper's measure: the `top` largest probabilities as they are, against the entropy of all k classes.

        u = -sum over the min(top, k) largest of p ln p / ln k

    C1. Nothing must be renormalised: three equal ones of 119 classes give ln 3 / ln 119 = 0.23.
    C2. `top` must be clamped to the number of classes, and 0 ln 0 be 0.

    Raises: ShapeError below two classes; DomainError for top < 2 or a negative probability.
    Source: the paper's formula as quoted by kexue.fm 8728. Differs: its own code uses `ambiguous_any`.
    """
    op = "can.top_entropy_unnormalized"
    p = _probabilities(op, "p", p)
    top = min(_top(op, "top", top), p.shape[-1])
    return -_x_log_x(np.sort(p, axis=-1)[..., -top:]).sum(axis=-1) / math.log(p.shape[-1])


def ambiguous_any(p: Shaped[np.ndarray, "*n k"], *, threshold: float, max_top: int) -> Bool[np.ndarray, "*n"]:
    """The authors' rule: a row is uncertain when its `top_entropy` reaches the threshold for any top in 2..max_top.

    C1. Every top from 2 to min(max_top, k), both included, must be tried, and >= decides.

    Raises: as `top_entropy`. Source: KMnP/can, src/rsa/prepare_rsa.py.
    Differs: that code excludes its upper end (its max_k = 4 is max_top = 3 here, None is k).
    """
    op = "can.ambiguous_any"
    p = _probabilities(op, "p", p)
    check.domain(op, math.isfinite(threshold), "a finite threshold", threshold=threshold)
    tops = range(2, min(_top(op, "max_top", max_top), p.shape[-1]) + 1)
    return np.asarray(np.stack([top_entropy(p, top=top) >= threshold for top in tops]).any(axis=0))


def class_prior(labels: Shaped[np.ndarray, "*n"], *, classes: int, smoothing: float) -> Float[np.ndarray, "k"]:
    """Class frequencies of the training labels, with `smoothing` pseudo-counts per class.

        q_j = (count_j + smoothing) / (n + smoothing k)

    C1. Every class must have an entry, the unseen ones smoothing / (n + smoothing k).

    Raises: DomainError for labels outside 0..classes-1, negative smoothing, or nothing to count (0/0).
    Source: kexue.fm 8728 (frequencies of the training set, not of a resampled one).
    """
    op = "can.class_prior"
    labels = check.integer(op, "labels", labels)
    check.shape(op, labels.ndim == 1, "labels (n,)", labels=labels)
    check.domain(op, classes >= 1, "classes >= 1", classes=classes)
    check.domain(op, 0 <= smoothing < math.inf, "smoothing >= 0", smoothing=smoothing)
    outside = labels[(labels < 0) | (labels >= classes)]
    check.domain(op, outside.size == 0, f"labels in 0..{classes - 1}", labels=outside[:1].tolist())
    check.domain(op, labels.size + smoothing > 0, "a label or smoothing > 0", n=labels.size, smoothing=smoothing)
    return (np.bincount(labels, minlength=classes) + float(smoothing)) / (labels.size + smoothing * classes)


def alternating_normalization_loop(
    confident: Shaped[np.ndarray, "*n _k"],
    uncertain: Shaped[np.ndarray, "*b k"],
    prior: Shaped[np.ndarray, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[np.ndarray, "*b k"]:
    """Each uncertain row, alone under the confident rows, after `iterations` rounds: the definition.

        Y = [C; b];   repeat:  Y <- Y^alpha;   Y <- prior * Y / sum_n Y;   Y <- Y / sum_k Y;   y = last row of Y

    C1. Every row of `uncertain` must start from the original confident rows; no row may see another.
    C2. The power must come before the column step, in every round (0^0 = 1: alpha = 0 gives the prior).
    C3. The prior must multiply after the column step; its scale must not matter.
    C4. A zero column must stay zero, and no epsilon may be added: where no confident row has a class, any b_j > 0
        has all of it.
    C5. Where prior and b^alpha share no class (0^0 = 1) the row must come back as it was; so must it for
        iterations = 0.
    C6. Without confident rows the result must be the prior on the support of b.

    Raises: ShapeError unless (n, k), (b, k), (k,); DomainError for negative values, a prior without mass,
    alpha < 0, iterations < 0.
    Precision: sums, products and powers of positive numbers; relative error about alpha^iterations (n + k) 2^-53.
    Source: kexue.fm 8728. Differs: KMnP/can, see `alternating_normalization_official`.
    """
    op = "can.alternating_normalization_loop"
    confident, uncertain, prior = _stacked(op, confident, uncertain, prior, alpha, iterations)
    results = [uncertain[:0]]
    for row in range(len(uncertain)):
        stack = np.concatenate([confident, uncertain[row : row + 1]])
        for _ in range(iterations):
            powered = stack**alpha
            stack = _rows_to_one(_ratio(powered, powered.sum(axis=0)) * prior)
        results.append(_kept(stack[-1:], uncertain[row : row + 1]))
    return np.concatenate(results)


def alternating_normalization(
    confident: Shaped[np.ndarray, "*n _k"],
    uncertain: Shaped[np.ndarray, "*b k"],
    prior: Shaped[np.ndarray, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[np.ndarray, "*b k"]:
    """`alternating_normalization_loop`, all uncertain rows at once.

        A = the rounds of C alone (the frame);   C next to b = diag(1 / A s) A diag(s), one s per b
        round:  column = s^alpha (A s)^-alpha A^alpha + b^alpha;   b <- prior b^alpha / column, to sum 1
                s <- s^alpha (sum_n A^alpha) / column

    A power of a diagonally scaled matrix is a diagonally scaled matrix, so s and b are all that a row must keep:
    two matrix products per round, none in the first (s = 1, the column sums of C^alpha are shared).

    C1. Must equal the loop, clause by clause, whatever the rounds, the order of the rows and the block size.
    C2. Memory must stay O(n k + b k), plus one block of BLOCK_ELEMENTS.

    Raises: as the loop. Precision: as the loop. Measuring s against the frame keeps it near 1; a row for which it
    leaves the range of float64 nevertheless (A s below FRAME_LIMIT) is computed by the loop.
    Source: derived from the definition. Differs: iterating the one-round formula with frozen C is another result.
    """
    op = "can.alternating_normalization"
    confident, uncertain, prior = _stacked(op, confident, uncertain, prior, alpha, iterations)
    frame, rows = confident, uncertain
    scale = np.zeros_like(uncertain) + 1.0
    beyond = np.zeros(len(uncertain), dtype=bool)
    block = max(1, BLOCK_ELEMENTS // max(frame.shape[0], frame.shape[1], 1))
    parts = [slice(start, start + block) for start in range(0, len(uncertain), block)]
    for round_ in range(iterations):
        powered = frame**alpha
        totals, alive = powered.sum(axis=0), np.asarray(powered.sum(axis=1) > 0)
        next_rows, next_scale = [rows[:0]], [scale[:0]]
        for part in parts:
            column, scaled, row = totals, scale[part] ** alpha, rows[part] ** alpha
            if round_ > 0:
                reach = (frame @ scale[part].T) ** alpha
                near = reach >= FRAME_LIMIT
                beyond[part] |= ~np.asarray(near)[alive].all(axis=0)
                column = scaled * ((near / (reach + ~near)).T @ powered)
            moved = _ratio(scaled * totals, column + row)
            next_rows.append(_rows_to_one(_ratio(row, column + row) * prior))
            # Only ratios within a row of s matter: its largest entry is kept at 1.
            next_scale.append(_ratio(moved, moved.max(axis=1, keepdims=True)))
        rows, scale = np.concatenate(next_rows), np.concatenate(next_scale)
        frame = _rows_to_one(_ratio(powered, totals) * prior)
    rows = _kept(rows, uncertain)
    if beyond.any():
        rows[beyond] = alternating_normalization_loop(
            confident, uncertain[beyond], prior, alpha=alpha, iterations=iterations
        )
    return rows


def alternating_normalization_official(
    confident: Shaped[np.ndarray, "*n _k"],
    uncertain: Shaped[np.ndarray, "*b k"],
    prior: Shaped[np.ndarray, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[np.ndarray, "*b k"]:
    """The authors' variant: 1e-10 is added to every column sum and every row sum.

        Y <- prior * Y^alpha / (sum_n Y^alpha + 1e-10);   Y <- Y / (sum_k Y + 1e-10)

    C1. Both epsilons must be added, in every round: rows do not quite sum to one, zero rows stay zero.

    Raises: as the loop. Source: KMnP/can, src/rsa/rsa.py.
    Differs: from the loop by 1e-10 and more where a column is small; that code takes no prior for a uniform one,
    and the identity matrix for the confident rows where there are none.
    """
    op = "can.alternating_normalization_official"
    confident, uncertain, prior = _stacked(op, confident, uncertain, prior, alpha, iterations)
    results = [uncertain[:0]]
    for row in range(len(uncertain)):
        stack = np.concatenate([confident, uncertain[row : row + 1]])
        for _ in range(iterations):
            powered = stack**alpha
            stack = powered / (powered.sum(axis=0) + OFFICIAL_EPSILON) * prior
            stack = stack / (stack.sum(axis=1, keepdims=True) + OFFICIAL_EPSILON)
        results.append(stack[-1:])
    return np.concatenate(results)


def adjust(
    p: Shaped[np.ndarray, "*n k"],
    prior: Shaped[np.ndarray, "*_"],
    *,
    top: int,
    threshold: float,
    alpha: float,
    iterations: int,
) -> Adjusted:
    """Predictions with the uncertain rows (top_entropy >= threshold) replaced by their alternating normalisation.

    C1. Confident rows must come back unchanged; so must all of them where none is uncertain.
    C2. >= must decide, and every row must be on one side.

    Raises: as `top_entropy` and `alternating_normalization`. Source: kexue.fm 8728 (3, 0.9, alpha 1, 1 iteration).
    """
    op = "can.adjust"
    p = _probabilities(op, "p", p)
    check.shape(op, p.ndim == 2, "p (n, k)", p=p)
    check.domain(op, math.isfinite(threshold), "a finite threshold", threshold=threshold)
    uncertain = np.asarray(top_entropy(p, top=top) >= threshold)
    adjusted = p.copy()
    adjusted[uncertain] = alternating_normalization(
        p[~uncertain], p[uncertain], prior, alpha=alpha, iterations=iterations
    )
    return Adjusted(adjusted, uncertain)


def _probabilities(op: str, name: str, values: np.ndarray) -> np.ndarray:
    values = check.real(op, name, values)
    check.shape(op, values.ndim >= 1 and values.shape[-1] >= 2, f"{name} (..., k) with k >= 2", **{name: values})
    check.domain(op, not (values < 0).any(), f"{name} >= 0", **{name: float(values.min(initial=0))})
    return values


def _top(op: str, name: str, top: int) -> int:
    top = int(check.integer(op, name, top))
    check.domain(op, top >= 2, f"{name} >= 2", **{name: top})
    return top


def _stacked(
    op: str, confident: np.ndarray, uncertain: np.ndarray, prior: np.ndarray, alpha: float, iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    confident, uncertain = _probabilities(op, "confident", confident), _probabilities(op, "uncertain", uncertain)
    prior = _probabilities(op, "prior", prior)
    fits = confident.ndim == uncertain.ndim == 2 and prior.ndim == 1
    fits = fits and confident.shape[1] == uncertain.shape[1] == prior.shape[0]
    expected = "confident (n, k), uncertain (b, k), prior (k,)"
    check.shape(op, fits, expected, confident=confident, uncertain=uncertain, prior=prior)
    check.domain(op, prior.sum() > 0, "a prior with a positive entry", prior=prior)
    check.domain(op, 0 <= alpha < math.inf, "alpha >= 0", alpha=alpha)
    check.domain(op, int(check.integer(op, "iterations", iterations)) >= 0, "iterations >= 0", iterations=iterations)
    return confident, uncertain, prior


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(x + (x == 0))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / (denominator + (denominator == 0)) * (denominator != 0)


def _rows_to_one(x: np.ndarray) -> np.ndarray:
    return _ratio(x, x.sum(axis=1, keepdims=True))


def _kept(rows: np.ndarray, original: np.ndarray) -> np.ndarray:
    empty = rows.sum(axis=1, keepdims=True) == 0
    return rows * ~empty + original * empty
