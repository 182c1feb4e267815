"""Classification with alternating normalisation as graphs: uncertainty, class priors, the rounds in every form.

    Y = [C; b];   repeat:  Y <- Y^alpha;   Y <- prior * Y / column sums;   Y <- Y / row sums;   y = last row of Y

One round is two divisions and no loop. More rounds are computed in float64 whatever the inputs are: powers of powers
leave float32 soon. Values are not checked; the numbers of rows stay open, and each may be 0.
Specification: refimpl/ops/can.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import (
    Value,
    agree,
    arange,
    concat,
    constant,
    cumsum,
    full,
    function,
    log,
    maximum,
    minimum,
    op,
    pad,
    scan,
    take,
    where,
)

# Added to both denominators by the authors' code.
OFFICIAL_EPSILON = 1e-10
# Elements of the (block of uncertain rows, confident rows) value that the batched form holds at once.
BLOCK_ELEMENTS = 2**22
# Factors of a row that leave the frame of the confident rows by more than this are handed to the loop.
FRAME_LIMIT = 2.0**-100


class Adjusted(NamedTuple):
    """Corrected probabilities, and which rows were found uncertain."""

    probabilities: Value
    uncertain: Value


@function
def top_entropy(p: Value, *, top: int) -> Value:
    """Entropy of the `top` largest of p (..., k), renormalised, as a share of its maximum. The width k is fixed.

    Raises: ShapeError below two classes; DomainError for top < 2.
    """
    largest = _largest("can.top_entropy", p, "top", top)
    return _x_log_x(_shares(largest)).sum(-1) / -math.log(int(largest.shape[-1]))


@function
def top_entropy_unnormalized(p: Value, *, top: int) -> Value:
    """-sum over the min(top, k) largest of p ln p / ln k. Raises: as top_entropy."""
    largest = _largest("can.top_entropy_unnormalized", p, "top", top)
    return _x_log_x(largest).sum(-1) / -math.log(int(p.shape[-1]))


@function
def ambiguous_any(p: Value, *, threshold: float, max_top: int) -> Value:
    """Whether the top_entropy reaches the threshold for any top in 2..min(max_top, k).

    All tops come from two running sums over the sorted shares w:  u_t = (ln sum w - sum w ln w / sum w) / ln t.
    Raises: as top_entropy; DomainError for a threshold that is not finite.
    """
    name = "can.ambiguous_any"
    check.domain(name, math.isfinite(threshold), "a finite threshold", threshold=threshold)
    shares = _shares(_largest(name, p, "max_top", max_top))
    total, weighted = cumsum(shares, axis=-1)[..., 1:], cumsum(_x_log_x(shares), axis=-1)[..., 1:]
    maxima = constant(np.log(np.arange(2, int(shares.shape[-1]) + 1)), p.dtype)
    return _any((log(total) - weighted / total) / maxima >= threshold, axis=-1)


@function
def class_prior(labels: Value, *, classes: int, smoothing: float) -> Value:
    """Class frequencies of labels (n,) with pseudo-counts, in float64.

    Raises: ShapeError unless labels has one axis; DomainError for labels that are no integers, classes < 1 or a
    negative smoothing.
    """
    name = "can.class_prior"
    labels = check.integer(name, "labels", labels)
    check.shape(name, labels.ndim == 1, "labels (n,)", labels=labels)
    check.domain(name, classes >= 1, "classes >= 1", classes=classes)
    check.domain(name, 0 <= smoothing < math.inf, "smoothing >= 0", smoothing=smoothing)
    n = labels.size(0)
    counts = constant(np.zeros(classes))
    counts = op("ScatterElements", counts, labels, full([n], 1, np.float64), reduction="add")
    return (counts + smoothing) / (n.cast(np.float64) + smoothing * classes)


@function
def alternating_normalization_loop(
    confident: Value, uncertain: Value, prior: Value, *, alpha: float, iterations: int
) -> Value:
    """The definition: a Scan over the uncertain rows, each alone under the confident ones.

    Raises: ShapeError unless (n, k), (b, k), (k,); DomainError for a negative alpha or iterations.
    """
    iterations = _checked("can.alternating_normalization_loop", confident, uncertain, prior, alpha, iterations)
    return _looped(confident, uncertain, prior, alpha, iterations)


@function
def alternating_normalization(
    confident: Value, uncertain: Value, prior: Value, *, alpha: float, iterations: int
) -> Value:
    """The same without a loop over rows: closed for one round, two matrix products in each further one.

    C next to b is diag(1 / A s) A diag(s), A the rounds of C alone. Rows whose s leaves float64 against the frame A are
    computed by the loop. Raises: as the loop.
    """
    iterations = _checked("can.alternating_normalization", confident, uncertain, prior, alpha, iterations)
    if iterations == 0:
        return uncertain
    if iterations == 1:
        totals = _power(confident, alpha).sum(0)
        return _kept(_round(_power(uncertain, alpha), totals, prior), uncertain)
    return _batched(confident, uncertain, prior, alpha, iterations)


@function
def alternating_normalization_official(
    confident: Value, uncertain: Value, prior: Value, *, alpha: float, iterations: int
) -> Value:
    """The authors' variant, 1e-10 added to every column sum and every row sum. Raises: as the loop."""
    iterations = _checked("can.alternating_normalization_official", confident, uncertain, prior, alpha, iterations)

    def normalized(powered: Value, totals: Value, prior: Value) -> Value:
        y = powered / (totals + OFFICIAL_EPSILON) * prior
        return y / (y.sum(-1, keepdims=True) + OFFICIAL_EPSILON)

    if iterations == 1:
        row = _power(uncertain, alpha)
        return normalized(row, _power(confident, alpha).sum(0) + row, prior)
    return _each_row(confident, uncertain, prior, alpha, iterations, normalized)


