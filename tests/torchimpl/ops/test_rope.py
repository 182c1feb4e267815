"""RoPE in torch against figures of Hugging Face transformers, 50-digit arithmetic, hand calculation, autograd."""

import mpmath
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from conformance.budget import Arithmetic, Profile, cos, sin
from conformance.ops import rope as judged
from refimpl.check import DomainError, ShapeError
from tests.golden import collection
from torchimpl.ops import rope

ROTATIONS = [rope.rotate_interleaved, rope.rotate_half_split, rope.rotate_proportional]


def numbers(*shape, dtype=torch.float64):
    """Deterministic numbers in (-1, 1)."""
    count = int(np.prod(shape))
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.3).reshape(shape).to(dtype)


def angles_of(positions, width, base=10000.0):
    return rope.angles(torch.as_tensor(positions), rope.frequencies(width, base=base))


def close(found, expected, **tolerance):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, **({"atol": 1e-14} | tolerance))


# Frequencies


def test_frequencies_by_hand():
    close(rope.frequencies(6, base=1000.0), [1.0, 0.1, 0.01])
    assert rope.frequencies(2, base=7.0).tolist() == [1.0]
    assert rope.frequencies(0, base=7.0).shape == (0,)
    assert rope.frequencies(4, base=7.0).dtype == torch.float64
    close(rope.frequencies_linear(6, base=1000.0, factor=4.0), [0.25, 0.025, 0.0025])
    # base 10, width 6: the new base is 10 * 8^(6/4).
    expected = [1.0, 10 ** (-1 / 3) / 8**0.5, 10 ** (-2 / 3) / 8]
    close(rope.frequencies_ntk(6, base=10.0, factor=8.0), expected)
    assert rope.frequencies_ntk(0, base=10.0, factor=8.0).shape == (0,)


def test_dynamic_ntk():
    # transformers 5.23.0 in float32.
    got = rope.frequencies_dynamic_ntk(10, base=10000.0, factor=2.0, length=192, max_length=64)
    close(
        got, [1.0, 0.10598819702863693, 0.011233496479690075, 0.0011906177969649434, 0.00012619145854841918], atol=1e-7
    )
    for length in (1, 64):
        got = rope.frequencies_dynamic_ntk(10, base=10000.0, factor=1.1, length=length, max_length=64)
        assert torch.equal(got, rope.frequencies(10, base=10000.0))


def test_yarn():
    # transformers 5.23.0 in float32.
    got = rope.frequencies_yarn(16, base=1e4, factor=4.0, original_length=1024, beta_fast=32.0, beta_slow=1.0)
    expected = [1.0, 0.31622776389, 0.0812500044703, 0.0197642371058]
    expected += [0.0043750000186, 7.905694656e-4, 2.5e-4, 7.9056947e-5]
    close(got, expected, atol=1e-7)
    # original_length below one turn: a step after index 0.
    got = rope.frequencies_yarn(16, base=1e4, factor=4.0, original_length=5, beta_fast=32.0, beta_slow=1.0)
    close(got, torch.cat([torch.ones(1), rope.frequencies(16, base=1e4)[1:] / 4]))
    assert rope.yarn_magnitude(4.0) == pytest.approx(1.138629436111989, rel=1e-15)
    assert rope.yarn_magnitude(1.0) == rope.yarn_magnitude(0.25) == 1.0


# Angles


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16])
def test_angles_are_float64_whatever_the_positions_are(dtype):
    got = rope.angles(torch.tensor([[3, -2], [0, 4]], dtype=dtype), torch.tensor([1.0, 0.25]))
    assert got.dtype == torch.float64
    assert got.tolist() == [[[3, 0.75], [-2, -0.5]], [[0, 0], [4, 1]]]
    assert rope.angles(torch.zeros(2, 0, dtype=torch.int64), torch.ones(3)).shape == (2, 0, 3)


