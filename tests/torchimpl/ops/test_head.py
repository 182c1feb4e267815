"""Heads in torch: by hand, against plain loops over pairs of tokens, in 16 bits, under autograd and torch.compile."""

import cmath
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from refimpl.check import DomainError, ShapeError
from torchimpl.ops import head

INF = math.inf


def numbers(*shape, start=1):
    """Deterministic numbers in (-1, 1)."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(start, start + count, dtype=torch.float64) ** 1.3).reshape(shape)


# Two texts of five tokens of width 3, seven types; heads of width 6.
B, N, D, H, S = 2, 5, 3, 7, 6
X, POSITIONS = numbers(B, N, D), torch.arange(N)
MASK = torch.tensor([[True, True, True, False, True], [True, True, False, False, False]])
KERNEL, BIAS = numbers(D, 2 * H * S, start=50), numbers(2 * H * S, start=400)
SHARED, SHARED_BIAS = numbers(D, 2 * S, start=600), numbers(2 * S, start=700)
TYPES, TYPES_BIAS = numbers(2 * S, 2 * H, start=800), numbers(2 * H, start=1000)


def plain(x=X, mask=MASK, positions=POSITIONS, base=1e4):
    return head.global_pointer(x, KERNEL.to(x.dtype), BIAS.to(x.dtype), mask, positions, heads=H, base=base)


def efficient(x=X, mask=MASK, positions=POSITIONS, base=1e4):
    weights = (w.to(x.dtype) for w in (SHARED, SHARED_BIAS, TYPES, TYPES_BIAS))
    return head.efficient_global_pointer(x, *weights, mask, positions, base=base)


def rotated_product(q, k, p, r, base):
    """<R_p q, R_r k> as the real part of complex products, pair by pair."""
    total = 0.0
    for i in range(len(q) // 2):
        theta = base ** (-2 * i / len(q))
        turned = complex(*q[2 * i : 2 * i + 2]) * cmath.exp(1j * theta * (p - r))
        total += (turned * complex(*k[2 * i : 2 * i + 2]).conjugate()).real
    return total


def plain_by_loop(b, h, i, j, positions, base):
    z = (X[b] @ KERNEL + BIAS).tolist()
    start = 2 * S * h
    q, k = z[i][start : start + S], z[j][start + S : start + 2 * S]
    return rotated_product(q, k, positions[i], positions[j], base) / math.sqrt(S)


def efficient_by_loop(b, h, i, j, positions, base):
    z = X[b] @ SHARED + SHARED_BIAS
    t = (z @ TYPES + TYPES_BIAS).tolist()
    z = z.tolist()
    product = rotated_product(z[i][0::2], z[j][1::2], positions[i], positions[j], base) / math.sqrt(S)
    return product + (t[j][2 * h] + t[i][2 * h + 1]) / 2


POINTERS = [(plain, plain_by_loop), (efficient, efficient_by_loop)]


def test_classify_by_hand():
    kernel, bias = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), torch.tensor([0.5, 0.0, 0.25])
    got = head.classify(torch.tensor([[1.0, 2.0], [-4.0, 0.0]]), kernel, bias)
    assert got.tolist() == [[1.5, 2.0, 0.25], [-3.5, 0.0, -7.75]]
    assert head.classify(torch.tensor([1.0, 2.0]), kernel, bias).tolist() == [1.5, 2.0, 0.25]


def test_choose_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [1e9, 1e9]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    got = head.choose(x, torch.tensor([[10.0], [1.0]]), torch.tensor([0.5]), mask)
    assert got.tolist() == [[12.5, 34.5, -INF], [0.5, 10.5, 1.5]]


@pytest.mark.parametrize(("pointer", "by_loop"), POINTERS)
@pytest.mark.parametrize(("base", "positions"), [(1e4, [0, 1, 2, 3, 4]), (50.0, [9, 3, 4, 700, 1])])
def test_pointers_equal_the_loop(pointer, by_loop, base, positions):
    got = pointer(base=base, positions=torch.tensor(positions))
    assert got.shape == (B, H, N, N)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (B, H, N, N))).tolist():
        seen = bool(MASK[b, i] & MASK[b, j]) and i <= j
        expected = by_loop(b, h, i, j, positions, base) if seen else -INF
        assert got[b, h, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_global_pointer_by_hand():
    # Identity weights: the four features of a token are q = (x0, x1), k = (x2, x3). Token 1 is rotated by one radian.
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 3.0, 0.0]])
    seen = torch.ones(2, dtype=torch.bool)
    got = head.global_pointer(x, torch.eye(4), torch.zeros(4), seen, torch.arange(2), heads=1, base=10000.0)
    assert_close(got, torch.tensor([[[0.0, 3 * math.cos(1) / math.sqrt(2)], [-INF, 0.0]]]))


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
def test_positions_of_every_row_and_shapes(pointer, _):
    rows = torch.stack([POSITIONS, POSITIONS + 37])
    assert_close(pointer(positions=rows), pointer(), rtol=1e-12, atol=1e-12)
    assert pointer(x=X[:, :0], mask=MASK[:, :0], positions=POSITIONS[:0]).shape == (B, H, 0, 0)
    assert pointer(x=X[1], mask=MASK[1]).shape == (H, N, N)
    assert torch.equal(pointer(x=X[None], mask=MASK[None]), pointer()[None])


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
def test_masked_tokens_enter_nothing(pointer, _):
    assert torch.equal(pointer(x=torch.where(MASK[..., None], X, 1e5)), pointer())
    assert (pointer(mask=torch.zeros(B, N, dtype=torch.bool)) == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_beyond_float16_are_scores_within_it(dtype):
    # q = k = 120 in each of 64 features: the sum 921600 is beyond 65504, divided by sqrt(64) it is 115200 for bfloat16;
    # with 64 it is 262144 and 32768.
    for value in (64.0, 120.0) if dtype == torch.bfloat16 else (64.0,):
        z = torch.full((1, 1, 128), value, dtype=dtype)
        eye, seen = torch.eye(128, dtype=dtype), torch.ones(1, 1, dtype=torch.bool)
        got = head.global_pointer(
            z, eye, torch.zeros(128, dtype=dtype), seen, torch.zeros(1, dtype=int), heads=1, base=1e4
        )
        assert got.tolist() == [[[[torch.tensor(8 * value**2).to(dtype).item()]]]]
        assert got.dtype == dtype


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_close(pointer, _, dtype):
    got, exact = pointer(x=X.to(dtype)), pointer()
    assert got.dtype == dtype
    assert_close(got.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_gradients():
    def finite(scores):
        return scores.masked_fill(scores == -INF, 0)

    given = [t.requires_grad_() for t in (numbers(3, 2, 3), numbers(3, 8), numbers(8))]
    mask, positions = torch.tensor([[True, True], [False, True], [False, False]]), torch.tensor([1, 7])
    assert gradcheck(lambda *w: finite(head.global_pointer(*w, mask, positions, heads=2, base=50.0)), given)
    types = [t.requires_grad_() for t in (numbers(8, 6), numbers(6))]
    assert gradcheck(lambda *w: finite(head.efficient_global_pointer(*w, mask, positions, base=50.0)), given + types)
    assert gradcheck(head.classify, given)
    one = [numbers(3, 1).requires_grad_(), numbers(1).requires_grad_()]
    assert gradcheck(lambda *w: finite(head.choose(*w, mask)), (given[0], *one))


def test_the_loss_of_a_text_without_tokens_has_a_finite_gradient():
    x = X.clone().requires_grad_()
    scores = plain(x, torch.zeros(B, N, dtype=torch.bool)).flatten(-2)
    torch.logsumexp(torch.cat([scores, torch.zeros(B, H, 1)], dim=-1), dim=-1).sum().backward()
    assert (x.grad == 0).all()


def test_decode_by_hand():
    scores = torch.full((2, 3, 3), -INF, dtype=torch.float64)
    scores[0, 0, 2], scores[0, 1, 1], scores[0, 0, 0] = 3.0, 0.5, 0.0
    scores[1, 0, 1], scores[1, 2, 2], scores[1, 2, 0] = 1e-300, -1.0, 9.0
    assert head.decode_spans(scores, threshold=0.0).tolist() == [[0, 0, 2], [0, 1, 1], [1, 0, 1]]
    assert head.decode_spans(scores, threshold=0.5).tolist() == [[0, 0, 2]]
    assert len(head.decode_spans(scores, threshold=-1.5)) == 5
    for nothing in (torch.zeros(0, 3, 3), torch.zeros(2, 0, 0), scores[:, :0, :0]):
        assert head.decode_spans(nothing, threshold=0.0).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_threshold_is_not_rounded_to_the_format_of_the_scores(dtype):
    # 0.3 is no number of any format: its neighbours lie on both sides of it.
    near = torch.tensor([[[0.3]]], dtype=dtype)
    above = near.double().item() > 0.3
    assert len(head.decode_spans(near, threshold=0.3)) == above
    other = torch.nextafter(near, torch.full_like(near, -1.0 if above else 1.0))
    assert len(head.decode_spans(other, threshold=0.3)) == (not above)


@pytest.mark.parametrize("max_length", [1, 2, 3, 5, 50])
def test_best_span_equals_the_search(max_length):
    # Three levels, so that ties are common.
    scores = (numbers(17, 5, 5) * 1.5).round()
    spans = [(i, j) for i in range(5) for j in range(i, 5) if j - i + 1 <= max_length]
    got = head.best_span(scores, max_length=max_length)
    for b, matrix in enumerate(scores.tolist()):
        start, end = max(spans, key=lambda s: (matrix[s[0]][s[1]], -s[0], -s[1]))
        assert (got.start[b].item(), got.end[b].item(), got.score[b].item()) == (start, end, matrix[start][end])


def test_best_span_of_nothing_and_its_gradient():
    none = head.best_span(torch.full((2, 3, 3), -INF), max_length=3)
    assert none.start.tolist() == none.end.tolist() == [-1, -1] and none.score.tolist() == [-INF] * 2
    empty = head.best_span(torch.zeros(2, 0, 0), max_length=3)
    assert empty.start.tolist() == empty.end.tolist() == [-1, -1] and empty.score.tolist() == [-INF] * 2
    scores = torch.tensor([[1.0, 8.0, 9.0], [7.0, 8.0, 5.0], [99.0, 99.0, 5.0]], requires_grad=True)
    best = head.best_span(scores, max_length=2)
    assert (best.start.item(), best.end.item()) == (0, 1)
    best.score.backward()
    assert scores.grad.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_compiled_with_open_sizes_equals_eager():
    def best(scores):
        return tuple(head.best_span(scores, max_length=3))

    compiled = torch.compile(best, fullgraph=True, dynamic=True)
    for n in (5, 3):
        scores = (numbers(2, n, n) * 1.5).round()
        assert_close(compiled(scores), best(scores), rtol=0, atol=0)


ALL = (X, SHARED, SHARED_BIAS, TYPES, TYPES_BIAS, MASK, POSITIONS)


def efficient_with(place, value):
    return head.efficient_global_pointer(*ALL[:place], value, *ALL[place + 1 :], base=1e4)


def pointer_with(*, heads=H, **changed):
    given = {"x": X, "kernel": KERNEL, "bias": BIAS, "mask": MASK, "positions": POSITIONS} | changed
    return head.global_pointer(**given, heads=heads, base=1e4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: head.classify(X, KERNEL.T, BIAS), ShapeError, "head.classify: expected x"),
        (lambda: head.classify(X, KERNEL, BIAS[:1]), ShapeError, "head.classify: expected x"),
        (lambda: head.classify(X[0, 0, 0], KERNEL, BIAS), ShapeError, "head.classify: expected x"),
        (lambda: head.classify(X.long(), KERNEL, BIAS), DomainError, "x must be a floating tensor"),
        (lambda: head.choose(X, KERNEL[:, :2], BIAS[:2], MASK), ShapeError, "head.choose: expected"),
        (lambda: head.choose(X, KERNEL[:, :1], BIAS[:1], MASK[:, :4]), ShapeError, "head.choose: expected"),
        (lambda: head.choose(X, KERNEL[:, :1], BIAS[:1], MASK.long()), DomainError, "mask must be a boolean"),
        (lambda: pointer_with(mask=MASK[:, :4]), ShapeError, "head.global_pointer: expected x"),
        (lambda: pointer_with(positions=POSITIONS[:4]), ShapeError, "positions"),
        (lambda: pointer_with(positions=POSITIONS[:, None]), ShapeError, "positions"),
        (lambda: pointer_with(positions=POSITIONS.double()), DomainError, "positions must be a tensor of integers"),
        (lambda: pointer_with(mask=MASK.float()), DomainError, "mask must be a boolean tensor"),
        (lambda: pointer_with(kernel=KERNEL[:2]), ShapeError, "head.global_pointer: expected x"),
        (lambda: pointer_with(heads=0), DomainError, "heads >= 1, received heads=0"),
        (lambda: pointer_with(heads=14), DomainError, "even head size s >= 2, received width=84, heads=14"),
        (lambda: pointer_with(heads=5), DomainError, "width=84, heads=5"),
        (lambda: pointer_with(kernel=KERNEL[:, :0], bias=BIAS[:0]), DomainError, "received width=0"),
        (lambda: efficient_with(1, SHARED.T), ShapeError, "head.efficient_global_pointer: expected"),
        (lambda: efficient_with(3, TYPES[:3]), ShapeError, "head.efficient_global_pointer: expected"),
        (lambda: efficient_with(5, MASK[0]), ShapeError, "head.efficient_global_pointer: expected"),
        (
            lambda: head.efficient_global_pointer(
                X, SHARED[:, :6], SHARED_BIAS[:6], TYPES[:6], TYPES_BIAS, MASK, POSITIONS, base=1e4
            ),
            DomainError,
            "even head size s >= 2, received width=6",
        ),
        (
            lambda: head.efficient_global_pointer(
                X, SHARED, SHARED_BIAS, TYPES[:, :5], TYPES_BIAS[:5], MASK, POSITIONS, base=1e4
            ),
            DomainError,
            "type_kernel width 2 h, received width=5",
        ),
        (lambda: head.decode_spans(torch.zeros(3, 3), threshold=0.0), ShapeError, r"\(h, n, n\)"),
        (lambda: head.decode_spans(torch.zeros(2, 3, 5), threshold=0.0), ShapeError, r"\(2, 3, 5\)"),
        (lambda: head.decode_spans(torch.zeros(2, 3, 3), threshold=INF), DomainError, "a finite threshold"),
        (lambda: head.decode_spans(torch.zeros(2, 3, 3, dtype=int), threshold=0.0), DomainError, "floating"),
        (lambda: head.best_span(torch.zeros(3), max_length=1), ShapeError, "head.best_span: expected"),
        (lambda: head.best_span(torch.zeros(3, 5), max_length=1), ShapeError, "head.best_span: expected"),
        (lambda: head.best_span(torch.zeros(3, 3), max_length=0), DomainError, "max_length >= 1"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
