"""Judging gau: the gated attention unit of Su and of the FLASH paper, as self and cross attention, with its blocks.

A case names its kernel: softmax, softmax_plus_1 and softmax_plus_16 (n_min 1 and 16), squared_relu_visible,
squared_relu_1 (length 1) or laplace, all of attention_kernel; and its rotation: interleaved or half_split, with
positions (None: not rotated) and the base of the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, einsum, silu, sqrt
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from conformance.ops.attention import np_rotate, project
from conformance.ops.attention_kernel import KERNELS, REFERENCES, kernels, np_softmax, visible
from conformance.ops.rope import layouts, rotate
from refimpl.ops import gau as spec

WEIGHTS = ("w_in", "b_in", "gamma_q", "beta_q", "gamma_k", "beta_k", "w_out", "b_out")


# What is called: names become functions.
def _functions(of: Package, layout: str, kernel: str) -> dict[str, Any]:
    return {"rotate": layouts(of)[layout], "kernel": kernels(of)[kernel]}


def _unit(
    x: Any, mask: Any, bias: Any, positions: Any, w_in: Any, b_in: Any, gamma_q: Any, beta_q: Any, gamma_k: Any,
    beta_k: Any, w_out: Any, b_out: Any, layout: str, base: float, kernel: str, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    theta = of.rope.frequencies(gamma_q.shape[0], base=base)
    return of.gau.unit(x, mask, bias, positions, theta, *weights, **_functions(of, layout, kernel))


def _unit_paper(
    x: Any, mask: Any, bias: Any, positions: Any, w_in: Any, b_in: Any, gamma_q: Any, beta_q: Any, gamma_k: Any,
    beta_k: Any, w_out: Any, b_out: Any, length: int, layout: str, base: float, kernel: str, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    theta = of.rope.frequencies(gamma_q.shape[0], base=base)
    return of.gau.unit_paper(x, mask, bias, positions, theta, *weights, length=length, **_functions(of, layout, kernel))


def _unit_cross(
    x: Any, keys_from: Any, values_from: Any, mask: Any, bias: Any, positions_q: Any, positions_k: Any, w_in: Any,
    b_in: Any, w_k: Any, b_k: Any, w_v: Any, b_v: Any, w_out: Any, b_out: Any, layout: str, base: float, kernel: str,
    *, of: Package = SPEC,
) -> Any:  # fmt: skip
    weights = (w_in, b_in, w_k, b_k, w_v, b_v, w_out, b_out)
    arrays = (x, keys_from, values_from, mask, bias, positions_q, positions_k)
    return of.gau.unit_cross(
        *arrays, of.rope.frequencies(w_k.shape[-1], base=base), *weights, **_functions(of, layout, kernel)
    )


def _block_post_norm(
    x: Any, mask: Any, bias: Any, positions: Any, w_in: Any, b_in: Any, gamma_q: Any, beta_q: Any, gamma_k: Any,
    beta_k: Any, w_out: Any, b_out: Any, layout: str, base: float, kernel: str, epsilon: float, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    theta = of.rope.frequencies(gamma_q.shape[0], base=base)
    options = {**_functions(of, layout, kernel), "epsilon": epsilon}
    return of.gau.block_post_norm(x, mask, bias, positions, theta, *weights, **options)


def _block_pre_norm(
    x: Any, mask: Any, bias: Any, positions: Any, w_in: Any, b_in: Any, gamma_q: Any, beta_q: Any, gamma_k: Any,
    beta_k: Any, w_out: Any, b_out: Any, norm_scale: Any, norm_bias: Any, epsilon: float, length: int, layout: str,
    base: float, kernel: str, *, of: Package = SPEC,
) -> Any:  # fmt: skip
    """The norm is a layer norm with this scale, bias and epsilon."""
    weights = (w_in, b_in, gamma_q, beta_q, gamma_k, beta_k, w_out, b_out)
    theta = of.rope.frequencies(gamma_q.shape[0], base=base)

    def normalise(t: Any) -> Any:
        return of.norm.layer_norm(t, norm_scale, norm_bias, epsilon=epsilon)

    options = {**_functions(of, layout, kernel), "length": length, "norm": normalise}
    return of.gau.block_pre_norm(x, mask, bias, positions, theta, *weights, **options)


# References.
def parts(a: Arithmetic, x: Ball, w_in: Ball, b_in: Ball | None, key_width: int) -> tuple[Ball, Ball, Ball]:
    """silu(x W + b) cut into e, e and s columns."""
    whole = silu(project(a, x, w_in, b_in).stored())
    e = (w_in.shape[1] - key_width) // 2
    return whole[..., :e], whole[..., e : e + e], whole[..., e + e :]


def scale_offset(a: Arithmetic, z: Ball, gamma: Ball, beta: Ball | None) -> Ball:
    """gamma z + beta."""
    return z * gamma if beta is None else z * gamma + beta


def _placed(a: Arithmetic, t: Ball, positions: Any, base: float, layout: str) -> Ball:
    return t if positions is None else rotate(a, t, np.asarray(positions), base, layout=layout).stored()


def _mixed(
    a: Arithmetic, u: Ball, v: Ball, q: Ball, k: Ball, mask: Any, bias: Ball | None, kernel: str, divisor: Ball,
    w_out: Ball, b_out: Ball | None,
) -> Ball:  # fmt: skip
    # The divisor may be folded into q, into k or, as a root, into both.
    scores = einsum("...ns,...ms->...nm", q, k, length=q.shape[-1] + 4) / divisor
    scores = (scores if bias is None else scores + bias).stored()
    weights = REFERENCES[kernel](a, scores, mask).stored()
    gated = (u * einsum("...nm,...me->...ne", weights, v).stored()).stored()
    return project(a, gated, w_out, b_out)


def _self(
    a: Arithmetic, x: Ball, mask: Any, bias: Ball | None, positions: Any, w_in: Ball, b_in: Ball | None, gamma_q: Ball,
    beta_q: Ball | None, gamma_k: Ball, beta_k: Ball | None, w_out: Ball, b_out: Ball | None, layout: str, base: float,
    kernel: str, divisor: Ball,
) -> Ball:  # fmt: skip
    u, v, z = (t.stored() for t in parts(a, x, w_in, b_in, gamma_q.shape[0]))
    q = _placed(a, scale_offset(a, z, gamma_q, beta_q).stored(), positions, base, layout)
    k = _placed(a, scale_offset(a, z, gamma_k, beta_k).stored(), positions, base, layout)
    return _mixed(a, u, v, q, k, mask, bias, kernel, divisor, w_out, b_out)


def unit(a: Arithmetic, **given: Any) -> Ball:
    """Su's form: scores over the root of s."""
    return _self(a, **given, divisor=sqrt(a.exact(float(given["gamma_q"].shape[0]))))


def unit_paper(a: Arithmetic, length: int, **given: Any) -> Ball:
    """The paper's form: scores over a length."""
    return _self(a, **given, divisor=a.exact(float(length)))


