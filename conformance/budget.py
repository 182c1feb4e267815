"""How far a right implementation may be from the formula: ball arithmetic over a declared precision.

A Ball is a value with a radius. Operator references are written once, in Balls: the midpoint is the formula
(50 decimal digits when the vectors are built, float64 when a law runs), the radius is what every permitted order
of evaluation in the declared precision may do to it. So the expected value and its bound come from one derivation,
which shares no line with the NumPy specification.

Rules (u unit roundoff, gamma_k(u) = k u / (1 - k u), eta half the spacing of the subnormals):
a rounded operation adds u |y| + eta; a contraction over L roundings adds gamma_L(u) G, G being the same contraction
over magnitudes; a quotient whose divisor is uncertain by half or more, an overflow, or a logarithm that reaches zero
has an infinite radius: that element is unverifiable.
Source: Higham, Accuracy and Stability of Numerical Algorithms, chapters 2-4; Blanchard, Higham and Higham,
Accurately computing the log-sum-exp and softmax functions (2021), for softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import mpmath
import numpy as np

DTYPES = ("float64", "float32", "float16", "bfloat16")
PROFILES = ("strict", "fused", "eager")

# Significand bits (with the hidden one) and smallest normal exponent of each storage format.
_SIGNIFICAND = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_MIN_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}
_LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
}

# A libm-class function (exp, log, sin, tanh, erf, pow) may be off by 4 ulp = 8 u.
LIBM = 8

# 50 decimal digits: products of a few float64 numbers and all our functions with room to spare.
MP = mpmath.MPContext()
MP.dps = 50


def unit_roundoff(dtype: str) -> float:
    """u = 2^-p for a format with p significand bits."""
    return 2.0 ** -_SIGNIFICAND[dtype]


@lru_cache
def half_subnormal(dtype: str) -> float:
    """eta: the largest absolute error of a rounding that underflows (for float64 the smallest double, twice that)."""
    return 2.0 ** max(_MIN_EXPONENT[dtype] - _SIGNIFICAND[dtype], -1074)


def largest(dtype: str) -> float:
    """The largest finite number of the format."""
    return _LARGEST[dtype]


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` (float64) correctly rounded, half to even, to `dtype`, as float64; overflow gives infinity."""
    values = np.asarray(values, np.float64)
    if dtype == "float64":
        return values.copy()
    bits, low = _SIGNIFICAND[dtype], _MIN_EXPONENT[dtype]
    _, exponent = np.frexp(values)
    quantum = np.ldexp(1.0, np.maximum(exponent - bits, low - bits + 1))
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.where(np.isfinite(values), np.rint(values / quantum) * quantum, values)
    return np.where(np.isfinite(rounded) & (np.abs(rounded) > _LARGEST[dtype]), np.copysign(np.inf, values), rounded)


