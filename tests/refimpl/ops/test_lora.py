"""lora: golden runs of PEFT and torch, hand-computed values, closed forms, laws, errors and degenerate input."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import lora

GOLDEN = Path(__file__).parents[2] / "golden" / "peft_lora"
RULES = {
    "linear_r4_a8": ({"learning_rate": 0.1}, 0.0, (0.01, 0.9, 0.999, 1e-8, 0.01)),
    "linear_r4_a8_rslora": ({"learning_rate": 0.1}, 0.0, (0.01, 0.9, 0.999, 1e-8, 0.01)),
    "linear_r3_a5_nobias": ({"learning_rate": 0.05}, 0.9, (0.003, 0.8, 0.95, 1e-6, 0.1)),
}
STEP = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def draw(seed, *shapes):
    """Integers in -3..3, so that short products are exact."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(-3, 4, shape).astype(float) for shape in shapes)


def problem(seed, d=7, e=11, r=3):
    """W, A, B, G with distinct prime axes."""
    return draw(seed, (d, e), (d, r), (r, e), (d, e))


@pytest.fixture(params=sorted(RULES))
def peft(request):
    with np.load(GOLDEN / f"{request.param}.npz") as archive:
        data = {name: archive[name] for name in archive.files}
    data["scale"] = float(data["scaling"])
    data["bias"] = data.get("bias", 0.0)
    data["rules"] = RULES[request.param]
    return data


def output_gradient(data, weights):
    """dL/dy of the golden loss, mean (y - target)^2, computed without the package."""
    y = data["x"] @ (weights.W + data["scale"] * weights.A @ weights.B) + data["bias"]
    return 2 * (y - data["target"]) / y.size


class TestAgainstPeft:
    def test_scale(self, peft):
        alpha, r = float(peft["lora_alpha"]), int(peft["r"])
        scale = lora.scale_rslora if bool(peft["use_rslora"]) else lora.scale_lora
        assert scale(alpha=alpha, r=r) == pytest.approx(peft["scale"], rel=1e-15)

    def test_forward_delta_and_merge(self, peft):
        weights = lora.from_peft(peft["W"], peft["lora_A"], peft["lora_B"])
        scale = peft["scale"]
        close(lora.apply(peft["x"], *weights, scale=scale) + peft["bias"], peft["y"])
        close(lora.apply(peft["x"], *weights, scale=0.0) + peft["bias"], peft["y_base"])
        close(lora.delta(weights.A, weights.B, scale=scale).T, peft["delta_weight"])
        merged = lora.merge(*weights, scale=scale)
        close(merged.T, peft["merged_weight"])
        close(peft["x"] @ merged + peft["bias"], peft["merged_y"])
        close(lora.unmerge(peft["merged_weight"].T, weights.A, weights.B, scale=scale), weights.W)

    def test_gradients(self, peft):
        weights = lora.from_peft(peft["W"], peft["lora_A"], peft["lora_B"])
        dy = output_gradient(peft, weights)
        factored = lora.gradients_factored(peft["x"], dy, weights.A, weights.B, scale=peft["scale"])
        dense = lora.gradients_dense(peft["x"].T @ dy, weights.A, weights.B, scale=peft["scale"])
        for gradients in (factored, dense):
            close(gradients.A.T, peft["grad_A"])
            close(gradients.B.T, peft["grad_B"])
        close(lora.gradient_input(dy, *weights, scale=peft["scale"]), peft["grad_x"])

    def test_sgd_steps(self, peft):
        weights = lora.from_peft(peft["W"], peft["lora_A"], peft["lora_B"])
        rule, momentum, _ = peft["rules"]
        # Momentum is linear in the gradients at the old factors, so it can be laid over plain steps from outside.
        buffer_A, buffer_B = np.zeros_like(weights.A), np.zeros_like(weights.B)
        for step in (1, 2, 3):
            G = peft["x"].T @ output_gradient(peft, weights)
            new = lora.sgd(weights.A, weights.B, G, scale=peft["scale"], **rule)
            buffer_A = momentum * buffer_A + (new.A - weights.A)
            buffer_B = momentum * buffer_B + (new.B - weights.B)
            weights = weights._replace(A=weights.A + buffer_A, B=weights.B + buffer_B)
            close(weights.A.T, peft[f"sgd_A_after_step{step}"])
            close(weights.B.T, peft[f"sgd_B_after_step{step}"])

    def test_adamw_steps(self, peft):
        weights = lora.from_peft(peft["W"], peft["lora_A"], peft["lora_B"])
        rate, beta_1, beta_2, epsilon, decay = peft["rules"][2]
        zero_A, zero_B = np.zeros_like(weights.A), np.zeros_like(weights.B)
        state = lora.AdamWFactors(weights.A, weights.B, zero_A, zero_A, zero_B, zero_B)
        for step in (1, 2, 3):
            weights = weights._replace(A=state.A, B=state.B)
            G = peft["x"].T @ output_gradient(peft, weights)
            state = lora.adamw(
                state.A, state.B, G, *state[2:], scale=peft["scale"], step=step, learning_rate=rate,
                beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, weight_decay=decay,
            )  # fmt: skip
            close(state.A.T, peft[f"adamw_A_after_step{step}"])
            close(state.B.T, peft[f"adamw_B_after_step{step}"])