def unit_cross(
    a: Arithmetic, x: Ball, keys_from: Ball, values_from: Ball, mask: Any, bias: Ball | None, positions_q: Any,
    positions_k: Any, w_in: Ball, b_in: Ball | None, w_k: Ball, b_k: Ball | None, w_v: Ball, b_v: Ball | None,
    w_out: Ball, b_out: Ball | None, layout: str, base: float, kernel: str,
) -> Ball:  # fmt: skip
    """Gate and queries from one dense layer, keys and values from one each."""
    s, e = w_k.shape[1], w_v.shape[1]
    whole = silu(project(a, x, w_in, b_in).stored()).stored()
    q = _placed(a, whole[..., e:], positions_q, base, layout)
    k = _placed(a, silu(project(a, keys_from, w_k, b_k).stored()).stored(), positions_k, base, layout)
    v = silu(project(a, values_from, w_v, b_v).stored()).stored()
    return _mixed(a, whole[..., :e], v, q, k, mask, bias, kernel, sqrt(a.exact(float(s))), w_out, b_out)


def block_post_norm(a: Arithmetic, x: Ball, epsilon: float, **given: Any) -> Ball:
    """N(x + unit(x)), N the root mean square norm."""
    total = (x + unit(a, x=x, **given).stored()).stored()
    return total / sqrt((total * total).mean(keepdims=True) + epsilon)


def block_pre_norm(
    a: Arithmetic, x: Ball, norm_scale: Ball, norm_bias: Ball, epsilon: float, length: int, **given: Any
) -> Ball:
    """x + unit(layer_norm(x))."""
    centred = x - x.mean(keepdims=True)
    normed = centred / sqrt((centred * centred).mean(keepdims=True) + epsilon) * norm_scale + norm_bias
    return x + unit_paper(a, length, x=normed.stored(), **given).stored()


OPERATORS = (
    Operator("gau.unit", _unit, unit),
    Operator("gau.unit_paper", _unit_paper, unit_paper),
    Operator("gau.unit_cross", _unit_cross, unit_cross),
    Operator("gau.block_post_norm", _block_post_norm, block_post_norm),
    Operator("gau.block_pre_norm", _block_pre_norm, block_pre_norm),
    Operator("gau.parts", spec.parts, parts, ("gate", "value", "shared")),
    Operator("gau.scale_offset", spec.scale_offset, scale_offset, multilinear=True),
)
_OPTIONS = ("exact", "note", "angle", "only")


# Cases.
def _case(function: str, name: str, clauses: str, **arguments: Any) -> Case:
    options = {k: arguments.pop(k) for k in _OPTIONS if k in arguments}
    return Case(f"gau.{function}", name, arguments, tuple(clauses.split()), **options)


def weights_of(draw: Draw, d: int, e: int, s: int, bias: bool) -> dict[str, Any]:
    """A unit of expanded width e and key width s, in steps of 2^-7; gamma near 1."""
    made: dict[str, Any] = {
        "w_in": draw.grid(d, 2 * e + s, low=-95, high=95, exponent=-7),
        "b_in": draw.grid(2 * e + s, low=-63, high=63, exponent=-7),
        "gamma_q": draw.grid(s, low=64, high=160, exponent=-7), "beta_q": draw.grid(s, low=-63, high=63, exponent=-7),
        "gamma_k": draw.grid(s, low=64, high=160, exponent=-7), "beta_k": draw.grid(s, low=-63, high=63, exponent=-7),
        "w_out": draw.grid(e, d, low=-95, high=95, exponent=-7), "b_out": draw.grid(d, low=-63, high=63, exponent=-6),
    }  # fmt: skip
    return made if bias else made | dict.fromkeys(("b_in", "beta_q", "beta_k", "b_out"))


def cross_weights_of(draw: Draw, d: int, e: int, s: int, d_k: int, d_v: int, bias: bool) -> dict[str, Any]:
    """A cross unit: [u | q] from d features, k from d_k, v from d_v."""
    made: dict[str, Any] = {
        "w_in": draw.grid(d, e + s, low=-95, high=95, exponent=-6),
        "b_in": draw.grid(e + s, low=-63, high=63, exponent=-7),
        "w_k": draw.grid(d_k, s, low=-95, high=95, exponent=-6), "b_k": draw.grid(s, low=-63, high=63, exponent=-7),
        "w_v": draw.grid(d_v, e, low=-95, high=95, exponent=-6), "b_v": draw.grid(e, low=-63, high=63, exponent=-7),
        "w_out": draw.grid(e, d, low=-95, high=95, exponent=-7), "b_out": draw.grid(d, low=-63, high=63, exponent=-6),
    }  # fmt: skip
    return made if bias else made | dict.fromkeys(("b_in", "b_k", "b_v", "b_out"))