@function
def adjust(p: Value, prior: Value, *, top: int, threshold: float, alpha: float, iterations: int) -> Adjusted:
    """p (n, k) with the uncertain rows (top_entropy >= threshold) replaced by their alternating normalisation.

    Raises: as top_entropy and the loop; DomainError for a threshold that is not finite.
    """
    name = "can.adjust"
    check.shape(name, p.ndim == 2, "p (n, k)", p=p)
    check.domain(name, math.isfinite(threshold), "a finite threshold", threshold=threshold)
    iterations = _checked(name, p, p, prior, alpha, iterations)
    uncertain = top_entropy(p, top=top) >= threshold
    if iterations == 0:
        return Adjusted(p, uncertain)
    if iterations == 1:
        # Every row is moved next to the confident ones; sizes that depend on values are not needed.
        powered, chosen = _power(p, alpha), uncertain[:, None]
        moved = _round(powered, where(chosen, 0, powered).sum(0), prior)
        return Adjusted(where(chosen, _kept(moved, p), p), uncertain)
    confident = op("Compress", p, ~uncertain, axis=0, shape=(None, p.shape[1]))
    places = _places(uncertain)
    moved = _batched(confident, take(p, places, axis=0), prior, alpha, iterations)
    return Adjusted(_placed(p, places, moved), uncertain)


def _looped(confident: Value, uncertain: Value, prior: Value, alpha: float, iterations: int) -> Value:
    def normalized(powered: Value, totals: Value, prior: Value) -> Value:
        return _rows_to_one(_ratio(powered, totals) * prior)

    return _kept(_each_row(confident, uncertain, prior, alpha, iterations, normalized), uncertain)


def _each_row(
    confident: Value, uncertain: Value, prior: Value, alpha: float, iterations: int, normalized: Callable[..., Value]
) -> Value:
    """The rounds for each uncertain row alone under the confident rows."""
    dtype = uncertain.dtype
    if iterations == 0:
        return uncertain
    confident, prior = _wide(confident, iterations), _wide(prior, iterations)

    def under(_: object, row: list[Value]) -> tuple[list[Value], list[Value]]:
        def once(stack: list[Value], _: object) -> tuple[list[Value], list[Value]]:
            powered = _power(stack[0], alpha)
            return [normalized(powered, powered.sum(0), prior)], []

        stack = concat([confident, row[0][None]], axis=0)
        return [], [scan(once, [stack], [arange(iterations)])[0][0][-1]]

    # Scan takes no sequence of length 0: one row more, which is left out of the result.
    more = full([1, uncertain.size(1)], 1, dtype)
    rows = _wide(concat([uncertain, more], axis=0), iterations)
    return scan(under, [], [rows])[1][0][:-1].cast(dtype)


