"""Which RoPE is this? Names the convention of a stranger's function f(x, positions) from its impulse responses.

Every feature in turn is set to 1 at every probed position, so that f(., p) is a d x d matrix M(p). M(0) shows the order
of the output and a magnitude; the support of M(p) shows the pairs; atan2 shows their angles, whose growth with p shows
the frequencies; their logarithms against the index show base, order and scaling. Any base is recovered; those in
public use only settle the last digits.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from conformance.adapters import AdapterError, load
from conformance.adapters.python import load_file
from conformance.case import Function, Unsupported, storage_type
from conformance.generate import Draw

Apply = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Axis orders that are tried, in this order; the positions have the axes b and n among them.
FORMS = ("b n h d", "b h n d", "b n d", "n d")
# Each at most twice the one before, so that an angle is followed without ambiguity, then the ends of common tables.
POSITIONS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 511, 610, 1000, 1023, 1025, 2047, 2049, 4095, 4097)
# Bases in public use; a recovered base within its own uncertainty of one of these is taken for it.
USUAL_BASES = (10000.0, 25000.0, 50000.0, 100000.0, 150000.0, 160000.0, 500000.0, 1e6, 5e6, 8e6, 1e7, 1e8)

# Entries below this are no part of a rotation: a one-hot input leaves exact zeros elsewhere.
_ZERO = 1e-6
# Angles may be off by this and by _DRIFT per radian turned, as float32 angles are.
_ANGLE, _DRIFT = 1e-5, 2.0**-20
# Lengths of pairs may scatter by this; bfloat16 results do by 2^-8.
_SCATTER = 0.02


@dataclass(frozen=True)
class Convention:
    """What a function does, as far as it could be recovered; str() is the sentence that a report shows.

    named: the function follows exactly this convention. Otherwise `departures` say where it leaves it.
    layout: interleaved, half_split, or proportional (pairs i and i + width/2, fewer than width/2 of them).
    exponent_width: D in θ_i = base^(-2i/D); order: falling, or reversed; output: in place, or un-interleaved.
    scaling: none, linear or yarn, with its factor and, for yarn, the indices between which the ramp falls.
    """

    named: bool
    width: int
    layout: str = ""
    direction: str = ""
    rotary_width: int = 0
    base: float = math.nan
    exponent_width: int = 0
    order: str = "falling"
    output: str = "in place"
    scaling: str = "none"
    factor: float = 1.0
    ramp: tuple[int, int] | None = None
    magnitude: float = 1.0
    form: str = ""
    probed_to: int = 0
    frequencies: tuple[float, ...] = field(default=(), repr=False)
    departures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def operator(self) -> str:
        """The function of the specification that rotates like this, up to direction, order and output."""
        if self.layout == "proportional":
            return "rope.rotate_proportional"
        if not self.layout:
            return ""
        return f"rope.rotate_{self.layout}" if self.rotary_width == self.width else "rope.rotate_contiguous"

    def __str__(self) -> str:
        sentence = self._described() if self.layout else ""
        if self.departures:
            closest = f" Closest: {sentence}." if sentence else ""
            return f"none: {'; '.join(self.departures)}.{closest}"
        return "; ".join((sentence, *self.notes))

    def _described(self) -> str:
        parts = [self.layout, self.direction]
        if self.layout == "proportional":
            parts[0] = f"proportional partial ({self.rotary_width} of {self.width} features)"
        elif self.rotary_width < self.width:
            parts[0] = f"{self.layout} contiguous partial (features 0-{self.rotary_width - 1} of {self.width})"
        if not math.isnan(self.base):
            parts.append(f"base {self.base:.9g}")
            if self.rotary_width < self.width:
                parts.append(f"exponent over {self.exponent_width}")
        if self.order == "reversed":
            parts.append("frequencies in reversed order")
        if self.scaling != "none":
            between = f" between pairs {self.ramp[0]} and {self.ramp[1]}" if self.ramp else ""
            parts.append(f"{self.scaling} scaling by {self.factor:.6g}{between}")
        if self.magnitude != 1.0:
            parts.append(f"cos and sin x {self.magnitude:.6g}")
        if self.output != "in place":
            parts.append(f"output {self.output}")
        return f"{', '.join(parts)} ({self.operator})"


class _Departed(Exception):
    """The function is not a rotation; the text says where it departs."""


def identify(function: Function, *, width: int = 16, form: str | None = None) -> Convention:
    """The convention of function(x, positions) -> y for heads of `width` features.

    form: the axes of x, one of FORMS; found out where not given. Positions are int64 of the axes b and n.
    """
    if width < 2:
        raise ValueError(f"identify: expected width >= 2, received {width}")
    known = Convention(False, width)
    try:
        apply, axes = _apply(function, width, form)
        known = replace(known, form=axes)
        _check_tokens(apply, width)
        matrices = _responses(apply, width)
        known = replace(known, probed_to=max(matrices))
        return _named(apply, known, matrices)
    except _Departed as where:
        return replace(known, departures=(str(where),))


# Reaching the function.
def _apply(function: Function, width: int, form: str | None) -> tuple[Apply, str]:
    """Apply to tokens (n, d) at positions (n,), through the first axis order that the function takes."""
    if form is not None and form not in FORMS:
        raise ValueError(f"identify: expected form to be one of {FORMS}, received {form!r}")
    refused = ""
    for axes in (form,) if form else FORMS:
        apply = partial(_through, function, axes)
        try:
            # Seven tokens in two heads: axes that are taken for one another do not broadcast.
            tokens = Draw("identify").grid(7, width)
            if np.isfinite(apply(tokens, np.arange(7))).all():
                return apply, axes
            refused = refused or f"{axes}: the result is not finite"
        except _Departed:
            raise
        except Exception as error:
            refused = refused or f"{axes}: {type(error).__name__}: {error}"
    raise _Departed(f"the function takes (x, positions) in none of the forms {', '.join(FORMS)} ({refused})")


def _through(function: Function, axes: str, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two equal heads where there is a head axis; both must come back equal."""
    shape = {"b": 1, "n": tokens.shape[0], "h": 2, "d": tokens.shape[1]}
    letters = axes.split()
    where = [slice(None) if letter in "nd" else None for letter in letters]
    x = np.broadcast_to(tokens[tuple(where)], [shape[letter] for letter in letters]).astype(np.float64)
    p = np.ascontiguousarray(positions, np.int64)
    result = _call(function, x.copy(), p[None] if "b" in letters else p)
    if result.shape != x.shape:
        raise ValueError(f"the result has shape {result.shape} for x of shape {x.shape}")
    if "h" in letters:
        one, other = np.moveaxis(result, letters.index("h"), 0)
        if np.isfinite(result).all() and np.abs(one - other).max() > 1e-6 * np.abs(result).max(initial=1.0):
            raise ValueError("two equal heads come back different")
        result = one
    return result.reshape(tokens.shape)


