"""Judging linear attention: one dense reference for the recurrent, quadratic, chunked and bidirectional forms.

q, k (b, n, h, d), v (b, n, h, e); log_decay (b, n, h) or (b, n, h, d); mask (b, n), True = a real token; cu_seqlens
(documents + 1,) with b = 1, where initial and final states are one per document. None means absent. `normalised`
names the form that it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import (
    LIBM,
    MP,
    Arithmetic,
    Ball,
    Profile,
    concatenate,
    einsum,
    gamma,
    half_subnormal,
    round_to,
    where,
)
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, Output, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import linear_attention as la

FORMS: dict[str, Function] = {
    "recurrent": la.recurrent,
    "quadratic": la.quadratic,
    "chunked": la.chunked,
    "bidirectional": la.bidirectional,
}


def normalised(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    epsilon: float,
    form: str,
    chunk_size: int | None = None,
    q_normaliser: Any = None,
    k_normaliser: Any = None,
    mask: Any = None,
    cu_seqlens: Any = None,
    initial_state: Any = None,
    initial_normaliser: Any = None,
    *,
    of: Package = SPEC,
) -> Any:
    """refimpl.ops.linear_attention.normalised with the form by its name; chunk_size belongs to form="chunked"."""
    family = of.linear_attention
    chosen = getattr(family, form)
    named = chosen if chunk_size is None else partial(chosen, chunk_size=chunk_size)
    return family.normalised(
        q,
        k,
        v,
        form=named,
        scale=scale,
        epsilon=epsilon,
        q_normaliser=q_normaliser,
        k_normaliser=k_normaliser,
        mask=mask,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        initial_normaliser=initial_normaliser,
    )


# References: every row sees every key at once, weighted by what is left of it.
def _dense(
    a: Arithmetic,
    form: str,
    q: Ball,
    k: Ball,
    v: Ball,
    scale: float,
    log_decay: Ball | None = None,
    mask: np.ndarray | None = None,
    cu_seqlens: np.ndarray | None = None,
    initial_state: Ball | None = None,
    chunk_size: int | None = None,
) -> tuple[Ball, Ball, np.ndarray]:
    """Outputs, states and whether a row sees anything.

    The initial state of a document is d keys more, one-hot, that stand just before its first token and carry the rows
    of the state as values. The final state is read by d rows more, one-hot queries of scale 1 after its last token.
    """
    (b, n, h, d), e = q.shape, v.shape[-1]
    bounds = np.array([0, n]) if cu_seqlens is None else cu_seqlens
    docs, sequences = len(bounds) - 1, b if cu_seqlens is None else len(bounds) - 1
    keep = np.ones((b, n), bool) if mask is None else mask
    token_doc = np.searchsorted(bounds, np.arange(n), side="right") - 1

    # Time of a row or key: its token; the state is written just before the first token, read at the last.
    one_hot = np.tile(np.eye(d), (docs, 1))[None, :, None, :]
    ends = np.repeat(np.arange(docs), d)
    rows = concatenate([q, a.exact(np.broadcast_to(one_hot, (b, docs * d, h, d)))], axis=1)
    row_doc = np.concatenate([token_doc, ends])
    row_time = np.concatenate([np.arange(n), bounds[1:][ends] - 1])
    keys, values, key_doc, key_time, seen = k, v, token_doc, np.arange(n), keep
    if initial_state is not None:
        keys = concatenate([k, a.exact(np.broadcast_to(one_hot, (b, docs * d, h, d)))], axis=1)
        written = initial_state.transpose(0, 2, 1, 3).reshape(b, docs * d, h, e)
        values = concatenate([v, written], axis=1)
        key_doc = np.concatenate([token_doc, ends])
        key_time = np.concatenate([np.arange(n), bounds[:-1][ends] - 1])
        seen = np.concatenate([keep, np.ones((b, docs * d), bool)], axis=1)
    order = np.ones((1, 1), bool) if form == "bidirectional" else key_time <= row_time[:, None]
    visible = ((row_doc[:, None] == key_doc) & order)[None] & seen[:, None]

    # Decays between a key and a row, and the roundings on that way: a state is multiplied and added to at every token
    # (recurrent) or chunk; quadratic and chunked orders take differences of cumulative sums instead.
    steps = np.maximum(row_time[:, None] - key_time, 0) if form != "bidirectional" else np.zeros((1, 1))
    hops = steps
    if form in ("quadratic", "bidirectional"):
        hops = np.zeros_like(steps)
    elif form == "chunked" and chunk_size is not None:
        first = bounds[:-1]
        chunk_row, chunk_key = (row_time - first[row_doc]) // chunk_size, (key_time - first[key_doc]) // chunk_size
        hops = np.maximum(chunk_row[:, None] - chunk_key, 0)
    factor = a.exact(np.concatenate([np.full(n, scale), np.ones(docs * d)])).mid[None, :, None, None, None]
    zero, one = a.exact(0.0).mid, a.exact(1.0).mid
    mid = np.where(visible[:, :, None, :, None], one, zero)
    unit, profile = a.unit, a.profile
    eager = profile.storage if profile.name == "eager" and profile.sixteen_bit else 0.0
    # The scale, applied to the query or to the scores, may be rounded itself: 2.
    relative = np.broadcast_to(gamma(2, unit), (1, 1, 1, 1, 1)) + (3 * hops + 4)[None, :, None, :, None] * eager
    if profile.name == "fused" and profile.sixteen_bit:
        # A score or the state of a chunk, and the operand beside it.
        relative = relative + 2 * profile.storage
    if log_decay is not None and form != "bidirectional":
        g = log_decay if log_decay.ndim == 4 else log_decay.reshape(*log_decay.shape, 1)
        g_mid = np.where(keep[:, :, None, None], g.mid, zero)
        start = np.full((b, 1, h, g_mid.shape[-1]), zero)
        total = np.cumsum(np.concatenate([start, g_mid], axis=1), axis=1)
        exponent = (total[:, row_time + 1][:, :, None] - total[:, key_time + 1][:, None]).transpose(0, 1, 3, 2, 4)
        shown = np.broadcast_to(visible[:, :, None, :, None], exponent.shape)
        exponent = np.where(shown, exponent, zero)
        mid = np.where(shown, _exp(exponent), zero)
        size = -total[:, row_time + 1].astype(np.float64).transpose(0, 2, 1, 3)[:, :, :, None]
        size = 2 * size.transpose(0, 2, 1, 3, 4) + np.abs(exponent.astype(np.float64))
        away = (steps > 0)[None, :, None, :, None]
        inexact = np.where(away, size * (gamma(n + 1, unit) + (eager if form != "recurrent" else 0.0)), 0.0)
        relative = relative + np.expm1(inexact) + gamma((LIBM + 2) * (steps + 1), unit)[None, :, None, :, None]
    mid = mid * factor
    strength = np.abs(mid.astype(np.float64))
    # Once stored, a weight may also underflow; a product of decays may in the working precision too.
    tiny = half_subnormal(profile.dtype if eager else "float64" if profile.dtype == "float64" else "float32")
    shown = np.broadcast_to(visible[:, :, None, :, None], strength.shape)
    weight = Ball(mid, np.where(shown, strength * relative + (tiny * (steps + 4))[None, :, None, :, None], 0.0), a)

    out = einsum(
        "brhf,bmhf,brhmf,bmhe->brhe",
        rows,
        keys,
        weight.broadcast_to((*visible.shape[:2], h, visible.shape[2], d)),
        values,
        length=2 * n + d + 6,
    )
    if profile.sixteen_bit and profile.name != "strict":
        # What is stored may underflow: a score beside its value, a state beside its query.
        count = 4.0 + 3.0 * float(np.max(hops, initial=0))
        beside = _magnitudes("brm,bmhe->brhe", visible, values) + np.abs(rows.value).sum(-1, keepdims=True)
        out = Ball(out.mid, out.rad + half_subnormal(profile.dtype) * count * max(abs(scale), 1.0) * beside, a)
    something = visible.any(axis=2)
    out = where(something[:, :, None, None], out, 0.0)
    state = out[:, n:].reshape(sequences, d, h, e).transpose(0, 2, 1, 3)
    return out[:, :n], state, something[:, :n]


def _exp(x: np.ndarray) -> np.ndarray:
    """exp of float64 or of 50-digit numbers."""
    return np.exp(x) if x.dtype != object else np.frompyfunc(MP.exp, 1, 1)(x)


def _magnitudes(subscripts: str, visible: np.ndarray, values: Ball) -> np.ndarray:
    return np.asarray(np.einsum(subscripts, visible.astype(np.float64), np.abs(values.value)))


def _reference(form: str, a: Arithmetic, **arguments: Any) -> tuple[Ball, Ball]:
    """o = scale (q k' . visible . exp(sum of g between)) v, the initial state among the keys; S the same, read bare."""
    output, state, _ = _dense(a, form, **arguments)
    return output, state


def _normalised_reference(
    a: Arithmetic,
    q: Ball,
    k: Ball,
    v: Ball,
    scale: float,
    epsilon: float,
    form: str,
    q_normaliser: Ball | None = None,
    k_normaliser: Ball | None = None,
    initial_state: Ball | None = None,
    initial_normaliser: Ball | None = None,
    **shared: Any,
) -> tuple[Ball, Ball, Ball]:
    """The weighted sum of the values over epsilon plus the sum of the weights; zero where nothing is seen."""
    above, state, something = _dense(a, form, q, k, v, scale, initial_state=initial_state, **shared)
    z = None if initial_normaliser is None else initial_normaliser.reshape(*initial_normaliser.shape, 1)
    q_z, k_z = (q, k) if q_normaliser is None or k_normaliser is None else (q_normaliser, k_normaliser)
    ones = a.exact(np.ones((*v.shape[:3], 1)))
    below, sums, _ = _dense(a, form, q_z, k_z, ones, scale, initial_state=z, **shared)
    quotient = above / (below + epsilon).broadcast_to(above.shape)
    return where(something[:, :, None, None], quotient, 0.0), state, sums[..., 0]


OPERATORS = (
    *(
        Operator(f"linear_attention.{form}", call, partial(_reference, form), ("output", "state"), multilinear=True)
        for form, call in FORMS.items()
    ),
    Operator("linear_attention.normalised", normalised, _normalised_reference, ("output", "state", "normaliser")),
)


# Cases. Sizes are b, n, h, d, e.
def _poisoned(tokens: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Large keys and values where the mask hides them."""
    hidden = ~mask[:, :, None, None]
    return tokens | {"k": np.where(hidden, 1024.0, tokens["k"]), "v": np.where(hidden, -1024.0, tokens["v"])}


def _arguments(
    name: str, sizes: Sequence[int], *, kind: str = "grid", decay: str = "", initial: bool = False, **more: Any
) -> dict[str, Any]:
    """Tokens, and where asked log decays per "head" or "feature" and an initial state; positive features if divided."""
    b, n, h, d, e = sizes
    draw = Draw(f"linear_attention/{name}")
    make = partial(getattr(draw, kind), **{k: more.pop(k) for k in ("bits", "exponent") if k in more})
    features = partial(make, low=1) if "epsilon" in more and "q_normaliser" not in more else make
    made = {"q": features(b, n, h, d), "k": features(b, n, h, d), "v": make(b, n, h, e)}
    if "mask" in more:
        made = _poisoned(made, more["mask"])
    sequences = len(more["cu_seqlens"]) - 1 if "cu_seqlens" in more else b
    if initial:
        made["initial_state"] = make(sequences, h, d, e)
        if "epsilon" in more:
            made["initial_normaliser"] = features(sequences, h, d)
    if decay:
        shape = (b, n, h, d) if "feature" in decay else (b, n, h)
        # e^0 = 1 and e^-1024 = 0 in every format, so that resets are exact.
        resets = -1024.0 * (draw.integers(shape, 0, 3) == 0)
        made["log_decay"] = resets if "resets" in decay else draw.grid(*shape, high=0)
    return made | more


# Left padding, right padding, a hole, and nothing at all beside an ordinary row.
_MASK = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
_HOLES = np.array([[1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0]], bool)
_PACKED = np.array([0, 4, 4, 9, 11])


def _cancelling(*values: float) -> dict[str, Any]:
    """Every row reads one feature of a state that grows to a large sum and falls back to 1."""
    n = len(values)
    features = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, 1]])[np.arange(n) % 3]
    v = np.array(values, float)[None, :, None, None] * np.array([[1.0, -1], [-1, 1]])
    return {"q": np.stack([features, -features[::-1]], axis=1)[None], "k": np.ones((1, n, 2, 3)), "v": v}


_OPPOSITE = np.broadcast_to([[[128.0, -128]], [[-128, 128]]], (2, 3, 2))[None].copy()

# Name: (clauses of `recurrent`, chunk size, arguments). Names that begin with "exact" are exact.
_SHARED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "grid": ("C1", 3, _arguments("grid", (2, 7, 3, 5, 4), scale=0.375)),
    "dense-24-bits": (
        "C1 C7",
        4,
        _arguments("24-bits", (1, 11, 2, 3, 5), kind="dense", bits=24, initial=True, scale=3**-0.5),
    ),
    "dense-53-bits": (
        "C1 C2",
        1,
        _arguments("53-bits", (1, 7, 2, 3, 5), kind="dense", bits=53, decay="feature", scale=0.7),
    ),
    "one-token": ("C1 C2 C7", 64, _arguments("one", (2, 1, 3, 5, 2), decay="head", initial=True, scale=5**-0.5)),
    "decay-per-head": ("C2", 4, _arguments("head", (1, 11, 3, 5, 2), decay="head", scale=1.0)),
    "decay-per-feature": (
        "C2 C7",
        4,
        _arguments("feature", (1, 8, 2, 3, 5), decay="feature", initial=True, scale=0.25),
    ),
    # e^100 overflows float32: exp(G_i) exp(-G_j) in place of exp(G_i - G_j) does not survive.
    "decay-to-nothing": (
        "C2",
        3,
        _arguments("nothing", (1, 7, 2, 3, 5), scale=1.0)
        | {"log_decay": Draw("linear_attention/nothing/decay").grid(1, 7, 2, low=-15, high=0, exponent=3)},
    ),
    "masked": ("C3", 2, _arguments("masked", (5, 5, 2, 3, 2), mask=_MASK, scale=0.5)),
    "masked-decay": (
        "C2 C3",
        3,
        _arguments("masked-decay", (1, 11, 2, 3, 5), mask=_HOLES, decay="head", initial=True, scale=0.5),
    ),
    "packed": ("C5 C6", 3, _arguments("packed", (1, 11, 2, 3, 5), cu_seqlens=_PACKED, initial=True, scale=0.5)),
    "packed-masked-decay": (
        "C2 C3 C5",
        4,
        _arguments("all", (1, 11, 2, 3, 5), cu_seqlens=np.array([0, 5, 11]), mask=_HOLES, decay="head", scale=0.5),
    ),
    "exact-ternary": ("C1", 2, _arguments("ternary", (2, 7, 3, 5, 4), kind="ternary", scale=0.5)),
    "exact-cancelling": ("C1", 3, _cancelling(64, 64, -32, -32, -32, -16, -8, -7) | {"scale": 1.0}),
    "exact-cancelling-initial-state": (
        "C4 C7",
        4,
        _cancelling(-64, -32, -16, -8, -4, -2, -1) | {"scale": 0.5, "initial_state": _OPPOSITE},
    ),
    "exact-resets-per-head": (
        "C2 C7",
        4,
        _arguments("resets", (1, 11, 3, 5, 2), kind="ternary", decay="head resets", initial=True, scale=2.0),
    ),
    "exact-resets-per-feature": (
        "C2",
        5,
        _arguments("resets-2", (1, 8, 2, 3, 5), kind="ternary", decay="feature resets", scale=1.0),
    ),
    "exact-packed-masked": (
        "C3 C5 C6",
        3,
        _arguments(
            "all-exact", (1, 11, 2, 3, 5), kind="ternary", cu_seqlens=_PACKED, mask=_HOLES, initial=True, scale=0.25
        ),
    ),
    "exact-no-tokens": ("C6", 2, _arguments("none", (2, 0, 3, 5, 2), initial=True, scale=1.0)),
}


def _shared_cases(form: str) -> Iterator[Case]:
    for name, (clauses, chunk_size, arguments) in _SHARED.items():
        if form == "bidirectional" and "log_decay" in arguments:
            continue
        packed = ("C1", "C2") if "cu_seqlens" in arguments else ("C1",)
        labels = {"recurrent": tuple(clauses.split()), "chunked": packed, "bidirectional": ("C1", "C2")}
        made = arguments | ({"chunk_size": chunk_size} if form == "chunked" else {})
        yield Case(f"linear_attention.{form}", name, made, labels.get(form, ("C1",)), name.startswith("exact"))


def _halving(epsilon: float, *features: float, **more: Any) -> dict[str, Any]:
    """Keys whose running sums plus epsilon are powers of two: every quotient is exact."""
    n = len(features)
    k = np.stack([np.array(features), np.zeros(n)], axis=-1)[None, :, None, :]
    v = Draw(f"linear_attention/halving/{n}").ternary(1, n, 1, 3)
    return {"q": np.tile([1.0, 0.0], (1, n, 1, 1)), "k": k, "v": v, "scale": 1.0, "epsilon": epsilon, **more}


def _signed_sums() -> dict[str, Any]:
    """Signed features whose denominators vanish: q = (1, -1), k = (x, x)."""
    made = _arguments("signed", (1, 5, 2, 2, 3), scale=1.0)
    q, k = np.tile([1.0, -1.0], (1, 5, 2, 1)), np.repeat(made["k"][..., :1], 2, axis=-1)
    return made | {"q": q, "k": k, "epsilon": 0.0, "form": "recurrent"}


_divided = partial(_arguments, scale=0.5, epsilon=1e-6)
_OWN = Draw("linear_attention/own")

_NORMALISED: dict[str, tuple[str, dict[str, Any]]] = {
    "recurrent": ("C4", _divided("n-recurrent", (2, 7, 3, 5, 4), scale=0.375, form="recurrent")),
    "quadratic-other-epsilon": (
        "C4",
        _divided("n-quadratic", (1, 7, 2, 3, 5), exponent=-12, scale=3**-0.5, epsilon=1e-10, form="quadratic"),
    ),
    "chunked-initial-state": (
        "C4",
        _divided("n-chunked", (1, 11, 2, 3, 5), initial=True, form="chunked", chunk_size=4),
    ),
    "bidirectional": ("C4", _divided("n-bidirectional", (2, 5, 3, 7, 2), form="bidirectional")),
    "bidirectional-initial-state": ("C4", _divided("n-both", (1, 5, 3, 2, 3), initial=True, form="bidirectional")),
    # Sums near epsilon: 1e-10, 1e-6 and 1e-4 part company, and so do epsilon before and after the scale.
    "near-epsilon": (
        "C4",
        _divided("n-small", (1, 7, 2, 3, 5), exponent=-14, scale=0.25, epsilon=1e-4, form="recurrent"),
    ),
    "masked": ("C2 C3", _divided("n-masked", (5, 5, 2, 3, 2), mask=_MASK, form="quadratic")),
    "masked-without-epsilon": (
        "C2 C3",
        _divided("n-masked-0", (5, 5, 2, 3, 2), mask=_MASK, epsilon=0.0, form="recurrent"),
    ),
    "packed": (
        "C2 C4",
        _divided(
            "n-packed", (1, 11, 2, 3, 5), cu_seqlens=_PACKED, mask=_HOLES, initial=True, form="chunked", chunk_size=3
        ),
    ),
    "packed-from-nothing": (
        "C2",
        _divided("n-packed-0", (1, 11, 2, 3, 5), cu_seqlens=np.array([0, 5, 5, 11]), form="quadratic"),
    ),
    "denominator-of-its-own": (
        "C5",
        _divided(
            "n-own",
            (1, 7, 2, 3, 5),
            form="recurrent",
            q_normaliser=_OWN.grid(1, 7, 2, 2, low=1),
            k_normaliser=_OWN.grid(1, 7, 2, 2, low=1),
        ),
    ),
    "one-token": ("C1", _divided("n-one", (2, 1, 3, 5, 2), epsilon=0.0, form="chunked", chunk_size=8)),
    "exact-halving": ("C1", _halving(0.0, 1, 1, 2, 4, 8, form="recurrent")),
    "exact-halving-epsilon": ("C4", _halving(1.0, 1, 2, 4, 8, 16, form="quadratic")),
    "exact-halving-chunked": ("C4", _halving(0.5, 0.5, 1, 2, 4, 8, 16, form="chunked", chunk_size=4)),
    "exact-masked-rows": (
        "C2 C3",
        _halving(0.0, 8, 1, 1, 8, 2, 4, form="recurrent", mask=np.array([[0, 1, 1, 0, 1, 1]], bool)),
    ),
    "exact-bidirectional": ("C4", _halving(2.0, 1, 1, 2, 4, 6, form="bidirectional")),
}

CASES = (
    *(case for form in FORMS for case in _shared_cases(form)),
    *(
        Case("linear_attention.normalised", name, arguments, tuple(clauses.split()), name.startswith("exact"))
        for name, (clauses, arguments) in _NORMALISED.items()
    ),
    Case(
        "linear_attention.normalised",
        "signed-denominator",
        _signed_sums(),
        ("C4",),
        ill_conditioned=True,
        note="the denominators are zero but for rounding: outputs say nothing, state and normaliser do",
    ),
)


# Laws.
def _documents(case: Case) -> list[tuple[int, int, int, int]]:
    """(batch row, first token, one past the last, index of the state) of every sequence or packed document."""
    b, n = case["q"].shape[:2]
    bounds = case.arguments.get("cu_seqlens")
    if bounds is None:
        return [(row, 0, n, row) for row in range(b)]
    return [(0, int(lo), int(hi), i) for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]


def _sees_all(case: Case) -> bool:
    return case.op.endswith("bidirectional") or case.arguments.get("form") == "bidirectional"


def _kept(case: Case) -> np.ndarray:
    mask = case.arguments.get("mask")
    return np.ones(case["q"].shape[:2], bool) if mask is None else mask


def _elapsed(case: Case) -> np.ndarray:
    """Cumulative log decays (b, n + 1, h, d) in which masked tokens count for nothing."""
    b, n, h, d = case["q"].shape
    g = case.arguments.get("log_decay")
    g = np.zeros((b, n, h, 1)) if g is None else g if g.ndim == 4 else g[..., None]
    g = np.where(_kept(case)[:, :, None, None], np.broadcast_to(g, (b, n, h, d)), 0.0)
    return np.concatenate([np.zeros((b, 1, h, d)), np.cumsum(g, axis=1)], axis=1)


def _without(case: Case, *names: str) -> Case:
    """The case without some optional arguments."""
    return replace(case, arguments={k: v for k, v in case.arguments.items() if k not in names})


def _only(case: Case, row: int, tokens: Any) -> Case:
    """One batch row and some of its tokens; what belongs to states or documents is left out."""
    cut = {
        k: case[k] for k in ("q", "k", "v", "log_decay", "mask", "q_normaliser", "k_normaliser") if k in case.arguments
    }
    small = _without(case, "cu_seqlens", "initial_state", "initial_normaliser")
    return small.with_(**{k: v[row : row + 1, tokens] for k, v in cut.items()})


def _states(case: Case, index: int) -> dict[str, np.ndarray]:
    names = ("initial_state", "initial_normaliser")
    return {k: case[k][index : index + 1] for k in names if k in case.arguments}


def impulse_response(implementation: Function, case: Case) -> None:
    """A single key (one feature, one token a document) gives scale q decay v from that token on, and nothing before."""
    case = _without(case, "initial_state")
    elapsed, keep, (h, d) = _elapsed(case), _kept(case), case["q"].shape[2:]
    for share in (0.0, 0.5, 1.0):
        k = np.zeros_like(case["k"])
        output = np.zeros_like(case["v"])
        documents = _documents(case)
        state = np.zeros((len(documents), h, d, case["v"].shape[-1]))
        for row, lo, hi, index in documents:
            if lo == hi:
                continue
            j = lo + round(share * (hi - lo - 1))
            for head in range(h):
                f = (head + index + j) % d
                k[row, j, head, f] = 1.0
                if not keep[row, j]:
                    continue
                left = np.exp(elapsed[row, 1:, head, f] - elapsed[row, j + 1, head, f])
                seen = slice(lo, hi) if _sees_all(case) else slice(j, hi)
                weights = case["scale"] * case["q"][row, seen, head, f] * left[seen]
                output[row, seen, head] = weights[:, None] * case["v"][row, j, head]
                state[index, head, f] = left[hi - 1] * case["v"][row, j, head]
        got = run(implementation, case, k=k)
        close("impulse_response", case, got[0].value, output, got[0].radius)
        close("impulse_response", case, got[1].value, state, got[1].radius)


def initial_state_response(implementation: Function, case: Case) -> None:
    """With keys of zero the output is scale q S_0 decayed to each row, and the state is S_0 decayed to the end."""
    if "initial_state" not in case.arguments:
        return
    elapsed, S = _elapsed(case), case["initial_state"]
    output, state = np.zeros_like(case["v"]), np.zeros_like(S)
    for row, lo, hi, index in _documents(case):
        left = np.exp(elapsed[row, lo : hi + 1] - elapsed[row, lo])
        read = case["q"][row, lo:hi] * left[1:]
        output[row, lo:hi] = case["scale"] * np.einsum("nhd,hde->nhe", read, S[index])
        state[index] = left[-1][:, :, None] * S[index]
    got = run(implementation, case, k=np.zeros_like(case["k"]))
    close("initial_state_response", case, got[0].value, output, got[0].radius)
    close("initial_state_response", case, got[1].value, state, got[1].radius)


def _carry(case: Case, first: Sequence[Output], tail: Case, whole: np.ndarray) -> np.ndarray:
    """What the rounding of the carried states may do to the outputs of the tail."""
    spread: np.ndarray = abs(case["scale"]) * np.einsum("bnhd,bhde->bnhe", np.abs(tail["q"]), first[1].radius)
    if not case.op.endswith("normalised"):
        return spread
    q_z = tail.arguments.get("q_normaliser", tail["q"])
    read = partial(np.einsum, "bnhd,bhd->bnh", case["scale"] * q_z)
    doubt = read(first[2].radius)[..., None]
    # Features are positive and sums only grow: what the first part left bounds every later denominator from below.
    least = read(first[2].value)[..., None] + case["epsilon"] - 2 * doubt
    safe = np.where(least > 0, least, 1.0)
    return np.where(least > 0, (spread + np.abs(whole) * doubt) / safe, np.inf)


def split_and_carry(implementation: Function, case: Case) -> None:
    """Tokens cut in two, the state handed on, give the output and the state of the whole."""
    if "cu_seqlens" in case.arguments or _sees_all(case):
        return
    n = case["q"].shape[1]
    cut = n // 2
    whole = run(implementation, case)
    parts = [k for k in ("q", "k", "v", "log_decay", "mask", "q_normaliser", "k_normaliser") if k in case.arguments]
    head = case.with_(**{k: case[k][:, :cut] for k in parts})
    tail = case.with_(**{k: case[k][:, cut:] for k in parts})
    first = run(implementation, head)
    carried = dict(zip(("initial_state", "initial_normaliser"), (o.value for o in first[1:]), strict=False))
    second = run(implementation, tail, **carried)
    made = np.concatenate([first[0].value, second[0].value], axis=1)
    radius = np.concatenate([first[0].radius, second[0].radius], axis=1)
    spread = _carry(case, first, tail, whole[0].value[:, cut:])
    doubt = np.concatenate([np.zeros_like(first[0].radius), spread], axis=1)
    close("split_and_carry", case, made, whole[0].value, radius + whole[0].radius + doubt)
    for one, other, before in zip(second[1:], whole[1:], first[1:], strict=True):
        close("split_and_carry", case, one.value, other.value, one.radius + other.radius + before.radius)


def packed_equals_separate(implementation: Function, case: Case) -> None:
    """Every packed document (or batch row) gives what it gives alone, from its own initial state to its own end."""
    whole = run(implementation, case)
    for row, lo, hi, index in _documents(case):
        alone = run(implementation, _only(case, row, slice(lo, hi)), **_states(case, index))
        pairs = [(alone[0], whole[0].value[row : row + 1, lo:hi], whole[0].radius[row : row + 1, lo:hi])]
        pairs += [
            (a, w.value[index : index + 1], w.radius[index : index + 1])
            for a, w in zip(alone[1:], whole[1:], strict=True)
        ]
        for one, value, radius in pairs:
            close("packed_equals_separate", case, value, one.value, radius + one.radius)


def documents_are_isolated(implementation: Function, case: Case) -> None:
    """Changing the first document (or batch row) leaves the others as they are, bit for bit."""
    documents = _documents(case)
    if len(documents) < 2:
        return
    row, lo, hi, _ = documents[0]
    changes = {}
    for name in ("q", "k", "v", "log_decay"):
        if name in case.arguments:
            changes[name] = case[name].copy()
            changes[name][row, lo:hi] *= 2
    if "initial_state" in case.arguments:
        changes["initial_state"] = case["initial_state"].copy()
        changes["initial_state"][0] *= 2
    kept, got = run(implementation, case), run(implementation, case, **changes)
    others = np.ones(case["q"].shape[:2], bool)
    others[row, lo:hi] = False
    equal("documents_are_isolated", case, got[0].value[others], kept[0].value[others])
    for one, other in zip(got[1:], kept[1:], strict=True):
        equal("documents_are_isolated", case, one.value[1:], other.value[1:])


def past_is_untouched(implementation: Function, case: Case) -> None:
    """Changing the tokens from the middle on leaves the rows before as they are, bit for bit."""
    if _sees_all(case):
        return
    cut = case["q"].shape[1] // 2
    changes = {}
    for name in ("q", "k", "v", "log_decay", "q_normaliser", "k_normaliser"):
        if name in case.arguments:
            changes[name] = case[name].copy()
            changes[name][:, cut:] *= 2
    kept, got = run(implementation, case), run(implementation, case, **changes)
    equal("past_is_untouched", case, got[0].value[:, :cut], kept[0].value[:, :cut])


def masked_tokens_are_ignored(implementation: Function, case: Case) -> None:
    """Key, value and decay of a masked token change nothing, bit for bit."""
    hidden = ~_kept(case)
    if not hidden.any():
        return
    changes = {}
    for name in ("k", "v", "log_decay", "k_normaliser"):
        if name in case.arguments:
            changes[name] = case[name].copy()
            changes[name][hidden] *= 4
    for one, other in zip(run(implementation, case, **changes), run(implementation, case), strict=True):
        equal("masked_tokens_are_ignored", case, one.value, other.value)


def masked_tokens_may_be_dropped(implementation: Function, case: Case) -> None:
    """Padding on the left, on the right or in between: the rows that are left and the states stay what they were."""
    keep = _kept(case)
    if keep.all():
        return
    whole = run(implementation, case)
    for row, lo, hi, index in _documents(case):
        real = lo + np.flatnonzero(keep[row, lo:hi])
        short = run(implementation, _without(_only(case, row, real), "mask"), **_states(case, index))
        close(
            "masked_tokens_may_be_dropped",
            case,
            whole[0].value[row, real],
            short[0].value[0],
            whole[0].radius[row, real] + short[0].radius[0],
        )
        for one, other in zip(short[1:], whole[1:], strict=True):
            close(
                "masked_tokens_may_be_dropped",
                case,
                other.value[index],
                one.value[0],
                one.radius[0] + other.radius[index],
            )


def last_row_reads_the_state(implementation: Function, case: Case) -> None:
    """The last row of a document (every row of a bidirectional one) is scale q S, over its normaliser if it has one."""
    got = run(implementation, case)
    q_z = case.arguments.get("q_normaliser", case["q"])
    for row, lo, hi, index in _documents(case):
        rows = slice(lo if _sees_all(case) else max(hi - 1, lo), hi)
        read = partial(np.einsum, "nhd,hde->nhe")
        size = abs(case["scale"]) * np.abs(case["q"][row, rows])
        value = case["scale"] * read(case["q"][row, rows], got[1].value[index])
        radius = read(size, got[1].radius[index] + 1e-15 * np.abs(got[1].value[index]))
        if case.op.endswith("normalised"):
            if not (_kept(case)[row, lo:hi].any() or "initial_state" in case.arguments):
                continue
            z, z_radius = got[2].value[index][..., None], got[2].radius[index][..., None]
            below = case["scale"] * read(q_z[row, rows], z) + case["epsilon"]
            doubt = abs(case["scale"]) * read(np.abs(q_z[row, rows]), z_radius + 1e-15 * np.abs(z))
            with np.errstate(divide="ignore", invalid="ignore"):
                value = value / below
                radius = np.where(below > 2 * doubt, (radius + np.abs(value) * doubt) / (below - doubt), np.inf)
        close("last_row_reads_the_state", case, got[0].value[row, rows], value, radius + got[0].radius[row, rows])


def chunk_size_is_free(implementation: Function, case: Case) -> None:
    """Any chunk size gives the same."""
    kept = run(implementation, case)
    for size in (1, 2, 5, 64):
        for one, other in zip(run(implementation, case, chunk_size=size), kept, strict=True):
            close("chunk_size_is_free", case, one.value, other.value, one.radius + other.radius)


def constant_values_come_back(implementation: Function, case: Case) -> None:
    """With epsilon = 0 and one value for all tokens of a document that value is the output, wherever a key is seen."""
    if "q_normaliser" in case.arguments:
        return
    case = _without(case, "initial_state", "initial_normaliser")
    keep, v = _kept(case), case["v"].copy()
    seen = np.zeros(case["q"].shape[:2], bool)
    for row, lo, hi, _ in _documents(case):
        v[row, lo:hi] = v[row, lo : lo + 1]
        seen[row, lo:hi] = keep[row, lo:hi].any() if _sees_all(case) else np.cumsum(keep[row, lo:hi]) > 0
    got = run(implementation, case, v=v, epsilon=0.0)[0]
    close("constant_values_come_back", case, got.value, np.where(seen[:, :, None, None], v, 0.0), got.radius)


def denominator_is_its_own(implementation: Function, case: Case) -> None:
    """Given q and k as q_normaliser and k_normaliser nothing changes; k_normaliser doubled doubles the normaliser."""
    if "initial_state" in case.arguments or "q_normaliser" in case.arguments:
        return
    plain = run(implementation, case)
    own = run(implementation, case, q_normaliser=case["q"], k_normaliser=case["k"])
    twice = run(implementation, case, q_normaliser=case["q"], k_normaliser=2 * case["k"], epsilon=2 * case["epsilon"])
    for one, other, factor in zip(own + twice, plain + plain, (1, 1, 1, 0.5, 1, 2), strict=True):
        close("denominator_is_its_own", case, one.value, factor * other.value, one.radius + factor * other.radius)


_PLAIN = tuple(f"linear_attention.{form}" for form in FORMS)
_CAUSAL_FORMS = _PLAIN[:3]
_EVERY = (*_PLAIN, "linear_attention.normalised")

LAWS = (
    Law(impulse_response, _PLAIN, ("C1",)),
    Law(initial_state_response, _PLAIN, ("C1",)),
    Law(split_and_carry, (*_CAUSAL_FORMS, "linear_attention.normalised")),
    Law(packed_equals_separate, _EVERY),
    Law(documents_are_isolated, _EVERY),
    Law(past_is_untouched, (*_CAUSAL_FORMS, "linear_attention.normalised"), ("C1",)),
    Law(masked_tokens_are_ignored, _EVERY),
    Law(masked_tokens_may_be_dropped, _EVERY),
    Law(last_row_reads_the_state, _EVERY),
    Law(chunk_size_is_free, ("linear_attention.chunked",), ("C1",)),
    Law(constant_values_come_back, ("linear_attention.normalised",), ("C1", "C3")),
    Law(denominator_is_its_own, ("linear_attention.normalised",), ("C5",)),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Up to 8 tokens: batches or packed documents, masks, decays, initial states; positive features if divided."""
    divides = function == "normalised"

    def build(draw: Draw, b: int, n: int, h: int, d: int, e: int, scale: float, **options: Any) -> dict[str, Any]:
        bounds = None
        if options["packed"]:
            b, cuts = 1, sorted((n * options["cut"] // 8, n * options["cut"] // 16))
            bounds = np.array([0, *cuts, n])
        sequences = b if bounds is None else len(bounds) - 1
        low = 1 if divides else -127
        made: dict[str, Any] = {
            "q": draw.grid(b, n, h, d, low=low),
            "k": draw.grid(b, n, h, d, low=low),
            "v": draw.grid(b, n, h, e),
            "scale": scale,
        }
        decay = {"none": None, "head": (b, n, h), "feature": (b, n, h, d)}[options.get("decay", "none")]
        if decay is not None:
            made["log_decay"] = draw.grid(*decay, low=-127, high=0)
        if options["masked"]:
            made["mask"] = draw.mask(b, n, keep=0.6)
        if bounds is not None:
            made["cu_seqlens"] = bounds
        if options["initial"]:
            made["initial_state"] = draw.grid(sequences, h, d, e)
        form = options.get("form", function)
        if divides:
            made |= {"form": form, "epsilon": options["epsilon"]}
            width = d
            if options["own"]:
                width = 2
                made["q_normaliser"] = draw.grid(b, n, h, width, low=1)
                made["k_normaliser"] = draw.grid(b, n, h, width, low=1)
            if options["initial"]:
                made["initial_normaliser"] = draw.grid(sequences, h, width, low=1)
        if form == "chunked":
            made["chunk_size"] = options["chunk_size"]
        return made

    choices: dict[str, st.SearchStrategy[Any]] = {
        "b": st.integers(1, 2),
        "n": st.integers(0, 8),
        "h": st.integers(1, 2),
        "d": st.integers(1, 3),
        "e": st.integers(1, 2),
        "scale": st.sampled_from([0.5, 1.0, 3**-0.5]),
        "packed": st.booleans(),
        "cut": st.integers(0, 8),
        "masked": st.booleans(),
        "initial": st.booleans(),
        "chunk_size": st.integers(1, 9),
    }
    if divides:
        choices |= {
            "form": st.sampled_from(list(FORMS)),
            "epsilon": st.sampled_from([0.0, 1e-6, 0.125]),
            "own": st.booleans(),
        }
    elif function != "bidirectional":
        choices["decay"] = st.sampled_from(["none", "head", "feature"])
    return drawn(f"linear_attention.{function}", profile, build, **choices)


# Known bugs: one dense or stepwise implementation with a fault in it.
def _wrong(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    cu_seqlens: np.ndarray | None = None,
    initial_state: np.ndarray | None = None,
    chunk_size: int | None = None,
    *,
    bug: str,
    sees_all: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Dense causal (or not) linear attention, document by document, with one fault."""
    b, n, h, d = q.shape
    g = np.zeros((b, n, h, 1)) if log_decay is None else log_decay if log_decay.ndim == 4 else log_decay[..., None]
    keep = np.ones((b, n), bool) if mask is None else mask
    if bug == "mask ignored" or (bug == "mask skipped for a batch of one" and b == 1):
        keep = np.ones((b, n), bool)
    if bug == "mask on the queries":
        q, keep = np.where(keep[:, :, None, None], q, 0.0), np.ones((b, n), bool)
    if bug == "padded keys hidden, padded values not":
        v, keep = np.where(keep[:, :, None, None], v, 0.0), np.ones((b, n), bool)
    if bug != "masked tokens decay the state":
        g = np.where(keep[:, :, None, None], g, 0.0)
    if bug == "decay of the next head":
        g = np.roll(g, 1, axis=2)
    if bug == "decay in base 2":
        g = g * np.log(2.0)
    if bug == "decay upside down":
        g = -g
    if bug == "decay of the next token":
        g = np.concatenate([g[:, 1:], np.zeros_like(g[:, :1])], axis=1)
    if bug == "scale of d^-1/2 whatever is asked":
        scale = d**-0.5
    bounds = np.array([0, n]) if cu_seqlens is None else cu_seqlens
    sequences = b if cu_seqlens is None else len(bounds) - 1
    S = np.zeros((sequences, h, d, v.shape[-1])) if initial_state is None else initial_state
    if bug == "initial state ignored":
        S = np.zeros_like(S)
    if bug == "every document starts from the first state":
        S = np.broadcast_to(S[:1], S.shape)
    if bug == "initial state transposed" and S.shape[2] == S.shape[3]:
        S = S.swapaxes(2, 3)
    output, state = np.zeros_like(v), np.zeros_like(S)
    loose = bug == "cu_seqlens ignored" or (bug == "cu_seqlens dropped when there is a mask" and mask is not None)
    for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        t, s = slice(lo, hi), slice(None) if cu_seqlens is None else slice(i, i + 1)
        if loose:
            t = slice(0, hi)
        made = _faulty(q[:, t], k[:, t], v[:, t], g[:, t], keep[:, t], S[s], scale, chunk_size, bug, sees_all, int(lo))
        output[:, lo:hi], state[s] = made[0][:, made[0].shape[1] - (hi - lo) :], made[1]
    if bug == "chunks straddle documents" and cu_seqlens is not None and chunk_size is not None:
        for lo in bounds[1:-1]:
            # The chunk that holds a boundary: its later rows see its earlier tokens.
            start = lo // chunk_size * chunk_size
            stop = min(start + chunk_size, n, int(bounds[bounds > lo].min(initial=n)))
            seen = np.where(keep[:, start:lo, None, None], k[:, start:lo], 0.0)
            weights = np.einsum("bnhd,bmhd->bnmh", q[:, lo:stop], seen)
            output[:, lo:stop] += scale * np.einsum("bnmh,bmhe->bnhe", weights, v[:, start:lo])
    if bug == "state of the last row leaks into the next" and b > 1:
        output[1:] += scale * np.einsum("bnhd,bhde->bnhe", q[1:], state[:-1])
    if bug == "output one token late":
        output = np.concatenate([np.zeros_like(output[:, :1]), output[:, :-1]], axis=1)[:, :n]
    if bug == "state kept times the scale":
        state = state * scale
    if bug == "one state for all documents":
        state = np.broadcast_to(state[-1:], state.shape).copy()
    if bug == "state of the heads shifted":
        state = np.roll(state, 1, axis=1)
    return output, state


def _faulty(q, k, v, g, keep, S, scale, chunk_size, bug, sees_all, lo):
    """One document."""
    n = q.shape[1]
    c = chunk_size or max(n, 1)
    k = np.where(keep[:, :, None, None], k, 0.0)
    G = np.cumsum(g, axis=2 if bug == "decay summed over the heads" else 1)
    token = np.arange(n)
    chunk = token // c
    later = token[:, None] >= token
    if sees_all and bug != "causal":
        later = np.ones((n, n), bool)
    if bug == "own token not seen":
        later = token[:, None] > token
    if bug == "next token seen":
        later = token[:, None] >= token - 1
    if bug == "own chunk seen whole":
        later = chunk[:, None] >= chunk
    if bug == "no causal mask after the first chunk":
        later = later | ((chunk[:, None] == chunk) & (chunk > 0))
    if bug == "chunks do not see each other":
        later = later & (chunk[:, None] == chunk)
    if bug == "only the previous chunk is carried":
        later = later & (chunk[:, None] - chunk <= 1)
    if bug == "own chunk counted twice":
        later = later * (1.0 + (chunk[:, None] == chunk))
    if bug == "tail chunk skipped" and n % c:
        later = later & (token[:, None] < n // c * c)
    exponent = G[:, :, None] - G[:, None]
    start = np.concatenate([np.zeros_like(G[:, :1]), G], axis=1)
    if bug == "decay after the token is added":
        exponent = exponent + g[:, None]
    across = (chunk[:, None] > chunk)[None, :, :, None, None]
    if bug == "carried state not decayed inside the chunk":
        exponent = np.where(across, start[:, chunk * c][:, :, None] - G[:, None], exponent)
    if bug == "keys not decayed to the end of their chunk":
        exponent = np.where(across, G[:, :, None] - start[:, np.minimum((chunk + 1) * c, n)][:, None], exponent)
    faded = 0.999 ** (chunk[:, None] - chunk) if chunk_size else 0.999 ** (token[:, None] - token)
    weight = np.where(later[None, :, :, None, None] > 0, np.exp(exponent), 0.0) * later[None, :, :, None, None]
    if bug == "state loses a thousandth":
        weight = weight * np.where(later, faded, 1.0)[None, :, :, None, None]
    scores = (q[:, :, None] * k[:, None] * weight).sum(-1)
    first = np.exp(start[:, :-1] if bug == "initial state decays one token late" else G)
    if bug == "initial state does not decay":
        first = np.ones_like(first)
    inter = np.einsum("bnhd,bhde->bnhe", q * first, S)
    output = scale * np.einsum("bnmh,bmhe->bnhe", scores, v)
    output = output + (inter if bug == "initial state read without the scale" else scale * inter)
    if bug == "scale twice":
        output = output * scale
    if bug == "divided by the length" and n:
        output = output / n
    total = G[:, -1] if n else np.zeros_like(g.sum(axis=1))
    left = np.exp(total[:, None] - G)
    if bug == "keys not decayed in the state":
        left = np.ones_like(left)
    stop = n - 1 if bug == "state before the last token" else n // c * c if bug == "tail chunk skipped" else n
    stored = np.einsum("bnhd,bnhe->bhde", (k * left)[:, : max(stop, 0)], v[:, : max(stop, 0)])
    carried = np.exp(total)[..., None] * S
    if bug == "initial state lost from the final state":
        carried = 0 * carried
    if bug == "initial state counted twice":
        output, carried = output + scale * inter, 2 * carried
    return output, carried + stored


def _bfloat16_state(q, k, v, scale, log_decay=None, mask=None, cu_seqlens=None, initial_state=None):
    n = q.shape[1]
    bounds = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [np.zeros_like(v[:, :0])], []
    for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        S = None if initial_state is None else initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for t in range(lo, hi):
            cut = slice(t, t + 1)
            decay, seen = (None if x is None else x[:, cut] for x in (log_decay, mask))
            made = la.recurrent(
                q[:, cut], k[:, cut], v[:, cut], scale=scale, log_decay=decay, mask=seen, initial_state=S
            )
            outputs.append(made.output)
            S = round_to(made.state, "bfloat16")
        if S is None:
            S = np.zeros((q.shape[0], *q.shape[2:], v.shape[-1]))
        states.append(S)
    return np.concatenate(outputs, axis=1), np.concatenate(states)


def _wrong_normalised(bug: str, form: str, epsilon: float, **arguments: Any) -> tuple[np.ndarray, ...]:
    """Numerator and denominator as the specification forms them, put together with one fault."""
    a = dict(arguments)
    q_z, k_z = a.pop("q_normaliser", a["q"]), a.pop("k_normaliser", a["k"])
    S, z = a.pop("initial_state", None), a.pop("initial_normaliser", None)
    if bug == "denominator from the rotated q and k":
        q_z, k_z = (x if z is None or x.shape[-1] == z.shape[-1] else y for x, y in ((a["q"], q_z), (a["k"], k_z)))
    above = FORMS[form](**a, initial_state=S)
    below = dict(a) | {"q": q_z, "k": k_z, "v": np.ones((*a["v"].shape[:3], 1))}
    if bug == "padded keys stay in the normaliser":
        below.pop("mask", None)
    if bug == "cu_seqlens forgotten in the normaliser" and "cu_seqlens" in below and z is None:
        below.pop("cu_seqlens")
    if bug == "scale left out of the denominator":
        below["scale"] = 1.0
    if bug == "sum over all tokens":
        below.pop("chunk_size", None)
        form = "bidirectional"
    start = None if z is None or bug == "initial normaliser ignored" else z[..., None]
    made = FORMS[form](**below, initial_state=start)
    weights, sums = made.output, made.state[..., 0]
    if len(sums) != len(above.state):
        sums = np.broadcast_to(sums, (len(above.state), *sums.shape[1:])).copy()
    if bug == "own token missing from the normaliser":
        k_seen = k_z if a.get("mask") is None else np.where(a["mask"][:, :, None, None], k_z, 0.0)
        weights = weights - below["scale"] * (q_z * k_seen).sum(-1, keepdims=True)
    if bug == "normaliser summed over the heads":
        k_seen = k_z if a.get("mask") is None else np.where(a["mask"][:, :, None, None], k_z, 0.0)
        weights = below["scale"] * (q_z * np.cumsum(k_seen, axis=2)).sum(-1, keepdims=True)
    with np.errstate(all="ignore"):
        output = np.where(weights + epsilon == 0, 0.0, above.output / (weights + epsilon))
        if bug == "epsilon left out":
            output = np.where(weights == 0, 0.0, above.output / weights)
        if bug == "epsilon added to the unscaled sum":
            output = np.where(weights + epsilon == 0, 0.0, above.output / (weights + epsilon * a["scale"]))
        if bug == "denominator clamped at epsilon":
            output = np.where(weights + epsilon == 0, 0.0, above.output / np.maximum(weights, epsilon))
        if bug == "epsilon added to the quotient":
            output = np.where(weights == 0, 0.0, above.output / weights) + epsilon
        if bug == "epsilon of 1e-3 whatever is asked":
            output = above.output / (weights + 1e-3)
        if bug == "no key gives NaN":
            output = above.output / (weights + epsilon)
        if bug == "not divided":
            output = above.output
    if bug == "normaliser kept times the scale":
        sums = sums * a["scale"]
    return output, above.state, sums


def _mutant(form: str, bug: str, url: str = "") -> Mutant:
    op = f"linear_attention.{form}"
    if form == "normalised":
        return Mutant(op, bug, partial(_wrong_normalised, bug), url)
    return Mutant(op, bug, partial(_wrong, bug=bug, sees_all=form == "bidirectional"), url)


MUTANTS = (
    *(
        _mutant("recurrent", bug)
        for bug in (
            "own token not seen",
            "next token seen",
            "decay after the token is added",
            "decay in base 2",
            "decay upside down",
            "decay of the next head",
            "decay of the next token",
            "decay summed over the heads",
            "masked tokens decay the state",
            "mask ignored",
            "mask on the queries",
            "initial state ignored",
            "initial state read without the scale",
            "initial state counted twice",
            "initial state decays one token late",
            "state before the last token",
            "state kept times the scale",
            "state loses a thousandth",
            "state of the heads shifted",
            "state of the last row leaks into the next",
            "scale of d^-1/2 whatever is asked",
            "scale twice",
            "output one token late",
            "cu_seqlens ignored",
            "every document starts from the first state",
            "one state for all documents",
        )
    ),
    Mutant("linear_attention.recurrent", "state kept in bfloat16", _bfloat16_state),
    *(
        _mutant("quadratic", bug)
        for bug in (
            "own token not seen",
            "next token seen",
            "initial state ignored",
            "initial state does not decay",
            "initial state lost from the final state",
            "keys not decayed in the state",
            "decay summed over the heads",
            "mask on the queries",
        )
    ),
    *(
        _mutant("chunked", bug)
        for bug in (
            "own chunk seen whole",
            "own chunk counted twice",
            "chunks do not see each other",
            "only the previous chunk is carried",
            "carried state not decayed inside the chunk",
            "keys not decayed to the end of their chunk",
            "state loses a thousandth",
            "masked tokens decay the state",
            "initial state lost from the final state",
        )
    ),
    *(
        _mutant("bidirectional", bug)
        for bug in ("causal", "initial state ignored", "mask ignored", "cu_seqlens ignored", "divided by the length")
    ),
    *(
        _mutant("normalised", bug)
        for bug in (
            "epsilon left out",
            "epsilon added to the unscaled sum",
            "epsilon added to the quotient",
            "epsilon of 1e-3 whatever is asked",
            "denominator clamped at epsilon",
            "denominator from the rotated q and k",
            "scale left out of the denominator",
            "own token missing from the normaliser",
            "sum over all tokens",
            "initial normaliser ignored",
            "normaliser kept times the scale",
            "cu_seqlens forgotten in the normaliser",
            "no key gives NaN",
            "not divided",
        )
    ),
)

_FLA = "https://github.com/fla-org/flash-linear-attention/issues/"
MUSEUM = (
    _mutant("normalised", "padded keys stay in the normaliser", _FLA + "1263"),
    _mutant("normalised", "normaliser summed over the heads", _FLA + "850"),
    _mutant("chunked", "initial state ignored", _FLA + "285"),
    _mutant("chunked", "tail chunk skipped", _FLA + "906"),
    _mutant("chunked", "cu_seqlens dropped when there is a mask", _FLA + "838"),
    _mutant("chunked", "chunks straddle documents", "https://github.com/fla-org/native-sparse-attention/issues/23"),
    _mutant(
        "chunked",
        "no causal mask after the first chunk",
        "https://github.com/tenstorrent/tt-metal/issues/48899",
    ),
    _mutant("recurrent", "mask skipped for a batch of one", "https://github.com/huggingface/transformers/pull/46773"),
)