@dataclass(frozen=True)
class Profile:
    """What an implementation declares about its arithmetic; every bound is a function of it.

    dtype: the storage format of inputs and outputs. 16-bit formats accumulate in float32.
    name: which intermediates may be rounded to the storage format besides the output:
      strict none; fused those the reference marks with `stored`; eager every elementary operation.
    angle: A64 (angles exact to float64, any position) or A32 (float32 angles, positions below 2^17).
    """

    dtype: str
    name: str = "strict"
    angle: str = "A32"

    def __post_init__(self) -> None:
        for value, known in ((self.dtype, DTYPES), (self.name, PROFILES), (self.angle, ("A64", "A32"))):
            if value not in known:
                raise ValueError(f"Profile: expected one of {', '.join(known)}, received {value!r}")

    @cached_property
    def storage(self) -> float:
        return unit_roundoff(self.dtype)

    @cached_property
    def working(self) -> str:
        """The format of accumulators: 16-bit formats accumulate in float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def elementary(self) -> str:
        """The format that holds the result of an elementary operation."""
        return self.dtype if self.name == "eager" and self.sixteen_bit else self.working

    @cached_property
    def accumulate(self) -> float:
        return unit_roundoff(self.working)

    @cached_property
    def angle_unit(self) -> float:
        """u of an angle: float64 for the float64 class and A64, float32 for A32."""
        return unit_roundoff("float64" if self.dtype == "float64" or self.angle == "A64" else "float32")

    @cached_property
    def sixteen_bit(self) -> bool:
        return self.dtype in ("float16", "bfloat16")

    def __str__(self) -> str:
        return f"{self.dtype}-{self.name}"


@dataclass(frozen=True)
class Arithmetic:
    """The first argument of every reference: makes Balls from arrays, for one profile.

    digits: True for 50-digit midpoints (slow, for the vectors), False for float64 midpoints (for laws).
    """

    profile: Profile
    digits: bool = False

    def exact(self, values: Any) -> Ball:
        """A Ball of radius 0; `values` is an array, a number or a Ball (returned as it is).

        A number is a constant of the formula: it has a radius where no format of the profile holds it exactly.
        """
        if isinstance(values, Ball):
            return values
        array = np.asarray(values)
        if array.dtype != object:
            array = array.astype(np.float64)
            if self.digits:
                array = _mp(MP.mpf, array)
        if isinstance(values, (int, float)):
            return Ball(array, np.array(_constant(float(values), self.profile.working, self.profile.elementary)), self)
        return _unchecked(array, np.zeros(array.shape), self)

    def ball(self, middle: Any, radius: Any) -> Ball:
        """A Ball with a radius derived by hand; both broadcast."""
        made = self.exact(middle)
        return Ball(made.mid, np.broadcast_to(np.asarray(radius, np.float64), made.mid.shape).copy(), self)

    @cached_property
    def unit(self) -> float:
        """Roundoff of intermediates; float64 midpoints add the error of the reference itself."""
        return self.profile.accumulate + (0.0 if self.digits else 2.0**-53)


@lru_cache(maxsize=1024)
def _constant(value: float, *formats: str) -> float:
    """What writing a number in the working format, and if eager in the storage format, does to it."""
    lost = [f for f in set(formats) if round_to(np.asarray(value), f) != value]
    if any(abs(value) > largest(f) for f in lost):
        return float("inf")
    return sum(unit_roundoff(f) * abs(value) + half_subnormal(f) for f in lost)


def gamma(length: float | np.ndarray, unit: float) -> Any:
    """gamma_k(u) = k u / (1 - k u), infinite from k u = 1/2 on."""
    if isinstance(length, (int, float)):
        # The same without an array: most lengths are one number.
        return length * unit / (1.0 - length * unit) if length * unit < 0.5 else math.inf
    product = np.asarray(length, np.float64) * unit
    return np.where(product < 0.5, product / np.where(product < 0.5, 1.0 - product, 1.0), np.inf)


def _mp(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply an mpmath function elementwise, always returning an object array."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def _float(middle: np.ndarray) -> np.ndarray:
    return np.asarray(middle, np.float64)


class Ball:
    """An array of midpoints with radii. `mid` is float64 or object (mpf); `rad` is float64 of the same shape."""

    __slots__ = ("arithmetic", "mid", "rad")
    # ndarray operators must defer to Ball's reflected ones.
    __array_ufunc__ = None

    def __init__(self, mid: np.ndarray, rad: np.ndarray, arithmetic: Arithmetic) -> None:
        # NumPy turns results of shape () into scalars.
        self.mid, self.rad, self.arithmetic = np.asarray(mid), np.asarray(rad), arithmetic
        if not (self.rad >= 0).all():
            if (self.rad < 0).any():
                raise ValueError("Ball: a radius is negative")
            # 0 * inf and inf - inf: nothing is known.
            self.rad = np.where(np.isnan(self.rad), np.inf, self.rad)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mid.shape

    @property
    def ndim(self) -> int:
        return self.mid.ndim

    @property
    def value(self) -> np.ndarray:
        """The midpoint as float64, correctly rounded."""
        return self.mid.astype(np.float64)

    @property
    def magnitude(self) -> np.ndarray:
        """An upper bound of the absolute value."""
        return np.asarray(np.abs(_float(self.mid)) + self.rad)

    def _like(self, mid: np.ndarray, rad: np.ndarray) -> Ball:
        return Ball(mid, rad, self.arithmetic)

    def _moved(self, mid: np.ndarray, rad: np.ndarray) -> Ball:
        return _unchecked(np.asarray(mid), np.asarray(rad), self.arithmetic)

    def _coerce(self, other: Any) -> Ball:
        return self.arithmetic.exact(other)

    # Exact data movement: the same move on midpoint and radius.
    def __getitem__(self, index: Any) -> Ball:
        return self._moved(self.mid[index], self.rad[index])

    def reshape(self, *shape: int) -> Ball:
        return self._moved(self.mid.reshape(*shape), self.rad.reshape(*shape))

    def transpose(self, *axes: int) -> Ball:
        return self._moved(self.mid.transpose(*axes), self.rad.transpose(*axes))

    def swapaxes(self, one: int, two: int) -> Ball:
        return self._moved(self.mid.swapaxes(one, two), self.rad.swapaxes(one, two))

    def broadcast_to(self, shape: Sequence[int]) -> Ball:
        return self._moved(np.broadcast_to(self.mid, shape), np.broadcast_to(self.rad, shape))

    def __neg__(self) -> Ball:
        return self._moved(-self.mid, self.rad)

    def __abs__(self) -> Ball:
        return self._moved(np.abs(self.mid), self.rad)

    # Rounded elementary operations.
    def __add__(self, other: Any) -> Ball:
        other = self._coerce(other)
        return _rounded(self.mid + other.mid, self.rad + other.rad, self.arithmetic)

    def __sub__(self, other: Any) -> Ball:
        return self + (-self._coerce(other))

    def __rsub__(self, other: Any) -> Ball:
        return self._coerce(other) - self

    def __mul__(self, other: Any) -> Ball:
        other = self._coerce(other)
        rad = self.rad * other.magnitude + np.abs(self.value) * other.rad
        return _rounded(self.mid * other.mid, rad, self.arithmetic)

    def __truediv__(self, other: Any) -> Ball:
        """a / b; the radius is infinite where b is uncertain by half of itself (0/0 included)."""
        other = self._coerce(other)
        divisor, zero = np.abs(other.value), other.mid == 0
        safe = np.where(zero, self._coerce(1.0).mid, other.mid)
        mid = self.mid / safe
        lost = zero | (other.rad >= divisor / 2)
        gap = np.where(lost, 1.0, divisor - other.rad)
        rad = np.where(lost, np.inf, (self.rad + np.abs(_float(mid)) * other.rad) / gap)
        return _rounded(mid, rad, self.arithmetic)

    def __rtruediv__(self, other: Any) -> Ball:
        return self._coerce(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Any) -> Ball:
        other = self._coerce(other)
        if self.ndim == 1 and other.ndim == 1:
            return einsum("i,i->", self, other)
        if other.ndim == 1:
            return einsum("...i,i->...", self, other)
        if self.ndim == 1:
            return einsum("i,...ij->...j", self, other)
        return einsum("...ij,...jk->...ik", self, other)

    def sum(self, axis: int | tuple[int, ...] = -1, *, keepdims: bool = False) -> Ball:
        """Sum in any order over `axis`."""
        axes = tuple(a % self.ndim for a in ((axis,) if isinstance(axis, int) else axis))
        count = int(np.prod([self.shape[a] for a in axes]))
        mid = self.mid.sum(axis=axes, keepdims=keepdims) if count else self._empty_sum(axes, keepdims)
        mid = np.asarray(mid, dtype=self.mid.dtype)
        rad = np.asarray(self.rad.sum(axis=axes, keepdims=keepdims))
        total = np.asarray(self.magnitude.sum(axis=axes, keepdims=keepdims))
        return _contracted(mid, rad, total, max(count - 1, 0), 1, self.arithmetic)

    def _empty_sum(self, axes: tuple[int, ...], keepdims: bool) -> np.ndarray:
        return self._coerce(np.zeros(self.mid.shape).sum(axis=axes, keepdims=keepdims)).mid

    def mean(self, axis: int = -1, *, keepdims: bool = False) -> Ball:
        return self.sum(axis, keepdims=keepdims) / float(self.shape[axis])

    def rounded(self, roundings: int) -> Ball:
        """The value after more roundings of the working precision, which another form of the formula makes."""
        return self._like(self.mid, self.rad + gamma(roundings, self.arithmetic.unit) * self.magnitude)

    def stored(self) -> Ball:
        """An intermediate that a fused 16-bit kernel may keep in the storage format: one more rounding there."""
        profile = self.arithmetic.profile
        if profile.name != "fused" or not profile.sixteen_bit:
            return self
        rad = self.rad + _storage_rounding(self.magnitude, profile)
        return self._like(self.mid, _within(np.abs(_float(self.mid)), rad, profile.dtype))

    def finished(self) -> Ball:
        """The output: one rounding to the storage format; infinite radius where that overflows."""
        profile = self.arithmetic.profile
        rad = self.rad + _storage_rounding(self.magnitude, profile)
        return self._like(self.mid, _within(np.abs(_float(self.mid)), rad, profile.dtype))


def _unchecked(mid: np.ndarray, rad: np.ndarray, arithmetic: Arithmetic) -> Ball:
    """A Ball whose radii need no second look: zeros, or those of another Ball."""
    made = Ball.__new__(Ball)
    made.mid, made.rad, made.arithmetic = mid, rad, arithmetic
    return made


def _within(size: np.ndarray, rad: np.ndarray, dtype: str) -> np.ndarray:
    """The radius, infinite where a number of the ball may overflow the format; `size` is the midpoint's magnitude."""
    lost = size + rad > largest(dtype)
    return np.where(lost, np.inf, rad) if lost.any() else np.asarray(rad)