class TestScale:
    def test_values(self):
        assert lora.scale_lora(alpha=5, r=3) == 5 / 3
        assert lora.scale_lora(alpha=16.0, r=64) == 0.25
        assert lora.scale_rslora(alpha=5.0, r=4) == 2.5
        assert lora.scale_lora(alpha=-2.0, r=1) == lora.scale_rslora(alpha=-2.0, r=1) == -2.0
        assert lora.scale_lora(alpha=0.0, r=7) == 0.0

    @pytest.mark.parametrize("function", [lora.scale_lora, lora.scale_rslora])
    def test_errors(self, function):
        bare = inspect.unwrap(function)
        with pytest.raises(TypeError):
            bare(r=4)
        with pytest.raises(DomainError, match=r"r an integer >= 1, received r=0"):
            function(alpha=1.0, r=0)
        for bad in (float("nan"), float("inf"), None, "16"):
            with pytest.raises(DomainError, match=f"lora.{function.__name__}: expected alpha a finite number"):
                bare(alpha=bad, r=4)
        for bad in (-1, 2.0, True, None):
            with pytest.raises(DomainError, match="r an integer >= 1"):
                bare(alpha=1.0, r=bad)


class TestLayer:
    # d = 2, e = 3, r = 1, every product done by hand.
    W = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    A = np.array([[1.0], [-2.0]])
    B = np.array([[3.0, 0.0, -1.0]])
    delta = np.array([[1.5, 0.0, -0.5], [-3.0, 0.0, 1.0]])

    def test_hand_values(self):
        close(lora.delta(self.A, self.B, scale=0.5), self.delta, 0)
        close(lora.merge(self.W, self.A, self.B, scale=0.5), [[2.5, 2.0, 2.5], [1.0, 5.0, 7.0]], 0)
        close(lora.unmerge(self.W, self.A, self.B, scale=0.5), [[-0.5, 2.0, 3.5], [7.0, 5.0, 5.0]], 0)
        close(lora.apply(np.array([[1.0, 1.0]]), self.W, self.A, self.B, scale=0.5), [[3.5, 7.0, 9.5]], 0)
        close(lora.apply(np.array([1.0, 1.0]), self.W, self.A, self.B, scale=0.5), [3.5, 7.0, 9.5], 0)
        close(lora.gradient_input(np.array([[1.0, 0.0, 0.0]]), self.W, self.A, self.B, scale=0.5), [[2.5, 1.0]], 0)

    def test_symmetric_start_is_w(self):
        W, A, B, _ = problem(1)
        A_0, B_0 = draw(2, (7, 2), (2, 11))
        assert np.array_equal(lora.merge_symmetric(W, A, B, A, B, scale=0.5), W)
        expected = W - 0.5 * A_0 @ B_0 + 0.5 * A @ B
        close(lora.merge_symmetric(W, A, B, A_0, B_0, scale=0.5), expected, 0)
        zero = np.zeros_like(A)
        assert np.array_equal(lora.merge_symmetric(W, A, B, zero, B, scale=0.5), W + 0.5 * A @ B)

    def test_leading_axes_and_empty(self):
        W, A, B, _ = problem(3)
        (x,) = draw(4, (2, 5, 7))
        expected = np.einsum("bnd,de->bne", x, W + 0.25 * A @ B)
        close(lora.apply(x, W, A, B, scale=0.25), expected, 0)
        assert lora.apply(x[:, :0], W, A, B, scale=0.25).shape == (2, 0, 11)
        dx = lora.gradient_input(expected, W, A, B, scale=0.25)
        close(dx, np.einsum("bne,de->bnd", expected, W + 0.25 * A @ B), 0)
        assert lora.gradient_input(expected[:0], W, A, B, scale=0.25).shape == (0, 5, 7)

    def test_rank_above_both_widths_is_defined(self):
        W, A, B, G = problem(5, d=2, e=3, r=5)
        assert lora.delta(A, B, scale=2.0).tolist() == (2 * A @ B).tolist()
        assert lora.gradients_dense(G, A, B, scale=1.0).A.shape == (2, 5)

    def test_merge_unmerge_is_not_bit_exact_but_bounded(self):
        generator = np.random.default_rng(6)
        W, A, B = generator.normal(size=(7, 11)), generator.normal(size=(7, 3)), generator.normal(size=(3, 11))
        merged = lora.merge(W, A, B, scale=8.0)
        back = lora.unmerge(merged, A, B, scale=8.0)
        assert not np.array_equal(back, W)
        assert (abs(back - W) <= 0.5 * np.spacing(abs(merged)) + 0.5 * np.spacing(abs(W))).all()

    def test_arguments_are_neither_changed_nor_aliased(self):
        W, A, B, _ = problem(7)
        before = [W.copy(), A.copy(), B.copy()]
        for result in (
            lora.merge(W, A, np.zeros_like(B), scale=1.0),
            lora.unmerge(W, A, B, scale=0.0),
            *lora.to_peft(W, A, B),
            *lora.from_peft(W.T, A.T, B.T),
            *lora.sgd(A, B, W, scale=1.0, learning_rate=0.0),
        ):
            assert not any(np.shares_memory(result, argument) for argument in (W, A, B))
            result += 1
        assert all(np.array_equal(old, new) for old, new in zip(before, (W, A, B), strict=True))

    def test_integer_and_half_input_gives_float64(self):
        W, A, B, _ = problem(8)
        assert lora.merge(W.astype(np.int64), A.astype(np.float16), B, scale=1).dtype == np.float64


