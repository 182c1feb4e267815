"""Expected span scores come from loops over complex numbers: rotating by an angle is multiplying by exp(i angle)."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import head

B, N, D, H, S = 2, 5, 3, 7, 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(B, N, D))
KERNEL, BIAS = RANDOM.normal(size=(D, 2 * H * S)), RANDOM.normal(size=2 * H * S)
SHARED, SHARED_BIAS = RANDOM.normal(size=(D, 2 * S)), RANDOM.normal(size=2 * S)
TYPES, TYPES_BIAS = RANDOM.normal(size=(2 * S, 2 * H)), RANDOM.normal(size=2 * H)
MASK = np.array([[True] * 5, [True, False, True, True, False]])
POSITIONS = np.arange(N)
ALL = np.ones((B, N), bool)


def _rotated_product(q: np.ndarray, k: np.ndarray, distance: int, base: float) -> float:
    theta = [base ** (-2 * i / len(q)) for i in range(len(q) // 2)]
    pairs = zip(q[0::2] + 1j * q[1::2], k[0::2] + 1j * k[1::2], theta, strict=True)
    return sum((a * np.conj(b) * np.exp(1j * distance * t)).real for a, b, t in pairs)


def _pointer_by_loop(x, mask, positions, base) -> np.ndarray:
    out = np.full((H, N, N), -np.inf)
    for h in range(H):
        for i in range(N):
            for j in range(i, N):
                if mask[i] and mask[j]:
                    q = (x[i] @ KERNEL + BIAS)[2 * S * h : 2 * S * h + S]
                    k = (x[j] @ KERNEL + BIAS)[2 * S * h + S : 2 * S * (h + 1)]
                    out[h, i, j] = _rotated_product(q, k, positions[i] - positions[j], base) / S**0.5
    return out


def _efficient_by_loop(x, mask, positions, base) -> np.ndarray:
    out = np.full((H, N, N), -np.inf)
    for i in range(N):
        for j in range(i, N):
            if mask[i] and mask[j]:
                zi, zj = x[i] @ SHARED + SHARED_BIAS, x[j] @ SHARED + SHARED_BIAS
                shared = _rotated_product(zi[0::2], zj[1::2], positions[i] - positions[j], base) / S**0.5
                ti, tj = zi @ TYPES + TYPES_BIAS, zj @ TYPES + TYPES_BIAS
                for h in range(H):
                    out[h, i, j] = shared + tj[2 * h] / 2 + ti[2 * h + 1] / 2
    return out


def _pointer(x=X, mask=MASK, positions=POSITIONS, base=10000.0, heads=H) -> np.ndarray:
    return head.global_pointer(x, KERNEL, BIAS, mask, positions, heads=heads, base=base)


def _efficient(x=X, mask=MASK, positions=POSITIONS, base=10000.0) -> np.ndarray:
    args = (x, SHARED, SHARED_BIAS, TYPES, TYPES_BIAS, mask, positions)
    return head.efficient_global_pointer(*args, base=base)


POINTERS = [(_pointer, _pointer_by_loop), (_efficient, _efficient_by_loop)]


def test_classify_by_hand() -> None:
    kernel, bias = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), np.array([0.5, 0.0, 0.25])
    assert head.classify(np.array([[1.0, 2.0], [-4.0, 0.0]]), kernel, bias).tolist() == [
        [1.5, 2.0, 0.25],
        [-3.5, 0.0, -7.75],
    ]
    assert head.classify(np.array([1.0, 2.0]), kernel, bias).tolist() == [1.5, 2.0, 0.25]


def test_choose_by_hand() -> None:
    x = np.array([[[1.0, 2.0], [3.0, 4.0], [1e9, 1e9]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    mask = np.array([[True, True, False], [True, True, True]])
    out = head.choose(x, np.array([[10.0], [1.0]]), np.array([0.5]), mask)
    assert out.tolist() == [[12.5, 34.5, -np.inf], [0.5, 10.5, 1.5]]
    assert (head.choose(x, np.ones((2, 1)), np.zeros(1), np.zeros((2, 3), bool)) == -np.inf).all()


@pytest.mark.parametrize(("pointer", "by_loop"), POINTERS)
def test_pointer_equals_the_loop(pointer, by_loop) -> None:
    for base, positions in [(10000.0, POSITIONS), (50.0, np.array([9, 3, 4, 700, 1]))]:
        expected = np.stack([by_loop(X[b], MASK[b], positions, base) for b in range(B)])
        np.testing.assert_allclose(pointer(base=base, positions=positions), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pointer", "by_loop"), POINTERS)
def test_positions_may_differ_by_row(pointer, by_loop) -> None:
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    expected = np.stack([by_loop(X[b], MASK[b], positions[b], 10000.0) for b in range(B)])
    np.testing.assert_allclose(pointer(positions=positions), expected, rtol=1e-12, atol=1e-12)


def test_global_pointer_by_hand() -> None:
    # Identity weights: the four features of a token are q = (x0, x1), k = (x2, x3). Token 1 is rotated by one radian.
    x = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 3.0, 0.0]])
    out = head.global_pointer(x, np.eye(4), np.zeros(4), np.ones(2, bool), np.arange(2), heads=1, base=10000.0)
    root = np.sqrt(2)
    # <(1, 0), (0, 1)>; <(1, 0), (3 cos 1, 3 sin 1)>; <(0, 2), (3, 0)>.
    np.testing.assert_allclose(out, [[[0.0, 3 * np.cos(1) / root], [-np.inf, 0.0]]], atol=1e-15)


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
@given(shift=st.integers(-50, 5000))
def test_shifting_all_positions_changes_nothing(pointer, _, shift: int) -> None:
    np.testing.assert_allclose(pointer(positions=POSITIONS + 50 + shift), pointer(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
def test_mask_and_triangle(pointer, _) -> None:
    out = pointer()
    finite = MASK[:, None, :, None] & MASK[:, None, None, :] & np.triu(np.ones((N, N), bool))
    assert (np.isfinite(out) == finite).all() and (out[~np.isfinite(out)] == -np.inf).all()
    changed = X.copy()
    changed[~MASK] = 1e5
    assert (pointer(x=changed) == out).all()
    assert (pointer(mask=np.zeros((B, N), bool)) == -np.inf).all()


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
def test_removing_padding_changes_nothing(pointer, _) -> None:
    kept = pointer(x=X[:, :3], mask=ALL[:, :3], positions=np.arange(3))
    padded = pointer(mask=np.array([[True, True, True, False, False]] * B))
    np.testing.assert_allclose(padded[..., :3, :3], kept, rtol=1e-13)


@pytest.mark.parametrize(("pointer", "_"), POINTERS)
def test_empty_and_leading_axes(pointer, _) -> None:
    empty = pointer(x=X[:, :0], mask=MASK[:, :0], positions=np.arange(0))
    assert empty.shape == (B, H, 0, 0)
    assert pointer(x=X[:0], mask=MASK[:0]).shape == (0, H, N, N)
    single = pointer(x=X[1, :1], mask=ALL[1, :1], positions=np.array([7]))
    assert single.shape == (H, 1, 1)
    np.testing.assert_allclose(single[:, 0, 0], pointer()[1, :, 0, 0], rtol=1e-12)
    assert pointer(x=X[None], mask=MASK[None]).shape == (1, B, H, N, N)


def test_arguments_are_left_alone() -> None:
    x, mask, positions = X.copy(), MASK.copy(), POSITIONS.copy()
    _pointer(x, mask, positions)
    _efficient(x, mask, positions)
    head.choose(x, KERNEL[:, :1], BIAS[:1], mask)
    assert (x == X).all() and (mask == MASK).all() and (positions == np.arange(N)).all()


def test_decode_by_hand() -> None:
    scores = np.full((2, 3, 3), -np.inf)
    scores[0, 0, 2], scores[0, 1, 1], scores[0, 0, 0] = 3.0, 0.5, 0.0
    scores[1, 0, 1], scores[1, 2, 2], scores[1, 2, 0] = 1e-300, -1.0, 9.0
    assert head.decode_spans(scores, threshold=0.0).tolist() == [[0, 0, 2], [0, 1, 1], [1, 0, 1]]
    assert head.decode_spans(scores, threshold=0.5).tolist() == [[0, 0, 2]]
    assert head.decode_spans(scores, threshold=-1.5).tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 1], [1, 0, 1], [1, 2, 2]]


def test_decode_of_nothing() -> None:
    for scores in (np.full((2, 3, 3), -np.inf), np.zeros((0, 3, 3)), np.zeros((2, 0, 0))):
        out = head.decode_spans(scores, threshold=0.0)
        assert out.shape == (0, 3) and out.dtype == np.int64


@given(seed=st.integers(0, 999), max_length=st.integers(1, 7), levels=st.integers(1, 4))
def test_best_span_equals_the_search(seed: int, max_length: int, levels: int) -> None:
    # Few levels, so that ties are common.
    scores = np.random.default_rng(seed).integers(0, levels, size=(5, 5)).astype(np.float64)
    spans = [(i, j) for i in range(5) for j in range(i, 5) if j - i + 1 <= max_length]
    start, end = max(spans, key=lambda span: (scores[span], -span[0], -span[1]))
    out = head.best_span(scores, max_length=max_length)
    assert (int(out.start), int(out.end), float(out.score)) == (start, end, scores[start, end])


def test_best_span_by_hand() -> None:
    scores = np.array([[1.0, 8.0, 9.0], [7.0, 2.0, 5.0], [99.0, 99.0, 5.0]])
    for max_length, expected in [(1, (2, 2, 5.0)), (2, (0, 1, 8.0)), (3, (0, 2, 9.0)), (50, (0, 2, 9.0))]:
        assert tuple(map(float, head.best_span(scores, max_length=max_length))) == expected
    # Equal scores: the smallest start, then the smallest end.
    assert tuple(map(int, head.best_span(np.ones((3, 3)), max_length=2))) == (0, 0, 1)
    tied = np.array([[0.0, 4.0, 4.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    assert tuple(map(int, head.best_span(tied, max_length=3))) == (0, 1, 4)


@pytest.mark.filterwarnings("error")
def test_best_span_of_nothing_and_in_batches() -> None:
    none = head.best_span(np.full((2, 3, 3), -np.inf), max_length=3)
    assert none.start.tolist() == none.end.tolist() == [-1, -1] and none.score.tolist() == [-np.inf] * 2
    empty = head.best_span(np.zeros((2, 0, 0)), max_length=3)
    assert empty.start.tolist() == empty.end.tolist() == [-1, -1] and empty.score.tolist() == [-np.inf] * 2
    # A score out of reach is no answer.
    far = np.full((3, 3), -np.inf)
    far[0, 2] = 5.0
    assert int(head.best_span(far, max_length=2).start) == -1
    out = head.best_span(np.stack([far, np.where(np.eye(3), -3.0, far)]), max_length=3)
    assert [part.tolist() for part in out] == [[0, 0], [2, 2], [5.0, 5.0]]
    assert out.start.dtype == out.end.dtype == np.int64


def test_refuses_shapes() -> None:
    raises = [
        (head.classify, (X, KERNEL.T, BIAS), {}),
        (head.classify, (X, KERNEL, BIAS[:1]), {}),
        (head.classify, (np.array(1.0), KERNEL, BIAS), {}),
        (head.choose, (X, KERNEL[:, :2], BIAS[:2], MASK), {}),
        (head.choose, (X, KERNEL[:, :1], BIAS[:1], MASK[:, :4]), {}),
        (head.choose, (X[0, 0], KERNEL[:, :1], BIAS[:1], np.array(True)), {}),
        (head.global_pointer, (X, KERNEL, BIAS, MASK[:, :4], POSITIONS), {"heads": H, "base": 1e4}),
        (head.global_pointer, (X, KERNEL, BIAS, MASK, POSITIONS[:4]), {"heads": H, "base": 1e4}),
        (head.global_pointer, (X, KERNEL, BIAS, MASK, POSITIONS[:, None]), {"heads": H, "base": 1e4}),
        (head.global_pointer, (X, KERNEL[:2], BIAS, MASK, POSITIONS), {"heads": H, "base": 1e4}),
        (head.decode_spans, (np.zeros((3, 3)),), {"threshold": 0.0}),
        (head.decode_spans, (np.zeros((2, 3, 5)),), {"threshold": 0.0}),
        (head.best_span, (np.zeros(3),), {"max_length": 1}),
        (head.best_span, (np.zeros((3, 5)),), {"max_length": 1}),
    ]
    for function, args, named in raises:
        with pytest.raises(ShapeError, match=rf"head.{function.__name__}: expected .*, received .* of shape"):
            unwrap(function)(*args, **named)
    shared = (X, SHARED, SHARED_BIAS, TYPES, TYPES_BIAS, MASK, POSITIONS)
    for place, bad in [(1, SHARED.T), (2, SHARED_BIAS[:1]), (3, TYPES[:3]), (4, TYPES_BIAS[:1]), (5, MASK[0])]:
        args = list(shared)
        args[place] = bad
        with pytest.raises(ShapeError, match="head.efficient_global_pointer: expected .* of shape"):
            head.efficient_global_pointer(*args, base=1e4)


def test_refuses_values() -> None:
    for heads in (0, -1):
        with pytest.raises(DomainError, match=f"head.global_pointer: expected heads >= 1, received heads={heads}"):
            _pointer(heads=heads)
    # 84 features make 14 heads of size 3, which cannot be rotated in pairs, and no whole number of 5 heads.
    for heads in (14, 5):
        with pytest.raises(DomainError, match=f"even head size s >= 2, received width=84, heads={heads}"):
            _pointer(heads=heads)
    with pytest.raises(DomainError, match="even head size s >= 2, received width=0"):
        head.global_pointer(X, KERNEL[:, :0], BIAS[:0], MASK, POSITIONS, heads=1, base=1e4)
    for width in (0, 6):
        with pytest.raises(DomainError, match=f"head.efficient_global_pointer: .*even head size .*width={width}"):
            args = (X, SHARED[:, :width], SHARED_BIAS[:width], TYPES[:width], TYPES_BIAS, MASK, POSITIONS)
            head.efficient_global_pointer(*args, base=1e4)
    for width in (0, 3):
        with pytest.raises(DomainError, match=f"head.efficient_global_pointer: .*type_kernel width 2 h.*width={width}"):
            args = (X, SHARED, SHARED_BIAS, TYPES[:, :width], TYPES_BIAS[:width], MASK, POSITIONS)
            head.efficient_global_pointer(*args, base=1e4)
    for pointer, _ in POINTERS:
        with pytest.raises(DomainError, match="mask must be boolean"):
            pointer(mask=MASK.astype(np.int64))
        with pytest.raises(DomainError, match="positions must be integers"):
            pointer(positions=POSITIONS.astype(np.float64))
        with pytest.raises(DomainError, match="x must be finite"):
            pointer(x=X * np.inf)
        with pytest.raises(DomainError, match="base"):
            pointer(base=0.0)
    with pytest.raises(DomainError, match="head.choose: mask must be boolean"):
        head.choose(X, KERNEL[:, :1], BIAS[:1], MASK.astype(np.float32))
    for bad in (np.nan, np.inf):
        for call in (
            lambda bad=bad: head.decode_spans(np.full((2, 3, 3), bad), threshold=0.0),
            lambda bad=bad: head.best_span(np.diag([0.0, bad, 0.0]), max_length=2),
        ):
            with pytest.raises(
                DomainError, match=f"expected scores without NaN and below .inf, received largest={bad}"
            ):
                call()
        with pytest.raises(DomainError, match="head.decode_spans: expected a finite threshold"):
            head.decode_spans(np.zeros((1, 2, 2)), threshold=bad)
    with pytest.raises(DomainError, match="head.best_span: expected max_length >= 1, received max_length=0"):
        head.best_span(np.zeros((2, 2)), max_length=0)
