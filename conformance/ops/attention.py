"""Judging attention: masks, positions, multi-head and grouped attention, projections with rotary positions.

A case names its kernel: softmax, softmax_plus_1 and softmax_plus_16 (n_min 1 and 16), squared_relu_visible,
squared_relu_1 (length 1) or laplace, all of attention_kernel; and its rotation: interleaved or half_split, with
positions (None: not rotated) and the base of the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, affine, einsum, gamma, round_to, softmax_mean
from conformance.budget import softmax as normalised
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from conformance.ops.attention_kernel import KERNELS, REFERENCES, kernels, visible
from conformance.ops.rope import layouts, rotate
from refimpl.ops import attention as spec
from refimpl.ops import rope

Positions = np.ndarray | None
LAYOUTS = layouts(SPEC)
WEIGHTS = ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "w_o", "b_o")


# What is called: names become functions.
def _attend(q: Any, k: Any, v: Any, mask: Any, kernel: str, scale: float, *, of: Package = SPEC) -> Any:
    return of.attention.attend(q, k, v, mask, kernel=kernels(of)[kernel], scale=scale)


def _attend_rotated_values(
    q: Any, k: Any, v: Any, mask: Any, positions_k: Any, layout: str, base: float, kernel: str, scale: float, *,
    of: Package = SPEC,
) -> Any:  # fmt: skip
    angles = of.rope.angles(positions_k, of.rope.frequencies(v.shape[-1], base=base))
    options: dict[str, Any] = {"rotate": layouts(of)[layout], "kernel": kernels(of)[kernel], "scale": scale}
    return of.attention.attend_rotated_values(q, k, v, angles, mask, **options)


def _multi_head_attention(
    x: Any, mask: Any, positions: Any, w_q: Any, b_q: Any, w_k: Any, b_k: Any, w_v: Any, b_v: Any, w_o: Any, b_o: Any,
    heads: int, layout: str, base: float, kernel: str, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    theta = of.rope.frequencies(w_q.shape[-1] // heads, base=base)
    options: dict[str, Any] = {"heads": heads, "rotate": layouts(of)[layout], "kernel": kernels(of)[kernel]}
    return of.attention.multi_head_attention(
        x, mask, positions, theta, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, **options
    )  # fmt: skip


def _cross_attention(
    x: Any, memory: Any, mask: Any, positions_q: Any, positions_k: Any, w_q: Any, b_q: Any, w_k: Any, b_k: Any,
    w_v: Any, b_v: Any, w_o: Any, b_o: Any, heads: int, layout: str, base: float, kernel: str, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    theta = of.rope.frequencies(w_q.shape[-1] // heads, base=base)
    options: dict[str, Any] = {"heads": heads, "rotate": layouts(of)[layout], "kernel": kernels(of)[kernel]}
    return of.attention.cross_attention(
        x, memory, mask, positions_q, positions_k, theta, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, **options
    )  # fmt: skip


# References.
def causal_mask(a: Arithmetic, n: int, m: int) -> np.ndarray:
    """Query i is token m - n + i and sees tokens up to itself."""
    return np.array([[j <= m - n + i for j in range(m)] for i in range(n)], dtype=bool).reshape(n, m)


def unilm_mask(a: Arithmetic, segment_ids: np.ndarray) -> np.ndarray:
    """A key is seen when it does not lie after the query among the tokens of segment 1."""
    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    seen = [
        [[row[: j + 1].sum() <= row[: i + 1].sum() for j in range(len(row))] for i in range(len(row))] for row in rows
    ]
    return np.array(seen, dtype=bool).reshape(*segment_ids.shape, segment_ids.shape[-1])


def positions_from_mask(a: Arithmetic, valid: np.ndarray) -> np.ndarray:
    """The number of real tokens before the last real token that has been reached."""
    rows = valid.reshape(-1, valid.shape[-1])
    return np.array([[max(int(r[: i + 1].sum()) - 1, 0) for i in range(len(r))] for r in rows]).reshape(valid.shape)


def composed_attend(a: Arithmetic, q: Ball, k: Ball, v: Ball, mask: Any, kernel: str, scale: float) -> Ball:
    """Head by head: kernel(scale q kᵀ, mask) v."""
    k, v = _shared(q, k, v)
    weights = REFERENCES[kernel](a, _scored(q, k, scale), mask).stored()
    return einsum("...hnm,...mhe->...nhe", weights, v)


def attend(a: Arithmetic, q: Ball, k: Ball, v: Ball, mask: Any, kernel: str, scale: float) -> Ball:
    """composed_attend of arrays with radii: the weights of softmax move together.

    What a query is off by adds the same to all its scores but for the keys' distance from one point, here their mean by
    weight; what adds the same to all changes no weight.
    """
    composed = composed_attend(a, q, k, v, mask, kernel, scale)
    if kernel != "softmax" or not any(x.rad.any() for x in (q, k, v)):
        return composed
    k, v = (t.swapaxes(-2, -3) for t in _shared(q, k, v))
    scores = _scored(q, k.swapaxes(-2, -3), scale)
    seen, q = visible(mask, scores.shape), q.swapaxes(-2, -3)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = normalised(a.ball(scores.mid, 0.0), seen).value @ k.value
        away = [np.abs(k.value[..., None, :, i] - middle[..., i, None]) for i in range(k.shape[-1])]
        moved = sum(q.rad[..., i, None] * part for i, part in enumerate(away))
        moved = moved + q.magnitude @ k.rad.swapaxes(-1, -2)
        # These sums are formed in float64.
        moved = moved + gamma(2 * k.shape[-1] + 8, 2.0**-53) * (q.magnitude @ k.magnitude.swapaxes(-1, -2))
        size_q, size_k = (a.exact(t.magnitude).swapaxes(-2, -3) for t in (q, k))
        error = abs(scale) * moved + _scored(size_q, size_k, scale).rad
    rad = softmax_mean(scores, error, seen, v).swapaxes(-2, -3)
    return a.ball(composed.mid, np.fmin(composed.rad, rad))


def _shared(q: Ball, k: Ball, v: Ball) -> tuple[Ball, Ball]:
    """Keys and values of every query head."""
    heads, groups = q.shape[-2], k.shape[-2]
    shared = [h * groups // heads for h in range(heads)]
    return k[..., shared, :], v[..., shared, :]


def _scored(q: Ball, k: Ball, scale: float) -> Ball:
    # The scale may be folded into q, into k or, as a root, into both.
    return (einsum("...nhd,...mhd->...hnm", q, k, length=q.shape[-1] + 4) * scale).stored()


def attend_rotated_values(
    a: Arithmetic, q: Ball, k: Ball, v: Ball, mask: Any, positions_k: np.ndarray, layout: str, base: float, kernel: str,
    scale: float,
) -> Ball:  # fmt: skip
    """composed_attend, every value turned by the position of its key."""
    turned = rotate(a, v, np.asarray(positions_k)[..., None], base, layout=layout).stored()
    return composed_attend(a, q, k, turned, mask, kernel, scale)


def project(a: Arithmetic, x: Ball, w: Ball, b: Ball | None) -> Ball:
    """x W + b; the bias may be the first summand of the accumulator."""
    return affine(x, w, b)


def cross_attention(
    a: Arithmetic, x: Ball, memory: Ball, mask: Any, positions_q: Positions, positions_k: Positions, w_q: Ball,
    b_q: Ball | None, w_k: Ball, b_k: Ball | None, w_v: Ball, b_v: Ball | None, w_o: Ball, b_o: Ball | None,
    heads: int, layout: str, base: float, kernel: str, mix: Function = attend,
) -> Ball:  # fmt: skip
    """Projections, head-major columns, rotation of q and k, attend (`mix`), projection."""
    width = w_q.shape[-1] // heads
    groups = w_k.shape[-1] // width

    def split(t: Ball, count: int) -> Ball:
        return t.stored().reshape(*t.shape[:-1], count, t.shape[-1] // count)

    def placed(t: Ball, positions: Positions) -> Ball:
        return t if positions is None else rotate(a, t, positions[..., None], base, layout=layout).stored()

    q = placed(split(project(a, x, w_q, b_q), heads), positions_q)
    k = placed(split(project(a, memory, w_k, b_k), groups), positions_k)
    v = split(project(a, memory, w_v, b_v), groups)
    o = mix(a, q, k, v, mask, kernel, 1 / math.sqrt(width)).stored()
    return project(a, o.reshape(*o.shape[:-2], o.shape[-2] * o.shape[-1]), w_o, b_o)


def multi_head_attention(a: Arithmetic, x: Ball, mask: Any, positions: Positions, **options: Any) -> Ball:
    """cross_attention of x with itself."""
    return cross_attention(a, x, x, mask, positions, positions, **options)


OPERATORS = (
    # Frozen bounds are those of one operation after the other.
    Operator("attention.attend", _attend, composed_attend, multilinear=True),
    Operator("attention.attend_rotated_values", _attend_rotated_values, attend_rotated_values),
    Operator("attention.project", spec.project, project, multilinear=True),
    Operator(
        "attention.multi_head_attention", _multi_head_attention, partial(multi_head_attention, mix=composed_attend)
    ),
    Operator("attention.cross_attention", _cross_attention, partial(cross_attention, mix=composed_attend)),
    Operator("attention.causal_mask", spec.causal_mask, causal_mask, ("mask",)),
    Operator("attention.unilm_mask", spec.unilm_mask, unilm_mask, ("mask",)),
    Operator("attention.positions_from_mask", spec.positions_from_mask, positions_from_mask, ("positions",)),
)
_OPTIONS = ("exact", "note", "angle", "only")


# Cases.
def _case(function: str, name: str, clauses: str, **arguments: Any) -> Case:
    options = {k: arguments.pop(k) for k in _OPTIONS if k in arguments}
    return Case(f"attention.{function}", name, arguments, tuple(clauses.split()), **options)


def _qkv(
    draw: Draw, b: int, n: int, m: int, h: int, g: int, d: int, e: int, exponent: int = -6
) -> dict[str, np.ndarray]:
    return {
        "q": draw.grid(b, n, h, d, exponent=exponent),
        "k": draw.grid(b, m, g, d, exponent=exponent),
        "v": draw.grid(b, m, g, e),
    }


def key_rows(*rows: str) -> np.ndarray:
    """A key mask (b, 1, 1, m), one text of 0 and 1 per sequence."""
    return np.array([[c == "1" for c in row] for row in rows])[:, None, None, :]


def _poison(arrays: dict[str, np.ndarray], keys: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """1024 in every masked key and value."""
    hidden = ~keys.reshape(keys.shape[0], -1)
    made = dict(arrays)
    for name in names:
        shape = hidden.shape + (1,) * (made[name].ndim - 2)
        made[name] = np.where(hidden.reshape(shape), 1024.0, made[name])
    return made


def _attend_cases() -> list[Case]:
    scale = 1 / math.sqrt(7)
    keys = key_rows("00111", "11100")
    cases = []

    def add(
        name: str, clauses: str, arrays: dict[str, np.ndarray], mask: Any, kernel: str = "softmax", **more: Any
    ) -> None:
        cases.append(_case("attend", name, clauses, **arrays, mask=mask, kernel=kernel, **{"scale": scale, **more}))

    def draw(name: str) -> Draw:
        return Draw(f"attention.attend/{name}")

    add("heads", "C1 C4", _qkv(draw("heads"), 2, 5, 5, 3, 3, 7, 2), None)
    add("one-sequence", "C2 C3", _qkv(draw("one-sequence"), 1, 3, 5, 2, 2, 7, 3), key_rows("01011"))
    add("grouped", "C1", _qkv(draw("grouped"), 1, 3, 5, 6, 2, 7, 5), None, note="6 query heads on 2: neighbours share")
    add("one-key-head", "C1", _qkv(draw("one"), 2, 3, 5, 5, 1, 7, 3), None)
    padded = _poison(_qkv(draw("padded"), 2, 3, 5, 4, 2, 7, 3), keys, ("k", "v"))
    add("padding-left-and-right", "C2 C3", padded, keys, note="1024 in masked keys and values")
    nothing = np.concatenate([keys[:1], np.zeros_like(keys[:1])])
    add("nothing-visible", "C2", _qkv(draw("nothing"), 2, 2, 5, 3, 3, 7, 2), nothing)
    add(
        "causal",
        "C2 C3",
        _qkv(draw("causal"), 2, 7, 5, 2, 1, 7, 2),
        causal_mask(None, 7, 5),  # type: ignore[arg-type]
        note="more queries than keys: the first two see nothing",
    )
    heads = draw("per-head").mask(2, 3, 4, 5)
    add("mask-per-head", "C3", _qkv(draw("per-head"), 2, 4, 5, 3, 3, 7, 2), heads)
    add(
        "extreme",
        "C4",
        {**_qkv(draw("extreme"), 2, 3, 5, 2, 2, 7, 3), "k": 256 * draw("extreme/k").dense(2, 5, 2, 7)},
        None,
        note="scores of standard deviation 200",
    )
    add("scale-one", "C4", _qkv(draw("scale"), 2, 3, 5, 2, 2, 7, 3, -7), None, scale=1.0)
    add("negative-scale", "C4", _qkv(draw("negative"), 2, 3, 5, 2, 2, 7, 3), None, scale=-0.5)
    long = _poison(_qkv(draw("plus"), 2, 2, 17, 2, 1, 7, 3), key_rows("1" * 17, "1" * 6 + "0" * 11), ("k", "v"))
    add("softmax-plus", "C4", long, key_rows("1" * 17, "1" * 6 + "0" * 11), "softmax_plus_16")
    add("squared-relu", "C4", padded, keys, "squared_relu_visible")
    add("laplace", "C4", padded, keys, "laplace")
    dense = {name: 2 * draw("dense/" + name).dense(*shape) for name, shape in
             (("q", (2, 3, 2, 7)), ("k", (2, 5, 2, 7)), ("v", (2, 5, 2, 3)))}  # fmt: skip
    add("dense", "C1", dense, None)
    fine = {name: 2 * draw("fine/" + name).dense(*shape, bits=53) for name, shape in
            (("q", (1, 3, 2, 7)), ("k", (1, 5, 2, 7)), ("v", (1, 5, 2, 3)))}  # fmt: skip
    add("dense-53", "C1", fine, None)

    def small(name: str, b: int, n: int, m: int, h: int, g: int, d: int, e: int) -> dict[str, np.ndarray]:
        d_ = draw(name)
        return {
            "q": d_.ternary(b, n, h, d),
            "k": d_.ternary(b, m, g, d),
            "v": d_.grid(b, m, g, e, low=-7, high=7, exponent=0),
        }

    four = key_rows("01111", "10000")
    add("exact-visible", "C1 C2", _poison(small("e1", 2, 3, 5, 6, 2, 7, 3), four, ("k", "v")), four,
        "squared_relu_visible", scale=0.5, exact=True)  # fmt: skip
    add("exact-grouped", "C1", small("e2", 2, 3, 5, 6, 3, 7, 2), None, "squared_relu_1", scale=0.25, exact=True)
    add("exact-one-head", "C4", small("e3", 3, 5, 7, 1, 1, 11, 2), None, "squared_relu_1", scale=-1.0, exact=True)
    shared = np.array([[True, False, True, True, True], [False] * 5, [False, False, True, False, False]])
    add(
        "exact-shared-mask",
        "C2 C3",
        small("e4", 2, 3, 5, 4, 1, 7, 3),
        shared,
        "squared_relu_visible",
        scale=2.0,
        exact=True,
    )
    # Weight 9 on the first value against 1 on eight others: what is left is a ninth of every part.
    lone = np.concatenate([np.full((1, 1, 1, 3), 1.0), np.tile([1.0, 0.0, 0.0], (1, 8, 1, 1))], axis=1)
    values = np.concatenate([np.full((1, 1, 1, 2), 8.0), np.full((1, 8, 1, 2), -9.0)], axis=1)
    values[0, 0, 0, 1], values[0, 3, 0, 1] = 7.0, 1.0
    queries = np.array([[[[1.0, 1, 1]], [[1, 0, 0]], [[0, 1, -1]]]])
    arrays = {"q": queries, "k": lone, "v": values}
    add("exact-cancellation", "C1", arrays, None, "squared_relu_1", scale=1.0, exact=True,
        note="72 - 72: an error of one part in a thousand shows in 16 bits")  # fmt: skip
    return cases


def _rotated_value_cases() -> list[Case]:
    def case(name: str, clauses: str, positions: np.ndarray, mask: Any = None, **more: Any) -> Case:
        draw = Draw(f"attention.attend_rotated_values/{name}")
        arrays = _qkv(draw, 2, 3, 5, 4, 2, 7, 6)
        base = {"layout": "interleaved", "base": 10000.0, "kernel": "softmax", "scale": 0.375, **more}
        return _case("attend_rotated_values", name, clauses, **arrays, mask=mask, positions_k=positions, **base)

    some = np.array([[4, 0, 9, 2, 7], [1, 2, 3, 5, 8]])
    return [
        case("consecutive", "C1 C2", np.arange(5)),
        case("per-sequence", "C1", some),
        case("half-split", "C1", some, layout="half_split"),
        case("base-100", "C1", np.arange(5), base=100.0),
        case("long", "C1", np.array([0, 511, 4097, 5000, 8191])),
        case("masked", "C1", some, key_rows("00111", "11101")),
        case("squared-relu", "C1", some, key_rows("00111", "11101"), kernel="squared_relu_visible"),
    ]


def _project_cases() -> list[Case]:
    def case(name: str, clauses: str, shape: tuple[int, ...], out: int, bias: bool, kind: str, **more: Any) -> Case:
        draw = Draw(f"attention.project/{name}")
        make: dict[str, Callable[..., np.ndarray]] = {
            "grid": draw.grid, "dense": draw.dense, "ternary": draw.ternary,
            "dense-53": lambda *s: draw.dense(*s, bits=53),
        }  # fmt: skip
        x, w = make[kind](*shape), make[kind](shape[-1], out)
        return _case("project", name, clauses, x=x, w=w, b=make[kind](out) if bias else None, **more)

    def small(name: str, *shape: int, out: int, bias: bool = True) -> Case:
        draw = Draw(f"attention.project/{name}")
        # Sums below 128 in whole steps: the product survives 8 bits before the bias is added.
        x, w = draw.ternary(*shape), draw.grid(shape[-1], out, low=-10, high=10, exponent=0)
        b = draw.grid(out, low=-15, high=15, exponent=0) if bias else None
        return _case("project", name, "C1", x=x, w=w, b=b, exact=True)

    cancel = np.array([[127.0, -126.0, 1.0], [1.0, 1.0, 0.0]])
    return [
        case("bias", "C1", (2, 3, 7), 5, True, "grid"),
        case("no-bias", "C1", (2, 3, 7), 5, False, "grid"),
        case("one-row", "C1", (11,), 7, True, "grid"),
        case("dense", "C1", (3, 11), 5, True, "dense"),
        case("dense-53", "C1", (3, 11), 5, True, "dense-53"),
        small("exact-wide", 2, 7, out=11),
        small("exact-tall", 3, 11, out=2),
        small("exact-square", 5, 5, out=5),
        small("exact-no-bias", 2, 3, 7, out=5, bias=False),
        _case("project", "exact-cancellation", "C1", exact=True, x=cancel, w=np.array([[1.0, 2], [1, 2], [0, 1]]),
              b=np.array([0.0, -1.0]), note="127 - 126"),
    ]  # fmt: skip


def weights_of(
    draw: Draw, d: int, d_memory: int, heads: int, groups: int, width: int, e: int, out: int, bias: bool
) -> dict:
    """Projections of width heads * width and so on, in steps of 2^-7."""
    shapes = {
        "q": (d, heads * width),
        "k": (d_memory, groups * width),
        "v": (d_memory, groups * e),
        "o": (heads * e, out),
    }
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        made[f"w_{name}"] = draw.grid(*shape, low=-95, high=95, exponent=-7)
        made[f"b_{name}"] = draw.grid(shape[1], low=-63, high=63, exponent=-6) if bias else None
    return made


def _layer_cases() -> list[Case]:
    cases = []

    def add(
        name: str, clauses: str, mask: Any, positions: Any, *, b: int = 2, n: int = 3, m: int = 5, heads: int = 2,
        groups: int = 2, bias: bool = True, poison: bool = False, width: int = 4, **more: Any,
    ) -> None:  # fmt: skip
        """One case of the layer with itself (m tokens), one with a memory of m tokens."""
        options = {"heads": heads, "layout": "interleaved", "base": 10000.0, "kernel": "softmax", **more}
        cross = isinstance(positions, tuple)
        function = "cross_attention" if cross else "multi_head_attention"
        draw = Draw(f"attention.{function}/{name}")
        weights = weights_of(draw, 5, 7 if cross else 5, heads, groups, width, 3, 5, bias)
        hidden = None if mask is None or not poison else ~mask.reshape(b, -1)[..., None]
        if cross:
            memory = draw.grid(b, m, 7, low=-63, high=63)
            arrays = {"x": draw.grid(b, n, 5, low=-63, high=63), "memory": memory}
            arrays["memory"] = memory if hidden is None else np.where(hidden, 4.0, memory)
            arrays |= {"mask": mask, "positions_q": positions[0], "positions_k": positions[1]}
        else:
            x = draw.grid(b, m, 5, low=-63, high=63)
            arrays = {"x": x if hidden is None else np.where(hidden, 4.0, x), "mask": mask, "positions": positions}
        cases.append(_case(function, name, clauses, **arrays, **weights, **options))

    keys = key_rows("00111", "11100")
    counted = np.array([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    some = np.array([[4, 0, 9, 2, 7], [1, 2, 3, 5, 8]])
    causal = np.tri(5, dtype=bool)
    add("plain", "C1", None, np.arange(5))
    add("no-bias", "C1", None, np.arange(5), bias=False)
    add(
        "padding-left-and-right",
        "C1",
        keys,
        counted,
        poison=True,
        note="4 in the padded tokens, four times the largest real feature",
    )
    add("causal", "C1", causal, np.arange(5))
    add("grouped", "C1", None, some, heads=6, groups=2)
    add("half-split", "C1", None, some, layout="half_split")
    add("base-100", "C1", None, some, base=100.0)
    add("long", "C1", None, np.array([4090, 4097, 4100, 5003, 6001]))
    add("beyond-2-17", "C1", None, np.array([200003, 200001, 200017, 262143, 200000]), b=1, angle="A64")
    add("unrotated", "C1", None, None)
    add("one-token", "C1", None, np.array([7]), m=1)
    add("softmax-plus", "C1", keys, counted, kernel="softmax_plus_16")
    add("softmax-plus-counted", "C1", keys, counted, kernel="softmax_plus_1")
    add("squared-relu", "C1", keys, counted, kernel="squared_relu_visible", bias=False)
    add("head-width-6", "C1", None, np.arange(5), width=6)

    add("both-rotated", "C1 C3 C4", None, (np.array([5, 2, 3]), np.arange(5)))
    add("queries-rotated", "C3", None, (np.array([5, 2, 3]), None))
    add("keys-rotated", "C3", None, (None, some))
    add("unrotated", "C3", None, (None, None), note="as Hugging Face RoFormer does")
    add("grouped", "C1 C2", None, (np.arange(3), some), heads=6, groups=2)
    add("no-bias", "C1", None, (np.arange(3), some), bias=False)
    add("masked", "C2", keys, (np.array([[3, 1, 2], [9, 0, 4]]), counted), poison=True)
    add("half-split", "C4", None, (np.arange(3), some), layout="half_split")
    add("grouped-half-split", "C2 C4", None, (np.arange(3), some), heads=2, groups=1, layout="half_split")
    add("base-500", "C4", None, (np.arange(3), some), base=500.0)
    add("head-width-6", "C1", None, (np.arange(3), some), width=6)
    add("long", "C4", None, (np.array([4099, 5000, 4096]), np.array([4098, 4097, 5001, 4095, 4100])))
    return cases


def _discrete_cases() -> list[Case]:
    lengths = [(3, 3), (2, 5), (5, 2), (2, 7), (7, 7), (7, 1), (3, 4)]
    segments = {
        "prefix-then-target": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
        "one-segment": [[0, 0, 0], [0, 0, 1]],
        "all-target": [1, 1, 1, 1],
        "padded-with-zeros": [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]],
        "batch-of-three": [[0, 1, 1], [0, 0, 1], [1, 1, 1]],
        "long-prefix": [0, 0, 0, 0, 0, 1, 1],
    }
    valid = {
        "left": ["0011", "1111"], "right": ["1100", "1111"], "both": ["01100", "00111"], "gap": ["110110", "101010"],
        "nothing": ["000", "011"], "three": ["0001111", "1111000", "0111110"],
    }  # fmt: skip
    return [
        *(_case("causal_mask", f"{n}-of-{m}", "C1 C2" if n > m else "C1", n=n, m=m) for n, m in lengths),
        *(_case("unilm_mask", name, "C1 C2 C3", segment_ids=np.array(ids)) for name, ids in segments.items()),
        *(_case("positions_from_mask", name, "C1 C2", valid=np.array([[c == "1" for c in r] for r in rows]))
          for name, rows in valid.items()),
    ]  # fmt: skip


CASES = (*_attend_cases(), *_rotated_value_cases(), *_project_cases(), *_layer_cases(), *_discrete_cases())


# Laws.
_LAYERS = ("attention.multi_head_attention", "attention.cross_attention")
_MIXERS = ("attention.attend", "attention.attend_rotated_values")
_NORMALISED = ("softmax", "softmax_plus_16")


def _keys_of(case: Case) -> str:
    """The argument that holds the tokens that become keys."""
    return next(n for n in ("memory", "k", "x") if n in case.arguments)


def _scores_shape(case: Case) -> tuple[int, ...]:
    if "q" in case.arguments:
        b, n, h, _ = case["q"].shape
    else:
        (b, n, _), h = case["x"].shape, case["heads"]
    return b, h, n, case[_keys_of(case)].shape[1]


def masked_keys_do_not_matter(implementation: Function, case: Case) -> None:
    """Changing keys and values that no query of their sequence sees changes nothing, bit for bit."""
    seen = visible(case["mask"], _scores_shape(case)).any(axis=(1, 2))
    names = ("k", "v") if "k" in case.arguments else (_keys_of(case),)
    changes = {n: np.where(seen.reshape(seen.shape + (1,) * (case[n].ndim - 2)), case[n], -40.0) for n in names}
    before, after = run(implementation, case)[0].value, run(implementation, case, **changes)[0].value
    # In self-attention a padded token is a query as well.
    queries = np.ones(before.shape[:2], bool) if names[0] != "x" else seen
    chosen = queries.reshape(queries.shape + (1,) * (before.ndim - 2))
    equal("masked_keys_do_not_matter", case, np.where(chosen, after, 0.0), np.where(chosen, before, 0.0))


def a_broadcast_mask_is_the_mask_written_out(implementation: Function, case: Case) -> None:
    """A mask with axes of length 1, or none at all, gives what the same mask gives when it is written out."""
    mask = visible(case["mask"], _scores_shape(case)).copy()
    one, two = run(implementation, case)[0], run(implementation, case, mask=mask)[0]
    close("a_broadcast_mask_is_the_mask_written_out", case, two.value, one.value, one.radius + two.radius)


def keys_may_come_in_any_order(implementation: Function, case: Case) -> None:
    """Reversing keys, values, their positions and their mask changes nothing."""
    mask = visible(case["mask"], _scores_shape(case))[..., ::-1].copy()
    changes: dict[str, Any] = {"mask": mask}
    for name in ("k", "v", "memory"):
        if name in case.arguments:
            changes[name] = case[name][:, ::-1].copy()
    if case.arguments.get("positions_k") is not None:
        changes["positions_k"] = case["positions_k"][..., ::-1].copy()
    one, two = run(implementation, case)[0], run(implementation, case, **changes)[0]
    close("keys_may_come_in_any_order", case, two.value, one.value, one.radius + two.radius)


def masked_keys_may_be_added(implementation: Function, case: Case) -> None:
    """Two masked keys on either side change nothing."""
    shape = _scores_shape(case)
    hidden = np.zeros((*shape[:-1], 2), bool)
    changes: dict[str, Any] = {"mask": np.concatenate([hidden, visible(case["mask"], shape), hidden], axis=-1)}
    for name in ("k", "v", "memory"):
        if name in case.arguments:
            junk = np.full((case[name].shape[0], 2, *case[name].shape[2:]), 30.0)
            changes[name] = np.concatenate([junk, case[name], -junk], axis=1)
    if case.arguments.get("positions_k") is not None:
        changes["positions_k"] = np.pad(case["positions_k"], [(0, 0)] * (case["positions_k"].ndim - 1) + [(2, 2)])
    one, two = run(implementation, case)[0], run(implementation, case, **changes)[0]
    close("masked_keys_may_be_added", case, two.value, one.value, one.radius + two.radius)


def padding_stands_on_either_side(implementation: Function, case: Case) -> None:
    """Masked tokens before and after, with positions counted without them, change nothing on the real tokens."""
    b, n, d = case["x"].shape
    junk, none = np.full((b, 2, d), 30.0), np.zeros((b, 2), bool)
    valid = np.concatenate([none, np.ones((b, n), bool), none], axis=1)
    whole = visible(case["mask"], _scores_shape(case))
    mask = np.zeros((*whole.shape[:2], n + 4, n + 4), bool) | valid[:, None, None]
    mask[..., 2:-2, 2:-2] = whole
    changes: dict[str, Any] = {"x": np.concatenate([junk, case["x"], -junk], axis=1), "mask": mask}
    if case["positions"] is not None:
        changes["positions"] = np.pad(case["positions"], [(0, 0)] * (case["positions"].ndim - 1) + [(2, 2)])
    one, two = run(implementation, case)[0], run(implementation, case, **changes)[0]
    radius = one.radius + two.radius[:, 2:-2]
    close("padding_stands_on_either_side", case, two.value[:, 2:-2], one.value, radius)


def queries_are_independent(implementation: Function, case: Case) -> None:
    """Changing one query changes no other, bit for bit."""
    name = "q" if "q" in case.arguments else "x"
    changed = case[name].copy()
    changed[:, 0] = -2 * changed[:, 0]
    before, after = run(implementation, case)[0].value, run(implementation, case, **{name: changed})[0].value
    equal("queries_are_independent", case, after[:, 1:], before[:, 1:])


def the_future_changes_nothing(implementation: Function, case: Case) -> None:
    """Under a causal mask the last token changes only its own output, bit for bit."""
    changed = case["x"].copy()
    changed[:, -1] = -2 * changed[:, -1]
    mask = np.tri(changed.shape[1], dtype=bool)
    before, after = (run(implementation, case, x=x, mask=mask)[0].value for x in (case["x"], changed))
    equal("the_future_changes_nothing", case, after[:, :-1], before[:, :-1])


def equal_values_come_back(implementation: Function, case: Case) -> None:
    """A normalised kernel gives a value back that all keys share; nothing where no key is seen."""
    if case["kernel"] in _NORMALISED:
        b, n, h, _ = case["q"].shape
        v = np.broadcast_to(case["v"][:, :1], case["v"].shape).copy()
        out = run(implementation, case, v=v)[0]
        shared = np.repeat(v[:, :1], h // v.shape[2], axis=2)
        any_key = np.swapaxes(visible(case["mask"], _scores_shape(case)).any(-1), 1, 2)[..., None]
        close("equal_values_come_back", case, out.value, np.where(any_key, shared, 0.0), out.radius)


def repeated_key_heads_are_grouped_heads(implementation: Function, case: Case) -> None:
    """Writing every key head out for the query heads that share it, neighbours first, changes nothing."""
    share = case["q"].shape[2] // case["k"].shape[2]
    one = run(implementation, case)[0]
    two = run(implementation, case, k=np.repeat(case["k"], share, axis=2), v=np.repeat(case["v"], share, axis=2))[0]
    close("repeated_key_heads_are_grouped_heads", case, two.value, one.value, one.radius + two.radius)


def _scores(case: Case, q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """scale q · k with the key heads written out, (b, h, n, m)."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.einsum("bnhd,bmhd->bhnm", q, k) * scale