def _bits(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


_KEYS = _bits("00111", "11100")[:, None, :]
_COUNTED = np.array([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
_SOME = np.array([[4, 0, 9, 2, 7], [1, 2, 3, 5, 8]])
_CAUSAL = np.tri(5, dtype=bool)


def _unit_cases(function: str, **fixed: Any) -> list[Case]:
    """The questions that both forms are asked, and their blocks."""
    cases = []

    def add(
        name: str, clauses: str, mask: Any, positions: Any, *, b: int = 2, n: int = 5, weighted: bool = True,
        additive: bool = False, poison: bool = False, dense: bool = False, s: int = 4, **more: Any,
    ) -> None:  # fmt: skip
        draw = Draw(f"gau.{function}/{name}")
        x = draw.dense(b, n, 5, exponent=1) if dense else draw.grid(b, n, 5, low=-95, high=95)
        if poison:
            x = np.where(np.swapaxes(mask, 1, 2), x, -2 * x)
        bias = draw.grid(n, n, exponent=-7) if additive else None
        arrays: dict[str, Any] = {
            "x": x,
            "mask": mask,
            "bias": bias,
            "positions": positions,
            **weights_of(draw, 5, 7, s, weighted),
        }
        if function == "block_pre_norm":
            arrays |= {"norm_scale": draw.grid(5, low=32, high=63), "norm_bias": draw.grid(5, exponent=-8)}
        cases.append(_case(function, name, clauses, **arrays, **{**fixed, **more}))

    kinds = {
        "unit": ("C1", "C2", "C3", "C4", "C5"), "unit_paper": ("C1 C3", "C1", "C4", "C4", "C3"),
        "block_post_norm": ("C1",) * 5, "block_pre_norm": ("C1 C2",) * 5,
    }  # fmt: skip
    plain, padded, placed, hidden, gated = kinds[function]
    biased = "C2" if function == "unit_paper" else plain
    add("plain", plain, None, np.arange(5))
    add("no-bias", plain, None, np.arange(5), weighted=False)
    add(
        "padding-left-and-right", padded, _KEYS, _COUNTED, poison=True, note="padded tokens twice as large as real ones"
    )
    add("causal", padded, _CAUSAL, np.arange(5))
    add("other-layout", placed, None, _SOME, layout={"interleaved": "half_split"}.get(fixed["layout"], "interleaved"))
    add("base-100", placed, None, _SOME, base=100.0)
    add("long", placed, None, np.array([4090, 4097, 4100, 5003, 6001]), b=1)
    add("unrotated", placed, None, None)
    add("additive-bias", biased, None, np.arange(5), additive=True)
    add("sees-nothing", hidden, _bits("11111", "00000")[:, None, :], np.arange(5))
    add(
        "each-its-neighbour",
        gated,
        np.roll(np.eye(5, dtype=bool), 1, axis=1),
        np.arange(5),
        kernel="softmax",
        note="one visible key: the output is the gate of one token times the value of another",
    )
    add("softmax-plus", plain, _KEYS, _COUNTED, kernel="softmax_plus_16")
    # Without a floor the visible keys show in their logarithm; with 16 every case of this size is one length.
    add("softmax-plus-counted", plain, _KEYS, _COUNTED, kernel="softmax_plus_1")
    add("laplace", plain, _KEYS, _COUNTED, kernel="laplace")
    add("key-width-6", plain, None, np.arange(5), s=6)
    add("dense", plain, None, _SOME, dense=True)
    if function == "unit":
        add("beyond-2-17", placed, None, np.array([200003, 200001, 200017, 262143, 200000]), b=1, angle="A64")
    if "length" in fixed:
        add("length-512", plain, None, np.arange(5), length=512, additive=True)
    if function == "unit_paper":
        add("own-length", plain, None, None, length=5)
        # Three of five keys are real: an implementation that divides by the length of the array shows.
        three = np.broadcast_to(np.arange(5) < 3, (2, 1, 5))
        add("real-length", "C1", three, None, length=3, poison=True)
        add("real-length-laplace", "C1", three, None, length=3, kernel="laplace")
    if "epsilon" in fixed:
        add("near-epsilon", plain, None, np.arange(5), epsilon=0.25)
    return cases


def _cross_cases() -> list[Case]:
    cases = []

    def add(name: str, clauses: str, mask: Any, places: tuple[Any, Any], *, weighted: bool = True, **more: Any) -> None:
        draw = Draw(f"gau.unit_cross/{name}")
        arrays: dict[str, Any] = {"x": draw.grid(2, 3, 5, low=-95, high=95)}
        arrays["keys_from"] = draw.grid(2, 5, 3, low=-95, high=95)
        arrays["values_from"] = draw.grid(2, 5, 2, low=-95, high=95)
        if name == "masked":
            arrays = {n: t if n == "x" else np.where(np.swapaxes(mask, 1, 2), t, -2 * t) for n, t in arrays.items()}
        bias = draw.grid(3, 5, exponent=-7) if name == "additive-bias" else None
        options = {"layout": "interleaved", "base": 10000.0, "kernel": "squared_relu_visible", **more}
        arrays |= {"mask": mask, "bias": bias, "positions_q": places[0], "positions_k": places[1]}
        cases.append(
            _case("unit_cross", name, clauses, **arrays, **cross_weights_of(draw, 5, 7, 4, 3, 2, weighted), **options)
        )

    q = np.array([5, 2, 3])
    add("plain", "C1 C2 C4", None, (q, np.arange(5)))
    add("no-bias", "C1", None, (q, np.arange(5)), weighted=False)
    add("masked", "C1", _KEYS, (np.array([[3, 1, 2], [9, 0, 4]]), _COUNTED))
    add("queries-rotated", "C3", None, (q, None))
    add("keys-rotated", "C3", None, (None, _SOME))
    add("unrotated", "C3", None, (None, None))
    add("other-layout", "C3", None, (q, _SOME), layout="half_split")
    add("base-100", "C3", None, (q, _SOME), base=100.0)
    add("long", "C3", None, (np.array([4099, 5000, 4096]), np.array([4098, 4097, 5001, 4095, 4100])))
    add("additive-bias", "C4", None, (q, np.arange(5)))
    add("softmax-plus", "C4", _KEYS, (q, np.arange(5)), kernel="softmax_plus_16")
    add("softmax-plus-counted", "C4", _KEYS, (q, np.arange(5)), kernel="softmax_plus_1")
    return cases


def _part_cases() -> list[Case]:
    def case(name: str, clauses: str, d: int, e: int, s: int, bias: bool, kind: str = "grid") -> Case:
        draw = Draw(f"gau.parts/{name}")
        shape, columns = (2, 3, d), 2 * e + s
        if kind == "dense":
            x, w, b = draw.dense(*shape), draw.dense(d, columns), draw.dense(columns)
        else:
            x, w, b = draw.grid(*shape), draw.grid(d, columns), draw.grid(columns)
        return _case("parts", name, clauses, x=x, w_in=w, b_in=b if bias else None, key_width=s)

    return [
        case("bias", "C1 C2", 5, 7, 3, True),
        case("no-bias", "C1 C2", 5, 7, 3, False),
        case("wide-keys", "C1", 5, 2, 11, True),
        case("narrow-keys", "C1", 7, 5, 1, True),
        case("equal-widths", "C1 C2", 3, 5, 5, True),
        case("dense", "C1 C2", 5, 7, 3, True, "dense"),
    ]


def _scale_cases() -> list[Case]:
    def exact(name: str, *shape: int, bias: bool = True) -> Case:
        draw = Draw(f"gau.scale_offset/{name}")
        gamma = draw.grid(shape[-1], low=-3, high=3, exponent=0)
        z, beta = draw.grid(*shape, low=-15, high=15, exponent=-2), draw.grid(shape[-1], low=-31, high=31, exponent=-2)
        return _case("scale_offset", name, "C1 C2", z=z, gamma=gamma, beta=beta if bias else None, exact=True)

    def plain(name: str, bias: bool, kind: str) -> Case:
        draw = Draw(f"gau.scale_offset/{name}")
        make: Callable[..., np.ndarray] = draw.dense if kind == "dense" else draw.grid
        z, gamma, beta = make(3, 7), make(7), make(7)
        return _case("scale_offset", name, "C1 C2", z=z, gamma=gamma, beta=beta if bias else None)

    cancel = np.array([[63.0, 1.0], [-21.0, 63.0]])
    return [
        plain("bias", True, "grid"), plain("no-bias", False, "grid"), plain("dense", True, "dense"),
        exact("exact-three-axes", 2, 3, 5), exact("exact-one-row", 11), exact("exact-square", 5, 5),
        exact("exact-no-bias", 3, 7, bias=False),
        _case("scale_offset", "exact-cancellation", "C1 C2", z=cancel, gamma=np.array([3.0, 2.0]),
              beta=np.array([-188.0, -1.0]), exact=True, note="189 - 188"),
    ]  # fmt: skip


_SU = {"layout": "interleaved", "base": 10000.0, "kernel": "squared_relu_visible"}
_PAPER = {"layout": "half_split", "base": 10000.0, "kernel": "squared_relu_1", "length": 4}

CASES = (
    *_unit_cases("unit", **_SU),
    *_unit_cases("unit_paper", **_PAPER),
    *_cross_cases(),
    *_unit_cases("block_post_norm", **_SU, epsilon=1e-7),
    *_unit_cases("block_pre_norm", **_PAPER, epsilon=1e-5),
    *_part_cases(),
    *_scale_cases(),
)


# Laws.
_UNITS = ("gau.unit", "gau.unit_paper")
_BLOCKS = ("gau.block_post_norm", "gau.block_pre_norm")
_CROSS = ("gau.unit_cross",)


def _shape(case: Case) -> tuple[int, int, int]:
    """(b, n, m) of the scores."""
    keys = case.arguments.get("keys_from", case["x"])
    return case["x"].shape[0], case["x"].shape[1], keys.shape[1]


def masked_tokens_do_not_matter(implementation: Function, case: Case) -> None:
    """Changing tokens that no query of their sequence sees changes no other token, bit for bit."""
    seen = np.asarray(visible(case["mask"], _shape(case)).any(axis=1))
    names = ("keys_from", "values_from") if "keys_from" in case.arguments else ("x",)
    changes = {n: np.where(seen[..., None], case[n], -3.0) for n in names}
    before, after = run(implementation, case)[0].value, run(implementation, case, **changes)[0].value
    keep = seen[..., None] if names == ("x",) else np.ones((1, 1, 1), bool)
    equal("masked_tokens_do_not_matter", case, np.where(keep, after, 0.0), np.where(keep, before, 0.0))


def padding_stands_on_either_side(implementation: Function, case: Case) -> None:
    """Masked tokens before and after, with positions counted without them, change nothing on the real tokens."""
    b, n, m = _shape(case)
    changes: dict[str, Any] = {}
    for name in ("keys_from", "values_from") if "keys_from" in case.arguments else ("x",):
        junk = np.full((b, 2, case[name].shape[-1]), 3.0)
        changes[name] = np.concatenate([junk, case[name], -junk], axis=1)
    rows = 0 if "keys_from" in case.arguments else 2
    mask = np.zeros((b, n + 2 * rows, m + 4), bool)
    # A padded query sees what is real: its row must be defined, and is not compared.
    mask[:, :, 2:-2] = True
    mask[:, rows : n + rows, 2:-2] = visible(case["mask"], (b, n, m))
    changes["mask"] = mask
    if case["bias"] is not None:
        changes["bias"] = np.pad(case["bias"], [(rows, rows), (2, 2)])
    for name in ("positions", "positions_k"):
        if case.arguments.get(name) is not None:
            changes[name] = np.pad(case[name], [(0, 0)] * (case[name].ndim - 1) + [(2, 2)])
    one, two = run(implementation, case)[0], run(implementation, case, **changes)[0]
    inner = slice(rows, n + rows)
    close("padding_stands_on_either_side", case, two.value[:, inner], one.value, one.radius + two.radius[:, inner])


def a_broadcast_mask_is_the_mask_written_out(implementation: Function, case: Case) -> None:
    """A mask with axes of length 1, or none at all, gives what the same mask gives when it is written out."""
    one = run(implementation, case)[0]
    two = run(implementation, case, mask=visible(case["mask"], _shape(case)).copy())[0]
    close("a_broadcast_mask_is_the_mask_written_out", case, two.value, one.value, one.radius + two.radius)


def the_future_changes_nothing(implementation: Function, case: Case) -> None:
    """Under a causal mask the last token changes only its own output, bit for bit."""
    changed = case["x"].copy()
    changed[:, -1] = -changed[:, -1] / 2
    mask = np.tri(changed.shape[1], dtype=bool)
    before, after = (run(implementation, case, x=x, mask=mask)[0].value for x in (case["x"], changed))
    equal("the_future_changes_nothing", case, after[:, :-1], before[:, :-1])


def a_common_shift_of_positions_changes_nothing(implementation: Function, case: Case) -> None:
    """Only differences of positions matter."""
    names = [n for n in ("positions", "positions_q", "positions_k") if n in case.arguments]
    if all(case[n] is not None for n in names):
        one, two = run(implementation, case)[0], run(implementation, case, **{n: case[n] + 17 for n in names})[0]
        radius = one.radius + two.radius
        close("a_common_shift_of_positions_changes_nothing", case, two.value, one.value, radius)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _cut(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, v, z of a unit with itself, or u, v, q of a cross unit."""

    def dense(t: np.ndarray, w: str, b: str) -> np.ndarray:
        return _silu(t @ case[w] + (0 if case[b] is None else case[b]))

    whole = dense(x, "w_in", "b_in")
    if "w_v" in case.arguments:
        e = case["w_v"].shape[1]
        return whole[..., :e], dense(case["values_from"], "w_v", "b_v"), whole[..., e:]
    e = case["w_out"].shape[0]
    return whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :]


def _ended(case: Case, gated: np.ndarray) -> np.ndarray:
    return gated @ case["w_out"] + (0 if case["b_out"] is None else case["b_out"])


# Error of the float64 comparison itself, at features below a hundred and positions below a thousand.
_OWN = 2.0**-40


def one_visible_key_joins_gate_and_value(implementation: Function, case: Case) -> None:
    """Where a softmax sees one key only, the output is (gate of the query ⊙ value of that key) W_out + b_out."""
    b, n, m = _shape(case)
    chosen = (np.arange(n) + 1) % m
    mask = np.arange(m) == chosen[:, None]
    out = run(implementation, case, mask=mask, kernel="softmax")[0]
    u, v, _ = _cut(case, case["x"])
    close("one_visible_key_joins_gate_and_value", case, out.value, _ended(case, u * v[:, chosen]), out.radius + _OWN)


def _complex(case: Case, t: np.ndarray, positions: Any) -> np.ndarray:
    """The pairs of t as complex numbers, turned by their positions."""
    half = t.shape[-1] // 2
    first, second = (t[..., 0::2], t[..., 1::2]) if case["layout"] == "interleaved" else (t[..., :half], t[..., half:])
    z = first + 1j * second
    if positions is None:
        return z
    theta = case["base"] ** (-np.arange(half) / half)
    return z * np.exp(1j * np.broadcast_to(positions, t.shape[:-1])[..., None] * theta)


def _squares_mixed(case: Case, kernel: str, squares: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(gate ⊙ Σ squares(scores) value) W_out + b_out, the scores as real parts of complex products."""
    u, v, z = _cut(case, case["x"])
    if "w_k" in case.arguments:
        q, k = z, _silu(case["keys_from"] @ case["w_k"] + (0 if case["b_k"] is None else case["b_k"]))
        places = case["positions_q"], case["positions_k"]
    else:
        q = case["gamma_q"] * z + (0 if case["beta_q"] is None else case["beta_q"])
        k = case["gamma_k"] * z + (0 if case["beta_k"] is None else case["beta_k"])
        places = case["positions"], case["positions"]
    products = np.einsum("bni,bmi->bnm", _complex(case, q, places[0]), _complex(case, k, places[1]).conj()).real
    scores = products / case.arguments.get("length", math.sqrt(q.shape[-1]))
    scores = scores if case["bias"] is None else scores + case["bias"]
    seen = visible(case["mask"], scores.shape)
    count = np.maximum(seen.sum(-1, keepdims=True), 1) if kernel.endswith("visible") else 1
    return _ended(case, u * np.einsum("bnm,bme->bne", np.where(seen, squares(scores), 0.0) / count, v))


def _squared_kernel(case: Case) -> str:
    return "squared_relu_visible" if case["kernel"].endswith("visible") else "squared_relu_1"


def opposite_queries_add_up_to_the_square(implementation: Function, case: Case) -> None:
    """relu(s)² + relu(-s)² = s²: with opposite γ_q, β_q and bias the outputs add up to the gated mix by s²."""
    kernel = _squared_kernel(case)
    opposite = {name: None if case[name] is None else -case[name] for name in ("gamma_q", "beta_q", "bias")}
    one = run(implementation, case, kernel=kernel)[0]
    two = run(implementation, case, kernel=kernel, **opposite)[0]
    expected = _squares_mixed(case, kernel, np.square) + (0 if case["b_out"] is None else case["b_out"])
    radius = one.radius + two.radius + _OWN
    close("opposite_queries_add_up_to_the_square", case, one.value + two.value, expected, radius)


def squared_complex_products_mix_the_values(implementation: Function, case: Case) -> None:
    """With a squared ReLU the weights are squares of the positive real parts of complex products over √s."""
    kernel = _squared_kernel(case)
    out = run(implementation, case, kernel=kernel)[0]
    expected = _squares_mixed(case, kernel, lambda scores: np.maximum(scores, 0) ** 2)
    close("squared_complex_products_mix_the_values", case, out.value, expected, out.radius + _OWN)


def the_output_is_affine_in_its_projection(implementation: Function, case: Case) -> None:
    """Doubling W_out and b_out doubles the unit; W_out = 0 leaves b_out."""
    law, b_out = "the_output_is_affine_in_its_projection", case["b_out"]
    start = case["x"] if case.op == "gau.block_pre_norm" else 0.0
    one = run(implementation, case)[0]
    two = run(implementation, case, w_out=2 * case["w_out"], b_out=None if b_out is None else 2 * b_out)[0]
    own = 2.0**-50 * np.abs(start)
    close(law, case, two.value - start, 2 * (one.value - start), two.radius + 2 * one.radius + own)
    nothing = run(implementation, case, w_out=0 * case["w_out"])[0]
    expected = start + np.broadcast_to(0.0 if b_out is None else b_out, nothing.value.shape)
    close(law, case, nothing.value, expected, nothing.radius + own)


def rows_come_out_with_unit_mean_square(implementation: Function, case: Case) -> None:
    """With epsilon 0 every row of a post-norm block has mean square 1."""
    out = run(implementation, case, epsilon=0.0)[0]
    square = np.mean(out.value**2, axis=-1)
    tolerance = np.mean((2 * np.abs(out.value) + out.radius) * out.radius, axis=-1) + 2.0**-48
    close("rows_come_out_with_unit_mean_square", case, square, np.ones_like(square), tolerance)


def a_silent_unit_leaves_the_norm_of_the_input(implementation: Function, case: Case) -> None:
    """W_out = 0 and b_out = 0: a post-norm block gives x / sqrt(mean(x²) + epsilon)."""
    out = run(implementation, case, w_out=0 * case["w_out"], b_out=None)[0]
    expected = case["x"] / np.sqrt(np.mean(case["x"] ** 2, axis=-1, keepdims=True) + case["epsilon"])
    close("a_silent_unit_leaves_the_norm_of_the_input", case, out.value, expected, out.radius + 2.0**-48)


def one_visible_key_joins_gate_and_value_in_a_block(implementation: Function, case: Case) -> None:
    """One visible key in a softmax: what the block adds is (gate ⊙ value) W_out + b_out of the input or of its norm."""
    b, n, m = _shape(case)
    chosen = (np.arange(n) + 1) % m
    out = run(implementation, case, mask=np.arange(m) == chosen[:, None], kernel="softmax")[0]
    x = case["x"]
    if case.op == "gau.block_pre_norm":
        centred = x - x.mean(-1, keepdims=True)
        seen = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + case["epsilon"])
        u, v, _ = _cut(case, seen * case["norm_scale"] + case["norm_bias"])
        expected = x + _ended(case, u * v[:, chosen])
    else:
        u, v, _ = _cut(case, x)
        total = x + _ended(case, u * v[:, chosen])
        expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + case["epsilon"])
    # A row that nearly cancels magnifies the rounding of the comparison as much as that of the implementation.
    own = _OWN * (1 + np.abs(expected)) if case["epsilon"] > 0 else _OWN
    close("one_visible_key_joins_gate_and_value_in_a_block", case, out.value, expected, out.radius + own)


def parts_are_selected_features(implementation: Function, case: Case) -> None:
    """Column j of W_in that selects feature j mod d gives silu of that feature, in the order u, v, z."""
    d, columns = case["w_in"].shape
    s = case["key_width"]
    e = (columns - s) // 2
    chosen = np.arange(columns) % d
    outs = run(implementation, case, w_in=np.eye(d)[:, chosen], b_in=None)
    whole = _silu(case["x"][..., chosen])
    for out, expected in zip(outs, (whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :]), strict=True):
        close("parts_are_selected_features", case, out.value, expected, out.radius + 2.0**-48)


def the_bias_is_a_feature_that_is_one(implementation: Function, case: Case) -> None:
    """A feature that is 1, with b_in as its row of W_in, replaces b_in."""
    if case["b_in"] is not None:
        x = np.concatenate([case["x"], np.ones((*case["x"].shape[:-1], 1))], axis=-1)
        w = np.concatenate([case["w_in"], case["b_in"][None]])
        for one, two in zip(run(implementation, case), run(implementation, case, x=x, w_in=w, b_in=None), strict=True):
            close("the_bias_is_a_feature_that_is_one", case, two.value, one.value, one.radius + two.radius)


def ones_show_scale_and_offset(implementation: Function, case: Case) -> None:
    """z = 1 gives gamma + beta, z = 0 gives beta."""
    beta = np.zeros_like(case["gamma"]) if case["beta"] is None else case["beta"]
    for value in (0.0, 1.0, -2.0):
        out = run(implementation, case, z=np.full_like(case["z"], value))[0]
        expected = np.broadcast_to(value * case["gamma"] + beta, case["z"].shape)
        close("ones_show_scale_and_offset", case, out.value, expected, out.radius)


LAWS = (
    Law(masked_tokens_do_not_matter, (*_UNITS, *_CROSS, *_BLOCKS)),
    Law(a_broadcast_mask_is_the_mask_written_out, (*_UNITS, *_CROSS, *_BLOCKS)),
    Law(padding_stands_on_either_side, ("gau.unit",), ("C2",)),
    Law(padding_stands_on_either_side, ("gau.unit_paper", *_CROSS, *_BLOCKS)),
    Law(the_future_changes_nothing, (*_UNITS, *_BLOCKS)),
    Law(a_common_shift_of_positions_changes_nothing, ("gau.unit",), ("C3",)),
    Law(a_common_shift_of_positions_changes_nothing, ("gau.unit_paper", *_CROSS, *_BLOCKS)),
    Law(one_visible_key_joins_gate_and_value, ("gau.unit",), ("C5",)),
    Law(one_visible_key_joins_gate_and_value, ("gau.unit_paper",)),
    Law(one_visible_key_joins_gate_and_value, _CROSS, ("C1", "C2")),
    Law(opposite_queries_add_up_to_the_square, ("gau.unit",), ("C1",)),
    Law(opposite_queries_add_up_to_the_square, ("gau.unit_paper",), ("C1", "C2", "C3")),
    Law(squared_complex_products_mix_the_values, _CROSS, ("C3", "C4")),
    Law(the_output_is_affine_in_its_projection, (*_UNITS, *_CROSS)),
    Law(the_output_is_affine_in_its_projection, ("gau.block_pre_norm",), ("C1",)),
    Law(rows_come_out_with_unit_mean_square, _BLOCKS[:1], ("C1",)),
    Law(a_silent_unit_leaves_the_norm_of_the_input, _BLOCKS[:1], ("C1",)),
    Law(one_visible_key_joins_gate_and_value_in_a_block, _BLOCKS[:1], ("C1",)),
    Law(one_visible_key_joins_gate_and_value_in_a_block, _BLOCKS[1:], ("C1", "C2")),
    Law(parts_are_selected_features, ("gau.parts",), ("C1", "C2")),
    Law(the_bias_is_a_feature_that_is_one, ("gau.parts",)),
    Law(ones_show_scale_and_offset, ("gau.scale_offset",), ("C1", "C2")),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Up to five tokens, every kind of mask, bias and positions, each kernel."""
    name = f"gau.{function}"
    if function == "scale_offset":

        def scaled(draw: Draw, n: int, s: int, bias: bool) -> dict:
            return {"z": draw.dense(n, s), "gamma": draw.dense(s), "beta": draw.dense(s) if bias else None}

        return drawn(name, profile, scaled, n=st.integers(1, 4), s=st.integers(1, 7), bias=st.booleans())
    if function == "parts":

        def cut(draw: Draw, n: int, e: int, s: int, bias: bool) -> dict:
            columns = 2 * e + s
            arrays = {"x": draw.dense(n, 3), "w_in": draw.dense(3, columns), "key_width": s}
            return arrays | {"b_in": draw.dense(columns) if bias else None}

        sizes = {"n": st.integers(1, 3), "e": st.integers(1, 5), "s": st.integers(1, 5)}
        return drawn(name, profile, cut, **sizes, bias=st.booleans())

    def build(
        draw: Draw, b: int, n: int, m: int, kind: str, additive: bool, weighted: bool, places: str, **more: Any
    ) -> dict:
        cross = function == "unit_cross"
        n, epsilon, length = n if cross else m, more.pop("epsilon"), more.pop("length")
        arrays: dict[str, Any] = {"x": draw.grid(b, n, 5, low=-95, high=95), **more}
        shapes = {"keys": (b, 1, m), "full": (b, n, m), "shared": (n, m)}
        arrays["mask"] = None if kind == "none" else draw.mask(*shapes[kind], keep=0.7)
        arrays["bias"] = draw.grid(n, m) if additive else None
        if cross:
            arrays |= {"keys_from": draw.grid(b, m, 3), "values_from": draw.grid(b, m, 2)}
            arrays |= {f"positions_{side}": draw.integers((b, size), 0, 50) if side in places else None
                       for side, size in (("q", n), ("k", m))}  # fmt: skip
            return arrays | cross_weights_of(draw, 5, 3, 4, 3, 2, weighted)
        arrays |= {"positions": draw.integers(m, 0, 50) if places else None, **weights_of(draw, 5, 3, 4, weighted)}
        if function in ("unit_paper", "block_pre_norm"):
            arrays["length"] = length
        if function.startswith("block"):
            arrays["epsilon"] = epsilon
        if function == "block_pre_norm":
            arrays |= {"norm_scale": draw.grid(5, low=32, high=63), "norm_bias": draw.grid(5, exponent=-8)}
        return arrays

    kernels = ["squared_relu_visible", "squared_relu_1", "softmax_plus_16", "laplace", "softmax"]
    return drawn(
        name, profile, build,
        # The first choice is what shrinking tends to: one that still tells faults apart.
        b=st.sampled_from([1, 2]), n=st.sampled_from([2, 3, 4, 1]), m=st.sampled_from([2, 3, 5, 4, 1]),
        kind=st.sampled_from(["none", "keys", "full", "shared"]), additive=st.booleans(), weighted=st.booleans(),
        places=st.sampled_from(["qk", "qk", "q", "k", ""]), kernel=st.sampled_from(kernels),
        layout=st.sampled_from(["interleaved", "half_split"]), base=st.sampled_from([100.0, 500.0]),
        epsilon=st.sampled_from([1e-7, 1e-3, 0.25]), length=st.sampled_from([1, 4, 5]),
    )  # fmt: skip


# Mutants: a right unit in NumPy with hooks for one fault each.
def _np_unit(
    *, paper: bool = False, order: str = "uvz", activated: str = "uvz", divisor: Any = None, gamma_after: bool = False,
    swap: bool = False, bias_of: Callable[[Any, float], Any] = lambda bias, divisor: bias, bias_twice: bool = False,
    positions_of: Callable[[Any], Any] = lambda p: p, base_of: Callable[[float], float] = float,
    layout_of: Callable[[str], str] = str, mask_of: Callable[[Any], Any] = lambda mask: mask,
    drop: tuple[str, ...] = (),
    gate_late: bool = False, kernel_of: Callable[..., Any] | None = None, keys_fixed: bool = False,
    gate: Callable[[np.ndarray], np.ndarray] = lambda u: u,
) -> Function:  # fmt: skip
    """A unit with one fault."""

    def call(**given: Any) -> np.ndarray:
        at = {**given, **dict.fromkeys(drop)}
        s, base, layout = at["gamma_q"].shape[0], base_of(at["base"]), layout_of(at["layout"])
        e = (at["w_in"].shape[1] - s) // 2
        raw = at["x"] @ at["w_in"] + (0 if at["b_in"] is None else at["b_in"])
        widths, cuts, start = {"u": e, "v": e, "z": s}, {}, 0
        for letter in order:
            piece = raw[..., start : start + widths[letter]]
            cuts[letter] = _silu(piece) if letter in activated else piece
            start += widths[letter]
        u, v, z = cuts["u"], cuts["v"], cuts["z"]

        def placed(t: np.ndarray, p: Any) -> np.ndarray:
            return np_rotate(t[:, :, None], p, base, layout)[:, :, 0]

        def head(side: str, p: Any) -> np.ndarray:
            beta = 0 if at[f"beta_{side}"] is None else at[f"beta_{side}"]
            if gamma_after:
                return at[f"gamma_{side}"] * placed(z, p) + beta
            return placed(at[f"gamma_{side}"] * z + beta, p)

        positions = positions_of(at["positions"])
        q, k = head("q", positions), head("k", None if keys_fixed else positions)
        q, k = (k, q) if swap else (q, k)
        by = at["length"] if paper else math.sqrt(s)
        by = by if divisor is None else divisor(s, at)
        products, bias = np.einsum("bns,bms->bnm", q, k), at["bias"]
        scores = products / by if bias is None else products / by + bias_of(bias, by)
        mask = mask_of(at["mask"])
        weights = (
            kernel_of(scores, mask, at) if kernel_of else KERNELS[at["kernel"]](scores, visible(mask, scores.shape))
        )
        mixed = np.einsum("bnm,bme->bne", weights, v)
        b_out = 0 if at["b_out"] is None else at["b_out"]
        if gate_late:
            return np.einsum("bnm,bme->bne", weights, u * v) @ at["w_out"] + b_out
        return (gate(u) * mixed) @ at["w_out"] + b_out

    return call


def _np_rms(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def _np_layer(at: dict[str, Any], x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + at["epsilon"])
    return normed * at["norm_scale"] + at["norm_bias"]


def _post(combine: Callable[[np.ndarray, Function, float], np.ndarray]) -> Function:
    """A post-norm block; combine(x, unit, epsilon)."""

    def call(epsilon: float, **at: Any) -> np.ndarray:
        return combine(at["x"], lambda x: _np_unit()(**{**at, "x": x}), epsilon)

    return call


def _pre(combine: Callable[..., np.ndarray]) -> Function:
    """A pre-norm block; combine(x, normalise, unit, arguments)."""

    def call(**at: Any) -> np.ndarray:
        return combine(at["x"], lambda x: _np_layer(at, x), lambda x: _np_unit(paper=True)(**{**at, "x": x}), at)

    return call


def _np_cross(
    *, order: str = "uq", activated: str = "uqkv", scaled: bool = True, drop: tuple[str, ...] = (),
    places_of: Callable[[Any, Any], Any] = lambda q, k: (q, k), mask_of: Callable[[Any], Any] = lambda mask: mask,
    base_of: Callable[[float], float] = float,
) -> Function:  # fmt: skip
    """A cross unit with one fault."""

    def call(**given: Any) -> np.ndarray:
        at = {**given, **dict.fromkeys(drop)}
        e, s = at["w_v"].shape[1], at["w_k"].shape[1]

        def dense(t: np.ndarray, w: str, b: str) -> np.ndarray:
            return t @ at[w] + (0 if at[b] is None else at[b])

        whole = dense(at["x"], "w_in", "b_in")
        cuts = {"u": whole[..., :e], "q": whole[..., e:]}
        if order == "qu":
            cuts = {"q": whole[..., :s], "u": whole[..., s:]}
        cuts |= {"k": dense(at["keys_from"], "w_k", "b_k"), "v": dense(at["values_from"], "w_v", "b_v")}
        cuts = {letter: _silu(t) if letter in activated else t for letter, t in cuts.items()}
        places = places_of(at["positions_q"], at["positions_k"])
        q, k = (
            np_rotate(cuts[letter][:, :, None], p, base_of(at["base"]), at["layout"])[:, :, 0]
            for letter, p in zip("qk", places, strict=True)
        )
        scores = np.einsum("bns,bms->bnm", q, k) / (math.sqrt(s) if scaled else 1)
        scores = scores if at["bias"] is None else scores + at["bias"]
        weights = KERNELS[at["kernel"]](scores, visible(mask_of(at["mask"]), scores.shape))
        mixed = cuts["u"] * np.einsum("bnm,bme->bne", weights, cuts["v"])
        return mixed @ at["w_out"] + (0 if at["b_out"] is None else at["b_out"])

    return call


def _np_parts(order: tuple[int, int, int], activated: tuple[bool, bool, bool] = (True, True, True)) -> Function:
    """The three parts, taken in another order or not all activated."""

    def call(x: np.ndarray, w_in: np.ndarray, b_in: Any, key_width: int) -> tuple[np.ndarray, ...]:
        whole = x @ w_in + (0 if b_in is None else b_in)
        e = (w_in.shape[1] - key_width) // 2
        widths = (e, e, key_width)
        starts = np.cumsum([0, *(widths[i] for i in order)])
        at = {part: starts[place] for place, part in enumerate(order)}
        made = [whole[..., at[i] : at[i] + widths[i]] for i in range(3)]
        return tuple(_silu(t) if use else t for t, use in zip(made, activated, strict=True))

    return call


def _soft(scores: np.ndarray, mask: Any, at: dict[str, Any]) -> np.ndarray:
    return np_softmax(scores, visible(mask, scores.shape))


def _by_array(scores: np.ndarray, mask: Any, at: dict[str, Any]) -> np.ndarray:
    """Lengths taken from the array, padding included."""
    seen = np.ones(scores.shape, dtype=bool)
    if at["kernel"] == "squared_relu_visible":
        return np.where(visible(mask, scores.shape), KERNELS[at["kernel"]](scores, seen), 0)
    if at["kernel"] == "softmax_plus_16":
        factor = math.log(max(scores.shape[-1], 16)) / math.log(512)
        return np_softmax(scores * factor, visible(mask, scores.shape))
    return KERNELS[at["kernel"]](scores, visible(mask, scores.shape))


def _mutant(function: str, bug: str, call: Function, url: str = "") -> Mutant:
    return Mutant(f"gau.{function}", bug, call, url)


def _moved(p: Any) -> Any:
    return None if p is None else 2 * p


_FAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("columns in the order v, u, z", {"order": "vuz"}),
    ("columns in the order z, u, v", {"order": "zuv"}),
    ("z is not activated", {"activated": "uv"}),
    ("only the gate is activated", {"activated": "u"}),
    ("the value is not activated", {"activated": "uz"}),
    ("gamma after the rotation", {"gamma_after": True}),
    ("queries and keys exchanged", {"swap": True}),
    ("no rotation", {"positions_of": lambda p: None}),
    ("keys are not rotated", {"keys_fixed": True}),
    ("positions count double", {"positions_of": _moved}),
    ("base 10000 whatever is asked", {"base_of": lambda base: 10000.0}),
    ("the other layout", {"layout_of": lambda name: {"interleaved": "half_split"}.get(name, "interleaved")}),
    ("the mask is ignored", {"mask_of": lambda mask: None}),
    ("beta_k is missing", {"drop": ("beta_k",)}),
    ("b_in is missing", {"drop": ("b_in",)}),
    ("b_out is missing", {"drop": ("b_out",)}),
    ("the bias is ignored", {"drop": ("bias",)}),
    ("the gate multiplies the values before they are mixed", {"gate_late": True}),
    ("no gate", {"gate": np.ones_like}),
    ("the kernel is always softmax", {"kernel_of": _soft}),
)

MUTANTS = (
    *(_mutant("unit", bug, _np_unit(**fault)) for bug, fault in _FAULTS),
    _mutant("unit", "the bias is divided by √s too", _np_unit(bias_of=lambda bias, by: bias / by)),
    _mutant("unit", "no division by √s", _np_unit(divisor=lambda s, at: 1.0)),
    _mutant("unit", "divided by s, not by its root", _np_unit(divisor=lambda s, at: s)),
    _mutant("unit", "divided by √e", _np_unit(divisor=lambda s, at: math.sqrt((at["w_in"].shape[1] - s) // 2))),
    _mutant("unit", "padding counts in the length", _np_unit(kernel_of=_by_array)),
    *(_mutant("unit_paper", bug, _np_unit(paper=True, **fault)) for bug, fault in _FAULTS if "bias is" not in bug),
    _mutant("unit_paper", "divided by √s as well", _np_unit(divisor=lambda s, at: at["length"] * math.sqrt(s))),
    _mutant("unit_paper", "divided by √s instead of the length", _np_unit(divisor=lambda s, at: math.sqrt(s))),
    _mutant("unit_paper", "divided by the root of the length", _np_unit(divisor=lambda s, at: math.sqrt(at["length"]))),
    _mutant("unit_paper", "the bias is divided by the length",
            _np_unit(paper=True, bias_of=lambda bias, by: bias / by)),
    _mutant("unit_cross", "columns in the order q, u", _np_cross(order="qu")),
    _mutant("unit_cross", "keys are not activated", _np_cross(activated="uqv")),
    _mutant("unit_cross", "values are not activated", _np_cross(activated="uqk")),
    _mutant("unit_cross", "queries are not activated", _np_cross(activated="ukv")),
    _mutant("unit_cross", "no division by √s", _np_cross(scaled=False)),
    _mutant("unit_cross", "queries are never rotated", _np_cross(places_of=lambda q, k: (None, k))),
    _mutant("unit_cross", "keys are rotated by their index when no positions are given",
            _np_cross(places_of=lambda q, k: (q, np.arange(1, 6) if k is None else k))),
    _mutant("unit_cross", "base 10000 whatever is asked", _np_cross(base_of=lambda base: 10000.0)),
    _mutant("unit_cross", "the bias is ignored", _np_cross(drop=("bias",))),
    _mutant("unit_cross", "the mask is ignored", _np_cross(mask_of=lambda mask: None)),
    _mutant("unit_cross", "b_v is missing", _np_cross(drop=("b_v",))),
    _mutant("block_post_norm", "no residual path", _post(lambda x, unit, epsilon: _np_rms(unit(x), epsilon))),
    _mutant("block_post_norm", "the norm before the unit",
            _post(lambda x, unit, epsilon: x + unit(_np_rms(x, epsilon)))),
    _mutant("block_post_norm", "the norm on the unit alone",
            _post(lambda x, unit, epsilon: x + _np_rms(unit(x), epsilon))),
    _mutant("block_post_norm", "no norm", _post(lambda x, unit, epsilon: x + unit(x))),
    _mutant("block_post_norm", "epsilon 1e-5 whatever is asked",
            _post(lambda x, unit, epsilon: _np_rms(x + unit(x), 1e-5))),
    _mutant("block_post_norm", "the mean is subtracted first",
            _post(lambda x, unit, epsilon: _np_rms((x + unit(x)) - (x + unit(x)).mean(-1, keepdims=True), epsilon))),
    _mutant("block_post_norm", "the residual path carries the norm of x",
            _post(lambda x, unit, epsilon: _np_rms(_np_rms(x, epsilon) + unit(x), epsilon))),
    _mutant("block_pre_norm", "the residual path is normalised",
            _pre(lambda x, normed, unit, at: normed(x) + unit(normed(x)))),
    _mutant("block_pre_norm", "no residual path", _pre(lambda x, normed, unit, at: unit(normed(x)))),
    _mutant("block_pre_norm", "no norm", _pre(lambda x, normed, unit, at: x + unit(x))),
    _mutant("block_pre_norm", "the norm after the unit", _pre(lambda x, normed, unit, at: x + normed(unit(x)))),
    _mutant("block_pre_norm", "the norm once more at the end",
            _pre(lambda x, normed, unit, at: normed(x + unit(normed(x))))),
    _mutant("block_pre_norm", "the norm without its bias", _pre(
        lambda x, normed, unit, at: x + unit(normed(x) - at["norm_bias"]))),
    _mutant("parts", "order v, u, z", _np_parts((1, 0, 2))),
    _mutant("parts", "order z, u, v", _np_parts((2, 0, 1))),
    _mutant("parts", "order u, z, v", _np_parts((0, 2, 1))),
    _mutant("parts", "z is not activated", _np_parts((0, 1, 2), (True, True, False))),
    _mutant("parts", "the gate is not activated", _np_parts((0, 1, 2), (False, True, True))),
    _mutant("parts", "the value is not activated", _np_parts((0, 1, 2), (True, False, True))),
    _mutant("scale_offset", "the offset is missing", lambda z, gamma, beta: gamma * z),
    _mutant("scale_offset", "1 + gamma", lambda z, gamma, beta: (1 + gamma) * z + (0 if beta is None else beta)),
    _mutant("scale_offset", "the offset is scaled too",
            lambda z, gamma, beta: gamma * (z + (0 if beta is None else beta))),
    _mutant("scale_offset", "one scale for all features",
            lambda z, gamma, beta: gamma[..., :1] * z + (0 if beta is None else beta)),
)  # fmt: skip


def _dropped_when_shared(mask: Any) -> Any:
    return None if mask is not None and mask.ndim == 2 else mask


MUSEUM = (
    _mutant("unit_paper", "the array length of the batch in place of the constant of the training",
            _np_unit(divisor=lambda s, at: at["x"].shape[1]), "https://github.com/JunnYu/FLASHQuad_pytorch/issues/1"),
    _mutant("unit_paper", "the relative position bias is left out", _np_unit(paper=True, drop=("bias",)),
            "https://github.com/lucidrains/FLASH-pytorch/issues/9"),
    _mutant("unit_paper", "the causal mask is applied to scores that the weights no longer depend on",
            _np_unit(paper=True, mask_of=_dropped_when_shared),
            "https://github.com/lucidrains/FLASH-pytorch/commit/766fb9f"),
)  # fmt: skip
