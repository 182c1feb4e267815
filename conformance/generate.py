"""Inputs from an integer generator that any language can repeat: SplitMix64, then dyadic numbers; no libm, no BLAS.

state_i = seed + i * 0x9E3779B97F4A7C15 (mod 2^64), i = 1, 2, ...; the seed is the 64-bit FNV-1a hash of a text.
Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014); Fowler, Noll and Vo (FNV-1a).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.budget import Profile
from conformance.case import Case

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fnv1a(text: str) -> int:
    """The 64-bit FNV-1a hash of the UTF-8 bytes of `text`."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value


class Draw:
    """A stream of arrays named by a text; equal names give equal arrays on every machine."""

    def __init__(self, name: str) -> None:
        self._seed = fnv1a(name)
        self._taken = 0

    def words(self, count: int) -> np.ndarray:
        """The next `count` outputs of SplitMix64, uint64."""
        index = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        with np.errstate(over="ignore"):
            state = np.uint64(self._seed) + index * np.uint64(_GOLDEN)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    def integers(self, shape: int | tuple[int, ...], low: int, high: int) -> np.ndarray:
        """int64 in [low, high], by the remainder of a word."""
        shape = (shape,) if isinstance(shape, int) else shape
        count = int(np.prod(shape))
        return (self.words(count) % np.uint64(high - low + 1)).astype(np.int64).reshape(shape) + low

    def grid(self, *shape: int, low: int = -127, high: int = 127, exponent: int = -6) -> np.ndarray:
        """float64 integers in [low, high] times 2^exponent; |integer| <= 255 is exact in every storage format."""
        return np.ldexp(self.integers(shape, low, high).astype(np.float64), exponent)

    def ternary(self, *shape: int, exponent: int = 0) -> np.ndarray:
        """float64 in {-1, 0, 1} times 2^exponent: products and sums of these are exact in every order."""
        return self.grid(*shape, low=-1, high=1, exponent=exponent)

    def dense(self, *shape: int, bits: int = 24, exponent: int = 0) -> np.ndarray:
        """float64 in [-1, 1) times 2^exponent with `bits` bits: 24 is exact from float32 on, 53 only in float64."""
        count = int(np.prod(shape))
        whole = (self.words(count) >> np.uint64(64 - bits)).astype(np.int64).reshape(shape)
        return np.ldexp(whole.astype(np.float64), 1 - bits + exponent) - np.ldexp(1.0, exponent)

    def mask(self, *shape: int, keep: float = 0.75) -> np.ndarray:
        """Booleans, True with probability `keep` (in 1/256)."""
        return self.integers(shape, 0, 255) < round(keep * 256)

    def permutation(self, size: int) -> np.ndarray:
        """A permutation of range(size), int64."""
        return np.argsort(self.words(size), kind="stable").astype(np.int64)

    def distribution(self, rows: int, classes: int, *, bits: int = 7) -> np.ndarray:
        """Rows of positive multiples of 2^-bits that sum to exactly 1 (classes <= 2^bits)."""
        cuts = np.sort(np.stack([self.permutation((1 << bits) - 1)[: classes - 1] + 1 for _ in range(rows)]), axis=-1)
        edges = np.concatenate([np.zeros((rows, 1), np.int64), cuts, np.full((rows, 1), 1 << bits)], axis=-1)
        return np.ldexp(np.diff(edges, axis=-1).astype(np.float64), -bits)


def drawn(
    op: str, profile: Profile, build: Callable[..., dict[str, Any]], **parameters: SearchStrategy[Any]
) -> SearchStrategy[Case]:
    """Cases whose arguments are build(draw, **parameters): Hypothesis draws and shrinks a seed and the parameters.

    Float arrays are rounded to the storage format of the profile: implementation and reference see one input.
    """
    from hypothesis import strategies as st

    def make(seed: int, **chosen: Any) -> Case:
        return Case(op, "drawn", {}, profile=profile).with_(**build(Draw(f"{op}/{seed}"), **chosen))

    return st.builds(make, seed=st.integers(0, 2**16), **parameters)
