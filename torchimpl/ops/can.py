"""Classification with alternating normalisation: uncertain predictions are re-normalised next to the confident ones.

    Y = [C; b];   repeat:  Y <- Y^alpha;   Y <- prior * Y / column sums;   Y <- Y / row sums;   y = last row of Y

Specification: refimpl/ops/can.py. Everything is formed in float32 for 16-bit input, the batched form in float64 for
every input (float32 on devices without it), and rounded once. Where the maths has 0/0, values and gradients are 0.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchimpl import check

OFFICIAL_EPSILON = 1e-10
# Elements of the largest temporary array: 2^22 float64 are 32 MiB.
BLOCK_ELEMENTS = 2**22
# What float64 holds; float32 has an eighth of its exponents.
FRAME_LIMIT = 2.0**-100
_FRAME_LIMIT_FLOAT32 = FRAME_LIMIT ** (1 / 8)


class Adjusted(NamedTuple):
    """Corrected probabilities, and which rows were found uncertain."""

    probabilities: Float[Tensor, "n k"]
    uncertain: Bool[Tensor, "n"]


def top_entropy(p: Float[Tensor, "*n k"], *, top: int) -> Float[Tensor, "*n"]:
    """Entropy of the `top` largest probabilities, renormalised among themselves, as a share of its maximum.

    The gradient of a zero, infinite in the limit, is given as 0.
    Raises: ShapeError below two classes; DomainError for top < 2.
    """
    _check_probabilities("can.top_entropy", "p", p)
    _check_top("can.top_entropy", "top", top)
    return _top_entropy(check.island(p), top).to(p.dtype)


def top_entropy_unnormalized(p: Float[Tensor, "*n k"], *, top: int) -> Float[Tensor, "*n"]:
    """The paper's measure: the `top` largest probabilities as they are, against the entropy of all k classes.

    Raises: ShapeError below two classes; DomainError for top < 2.
    """
    _check_probabilities("can.top_entropy_unnormalized", "p", p)
    _check_top("can.top_entropy_unnormalized", "top", top)
    largest = _largest(check.island(p), top)
    return (-_x_log_x(largest).sum(dim=-1) / math.log(p.shape[-1])).to(p.dtype)


def ambiguous_any(p: Float[Tensor, "*n k"], *, threshold: float, max_top: int) -> Bool[Tensor, "*n"]:
    """The authors' rule: a row is uncertain when its `top_entropy` reaches the threshold for any top in 2..max_top.

    Raises: as `top_entropy`; DomainError for a threshold that is not finite.
    """
    _check_probabilities("can.ambiguous_any", "p", p)
    _check_threshold("can.ambiguous_any", threshold)
    _check_top("can.ambiguous_any", "max_top", max_top)
    ordered = _largest(check.island(p), max_top)
    tops = range(2, ordered.shape[-1] + 1)
    return torch.stack([_top_entropy(ordered, top) >= threshold for top in tops]).any(dim=0)


def class_prior(labels: Int[Tensor, "*n"], *, classes: int, smoothing: float) -> Float[Tensor, "k"]:
    """Class frequencies of the training labels, with `smoothing` pseudo-counts per class, in float64.

    On devices without float64 in float32. Labels outside 0..classes-1 are an error of torch's own.
    Raises: ShapeError unless labels are (n,); DomainError for negative smoothing or nothing to count (0/0).
    """
    op = "can.class_prior"
    labels = check.integer(op, "labels", labels)
    check.shape(op, labels.ndim == 1, "labels (n,)", labels=labels)
    check.domain(op, classes >= 1, "classes >= 1", classes=classes)
    check.domain(op, 0 <= smoothing < math.inf, "smoothing >= 0", smoothing=smoothing)
    n = labels.shape[0]
    check.domain(op, n + smoothing > 0, "a label or smoothing > 0", n=n, smoothing=smoothing)
    # bincount would wait for the device to learn the largest label.
    counts = labels.new_zeros(classes).scatter_add(0, labels, torch.ones_like(labels))
    return (counts.to(_widest(labels)) + smoothing) / (n + smoothing * classes)


def alternating_normalization_loop(
    confident: Float[Tensor, "*n _k"],
    uncertain: Float[Tensor, "*b k"],
    prior: Float[Tensor, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[Tensor, "*b k"]:
    """Each uncertain row, alone under the confident rows, after `iterations` rounds: the definition.

    The loop runs over blocks of rows that hold a copy of the confident rows each, BLOCK_ELEMENTS in all.
    Raises: ShapeError unless (n, k), (b, k), (k,); DomainError for alpha < 0, iterations < 0.
    """
    _check_stacked("can.alternating_normalization_loop", confident, uncertain, prior, alpha, iterations)
    rows, every = check.island(uncertain), _all(confident)
    blocks = rows.split(_rows_per_block(confident))
    return torch.cat([_defined(confident, every, block, prior, alpha, iterations) for block in blocks]).to(
        uncertain.dtype
    )


def alternating_normalization(
    confident: Float[Tensor, "*n _k"],
    uncertain: Float[Tensor, "*b k"],
    prior: Float[Tensor, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[Tensor, "*b k"]:
    """`alternating_normalization_loop`, all uncertain rows at once: two matrix products per round, none in the first.

    Rows that leave the range of the format, which takes several rounds over very sharp rows, are computed by the
    definition, without waiting for the device to count them: as many as fill BLOCK_ELEMENTS; further ones are NaN.
    Raises: as the loop.
    """
    _check_stacked("can.alternating_normalization", confident, uncertain, prior, alpha, iterations)
    rows, beyond = _framed(confident, _all(confident), uncertain, prior, alpha, iterations)
    return _repaired(rows, beyond, confident, _all(confident), uncertain, prior, alpha, iterations)


def alternating_normalization_official(
    confident: Float[Tensor, "*n _k"],
    uncertain: Float[Tensor, "*b k"],
    prior: Float[Tensor, "*_"],
    *,
    alpha: float,
    iterations: int,
) -> Float[Tensor, "*b k"]:
    """The authors' variant: 1e-10 is added to every column sum and every row sum.

    Raises: as the loop.
    """
    _check_stacked("can.alternating_normalization_official", confident, uncertain, prior, alpha, iterations)
    frame, weights = check.island(confident), check.island(prior)
    results = []
    for block in check.island(uncertain).split(_rows_per_block(confident)):
        stack = _stack(frame, block)
        for _ in range(iterations):
            powered = _power(stack, alpha)
            stack = powered / (powered.sum(dim=1, keepdim=True) + OFFICIAL_EPSILON) * weights
            stack = stack / (stack.sum(dim=2, keepdim=True) + OFFICIAL_EPSILON)
        results.append(stack[:, -1])
    return torch.cat(results).to(uncertain.dtype)


def adjust(
    p: Float[Tensor, "*n k"],
    prior: Float[Tensor, "*_"],
    *,
    top: int,
    threshold: float,
    alpha: float,
    iterations: int,
) -> Adjusted:
    """Predictions with the uncertain rows (top_entropy >= threshold) replaced by their alternating normalisation.

    How many rows are uncertain is not asked: every row is normalised under the confident ones, and the uncertain
    results are taken.
    Raises: as `top_entropy` and `alternating_normalization`; DomainError for a threshold that is not finite.
    """
    op = "can.adjust"
    _check_probabilities(op, "p", p)
    check.shape(op, p.ndim == 2, "p (n, k)", p=p)
    _check_top(op, "top", top)
    _check_threshold(op, threshold)
    _check_stacked(op, p, p, prior, alpha, iterations)
    uncertain = _top_entropy(check.island(p), top) >= threshold
    confident = ~uncertain[:, None]
    rows, beyond = _framed(p, confident, p, prior, alpha, iterations)
    rows = _repaired(rows, beyond & uncertain, p, confident, p, prior, alpha, iterations)
    return Adjusted(torch.where(uncertain[:, None], rows, p), uncertain)


def _framed(
    confident: Tensor, counted: Tensor, uncertain: Tensor, prior: Tensor, alpha: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The batched form under the rows of `confident` that are `counted` (n, 1), and which results are beyond it.

    The frame is C alone. Next to b, C is diag(1 / A s) A diag(s) with A the frame and one s per b.
    """
    wide = _widest(confident)
    limit = FRAME_LIMIT if wide == torch.float64 else _FRAME_LIMIT_FLOAT32
    frame, prior, original = confident.to(wide), prior.to(wide), uncertain.to(wide)
    size = max(1, BLOCK_ELEMENTS // max(confident.shape[0], confident.shape[1]))
    states = [(rows, torch.ones_like(rows), rows.new_zeros(rows.shape[0]).bool()) for rows in original.split(size)]
    for step in range(iterations):
        powered = _power(frame, alpha) * counted
        totals, alive = powered.sum(dim=0), powered.sum(dim=1) > 0
        following = []
        for rows, scale, beyond in states:
            scaled, row = _power(scale, alpha), _power(rows, alpha)
            column = totals
            if step > 0:
                reach = _power(scale @ frame.T, alpha)
                near = reach >= limit
                beyond = beyond | (~near & alive).any(dim=1)
                column = scaled * (reach.masked_fill(~near, 1).reciprocal().masked_fill(~near, 0) @ powered)
            rows = _rows_to_one(_ratio(row, column + row) * prior)
            scale = _ratio(scaled * totals, column + row)
            # Only ratios within a row of s matter: its largest entry is kept at 1, and has no say in the gradient.
            largest = scale.detach().amax(dim=1, keepdim=True)
            following.append((rows, _ratio(scale, largest), beyond))
        states = following
        frame = _rows_to_one(_ratio(powered, totals) * prior)
    rows = torch.cat([rows for rows, _, _ in states])
    return _kept(rows, original), torch.cat([beyond for _, _, beyond in states])


def _repaired(
    rows: Tensor,
    beyond: Tensor,
    confident: Tensor,
    counted: Tensor,
    uncertain: Tensor,
    prior: Tensor,
    alpha: float,
    iterations: int,
) -> Tensor:
    """`rows` in the format of `uncertain`, those `beyond` the batched form by the definition, in one block of rows."""
    if iterations > 1:
        most = min(uncertain.shape[0], _rows_per_block(confident))
        index = beyond.int().topk(most).indices
        defined = _defined(confident, counted, uncertain.to(rows.dtype)[index], prior, alpha, iterations)
        within = torch.where(beyond[index, None], defined, rows[index])
        left = beyond.index_fill(0, index, False)
        rows = rows.masked_fill(left[:, None], math.nan).index_copy(0, index, within)
    return rows.to(uncertain.dtype)


def _defined(
    confident: Tensor, counted: Tensor, uncertain: Tensor, prior: Tensor, alpha: float, iterations: int
) -> Tensor:
    """The definition for a block of rows, in the format of `uncertain`; each has a copy of the confident rows."""
    prior, stack = prior.to(uncertain.dtype), _stack(confident.to(uncertain.dtype), uncertain)
    # A row of zeros is not nothing: 0^0 counts. The uncertain row always does.
    taking_part = torch.cat([counted, counted.new_ones(1, 1)])
    for _ in range(iterations):
        powered = _power(stack, alpha) * taking_part
        shares = _ratio(powered, powered.sum(dim=1, keepdim=True))
        stack = _rows_to_one(shares * prior)
    return _kept(stack[:, -1], uncertain)


def _top_entropy(p: Tensor, top: int) -> Tensor:
    largest = _largest(p, top)
    total = largest.sum(dim=-1, keepdim=True)
    # A row of zeros counts as equal shares.
    empty = total == 0
    shares = torch.where(empty, 1 / largest.shape[-1], largest / total.masked_fill(empty, 1))
    return -_x_log_x(shares).sum(dim=-1) / math.log(largest.shape[-1])


def _largest(p: Tensor, top: int) -> Tensor:
    return p.topk(min(top, p.shape[-1]), dim=-1).values


def _stack(confident: Tensor, uncertain: Tensor) -> Tensor:
    """[C; b] for every row b: (b, n + 1, k)."""
    copies = confident.expand(uncertain.shape[0], *confident.shape)
    return torch.cat([copies, uncertain[:, None]], dim=1)


def _rows_per_block(confident: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // ((confident.shape[0] + 1) * confident.shape[1]))


def _all(confident: Tensor) -> Tensor:
    return torch.ones(confident.shape[0], 1, dtype=torch.bool, device=confident.device)


def _widest(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _power(x: Tensor, alpha: float) -> Tensor:
    """x^alpha with 0^0 = 1, its gradient at 0 given as 0."""
    if alpha == 0:
        return torch.ones_like(x)
    zero = x == 0
    return (x.masked_fill(zero, 1) ** alpha).masked_fill(zero, 0)


def _x_log_x(x: Tensor) -> Tensor:
    return x * x.masked_fill(x == 0, 1).log()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def _rows_to_one(x: Tensor) -> Tensor:
    return _ratio(x, x.sum(dim=-1, keepdim=True))


def _kept(rows: Tensor, original: Tensor) -> Tensor:
    """The original of every row without mass."""
    return torch.where(rows.sum(dim=-1, keepdim=True) == 0, original, rows)


def _check_probabilities(op: str, name: str, p: Tensor) -> None:
    check.real(op, name, p)
    check.shape(op, p.ndim >= 1 and p.shape[-1] >= 2, f"{name} (..., k) with k >= 2", **{name: p})


def _check_top(op: str, name: str, top: int) -> None:
    check.domain(op, isinstance(top, int) and top >= 2, f"an integer {name} >= 2", **{name: top})


def _check_threshold(op: str, threshold: float) -> None:
    check.domain(op, -math.inf < threshold < math.inf, "a finite threshold", threshold=threshold)


def _check_stacked(op: str, confident: Tensor, uncertain: Tensor, prior: Tensor, alpha: float, iterations: int) -> None:
    for name, p in (("confident", confident), ("uncertain", uncertain), ("prior", prior)):
        _check_probabilities(op, name, p)
    fits = confident.ndim == uncertain.ndim == 2 and prior.ndim == 1
    fits = fits and confident.shape[1] == uncertain.shape[1] == prior.shape[0]
    expected = "confident (n, k), uncertain (b, k), prior (k,)"
    check.shape(op, fits, expected, confident=confident, uncertain=uncertain, prior=prior)
    check.domain(op, 0 <= alpha < math.inf, "alpha >= 0", alpha=alpha)
    whole = isinstance(iterations, int) and iterations >= 0
    check.domain(op, whole, "an integer iterations >= 0", iterations=iterations)