def _call(function: Function, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """NumPy arrays first; tensors where the function's file has imported torch and wants those."""
    try:
        return np.asarray(function(x, positions), np.float64)
    except Unsupported as reason:
        raise _Departed(f"not provided: {reason}") from None
    except Exception as refused:
        torch = sys.modules.get("torch")
        if torch is None:
            raise
        try:
            with torch.no_grad():
                result = function(torch.from_numpy(x).float(), torch.from_numpy(positions))
            return np.asarray(result.double().cpu().numpy())
        except Exception:
            # What the function says about arrays is the better message.
            raise refused from None


def _check_tokens(apply: Apply, width: int) -> None:
    """The result of a token depends on its own features and position, and on nothing else."""
    tokens, positions = Draw("identify/tokens").grid(7, width), 3 * np.arange(7) + 11
    low, high = apply(tokens, np.arange(7)), apply(tokens, positions)
    if np.array_equal(low, high):
        still = "nothing is rotated" if np.allclose(low, tokens) else "the index of the token is used instead"
        raise _Departed(f"the positions have no effect: {still}")
    off = np.abs(apply(tokens[::-1], positions[::-1])[::-1] - high).max(axis=-1)
    off[0] = max(off[0], np.abs(apply(np.concatenate([tokens[:1], -2 * tokens[1:]]), positions)[0] - high[0]).max())
    if off.max() > 1e-5 * np.abs(high).max():
        raise _Departed(f"tokens depend on one another or on their place: token {int(np.argmax(off))} of 7 does")


def _responses(apply: Apply, width: int) -> dict[int, np.ndarray]:
    """M(p): column j is the response to feature j. A function whose tables end earlier is probed up to there."""
    matrices = {}
    for p in (0, *POSITIONS):
        try:
            response = apply(np.eye(width), np.full(width, p)).T
        except Exception:
            if p <= POSITIONS[3]:
                raise _Departed(f"the function fails at position {p}") from None
            break
        if not np.isfinite(response).all():
            raise _Departed(f"the result is not finite at position {p}")
        matrices[p] = response
    return matrices


# From responses to a convention.
def _named(apply: Apply, known: Convention, matrices: dict[int, np.ndarray]) -> Convention:
    d = known.width
    source, sizes, offset = _at_zero(matrices)
    # Rows in the order of the input, and the angle of position 0 taken away, where there is one.
    start = np.linalg.inv(matrices[0]) if offset else None
    turned = {p: m @ start if start is not None else m[np.argsort(source)] for p, m in matrices.items()}
    first, second = _pairs(turned, d)
    layout = _layout(first, second, d)
    magnitude = 1.0 if offset or abs(sizes[first] - 1).max() < 1e-3 else float(np.median(sizes[first]))
    known = replace(known, layout=layout or "", rotary_width=2 * len(first), magnitude=magnitude)
    if layout is None:
        shown = ", ".join(f"({i}, {j})" for i, j in list(zip(first, second, strict=True))[:4])
        raise _Departed(f"the rotated pairs {shown}, ... are those of no known layout")
    known = replace(known, output=_output(source, d, 2 * len(first)))
    theta, precision, scatter, departures = _frequencies(turned, first, second, magnitude)
    known = replace(known, direction="counter-clockwise" if theta[0] > 0 else "clockwise")
    if not (np.sign(theta) == np.sign(theta[0])).all():
        departures.append(_mixed(theta))
    else:
        theta = np.abs(theta)
        known, more = _schedule(replace(known, frequencies=tuple(theta.tolist())), theta, precision)
        departures += more
    if offset:
        departures.insert(0, _offset(matrices[0], first, second, theta))
    rest = np.setdiff1d(np.arange(d), np.concatenate([first, second]))
    lost = rest[np.abs(sizes[rest] - 1) > _SCATTER] if not offset else rest[:0]
    if lost.size:
        departures.append(f"feature {lost[0]} is not rotated and comes back times {sizes[lost[0]]:.3g}")
    if known.output == "permuted":
        departures.append("the output stands in an order of its own at position 0")
    if not departures:
        departures += _held_out(apply, matrices, scatter)
    return replace(known, named=not departures, departures=tuple(departures), magnitude=_snapped(known.magnitude))


def _at_zero(matrices: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Output row -> input feature at position 0, the size with which every feature comes back, and whether the
    function rotates at position 0 already."""
    zero = matrices[0]
    d = len(zero)
    strong = np.abs(zero) > _ZERO
    if (strong.sum(axis=0) == 1).all() and (strong.sum(axis=1) == 1).all():
        source = strong.argmax(axis=1)
        sizes = np.empty(d)
        sizes[source] = zero[np.arange(d), source]
        if (sizes > 0).all():
            return source, sizes, False
        raise _Departed(f"feature {int(np.argmin(sizes))} changes its sign at position 0")
    gone = np.flatnonzero(~strong.any(axis=0))
    if gone.size:
        raise _Departed(f"feature {gone[0]} is lost at position 0")
    if not np.allclose(zero @ zero.T, np.eye(d), atol=_SCATTER):
        raise _Departed("position 0 is neither the identity nor a rotation")
    return np.arange(d), np.ones(d), True


def _pairs(turned: dict[int, np.ndarray], d: int) -> tuple[np.ndarray, np.ndarray]:
    """The two features of every rotated pair, the lower one first, in the order of the lower ones."""
    reach = np.max([np.abs(m) for m in turned.values()], axis=0) > _ZERO
    np.fill_diagonal(reach, False)
    partners = reach.sum(axis=1)
    if not partners.any():
        raise _Departed("no feature is rotated")
    if (partners > 1).any():
        i = int(np.argmax(partners))
        raise _Departed(f"output feature {i} depends on {partners[i] + 1} input features, not on one pair")
    if not (reach == reach.T).all():
        i, j = (int(v) for v in np.argwhere(reach & ~reach.T)[0])
        raise _Departed(f"output feature {i} depends on feature {j}, but not the other way round")
    low, high = np.nonzero(np.triu(reach))
    return low, high


def _layout(first: np.ndarray, second: np.ndarray, d: int) -> str | None:
    r = len(first)
    i = np.arange(r)
    if np.array_equal(first, 2 * i) and np.array_equal(second, 2 * i + 1):
        return "interleaved"
    if np.array_equal(first, i) and np.array_equal(second, i + r):
        return "half_split"
    if np.array_equal(first, i) and np.array_equal(second, i + d // 2):
        return "proportional"
    return None


def _output(source: np.ndarray, d: int, rotary: int) -> str:
    if np.array_equal(source, np.arange(d)):
        return "in place"
    halves = np.arange(rotary).reshape(-1, 2).T.ravel()
    if np.array_equal(source, np.concatenate([halves, np.arange(rotary, d)])):
        return "un-interleaved (first components of all pairs, then second ones)"
    if np.array_equal(source, np.concatenate([np.argsort(halves), np.arange(rotary, d)])):
        return "interleaved"
    return "permuted"


def _frequencies(
    turned: dict[int, np.ndarray], first: np.ndarray, second: np.ndarray, magnitude: float
) -> tuple[np.ndarray, np.ndarray, float, list[str]]:
    """Signed angle per position of every pair, its relative precision, how far lengths scatter, and where angles stop
    growing with the position."""
    theta, precision, scatter = np.zeros(len(first)), np.ones(len(first)), 0.0
    measured: dict[int, np.ndarray] = {}
    departures: list[str] = []
    for p, m in turned.items():
        a, b, c, e = m[first, first], m[first, second], m[second, first], m[second, second]
        length = np.hypot((a + e) / 2, (c - b) / 2) / magnitude
        odd = np.maximum(np.abs(a - e), np.abs(b + c)) / magnitude
        worst = int(np.argmax(np.maximum(odd, np.abs(length - 1))))
        if max(odd[worst], abs(length[worst] - 1)) > _SCATTER:
            pair = f"({first[worst]}, {second[worst]})"
            raise _Departed(
                f"the pair {pair} is not rotated at position {p}: "
                f"[[{a[worst]:.4g}, {b[worst]:.4g}], [{c[worst]:.4g}, {e[worst]:.4g}]]"
            )
        scatter = max(scatter, float(np.abs(length - 1).max()), float(odd.max()))
        measured[p] = np.arctan2(c - b, a + e)
    for p, phi in measured.items():
        if p == 0:
            continue
        # The whole turns are those of the frequency known so far.
        turns = np.round((theta * p - phi) / (2 * np.pi))
        angle = phi + 2 * np.pi * turns
        off = np.abs(angle - theta * p)
        allowed = _ANGLE + 4 * scatter + _DRIFT * np.abs(angle)
        # The frequency comes from a position at least half as far: its own error is doubled at most.
        if p > 1 and (off > 3 * allowed).any():
            i = int(np.argmax(off / allowed))
            # Slow pairs tell which position was taken instead.
            slow = np.abs(theta * p) < 3
            taken = f", as at position {np.median(phi[slow] / theta[slow]):.6g}" if slow.any() else ""
            departures.append(
                f"angles stop growing in proportion at position {p}: the pair ({first[i]}, {second[i]}) turns by "
                f"{phi[i]:.4g} instead of {math.remainder(theta[i] * p, 2 * math.pi):.4g}{taken}"
            )
            break
        theta = angle / p
        # The sine of a small angle has the relative precision of the result.
        precision = (_ANGLE + 4 * scatter) / np.maximum(1.0, np.abs(angle)) + _DRIFT
    return theta, precision, scatter, departures


def _mixed(theta: np.ndarray) -> str:
    """Pairs that turn in different directions, because whole turns are not seen at integer positions, perhaps."""
    inverse = 2.0 * np.arange(len(theta)) / (2 * len(theta))
    for base in USUAL_BASES:
        if np.allclose(np.exp(1j * base**inverse), np.exp(1j * theta), atol=1e-3):
            return f"frequencies grow: the exponent has the wrong sign, {base:.9g}^(+2i/{2 * len(theta)})"
    return "some pairs turn clockwise, others counter-clockwise"


def _schedule(known: Convention, theta: np.ndarray, precision: np.ndarray) -> tuple[Convention, list[str]]:
    """Base, order and scaling of the frequencies; or how they depart from every known schedule."""
    r = len(theta)
    own = known.width if known.layout == "proportional" else known.rotary_width
    known = replace(known, exponent_width=own)
    if r == 1:
        note = "one pair: layouts coincide and no base shows" if known.layout != "proportional" else "no base shows"
        known = replace(known, notes=(note,))
        return (known if abs(theta[0] - 1) <= precision[0] else _linear(known, theta[0])), []
    if theta[0] < theta[-1]:
        known = replace(known, order="reversed")
        theta, precision = theta[::-1], precision[::-1]
    i, logs = np.arange(r), np.log(theta)
    slope, level = np.polyfit(i, logs, 1, w=1 / precision)
    if (np.abs(logs - level - slope * i) <= 3 * precision).all():
        spread = np.sqrt(np.sum(((i - np.average(i, weights=precision**-2.0)) / precision) ** 2))
        known = _with_base(known, -slope, 3 / spread)
        if abs(level) <= 3 * precision[0]:
            return known, []
        if abs(level - slope) <= 6 * precision[0]:
            return known, [f"the exponent is counted from 1: the fastest frequency is {theta[0]:.6g}, not 1"]
        return _linear(known, math.exp(level)), []
    found = _yarn(known, logs, precision)
    if found is not None:
        return found, []
    known = _with_base(known, -float(np.median(np.diff(logs))), 0.02)
    plain = known.base ** (-2 * i / known.exponent_width)
    worst = int(np.argmax(np.abs(logs - np.log(plain)) / precision))
    pair = r - 1 - worst if known.order == "reversed" else worst
    return known, [
        f"the frequency of pair {pair} is {theta[worst]:.6g}, base {known.base:.6g} gives {plain[worst]:.6g}"
    ]


def _linear(known: Convention, fastest: float) -> Convention:
    return replace(known, scaling="linear", factor=_snapped(1 / fastest))


def _with_base(known: Convention, step: float, precision: float) -> Convention:
    """The base of frequencies that fall by exp(-step) from pair to pair; over which width, where both are possible."""

    def based(width: int) -> tuple[float, bool]:
        base = math.exp(step * width / 2)
        near = [b for b in USUAL_BASES if abs(math.log(b / base)) <= precision * width / 2]
        return (near[0], True) if near else (_snapped(base), False)

    own = known.exponent_width
    other = known.rotary_width if own == known.width else known.width
    base, usual = based(own)
    if usual:
        return replace(known, base=base)
    if based(other)[1]:
        return replace(known, base=based(other)[0], exponent_width=other)
    note: tuple[str, ...] = ()
    if based(2 * own)[1]:
        note = (f"or base {based(2 * own)[0]:.9g} with the exponent -i/{own}",)
    elif base > 1e4 and own > 2:
        note = (f"or base 10000 with NTK scaling by {_snapped((base / 1e4) ** ((own - 2) / own)):.6g}",)
    return replace(known, base=base, notes=known.notes + note)


def _yarn(known: Convention, logs: np.ndarray, precision: np.ndarray) -> Convention | None:
    """Fast pairs on one geometric sequence, slow ones on the same divided by a factor, a linear share between."""
    r, steps = len(logs), -np.diff(logs)
    i, loose = np.arange(r), 10 * precision + 1e-4
    # Two neighbours at the fast end, or at the slow end, lie on the unscaled sequence or on the divided one.
    for at in dict.fromkeys((0, r - 2)):
        based = _with_base(known, float(steps[at]), 2 * float(precision[at] + precision[at + 1]))
        kept = np.exp(logs) * based.base ** (2 * i / based.exponent_width)
        if abs(kept[0] - 1) > loose[0]:
            continue
        # The factor is told by the magnitude, or by pairs beyond the ramp.
        told = [math.exp((known.magnitude - 1) / 0.1)] if known.magnitude > 1 else []
        for factor in (*told, float(1 / kept[-1])):
            ramp = _ramp(kept, factor, loose) if factor > 1.01 else None
            if ramp is None:
                continue
            notes = based.notes
            if not told:
                notes += ("without YaRN's magnitude",)
                if ramp[1] >= r - 1:
                    notes += ("the slowest pair lies on the ramp: factor and end of the ramp are only known together",)
            return replace(based, scaling="yarn", factor=_snapped(factor), ramp=ramp, notes=notes)
    return None


def _ramp(kept: np.ndarray, factor: float, loose: np.ndarray) -> tuple[int, int] | None:
    """The indices between which the share of the unscaled frequency falls from 1 to 0, if it does so linearly."""
    share = (kept - 1 / factor) / (1 - 1 / factor)
    loose = loose / (1 - 1 / factor)
    i = np.arange(len(kept))
    top = int(np.flatnonzero(share >= 1 - loose)[-1])
    inside = np.flatnonzero((share < 1 - loose) & (share > loose))
    if not inside.size:
        lo, hi = top, top + 1
    else:
        # A line through the first pair on the ramp and the last one, or the last pair before it.
        begin, end = (inside[0], inside[-1]) if inside.size > 1 else (top, inside[0])
        fall = (share[begin] - share[end]) / (end - begin)
        if fall <= 0:
            return None
        lo = round(begin - (1 - share[begin]) / fall)
        hi = round(begin + share[begin] / fall)
    line = np.clip((hi - i) / max(hi - lo, 1), 0.0, 1.0)
    return (lo, hi) if (np.abs(share - line) <= loose).all() else None


def _offset(zero: np.ndarray, first: np.ndarray, second: np.ndarray, theta: np.ndarray) -> str:
    """How a rotation at position 0 reads."""
    begin = np.arctan2(zero[second, first], zero[first, first])
    i = int(np.argmin(theta))
    return f"position 0 is not the identity: angles begin as at position {begin[i] / theta[i]:.4g}"


def _held_out(apply: Apply, matrices: dict[int, np.ndarray], scatter: float) -> list[str]:
    """Many features and positions at once must give what the single responses add up to."""
    positions = np.array(list(matrices)[::-1])
    tokens = Draw("identify/held-out").grid(len(positions), len(matrices[0]))
    out = apply(tokens, positions)
    expected = np.stack([matrices[int(p)] @ t for p, t in zip(positions, tokens, strict=True)])
    off = np.abs(out - expected)
    if off.max() > (1e-5 + 4 * scatter) * np.abs(tokens).max() * 2:
        token, feature = (int(v) for v in np.unravel_index(np.argmax(off), off.shape))
        return [
            f"not linear: feature {feature} at position {positions[token]} is "
            f"{out[token, feature]:.4g}, its single responses add up to {expected[token, feature]:.4g}"
        ]
    return []


def _snapped(value: float) -> float:
    """A recovered number to six digits, without the noise of its recovery."""
    return float(f"{value:.6g}") if abs(value - 1) > 1e-4 else 1.0


# Functions behind a command-line argument.
def functions(adapter: str) -> dict[str, Function]:
    """FILE.py:FUNCTION, or every rotation of an adapter bound to base 10000 (half of the head where it is partial)."""
    path, _, name = adapter.rpartition(":")
    if path.endswith(".py") and not path.startswith("python:"):
        found = getattr(load_file(path), name, None)
        if not callable(found):
            raise AdapterError(f"identify: {path} has no function {name!r}")
        return {name: _given_base(found)}
    made: dict[str, Function] = {}
    for implementation in load(adapter):
        for op, function in implementation.functions.items():
            for name, bound in rotations(op, function, implementation.profile.dtype).items():
                made.setdefault(name, bound)
    if not made:
        raise AdapterError(f"identify: {adapter} claims no rope.rotate_* operator")
    return made


def rotations(op: str, function: Function, dtype: str) -> dict[str, Function]:
    """The functions of (x, positions) behind a judged operator, by name; none where it does not rotate."""
    target = storage_type(dtype)
    return {name: partial(_judged, function, target, options) for name, options in _bound(op)}


def _given_base(function: Function) -> Function:
    """A function that asks for its base gets 10000."""
    base = inspect.signature(function).parameters.get("base")
    return partial(function, base=10000.0) if base is not None and base.default is base.empty else function


def _bound(op: str) -> Sequence[tuple[str, dict[str, Any]]]:
    if op in ("rope.rotate_interleaved", "rope.rotate_half_split"):
        return [(op, {})]
    if op == "rope.rotate_proportional":
        return [(op, {"rotary_width": True})]
    if op == "rope.rotate_contiguous":
        return [
            (f"{op} {layout}", {"rotary_width": True, "layout": layout}) for layout in ("interleaved", "half_split")
        ]
    return []


def _judged(function: Function, target: np.dtype, options: dict[str, Any], x: np.ndarray, positions: np.ndarray) -> Any:
    """An operator of the judge as f(x, positions)."""
    named = dict(options)
    if "rotary_width" in named:
        named["rotary_width"] = x.shape[-1] // 4 * 2
    return function(x=x.astype(target), positions=positions, base=10000.0, **named)
