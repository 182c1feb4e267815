"""Judging rope: frequencies and their scalings, angles, the four rotations, permutations between the layouts.

Rotations take x (b, n, h, d), positions (n,) or (b, n) and the base: an implementation forms its own angles, so that
their precision is judged as well. rotary_width counts the features that turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import MP, Arithmetic, Ball, Profile, concatenate, cos, round_to, sin
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import rope

ROTATIONS = ("rope.rotate_interleaved", "rope.rotate_half_split", "rope.rotate_contiguous", "rope.rotate_proportional")
PARTIAL = ROTATIONS[2:]


# What is called: positions and base enter, so that the precision of the angles is judged as well.
def layouts(of: Package) -> dict[str, Function]:
    """The rotations of whole vectors that a case may name."""
    return {"interleaved": of.rope.rotate_interleaved, "half_split": of.rope.rotate_half_split}


def _angles(positions: Any, width: int, base: float, of: Package = SPEC) -> Any:
    return of.rope.angles(positions, of.rope.frequencies(width, base=base))[..., None, :]


def _rotate_interleaved(x: Any, positions: Any, base: float, *, of: Package = SPEC) -> Any:
    return of.rope.rotate_interleaved(x, _angles(positions, x.shape[-1], base, of))


def _rotate_half_split(x: Any, positions: Any, base: float, *, of: Package = SPEC) -> Any:
    return of.rope.rotate_half_split(x, _angles(positions, x.shape[-1], base, of))


def _rotate_contiguous(
    x: Any, positions: Any, base: float, rotary_width: int, layout: str, *, of: Package = SPEC
) -> Any:
    return of.rope.rotate_contiguous(x, _angles(positions, rotary_width, base, of), layouts(of)[layout])


def _rotate_proportional(x: Any, positions: Any, base: float, rotary_width: int, *, of: Package = SPEC) -> Any:
    return of.rope.rotate_proportional(x, _angles(positions, x.shape[-1], base, of)[..., : rotary_width // 2])


# References.
@lru_cache(maxsize=256)
def powers(width: int, base: float) -> tuple[Any, ...]:
    """base^(-2i/width) for i < width/2, to 50 digits."""
    return tuple(MP.power(MP.mpf(base), MP.mpf(-2 * i) / width) for i in range(width // 2))


def _positive(a: Arithmetic, exact: Sequence[Any], steps: Any) -> Ball:
    """Positive numbers known to 50 digits, with `steps` relative roundings."""
    digits = np.empty(len(exact), dtype=object)
    digits[:] = list(exact)
    value = digits.astype(np.float64)
    return a.ball(digits if a.digits else value, np.asarray(steps) * a.unit * value)


def _steps(theta: Any) -> np.ndarray:
    """4 (1 + |ln θ|): θ may be formed as exp(-i ln base), whose argument carries an absolute error."""
    return 4 * (1 + np.abs(np.log(np.array([float(t) for t in theta]))))


def frequencies(a: Arithmetic, width: int, base: float) -> Ball:
    """base^(-2i/width)."""
    theta = powers(width, base)
    return _positive(a, theta, _steps(theta))


def frequencies_linear(a: Arithmetic, width: int, base: float, factor: float) -> Ball:
    """base^(-2i/width) / factor."""
    theta = powers(width, base)
    return _positive(a, [t / MP.mpf(factor) for t in theta], _steps(theta) + 1)


def frequencies_ntk(a: Arithmetic, width: int, base: float, factor: float) -> Ball:
    """base^(-2i/width) factor^(-2i/(width-2))."""
    theta = [t * MP.power(MP.mpf(factor), MP.mpf(-2 * i) / (width - 2)) for i, t in enumerate(powers(width, base))]
    return _positive(a, theta, _steps(theta) + _steps(powers(width, base)))


def frequencies_dynamic_ntk(
    a: Arithmetic, width: int, base: float, factor: float, length: int, max_length: int
) -> Ball:
    """frequencies_ntk at 1 + factor (length - max_length) / max_length, at 1 up to max_length."""
    grown = 1 + MP.mpf(factor) * max(length - max_length, 0) / max_length
    theta = [t * MP.power(grown, MP.mpf(-2 * i) / (width - 2)) for i, t in enumerate(powers(width, base))]
    # factor length/max_length - (factor - 1) cancels.
    cancelled = 3 * (factor * length / max_length + abs(factor - 1)) / float(grown)
    return _positive(a, theta, _steps(theta) + _steps(powers(width, base)) + cancelled)


def frequencies_yarn(
    a: Arithmetic, width: int, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Ball:
    """θ (m + (1 - m) / factor), m falling from 1 at lo to 0 at hi."""

    def index(turns: float) -> Any:
        """Where a pair turns `turns` times within the original length: 2 π turns = original_length θ_i."""
        return MP.log(original_length / (2 * MP.pi * MP.mpf(turns))) / MP.log(MP.mpf(base)) * width / 2

    lo, hi = max(int(MP.floor(index(beta_fast))), 0), min(int(MP.ceil(index(beta_slow))), width - 1)
    mixed = []
    for i, theta in enumerate(powers(width, base)):
        # A ramp without extent is a step after lo.
        m = MP.mpf(1) if i <= lo else MP.mpf(0) if i >= hi else MP.mpf(hi - i) / (hi - lo)
        mixed.append(theta * (m + (1 - m) / MP.mpf(factor)))
    return _positive(a, mixed, _steps(powers(width, base)) + 8 * max(1.0, 1 / factor))


def yarn_magnitude(a: Arithmetic, factor: float) -> Ball:
    """1 + ln(factor) / 10, not below 1."""
    return _positive(a, [1 + max(MP.log(MP.mpf(factor)), MP.mpf(0)) / 10], 6)[0]


def angles(a: Arithmetic, positions: Any, frequencies: Ball) -> Ball:
    """The outer product of positions and frequencies."""
    return a.exact(positions)[..., None] * frequencies


def angle(a: Arithmetic, positions: np.ndarray, theta: Sequence[Any]) -> Ball:
    """p θ_i with the radius of the declared angle class, 4 (1 + |ln θ_i|) u_θ |p θ_i|; never rounded to 16 bits."""
    positions = np.asarray(positions)
    digits = np.empty(len(theta), dtype=object)
    digits[:] = list(theta)
    value = positions[..., None] * digits.astype(np.float64)
    exact = positions[..., None].astype(object) * digits if a.digits else value
    unit = a.profile.angle_unit + (0.0 if a.digits else 2.0**-53)
    return a.ball(exact, np.minimum(2.0, _steps(theta) * unit * np.abs(value)))


def pairs(layout: str, width: int, rotary_width: int) -> tuple[np.ndarray, np.ndarray]:
    """The features that hold the first and the second component of every rotated pair."""
    i = np.arange(rotary_width // 2)
    if layout == "interleaved":
        return 2 * i, 2 * i + 1
    if layout == "half_split":
        return i, i + rotary_width // 2
    if layout == "proportional":
        return i, i + width // 2
    raise ValueError(f"pairs: expected interleaved, half_split or proportional, received {layout!r}")


def speeds(layout: str, width: int, rotary_width: int, base: float) -> tuple[Any, ...]:
    """θ of the rotated pairs: the exponent counts the rotated width, in the proportional layout the whole width."""
    return powers(width, base)[: rotary_width // 2] if layout == "proportional" else powers(rotary_width, base)


def rotate(
    a: Arithmetic,
    x: Ball,
    positions: np.ndarray,
    base: float,
    *,
    layout: str = "interleaved",
    rotary_width: int | None = None,
) -> Ball:
    """x (..., d) with every pair turned by its angle; `positions` broadcasts to x.shape[:-1]."""
    width = x.shape[-1]
    rotary_width = width if rotary_width is None else rotary_width
    first, second = pairs(layout, width, rotary_width)
    phi = angle(a, positions, speeds(layout, width, rotary_width, base))
    c, s = cos(phi).stored(), sin(phi).stored()
    p, q = x[..., first], x[..., second]
    rest = np.setdiff1d(np.arange(width), np.concatenate([first, second]))
    turned = concatenate([p * c - q * s, p * s + q * c, x[..., rest]])
    return turned[..., np.argsort(np.concatenate([first, second, rest]))]


def _rotated(
    a: Arithmetic,
    x: Ball,
    positions: np.ndarray,
    base: float,
    rotary_width: int | None = None,
    layout: str = "interleaved",
) -> Ball:
    return rotate(a, x, positions[..., None], base, layout=layout, rotary_width=rotary_width)


def half_split_order(a: Arithmetic, width: int) -> np.ndarray:
    """Even features first, then odd ones."""
    return np.array([2 * j if j < width // 2 else 2 * (j - width // 2) + 1 for j in range(width)], dtype=np.int64)


def interleaved_order(a: Arithmetic, width: int) -> np.ndarray:
    """Features of the two halves in turn."""
    return np.array([j // 2 + (width // 2 if j % 2 else 0) for j in range(width)], dtype=np.int64)


def permute_projection(a: Arithmetic, weight: Ball, heads: int, order: np.ndarray) -> Ball:
    """Column h d + j comes from column h d + order_j."""
    d = weight.shape[-1] // heads
    return weight[..., [h * d + (int(order[j]) if j < len(order) else j) for h in range(heads) for j in range(d)]]


def permute_gau(
    a: Arithmetic, w_in: Ball, b_in: Ball, gamma: Ball, beta: Ball, s: int, order: np.ndarray
) -> tuple[Ball, ...]:
    """The last s features of every array."""
    made = []
    for array in (w_in, b_in, gamma, beta):
        start = array.shape[-1] - s
        moved = [start + (int(order[j]) if j < len(order) else j) for j in range(s)]
        made.append(array[..., [*range(start), *moved]])
    return tuple(made)


OPERATORS = (
    Operator("rope.rotate_interleaved", _rotate_interleaved, _rotated),
    Operator("rope.rotate_half_split", _rotate_half_split, partial(_rotated, layout="half_split")),
    Operator("rope.rotate_contiguous", _rotate_contiguous, _rotated),
    Operator("rope.rotate_proportional", _rotate_proportional, partial(_rotated, layout="proportional")),
    Operator("rope.angles", rope.angles, angles, ("phi",), multilinear=True),
    Operator("rope.frequencies", rope.frequencies, frequencies, ("theta",)),
    Operator("rope.frequencies_linear", rope.frequencies_linear, frequencies_linear, ("theta",)),
    Operator("rope.frequencies_ntk", rope.frequencies_ntk, frequencies_ntk, ("theta",)),
    Operator("rope.frequencies_dynamic_ntk", rope.frequencies_dynamic_ntk, frequencies_dynamic_ntk, ("theta",)),
    Operator("rope.frequencies_yarn", rope.frequencies_yarn, frequencies_yarn, ("theta",)),
    Operator("rope.yarn_magnitude", rope.yarn_magnitude, yarn_magnitude, ("magnitude",)),
    Operator("rope.half_split_order", rope.half_split_order, half_split_order, ("order",)),
    Operator("rope.interleaved_order", rope.interleaved_order, interleaved_order, ("order",)),
    Operator("rope.permute_projection", rope.permute_projection, permute_projection, ("weight",)),
    Operator("rope.permute_gau", rope.permute_gau, permute_gau, ("w_in", "b_in", "gamma", "beta")),
)

# 16-bit angles are no implementation of RoPE, whatever the storage format: these are judged from 24 bits on.
_WIDE = ("float64", "float32")


def _case(op: str, name: str, clauses: str, **arguments: Any) -> Case:
    """A case; exact, angle, only and note are taken out of the arguments."""
    named = {k: arguments.pop(k) for k in ("exact", "angle", "only", "note") if k in arguments}
    return Case(op, name, arguments, tuple(clauses.split()), **named)


def _rotation_cases(
    op: str, turn: str, zero: str, *, rest: int = 0, rotary: Callable[[int, int], dict[str, Any]] = lambda i, w: {}
) -> list[Case]:
    """Cases shared by the four rotations, citing the clauses `turn`, or `zero` where nothing turns.

    rest: features that pass through; rotary(number, width): the arguments that say what rotates.
    """
    made: list[Case] = []

    def case(name: str, shape: tuple[int, ...], positions: Any, width: int, base: float = 1e4, **options: Any) -> None:
        draw, bits = Draw(f"{op}/{name}"), options.pop("bits", 0)
        x = draw.dense(*shape, width + rest, bits=bits) if bits else draw.grid(*shape, width + rest)
        if "scale" in options:
            x = np.ldexp(x, options.pop("scale"))
        positions = np.broadcast_to(np.array(positions), shape[:2]).copy()
        arguments = {"x": x, "positions": positions, "base": base, **rotary(len(made), width)}
        made.append(_case(op, name, zero if options.get("exact") else turn, **arguments, **options))

    case("grid", (2, 5, 3), np.arange(5), 6)
    case(
        "own-positions", (2, 5, 2), [[7, 3, 3, 1000, 0], [12, 13, 2, 511, 40]], 6,
        note="positions repeat, fall and differ between the rows of the batch",
    )  # fmt: skip
    case("dense", (1, 3, 2), [1, 2, 3], 10, bits=24)
    case("dense-53-bits", (1, 2, 3), [5, 600], 4, bits=53)
    # Neighbours that 8 and 11 bits confuse, both sides of common table lengths, the last position of class A32.
    long = [[256, 257, 2047, 2048, 2049], [4095, 4097, 65537, 99991, 131071]]
    case("long-positions", (2, 5, 1), long, 14)
    case("very-long-positions", (1, 5, 1), [131072, 262145, 524287, 1000003, 1048576], 10, angle="A64")
    case("base-500000", (1, 3, 2), [1, 30, 700], 10, base=500000.0)
    case("base-7", (1, 3, 2), [1, 2, 50], 10, base=7.0)
    case("wide-head", (1, 2, 1), [1, 100], 64)
    case("one-pair", (1, 2, 3), [2, 0], 2)
    case("magnitudes", (1, 3, 2), [1, 1, 1], 6, scale=np.array([-12, 0, 7])[:, None, None])
    case("position-zero", (2, 3, 2), 0, 6, exact=True)
    case("position-zero-dense", (1, 2, 1), 0, 10, bits=24, exact=True)
    # As a cache asks for them: arange plus an offset, which 8 and 11 bits cannot count.
    case("offset", (1, 5, 2), np.arange(4093, 4098), 6)
    case("negative-positions", (1, 3, 2), [-1, -7, -300], 6)
    return made


def _contiguous(number: int, width: int) -> dict[str, Any]:
    return {"rotary_width": width, "layout": ("interleaved", "half_split")[number % 2]}


def _yarn(width: int, base: float, factor: float, length: int, fast: float = 32.0, slow: float = 1.0) -> dict[str, Any]:
    named = {"width": width, "base": base, "factor": factor}
    return {**named, "original_length": length, "beta_fast": fast, "beta_slow": slow}


def _dynamic(width: int, base: float, factor: float, length: int, max_length: int) -> dict[str, Any]:
    return {"width": width, "base": base, "factor": factor, "length": length, "max_length": max_length}


def _scalar_cases(op: str, clauses: str, *rows: dict[str, Any]) -> list[Case]:
    return [
        _case(op, "-".join(f"{v:.9g}" for v in row.values()), clauses, only=_WIDE, **row) for row in rows
    ]  # fmt: skip


def _angle_cases() -> list[Case]:
    case, draw = partial(_case, "rope.angles", clauses="C1", only=_WIDE), Draw("rope.angles")
    table = draw.grid(5, low=1, exponent=-7)
    return [
        case("exact-table", exact=True, positions=np.arange(7), frequencies=table),
        case("exact-offset", exact=True, positions=np.array([[3, 2], [900, 901]]), frequencies=table[:3]),
        case("exact-negative", exact=True, positions=np.array([-5, 0, 5]), frequencies=table),
        case("exact-reals", exact=True, positions=np.array([0.5, -0.25, 12.75]), frequencies=table),
        case("exact-one-pair", exact=True, positions=np.array([2, 0, 7]), frequencies=np.array([0.5])),
        case("exact-past-16-bits", exact=True, positions=np.array([65535, 65537]), frequencies=table[:2]),
        case("dense", positions=draw.integers((2, 3), 0, 4096), frequencies=draw.dense(7) + 1),
        case("dense-53-bits", positions=np.array([1, 1048575]), frequencies=draw.dense(3, bits=53)),
        case("dense-reals", positions=draw.dense(4, exponent=9), frequencies=draw.dense(3)),
    ]


def _gau(draw: Draw, d: int, e: int, s: int, k: int) -> dict[str, Any]:
    return {
        "w_in": draw.grid(d, 2 * e + s), "b_in": draw.grid(2 * e + s), "gamma": draw.grid(k, s),
        "beta": draw.grid(k, s), "s": s,
    }  # fmt: skip


def _permutation_cases() -> list[Case]:
    one, many = partial(_case, "rope.permute_projection", exact=True), partial(_case, "rope.permute_gau", exact=True)
    draw, half, back = Draw("rope.permute"), rope.half_split_order, rope.interleaved_order
    return [
        one("queries", "C1", weight=draw.grid(3, 24), heads=4, order=half(6)),
        one("two-key-heads", "C1", weight=draw.grid(3, 12), heads=2, order=half(6)),
        one("partial", "C1 C2", weight=draw.grid(3, 12), heads=2, order=half(4), note="two key heads of six queries'"),
        one("bias", "C1", weight=draw.grid(30), heads=3, order=half(10)),
        one("back", "C1", weight=draw.grid(2, 20), heads=2, order=back(10)),
        one("one-head", "C2", weight=draw.grid(5, 7), heads=1, order=back(6)),
        one("dense", "C1", weight=draw.dense(2, 18, bits=53), heads=3, order=half(6)),
        many("half-split", "C1", **_gau(draw, 3, 5, 6, 2), order=half(6)),
        many("back", "C1", **_gau(draw, 2, 3, 10, 2), order=back(10)),
        many("partial", "C1", **_gau(draw, 3, 2, 7, 2), order=half(4)),
        many("four-heads", "C1", **_gau(draw, 2, 7, 6, 4), order=half(6)),
        many("no-gates", "C1", **_gau(draw, 3, 0, 6, 2), order=half(6)),
        many("wide-gates", "C1", **_gau(draw, 1, 13, 4, 1), order=half(4)),
    ]


def _order_cases(op: str) -> list[Case]:
    return [_case(op, f"{width}", "C1", exact=True, width=width) for width in (4, 6, 10, 14, 26, 128)]


CASES = (
    *_rotation_cases(ROTATIONS[0], "C1 C3", "C2"),
    *_rotation_cases(ROTATIONS[1], "C1", "C2"),
    *_rotation_cases(ROTATIONS[2], "C1 C2", "C1", rest=3, rotary=_contiguous),
    # An even width whose rotary part is neither the whole nor what the rest would be.
    *(
        _case(
            ROTATIONS[2], f"even-width-{layout.replace('_', '-')}", "C1 C2", x=Draw(f"even/{layout}").grid(2, 3, 2, 12),
            positions=np.array([[1, 5, 9], [2, 700, 3]]), base=1e4, rotary_width=4, layout=layout,
        )
        for layout in ("half_split", "interleaved")
    ),
    *_rotation_cases(ROTATIONS[3], "C1 C2", "C1", rest=4, rotary=lambda i, w: {"rotary_width": w}),
    *_angle_cases(),
    *_scalar_cases(
        "rope.frequencies", "C1",
        *({"width": w, "base": b} for w, b in ((2, 1e4), (6, 1e4), (10, 7.0), (14, 5e5), (64, 1e4), (128, 5e6))),
    ),
    *_scalar_cases(
        "rope.frequencies_linear", "C1",
        *(
            {"width": w, "base": b, "factor": f}
            for w, b, f in ((2, 1e4, 4.0), (6, 1e4, 8.0), (10, 7.0, 3.0), (14, 5e5, 1.0), (64, 1e4, 2.5), (8, 1e4, 0.5))
        ),
    ),
    *_scalar_cases(
        "rope.frequencies_ntk", "C1",
        *(
            {"width": w, "base": b, "factor": f}
            for w, b, f in ((4, 1e4, 4.0), (6, 1e4, 8.0), (10, 7.0, 3.0), (14, 5e5, 1.0), (64, 1e4, 2.5), (8, 1e4, 0.5))
        ),
    ),
    *_scalar_cases(
        "rope.frequencies_dynamic_ntk", "C1",
        _dynamic(6, 1e4, 2.0, 192, 64), _dynamic(10, 1e4, 4.0, 65, 64), _dynamic(10, 500.0, 4.0, 64, 64),
        _dynamic(14, 1e4, 3.0, 63, 64), _dynamic(8, 5e5, 2.0, 1, 2048), _dynamic(64, 1e4, 8.0, 131072, 4096),
    ),
    *_scalar_cases(
        "rope.frequencies_yarn", "C1 C2",
        _yarn(16, 1e4, 4.0, 1024), _yarn(64, 1e4, 16.0, 4096), _yarn(14, 5e5, 8.0, 4096, 16.0, 2.0),
        # Clamped below, clamped above, an empty ramp.
        _yarn(16, 1e4, 8.0, 64), _yarn(8, 2.0, 10.0, 1024, 500.0), _yarn(18, 1e4, 4.0, 5),
        _yarn(12, 1e4, 1.0, 1024), _yarn(128, 150000.0, 32.0, 4096),
    ),
    *_scalar_cases(
        "rope.yarn_magnitude", "C1",
        *({"factor": f} for f in (4.0, 16.0, 1.5, 40.0, 2.0, 0.25)),
    ),
    *_order_cases("rope.half_split_order"),
    *_order_cases("rope.interleaved_order"),
    *_permutation_cases(),
)  # fmt: skip


# Laws. The layout of a rotation is part of its name or of its arguments.
def _layout(case: Case) -> tuple[str, int]:
    """Layout and rotary width of a case."""
    width = case["x"].shape[-1]
    if case.op == "rope.rotate_contiguous":
        return case["layout"], case["rotary_width"]
    if case.op == "rope.rotate_proportional":
        return "proportional", case["rotary_width"]
    return case.op.removeprefix("rope.rotate_"), width


def impulse_response(implementation: Function, case: Case) -> None:
    """A single feature comes back as cos φ at its place and as ± sin φ at the place of its pair."""
    d, (layout, width) = case["x"].shape[-1], _layout(case)
    first, second = pairs(layout, d, width)
    theta = np.array([float(t) for t in speeds(layout, d, width, case["base"])])
    # Every feature in turn is 1, in two heads; the second row of the batch has positions of its own.
    x = np.broadcast_to(np.eye(d)[:, None], (2, d, 2, d))
    here, there = int(case["positions"].max()), int(case["positions"].min())
    positions = np.stack([np.full(d, here), there + np.arange(d) % 5])
    out = run(implementation, case, x=x, positions=positions)[0]
    phi = positions[..., None, None] * theta
    expected = x.copy()
    expected[..., first] = x[..., first] * np.cos(phi) - x[..., second] * np.sin(phi)
    expected[..., second] = x[..., first] * np.sin(phi) + x[..., second] * np.cos(phi)
    close("impulse_response", case, out.value, expected, out.radius)


def _scores(implementation: Function, case: Case, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products of all rotated tokens with one another, and how far they may be off."""
    out = run(implementation, case, positions=positions)[0]
    value, size, radius = out.value, np.abs(out.value), out.radius
    product = partial(np.einsum, "bnhd,bmhd->bhnm")
    summed = 2.0**-52 * value.shape[-1] * product(size, size)
    crossed = product(size, radius)
    return product(value, value), crossed + crossed.swapaxes(-1, -2) + product(radius, radius) + summed