class TestOrientation:
    def test_hand_values(self):
        weights = lora.from_peft(np.arange(6.0).reshape(3, 2), np.array([[7.0, 8.0]]), np.array([[1.0], [2.0], [3.0]]))
        assert weights.W.tolist() == [[0, 2, 4], [1, 3, 5]]
        assert weights.A.tolist() == [[7], [8]]
        assert weights.B.tolist() == [[1, 2, 3]]
        back = lora.to_peft(*weights)
        assert back.W_t.tolist() == [[0, 1], [2, 3], [4, 5]]
        assert (back.lora_A.tolist(), back.lora_B.tolist()) == ([[7, 8]], [[1], [2], [3]])

    def test_product(self):
        W, A, B, _ = problem(9)
        back = lora.to_peft(W, A, B)
        assert np.array_equal(back.lora_B @ back.lora_A, (A @ B).T)

    def test_row_orientation_is_refused_by_from_peft(self):
        W, A, B, _ = problem(10)
        with pytest.raises(ShapeError, match=r"lora_A \(r, d\).*received W_t of shape \(7, 11\)"):
            lora.from_peft(W, A, B)
        with pytest.raises(ShapeError):
            lora.from_peft(W.T, A.T[:0], B.T[:, :0])
        with pytest.raises(ShapeError):
            lora.from_peft(W.T, A.T[0], B.T)