def _batched(confident: Value, uncertain: Value, prior: Value, alpha: float, iterations: int) -> Value:
    """Two or more rounds, the uncertain rows in blocks."""
    dtype = uncertain.dtype
    original, confident, prior = (x.cast(np.float64) for x in (uncertain, confident, prior))
    n, (b, k) = confident.size(0), (original.size(0), original.size(1))
    block = minimum(maximum(BLOCK_ELEMENTS / maximum(n, k), 1), maximum(b, 1))
    # At least one block: Scan takes no sequence of length 0.
    blocks = maximum((b + block - 1) / block, 1)
    rows = pad(original, [0, 0], [blocks * block - b, 0], 1).reshape(blocks, block, k)

    def moved(powered: Value, column: Value, row: Value, scaled: Value, totals: Value) -> tuple[Value, Value]:
        """The rows and the factors s after a round; only ratios within s matter, its largest entry is kept at 1."""
        scale = _ratio(scaled * totals, column + row)
        return _round(row, column, prior), _ratio(scale, scale.max(-1, keepdims=True))

    def framed(powered: Value) -> Value:
        return _rows_to_one(_ratio(powered, powered.sum(0)) * prior)

    def again(states: list[Value], _: object) -> tuple[list[Value], list[Value]]:
        frame, rows, scale, beyond = states
        powered = _power(frame, alpha)
        totals, alive = powered.sum(0), powered.sum(1) > 0

        def part(_: object, of: list[Value]) -> tuple[list[Value], list[Value]]:
            reach = _power(of[1] @ frame.swap(0, 1), alpha)
            near = reach >= FRAME_LIMIT
            scaled = _power(of[1], alpha)
            column = scaled * ((near.cast(np.float64) / where(near, reach, 1)) @ powered)
            after = moved(powered, column, _power(of[0], alpha), scaled, totals)
            return [], [*after, of[2] | _any(~near & alive, axis=1)]

        return [framed(powered), *scan(part, [], [rows, scale, beyond])[1]], []

    # In the first round s is 1 and the column sums are shared.
    powered = _power(confident, alpha)
    totals = powered.sum(0)
    rows, scale = moved(powered, totals, _power(rows, alpha), constant(1.0), totals)
    states = [framed(powered), rows, scale, full([blocks, block], False, np.bool_)]
    _, rows, _, beyond = scan(again, states, [arange(iterations - 1)])[0]
    rows = _kept(rows.reshape(-1, k)[:b], original)
    places = _places(beyond.reshape(-1)[:b])
    lost = _looped(confident, take(original, places, axis=0), prior, alpha, iterations)
    return _placed(rows, places, lost).cast(dtype)


def _round(row: Value, column: Value, prior: Value) -> Value:
    """A row to the power alpha, next to the column sums of the others."""
    return _rows_to_one(_ratio(row, column + row) * prior)


def _largest(name: str, p: Value, which: str, top: int) -> Value:
    """The `top` largest of every row, or all of them, in descending order."""
    check.shape(name, check.real(name, "p", p).ndim >= 1 and int(p.shape[-1]) >= 2, "p (..., k) with k >= 2", p=p)
    whole = isinstance(top, (int, np.integer)) and not isinstance(top, bool)
    check.domain(name, whole and top >= 2, f"{which} an integer >= 2", **{which: top})
    top = min(int(top), int(p.shape[-1]))
    shape = (*p.shape[:-1], top)
    return op("TopK", p, constant([top], np.int64), outputs=2, dtype=[p.dtype, np.int64], shape=[shape, shape])[0]


def _shares(largest: Value) -> Value:
    """Of their sum; a row of zeros counts as equal ones."""
    total = largest.sum(-1, keepdims=True)
    empty = total == 0
    return where(empty, 1 / int(largest.shape[-1]), largest / where(empty, 1, total))


def _x_log_x(x: Value) -> Value:
    return x * log(where(x == 0, 1, x))


def _checked(name: str, confident: Value, uncertain: Value, prior: Value, alpha: float, iterations: int) -> int:
    for label, value in (("confident", confident), ("uncertain", uncertain), ("prior", prior)):
        check.real(name, label, value)
    fits = confident.ndim == uncertain.ndim == 2 and prior.ndim == 1
    fits = fits and agree(confident.shape[1], uncertain.shape[1], prior.shape[0])
    expected = "confident (n, k), uncertain (b, k), prior (k,)"
    check.shape(name, fits, expected, confident=confident, uncertain=uncertain, prior=prior)
    check.domain(name, 0 <= alpha < math.inf, "alpha >= 0", alpha=alpha)
    whole = isinstance(iterations, (int, np.integer)) and not isinstance(iterations, bool)
    check.domain(name, whole and iterations >= 0, "iterations an integer >= 0", iterations=iterations)
    return int(iterations)


def _wide(x: Value, iterations: int) -> Value:
    return x.cast(np.float64) if iterations > 1 else x


def _power(x: Value, alpha: float) -> Value:
    return x if alpha == 1 else x**alpha


def _ratio(numerator: Value, denominator: Value) -> Value:
    """0 where the denominator is 0."""
    zero = denominator == 0
    return where(zero, 0, numerator) / where(zero, 1, denominator)


def _rows_to_one(x: Value) -> Value:
    return _ratio(x, x.sum(-1, keepdims=True))


def _kept(rows: Value, original: Value) -> Value:
    return where(rows.sum(-1, keepdims=True) == 0, original, rows)


def _any(x: Value, *, axis: int) -> Value:
    return x.cast(np.int32).sum(axis) > 0


def _places(chosen: Value) -> Value:
    """Where a boolean vector is True."""
    return op("NonZero", chosen, dtype=np.int64, shape=(1, None))[0]


def _placed(x: Value, places: Value, rows: Value) -> Value:
    """x with the rows at these places replaced."""
    return op("ScatterND", x, places[:, None], rows)