def relative_position(implementation: Function, case: Case) -> None:
    """Scores stay the same when one number is added to all positions."""
    here, off = _scores(implementation, case, case["positions"])
    there, more = _scores(implementation, case, case["positions"] + 37)
    close("relative_position", case, there, here, off + more)


def composition(implementation: Function, case: Case) -> None:
    """Turning by p and then by q is turning by p + q."""
    q = case["positions"] // 2
    once = run(implementation, case, positions=case["positions"] + q)[0]
    half = run(implementation, case)[0]
    twice = run(implementation, case, x=half.value, positions=q)[0]
    carried = np.sqrt(2.0) * half.radius.max(axis=-1, keepdims=True)
    close("composition", case, twice.value, once.value, once.radius + twice.radius + carried)


def position_zero_is_identity(implementation: Function, case: Case) -> None:
    """At position 0 every feature comes back bit for bit."""
    out = run(implementation, case, positions=np.zeros_like(case["positions"]))[0]
    equal("position_zero_is_identity", case, out.value, case["x"])


def tokens_carry_their_positions(implementation: Function, case: Case) -> None:
    """Reversing tokens together with their positions reverses the output."""
    forth = run(implementation, case)[0]
    x, positions = case["x"][:, ::-1].copy(), case["positions"][:, ::-1].copy()
    back = run(implementation, case, x=x, positions=positions)[0]
    radius = forth.radius + back.radius[:, ::-1]
    close("tokens_carry_their_positions", case, back.value[:, ::-1], forth.value, radius)