def _storage_rounding(magnitude: np.ndarray, profile: Profile) -> np.ndarray:
    return profile.storage * magnitude + half_subnormal(profile.dtype)


def _rounded(mid: np.ndarray, rad: np.ndarray, arithmetic: Arithmetic, roundings: Any = 1) -> Ball:
    """One elementary result: `roundings` units of the working precision, one of the storage format if eager."""
    profile = arithmetic.profile
    size = np.abs(_float(mid))
    magnitude = size + rad
    with np.errstate(invalid="ignore", over="ignore"):
        rad = rad + gamma(roundings, arithmetic.unit) * magnitude + half_subnormal(profile.working)
        if profile.elementary != profile.working:
            rad = rad + _storage_rounding(magnitude, profile)
        rad = _within(size, rad, profile.elementary)
    return Ball(mid, rad, arithmetic)


def _contracted(
    mid: np.ndarray, rad: np.ndarray, total: np.ndarray, length: int, products: int, arithmetic: Arithmetic
) -> Ball:
    """A sum of products: gamma_length of the magnitudes; eager stores each pairwise contraction once."""
    profile = arithmetic.profile
    with np.errstate(invalid="ignore", over="ignore"):
        rad = rad + gamma(length, arithmetic.unit) * total
        rad = rad + length * half_subnormal(profile.working)
        if profile.elementary != profile.working:
            rad = rad + products * _storage_rounding(total, profile)
        # A partial sum may be as large as the sum of the magnitudes; what is stored is the whole.
        rad = np.where(total > largest(profile.working), np.inf, _within(np.abs(_float(mid)), rad, profile.elementary))
    return Ball(mid, rad, arithmetic)


