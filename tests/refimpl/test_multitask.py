"""Weights of tasks: figures by hand, what each rule is invariant to, and the shortest average by trying every face."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refimpl import multitask
from refimpl.check import DomainError, ShapeError

# Rows are gradients.
TWO = np.array([[3.0, 4.0], [-5.0, 12.0]])
RULES = {
    "fixed": partial(multitask.fixed, weights=np.arange(1.0, 9.0)),
    "reference_loss": partial(multitask.reference_loss, reference=np.arange(1.0, 9.0)),
    "detached_loss": multitask.detached_loss,
    "generalised_mean": partial(multitask.generalised_mean, p=0.5),
    "gradient_normalised": multitask.gradient_normalised,
    "pareto": multitask.pareto,
    "pareto_normalised": multitask.pareto_normalised,
}


def gram(gradients):
    return np.asarray(gradients) @ np.asarray(gradients).T


def weights(rule, gradients, losses=None, tasks=None):
    count = len(gradients)
    losses = np.arange(1.0, count + 1) if losses is None else np.asarray(losses, float)
    return rule(losses, gram(gradients), np.arange(count) if tasks is None else np.asarray(tasks))


def direction(rule, gradients, **given):
    return weights(rule, gradients, **given) @ gradients


@st.composite
def gradients(draw, least=1, most=5):
    """Some of them 0, equal, opposite or of very different length."""
    count, width = draw(st.integers(least, most)), draw(st.integers(1, 5))
    made = draw(arrays(np.float64, (count, width), elements=st.integers(-8, 8).map(float)))
    return made * 2.0 ** np.array(draw(st.lists(st.integers(-6, 6), min_size=count, max_size=count)))[:, None]


def shortest(gradients):
    """The least |u|^2 over the simplex: the best of the stationary points of every face."""
    found = math.inf
    products = gram(gradients)
    for size in range(1, len(gradients) + 1):
        for face in itertools.combinations(range(len(gradients)), size):
            held = products[np.ix_(face, face)]
            system = np.block([[held, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=1e-12)[0][:size]
            if (share > -1e-9).all() and abs(share.sum() - 1) < 1e-9:
                found = min(found, share @ held @ share)
    return found


# Losses.


def test_fixed_weights_follow_the_task_and_not_the_entry():
    rule = partial(multitask.fixed, weights=np.array([2.0, 0.0, 7.0]))
    assert weights(rule, np.eye(4), tasks=[2, 0, 2, 1]).tolist() == [7.0, 2.0, 7.0, 0.0]


def test_reference_losses_by_hand():
    rule = partial(multitask.reference_loss, reference=np.array([0.5, 4.0]))
    assert weights(rule, np.eye(3), tasks=[1, 0, 1], losses=[9, 9, 9]).tolist() == [0.25, 2.0, 0.25]


def test_the_prior_loss_is_the_entropy():
    assert multitask.prior_loss(np.array([1, 1, 1, 1])) == pytest.approx(math.log(4), abs=1e-15)
    # 1/2 log 2 + 2 (1/4) log 4 = 3/2 log 2.
    assert multitask.prior_loss(np.array([6, 0, 3, 3])) == pytest.approx(1.5 * math.log(2), abs=1e-15)
    assert multitask.prior_loss(np.array([0, 5])) == 0


def test_detached_losses_by_hand():
    assert weights(multitask.detached_loss, np.eye(3), losses=[0.25, 0.0, 5.0]).tolist() == [4.0, 0.0, 0.2]


def test_detached_losses_are_unmoved_by_scale_but_not_by_shift():
    plain, scaled, shifted = TWO, TWO * [[1.0], [1024.0]], TWO
    expected = direction(multitask.detached_loss, plain, losses=[1, 2])
    assert direction(multitask.detached_loss, scaled, losses=[1, 2048]).tolist() == expected.tolist()
    assert direction(multitask.detached_loss, shifted, losses=[1, 4]).tolist() == [3 - 1.25, 4 + 3]
    assert expected.tolist() == [3 - 2.5, 4 + 6]


@pytest.mark.parametrize(
    ("p", "losses", "mean"),
    [
        (1, [7, 0], 3.5),
        (2, [1, 7], 5),
        (2, [7, 0], math.sqrt(24.5)),
        (-1, [1, 7], 1.75),
        (0, [2, 8], 4),
        (0.5, [1, 0, 9], 4),
        (-1, [3, 0], 3),
        # 7 / 2^(1/1000), where 7^1000 is no number.
        (1000, [1, 7], 7 / 2**0.001),
        (-1000, [1, 7], 2**0.001),
        (0.3, [0, 0], 0),
    ],
)
def test_generalised_means_by_hand(p, losses, mean):
    assert multitask.mean_of_losses(np.array(losses, float), p=p) == pytest.approx(mean, rel=1e-14)


def test_weights_of_generalised_means_by_hand():
    rule = multitask.generalised_mean
    assert weights(partial(rule, p=1.0), np.eye(2), losses=[9, 0]).tolist() == [0.5, 0.5]
    # M_0 = sqrt(2 * 8) = 4: 4 / (2 * 2) and 4 / (2 * 8).
    assert weights(partial(rule, p=0.0), np.eye(2), losses=[2, 8]) == pytest.approx([1.0, 0.25], rel=1e-15)
    # M_2 = sqrt((1 + 49) / 2) = 5.
    assert weights(partial(rule, p=2.0), np.eye(2), losses=[1, 7]) == pytest.approx([0.1, 0.7], rel=1e-15)
    # A loss of 0 is left out below p = 1, and has no part in the slope of M_2.
    assert weights(partial(rule, p=0.5), np.eye(3), losses=[3, 0, 3]).tolist() == [0.5, 0.0, 0.5]
    assert weights(partial(rule, p=0.0), np.eye(2), losses=[0, 0]).tolist() == [0.0, 0.0]
    assert weights(partial(rule, p=2.0), np.eye(2), losses=[0, 0]).tolist() == [0.5, 0.5]
    assert weights(partial(rule, p=3.0), np.eye(2), losses=[0, 5])[0] == 0


POSITIVE = st.floats(1e-3, 1e3)


@given(st.lists(POSITIVE, min_size=1, max_size=5), st.floats(-4, 4), st.floats(0, 3))
def test_generalised_means_increase_with_p(losses, p, more):
    losses = np.array(losses)
    low, high = (multitask.mean_of_losses(losses, p=power) for power in (p, p + more))
    assert low <= high * (1 + 1e-12)
    assert min(losses) * (1 - 1e-12) <= low and high <= max(losses) * (1 + 1e-12)


@given(st.lists(POSITIVE, min_size=1, max_size=5), st.sampled_from([1e-4, -1e-4, 1e-12, -1e-14, 1e-17, 5e-324]))
def test_generalised_means_reach_the_geometric_one(losses, p):
    losses = np.array(losses)
    # M_p = M_0 (1 + p var(log L) / 2 + ...); the logarithms lie within 14 of each other.
    assert multitask.mean_of_losses(losses, p=p) == pytest.approx(math.exp(np.log(losses).mean()), rel=30 * abs(p))
    near, limit = (weights(partial(multitask.generalised_mean, p=q), np.eye(len(losses)), losses) for q in (p, 0.0))
    assert near == pytest.approx(limit, rel=60 * abs(p) + 1e-14)


@given(st.lists(POSITIVE, min_size=1, max_size=4), st.floats(-3, 3))
def test_weights_of_generalised_means_are_its_slopes(losses, p):
    losses = np.array(losses)
    found = weights(partial(multitask.generalised_mean, p=p), np.eye(len(losses)), losses)
    for index, loss in enumerate(losses):
        up, down = losses.copy(), losses.copy()
        up[index], down[index] = loss * (1 + 1e-5), loss * (1 - 1e-5)
        slope = (multitask.mean_of_losses(up, p=p) - multitask.mean_of_losses(down, p=p)) / (up[index] - down[index])
        # The mean itself is formed to 1e-15, divided by a difference of 2e-5 L.
        assert found[index] == pytest.approx(slope, rel=1e-7, abs=1e-9 * multitask.mean_of_losses(losses, p=p) / loss)


# Gradient normalisation.


def test_normalised_gradients_by_hand():
    assert weights(multitask.gradient_normalised, TWO).tolist() == [1 / 5, 1 / 13]
    assert weights(multitask.gradient_normalised, [[0.0, 0.0], [0.0, 2.0]]).tolist() == [0.0, 0.5]
    tiny = np.array([[0.0, 2.0**-500], [2.0**-510, 0.0]])
    assert weights(multitask.gradient_normalised, tiny).tolist() == [2.0**500, 2.0**510]
    assert direction(multitask.pareto_normalised, tiny).tolist() == [0.5, 0.5]
    assert direction(multitask.gradient_normalised, TWO) == pytest.approx([3 / 5 - 5 / 13, 4 / 5 + 12 / 13])


@pytest.mark.parametrize("rule", ["gradient_normalised", "pareto_normalised"])
@given(gradients(), st.lists(st.integers(-20, 20), min_size=5, max_size=5), st.floats(-1e3, 1e3))
def test_normalised_rules_are_unmoved_by_scale_and_shift(rule, made, powers, shift):
    scales, losses = 2.0 ** np.array(powers[: len(made)]), np.arange(1.0, len(made) + 1)
    expected = direction(RULES[rule], made, losses=losses)
    # Powers of two: no rounding, so bit for bit.
    found = direction(RULES[rule], made * scales[:, None], losses=losses * scales + shift)
    assert found.tolist() == expected.tolist()


@given(gradients(2, 2))
def test_of_two_normalised_gradients_none_is_opposed(made):
    assert (made @ direction(multitask.gradient_normalised, made) >= -1e-12 * multitask.norms(gram(made))).all()


@given(gradients(2, 2))
def test_of_two_the_normalised_rules_agree(made):
    lengths = multitask.norms(gram(made))
    if (lengths > 0).all():
        found = direction(multitask.pareto_normalised, made)
        assert found == pytest.approx(direction(multitask.gradient_normalised, made) / 2, abs=1e-7)


# The Pareto direction.


def test_pareto_by_hand():
    # The foot of the perpendicular from 0 on the line through (2, 0) and (0, 1): shares 1/5 and 4/5.
    assert weights(multitask.pareto, [[2.0, 0.0], [0.0, 1.0]]) == pytest.approx([0.2, 0.8], abs=1e-15)
    # The shorter one itself, where the foot lies outside.
    assert weights(multitask.pareto, [[1.0, 0.0], [2.0, 1.0]]).tolist() == [1.0, 0.0]
    # Unit axes: the centre; a fourth, longer, between them has no share.
    made = np.append(np.eye(3), [[1.0, 1.0, 1.0]], axis=0)
    assert weights(multitask.pareto, made) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-9)
    # A face of three: the foot on the first two is (1/2, 1/2, 0), and the third lies behind it.
    made = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 3.0]]
    assert weights(multitask.pareto, made) == pytest.approx([0.5, 0.5, 0.0], abs=1e-12)
    # What has no share has exactly none, though w + w / (1 - w) (w - 1) is 1e-17 for the share that the first loses.
    made = [[1.0, -2.0, 6.0, 0.0], [4.0, 3.0, -1.0, -9.0], [8.0, -4.0, -3.0, 0.0], [0.0, -3.0, 1.0, 2.0]]
    assert weights(multitask.pareto, made)[[0, 2]].tolist() == [0.0, 0.0]


def test_pareto_where_no_direction_is_left():
    assert weights(multitask.pareto, [[1.0, -2.0], [-3.0, 6.0]]) == pytest.approx([0.75, 0.25], abs=1e-15)
    assert direction(multitask.pareto, np.array([[1.0, -2.0], [-3.0, 6.0]])) == pytest.approx([0, 0], abs=1e-14)
    # Three at 120 degrees, of lengths 1, 1, 2.
    angles = 2 * np.pi * np.arange(3) / 3
    made = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1.0], [1.0], [2.0]]
    assert weights(multitask.pareto, made) == pytest.approx([0.4, 0.4, 0.2], abs=1e-6)
    assert direction(multitask.pareto, made) == pytest.approx([0, 0], abs=1e-6)


def test_a_gradient_of_zero():
    made = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    assert direction(multitask.pareto, made).tolist() == [0.0, 0.0]
    # Of unit length they are (0.6, 0.8) and (0, 1): the middle.
    assert weights(multitask.pareto_normalised, made) == pytest.approx([0, 0.1, 0.25], abs=1e-15)
    assert weights(multitask.pareto, np.zeros((3, 2))).tolist() == [1 / 3] * 3
    assert weights(multitask.pareto_normalised, np.zeros((3, 2))).tolist() == [0.0] * 3
    assert weights(multitask.gradient_normalised, np.zeros((3, 2))).tolist() == [0.0] * 3


def test_equal_gradients_share_evenly():
    made = np.array([[3.0, 4.0]] * 4)
    assert weights(multitask.pareto, made) == pytest.approx([0.25] * 4, abs=1e-15)
    assert multitask.min_norm_of_two(gram(made[:2])).tolist() == [0.5, 0.5]
    assert direction(multitask.pareto_normalised, made) == pytest.approx([0.6, 0.8], abs=1e-15)


@pytest.mark.parametrize("name", ["pareto", "generalised_mean"])
def test_one_entry_alone_has_its_own_gradient(name):
    made = np.array([[3.0, -4.0]])
    assert direction(RULES[name], made).tolist() == [[3.0, -4.0]][0]
    assert direction(multitask.pareto_normalised, made) == pytest.approx([0.6, -0.8], abs=1e-15)


@given(gradients())
def test_pareto_is_the_shortest_average(made):
    found = weights(multitask.pareto, made)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-12)
    products, largest = gram(made), gram(made).max()
    meets, square = products @ found, found @ products @ found
    # No loss grows, and no average is shorter.
    assert (meets >= square - 1e-7 * largest).all()
    assert multitask.gap(products, found) == pytest.approx(square - meets.min(), abs=1e-12 * largest)
    assert shortest(made) == pytest.approx(square, abs=1e-7 * largest)


@given(gradients(2, 2))
def test_two_entries_are_exact_after_one_iteration(made):
    products = gram(made)
    closed = multitask.min_norm_of_two(products)
    found = multitask.min_norm(products, tolerance=0.0, most=1)
    assert found @ products @ found == pytest.approx(closed @ products @ closed, abs=1e-14 * products.max())
    # Above all: where they differ in length, the averages do.
    if multitask.norms(gram([made[0] - made[1]]))[0] > 0.01 * multitask.norms(products).max():
        assert found == pytest.approx(closed, abs=1e-10)


def test_the_iterations_are_those_that_were_asked_for():
    angles = np.array([0.0, 2.0, 4.3])
    made = np.stack([np.cos(angles), np.sin(angles)], axis=1) + [0.5, 0.3]
    left = [multitask.gap(gram(made), multitask.min_norm(gram(made), tolerance=0.0, most=k)) for k in (1, 3, 20, 400)]
    assert left == sorted(left, reverse=True) and left[0] > 1e-2 and left[-1] < 1e-14
    # Equal weights, where it begins, are near enough.
    assert multitask.min_norm(gram(made), tolerance=99.0, most=400).tolist() == [1 / 3] * 3


@pytest.mark.parametrize("name", RULES)
@given(made=gradients(2), data=st.data())
def test_the_order_of_the_entries_does_not_matter(name, made, data):
    order = data.draw(st.permutations(range(len(made))))
    losses, tasks = np.arange(1.0, len(made) + 1), np.arange(len(made))
    expected = direction(RULES[name], made)
    found = direction(RULES[name], made[order], losses=losses[order], tasks=tasks[order])
    # The shortest u is one; the error of u is the root of the gap.
    largest = max(1.0 if "normalised" in name else abs(made).max(), 1e-300)
    assert found == pytest.approx(expected, abs=1e-3 * largest if "pareto" in name else 1e-9 * max(largest, 1))


@pytest.mark.parametrize("name", RULES)
def test_a_separable_rule_needs_one_entry_at_a_time(name):
    made, losses = np.append(TWO, [[1.0, 0.5]], axis=0), np.array([0.3, 2.0, 5.0])
    whole = weights(RULES[name], made, losses=losses)
    alone = [weights(RULES[name], made[[i]], losses=losses[[i]], tasks=[i])[0] for i in range(3)]
    assert multitask.separable(RULES[name]) == (whole.tolist() == alone)


# What is told of a step.


def test_cosines_by_hand():
    made = np.array([[3.0, 4.0], [-5.0, 12.0], [0.0, 0.0], [-6.0, -8.0]])
    expected = np.array([[1, 33 / 65, 0, -1], [33 / 65, 1, 0, -33 / 65], [0, 0, 0, 0], [-1, -33 / 65, 0, 1]])
    np.testing.assert_allclose(multitask.cosines(gram(made)), expected, atol=1e-15)
    assert multitask.norms(gram(made)).tolist() == [5, 13, 0, 10]


@given(gradients())
def test_cosines_stay_within_one(made):
    found = multitask.cosines(gram(made * 0.1))
    assert (abs(found) <= 1).all() and (found == found.T).all()


# Refusals.


@pytest.mark.parametrize("name", RULES)
def test_what_every_rule_refuses(name):
    rule, losses, products, tasks = RULES[name], np.ones(2), np.eye(2), np.arange(2)
    assert np.isfinite(rule(losses, products, tasks)).all()
    with pytest.raises(DomainError, match="losses must be finite, received nan at index"):
        rule(np.array([1.0, np.nan]), products, tasks)
    with pytest.raises(DomainError, match="gram must be finite, received inf at index"):
        rule(losses, np.array([[1.0, 0.0], [0.0, np.inf]]), tasks)
    with pytest.raises(DomainError, match="diagonal is >= 0"):
        rule(losses, np.diag([1.0, -1e-3]), tasks)
    with pytest.raises(DomainError, match="a symmetric gram"):
        rule(losses, np.array([[1.0, 0.5], [0.4, 1.0]]), tasks)
    with pytest.raises(ShapeError, match=r"losses \(t,\), gram \(t, t\) and tasks \(t,\)"):
        rule(np.ones(3), products, tasks)
    with pytest.raises(ShapeError, match=r"losses \(t,\)"):
        rule(losses, products, np.arange(3))
    with pytest.raises(ShapeError, match="t >= 1"):
        rule(np.ones(0), np.ones((0, 0)), np.arange(0))
    with pytest.raises(ShapeError, match=r"gram \(t, t\)"):
        rule(losses, np.ones((2, 3)), tasks)
    with pytest.raises(DomainError, match="tasks must be integers"):
        rule(losses, products, np.ones(2))
    with pytest.raises(DomainError, match="tasks >= 0"):
        rule(losses, products, np.array([0, -1]))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda *a: multitask.fixed(*a, weights=np.array([1.0, -1.0])), "weights >= 0"),
        (lambda *a: multitask.fixed(*a, weights=np.array([1.0])), "tasks below 1"),
        (lambda *a: multitask.fixed(*a, weights=np.ones((2, 1))), r"weights of shape \(number of tasks,\)"),
        (lambda *a: multitask.reference_loss(*a, reference=np.array([1.0, 0.0])), "reference > 0"),
        (lambda *a: multitask.reference_loss(*a, reference=np.array([1.0])), "tasks below 1"),
        (lambda *a: multitask.detached_loss(-a[0], *a[1:]), "losses >= 0"),
        (lambda *a: multitask.generalised_mean(-a[0], *a[1:], p=1.0), "losses >= 0"),
        (lambda *a: multitask.generalised_mean(*a, p=math.inf), "a finite p"),
        (lambda *a: multitask.mean_of_losses(np.ones((2, 1)), p=1.0), r"losses \(t,\)"),
        (lambda *a: multitask.min_norm(np.eye(2), tolerance=-1.0, most=3), "tolerance >= 0"),
        (lambda *a: multitask.min_norm(np.eye(2), tolerance=0.0, most=0), "most >= 1"),
        (lambda *a: multitask.min_norm_of_two(np.eye(3)), r"gram \(2, 2\)"),
        (lambda *a: multitask.gap(np.eye(2), np.array([0.5, 0.6])), "sum 1"),
        (lambda *a: multitask.gap(np.eye(2), np.array([1.5, -0.5])), "weights >= 0"),
        (lambda *a: multitask.gap(np.eye(2), np.ones(3) / 3), r"weights \(t,\)"),
        (lambda *a: multitask.prior_loss(np.zeros(3)), "not all 0"),
        (lambda *a: multitask.prior_loss(np.array([2, -1])), "counts >= 0"),
        (lambda *a: multitask.prior_loss(np.ones((2, 2))), r"counts \(k,\)"),
    ],
)
def test_what_single_functions_refuse(call, named):
    with pytest.raises((DomainError, ShapeError), match=named):
        call(np.ones(2), np.eye(2), np.arange(2))


def test_arguments_are_left_as_they_are():
    for rule in RULES.values():
        losses, products, tasks = np.array([1.0, 2.0]), gram(TWO), np.arange(2)
        rule(losses, products, tasks)
        assert losses.tolist() == [1, 2] and products.tolist() == gram(TWO).tolist() and tasks.tolist() == [0, 1]