class TestGradients:
    def test_finite_differences(self):
        """L = sum(G * merge) is linear in each factor, so central differences are exact on small integers."""
        _, A, B, G = problem(11)
        dA, dB = lora.gradients_dense(G, A, B, scale=1.5)
        for gradient, index, name in ((dA, (4, 2), "A"), (dB, (1, 8), "B")):
            bump = np.zeros_like(A if name == "A" else B)
            bump[index] = 1.0
            up = (A + bump) @ B if name == "A" else A @ (B + bump)
            down = (A - bump) @ B if name == "A" else A @ (B - bump)
            assert gradient[index] == 1.5 * (G * (up - down)).sum() / 2

    def test_factored_sums_all_leading_axes(self):
        _, A, B, _ = problem(12)
        x, dy = draw(13, (2, 5, 7), (2, 5, 11))
        G = np.einsum("bnd,bne->de", x, dy)
        actual = lora.gradients_factored(x, dy, A, B, scale=2.0)
        close(actual.A, 2 * np.einsum("de,re->dr", G, B), 0)
        close(actual.B, 2 * np.einsum("dr,de->re", A, G), 0)
        one = lora.gradients_factored(x[0, 0], dy[0, 0], A, B, scale=2.0)
        close(one.A, 2 * np.outer(x[0, 0], dy[0, 0] @ B.T), 0)

    def test_no_rows_give_zeros(self):
        _, A, B, _ = problem(14)
        actual = lora.gradients_factored(np.zeros((3, 0, 7)), np.zeros((3, 0, 11)), A, B, scale=2.0)
        assert actual.A.tolist() == np.zeros((7, 3)).tolist()
        assert actual.B.tolist() == np.zeros((3, 11)).tolist()

    def test_two_zero_factors_never_leave_zero(self):
        _, A, B, G = problem(15)
        dA, dB = lora.gradients_dense(G, 0 * A, 0 * B, scale=1.0)
        assert not dA.any() and not dB.any()
        dA, dB = lora.gradients_dense(G, A, 0 * B, scale=1.0)
        assert not dA.any() and dB.any()


class TestSgd:
    def test_hand_values(self):
        # d = e = 2, r = 1, scale 3, learning rate 1/2: G B^T = (2, 4), A^T G = (-1, 0).
        A, B = np.array([[1.0], [-1.0]]), np.array([[2.0, 0.0]])
        G = np.array([[1.0, 2.0], [2.0, 2.0]])
        new = lora.sgd(A, B, G, scale=3.0, learning_rate=0.5)
        assert new.A.tolist() == [[-2.0], [-7.0]]
        assert new.B.tolist() == [[3.5, 0.0]]
        # 3 ((-2, -7)^T (3.5, 0) - (1, -1)^T (2, 0))
        expected = [[-27.0, 0.0], [-67.5, 0.0]]
        assert lora.update(A, B, *new, scale=3.0).tolist() == expected
        assert lora.sgd_update(A, B, G, scale=3.0, learning_rate=0.5).tolist() == expected
        frozen = lora.sgd_frozen(A, B, G, scale=3.0, learning_rate=0.5)
        assert frozen.tolist() == [[3.5, 0.0]]
        # 3 (1, -1)^T ((3.5, 0) - (2, 0))
        expected = [[4.5, 0.0], [-4.5, 0.0]]
        assert lora.sgd_frozen_update(A, G, scale=3.0, learning_rate=0.5).tolist() == expected

    @given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0, 3.0]))
    def test_expansion_equals_product_difference(self, seed, r, scale):
        """All values are small dyadic numbers, so both sides are exact."""
        W, A, B, G = problem(seed, d=3, e=5, r=r)
        rate = 0.125
        dA, dB = scale * np.einsum("de,re->dr", G, B), scale * np.einsum("dr,de->re", A, G)
        expected = scale * (np.einsum("dr,re->de", A - rate * dA, B - rate * dB) - A @ B)
        assert np.array_equal(lora.sgd_update(A, B, G, scale=scale, learning_rate=rate), expected)
        new = lora.sgd(A, B, G, scale=scale, learning_rate=rate)
        assert np.array_equal(lora.update(A, B, *new, scale=scale), expected)
        moved = lora.merge(W, *new, scale=scale)
        assert np.array_equal(moved, lora.merge(W, A, B, scale=scale) + expected)

    @given(st.integers(0, 10**6))
    def test_frozen_expansion(self, seed):
        _, A, B, G = problem(seed, d=3, e=5, r=2)
        new_B = lora.sgd_frozen(A, B, G, scale=1.5, learning_rate=0.5)
        assert np.array_equal(new_B, lora.sgd(A, B, G, scale=1.5, learning_rate=0.5).B)
        expected = -0.5 * 1.5**2 * np.einsum("dr,cr,ce->de", A, A, G)
        assert np.array_equal(lora.sgd_frozen_update(A, G, scale=1.5, learning_rate=0.5), expected)
        assert np.array_equal(lora.update(A, B, A, new_B, scale=1.5), expected)

    def test_orders_in_the_scale(self):
        """scale = 2 and -2 tell the first order (even) from the second (odd)."""
        _, A, B, G = problem(16)
        plus = lora.sgd_update(A, B, G, scale=2.0, learning_rate=0.5)
        minus = lora.sgd_update(A, B, G, scale=-2.0, learning_rate=0.5)
        close((plus + minus) / 2, -0.5 * 4 * (G @ B.T @ B + A @ A.T @ G), 0)
        close((plus - minus) / 2, 0.25 * 8 * G @ B.T @ A.T @ G, 0)