def rest_passes_through(implementation: Function, case: Case) -> None:
    """Features outside the rotated pairs come back bit for bit."""
    layout, width = _layout(case)
    rest = np.setdiff1d(np.arange(case["x"].shape[-1]), np.concatenate(pairs(layout, case["x"].shape[-1], width)))
    out = run(implementation, case)[0]
    equal("rest_passes_through", case, out.value[..., rest], case["x"][..., rest])


def outer_product(implementation: Function, case: Case) -> None:
    """Every frequency times every position; twice the positions give twice the angles, bit for bit."""
    out = run(implementation, case)[0]
    close("outer_product", case, out.value, np.multiply.outer(case["positions"], case["frequencies"]), out.radius)
    equal("outer_product", case, run(implementation, case, positions=2 * case["positions"])[0].value, 2 * out.value)


# Relative error of a power that a law forms itself, for bases below 2^24.
_POWER = 32 * 2.0**-53


def geometric(implementation: Function, case: Case) -> None:
    """θ_0 = 1 and every next frequency is smaller by base^(2/width)."""
    out, ratio = run(implementation, case)[0], case["base"] ** (-2 / case["width"])
    close("geometric", case, out.value[:1], np.ones(1), out.radius[:1])
    radius = out.radius[1:] + out.radius[:-1] * ratio + _POWER * out.value[1:]
    close("geometric", case, out.value[1:], out.value[:-1] * ratio, radius)