def einsum(subscripts: str, *operands: Any, length: int | None = None) -> Ball:
    """A contraction in any order and any nesting.

    length: the longest chain of roundings from an input to the output over all permitted orders; without it,
    the number of terms (contracted axes may be flattened into one) plus the number of multiplications. Give it where
    the orders are known: nested, chunked or recurrent ones (T + d + 4 for linear attention, one more per chunk).
    """
    arithmetic = next(o.arithmetic for o in operands if isinstance(o, Ball))
    balls = [arithmetic.exact(o) for o in operands]
    inputs, output = subscripts.split("->")
    if length is None:
        sizes: dict[str, int] = {}
        for term, ball in zip(inputs.split(","), balls, strict=True):
            for letter, size in _sizes(term, ball.shape):
                # An axis of size 1 broadcasts.
                sizes[letter] = max(size, sizes.get(letter, 0))
        length = math.prod(size for letter, size in sizes.items() if letter not in output) + len(balls) - 1
    magnitudes = [b.magnitude for b in balls]
    total = _plain(subscripts, magnitudes)
    rad = np.zeros_like(total)
    for i, ball in enumerate(balls):
        if ball.rad.any():
            rad = rad + _plain(subscripts, [*magnitudes[:i], ball.rad, *magnitudes[i + 1 :]])
    mid = _plain(subscripts, [b.mid for b in balls])
    return _contracted(mid, rad, total, length, max(len(balls) - 1, 1), arithmetic)


def begun(start: Ball, product: Ball, terms: int) -> Ball:
    """start + product, where the sum of `terms` products may begin with start, as in GEMM.

    The start then passes every addition; that shows where it outweighs the products.
    """
    made = start + product
    extra = gamma(terms, made.arithmetic.unit) * start.magnitude
    return Ball(made.mid, made.rad + np.broadcast_to(extra, made.shape), made.arithmetic)


def affine(x: Ball, w: Ball, b: Ball | None) -> Ball:
    """x w + b, a dense layer."""
    product = einsum("...i,io->...o", x, w, length=w.shape[0] + 2)
    return product if b is None else begun(b, product, w.shape[0] + 1)