class TestRandomProjection:
    def test_hand_values(self):
        G = np.array([[1.0, 2.0], [3.0, 4.0]])
        A, B = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
        # A A^T G = [[1, 2], [12, 16]], G B^T B = [[3, 5], [7, 11]]
        actual = lora.random_projection_update(G, A, B, learning_rate=0.5)
        assert actual.tolist() == [[-1.0, -1.75], [-4.75, -6.75]]

    @pytest.mark.parametrize("r", [1, 4])
    def test_mean_over_unit_factors_is_minus_two_rates(self, r):
        """Signed columns of a Hadamard matrix have mean 0 and variance 1, and average to the identity exactly."""
        signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=float)
        (G,) = draw(17, (4, 4))
        draws = [signs[:, i : i + r] for i in range(0, 4, r)]
        mean = sum(lora.random_projection_update(G, A, A.T, learning_rate=0.25) for A in draws) / len(draws)
        close(mean, -2 * 0.25 * G, 0)

    def test_first_order_of_sgd_at_one_over_root_r(self):
        _, A, B, G = problem(18)
        scale = 1 / np.sqrt(3)
        even = lora.sgd_update(A, B, G, scale=scale, learning_rate=0.5)
        even = (even + lora.sgd_update(A, B, G, scale=-scale, learning_rate=0.5)) / 2
        close(lora.random_projection_update(G, A, B, learning_rate=0.5), even)