def width_zero_is_empty(implementation: Function, case: Case) -> None:
    """Width 0 has no frequencies."""
    equal("width_zero_is_empty", case, run(implementation, case, width=0)[0].value, np.zeros(0))


def factor_divides(implementation: Function, case: Case) -> None:
    """The frequencies at a factor, times that factor, are those of the formula base^(-2i/width)."""
    out, width = run(implementation, case)[0], case["width"]
    plain = case["base"] ** (-2 * np.arange(width // 2) / width)
    close("factor_divides", case, out.value * case["factor"], plain, out.radius * case["factor"] + _POWER * plain)


def _slowest(case: Case) -> float:
    return case["base"] ** (-(case["width"] - 2) / case["width"])


def ends_of_the_spectrum(implementation: Function, case: Case) -> None:
    """The fastest pair stays at 1, the slowest is divided by the factor, every ratio of neighbours is the same."""
    out, last = run(implementation, case)[0], _slowest(case) / case["factor"]
    expected = last ** (np.arange(case["width"] // 2) / (case["width"] // 2 - 1))
    close("ends_of_the_spectrum", case, out.value, expected, out.radius + _POWER * expected)


def grows_past_the_training_length(implementation: Function, case: Case) -> None:
    """Unscaled, bit for bit, up to max_length; past it the slowest pair is divided by 1 + factor (n/max_length - 1)."""
    limit, width = case["max_length"], case["width"]
    short = run(implementation, case, length=1)[0].value
    equal("grows_past_the_training_length", case, run(implementation, case, length=limit)[0].value, short)
    plain = case["base"] ** (-2 * np.arange(width // 2) / width)
    close("grows_past_the_training_length", case, short, plain, run(implementation, case, length=1)[0].radius)
    for length in (limit + 1, 3 * limit):
        out = run(implementation, case, length=length)[0]
        last = _slowest(case) / (1 + case["factor"] * (length - limit) / limit)
        radius = out.radius[-1] + _POWER * last
        close("grows_past_the_training_length", case, out.value[-1], last, radius)
        close("grows_past_the_training_length", case, out.value[0], 1.0, out.radius[0])


def ramp(implementation: Function, case: Case) -> None:
    """Fast pairs keep their frequency, slow ones are divided by the factor, between them the share falls linearly."""
    out, width, base = run(implementation, case)[0], case["width"], case["base"]
    plain = base ** (-2 * np.arange(width // 2) / width)
    turns = np.array([case["beta_fast"], case["beta_slow"]])
    index = width * np.log(case["original_length"] / (2 * np.pi * turns)) / (2 * np.log(base))
    lo, hi = max(np.floor(index[0]), 0), min(np.ceil(index[1]), width - 1)
    i = np.arange(width // 2)
    share = np.interp(i, [lo, hi], [1.0, 0.0]) if hi > lo else (i <= lo).astype(float)
    expected = plain * (share + (1 - share) / case["factor"])
    close("ramp", case, out.value, expected, out.radius + _POWER * expected)


def tenth_of_the_logarithm(implementation: Function, case: Case) -> None:
    """Doubling a factor from 1 on adds ln 2 / 10; up to 1 the magnitude is exactly 1."""
    once = run(implementation, case, factor=max(case["factor"], 1.0))[0]
    twice = run(implementation, case, factor=2 * max(case["factor"], 1.0))[0]
    radius = once.radius + twice.radius
    close("tenth_of_the_logarithm", case, twice.value, once.value + np.log(2) / 10, radius)
    for factor in (1.0, 0.5):
        equal("tenth_of_the_logarithm", case, run(implementation, case, factor=factor)[0].value, np.array(1.0))


def even_features_first(implementation: Function, case: Case) -> None:
    """0, 2, 4, ... and then 1, 3, 5, ..."""
    order, half = run(implementation, case)[0].value, case["width"] // 2
    equal("even_features_first", case, order[:half], 2.0 * np.arange(half))
    equal("even_features_first", case, order[half:], 2.0 * np.arange(half) + 1)


def halves_in_turn(implementation: Function, case: Case) -> None:
    """0, width/2, 1, width/2 + 1, ..."""
    order, half = run(implementation, case)[0].value, case["width"] // 2
    equal("halves_in_turn", case, order[0::2], 1.0 * np.arange(half))
    equal("halves_in_turn", case, order[1::2], 1.0 * np.arange(half) + half)


def _taken(features: int, start: int, width: int, order: np.ndarray) -> np.ndarray:
    """Where every feature comes from, `order` acting on each head of `width` from `start` on."""
    source = np.arange(features)
    for head in range(start, features, width):
        source[head : head + len(order)] = head + order
    return source


def labels_travel(implementation: Function, case: Case) -> None:
    """Features labelled by their index arrive in `order` within every head, in every row alike."""
    features, heads = case["weight"].shape[-1], case["heads"]
    labels = np.broadcast_to(np.arange(features, dtype=np.float64), case["weight"].shape)
    expected = np.broadcast_to(_taken(features, 0, features // heads, case["order"]), labels.shape)
    equal("labels_travel", case, run(implementation, case, weight=labels)[0].value, expected)


def shared_features_travel_together(implementation: Function, case: Case) -> None:
    """Labels of the last s columns, of their bias and of every gamma and beta arrive in the same order."""
    names, s = ("w_in", "b_in", "gamma", "beta"), case["s"]
    labels = {n: np.broadcast_to(np.arange(case[n].shape[-1], dtype=np.float64), case[n].shape) for n in names}
    for name, out in zip(names, run(implementation, case, **labels), strict=True):
        features = case[name].shape[-1]
        expected = np.broadcast_to(_taken(features, features - s, s, case["order"]), case[name].shape)
        equal("shared_features_travel_together", case, out.value, expected)


LAWS = (
    Law(impulse_response, ROTATIONS[:1], ("C1", "C3")),
    Law(impulse_response, ROTATIONS[1:2], ("C1",)),
    Law(impulse_response, PARTIAL, ("C1", "C2")),
    Law(relative_position, ROTATIONS),
    Law(composition, ROTATIONS),
    Law(position_zero_is_identity, ROTATIONS[:2], ("C2",)),
    Law(position_zero_is_identity, PARTIAL),
    Law(tokens_carry_their_positions, ROTATIONS, ("C1",)),
    Law(rest_passes_through, PARTIAL, ("C1",)),
    Law(outer_product, ("rope.angles",), ("C1",)),
    Law(geometric, ("rope.frequencies",), ("C1",)),
    Law(width_zero_is_empty, ("rope.frequencies",), ("C2",)),
    Law(factor_divides, ("rope.frequencies_linear",), ("C1",)),
    Law(ends_of_the_spectrum, ("rope.frequencies_ntk",), ("C1",)),
    Law(grows_past_the_training_length, ("rope.frequencies_dynamic_ntk",), ("C1",)),
    Law(ramp, ("rope.frequencies_yarn",), ("C1", "C2")),
    Law(tenth_of_the_logarithm, ("rope.yarn_magnitude",), ("C1",)),
    Law(even_features_first, ("rope.half_split_order",), ("C1",)),
    Law(halves_in_turn, ("rope.interleaved_order",), ("C1",)),
    Law(labels_travel, ("rope.permute_projection",), ("C1", "C2")),
    Law(shared_features_travel_together, ("rope.permute_gau",), ("C1",)),
)

_BASES = st.sampled_from([1e4, 5e5, 7.0, 5e6])
_FACTORS = st.sampled_from([4.0, 2.0, 1.5, 32.0])


def _build_rotation(
    draw: Draw, function: str, tokens: int, heads: int, width: int, rest: int, base: float, last: int, layout: str
) -> dict[str, Any]:
    rest = {"rotate_contiguous": rest, "rotate_proportional": 2 * rest}.get(function, 0)
    positions = draw.integers((2, tokens), 0, last)
    # Near and far positions in one row, as long as there are two tokens.
    positions[:, 0], positions[1, -1] = last, last % 5
    made: dict[str, Any] = {"x": draw.grid(2, tokens, heads, width + rest), "positions": positions}
    if function == "rotate_contiguous":
        made |= {"rotary_width": width, "layout": layout}
    if function == "rotate_proportional":
        made |= {"rotary_width": width}
    return {**made, "base": base}


def _build_angles(draw: Draw, n: int, r: int, last: int) -> dict[str, Any]:
    # last = 0: positions between the integers.
    positions = draw.integers((2, n), -5, last) if last else draw.grid(2, n)
    return {"positions": positions, "frequencies": draw.dense(r)}


def _build_projection(draw: Draw, heads: int, width: int, rest: int) -> dict[str, Any]:
    order = draw.permutation(width)
    return {"weight": draw.grid(2, heads * (width + rest)), "heads": heads, "order": order}


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Two rows of 1 to 4 tokens, positions to 85000 (to 700000 in class A64), widths from 2 on, several bases."""
    make = partial(drawn, f"rope.{function}", profile)
    width = st.sampled_from([6, 10, 2, 4])
    even = st.sampled_from([6, 10, 4, 16, 64])
    if function.startswith("rotate"):
        # Laws add up to half of a position: 131071 is the last one of class A32.
        last = [1000, 7, 4099, 85000] + ([700000] if profile.angle == "A64" else [])
        return make(
            _build_rotation, function=st.just(function), tokens=st.integers(1, 4), heads=st.integers(1, 3), width=width,
            rest=st.integers(1, 3), base=_BASES, last=st.sampled_from(last),
            layout=st.sampled_from(["interleaved", "half_split"]),
        )  # fmt: skip
    if function == "angles":
        return make(_build_angles, n=st.integers(1, 4), r=st.integers(1, 4), last=st.sampled_from([7, 4099, 0]))
    if function == "yarn_magnitude":
        return make(lambda draw, factor: {"factor": factor}, factor=_FACTORS)
    if function.endswith("order"):
        return make(lambda draw, width: {"width": width}, width=even)
    if function == "permute_projection":
        return make(_build_projection, heads=st.integers(1, 5), width=width, rest=st.integers(0, 3))
    if function == "permute_gau":
        return make(
            lambda draw, e, width, rest: {**_gau(draw, 2, e, width + rest, 2), "order": draw.permutation(width)},
            e=st.integers(0, 5), width=width, rest=st.integers(0, 2),
        )  # fmt: skip
    named: dict[str, st.SearchStrategy[Any]] = {"width": even, "base": _BASES}
    if function != "frequencies":
        named["factor"] = _FACTORS
    if function == "frequencies_dynamic_ntk":
        named |= {"length": st.sampled_from([1, 64, 65, 4096]), "max_length": st.sampled_from([64, 2048])}
    if function == "frequencies_yarn":
        named |= {
            "original_length": st.sampled_from([1024, 4096, 64, 5]),
            "beta_fast": st.sampled_from([32.0, 16.0]),
            "beta_slow": st.sampled_from([1.0, 2.0]),
        }
    return make(lambda draw, **chosen: chosen, **named)


# Known-wrong implementations.
def _wrong(
    op: str,
    bug: str,
    *,
    url: str = "",
    positions: Callable[..., np.ndarray] = lambda p: p,
    theta: Callable[..., np.ndarray] = lambda width, base: base ** (-2.0 * np.arange(width // 2) / width),
    where: Callable[..., tuple[np.ndarray, np.ndarray]] = pairs,
    after: Callable[[np.ndarray], np.ndarray] = lambda y: y,
    sign: float = 1.0,
    width: Callable[[int, int], int] = lambda d, rotary_width: rotary_width,
    counted: str = "",
) -> Mutant:
    """A rotation with one thing changed: positions, frequencies θ(width, base), pairs, direction, rotated width.

    counted: the width in the exponent, "head" or "rotary"; by default that of the specification.
    """
    proportional = op == "rope.rotate_proportional"
    counted = counted or ("head" if proportional else "rotary")

    def call(x: np.ndarray, positions_: np.ndarray, base: float, rotary_width: int | None, layout: str) -> np.ndarray:
        d = x.shape[-1]
        turned = width(d, d if rotary_width is None else rotary_width)
        first, second = where(layout, d, turned)
        speed = theta(d if counted == "head" else turned, base)[: len(first)]
        phi = positions(positions_)[..., None, None] * speed
        y, c, s = x.copy(), np.cos(phi), sign * np.sin(phi)
        y[..., first] = x[..., first] * c - x[..., second] * s
        y[..., second] = x[..., first] * s + x[..., second] * c
        return after(y)

    # The arguments of the specification, by name.
    def contiguous(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int, layout: str) -> np.ndarray:
        return call(x, positions, base, rotary_width, layout)

    def across(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int) -> np.ndarray:
        return call(x, positions, base, rotary_width, "proportional")

    def full(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
        return call(x, positions, base, None, op.removeprefix("rope.rotate_"))

    chosen = contiguous if op == "rope.rotate_contiguous" else across if proportional else full
    return Mutant(op, bug, chosen, url)


_INTERLEAVED, _HALF, _CONTIGUOUS, _PROPORTIONAL = ROTATIONS


def _powers(exponent: Callable[[np.ndarray, int], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda width, base: base ** exponent(np.arange(width // 2), width)


_bfloat16, _float16 = partial(round_to, dtype="bfloat16"), partial(round_to, dtype="float16")
_plain = _powers(lambda i, d: -2.0 * i / d)


def _as(layout: str) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return lambda _, d, width: pairs(layout, d, width)


def _concatenated(y: np.ndarray) -> np.ndarray:
    """First components of all pairs, then second ones."""
    return np.concatenate([y[..., 0::2], y[..., 1::2]], axis=-1)


def _tables_repeated(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """cos and sin repeated pairwise, as for interleaved pairs, applied to half-split ones."""
    d = x.shape[-1]
    phi = (positions[..., None, None] * _plain(d, base)).repeat(2, axis=-1)
    turned = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], axis=-1)
    return x * np.cos(phi) + turned * np.sin(phi)


def _by_head(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """The index of the head taken for the position."""
    heads = np.broadcast_to(np.arange(x.shape[2])[:, None], x.shape[1:3] + (1,))
    phi = heads * _plain(x.shape[-1], base)
    p, q = x[..., 0::2], x[..., 1::2]
    return np.stack([p * np.cos(phi) - q * np.sin(phi), p * np.sin(phi) + q * np.cos(phi)], -1).reshape(x.shape)


def _last_features(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int, layout: str) -> np.ndarray:
    """The last features rotate instead of the first."""
    start = x.shape[-1] - rotary_width
    turned = _rotate_contiguous(x[..., start:], positions, base, rotary_width, layout)
    return np.concatenate([x[..., :start], turned], axis=-1)


def _rest_is_lost(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int, layout: str) -> np.ndarray:
    """Zeros where features should pass through."""
    y = _rotate_contiguous(x, positions, base, rotary_width, layout)
    y[..., rotary_width:] = 0
    return y


def _ramp(
    width: int, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float,
    *, clamp: bool = True, turn: float = 2 * np.pi, rounded: bool = True, swapped: bool = False,
) -> np.ndarray:  # fmt: skip
    """YaRN with one thing changed."""
    lo, hi = (
        width * np.log(original_length / (turn * b)) / (2 * np.log(base)) for b in (beta_fast, beta_slow)
    )  # fmt: skip
    lo, hi = (np.floor(lo), np.ceil(hi)) if rounded else (lo, hi)
    lo, hi = (max(lo, 0), min(hi, width - 1)) if clamp else (lo, hi)
    m = 1 - np.clip((np.arange(width // 2) - lo) / max(hi - lo, 0.001), 0, 1)
    m = 1 - m if swapped else m
    return _plain(width, base) * (m + (1 - m) / factor)


def _permuted(weight: np.ndarray, heads: int, order: np.ndarray) -> np.ndarray:
    width = weight.shape[-1] // heads
    index = np.concatenate([order, np.arange(len(order), width)])
    return weight.reshape(*weight.shape[:-1], heads, width)[..., index].reshape(weight.shape)


def _gau_without(*names: str) -> Function:
    """permute_gau that forgets some of the arrays."""

    def call(s: int, order: np.ndarray, **arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        moved = rope.permute_gau(**arrays, s=s, order=order)._asdict()
        return tuple(arrays[n] if n in names else moved[n] for n in ("w_in", "b_in", "gamma", "beta"))

    return call


MUTANTS = (
    _wrong(_INTERLEAVED, "clockwise rotation", sign=-1.0),
    _wrong(_INTERLEAVED, "exponent counted from 1", theta=_powers(lambda i, d: -2.0 * (i + 1) / d)),
    _wrong(_INTERLEAVED, "frequencies in reversed order", theta=lambda w, b: _plain(w, b)[::-1]),
    _wrong(_INTERLEAVED, "both minus signs of the exponent: base^(+2i/D)", theta=_powers(lambda i, d: 2.0 * i / d)),
    _wrong(_INTERLEAVED, "exponent over D - 2", theta=_powers(lambda i, d: -2.0 * i / max(d - 2, 1))),
    _wrong(_INTERLEAVED, "rotated halves concatenated, not interleaved back", after=_concatenated),
    _wrong(_INTERLEAVED, "positions start at 1", positions=lambda p: p + 1),
    _wrong(_INTERLEAVED, "positions ignored, arange used", positions=lambda p: 0 * p + np.arange(p.shape[-1])),
    _wrong(_INTERLEAVED, "positions of the first row used for all", positions=lambda p: 0 * p + p[:1]),
    _wrong(_INTERLEAVED, "positions clipped at 2047", positions=lambda p: np.minimum(p, 2047)),
    _wrong(_INTERLEAVED, "positions rounded to float16", positions=lambda p: _float16(p)),
    _wrong(
        _INTERLEAVED,
        "the slowest pair does not rotate",
        theta=lambda w, b: _plain(w, b) * (np.arange(w // 2) < max(w // 2 - 1, 1)),
    ),
    _wrong(_INTERLEAVED, "no rotation", theta=lambda w, b: 0 * _plain(w, b)),
    Mutant(_INTERLEAVED, "the index of the head taken for the position", _by_head),
    _wrong(_HALF, "rotate_half with the sign on the other half (clockwise)", sign=-1.0),
    _wrong(_HALF, "adjacent pairs", where=_as("interleaved")),
    Mutant(_HALF, "cos and sin repeated pairwise, as for interleaved pairs", _tables_repeated),
    _wrong(_HALF, "frequencies in reversed order", theta=lambda w, b: _plain(w, b)[::-1]),
    _wrong(_HALF, "angles in degrees", theta=lambda w, b: np.deg2rad(_plain(w, b))),
    _wrong(_HALF, "frequencies off by 0.1 %", theta=lambda w, b: 1.001 * _plain(w, b)),
    _wrong(_HALF, "positions wrap at 4096", positions=lambda p: p % 4096),
    _wrong(_CONTIGUOUS, "exponent over the width of the head", counted="head"),
    Mutant(_CONTIGUOUS, "the last features rotate instead of the first", _last_features),
    Mutant(_CONTIGUOUS, "features that pass through are lost", _rest_is_lost),
    _wrong(_CONTIGUOUS, "adjacent pairs whatever layout is asked", where=_as("interleaved")),
    _wrong(_CONTIGUOUS, "positions shifted by one", positions=lambda p: np.maximum(p - 1, 0)),
    _wrong(_PROPORTIONAL, "adjacent pairs", where=_as("interleaved")),
    _wrong(_PROPORTIONAL, "exponent over the rotary width", counted="rotary"),
    _wrong(_PROPORTIONAL, "clockwise rotation", sign=-1.0),
    _wrong(_PROPORTIONAL, "one pair too few rotates", width=lambda d, r: max(r - 2, 0)),
    _wrong(_PROPORTIONAL, "one pair too many rotates", width=lambda d, r: r + 2),
    Mutant(
        "rope.angles",
        "positions taken modulo 1024",
        lambda positions, frequencies: (positions % 1024)[..., None] * frequencies,
    ),
    Mutant("rope.angles", "frequencies inverted", lambda positions, frequencies: positions[..., None] / frequencies),
    Mutant(
        "rope.angles",
        "positions cut to integers",
        lambda positions, frequencies: np.trunc(positions)[..., None] * frequencies,
    ),
    Mutant(
        "rope.frequencies", "exponent -i/D", lambda width, base: base ** (-1.0 * np.arange(width // 2) / max(width, 1))
    ),
    Mutant(
        "rope.frequencies", "evenly spaced to the last", lambda width, base: base ** -np.linspace(0.0, 1.0, width // 2)
    ),
    Mutant(
        "rope.frequencies",
        "base 10000 whatever is asked",
        lambda width, base: _plain(width, 10000.0) if width else np.zeros(0),
    ),
    Mutant(
        "rope.frequencies",
        "one value for each feature",
        lambda width, base: np.repeat(_plain(width, base), 2) if width else np.zeros(0),
    ),
    Mutant(
        "rope.frequencies_linear", "multiplied by the factor", lambda width, base, factor: _plain(width, base) * factor
    ),
    Mutant(
        "rope.frequencies_linear",
        "factor applied to the base",
        lambda width, base, factor: _plain(width, base * factor),
    ),
    Mutant(
        "rope.frequencies_ntk",
        "factor without the exponent D/(D-2)",
        lambda width, base, factor: _plain(width, base * factor),
    ),
    Mutant("rope.frequencies_ntk", "linear instead of NTK", lambda width, base, factor: _plain(width, base) / factor),
    Mutant(
        "rope.frequencies_dynamic_ntk",
        "factor n/n_max without the - (factor - 1)",
        lambda width, base, factor, length, max_length: _plain(
            width, base * (factor * max(length / max_length, 1 / factor)) ** (width / (width - 2))
        ),
    ),
    Mutant(
        "rope.frequencies_dynamic_ntk",
        "grows by n/n_max only",
        lambda width, base, factor, length, max_length: _plain(
            width, base * max(length / max_length, 1) ** (width / (width - 2))
        ),
    ),
    Mutant("rope.frequencies_yarn", "indices not clamped", partial(_ramp, clamp=False)),
    Mutant("rope.frequencies_yarn", "indices not rounded", partial(_ramp, rounded=False)),
    Mutant("rope.frequencies_yarn", "turns without 2 pi", partial(_ramp, turn=1.0)),
    Mutant("rope.frequencies_yarn", "fast pairs interpolated instead of slow ones", partial(_ramp, swapped=True)),
    Mutant("rope.frequencies_yarn", "unscaled frequencies registered", lambda width, base, **_: _plain(width, base)),
    Mutant("rope.yarn_magnitude", "logarithm to base 10", lambda factor: 1 + 0.1 * np.log10(max(factor, 1.0))),
    Mutant("rope.yarn_magnitude", "below 1 for factors below 1", lambda factor: 1 + 0.1 * np.log(factor)),
    Mutant(
        "rope.yarn_magnitude", "squared, as logits see it", lambda factor: (1 + 0.1 * np.log(max(factor, 1.0))) ** 2
    ),
    Mutant("rope.half_split_order", "the inverse order", lambda width: rope.interleaved_order(width)),
    Mutant("rope.interleaved_order", "the inverse order", lambda width: rope.half_split_order(width)),
    Mutant("rope.interleaved_order", "halves exchanged", lambda width: np.arange(width).reshape(2, -1)[::-1].T.ravel()),
    Mutant(
        "rope.permute_projection",
        "the inverse order",
        lambda weight, heads, order: _permuted(weight, heads, np.argsort(order)),
    ),
    Mutant(
        "rope.permute_projection",
        "the first head only",
        lambda weight, heads, order: weight[..., np.concatenate([order, np.arange(len(order), weight.shape[-1])])],
    ),
    Mutant(
        "rope.permute_projection",
        "the last features instead of the first",
        lambda weight, heads, order: _permuted(weight[..., ::-1], heads, order)[..., ::-1],
    ),
    Mutant("rope.permute_gau", "gamma and beta forgotten", _gau_without("gamma", "beta")),
    Mutant("rope.permute_gau", "beta forgotten", _gau_without("beta")),
    Mutant("rope.permute_gau", "biases forgotten", _gau_without("b_in")),
    Mutant("rope.permute_gau", "the columns forgotten", _gau_without("w_in")),
)

_HUGGING = "https://github.com/huggingface/transformers/"
MUSEUM = (
    _wrong(
        _INTERLEAVED,
        "weights trained on adjacent pairs rotated as half-split",
        url=_HUGGING + "issues/25199",
        where=_as("half_split"),
    ),
    _wrong(
        _INTERLEAVED,
        "base 10000 hard-coded",
        url="https://github.com/huggingface/candle/pull/3746",
        theta=lambda w, b: _plain(w, 1e4),
    ),
    _wrong(
        _HALF,
        "base 10000 hard-coded",
        url="https://github.com/google-deepmind/penzai/pull/102",
        theta=lambda w, b: _plain(w, 1e4),
    ),
    _wrong(
        _INTERLEAVED,
        "exponent half as large",
        url="https://github.com/xlite-dev/LeetCUDA/issues/289",
        theta=_powers(lambda i, d: -1.0 * i / d),
    ),
    _wrong(
        _HALF,
        "frequencies rounded to bfloat16 before the product",
        url="https://github.com/sgl-project/sglang-jax/issues/1472",
        theta=lambda w, b: _bfloat16(_plain(w, b)),
    ),
    _wrong(
        _INTERLEAVED,
        "frequencies rounded to bfloat16 before the product",
        url="https://github.com/Modalities/modalities/pull/462",
        theta=lambda w, b: _bfloat16(_plain(w, b)),
    ),
    _wrong(_HALF, "positions rounded to bfloat16", url=_HUGGING + "pull/29285", positions=lambda p: _bfloat16(p)),
    _wrong(
        _CONTIGUOUS,
        "half-split pairs whatever layout is asked",
        url="https://github.com/vllm-project/vllm-ascend/pull/12780",
        where=_as("half_split"),
    ),
    _wrong(
        _CONTIGUOUS,
        "the whole head rotates, the rotary width is dropped",
        url=_HUGGING + "issues/48241",
        width=lambda d, r: d - d % 2,
    ),
    _wrong(
        _CONTIGUOUS,
        "the rotated share applied twice",
        url="https://github.com/vllm-project/vllm/pull/29966",
        width=lambda d, r: 2 * max(round(r * r / d / 2), 0),
    ),
    _wrong(
        _PROPORTIONAL,
        "a contiguous block instead of pairs across the head",
        url="https://github.com/apple/coreai-models/issues/66",
        where=_as("half_split"),
    ),
    Mutant(
        "rope.frequencies_dynamic_ntk",
        "factor^2 - (factor - 1), whatever the length",
        lambda width, base, factor, length, max_length: _plain(
            width, base * (factor * factor - (factor - 1)) ** (width / (width - 2))
        ),
        "https://github.com/vllm-project/vllm/issues/41236",
    ),
    Mutant(
        "rope.frequencies_dynamic_ntk",
        "scaled below the training length too",
        lambda width, base, factor, length, max_length: _plain(
            width, base * abs(factor * length / max_length - (factor - 1)) ** (width / (width - 2))
        ),
        "https://github.com/vllm-project/vllm/issues/52665",
    ),
    Mutant(
        "rope.permute_projection",
        "heads divided by key heads (six query heads): right only where n/kv = kv",
        lambda weight, heads, order: _permuted(weight, max(6 // heads, 1), order),
        "https://github.com/ggml-org/llama.cpp/pull/3364",
    ),
)
