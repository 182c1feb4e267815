"""How much each task counts in a step of multi-task training: weights from the losses and the Gram matrix of gradients.

    u_d = sum_t w_t g_td,   gram_tu = sum_d g_td g_ud

Source: https://kexue.fm/archives/8870 (weights from losses, gradient normalisation), https://kexue.fm/archives/8896
(Pareto direction, Frank-Wolfe); RoFormerV2's second stage, https://kexue.fm/archives/8998.

A step has t entries, each the loss of one task on one batch; g_t is the gradient of entry t on the parameters that are
weighted together. A rule takes what is known of the entries, and gives their weights in float64:

    rule(losses, gram, tasks) -> weights        tasks: the number of the task that each entry is of

Rules share that signature and ignore what they do not need. What a rule depends on besides is keyword-only, for
functools.partial. Scaling a loss by c scales its g by c; adding a constant leaves g as it is.

                          unmoved by scaling a loss   by adding to it
    fixed                 no                          yes
    reference_loss        with its reference          yes, the reference held
    detached_loss         yes                         no
    generalised_mean      in direction at p = 0       no
    gradient_normalised   yes                         yes
    pareto                no                          yes
    pareto_normalised     yes                         yes

All rules raise ShapeError for arrays that do not fit together and for no entry at all; DomainError for NaN, infinity,
task numbers that are no integers from 0, and a matrix that is no Gram matrix: not symmetric, or negative on its
diagonal. Norms below 1e-154 have a square of 0 in float64, and count as 0.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check

Array = Shaped[np.ndarray, "..."]
Weights = Float[np.ndarray, " t"]
Rule = Callable[[Array, Array, Array], Weights]

# Frank-Wolfe ends where the gap is this small beside the square of the length of u.
TOLERANCE = 1e-9
# Below this, times the entries and the largest square, the gap of float64 is rounding.
ROUNDING = 1e-15
MOST_ITERATIONS = 1_000
# By how much, beside the largest square, a Gram matrix may miss its own transpose.
ASYMMETRY = 1e-9
# Of a smaller p, M_p = M_0 (1 + p var(log L) / 2 + ...) is M_0 in float64: no logarithm is beyond 745.
LEAST_POWER = 1e-30


def fixed(losses: Array, gram: Array, tasks: Array, *, weights: Array) -> Weights:
    """A weight for every task, named by its number: w_t = weights[tasks_t].

    C1. Entries of one task must have the same weight, however many there are.
    Raises: DomainError besides for negative weights and for a task that has none.
    """
    _, _, tasks = _checked("multitask.fixed", losses, gram, tasks)
    weights = check.real("multitask.fixed", "weights", weights)
    check.domain("multitask.fixed", bool((weights >= 0).all()), "weights >= 0", weights=weights.tolist())
    return _of_tasks("multitask.fixed", "weights", weights, tasks)


def reference_loss(losses: Array, gram: Array, tasks: Array, *, reference: Array) -> Weights:
    """The loss in units of one that its task once had: w_t = 1 / reference[tasks_t].

    The reference is the initial loss of the task, or its `prior_loss`.
    C1. The present losses must not matter.
    Raises: DomainError besides for a reference that is not above 0 and for a task that has none.
    """
    _, _, tasks = _checked("multitask.reference_loss", losses, gram, tasks)
    reference = check.real("multitask.reference_loss", "reference", reference)
    above = bool((reference > 0).all())
    check.domain("multitask.reference_loss", above, "reference > 0", reference=reference.tolist())
    return 1 / _of_tasks("multitask.reference_loss", "reference", reference, tasks)


def detached_loss(losses: Array, gram: Array, tasks: Array) -> Weights:
    """The loss in units of itself, as a constant: w_t = 1 / L_t, so that u is the gradient of sum_t log L_t.

    C1. A loss of exactly 0 is at its minimum, and must have the weight 0.
    Raises: DomainError besides for a negative loss.
    """
    losses, _, _ = _checked("multitask.detached_loss", losses, gram, tasks)
    _check_losses("multitask.detached_loss", losses)
    return _inverse(losses)


def generalised_mean(losses: Array, gram: Array, tasks: Array, *, p: float) -> Weights:
    """The derivatives of the generalised mean M_p of the losses: w_t = (L_t / M_p)^(p-1) / n.

    C1. p = 1 must give 1/n; p = 0 is the limit M_0 / (n L_t), the geometric mean.
    C2. For p < 1 losses of exactly 0 must be left out: their weight is 0, and n and M_p are those of the others.
    C3. For p >= 1, where all losses are 0, the weights must be 1/n, as wherever all losses are equal.
    Raises: DomainError besides for a negative loss and a p that is not finite.
    Precision: p near 0 loses nothing: the mean is formed from expm1 and log1p.
    """
    losses, _, _ = _checked("multitask.generalised_mean", losses, gram, tasks)
    mean = mean_of_losses(losses, p=p)
    counted = np.ones(len(losses), np.bool_) if p >= 1 else losses > 0
    ratio = np.divide(losses, mean, out=np.ones_like(losses), where=counted & (mean > 0))
    return np.where(counted, ratio ** (p - 1), 0.0) / max(int(counted.sum()), 1)


def mean_of_losses(losses: Array, *, p: float) -> float:
    """M_p = ((1/n) sum_t L_t^p)^(1/p), the geometric mean at p = 0; it increases with p.

    C1. For p < 1 losses of exactly 0 must be left out, as generalised_mean does; of none, the mean is 0.
    Raises: ShapeError, DomainError as generalised_mean.
    """
    losses = check.real("multitask.mean_of_losses", "losses", losses)
    fits = losses.ndim == 1 and len(losses) > 0
    check.shape("multitask.mean_of_losses", fits, "losses (t,), t >= 1", losses=losses)
    _check_losses("multitask.mean_of_losses", losses)
    check.domain("multitask.mean_of_losses", math.isfinite(p), "a finite p", p=p)
    positive = losses[losses > 0]
    if not len(positive):
        return 0.0
    logs = np.log(positive)
    if abs(p) < LEAST_POWER:
        return float(np.exp(logs.mean()))
    # The largest term of the sum is taken out, so that none overflows and a small p is not lost beside 1.
    outer = logs.max() if p > 0 else logs.min()
    # A loss of 0 adds nothing to the sum, and counts where p >= 1.
    zeros = len(losses) - len(positive) if p >= 1 else 0
    mean = (np.expm1(p * (logs - outer)).sum() - zeros) / (len(positive) + zeros)
    return float(np.exp(outer + np.log1p(mean) / p))


def gradient_normalised(losses: Array, gram: Array, tasks: Array) -> Weights:
    """Gradients of length 1: w_t = 1 / |g_t|.

    C1. A gradient of exactly 0 must have the weight 0.
    C2. Of two entries, u never opposes a gradient: <g_t, u> = |g_t| (1 + cos) >= 0.
    """
    _, gram, _ = _checked("multitask.gradient_normalised", losses, gram, tasks)
    return _inverse(norms(gram))


def pareto(losses: Array, gram: Array, tasks: Array) -> Weights:
    """The shortest u among the averages of the gradients: w = argmin |u|^2, w >= 0, sum w = 1. See `min_norm`.

    C1. <g_t, u> >= |u|^2 for every entry, within the gap of min_norm: a step along -u makes no loss larger.
    C2. u = 0 where no direction makes all losses smaller (Pareto-stationary): opposite gradients, or one that is 0.
    C3. One entry must have the weight 1.
    Differs: small gradients rule, so a loss that is scaled up loses its say; pareto_normalised.
    """
    _, gram, _ = _checked("multitask.pareto", losses, gram, tasks)
    return min_norm(gram, tolerance=TOLERANCE, most=MOST_ITERATIONS)


def pareto_normalised(losses: Array, gram: Array, tasks: Array) -> Weights:
    """`pareto` of the gradients scaled to length 1: w_t = a_t / |g_t|, with a on the simplex.

    C1. <g_t, u> >= |g_t| |u|^2 for every entry, within the gap.
    C2. Gradients of exactly 0 must be left out, with the weight 0: they stop nobody.
    C3. Of two entries, u must be half of what gradient_normalised gives.
    """
    _, gram, _ = _checked("multitask.pareto_normalised", losses, gram, tasks)
    inverse = _inverse(norms(gram))
    live = np.flatnonzero(inverse)
    weights = np.zeros(len(gram))
    if len(live):
        # One factor after the other: their product may be too large for a number.
        unit = gram[np.ix_(live, live)] * inverse[live] * inverse[live, None]
        weights[live] = min_norm(unit, tolerance=TOLERANCE, most=MOST_ITERATIONS) * inverse[live]
    return weights


# The weight of an entry under these depends on that entry alone: gradients can be added one after another.
SEPARABLE = frozenset({fixed, reference_loss, detached_loss, gradient_normalised})


def separable(rule: Rule) -> bool:
    """Whether a rule, or what functools.partial made of one, is in SEPARABLE."""
    while isinstance(rule, partial):
        rule = rule.func
    return rule in SEPARABLE


def min_norm(gram: Array, *, tolerance: float, most: int) -> Weights:
    """The weights on the simplex that make u shortest, by Frank-Wolfe with away steps from equal weights.

    toward: u moves to the gradient g_i that it meets least, by clip(<u - g_i, u> / |u - g_i|^2, 0, 1)
    away:   u moves away from the gradient that it meets most and holds, until that one's weight is 0 at the latest

    C1. It must end where the gap <= tolerance |u|^2, or is rounding, or after `most` iterations: `gap` tells.
    C2. Two entries must be exact after one iteration, equal to `min_norm_of_two`.
    C3. Entries of equal gradients, and gradients that are all 0, must share their weight evenly.
    Raises: ShapeError, DomainError as the rules; DomainError for a negative tolerance, and unless most >= 1.
    Source: https://kexue.fm/archives/8896; away steps: Guelat & Marcotte 1986, arXiv:1511.05932.
    Differs: without away steps, u zigzags between gradients and the gap falls as 1 / iterations; with the step
        1 / (iteration + 1) in place of the exact one, too.
    """
    gram = _checked_gram("multitask.min_norm", gram)
    check.domain("multitask.min_norm", tolerance >= 0 and most >= 1, "tolerance >= 0, most >= 1",
                 tolerance=tolerance, most=most)  # fmt: skip
    weights = np.full(len(gram), 1 / len(gram))
    largest = gram.diagonal().max()
    if largest == 0:
        return weights
    gram = gram / largest
    for _ in range(most):
        meets = gram @ weights
        square = weights @ meets
        least, held = int(meets.argmin()), int(np.where(weights > 0, meets, -np.inf).argmax())
        if square - meets[least] <= max(tolerance * square, ROUNDING * len(gram)):
            break
        corner = np.zeros(len(gram))
        toward = square - meets[least] >= meets[held] - square
        if toward:
            corner[least] = 1
            direction, longest = corner - weights, 1.0
        else:
            corner[held] = 1
            direction, longest = weights - corner, weights[held] / (1 - weights[held])
        curvature = direction @ gram @ direction
        step = min(-(direction @ meets) / curvature, longest) if curvature > 0 else longest
        weights = weights + step * direction
        if not toward and step == longest:
            weights[held] = 0
        weights = np.maximum(weights, 0)
        weights /= weights.sum()
    return weights


def min_norm_of_two(gram: Array) -> Weights:
    """`min_norm` of two entries: the weight of the second is clip((G_11 - G_12) / (G_11 - 2 G_12 + G_22), 0, 1).

    C1. Equal gradients must share their weight evenly.
    Raises: ShapeError unless the matrix is (2, 2); DomainError as the rules.
    """
    gram = _checked_gram("multitask.min_norm_of_two", gram)
    check.shape("multitask.min_norm_of_two", len(gram) == 2, "gram (2, 2)", gram=gram)
    (first, inner), (_, second) = gram
    apart = first - 2 * inner + second
    share = float(np.clip((first - inner) / apart, 0, 1)) if apart > 0 else 0.5
    return np.array([1 - share, share])


def gap(gram: Array, weights: Array) -> float:
    """|u|^2 - min_t <g_t, u>: no average of the gradients has a |u|^2 that is smaller by more than this; 0 at the best.

    Raises: ShapeError, DomainError as the rules; DomainError for weights that are no average.
    """
    gram = _checked_gram("multitask.gap", gram)
    weights = check.real("multitask.gap", "weights", weights)
    check.shape("multitask.gap", weights.shape == gram.shape[:1], "weights (t,) for gram (t, t)", weights=weights,
                gram=gram)  # fmt: skip
    average = bool((weights >= 0).all()) and math.isclose(weights.sum(), 1, rel_tol=1e-9)
    check.domain("multitask.gap", average, "weights >= 0 of sum 1", weights=weights.tolist())
    meets = gram @ weights
    return float(weights @ meets - meets.min())


def norms(gram: Array) -> Weights:
    """The lengths of the gradients: the roots of the diagonal.

    Raises: ShapeError, DomainError as the rules.
    """
    return np.sqrt(_checked_gram("multitask.norms", gram).diagonal())


def cosines(gram: Array) -> Float[np.ndarray, "t t"]:
    """The cosine of the angle between two gradients; below 0 their tasks are in conflict.

    C1. A gradient of exactly 0 must be in conflict with none: its cosines are 0, with itself too.
    C2. The others must be within -1 and 1, whatever the rounding.
    Raises: ShapeError, DomainError as the rules.
    """
    gram = _checked_gram("multitask.cosines", gram)
    inverse = _inverse(norms(gram))
    scaled = gram * inverse * inverse[:, None]
    return np.clip((scaled + scaled.T) / 2, -1, 1)


def prior_loss(counts: Array) -> float:
    """The cross entropy of always answering how frequent each class is: -sum_k f_k log f_k, f = counts / sum.

    C1. A class that does not occur must add nothing.
    Raises: ShapeError unless counts are (k,); DomainError for a negative count, and where all are 0.
    """
    counts = check.real("multitask.prior_loss", "counts", counts)
    check.shape("multitask.prior_loss", counts.ndim == 1, "counts (k,)", counts=counts)
    usable = bool((counts >= 0).all()) and counts.sum() > 0
    check.domain("multitask.prior_loss", usable, "counts >= 0, not all 0", counts=counts.tolist())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / value, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def _of_tasks(operation: str, name: str, values: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    check.shape(operation, values.ndim == 1, f"{name} of shape (number of tasks,)", **{name: values})
    check.domain(operation, bool((tasks < len(values)).all()), f"tasks below {len(values)}, the number of {name}",
                 tasks=tasks.tolist())  # fmt: skip
    return values[tasks]


def _check_losses(operation: str, losses: np.ndarray) -> None:
    check.domain(operation, bool((losses >= 0).all()), "losses >= 0", losses=losses.tolist())


def _checked(operation: str, losses: Array, gram: Array, tasks: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    losses = check.real(operation, "losses", losses)
    gram = _checked_gram(operation, gram)
    tasks = check.integer(operation, "tasks", tasks)
    fits = losses.shape == tasks.shape == gram.shape[:1]
    expected = "losses (t,), gram (t, t) and tasks (t,)"
    check.shape(operation, fits, expected, losses=losses, gram=gram, tasks=tasks)
    check.domain(operation, bool((tasks >= 0).all()), "tasks >= 0", tasks=tasks.tolist())
    return losses, gram, tasks


def _checked_gram(operation: str, gram: Array) -> np.ndarray:
    gram = check.real(operation, "gram", gram)
    fits = gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
    check.shape(operation, fits, "gram (t, t), t >= 1", gram=gram)
    squares = gram.diagonal()
    check.domain(operation, bool((squares >= 0).all()), "a gram whose diagonal is >= 0", diagonal=squares.tolist())
    apart = float(abs(gram - gram.T).max())
    check.domain(operation, apart <= ASYMMETRY * squares.max(), "a symmetric gram", difference=apart)
    return gram