class TestAdamW:
    def test_first_step(self):
        """From zero states bias correction cancels: the move is learning_rate g / (|g| + epsilon)."""
        p, g = np.array([1.0, -2.0, 0.5, 3.0]), np.array([4.0, -0.5, 0.0, 1e-3])
        z = np.zeros(4)
        new = lora.adamw_array(
            p, g, z, z, step=1, learning_rate=0.5, beta_1=0.75, beta_2=0.5, epsilon=1.0, weight_decay=0.25
        )
        close(new.parameter, p * 0.875 - 0.5 * g / (abs(g) + 1.0))
        close(new.m, 0.25 * g, 0)
        close(new.v, 0.5 * g**2, 0)

    def test_epsilon_and_both_corrections(self):
        # m = 0.5 * 2 + 0.5 * 4 = 3, over 1 - 0.5^2: 4. v = 0.75 * 4 + 0.25 * 16 = 7, over 1 - 0.75^2: 16. Root 4.
        new = lora.adamw_array(
            *np.array([[10.0], [4.0], [2.0], [4.0]]),
            step=2, learning_rate=1.0, beta_1=0.5, beta_2=0.75, epsilon=4.0, weight_decay=0.0,
        )  # fmt: skip
        assert (new.parameter.item(), new.m.item(), new.v.item()) == (9.5, 3.0, 7.0)

    def test_against_torch(self):
        torch = pytest.importorskip("torch")
        generator = np.random.default_rng(19)
        start = generator.normal(size=(5, 3))
        parameter = torch.nn.Parameter(torch.tensor(start))
        optimiser = torch.optim.AdamW([parameter], lr=0.02, betas=(0.7, 0.9), eps=0.01, weight_decay=0.3)
        state = lora.AdamW(start, np.zeros_like(start), np.zeros_like(start))
        for step in range(1, 6):
            gradient = generator.normal(size=(5, 3)) * 10.0**-step
            parameter.grad = torch.tensor(gradient)
            optimiser.step()
            state = lora.adamw_array(
                state.parameter, gradient, state.m, state.v, step=step, learning_rate=0.02, beta_1=0.7, beta_2=0.9,
                epsilon=0.01, weight_decay=0.3,
            )  # fmt: skip
            close(state.parameter, parameter.detach().numpy(), 1e-14)

    def test_zero_gradient_only_decays(self):
        p = np.array([2.0, -3.0])
        new = lora.adamw_array(p, 0 * p, 0 * p, 0 * p, step=1, **STEP | {"weight_decay": 0.5})
        assert new.parameter.tolist() == (p * (1 - 0.01 * 0.5)).tolist()

    def test_empty(self):
        empty = np.zeros((0, 3))
        assert lora.adamw_array(empty, empty, empty, empty, step=1, **STEP).parameter.shape == (0, 3)

    def test_scale_from_zero_states_meets_only_epsilon(self):
        _, A, B, G = problem(20)
        zero = (np.zeros_like(A), np.zeros_like(A), np.zeros_like(B), np.zeros_like(B))
        one = lora.adamw(A, B, G, *zero, scale=1.0, step=1, **STEP | {"epsilon": 1e-300})
        ten = lora.adamw(A, B, G, *zero, scale=10.0, step=1, **STEP | {"epsilon": 1e-300})
        close(one.A, ten.A)
        close(one.B, ten.B)

    def test_it_is_not_adamw_on_the_dense_gradient(self):
        _, A, B, G = problem(21)
        zero = (np.zeros_like(A), np.zeros_like(A), np.zeros_like(B), np.zeros_like(B))
        rule = STEP | {"weight_decay": 0.0}
        new = lora.adamw(A, B, G, *zero, scale=1.0, step=1, **rule)
        dense = lora.adamw_array(0 * G, G, 0 * G, 0 * G, step=1, **rule).parameter
        projected = dense @ B.T @ B + A @ A.T @ dense
        assert abs(lora.update(A, B, new.A, new.B, scale=1.0) - projected).max() > 0.1

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"step": 0}, "step an integer >= 1"),
            ({"learning_rate": -0.1}, "learning_rate >= 0"),
            ({"weight_decay": -0.1}, "weight_decay >= 0"),
            ({"beta_1": 1.0}, r"beta_1 and beta_2 in \[0, 1\)"),
            ({"beta_2": -0.5}, r"beta_1 and beta_2 in \[0, 1\)"),
            ({"epsilon": 0.0}, "epsilon > 0"),
            ({"epsilon": -1e-8}, "epsilon > 0"),
            ({"epsilon": float("nan")}, "epsilon a finite number"),
        ],
    )
    def test_domain(self, bad, message):
        p = np.ones(3)
        with pytest.raises(DomainError, match=message):
            lora.adamw_array(p, p, p, p, **{"step": 1} | STEP | bad)

    def test_shapes_and_negative_v(self):
        p = np.ones(3)
        with pytest.raises(ShapeError, match=r"lora.adamw_array: expected four equal shapes.*v of shape \(2,\)"):
            lora.adamw_array(p, p, p, p[:2], step=1, **STEP)
        with pytest.raises(DomainError, match=r"v >= 0, received v=-1.0"):
            lora.adamw_array(p, p, p, -p, step=1, **STEP)
        _, A, B, G = problem(22)
        with pytest.raises(ShapeError):
            lora.adamw(A, B, G, A.T, A.T, B, B, scale=1.0, step=1, **STEP)