def test_angles_go_to_the_device_of_the_positions():
    assert angles_of(torch.zeros(3, dtype=torch.int64, device="meta"), 10).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_billion_tokens_in(dtype):
    """Against 50 digits: the rotation is as good at the last int32 as at position 1."""
    mpmath.mp.dps = 50
    last = 2**31 - 1
    phi = [last * mpmath.power(10000, mpmath.mpf(-2 * i) / 6) for i in range(3)]
    x = torch.tensor([1.0, 0.0] * 3, dtype=dtype)
    got = rope.rotate_interleaved(x, angles_of(last, 6))
    expected = torch.tensor([float(part) for angle in phi for part in (mpmath.cos(angle), mpmath.sin(angle))])
    assert_close(got.float(), expected, rtol=0, atol=2e-6 + torch.finfo(dtype).eps / 2)


# Rotations


@pytest.mark.parametrize("name", ["llama_basic", "llama_gqa_offset", "gptj_full", "gptj_partial_offset"])
@pytest.mark.parametrize("part", ["q", "k"])
def test_rotations_equal_transformers(name, part):
    case = collection.load("hf_rotary", name)
    x, expected, positions = case[part], case[f"{part}_out_float64"], case["position_ids"]
    if name.startswith("llama"):
        # The library puts heads before tokens.
        x, expected = x.swapaxes(1, 2), expected.swapaxes(1, 2)
        rotate, layout, width = rope.rotate_half_split, "half_split", x.shape[-1]
    else:
        rotate, layout, width = rope.rotate_interleaved, "interleaved", int(case["rotary_dim"])
    phi = angles_of(positions, width, float(case["theta"]))[..., None, :]
    close(rope.rotate_contiguous(torch.tensor(x), phi, rotate), expected, atol=1e-13)
    if width == x.shape[-1]:
        close(rotate(torch.tensor(x), phi), expected, atol=1e-13)
    # In float32, and there within what the judge permits.
    arithmetic = Arithmetic(Profile("float32", "strict", "A64"))
    places = {"layout": layout, "rotary_width": width}
    bound = judged.rotate(arithmetic, arithmetic.exact(x), positions[..., None], float(case["theta"]), **places)
    found = rope.rotate_contiguous(torch.tensor(x).float(), phi, rotate)
    assert found.dtype == torch.float32
    assert np.max(np.abs(found.double().numpy() - expected) / bound.finished().rad) < 1
    # Theirs was made in float32 throughout, angles too, and may err as well.
    theirs = case[f"{part}_out"].swapaxes(1, 2) if name.startswith("llama") else case[f"{part}_out"]
    arithmetic = Arithmetic(Profile("float32", "strict", "A32"))
    bound = judged.rotate(arithmetic, arithmetic.exact(x), positions[..., None], float(case["theta"]), **places)
    assert np.max(np.abs(found.double().numpy() - theirs) / bound.finished().rad) < 2