def one_hot_values_show_the_weights(implementation: Function, case: Case) -> None:
    """Values that name their key show the weights: log ratios of a softmax, opposite signs of a squared ReLU."""
    law = "one_hot_values_show_the_weights"
    b, h, n, m = _scores_shape(case)
    v = np.broadcast_to(np.eye(m)[:, None], (b, m, case["k"].shape[2], m)).copy()
    seen = visible(case["mask"], (b, h, n, m))
    scores = _scores(case, case["q"], case["k"], case["scale"])
    out = run(implementation, case, v=v)[0]
    weights, radius = out.value.swapaxes(1, 2), out.radius.swapaxes(1, 2)
    equal(law, case, np.where(seen, 0.0, weights), np.zeros(seen.shape))
    count = np.maximum(seen.sum(-1, keepdims=True), 1)
    if case["kernel"] in _NORMALISED:
        slope = np.log(np.maximum(count, 16)) / math.log(512) if case["kernel"] == "softmax_plus_16" else 1.0
        # Below 1e-290 float64 itself runs out of digits.
        known = seen & (weights > np.maximum(4 * radius, 1e-290))
        value = np.where(known, weights, 1.0)
        part = np.where(known, radius / value, 0.0)
        top = np.argmax(np.where(known, value, 0.0), axis=-1, keepdims=True)
        usable = known & np.take_along_axis(known, top, -1)
        actual = np.log(value) - np.log(np.take_along_axis(value, top, -1))
        expected = slope * (scores - np.take_along_axis(scores, top, -1))
        tolerance = 4 / 3 * (part + np.take_along_axis(part, top, -1)) + 2.0**-46 * (1 + np.abs(expected))
        close(law, case, np.where(usable, actual, 0.0), np.where(usable, expected, 0.0), tolerance)
    elif case["kernel"] != "laplace":
        other = run(implementation, case, v=v, q=-case["q"])[0]
        expected = np.where(seen, scores**2, 0.0) / (count if case["kernel"].endswith("visible") else 1)
        both = weights + other.value.swapaxes(1, 2)
        close(law, case, both, expected, radius + other.radius.swapaxes(1, 2) + 2.0**-48 * np.abs(expected))