class TestAdditive:
    @pytest.mark.parametrize(("d", "e", "r"), [(5, 3, 1), (6, 9, 3), (4, 6, 2), (3, 3, 3)])
    def test_against_tiled_identities(self, d, e, r):
        A, B, G = draw(23, (d, r), (r, e), (d, e))
        right = np.concatenate([np.eye(r)] * (e // r), axis=1)
        left = np.concatenate([np.eye(r)] * (d // r), axis=0)
        close(lora.additive_delta(A, B), A @ right + left @ B, 0)
        dA, dB = lora.additive_gradients(G, r=r)
        close(dA, G @ right.T, 0)
        close(dB, left.T @ G, 0)
        expected = -0.5 * (G @ right.T @ right + left @ left.T @ G)
        close(lora.additive_update(G, r=r, learning_rate=0.5), expected, 0)
        moved = lora.additive_delta(A - 0.5 * dA, B - 0.5 * dB) - lora.additive_delta(A, B)
        close(moved, expected, 0)
        assert np.linalg.matrix_rank(lora.additive_delta(A, B)) <= 2 * r

    def test_rank_one_is_row_and_column_sums(self):
        A, B = np.array([[1.0], [2.0]]), np.array([[10.0, 20.0, 30.0]])
        assert lora.additive_delta(A, B).tolist() == [[11, 21, 31], [12, 22, 32]]
        dA, dB = lora.additive_gradients(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), r=1)
        assert (dA.tolist(), dB.tolist()) == ([[6], [15]], [[5, 7, 9]])

    def test_residues_not_blocks(self):
        A, B = np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((2, 4))
        assert lora.additive_delta(A, B).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
        dA, _ = lora.additive_gradients(np.array([[1.0, 10.0, 100.0, 1000.0]] * 2), r=2)
        assert dA.tolist() == [[101, 1010]] * 2

    def test_errors(self):
        with pytest.raises(ShapeError, match=r"r dividing d and e, received A of shape \(4, 2\), B of shape \(2, 5\)"):
            lora.additive_delta(np.zeros((4, 2)), np.zeros((2, 5)))
        for shape in ((4, 5), (5, 4), (4,)):
            with pytest.raises(ShapeError, match="r=2 dividing d and e"):
                lora.additive_gradients(np.zeros(shape), r=2)
        with pytest.raises(DomainError, match="r an integer >= 1"):
            lora.additive_gradients(np.zeros((4, 4)), r=0)
        with pytest.raises(DomainError, match="learning_rate >= 0"):
            lora.additive_update(np.zeros((4, 4)), r=2, learning_rate=-1.0)


class TestLaws:
    @given(st.integers(0, 10**6), st.integers(1, 5))
    def test_layer_equals_merged_layer(self, seed, r):
        W, A, B, _ = problem(seed, d=5, e=3, r=r)
        (x,) = draw(seed + 1, (2, 5))
        assert np.array_equal(lora.apply(x, W, A, B, scale=0.75), x @ lora.merge(W, A, B, scale=0.75))
        assert np.array_equal(lora.unmerge(lora.merge(W, A, B, scale=0.75), A, B, scale=0.75), W)

    @given(st.integers(0, 10**6))
    def test_affine_in_the_scale(self, seed):
        W, A, B, _ = problem(seed, d=5, e=3, r=2)
        zero, one, four = (lora.merge(W, A, B, scale=s) for s in (0.0, 1.0, 4.0))
        assert np.array_equal(four - zero, 4 * (one - zero))
        assert np.array_equal(zero, W)

    @given(st.integers(0, 10**6))
    def test_gauge(self, seed):
        """A R and R^-1 B make the same weight; R is a unit triangular integer matrix, so nothing is rounded."""
        _, A, B, _ = problem(seed, d=5, e=3, r=2)
        R, inverse = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1.0, -2.0], [0.0, 1.0]])
        assert np.array_equal(lora.delta(A @ R, inverse @ B, scale=1.0), lora.delta(A, B, scale=1.0))