def _sizes(term: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    letters = term.replace("...", "")
    return list(zip(letters, shape[len(shape) - len(letters) :], strict=True))


def _plain(subscripts: str, arrays: list[np.ndarray]) -> np.ndarray:
    if arrays[0].dtype == object:
        # NumPy returns 0 (an int) for empty object contractions; keep mpf throughout.
        made = np.einsum(subscripts, *arrays, optimize=len(arrays) > 2)
        return _mp(MP.mpf, np.asarray(made, dtype=object))
    # Of two arrays there is one order; of more, looking for it costs more than following it.
    path = _path(subscripts, *(a.shape for a in arrays)) if len(arrays) > 2 else False
    return np.asarray(np.einsum(subscripts, *arrays, optimize=path))


@lru_cache(maxsize=1024)
def _path(subscripts: str, *shapes: tuple[int, ...]) -> Any:
    """The order in which einsum contracts arrays of these shapes."""
    return np.einsum_path(subscripts, *(np.broadcast_to(0.0, shape) for shape in shapes), optimize="greedy")[0]


def where(condition: np.ndarray, one: Any, other: Any) -> Ball:
    """Exact selection; `condition` is a plain boolean array."""
    arithmetic = next(o.arithmetic for o in (one, other) if isinstance(o, Ball))
    one, other = arithmetic.exact(one), arithmetic.exact(other)
    return Ball(np.where(condition, one.mid, other.mid), np.where(condition, one.rad, other.rad), arithmetic)


def concatenate(balls: Sequence[Ball], axis: int = -1) -> Ball:
    """Exact concatenation."""
    mid = np.concatenate([b.mid for b in balls], axis=axis)
    return Ball(mid, np.concatenate([b.rad for b in balls], axis=axis), balls[0].arithmetic)


def stack(balls: Sequence[Ball], axis: int = 0) -> Ball:
    """Exact stacking."""
    mid = np.stack([b.mid for b in balls], axis=axis)
    return Ball(mid, np.stack([b.rad for b in balls], axis=axis), balls[0].arithmetic)


def _smooth(
    x: Ball, exactly: Callable[[Any], Any], fast: Callable[[Any], Any], slope: np.ndarray, curvature: float
) -> Ball:
    """A function with |f'| = slope at the midpoint and |f''| <= curvature everywhere."""
    mid = _mp(exactly, x.mid) if x.mid.dtype == object else np.asarray(fast(x.mid))
    rad = slope * x.rad + curvature / 2 * x.rad**2
    return _rounded(mid, rad, x.arithmetic, LIBM)


def exp(x: Ball) -> Ball:
    mid = _mp(MP.exp, x.mid) if x.mid.dtype == object else np.exp(x.mid)
    with np.errstate(over="ignore"):
        rad = _float(mid) * np.expm1(x.rad)
    return _rounded(mid, rad, x.arithmetic, LIBM)


def log(x: Ball) -> Ball:
    """Natural logarithm; infinite radius where the ball touches zero."""
    lost = x.rad >= x.value
    safe = np.where(lost, x._coerce(1.0).mid, x.mid)
    mid = _mp(MP.log, safe) if safe.dtype == object else np.log(safe)
    with np.errstate(invalid="ignore", divide="ignore"):
        rad = np.where(lost, np.inf, -np.log1p(-np.where(lost, 0.0, x.rad / np.where(lost, 1.0, x.value))))
    return _rounded(mid, rad, x.arithmetic, LIBM)


def sqrt(x: Ball) -> Ball:
    mid = _mp(MP.sqrt, x.mid) if x.mid.dtype == object else np.sqrt(x.mid)
    root = _float(mid)
    rad = np.where(root > 0, x.rad / np.where(root > 0, root, 1.0), np.sqrt(x.rad))
    return _rounded(mid, rad, x.arithmetic)


def power(x: Ball, exponent: float) -> Ball:
    """x ** exponent for x >= 0; implementations may go through exp(exponent * log x)."""
    value, profile, unit = x.value, x.arithmetic.profile, x.arithmetic.unit
    mid = _mp(lambda v: MP.power(v, MP.mpf(exponent)), x.mid) if x.mid.dtype == object else value**exponent
    positive = value > 0
    part = np.where(positive, x.rad / np.where(positive, value, 1.0), 0.0)
    # Of the argument of exp, relative: the logarithm, the product, the exponent as a constant.
    coarse = (LIBM + 2) * unit + (2 * profile.storage if profile.elementary != profile.working else 0.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        relative = np.where(part < 1, np.expm1(-abs(exponent) * np.log1p(-np.minimum(part, 0.999999))), np.inf)
        relative = relative + np.expm1(coarse * np.abs(exponent * np.log(np.where(positive, value, 1.0))))
        at_zero = x.rad**exponent if exponent > 0 else np.where(x.rad > 0, np.inf, 0.0) if exponent else 0.0
        rad = np.where(positive, _float(mid) * relative, at_zero)
    return _rounded(mid, rad, x.arithmetic, LIBM)


def sin(x: Ball) -> Ball:
    return _capped(_smooth(x, MP.sin, np.sin, np.abs(np.cos(x.value)), 1.0), 2.0)


def cos(x: Ball) -> Ball:
    return _capped(_smooth(x, MP.cos, np.cos, np.abs(np.sin(x.value)), 1.0), 2.0)


def _capped(x: Ball, limit: float) -> Ball:
    return Ball(x.mid, np.where(np.isfinite(x.rad), np.minimum(x.rad, limit), np.inf), x.arithmetic)


def tanh(x: Ball) -> Ball:
    return _smooth(x, MP.tanh, np.tanh, 1 - np.tanh(x.value) ** 2, 0.77)


def sigmoid(x: Ball) -> Ball:
    value = _logistic(x.value)
    made = _smooth(x, lambda v: 1 / (1 + MP.exp(-v)), _logistic, value * (1 - value), 0.1)
    return _by_exponential(x, made, product=False)


def silu(x: Ball) -> Ball:
    """x sigmoid(x), as one function: forming it as a product would count x twice."""
    value = _logistic(x.value)
    slope = np.abs(value * (1 + x.value * (1 - value)))
    made = _smooth(x, lambda v: v / (1 + MP.exp(-v)), lambda v: v * _logistic(v), slope, 0.5)
    return _by_exponential(x, made, product=True)


def _logistic(value: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-value)) in float64; (1 + tanh) / 2 would cancel for negative values."""
    small = np.exp(-np.abs(value))
    return np.asarray(np.where(value >= 0, 1.0, small) / (1.0 + small))


def _by_exponential(x: Ball, made: Ball, *, product: bool) -> Ball:
    """1 / (1 + exp(-x)), or the product of x with it: three or four roundings more than a libm function.

    The quotient may underflow before the product, and where exp(-x) overflows the result is 0.
    """
    profile = x.arithmetic.profile
    rad = made.rad
    if profile.elementary != profile.working:
        # Two roundings to the storage format are counted already; the exponential's counts by its share of the sum.
        rad = rad + profile.storage * made.magnitude * (1 - _logistic(x.value - x.rad) + product)
    if product:
        rad = rad + x.magnitude * half_subnormal(profile.elementary)
    made = _rounded(made.mid, rad, x.arithmetic, 4)
    overflows = x.rad - x.value > math.log(largest(profile.elementary))
    return Ball(made.mid, np.where(overflows, np.maximum(made.rad, np.abs(made.value)), made.rad), x.arithmetic)


def erf(x: Ball) -> Ball:
    from scipy.special import erf as fast_erf

    slope = 2 / np.sqrt(np.pi) * np.exp(-(x.value**2))
    made = _smooth(x, MP.erf, fast_erf, slope, 0.97)
    return made


def relu(x: Ball) -> Ball:
    """max(x, 0): exact, and 0 for certain where the whole ball is negative."""
    keep = x.value > 0
    zero = x._coerce(0.0).mid
    return Ball(np.where(keep, x.mid, zero), np.where(x.value + x.rad > 0, x.rad, 0.0), x.arithmetic)


def softmax(scores: Ball, mask: np.ndarray) -> Ball:
    """Masked softmax over the last axis; masked weights and fully masked rows are exactly 0.

    Relative radius of a weight: expm1(2 max e) + 2 u (|a| + |max a|) + gamma_(n+6)(u) + 16 u (two exponentials), e the
    radius of the visible scores; |a| of the weight itself, or of the mean weight in the sum if that is larger. The
    magnitudes, not their difference: exp2(a c - max a c) and exp(a - logsumexp) round before they subtract.
    """
    mask = np.broadcast_to(mask, scores.shape)
    weights, distance = _softmax(scores, mask)
    error = np.where(mask, scores.rad, 0.0).max(axis=-1, keepdims=True, initial=0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        rad = _weight_roundings(weights, np.expm1(2 * error), distance, mask, scores.arithmetic)
    return Ball(weights, rad, scores.arithmetic)


def _softmax(scores: Ball, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The midpoints of the weights, and the magnitudes by whose size an exponential is off."""
    visible = mask.any(axis=-1, keepdims=True)
    value = np.where(mask, scores.value, -np.inf)
    with np.errstate(invalid="ignore"):
        top = np.where(visible, value.max(axis=-1, keepdims=True, initial=-np.inf), 0.0)
        distance = np.where(mask, np.abs(value) + np.abs(top), 0.0)
    zero = scores._coerce(0.0).mid
    shifted = np.where(mask, scores.mid - np.where(visible, scores._coerce(top).mid, zero), zero)
    weights = _mp(MP.exp, shifted) if shifted.dtype == object else np.exp(shifted)
    weights = np.where(mask, weights, zero)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(visible, total, scores._coerce(1.0).mid)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.maximum(distance, (_float(weights) * distance).sum(axis=-1, keepdims=True))
    return np.asarray(weights), distance


def _weight_roundings(
    weights: np.ndarray, moved: Any, distance: np.ndarray, mask: np.ndarray, arithmetic: Arithmetic
) -> np.ndarray:
    """The radius of softmax weights: `moved`, relative, by the scores, and what their formation rounds."""
    profile, unit = arithmetic.profile, arithmetic.unit
    if profile.elementary != profile.working:
        unit = unit + profile.storage
    relative = moved + np.expm1(2 * unit * distance) + gamma(weights.shape[-1] + 6, arithmetic.unit)
    if profile.elementary != profile.working:
        relative = relative + 4 * profile.storage
    relative = relative + 2 * LIBM * arithmetic.unit
    # An unnormalised weight may underflow before the division; the sum is at least 1.
    rad = _float(weights) * relative + half_subnormal(profile.working) * 2
    if profile.elementary != profile.working:
        rad = rad + 2 * half_subnormal(profile.dtype)
    return np.where(mask, rad, 0.0)


def softmax_mean(scores: Ball, error: np.ndarray, mask: np.ndarray, values: Ball) -> np.ndarray:
    """A radius of the mean of values by softmax weights, (..., n, m) and (..., m, e): weights move together.

    Let w be the weights of the midpoints, o = sum w_j v_j, and let an implementation hold scores off by d_j and values
    off by f_j, |d_j| <= error_j up to one number for all keys of a query, |f_j| <= r_j. As sum w_j (v_j - o) = 0,

        o' - o = sum w_j (exp(d_j) - 1) (v_j - o) / z + sum w_j exp(d_j) f_j / z,    z = sum w_j exp(d_j),

    without remainder; magnitudes give the radius, with z at least sum w_j exp(-error_j). To that comes what rounds at
    the scores and values that are held, where a weight is at most w_j exp(error_j) / z. An exponential rounds by the
    size of its score, which counts with all that it is off.
    """
    a, mask = scores.arithmetic, np.broadcast_to(mask, scores.shape)
    still = softmax(a.ball(scores.mid, 0.0), mask)
    o, error = still @ a.ball(values.mid, 0.0), np.where(mask, error, 0.0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        least = (np.maximum(still.value - still.rad, 0.0) * np.exp(-error)).sum(axis=-1, keepdims=True)
        least = np.where(mask.any(axis=-1, keepdims=True), least, 1.0)
        moved, v = still.magnitude * np.expm1(error), values.value
        away = [np.abs(v[..., None, :, i] - o.value[..., i, None]) for i in range(v.shape[-1])]
        first = np.stack([(moved * part).sum(axis=-1) for part in away], axis=-1) + moved.sum(-1, keepdims=True) * o.rad
        most = still.magnitude * np.exp(error) / least
        rad = first / least + most @ values.rad
        worst, off = (np.where(mask, e, 0.0).max(axis=-1, keepdims=True, initial=0.0) for e in (error, scores.rad))
        distance = np.exp(2 * worst) * (_softmax(scores, mask)[1] + 2 * off)
        held = a.ball(most, _weight_roundings(most, 0.0, distance, mask, a)).stored()
        rad = rad + (held @ a.exact(values.magnitude)).rad
    return np.where(np.isnan(rad), np.inf, rad)