@pytest.mark.parametrize("name", ["llama_basic", "llama_gqa_offset", "gptj_full", "gptj_partial_offset"])
def test_tables_of_transformers_err_from_ours_as_float32_may(name):
    case = collection.load("hf_rotary", name)
    llama, theta = name.startswith("llama"), float(case["theta"])
    width = case["q"].shape[-1] if llama else int(case["rotary_dim"])
    arithmetic = Arithmetic(Profile("float32", "strict", "A32"))

    def within(found, expected, ball):
        assert np.max(np.abs(found.numpy() - expected) / ball.finished().rad) < 1

    phi = judged.angle(arithmetic, case["position_ids"], judged.powers(width, theta))
    ours = angles_of(case["position_ids"], width, theta)
    within(ours.cos(), case["cos"][..., : width // 2], cos(phi))
    within(ours.sin(), case["sin"][..., : width // 2], sin(phi))
    if llama:
        within(rope.frequencies(width, base=theta), case["inv_freq"], judged.frequencies(arithmetic, width, theta))


def test_quarter_and_half_turns_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0], dtype=torch.float64)
    phi = torch.tensor([np.pi / 2, np.pi, 0.0], dtype=torch.float64)
    close(rope.rotate_interleaved(x, phi), [-2.0, 1.0, -3.0, -5.0, 7.0, 11.0])
    close(rope.rotate_half_split(x, phi), [-5.0, -2.0, 3.0, 1.0, -7.0, 11.0])
    close(rope.rotate_proportional(x, phi[:2]), [-5.0, -2.0, 3.0, 1.0, -7.0, 11.0])
    close(rope.rotate_proportional(x, phi[:1]), [-5.0, 2.0, 3.0, 1.0, 7.0, 11.0])
    close(rope.rotate_contiguous(x, phi[:2], rope.rotate_interleaved), [-2.0, 1.0, -3.0, -5.0, 7.0, 11.0])
    close(rope.rotate_contiguous(x, phi[:2], rope.rotate_half_split), [-3.0, -2.0, 1.0, -5.0, 7.0, 11.0])
    # An odd rest passes through.
    close(rope.rotate_contiguous(x[:5], phi[:1], rope.rotate_half_split), [-2.0, 1.0, 3.0, 5.0, 7.0])


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_position_zero_width_zero_and_no_tokens_change_nothing(rotate, dtype):
    x = numbers(2, 3, 10, dtype=dtype)
    assert torch.equal(rotate(x, angles_of([0, 0, 0], 10)), x)
    assert rotate(x, angles_of([1, 2, 3], 10)).dtype == dtype
    assert rotate(x[..., :0], angles_of([1, 2, 3], 0)).shape == (2, 3, 0)
    assert rotate(x[:, :0], angles_of(torch.zeros(0, dtype=torch.int64), 10)).shape == (2, 0, 10)


def test_arguments_are_left_alone():
    x, phi = numbers(3, 10), angles_of([1, 2, 3], 10)
    for rotate in ROTATIONS:
        rotate(x, phi)
    assert torch.equal(x, numbers(3, 10)) and torch.equal(phi, angles_of([1, 2, 3], 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotate", ROTATIONS)
def test_sixteen_bits_are_rounded_once(rotate, dtype):
    """No more than half a unit from the rotation in float64, also where the two products nearly cancel."""
    x, phi = numbers(257, 14, dtype=dtype), angles_of(torch.arange(257) * 4099, 14)
    got, exact = rotate(x, phi).double(), rotate(x.double(), phi)
    assert ((got - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_gradients(rotate):
    x, phi = numbers(2, 3, 1, 6).requires_grad_(), angles_of([[0, 1, 700]], 6)[..., None, :].requires_grad_()
    assert gradcheck(rotate, (x, phi))


def test_gradients_of_partial_rotations():
    x, phi = numbers(3, 11).requires_grad_(), angles_of([0, 1, 700], 6).requires_grad_()
    assert gradcheck(lambda x, phi: rope.rotate_contiguous(x, phi, rope.rotate_half_split), (x, phi))
    assert gradcheck(rope.rotate_proportional, (numbers(3, 10).requires_grad_(), phi))
    positions = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p: rope.angles(p, rope.frequencies(6, base=100.0)), (positions,))


def test_compiled_with_open_sizes_equals_eager():
    def rotated(x, positions):
        phi = rope.angles(positions, rope.frequencies(10, base=10000.0))[..., None, :]
        return rope.rotate_contiguous(x, phi, rope.rotate_interleaved)

    compiled = torch.compile(rotated, fullgraph=True, dynamic=True)
    for n in (5, 7):
        x, positions = numbers(2, n, 3, 13, dtype=torch.bfloat16), torch.arange(n) * 1009
        assert_close(compiled(x, positions), rotated(x, positions), rtol=0, atol=0)


# Layouts


def test_orders_by_hand():
    assert rope.half_split_order(6).tolist() == [0, 2, 4, 1, 3, 5]
    assert rope.interleaved_order(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert rope.half_split_order(0).tolist() == rope.interleaved_order(0).tolist() == []
    assert (rope.half_split_order(26)[rope.interleaved_order(26)] == torch.arange(26)).all()


def test_half_split_of_permuted_features_is_the_permuted_interleaved_rotation():
    x, phi, order = numbers(3, 14), angles_of([0, 5, 77], 14), rope.half_split_order(14)
    assert torch.equal(rope.rotate_half_split(x[:, order], phi), rope.rotate_interleaved(x, phi)[:, order])


@pytest.mark.parametrize("order", [[0, 2, 1, 3], rope.half_split_order(4)], ids=["numbers", "tensor"])
def test_permute_projection_by_hand(order):
    # Two heads of width 5, rotary width 4: feature 4 of each head stays.
    weight = torch.arange(10.0) + torch.tensor([[0.0], [100.0], [200.0]])
    got = rope.permute_projection(weight, heads=2, order=order)
    assert got[0].tolist() == [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]
    assert got[2].tolist() == [200, 202, 201, 203, 204, 205, 207, 206, 208, 209]
    assert rope.permute_projection(weight[0], heads=2, order=order).tolist() == got[0].tolist()
    assert rope.permute_projection(weight, heads=5, order=[]).tolist() == weight.tolist()


def test_permute_gau_by_hand():
    # Two columns of gates, then s = 5 shared features of which four are rotated.
    w_in = torch.arange(7.0) + torch.tensor([[0.0], [10.0]])
    gamma = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    got = rope.permute_gau(w_in, w_in[0], gamma, -gamma, s=5, order=[0, 2, 1, 3])
    assert got.w_in.tolist() == [[0, 1, 2, 4, 3, 5, 6], [10, 11, 12, 14, 13, 15, 16]]
    assert got.b_in.tolist() == [0, 1, 2, 4, 3, 5, 6]
    assert got.gamma.tolist() == [[1, 3, 2, 4, 5], [6, 8, 7, 9, 10]]
    assert got.beta.tolist() == [[-1, -3, -2, -4, -5], [-6, -8, -7, -9, -10]]
    without = rope.permute_gau(w_in, None, gamma, None, s=5, order=[0, 2, 1, 3])
    assert without.b_in is without.beta is None
    assert torch.equal(without.w_in, got.w_in)


# Errors

X, PHI, W = torch.ones(5, 10), torch.zeros(5, 5), torch.ones(3, 12)
YARN = {"base": 1e4, "factor": 4.0, "original_length": 1024, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope.frequencies(5, base=1e4), DomainError, "rope.frequencies: expected an even rotary width"),
        (lambda: rope.frequencies(-2, base=1e4), DomainError, "width=-2"),
        (lambda: rope.frequencies(4.0, base=1e4), DomainError, "width=4.0"),
        (lambda: rope.frequencies(4, base=0.0), DomainError, "base > 0"),
        (lambda: rope.frequencies(4, base=float("nan")), DomainError, "base=nan"),
        (lambda: rope.frequencies_linear(4, base=1e4, factor=0.0), DomainError, "factor > 0"),
        (lambda: rope.frequencies_ntk(2, base=1e4, factor=2.0), DomainError, "0 or at least 4"),
        (lambda: rope.frequencies_ntk(4, base=1e4, factor=float("inf")), DomainError, "factor=inf"),
        (
            lambda: rope.frequencies_dynamic_ntk(4, base=1e4, factor=2.0, length=0, max_length=8),
            DomainError,
            "length > 0",
        ),
        (lambda: rope.frequencies_yarn(8, **(YARN | {"base": 1.0})), DomainError, "base > 1"),
        (lambda: rope.frequencies_yarn(8, **(YARN | {"beta_fast": 0.5})), DomainError, "beta_fast >= beta_slow"),
        (lambda: rope.frequencies_yarn(8, **(YARN | {"original_length": 0})), DomainError, "original_length > 0"),
        (lambda: rope.yarn_magnitude(-1.0), DomainError, "factor > 0"),
        (lambda: rope.angles([1, 2], torch.ones(3)), DomainError, "positions must be a tensor"),
        (lambda: rope.angles(torch.ones(2, dtype=torch.bool), torch.ones(3)), DomainError, "torch.bool"),
        (lambda: rope.angles(torch.arange(2), torch.arange(3)), DomainError, "frequencies must be a floating tensor"),
        (lambda: rope.angles(torch.arange(2), torch.ones(3, 1)), ShapeError, r"frequencies of shape \(r,\)"),
        (lambda: rope.rotate_interleaved(torch.arange(10), PHI), DomainError, "x must be a floating tensor"),
        (lambda: rope.rotate_interleaved(X, PHI.long()), DomainError, "angles must be a floating tensor"),
        (lambda: rope.rotate_interleaved(X[:, :9], PHI), ShapeError, "an even rotary width"),
        (lambda: rope.rotate_half_split(X, PHI[:, :4]), ShapeError, r"d/2 pairs.*\(5, 10\).*\(5, 4\)"),
        (lambda: rope.rotate_half_split(X, PHI[:2]), ShapeError, "insert the head axis"),
        (lambda: rope.rotate_half_split(X[:1], PHI), ShapeError, "insert the head axis"),
        (lambda: rope.rotate_half_split(X[0], PHI), ShapeError, "insert the head axis"),
        (lambda: rope.rotate_half_split(torch.tensor(1.0), PHI), ShapeError, "x of shape"),
        (lambda: rope.rotate_proportional(X, torch.zeros(5, 6)), ShapeError, "at most d/2 pairs"),
        (
            lambda: rope.rotate_contiguous(X, torch.zeros(5, 6), rope.rotate_half_split),
            ShapeError,
            "at least 2r features",
        ),
        (lambda: rope.half_split_order(3), DomainError, "rope.half_split_order: expected an even"),
        (lambda: rope.interleaved_order(-2), DomainError, "rope.interleaved_order: expected an even"),
        (lambda: rope.permute_projection(W, heads=0, order=[0]), DomainError, "heads >= 1"),
        (lambda: rope.permute_projection(W, heads=5, order=[0]), ShapeError, "5 equal heads"),
        (lambda: rope.permute_projection(torch.tensor(1.0), heads=1, order=[0]), ShapeError, "1 equal heads"),
        (lambda: rope.permute_projection(W, heads=6, order=[0, 2, 1]), ShapeError, "at most 2 indices"),
        (lambda: rope.permute_projection(W, heads=2, order=[0, 2]), DomainError, r"permutation of 0 ... 1"),
        (lambda: rope.permute_projection(W, heads=2, order=[[0, 1]]), DomainError, "permutation"),
        (lambda: rope.permute_projection(W, heads=2, order=torch.eye(2)), DomainError, "order must be a tensor of int"),
        (
            lambda: rope.permute_projection(W, heads=2, order=torch.eye(2).long()),
            ShapeError,
            "an order of at most 6 indices",
        ),
        (lambda: rope.permute_gau(W, None, W[:, :5], None, s=5, order=[0, 1, 2, 3, 4, 5]), ShapeError, "at most 5"),
        (lambda: rope.permute_gau(W, None, W[:, :4], None, s=5, order=[0]), ShapeError, "gamma with 5 features"),
        (lambda: rope.permute_gau(W[:, :3], None, W[:, :5], None, s=5, order=[0]), ShapeError, "w_in with at least 5"),
        (lambda: rope.permute_gau(W, W[0, :3], W[:, :5], None, s=5, order=[0]), ShapeError, "b_in of shape"),
        (lambda: rope.permute_gau(W, None, W[:, :5], W[0, :5], s=5, order=[0]), ShapeError, "beta of shape"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