def rotated_values_are_complex_products(implementation: Function, case: Case) -> None:
    """One visible key: its value comes back as complex numbers times exp(i p θ)."""
    b, h, n, m = _scores_shape(case)
    mask = np.zeros((b, 1, n, m), bool)
    key = np.arange(n) % m
    mask[:, :, np.arange(n), key] = True
    out = run(implementation, case, mask=mask, kernel="softmax")[0]
    v = np.repeat(case["v"], h // case["v"].shape[2], axis=2)[:, key]
    half = v.shape[-1] // 2
    positions = np.broadcast_to(case["positions_k"], (b, m))[:, key, None, None]
    turn = np.exp(1j * positions * case["base"] ** (-np.arange(half) / half))
    if case["layout"] == "interleaved":
        z = (v[..., 0::2] + 1j * v[..., 1::2]) * turn
        expected = np.stack([z.real, z.imag], axis=-1).reshape(v.shape)
    else:
        z = (v[..., :half] + 1j * v[..., half:]) * turn
        expected = np.concatenate([z.real, z.imag], axis=-1)
    # Angles formed in float64 are off by a few units of their size.
    tolerance = out.radius + 2.0**-48 * (1 + np.abs(positions)) * np.abs(v).max(-1, keepdims=True)
    close("rotated_values_are_complex_products", case, out.value, expected, tolerance)


def projection_is_affine(implementation: Function, case: Case) -> None:
    """One-hot rows give the rows of W plus b; a zero row gives b."""
    d, out = case["w"].shape
    b = np.zeros(out) if case["b"] is None else case["b"]
    got = run(implementation, case, x=np.concatenate([np.eye(d), np.zeros((1, d))]))[0]
    expected = np.concatenate([case["w"], np.zeros((1, out))]) + b
    close("projection_is_affine", case, got.value, expected, got.radius)


def rows_are_projected_alone(implementation: Function, case: Case) -> None:
    """Doubling one row of x doubles its product with W and leaves the other rows as they are."""
    x = case["x"].copy()
    x[0] *= 2
    b = 0.0 if case["b"] is None else case["b"]
    one, two = run(implementation, case)[0], run(implementation, case, x=x)[0]
    equal("rows_are_projected_alone", case, two.value[1:], one.value[1:])
    radius = 2 * one.radius[0] + two.radius[0] + 2.0**-50 * np.abs(b)
    close("rows_are_projected_alone", case, two.value[0], 2 * one.value[0] - b, radius)


def a_common_shift_of_positions_changes_nothing(implementation: Function, case: Case) -> None:
    """Only differences of positions matter."""
    names = [n for n in ("positions", "positions_q", "positions_k") if n in case.arguments]
    if any(case[n] is None for n in names):
        return
    one, two = run(implementation, case)[0], run(implementation, case, **{n: case[n] + 17 for n in names})[0]
    radius = one.radius + two.radius
    close("a_common_shift_of_positions_changes_nothing", case, two.value, one.value, radius)


def biases_are_weights_of_a_constant_feature(implementation: Function, case: Case) -> None:
    """A feature that is 1, with the bias as its row of W, replaces b_q, b_k and b_v."""
    if case["b_q"] is None:
        return

    def with_one(t: np.ndarray) -> np.ndarray:
        return np.concatenate([t, np.ones((*t.shape[:-1], 1))], axis=-1)

    changes = {n: with_one(case[n]) for n in ("x", "memory") if n in case.arguments}
    for name in "qkv":
        changes[f"w_{name}"] = np.concatenate([case[f"w_{name}"], case[f"b_{name}"][None]])
    one = run(implementation, case)[0]
    two = run(implementation, case, **changes, b_q=None, b_k=None, b_v=None)[0]
    radius = one.radius + two.radius
    close("biases_are_weights_of_a_constant_feature", case, two.value, one.value, radius)


def the_output_is_affine_in_its_projection(implementation: Function, case: Case) -> None:
    """Doubling W_o and b_o doubles the output; W_o = 0 leaves b_o."""
    law, b_o = "the_output_is_affine_in_its_projection", case["b_o"]
    one = run(implementation, case)[0]
    two = run(implementation, case, w_o=2 * case["w_o"], b_o=None if b_o is None else 2 * b_o)[0]
    close(law, case, two.value, 2 * one.value, two.radius + 2 * one.radius)
    nothing = run(implementation, case, w_o=0 * case["w_o"])[0]
    expected = np.broadcast_to(0.0 if b_o is None else b_o, nothing.value.shape)
    close(law, case, nothing.value, expected, nothing.radius)


def _selected(count: int, size: int, rows: int) -> np.ndarray:
    """Column head · size + j selects feature (head + j) mod rows."""
    return np.eye(rows)[:, [(h + j) % rows for h in range(count) for j in range(size)]]


def selected_features_attend_as_complex_numbers(implementation: Function, case: Case) -> None:
    """Projections that select features: every head is softmax(Re(conj(k) q) / √width) over complex pairs, rotated."""
    memory, heads = case[_keys_of(case)], case["heads"]
    width = case["w_q"].shape[1] // heads
    groups = case["w_k"].shape[1] // width
    d, dm = case["x"].shape[-1], memory.shape[-1]
    w_q, w_k, w_v = _selected(heads, width, d), _selected(groups, width, dm), _selected(groups, 2, dm)
    free = dict.fromkeys(("b_q", "b_k", "b_v", "b_o"))
    out = run(implementation, case, w_q=w_q, w_k=w_k, w_v=w_v, w_o=np.eye(2 * heads), kernel="softmax", **free)[0]

    def heads_of(t: np.ndarray, w: np.ndarray, count: int) -> np.ndarray:
        return np.repeat((t @ w).reshape(*t.shape[:2], count, -1), heads // count, axis=2)

    def turned(t: np.ndarray, positions: Positions) -> np.ndarray:
        half = width // 2
        pairs = (t[..., 0::2], t[..., 1::2]) if case["layout"] == "interleaved" else (t[..., :half], t[..., half:])
        z = pairs[0] + 1j * pairs[1]
        if positions is None:
            return z
        theta = case["base"] ** (-np.arange(half) / half)
        return z * np.exp(1j * np.broadcast_to(positions, t.shape[:2])[..., None, None] * theta)

    both = case.arguments.get("positions")
    q = turned(heads_of(case["x"], w_q, heads), case.arguments.get("positions_q", both))
    k = turned(heads_of(memory, w_k, groups), case.arguments.get("positions_k", both))
    scores = np.einsum("bnhi,bmhi->bhnm", q, k.conj()).real / math.sqrt(width)
    seen = visible(case["mask"], scores.shape)
    scores = np.where(seen, scores, -np.inf)
    top = np.where(seen.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0.0)
    weights = np.exp(scores - top)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    expected = np.einsum("bhnm,bmhe->bnhe", weights, heads_of(memory, w_v, groups))
    # 2^-40 is the error of the comparison itself, at positions and scores below a thousand.
    tolerance = out.radius + 2.0**-40
    close("selected_features_attend_as_complex_numbers", case, out.value, expected.reshape(out.value.shape), tolerance)


def the_last_query_sees_everything(implementation: Function, case: Case) -> None:
    """Row n - 1 sees every key, and each row one key fewer than the next, as far as there are keys."""
    out = run(implementation, case)[0].value
    n, m = out.shape
    expected = [[float(j + (n - 1 - i) < m) for j in range(m)] for i in range(n)]
    equal("the_last_query_sees_everything", case, out, np.reshape(expected, (n, m)))


def target_tokens_add_one_key_each(implementation: Function, case: Case) -> None:
    """Ids of a prefix and a target: prefix rows see the prefix, row i of the target i + 1 keys."""
    n = case["segment_ids"].shape[-1]
    for start in range(n + 1):
        ids = (np.arange(n) >= start).astype(np.int64)
        out = run(implementation, case, segment_ids=ids)[0].value
        expected = np.arange(n) < np.maximum(np.arange(n) + 1, start)[:, None]
        equal("target_tokens_add_one_key_each", case, out, expected.astype(np.float64))


def real_tokens_count_from_zero(implementation: Function, case: Case) -> None:
    """Real tokens are at 0, 1, 2, ...; a padded one stands where the last real token before it does, or at 0."""
    out = run(implementation, case)[0].value
    for row, valid in zip(out.reshape(-1, out.shape[-1]), case["valid"].reshape(-1, out.shape[-1]), strict=True):
        equal("real_tokens_count_from_zero", case, row[valid], np.arange(valid.sum(), dtype=np.float64))
        kept = np.concatenate([[0.0], row])
        equal("real_tokens_count_from_zero", case, row[~valid], kept[:-1][~valid])


LAWS = (
    Law(masked_keys_do_not_matter, (*_MIXERS, *_LAYERS)),
    Law(a_broadcast_mask_is_the_mask_written_out, (*_MIXERS, *_LAYERS)),
    Law(keys_may_come_in_any_order, (*_MIXERS, "attention.cross_attention")),
    Law(masked_keys_may_be_added, (*_MIXERS, "attention.cross_attention")),
    Law(padding_stands_on_either_side, _LAYERS[:1], ("C1",)),
    Law(queries_are_independent, (*_MIXERS, "attention.cross_attention")),
    Law(the_future_changes_nothing, _LAYERS[:1]),
    Law(equal_values_come_back, _MIXERS[:1], ("C1",)),
    Law(repeated_key_heads_are_grouped_heads, _MIXERS, ("C1",)),
    Law(one_hot_values_show_the_weights, _MIXERS[:1], ("C4",)),
    Law(rotated_values_are_complex_products, _MIXERS[1:], ("C1", "C2")),
    Law(projection_is_affine, ("attention.project",), ("C1",)),
    Law(rows_are_projected_alone, ("attention.project",)),
    Law(a_common_shift_of_positions_changes_nothing, _LAYERS),
    Law(biases_are_weights_of_a_constant_feature, _LAYERS),
    Law(the_output_is_affine_in_its_projection, _LAYERS),
    Law(selected_features_attend_as_complex_numbers, _LAYERS[:1], ("C1",)),
    Law(selected_features_attend_as_complex_numbers, _LAYERS[1:], ("C1", "C2", "C3", "C4")),
    Law(the_last_query_sees_everything, ("attention.causal_mask",), ("C1", "C2")),
    Law(target_tokens_add_one_key_each, ("attention.unilm_mask",), ("C1", "C2")),
    Law(real_tokens_count_from_zero, ("attention.positions_from_mask",), ("C1", "C2")),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Grouped heads, every kind of mask, positions up to 50 in any order, each kernel."""
    # The first choice is what shrinking tends to: one that still tells faults apart.
    small = {"b": st.sampled_from([1, 2]), "n": st.sampled_from([2, 3, 4, 1]), "m": st.sampled_from([2, 3, 5, 4, 1])}
    grouping = st.sampled_from([(2, 2), (4, 2), (2, 1), (6, 2), (6, 3), (3, 1), (1, 1)])
    kinds = st.sampled_from(["none", "keys", "full", "shared"])
    options = {
        "kernel": st.sampled_from(["softmax", "softmax_plus_16", "squared_relu_visible", "squared_relu_1", "laplace"]),
        "layout": st.sampled_from(["interleaved", "half_split"]), "base": st.sampled_from([100.0, 500.0]),
    }  # fmt: skip

    def masked(draw: Draw, kind: str, b: int, h: int, n: int, m: int) -> Any:
        shapes = {"keys": (b, 1, 1, m), "full": (b, h, n, m), "shared": (n, m)}
        return None if kind == "none" else draw.mask(*shapes[kind], keep=0.7)

    def mixer(draw: Draw, b: int, n: int, m: int, heads: tuple[int, int], kind: str, scale: float, **more: Any) -> dict:
        h, g = heads
        arrays: dict[str, Any] = {**_qkv(draw, b, n, m, h, g, 3, 4), "mask": masked(draw, kind, b, h, n, m)}
        arrays |= {"kernel": more["kernel"], "scale": scale}
        if function == "attend_rotated_values":
            arrays |= {"positions_k": draw.integers((b, m), 0, 50), "layout": more["layout"], "base": more["base"]}
        return arrays

    def layer(
        draw: Draw, b: int, n: int, m: int, heads: tuple[int, int], kind: str, bias: bool, places: str, **more: Any
    ) -> dict:
        h, g = heads
        cross = function == "cross_attention"
        arrays: dict[str, Any] = {**weights_of(draw, 5, 3 if cross else 5, h, g, 4, 2, 3, bias), "heads": h, **more}
        arrays |= {"x": draw.grid(b, n if cross else m, 5, low=-95, high=95)}
        arrays["mask"] = masked(draw, kind, b, h, n if cross else m, m)
        where = {"q": draw.integers((b, n), 0, 50), "k": draw.integers(m, 0, 50)}
        if cross:
            arrays["memory"] = draw.grid(b, m, 3, low=-95, high=95)
            return arrays | {f"positions_{side}": where[side] if side in places else None for side in "qk"}
        return arrays | {"positions": where["k"] if places else None}

    name = f"attention.{function}"
    if function in ("attend", "attend_rotated_values"):
        scales = st.sampled_from([0.25, 0.5, -0.5, 1.0])
        return drawn(name, profile, mixer, **small, heads=grouping, kind=kinds, scale=scales, **options)
    if function in ("multi_head_attention", "cross_attention"):
        places = st.sampled_from(["qk", "qk", "q", "k", ""])
        return drawn(
            name, profile, layer, **small, heads=grouping, kind=kinds, bias=st.booleans(), places=places, **options
        )
    if function == "project":

        def dense(draw: Draw, b: int, n: int, m: int, bias: bool) -> dict:
            return {"x": draw.dense(b + 1, n), "w": draw.dense(n, m), "b": draw.dense(m) if bias else None}

        return drawn(name, profile, dense, **small, bias=st.booleans())
    if function == "causal_mask":
        return drawn(name, profile, lambda draw, n, m: {"n": n, "m": m}, n=st.integers(0, 7), m=st.integers(0, 7))
    if function == "unilm_mask":
        return drawn(name, profile, lambda draw, n: {"segment_ids": draw.integers((2, n), 0, 1)}, n=st.integers(1, 7))
    return drawn(name, profile, lambda draw, n: {"valid": draw.mask(2, n, keep=0.6)}, n=st.integers(1, 8))


# Mutants: a right layer in NumPy with hooks for one fault each.
def np_rotate(x: np.ndarray, positions: Any, base: float, layout: str) -> np.ndarray:
    """x (b, n, h, d) turned by positions (..., n)."""
    if positions is None:
        return x
    return LAYOUTS[layout](x, rope.angles(positions, rope.frequencies(x.shape[-1], base=base))[..., None, :])


def np_attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any, kernel: str, scale: float,
    share: Callable[[np.ndarray, int], np.ndarray] = lambda t, times: np.repeat(t, times, axis=2),
) -> np.ndarray:  # fmt: skip
    """attend, with the way key heads are shared left open."""
    times = q.shape[2] // k.shape[2]
    scores = np.einsum("bnhd,bmhd->bhnm", q, share(k, times)) * scale
    seen = visible(mask, scores.shape)
    return np.einsum("bhnm,bmhe->bnhe", KERNELS[kernel](np.nan_to_num(scores), seen), share(v, times))


def _mixer(**hook: Any) -> Function:
    """attend with some arguments changed by functions of the arguments."""

    def call(**arguments: Any) -> np.ndarray:
        return np_attend(**{**arguments, **{name: change(**arguments) for name, change in hook.items()}})

    return call


def _tiled(t: np.ndarray, times: int) -> np.ndarray:
    return np.tile(t, (1, 1, times, 1))


def _rotating(**hook: Any) -> Function:
    def call(
        q: Any, k: Any, v: Any, mask: Any, positions_k: Any, layout: str, base: float, kernel: str, scale: float
    ) -> Any:
        made = {"positions": positions_k, "layout": layout, "base": base}
        made |= {n: h(made[n]) for n, h in hook.items() if n in made}
        turned = np_rotate(v, made["positions"], made["base"], made["layout"])
        if "order" in hook:
            turned = turned[..., hook["order"](v.shape[-1])]
        return np_attend(q, k, turned, mask, kernel, scale)

    return call


def _layer(
    *, cross: bool = False, scale: Callable[[int, int], float] = lambda width, heads: width**-0.5,
    split: Callable[[np.ndarray, int], np.ndarray] | None = None, mask_of: Callable[[Any], Any] = lambda mask: mask,
    place_q: Callable[[Any], Any] = lambda p: p, place_k: Callable[[Any], Any] = lambda p: p,
    base_of: Callable[[float], float] = float,
    values_too: bool = False, drop: tuple[str, ...] = (), layout_of: dict[str, str] | None = None,
    rotate_whole: bool = False, merge: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Function:  # fmt: skip
    """A layer with one fault."""

    def call(**given: Any) -> np.ndarray:
        at = {**given, **dict.fromkeys(drop)}
        x = at["x"]
        memory = at["memory"] if cross else x
        places = (at["positions_q"], at["positions_k"]) if cross else (at["positions"], at["positions"])
        heads, base, layout = at["heads"], base_of(at["base"]), (layout_of or {}).get(at["layout"], at["layout"])
        width = at["w_q"].shape[1] // heads
        groups = at["w_k"].shape[1] // width

        def dense(t: np.ndarray, name: str) -> np.ndarray:
            return t @ at[f"w_{name}"] + (0 if at[f"b_{name}"] is None else at[f"b_{name}"])

        def cut(t: np.ndarray, count: int) -> np.ndarray:
            return split(t, count) if split else t.reshape(*t.shape[:-1], count, -1)

        q, k, v = dense(x, "q"), dense(memory, "k"), dense(memory, "v")
        if rotate_whole:
            q, k = (np_rotate(t[:, :, None], p, base, layout)[:, :, 0] for t, p in ((q, places[0]), (k, places[1])))
        q, k, v = cut(q, heads), cut(k, groups), cut(v, groups)
        if not rotate_whole:
            q, k = np_rotate(q, place_q(places[0]), base, layout), np_rotate(k, place_k(places[1]), base, layout)
        if values_too:
            v = np_rotate(v if v.shape[-1] % 2 == 0 else np.pad(v, [(0, 0)] * 3 + [(0, 1)]), places[1], base, layout)[
                ..., : v.shape[-1]
            ]
        o = np_attend(q, k, v, mask_of(at["mask"]), at["kernel"], scale(width, heads))
        return dense(merge(o) if merge else o.reshape(*o.shape[:2], -1), "o")

    return call


def _feature_major(t: np.ndarray, count: int) -> np.ndarray:
    return t.reshape(*t.shape[:-1], -1, count).swapaxes(-1, -2)


def _mutant(function: str, bug: str, call: Function, url: str = "", **kind: Any) -> Mutant:
    return Mutant(f"attention.{function}", bug, call, url, **kind)


def _shifted_by_one(p: Any) -> Any:
    return None if p is None else p + 1


def _counted_from_start(p: Any) -> Any:
    return None if p is None else np.arange(p.shape[-1])


def _left_seen(mask: Any) -> Any:
    return None if mask is None else np.logical_or.accumulate(mask[..., ::-1], -1)[..., ::-1]


def _exchanged(**at: Any) -> np.ndarray:
    q, k = at["q"], at["k"]
    return np_attend(**{**at, "q": k, "k": q} if q.shape == k.shape else at)


def _uniform_when_hidden(**at: Any) -> np.ndarray:
    h, g = at["q"].shape[2], at["k"].shape[2]
    shape = (at["q"].shape[0], h, at["q"].shape[1], at["k"].shape[1])
    seen = visible(at["mask"], shape)
    mean = np.repeat(at["v"].mean(1, keepdims=True), h // g, axis=2)
    return np.where(np.swapaxes(seen.any(-1), 1, 2)[..., None], np_attend(**at), mean)


MUTANTS = (
    _mutant("attend", "key heads are tiled: query head h uses head h mod g", _mixer(share=lambda **at: _tiled)),
    _mutant("attend", "only the first key head is used",
            _mixer(k=lambda k, **at: k[:, :, :1], v=lambda v, **at: v[:, :, :1])),
    _mutant("attend", "values of the next key head", _mixer(v=lambda v, **at: np.roll(v, 1, axis=2))),
    _mutant("attend", "the scale is 1/√d whatever is asked", _mixer(scale=lambda q, **at: q.shape[-1] ** -0.5)),
    _mutant("attend", "the scale is applied twice", _mixer(scale=lambda scale, **at: scale * abs(scale))),
    _mutant("attend", "the mask is ignored", _mixer(mask=lambda **at: None)),
    _mutant("attend", "the mask is inverted",
            _mixer(mask=lambda mask, **at: None if mask is None else ~mask)),
    _mutant("attend", "a fully masked row is the mean of the values", _uniform_when_hidden),
    _mutant("attend", "queries and keys exchanged in the scores",
            _exchanged),
    _mutant("attend", "the kernel is always softmax", _mixer(kernel=lambda **at: "softmax")),
    _mutant("attend", "masks count before the heads are shared: the first head's mask serves all",
            _mixer(mask=lambda mask, **at: mask[:, :1] if mask is not None and mask.ndim == 4 else mask)),
    _mutant("attend", "values one key late", _mixer(v=lambda v, **at: np.roll(v, 1, axis=1))),
    _mutant("attend_rotated_values", "values are not rotated", _rotating(positions=lambda at: 0 * at)),
    _mutant("attend_rotated_values", "values are rotated backwards", _rotating(positions=lambda at: -at)),
    _mutant("attend_rotated_values", "positions start at 1", _rotating(positions=lambda at: at + 1)),
    _mutant("attend_rotated_values", "the two halves of pairs are concatenated, not interleaved back",
            _rotating(order=lambda d: np.argsort(np.arange(d) % 2, kind="stable"))),
    _mutant("attend_rotated_values", "half_split is taken for interleaved",
            _rotating(layout=lambda at: "interleaved")),
    _mutant("attend_rotated_values", "base 10000 whatever is asked", _rotating(base=lambda at: 10000.0)),
    _mutant("attend_rotated_values", "positions of the next key",
            _rotating(positions=lambda at: np.roll(at, 1, axis=-1))),
    _mutant("project", "W is transposed where it is square",
            lambda x, w, b: x @ (w.T if w.shape[0] == w.shape[1] else w) + (0 if b is None else b)),
    _mutant("project", "the bias is missing", lambda x, w, b: x @ w),
    _mutant("project", "the bias is added twice", lambda x, w, b: x @ w + 2 * (0 if b is None else b)),
    _mutant("project", "the last input feature is left out",
            lambda x, w, b: x[..., :-1] @ w[:-1] + (0 if b is None else b)),
    _mutant("project", "inputs are rounded to bfloat16",
            lambda x, w, b: _coarse(x) @ _coarse(w) + (0 if b is None else b), precision=True),
    *(
        _mutant(function, bug, _layer(cross=function == "cross_attention", **fault))
        for function in ("multi_head_attention", "cross_attention")
        for bug, fault in (
            ("no scale", {"scale": lambda width, heads: 1.0}),
            ("scaled by 1/√(heads · width)", {"scale": lambda width, heads: (width * heads) ** -0.5}),
            ("columns are feature-major: heads interleaved", {"split": _feature_major}),
            ("outputs are merged feature-major", {"merge": lambda o: o.swapaxes(2, 3).reshape(*o.shape[:2], -1)}),
            ("keys are not rotated", {"place_k": lambda p: None}),
            ("queries one position ahead of keys", {"place_q": _shifted_by_one}),
            ("keys are rotated backwards", {"place_k": lambda p: None if p is None else -p}),
            ("the rotation spans all heads", {"rotate_whole": True}),
            ("values are rotated too", {"values_too": True}),
            ("base 10000 whatever is asked", {"base_of": lambda base: 10000.0}),
            ("half_split is taken for interleaved", {"layout_of": {"half_split": "interleaved"}}),
            ("interleaved is taken for half_split", {"layout_of": {"interleaved": "half_split"}}),
            ("b_q is missing", {"drop": ("b_q",)}),
            ("b_v is missing", {"drop": ("b_v",)}),
            ("b_o is missing", {"drop": ("b_o",)}),
            ("the mask is ignored", {"mask_of": lambda mask: None}),
        )
    ),
    _mutant("causal_mask", "the diagonal is hidden", lambda n, m: np.tri(n, m, m - n - 1, dtype=bool)),
    _mutant("causal_mask", "the next token is visible", lambda n, m: np.tri(n, m, m - n + 1, dtype=bool)),
    _mutant("causal_mask", "transposed where it is square", lambda n, m: np.tri(n, m, m - n, dtype=bool).T if n == m
            else np.tri(n, m, m - n, dtype=bool)),
    _mutant("unilm_mask", "causal throughout", lambda segment_ids: np.broadcast_to(
        np.tri(segment_ids.shape[-1], dtype=bool), (*segment_ids.shape, segment_ids.shape[-1]))),
    _mutant("unilm_mask", "queries and keys exchanged", lambda segment_ids:
            np.cumsum(segment_ids, -1)[..., None, :] >= np.cumsum(segment_ids, -1)[..., :, None]),
    _mutant("unilm_mask", "a target token does not see itself", lambda segment_ids:
            (np.cumsum(segment_ids, -1)[..., None, :] < np.cumsum(segment_ids, -1)[..., :, None])
            | (segment_ids[..., None, :] < 1) & (np.cumsum(segment_ids, -1)[..., None, :] < 1)),
    _mutant("unilm_mask", "the target sees all of itself", lambda segment_ids:
            segment_ids[..., None, :] <= segment_ids[..., :, None]),
    _mutant("positions_from_mask", "counted from 1", lambda valid: np.cumsum(valid, -1)),
    _mutant("positions_from_mask", "left padding at -1", lambda valid: np.cumsum(valid, -1) - 1),
    _mutant("positions_from_mask", "padded tokens at 1 (masked_fill)",
            lambda valid: np.where(valid, np.maximum(np.cumsum(valid, -1) - 1, 0), 1)),
    _mutant("positions_from_mask", "counted over the batch",
            lambda valid: np.maximum(np.cumsum(valid).reshape(valid.shape) - 1, 0)),
)  # fmt: skip


def _coarse(x: np.ndarray) -> np.ndarray:
    return round_to(x, "bfloat16")


def _converted(**at: Any) -> np.ndarray:
    """A half_split layer run as an interleaved one on permuted columns; grouped keys are cut into the wrong heads."""
    heads, width = at["heads"], at["w_q"].shape[1] // at["heads"]
    groups = at["w_k"].shape[1] // width
    assumed = heads // groups if heads != groups else heads

    def moved(t: Any, count: int) -> Any:
        whole = t is not None and t.shape[-1] % (2 * count) == 0
        return t.reshape(*t.shape[:-1], count, 2, -1).swapaxes(-1, -2).reshape(t.shape) if whole else t

    if at["layout"] == "half_split":
        changes = {n: moved(at[n], heads if n.endswith("q") else assumed) for n in ("w_q", "b_q", "w_k", "b_k")}
        at = {**at, **changes, "layout": "interleaved"}
    return _layer(cross=True)(**at)


MUSEUM = (
    _mutant("causal_mask", "aligned at the start: a query after cached keys sees none of the later ones",
            lambda n, m: np.tri(n, m, dtype=bool), "https://github.com/onnx/onnx/issues/8054"),
    _mutant("attend", "the mask is dropped for a batch of one sequence",
            _mixer(mask=lambda mask, q, **at: None if q.shape[0] == 1 else mask),
            "https://github.com/huggingface/transformers/pull/46773"),
    _mutant("attend", "the boolean mask becomes a bias the wrong way round",
            _mixer(mask=lambda mask, **at: None if mask is None else ~mask),
            "https://github.com/neuro-galaxy/torch_brain/pull/74"),
    _mutant("multi_head_attention", "positions count padding: left padding moves the tokens",
            _layer(place_q=_counted_from_start, place_k=lambda p: None if p is None else p),
            "https://github.com/huggingface/transformers/issues/22161"),
    _mutant("multi_head_attention", "the causal mask is dropped on a fallback path",
            _layer(mask_of=lambda mask: None if mask is not None and mask.ndim == 2 else mask),
            "https://github.com/keras-team/keras/issues/23038"),
    _mutant("multi_head_attention", "left padding is not masked: only the keys after the real tokens are hidden",
            _layer(mask_of=_left_seen),
            "https://github.com/Blaizzy/mlx-vlm/pull/1946"),
    _mutant("cross_attention", "keys are brought from half_split to interleaved in heads / groups heads, not in groups",
            _converted, "https://github.com/ggml-org/llama.cpp/pull/3364"),
)  # fmt: skip
