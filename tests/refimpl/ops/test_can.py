"""Classification with alternating normalisation, against hand-made figures, the authors' code and a literal loop."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import can
from tests.golden import collection

GOLDEN = Path(__file__).parents[2] / "golden" / "can"
LN = np.log


def golden(pattern):
    names = sorted(path.stem for path in GOLDEN.glob(f"{pattern}.npz"))
    assert names, f"no {pattern}.npz in {GOLDEN}"
    return pytest.mark.parametrize("name", names)


def both(confident, uncertain, prior, *, alpha=1.0, iterations=1):
    """The result of the batched form, after the loop has been seen to agree with it."""
    arguments = [np.asarray(v, np.float64) for v in (confident, uncertain, prior)]
    loop = can.alternating_normalization_loop(*arguments, alpha=alpha, iterations=iterations)
    batch = can.alternating_normalization(*arguments, alpha=alpha, iterations=iterations)
    np.testing.assert_allclose(batch, loop, rtol=1e-12, atol=1e-14)
    return batch


def distribution(rng, rows, classes, sharpness=1.0):
    return rng.dirichlet(np.full(classes, sharpness), rows)


# Uncertainty.
def test_top_entropy_renormalises_and_divides_by_ln_top():
    p = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    expected = [1.0, 1.5 * LN(2) / LN(3), LN(2) / LN(3), 0.0]
    np.testing.assert_allclose(can.top_entropy(p, top=3), expected, atol=1e-15)
    np.testing.assert_allclose(can.top_entropy(p, top=2), [1, (LN(3) - 2 / 3 * LN(2)) / LN(2), 1, 0], atol=1e-15)


def test_top_entropy_clamps_top_to_the_number_of_classes():
    p = np.array([[0.5, 0.5], [0.75, 0.25]])
    np.testing.assert_allclose(can.top_entropy(p, top=3), [1.0, (2 * LN(2) - 0.75 * LN(3)) / LN(2)], atol=1e-15)


def test_three_way_tie_of_119_classes():
    p = np.zeros((1, 119))
    p[0, [3, 50, 100]] = 1 / 3
    assert can.top_entropy(p, top=3)[0] == pytest.approx(1.0, abs=1e-15)
    assert can.top_entropy_unnormalized(p, top=3)[0] == pytest.approx(LN(3) / LN(119), abs=1e-15)
    # Not renormalised: the tail that was left out lowers it.
    q = np.full((1, 4), 0.25)
    assert can.top_entropy_unnormalized(q, top=2)[0] == pytest.approx(0.5, abs=1e-15)
    assert can.top_entropy_unnormalized(q, top=9)[0] == pytest.approx(1.0, abs=1e-15)


def test_top_entropy_of_a_row_of_zeros_is_one_and_any_leading_axes_are_kept():
    assert can.top_entropy(np.zeros((2, 3, 5)), top=3) == pytest.approx(np.ones((2, 3)))
    assert can.top_entropy(np.zeros((0, 5)), top=3).shape == (0,)


def test_ambiguous_any_includes_its_upper_end():
    # Two equal leaders: certain to be uncertain at top 2 (u = 1); three of unequal size below 0.99.
    p = np.array([[0.45, 0.45, 0.1, 0.0], [0.9, 0.05, 0.05, 0.0], [0.4, 0.2, 0.2, 0.2]])
    np.testing.assert_array_equal(can.ambiguous_any(p, threshold=0.99, max_top=2), [True, False, False])
    u3, u4 = can.top_entropy(p, top=3)[2], can.top_entropy(p, top=4)[2]
    assert u3 < 0.95 < u4
    np.testing.assert_array_equal(can.ambiguous_any(p, threshold=0.95, max_top=3)[2], False)
    np.testing.assert_array_equal(can.ambiguous_any(p, threshold=0.95, max_top=4)[2], True)
    np.testing.assert_array_equal(can.ambiguous_any(p, threshold=0.95, max_top=99)[2], True)


@golden("split_*")
def test_ambiguous_any_reproduces_the_authors_split(name):
    data = collection.load("can", name)
    p, max_k, threshold = data["probs"], int(data["max_k"]), float(data["threshold"])
    # Their upper end is excluded; None means all classes.
    found = can.ambiguous_any(p, threshold=threshold, max_top=p.shape[1] if max_k < 0 else max_k - 1)
    np.testing.assert_array_equal(np.flatnonzero(found), data["ambiguous_ids"])
    np.testing.assert_array_equal(np.flatnonzero(~found), data["confident_ids"])
    for column in range(data["topk_entropy"].shape[1]):
        # They write 1e-16 for a zero.
        np.testing.assert_allclose(can.top_entropy(p, top=column + 2), data["topk_entropy"][:, column], atol=1e-13)
    # Their other rule, the entropy of all classes: nothing is left out, so that renormalising says nothing.
    for entropy in (can.top_entropy, can.top_entropy_unnormalized):
        whole = entropy(p, top=p.shape[1])
        np.testing.assert_allclose(whole, data["entropy"], rtol=0, atol=1e-13)
        np.testing.assert_array_equal(np.flatnonzero(whole >= threshold), data["full_entropy_ambiguous_ids"])
        np.testing.assert_array_equal(np.flatnonzero(whole < threshold), data["full_entropy_confident_ids"])
    np.testing.assert_array_equal(p.argmax(axis=1), data["argmax"])
    assert not data.left


@golden("blog_*")
def test_adjust_reproduces_the_article(name):
    data = collection.load("can", name)
    p, top = data["probs"], int(data["k"])
    np.testing.assert_allclose(can.top_entropy(p, top=top), data["uncertainty"], atol=1e-13)
    adjusted, uncertain = can.adjust(
        p,
        data["prior"],
        top=top,
        threshold=float(data["threshold"]),
        alpha=float(data["alpha"]),
        iterations=int(data["iters"]),
    )
    np.testing.assert_array_equal(uncertain, data["ambiguous"])
    np.testing.assert_allclose(adjusted, data["adjusted"], rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(adjusted[~uncertain], p[~uncertain])
    np.testing.assert_array_equal(p.argmax(axis=1), data["argmax_before"])
    np.testing.assert_array_equal(adjusted.argmax(axis=1), data["argmax_after"])
    assert not data.left


def prior_of(data):
    classes = data["X_ambiguous"].shape[1]
    return data["prior"] if "prior" in data else np.full(classes, 1 / classes)


@golden("rsa_*")
def test_official_variant_reproduces_the_authors_code(name):
    data = collection.load("can", name)
    uncertain, prior, alpha = data["X_ambiguous"], prior_of(data), float(data["alpha"])
    for depth in range(int(data["depth"]) + 1):
        y = can.alternating_normalization_official(data["X_confident"], uncertain, prior, alpha=alpha, iterations=depth)
        np.testing.assert_allclose(y.T, data[f"V{depth}"], rtol=1e-13, atol=1e-15)
        z = both(data["X_confident"], uncertain, prior, alpha=alpha, iterations=depth)
        np.testing.assert_allclose(z, y, atol=1e-6)
        # The epsilon is seen: it is not the loop under another name.
        assert depth == 0 or abs(z - y).max() > 1e-12


@golden("rsa_*")
def test_halves_of_the_authors_round(name):
    """Their creator (columns) and viewer (rows), which our operator does one after the other, alone and in a chain."""
    data = collection.load("can", name)
    prior, alpha = prior_of(data), float(data["alpha"])
    stack = np.concatenate([data["X_confident"], data["X_ambiguous"][:1]])

    def creator(rows):
        return rows**alpha / ((rows**alpha).sum(axis=0) + can.OFFICIAL_EPSILON)

    def viewer(rows):
        return rows * prior / ((rows * prior).sum(axis=1, keepdims=True) + can.OFFICIAL_EPSILON)

    def whole(rows):
        """Every row by the operator, under all the others."""
        others = [np.delete(rows, i, axis=0) for i in range(len(rows))]
        return np.concatenate([
            can.alternating_normalization_official(rest, row[None], prior, alpha=alpha, iterations=1)
            for rest, row in zip(others, rows, strict=True)
        ])  # fmt: skip

    def close(rows, array):
        np.testing.assert_allclose(rows.T, data[array], rtol=1e-12, atol=1e-15)

    close(stack, "one_lexicon")
    close(creator(stack), "one_creator1")
    close(viewer(data["one_creator1"].T), "one_viewer1")
    close(whole(stack), "one_viewer1")
    rows, depth = stack, int(data["depth"])
    for step in range(2 * depth + 1):
        # It begins with the viewer: a round of ours lies between two arrays that it made.
        close(rows[-1:], f"creatorchain_C{step}")
        last = rows
        rows = creator(rows) if step % 2 else viewer(rows)
        if step % 2:
            np.testing.assert_allclose(viewer(rows), whole(last), rtol=1e-12, atol=1e-15)
    if "costs" in data:
        # A cost stands in the exponent beside the logarithm: it multiplies its row, in every round.
        weight, rows = np.exp(data["costs"])[:, None], stack
        for step in range(depth + 1):
            close(rows[-1:], f"costs_V{step}")
            rows = whole(rows * weight)
    assert not {name for name in data.left if not name.startswith("V")}


def test_every_file_of_can_is_reproduced_and_the_copies_are_copies():
    assert collection.collected("can") == {path.stem for path in GOLDEN.glob("*.npz")}
    assert not collection.differing_copies("can")


# The prior.
def test_class_prior_counts_and_smooths():
    labels = np.array([0, 2, 2, 2])
    np.testing.assert_array_equal(can.class_prior(labels, classes=4, smoothing=0.0), [0.25, 0, 0.75, 0])
    np.testing.assert_allclose(can.class_prior(labels, classes=4, smoothing=1.0), np.array([2, 1, 4, 1]) / 8)
    np.testing.assert_allclose(can.class_prior(labels[:0], classes=5, smoothing=0.5), np.full(5, 0.2))


# C = [[3/4, 1/4]], b = [1/2, 1/2], q = [1/4, 3/4]: columns 5/4 and 3/4, so b -> [1/10, 1/2] -> [1, 5]/6.
def test_one_round_by_hand():
    y = both([[0.75, 0.25]], [[0.5, 0.5]], [0.25, 0.75])
    np.testing.assert_allclose(y, [[1 / 6, 5 / 6]], rtol=1e-15)


def test_two_rounds_by_hand():
    # After one round C = [3/20, 1/4] -> [3, 5]/8, b = [1, 5]/6: columns 13/24, 35/24.
    b = np.array([1 / 6 / (13 / 24) * 0.25, 5 / 6 / (35 / 24) * 0.75])
    y = both([[0.75, 0.25]], [[0.5, 0.5]], [0.25, 0.75], iterations=2)
    np.testing.assert_allclose(y, [b / b.sum()], rtol=1e-14)


def test_alpha_is_applied_before_the_columns():
    # Squares: C = [9, 1]/16, b = [4, 4]/16, columns 13/16 and 5/16: b -> [4/13, 4/5].
    y = both([[0.75, 0.25]], [[0.5, 0.5]], [1.0, 1.0], alpha=2.0)
    np.testing.assert_allclose(y, [[5 / 18, 13 / 18]], rtol=1e-15)


def test_a_class_without_confident_rows_takes_whatever_b_has():
    # c_j = 0: the ratio is 1 however small b_j is. b = (1/2, 1/2, 1e-12, 0): (1, 1, 5)/7 for C = (2, 2, 0, 0).
    confident = np.array([[0.5, 0.5, 0, 0]] * 4)
    y = both(confident, [[0.5, 0.5, 1e-12, 0]], np.full(4, 0.25))
    np.testing.assert_allclose(y, [[1 / 7, 1 / 7, 5 / 7, 0]], rtol=1e-14)


def test_degenerate_inputs():
    rng = np.random.default_rng(5)
    confident, b, q = distribution(rng, 7, 5), distribution(rng, 3, 5), distribution(rng, 1, 5)[0]
    # No rounds, no uncertain rows.
    np.testing.assert_array_equal(both(confident, b, q, iterations=0), b)
    assert both(confident, b[:0], q, iterations=3).shape == (0, 5)
    # No confident rows: the prior on the support of b, for any alpha and any number of rounds.
    some = b * [[1, 0, 1, 1, 0]]
    support = np.array([q[0], 0, q[2], q[3], 0])
    for alpha in (0.5, 1.0, 3.0):
        for iterations in (1, 4):
            y = both(confident[:0], some, q, alpha=alpha, iterations=iterations)
            np.testing.assert_allclose(y, np.tile(support / support.sum(), (3, 1)), rtol=1e-14)
    # alpha = 0: the prior, zeros of b included (0^0 = 1).
    np.testing.assert_allclose(both(confident, some, q, alpha=0.0, iterations=2), np.tile(q, (3, 1)), rtol=1e-14)
    # A class that the prior excludes, and a row that has nothing else.
    excluded = q * [1, 1, 0, 1, 1]
    rows = np.array([b[0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    y = both(confident, rows, excluded, iterations=3)
    assert y[0, 2] == 0 and y[0].sum() == pytest.approx(1, abs=1e-15)
    np.testing.assert_array_equal(y[1:], rows[1:])
    # A confident row whose only class the prior excludes counts for nothing.
    more = np.concatenate([confident, [[0, 0, 1.0, 0, 0]]])
    np.testing.assert_allclose(both(more, b, excluded, iterations=3), both(confident, b, excluded, iterations=3))


def test_integers_are_cast():
    y = can.alternating_normalization(np.array([[3, 1]]), np.array([[1, 1]]), np.array([1, 3]), alpha=1.0, iterations=1)
    # Columns 4 and 2: [1/4, 1/2] times [1, 3].
    np.testing.assert_allclose(y, [[1 / 7, 6 / 7]], rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sharpness", [0.02, 0.3])
def test_batched_form_equals_the_loop_at_119_classes(alpha, sharpness):
    rng = np.random.default_rng(int(100 * alpha))
    confident = distribution(rng, 211, 119, sharpness)
    confident[confident < 1e-9] = 0
    b, q = distribution(rng, 3, 119), distribution(rng, 1, 119, 2.0)[0]
    for iterations in range(1, 9):
        loop = can.alternating_normalization_loop(confident, b, q, alpha=alpha, iterations=iterations)
        batch = can.alternating_normalization(confident, b, q, alpha=alpha, iterations=iterations)
        assert abs(loop - batch).max() < 1e-12


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0, 2.0, 4.0]), st.integers(0, 8))
def test_batched_form_equals_the_loop_with_zeros_anywhere(seed, alpha, iterations):
    rng = np.random.default_rng(seed)
    n, b, k = rng.integers(0, 6), rng.integers(0, 4), rng.integers(2, 6)
    confident = rng.random((n, k)) ** rng.integers(1, 20) * (rng.random((n, k)) < 0.7)
    uncertain = rng.random((b, k)) ** rng.integers(1, 20) * (rng.random((b, k)) < 0.7)
    prior = rng.random(k) * (rng.random(k) < 0.8)
    prior[0] += prior.sum() == 0
    both(confident, uncertain, prior, alpha=alpha, iterations=iterations)


def test_rows_beyond_the_frame_go_to_the_loop(monkeypatch):
    # Ties that b breaks: 2^8 doublings take the factors of the confident rows out of the range of float64.
    confident = np.array([[0.5, 0.5], [0.5, 0.5], [0.02, 0.98]])
    uncertain = np.array([[0.999, 0.001], [0.5, 0.5]])
    seen = []
    loop = can.alternating_normalization_loop
    monkeypatch.setattr(
        can, "alternating_normalization_loop", lambda c, u, p, **kw: seen.append(len(u)) or loop(c, u, p, **kw)
    )
    y = can.alternating_normalization(confident, uncertain, np.array([0.5, 0.5]), alpha=4.0, iterations=8)
    assert seen and sum(seen) >= 1
    np.testing.assert_allclose(
        y, loop(confident, uncertain, np.array([0.5, 0.5]), alpha=4.0, iterations=8), rtol=1e-12, atol=1e-300
    )


def test_ordinary_rows_never_go_to_the_loop(monkeypatch):
    monkeypatch.setattr(can, "alternating_normalization_loop", None)
    rng = np.random.default_rng(7)
    confident, b, q = distribution(rng, 23, 5, 0.3), distribution(rng, 3, 5), distribution(rng, 1, 5)[0]
    # One row of it has nothing but the class that the prior excludes.
    confident[0], q[4] = [0, 0, 0, 0, 1], 0
    for alpha, iterations in ((0.5, 8), (1.0, 8), (2.0, 3)):
        can.alternating_normalization(confident, b, q, alpha=alpha, iterations=iterations)
    # A single confident row: its share of every column halves each round, a common factor that is taken out.
    even = np.array([[0.5, 0.5]])
    y = can.alternating_normalization(even, even, np.array([0.5, 0.5]), alpha=2.0, iterations=8)
    np.testing.assert_allclose(y, even, rtol=1e-12)


def test_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(8)
    confident, b, q = distribution(rng, 13, 7), distribution(rng, 11, 7), distribution(rng, 1, 7)[0]
    whole = can.alternating_normalization(confident, b, q, alpha=0.5, iterations=4)
    monkeypatch.setattr(can, "BLOCK_ELEMENTS", 2 * 13)
    parts = can.alternating_normalization(confident, b, q, alpha=0.5, iterations=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-14)


# Invariants.
def test_rows_and_classes_permute_and_rows_do_not_see_each_other():
    rng = np.random.default_rng(9)
    confident, b, q = distribution(rng, 11, 5), distribution(rng, 4, 5), distribution(rng, 1, 5)[0]
    y = both(confident, b, q, alpha=2.0, iterations=3)
    order = rng.permutation(5)
    np.testing.assert_allclose(
        both(confident[::-1, order], b[:, order], q[order], alpha=2.0, iterations=3), y[:, order], rtol=1e-12
    )
    np.testing.assert_allclose(both(confident, b[1:2], q, alpha=2.0, iterations=3), y[1:2], rtol=1e-13)
    np.testing.assert_allclose(both(confident, b, 17 * q, alpha=2.0, iterations=3), y, rtol=1e-13)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-14)


def test_fixed_point_and_large_set_limit():
    rng = np.random.default_rng(10)
    confident, b, q = distribution(rng, 11, 5), distribution(rng, 1, 5), distribution(rng, 1, 5)[0]
    # b is unchanged where c + b is proportional to the prior.
    np.testing.assert_allclose(both(confident, b, confident.sum(0) + b[0]), b, rtol=1e-14)
    # Many confident rows: a correction by the ratio of priors.
    many = np.tile(confident, (2000, 1))
    ratio = b * q / confident.mean(axis=0)
    np.testing.assert_allclose(both(many, b, q), ratio / ratio.sum(), rtol=1e-3)


def test_many_rounds_are_sinkhorn():
    # alpha = 1: column means tend to the prior, row by row of b.
    rng = np.random.default_rng(11)
    confident, b, q = distribution(rng, 6, 3, 5.0), distribution(rng, 1, 3), np.array([0.2, 0.3, 0.5])
    y = both(confident, b, q, iterations=200)
    stack = np.concatenate([confident, b])
    for _ in range(500):
        stack = stack * (q * 7 / stack.sum(0))
        stack = stack / stack.sum(1, keepdims=True)
    np.testing.assert_allclose(stack.mean(0), q, rtol=1e-9)
    np.testing.assert_allclose(y[0], stack[-1], rtol=1e-9)


def test_iterating_the_one_round_formula_is_something_else():
    rng = np.random.default_rng(12)
    confident, b, q = distribution(rng, 5, 4, 0.5), distribution(rng, 2, 4), distribution(rng, 1, 4)[0]
    frozen = both(confident, both(confident, b, q), q)
    assert abs(both(confident, b, q, iterations=2) - frozen).max() > 1e-3


def test_adjust_without_uncertain_rows_is_the_identity_and_nothing_is_modified():
    rng = np.random.default_rng(13)
    p, q = distribution(rng, 9, 4), np.full(4, 0.25)
    before = p.copy()
    adjusted, uncertain = can.adjust(p, q, top=3, threshold=2.0, alpha=1.0, iterations=1)
    np.testing.assert_array_equal(adjusted, p)
    assert not uncertain.any()
    adjusted, uncertain = can.adjust(p, q, top=3, threshold=-1.0, alpha=1.0, iterations=1)
    assert uncertain.all()
    # No confident row is left: every row becomes the prior.
    np.testing.assert_allclose(adjusted, np.tile(q, (9, 1)))
    np.testing.assert_array_equal(p, before)


def test_the_threshold_itself_is_uncertain():
    p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    u = float(can.top_entropy(p, top=2)[0])
    adjusted = can.adjust(p, np.ones(3) / 3, top=2, threshold=u, alpha=1.0, iterations=1)
    assert adjusted.uncertain.tolist() == [True, False]
    assert can.ambiguous_any(p, threshold=u, max_top=2).tolist() == [True, False]


# Errors.
GOOD = (np.full((3, 4), 0.25), np.full((2, 4), 0.25), np.full(4, 0.25))
FORMS = [can.alternating_normalization_loop, can.alternating_normalization, can.alternating_normalization_official]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({0: np.full((3, 5), 0.2)}, ShapeError, r"confident of shape \(3, 5\)"),
        ({1: np.full((2, 3), 0.2)}, ShapeError, r"uncertain of shape \(2, 3\)"),
        ({1: np.full(4, 0.25)}, ShapeError, r"\(b, k\)"),
        ({2: np.full(3, 0.3)}, ShapeError, r"prior of shape \(3,\)"),
        ({0: np.full((3, 1), 1.0)}, ShapeError, "k >= 2"),
        ({0: -GOOD[0]}, DomainError, "confident >= 0, received confident=-0.25"),
        ({1: GOOD[1] * np.nan}, DomainError, r"uncertain must be finite, received nan at index \[0, 0\]"),
        ({2: np.zeros(4)}, DomainError, "a prior with a positive entry"),
        ({"alpha": -1.0}, DomainError, "alpha >= 0, received alpha=-1.0"),
        ({"alpha": float("nan")}, DomainError, "alpha=nan"),
        ({"iterations": -1}, DomainError, "iterations=-1"),
        ({"iterations": True}, DomainError, "iterations must be integers"),
    ],
)
def test_alternating_normalization_errors(form, change, error, text):
    arrays = [change.get(i, v) for i, v in enumerate(GOOD)]
    options = {"alpha": 1.0, "iterations": 1} | {k: v for k, v in change.items() if isinstance(k, str)}
    with pytest.raises(error, match=f"can.{form.__name__}: .*{text}"):
        form(*arrays, **options)


def test_other_errors():
    p = np.full((2, 3), 1 / 3)
    for function in (can.top_entropy, can.top_entropy_unnormalized):
        with pytest.raises(DomainError, match="top >= 2, received top=1"):
            function(p, top=1)
        with pytest.raises(DomainError, match="top must be integers"):
            function(p, top=True)
        with pytest.raises(ShapeError, match="k >= 2"):
            function(p[:, :1], top=2)
        with pytest.raises(DomainError, match="p >= 0"):
            function(-p, top=2)
    with pytest.raises(DomainError, match="max_top >= 2"):
        can.ambiguous_any(p, threshold=0.5, max_top=1)
    with pytest.raises(DomainError, match="a finite threshold"):
        can.ambiguous_any(p, threshold=float("nan"), max_top=2)
    with pytest.raises(DomainError, match="a finite threshold"):
        can.adjust(p, p[0], top=2, threshold=float("inf"), alpha=1.0, iterations=1)
    with pytest.raises(ShapeError, match=r"p \(n, k\)"):
        can.adjust(p[None], p[0], top=2, threshold=0.5, alpha=1.0, iterations=1)
    labels = np.array([0, 1])
    with pytest.raises(DomainError, match=r"labels in 0..0, received labels=\[1\]"):
        can.class_prior(labels, classes=1, smoothing=0.0)
    with pytest.raises(DomainError, match=r"labels=\[-1\]"):
        can.class_prior(labels - 1, classes=2, smoothing=0.0)
    with pytest.raises(DomainError, match="smoothing >= 0"):
        can.class_prior(labels, classes=2, smoothing=-1.0)
    with pytest.raises(DomainError, match="classes >= 1"):
        can.class_prior(labels[:0], classes=0, smoothing=1.0)
    with pytest.raises(DomainError, match="a label or smoothing > 0"):
        can.class_prior(labels[:0], classes=2, smoothing=0.0)
    with pytest.raises(DomainError, match="labels must be integers"):
        can.class_prior(labels * 1.0, classes=2, smoothing=0.0)
    with pytest.raises(ShapeError, match=r"labels \(n,\)"):
        can.class_prior(labels[None], classes=2, smoothing=0.0)