def calls():
    """Every function that takes A (7, 3) and B (3, 11), as (name, call on A, B)."""
    W, _, _, G = problem(24)
    x, dy = np.ones((2, 7)), np.ones((2, 11))
    rate = {"scale": 1.0, "learning_rate": 0.1}
    new = problem(25)[1:3]
    return {
        "delta": lambda A, B: lora.delta(A, B, scale=1.0),
        "apply": lambda A, B: lora.apply(x, W, A, B, scale=1.0),
        "merge": lambda A, B: lora.merge(W, A, B, scale=1.0),
        "unmerge": lambda A, B: lora.unmerge(W, A, B, scale=1.0),
        "merge_symmetric": lambda A, B: lora.merge_symmetric(W, A, B, *new, scale=1.0),
        "gradients_dense": lambda A, B: lora.gradients_dense(G, A, B, scale=1.0),
        "gradients_factored": lambda A, B: lora.gradients_factored(x, dy, A, B, scale=1.0),
        "gradient_input": lambda A, B: lora.gradient_input(dy, W, A, B, scale=1.0),
        "update": lambda A, B: lora.update(A, B, *new, scale=1.0),
        "sgd": lambda A, B: lora.sgd(A, B, G, **rate),
        "sgd_update": lambda A, B: lora.sgd_update(A, B, G, **rate),
        "sgd_frozen": lambda A, B: lora.sgd_frozen(A, B, G, **rate),
        "random_projection_update": lambda A, B: lora.random_projection_update(G, A, B, learning_rate=0.1),
        "to_peft": lambda A, B: lora.to_peft(W, A, B),
    }


@pytest.mark.parametrize("name", sorted(calls()))
class TestErrors:
    def test_shapes(self, name):
        _, A, B, _ = problem(26)
        call = calls()[name]
        call(A, B)
        for bad_A, bad_B in ((A, B[:2]), (A[0], B), (A[:, :0], B[:0]), (A[None], B)):
            with pytest.raises(
                ShapeError, match=rf"^lora\.{name}: expected A \(d, r\), B \(r, e\).*received A of shape"
            ):
                call(bad_A, bad_B)
        if name != "delta":
            # Factors that fit each other, but nothing else.
            with pytest.raises(ShapeError, match=rf"^lora\.{name}: "):
                call(A[:5], B[:, :9])

    def test_values(self, name):
        _, A, B, _ = problem(27)
        for bad in (np.nan, np.inf):
            broken = A.copy()
            broken[3, 1] = bad
            with pytest.raises(
                DomainError, match=rf"^lora\.{name}: A must be finite, received {bad} at index \[3, 1\]"
            ):
                calls()[name](broken, B)
        with pytest.raises(DomainError, match="real numbers, received dtype complex128"):
            calls()[name](A, B * 1j)


def test_more_errors():
    W, A, B, G = problem(28)
    for function in (lora.delta, lora.sgd):
        arrays = (A, B) if function is lora.delta else (A, B, G)
        extra = {} if function is lora.delta else {"learning_rate": 0.1}
        with pytest.raises(DomainError, match="scale a finite number, received scale=inf"):
            function(*arrays, scale=float("inf"), **extra)
    with pytest.raises(DomainError, match=r"^lora\.delta: expected scale a finite number"):
        inspect.unwrap(lora.delta)(A, B, scale=None)
    with pytest.raises(DomainError, match="learning_rate >= 0, received learning_rate=-0.1"):
        lora.sgd(A, B, G, scale=1.0, learning_rate=-0.1)
    with pytest.raises(ShapeError, match=r"x \(..., d\) with d=7, received x of shape \(2, 11\)"):
        lora.apply(np.ones((2, 11)), W, A, B, scale=1.0)
    with pytest.raises(ShapeError, match=r"x \(..., d\) with d=7"):
        lora.apply(np.array(1.0), W, A, B, scale=1.0)
    with pytest.raises(ShapeError, match=r"dy \(..., e\) with e=11"):
        lora.gradient_input(np.ones((2, 7)), W, A, B, scale=1.0)
    with pytest.raises(ShapeError, match=r"equal leading axes, received x of shape \(2, 7\), dy of shape \(5, 11\)"):
        lora.gradients_factored(np.ones((2, 7)), np.ones((5, 11)), A, B, scale=1.0)
    with pytest.raises(ShapeError, match="new factors of the shapes of the old"):
        lora.update(A, B, A[:, :2], B[:2], scale=1.0)
    with pytest.raises(ShapeError, match=r"^lora\.merge_symmetric: "):
        lora.merge_symmetric(W, A, B, A[:5], B, scale=1.0)
    for bad_A, bad_G in ((A, G.T), (A[0], G), (A[:, :0], G)):
        with pytest.raises(ShapeError, match=r"^lora\.sgd_frozen_update: expected A \(d, r\) and G \(d, e\)"):
            lora.sgd_frozen_update(bad_A, bad_G, scale=1.0, learning_rate=0.1)
