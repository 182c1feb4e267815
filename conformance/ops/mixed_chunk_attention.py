"""Judging mixed_chunk_attention: FLASH, chunked quadratic plus linear attention.

Everything stands on the dense definition: two matrices say which key a row reads quadratically (`near`) and which
linearly (`far`), and two vectors say by what either sum is divided. A case names its kernel (squared_relu, not divided
by a length; laplace; softmax; identity), its normaliser (su, paper, lucidrains, lucidrains_causal, unnormalised,
visible), how documents are kept apart (None, same_document, overlapping_chunks), and in `unit` the mix (bidirectional,
causal, causal_strict), the layout of the rotation and the rows of gamma for (q_quad, k_quad, q_lin, k_lin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from conformance.budget import (
    MP,
    Arithmetic,
    Ball,
    Profile,
    affine,
    concatenate,
    einsum,
    erf,
    half_subnormal,
    relu,
    round_to,
    silu,
    softmax,
    where,
)
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from conformance.ops.rope import layouts, rotate
from refimpl.ops import mixed_chunk_attention as mca
from refimpl.ops import rope

MODES = ("bidirectional", "causal", "causal_strict")
WHOLE = tuple(f"mixed_chunk_attention.{mode}" for mode in MODES)
CAUSAL = WHOLE[1:]
STEP, HEADS, UNIT = (f"mixed_chunk_attention.{name}" for name in ("step", "scale_offset_heads", "unit"))
EXACT, OVERLAP = (f"mixed_chunk_attention.{name}" for name in ("same_document", "overlapping_chunks"))
TOKENS = ("q_quad", "k_quad", "q_lin", "k_lin", "v")


def kernels(of: Package) -> dict[str, Callable[..., Any]]:
    """The kernels that a case may name."""
    return {
        "squared_relu": partial(of.attention_kernel.squared_relu_constant, length=1),
        "laplace": of.attention_kernel.laplace,
        "softmax": of.attention_kernel.softmax,
        "identity": of.mixed_chunk_attention.identity,
    }


KERNELS = kernels(SPEC)
NORMALISERS = {
    f.__name__: f for f in (mca.su, mca.paper, mca.lucidrains, mca.lucidrains_causal, mca.unnormalised, mca.visible)
}
ROTATIONS = layouts(SPEC)


# What is called: kernel, normaliser, documents, mix and layout are names.
def _rule(of: Package, chunk: int, scale: float, kernel: str, normaliser: str) -> dict[str, Any]:
    lengths = getattr(of.mixed_chunk_attention, normaliser)
    return {"chunk": chunk, "scale": scale, "kernel": kernels(of)[kernel], "normaliser": lengths}


def _documents(of: Package, name: str | None) -> Function | None:
    return None if name is None else getattr(of.mixed_chunk_attention, name)


def _whole(mode: str) -> Function:
    def operator(
        q_quad, k_quad, q_lin, k_lin, v, key_mask, segments, bias, chunk, scale, kernel, normaliser, documents, *,
        of=SPEC,
    ):  # fmt: skip
        heads = (q_quad, k_quad, q_lin, k_lin, v)
        rule = {**_rule(of, chunk, scale, kernel, normaliser), "documents": _documents(of, documents)}
        return getattr(of.mixed_chunk_attention, mode)(*heads, key_mask, segments, bias, **rule)

    return operator


def _step(
    summary, chunks, counted, held_k_quad, held_k_lin, held_v, held_valid,
    q_quad, k_quad, q_lin, k_lin, v, key_mask, bias, chunk, scale, kernel, normaliser, *, of=SPEC,
):  # fmt: skip
    family = of.mixed_chunk_attention
    state = family.State(summary, chunks, counted, held_k_quad, held_k_lin, held_v, held_valid)
    heads = (q_quad, k_quad, q_lin, k_lin, v)
    return family.step(state, *heads, key_mask, bias, **_rule(of, chunk, scale, kernel, normaliser))


def _unit(
    x, key_mask, segments, bias, positions, base, w_in, b_in, gamma, beta, w_out, b_out,
    mix, layout, rows, chunk, scale, kernel, normaliser, documents, *, of=SPEC,
):  # fmt: skip
    theta = None if positions is None else of.rope.frequencies(gamma.shape[-1], base=base)
    return of.mixed_chunk_attention.unit(
        x, key_mask, segments, bias, positions, theta, w_in, b_in, gamma, beta, w_out, b_out,
        mix=getattr(of.mixed_chunk_attention, mix), rotate=layouts(of)[layout], rows=rows,
        documents=_documents(of, documents), **_rule(of, chunk, scale, kernel, normaliser),
    )  # fmt: skip


# References.
class Dense(NamedTuple):
    """Who reads whom, (b, n, n), and the lengths, (b, n)."""

    near: np.ndarray
    far: np.ndarray
    n_local: np.ndarray
    n_linear: np.ndarray


def dense(
    mode: str,
    valid: np.ndarray,
    segments: np.ndarray | None,
    chunk: int,
    normaliser: str,
    documents: str | None,
    past_chunks: int = 0,
    past_counted: np.ndarray | int = 0,
) -> Dense:
    """The definition on every pair of tokens; valid (b, n)."""
    b, n = valid.shape
    t = np.arange(n)
    i, j, g = t[:, None], t[None, :], t // chunk
    near = (g[:, None] == g) & {"bidirectional": True, "causal": j <= i, "causal_strict": j < i}[mode]
    far = (g[:, None] > g) | (mode == "bidirectional")
    near, far = np.broadcast_to(near, (b, n, n)), np.broadcast_to(far, (b, n, n))
    if documents == "same_document":
        assert segments is not None
        same = segments[:, :, None] == segments[:, None, :]
        near, far = near & same, far & same
    elif documents == "overlapping_chunks":
        assert segments is not None
        low = np.stack([segments[:, g == h].min(axis=1) for h in g], axis=1)
        high = np.stack([segments[:, g == h].max(axis=1) for h in g], axis=1)
        far = far & (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    chunks = sum((far[:, :, g == h].any(axis=-1).astype(int) for h in range(-(-n // chunk))), np.zeros((b, n), int))
    near, far = near & valid[:, None, :], far & valid[:, None, :]
    chunks = chunks + past_chunks
    seen = far.sum(axis=-1) + np.asarray(past_counted)[..., None]
    tokens = n + past_chunks * chunk
    n_local, n_linear = {
        "su": (chunk, np.minimum(chunk * chunks, tokens)),
        "paper": (1, chunk * chunks),
        "lucidrains": (1, tokens),
        "lucidrains_causal": (1, chunk),
        "unnormalised": (1, 1),
        "visible": (near.sum(axis=-1), seen),
    }[normaliser]
    ones = np.ones((b, n), int)
    return Dense(near, far, n_local * ones, n_linear * ones)


def _number(a: Arithmetic, digits: Any) -> Ball:
    """A constant that an implementation holds rounded."""
    return a.ball(np.asarray(digits if a.digits else float(digits)), a.unit * abs(float(digits)))


def weights(a: Arithmetic, scores: Ball, near: np.ndarray, kernel: str) -> Ball:
    """The unnormalised weights of the local part, exactly 0 where not near."""
    if kernel == "softmax":
        return softmax(scores, near)
    if kernel == "squared_relu":
        positive = relu(scores)
        made = positive * positive
    elif kernel == "laplace":
        # ½ (1 + erf((x - √½) / (σ √2))) with σ² = 1/(4π).
        middle, spread = _number(a, MP.sqrt(MP.mpf(1) / 2)), _number(a, MP.sqrt(1 / (2 * MP.pi)))
        made = (erf((scores - middle) / spread) + 1.0) * 0.5
    else:
        made = scores
    return where(near, made, a.exact(np.zeros(scores.shape)))


def _per(total: Ball, length: np.ndarray) -> Ball:
    """total / length, 0 where the length is 0."""
    length = length[..., None]
    return total if (length == 1).all() else where(length > 0, total / np.maximum(length, 1), 0.0)


def mixed(
    a: Arithmetic,
    pairs: Dense,
    heads: tuple[Ball, ...],
    bias: Ball | None,
    chunk: int,
    scale: float,
    kernel: str,
    summary: Ball | None = None,
) -> Ball:
    """The output rows. The linear sum may run token by token, by chunks with a state, or quadratically."""
    q_quad, k_quad, q_lin, k_lin, v = heads
    n, s = q_quad.shape[-2:]
    groups = -(-n // chunk)
    scores = einsum("bis,bjs->bij", q_quad, k_quad) * scale
    if bias is not None:
        place = np.arange(n) % chunk
        scores = scores + bias[place[:, None], place[None, :]]
    local = _per(weights(a, scores.stored(), pairs.near, kernel), pairs.n_local).stored()
    local = einsum("bij,bje->bie", local, v, length=min(chunk, n) + 1)
    far = pairs.far.astype(np.float64)
    # n keys, s features, three products, one addition per chunk.
    linear = einsum("bis,bjs,bje,bij->bie", q_lin, k_lin, v, far, length=n + s + 3 + groups)
    size = np.einsum("bis,bjs,bje,bij->bie", q_lin.magnitude, k_lin.magnitude, v.magnitude, far, optimize=True)
    if summary is not None:
        linear = linear + einsum("bis,bse->bie", q_lin, summary)
        size = size + np.einsum("bis,bse->bie", q_lin.magnitude, summary.magnitude)
    if a.profile.sixteen_bit and a.profile.name != "strict":
        # The running sum may be stored once per chunk.
        lost = a.profile.storage * size + half_subnormal(a.profile.dtype) * q_lin.magnitude.sum(-1)[..., None]
        linear = a.ball(linear, linear.rad + groups * lost)
    return local + _per(linear, pairs.n_linear)


def _valid(key_mask: np.ndarray | None, v: Ball) -> np.ndarray:
    return np.ones(v.shape[:2], bool) if key_mask is None else np.broadcast_to(key_mask, v.shape[:2])


def _reference(
    mode: str, a: Arithmetic, q_quad: Ball, k_quad: Ball, q_lin: Ball, k_lin: Ball, v: Ball, key_mask: Any,
    segments: Any, bias: Any, chunk: int, scale: float, kernel: str, normaliser: str, documents: str | None,
) -> Ball:  # fmt: skip
    pairs = dense(mode, _valid(key_mask, v), segments, chunk, normaliser, documents)
    return mixed(a, pairs, (q_quad, k_quad, q_lin, k_lin, v), bias, chunk, scale, kernel)


def _step_reference(
    a: Arithmetic, summary: Ball, chunks: int, counted: np.ndarray, held_k_quad: Ball, held_k_lin: Ball, held_v: Ball,
    held_valid: np.ndarray, q_quad: Ball, k_quad: Ball, q_lin: Ball, k_lin: Ball, v: Ball, key_mask: Any, bias: Any,
    chunk: int, scale: float, kernel: str, normaliser: str,
) -> tuple[Any, ...]:  # fmt: skip
    f = held_v.shape[1]
    valid = np.concatenate([held_valid, _valid(key_mask, v)], axis=1)
    blank = a.exact(np.zeros(held_k_quad.shape))
    # Rows of the buffer were answered by earlier steps.
    q_quad, q_lin = concatenate([blank, q_quad], axis=1), concatenate([blank, q_lin], axis=1)
    k_quad, k_lin = concatenate([held_k_quad, k_quad], axis=1), concatenate([held_k_lin, k_lin], axis=1)
    v = concatenate([held_v, v], axis=1)
    pairs = dense("causal", valid, None, chunk, normaliser, None, chunks, counted)
    y = mixed(a, pairs, (q_quad, k_quad, q_lin, k_lin, v), bias, chunk, scale, kernel, summary)[:, f:]
    full = v.shape[1] // chunk * chunk
    if full:
        closed = valid[:, :full].astype(np.float64)
        added = einsum("bjs,bje,bj->bse", k_lin[:, :full], v[:, :full], closed, length=full + 2 + full // chunk)
        size = np.einsum("bjs,bje,bj->bse", k_lin[:, :full].magnitude, v[:, :full].magnitude, closed)
        summary = summary + added
        if a.profile.sixteen_bit and a.profile.name != "strict":
            lost = a.profile.storage * (size + summary.magnitude) + half_subnormal(a.profile.dtype)
            summary = a.ball(summary, summary.rad + full // chunk * lost)
    moved = tuple(x[:, full:].value for x in (k_quad, k_lin, v))
    return (y, summary, chunks + full // chunk, counted + valid[:, :full].sum(axis=1), *moved, valid[:, full:])


def _heads_reference(a: Arithmetic, z: Ball, gamma: Ball, beta: Ball, rows: tuple[int, ...]) -> tuple[Ball, ...]:
    return tuple(z * gamma[r] + beta[r] for r in rows)


def _unit_reference(
    a: Arithmetic, x: Ball, key_mask: Any, segments: Any, bias: Any, positions: Any, base: Any, w_in: Ball, b_in: Any,
    gamma: Ball, beta: Ball, w_out: Ball, b_out: Any, mix: str, layout: str, rows: tuple[int, ...], chunk: int,
    scale: float, kernel: str, normaliser: str, documents: str | None,
) -> Ball:  # fmt: skip
    e = w_out.shape[0]
    whole = silu(affine(x, w_in, b_in).stored()).stored()
    u, v, z = whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :]
    heads = _heads_reference(a, z, gamma, beta, rows)
    if positions is not None:
        heads = tuple(rotate(a, head.stored(), positions, base, layout=layout) for head in heads)
    heads = tuple(head.stored() for head in heads)
    pairs = dense(mix, _valid(key_mask, v), segments, chunk, normaliser, documents)
    y = mixed(a, pairs, (*heads, v), bias, chunk, scale, kernel).stored()
    return affine((u * y).stored(), w_out, b_out)


def _same_document(a: Arithmetic, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = sorted({int(i) for i in segments.ravel()})
    b, g, _ = segments.shape
    return np.stack([segments == i for i in ids], axis=-1), np.ones((b, g, g), bool)


def _overlapping_chunks(a: Arithmetic, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    b, g, c = segments.shape
    meets = [[[max(x.min(), y.min()) <= min(x.max(), y.max()) for y in row] for x in row] for row in segments]
    return np.ones((b, g, c, 1), bool), np.array(meets)


STATE = ("summary", "chunks", "counted", "held_k_quad", "held_k_lin", "held_v", "held_valid")
OPERATORS = (
    *(Operator(op, _whole(m), partial(_reference, m), multilinear=True) for m, op in zip(MODES, WHOLE, strict=True)),
    Operator(STEP, _step, _step_reference, ("y", *STATE), multilinear=True),
    Operator(HEADS, mca.scale_offset_heads, _heads_reference, TOKENS[:4], multilinear=True),
    Operator(UNIT, _unit, _unit_reference),
    Operator(EXACT, mca.same_document, _same_document, ("member", "reads")),
    Operator(OVERLAP, mca.overlapping_chunks, _overlapping_chunks, ("member", "reads")),
)


# Cases.
def _tokens(draw: Draw, kind: str, b: int, n: int, s: int = 3, e: int = 2) -> dict[str, np.ndarray]:
    def make(width: int) -> np.ndarray:
        if kind == "ternary":
            return draw.ternary(b, n, width)
        if kind.startswith("dense"):
            return draw.dense(b, n, width, bits=int(kind[5:] or 24))
        return draw.grid(b, n, width)

    return {name: make(e if name == "v" else s) for name in TOKENS}


def _arguments(draw: Draw, kind: str, b: int, n: int, c: int, **given: Any) -> dict[str, Any]:
    made = {"key_mask": None, "segments": None, "bias": None, "chunk": c, "scale": 1.0, "kernel": "squared_relu"}
    made |= {"normaliser": "visible", "documents": None}
    return {**_tokens(draw, kind, b, n), **made, **given}


# Row 0 padded on the left, row 1 on the right, row 2 masked throughout, row 3 with holes.
PADDED = np.array(
    [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 7 + [0] * 4, [0] * 11, [1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1]], dtype=bool
)
# Borders inside chunks of 3 and at one; ids that come back; documents of one token.
PACKED = np.array(
    [[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], [4, 4, 4, 5, 6, 6, 6, 7, 7, 7, 7], [3, 3, 1, 1, 1, 3, 3, 0, 0, 2, 3]]
)


def _whole_cases(mode: str) -> Iterator[Case]:
    op = f"mixed_chunk_attention.{mode}"
    causal = mode != "bidirectional"
    luci = "lucidrains_causal" if causal else "lucidrains"
    tokens_of_c = {"bidirectional": 16, "causal": 12, "causal_strict": 12}[mode]
    clauses = {"bidirectional": "C1 C2 C3 C4 C5", "causal": "C1 C2 C3 C4", "causal_strict": "C1"}[mode]

    def case(
        name: str, cited: str, kind: str, b: int, n: int, c: int, *, exact: bool = False, note: str = "",
        only: tuple[str, ...] = (), poison: float = 0.0, **given: Any,
    ) -> Case:  # fmt: skip
        made = _arguments(Draw(f"{op}/{name}"), kind, b, n, c, **given)
        if poison:
            for token in ("k_quad", "k_lin", "v"):
                made[token] = np.where(made["key_mask"][:, :, None], made[token], poison)
        known = tuple(x for x in cited.split() if x in clauses.split())
        case = Case(op, name, made, known, exact, note=note)
        return Case(**{**vars(case), "only": only}) if only else case

    def bias(name: str, c: int) -> np.ndarray:
        return Draw(f"{op}/{name}/bias").grid(c, c, low=-64, high=64)

    wide = ("float64", "float32", "bfloat16")
    yield case("su", "C1 C2 C3", "grid", 2, 11, 3, normaliser="su", scale=0.5)
    yield case("paper", "C1 C2 C3 C5", "grid", 2, 11, 3, normaliser="paper", scale=1 / 3, bias=bias("paper", 3))
    yield case("lucidrains", "C2 C4", "grid", 2, 11, 4, normaliser=luci, scale=0.25, bias=bias("lucidrains", 4))
    yield case(
        "lucidrains-laplace-masked", "C2 C3", "grid", 4, 11, 4, normaliser=luci, scale=0.25, kernel="laplace",
        key_mask=PADDED, bias=bias("laplace", 4), note="kernel(0) != 0: masked keys come back if hidden before it",
    )  # fmt: skip
    yield case("visible", "C1 C2 C3", "grid", 2, 11, 5, scale=0.5)
    yield case(
        "visible-masked", "C2 C3", "grid", 4, 11, 3, key_mask=PADDED, scale=0.5, poison=1024.0, only=wide,
        note="1024 in masked keys and values",
    )  # fmt: skip
    yield case("visible-masked-bias", "C2 C5", "grid", 4, 11, 3, key_mask=PADDED, bias=bias("masked", 3), poison=8.0)
    yield case("su-masked", "C2 C3", "grid", 4, 11, 3, key_mask=PADDED, normaliser="su", scale=0.5, poison=8.0)
    yield case("softmax-masked", "C1 C2", "grid", 4, 11, 4, key_mask=PADDED, kernel="softmax", bias=bias("softmax", 4))
    yield case("identity", "C1 C3", "grid", 2, 11, 4, kernel="identity", normaliser="unnormalised")
    yield case("documents", "C4", "grid", 3, 11, 3, segments=PACKED, documents="same_document", scale=0.5)
    yield case(
        "documents-su", "C4", "grid", 3, 11, 3, segments=PACKED, documents="same_document", normaliser="su",
        key_mask=PADDED[[0, 3, 1]],
    )  # fmt: skip
    yield case(
        "documents-overlap", "C4", "grid", 3, 11, 3, segments=PACKED, documents="overlapping_chunks",
        normaliser="paper", scale=1 / 3, bias=bias("overlap", 3),
    )  # fmt: skip
    yield case(
        "documents-overlap-masked", "C4", "grid", 3, 11, 2, segments=PACKED, documents="overlapping_chunks",
        key_mask=PADDED[[0, 3, 1]],
    )  # fmt: skip
    yield case("chunks-of-one", "C1 C3", "grid", 2, 7, 1, normaliser="su", scale=0.5)
    yield case("one-chunk", "C3", "grid", 2, 7, 11, normaliser="su", scale=0.5)
    yield case("dense", "C1 C2", "dense24", 2, 11, 4, normaliser="su", scale=0.5)
    yield case("dense-53-bits", "C1 C2", "dense53", 2, 7, 3, normaliser="visible", scale=0.5)
    yield case("exact-unnormalised", "C1 C2", "ternary", 2, 11, 3, normaliser="unnormalised", exact=True)
    yield case(
        "exact-masked", "C2 C3", "ternary", 4, 11, 4, normaliser=luci if causal else "unnormalised", scale=0.5,
        key_mask=PADDED, bias=Draw(f"{op}/exact-masked/bias").ternary(4, 4), exact=True, poison=16.0,
    )  # fmt: skip
    yield case("exact-su", "C1 C3", "ternary", 2, tokens_of_c, 4, normaliser="su", exact=True)
    yield case("exact-paper", "C1 C3", "ternary", 2, tokens_of_c, 4, normaliser="paper", scale=0.25, exact=True)
    yield case(
        "exact-documents", "C4", "ternary", 3, 11, 3, segments=PACKED, documents="same_document",
        normaliser="unnormalised", exact=True,
    )  # fmt: skip
    yield case(
        "exact-identity", "C1", "ternary", 2, 11, 5, kernel="identity", normaliser="unnormalised", exact=True
    )  # fmt: skip
    yield _cancellation(op, mode, clauses)


def _cancellation(op: str, mode: str, clauses: str) -> Case:
    """The carried sum is 96 and the last values take 95 away: a state off by 1 % of itself changes the answer."""
    made = _arguments(Draw("none"), "ternary", 2, 11, 4, normaliser="unnormalised")
    made |= {name: np.zeros((2, 11, 3)) for name in TOKENS[:4]} | {"v": np.zeros((2, 11, 2))}
    made["k_lin"][:, :8, 0] = 1.0
    made["q_lin"][:, :, 0] = 1.0
    # Carried into the third chunk: 64 + 30 + 2 = 96 in feature 0, -64 + 1 + 64 = 1 in feature 1.
    made["v"][:, [0, 3, 5], 0] = [64.0, 30.0, 2.0]
    made["v"][:, [0, 2, 6], 1] = [-64.0, 1.0, 64.0]
    # All local weights are 1; the third chunk's own values leave 1 or 2 of the 96.
    made["q_quad"][:, :, 1] = made["k_quad"][:, :, 1] = 1.0
    made["v"][:, 8:, 0] = [-95.0, 0.0, 1.0]
    made["v"][1] *= -1.0
    known = tuple(x for x in ("C1", "C2") if x in clauses.split())
    return Case(op, "exact-cancellation", made, known, True, note="a carried sum of 96 against -95")


def _step_cases() -> Iterator[Case]:
    def case(
        name: str, cited: str, kind: str, f: int, n: int, c: int, *, exact: bool = False, chunks: int = 2,
        **given: Any,
    ) -> Case:  # fmt: skip
        draw = Draw(f"{STEP}/{name}")
        made: dict[str, Any] = _tokens(draw, kind, 2, n)
        held = _tokens(draw, kind, 2, f)
        size = {"ternary": draw.ternary, "grid": draw.grid}.get(kind, lambda *shape: draw.dense(*shape, bits=24))
        made |= {
            "summary": size(2, 3, 2) * (1 if chunks else 0), "chunks": chunks,
            "counted": np.array([chunks * c, max(chunks * c - 3, 0)]),
            "held_k_quad": held["k_quad"], "held_k_lin": held["k_lin"], "held_v": held["v"],
            "held_valid": np.ones((2, f), bool), "key_mask": None, "bias": None,
            "chunk": c, "scale": 0.5, "kernel": "squared_relu", "normaliser": "visible",
        }  # fmt: skip
        return Case(STEP, name, {**made, **given}, tuple(cited.split()), exact)

    mask = np.array([[1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1, 0]], bool)
    yield case("first-tokens", "C1 C2", "grid", 0, 7, 3, chunks=0)
    yield case("one-token", "C1 C2 C3", "grid", 2, 1, 5)
    yield case("one-token-closes-a-chunk", "C1 C2", "grid", 2, 1, 3)
    yield case("several-chunks", "C1 C2", "grid", 1, 11, 3)
    yield case("chunk-exactly-full", "C1 C2", "grid", 0, 4, 4)
    yield case("no-token", "C1 C2", "grid", 2, 0, 5)
    yield case(
        "masked", "C1 C2", "grid", 3, 7, 4, key_mask=mask, held_valid=np.array([[1, 0, 1], [0, 1, 1]], bool),
    )  # fmt: skip
    yield case("su-bias", "C1", "grid", 2, 7, 3, normaliser="su", bias=Draw(f"{STEP}/b").grid(3, 3, low=-64, high=64))
    yield case("paper", "C1", "grid", 2, 7, 3, normaliser="paper", scale=1 / 3)
    yield case("lucidrains-laplace", "C1", "grid", 2, 7, 3, normaliser="lucidrains_causal", kernel="laplace")
    yield case("chunks-of-one", "C1 C2", "grid", 0, 5, 1)
    yield case("dense", "C1 C2", "dense24", 2, 7, 4)
    bare: dict[str, Any] = {"normaliser": "unnormalised", "scale": 1.0, "exact": True}
    yield case("exact-one-token", "C1 C2", "ternary", 2, 1, 3, **bare)
    yield case("exact-buffered", "C1 C2", "ternary", 1, 2, 5, **bare)
    yield case("exact-several-chunks", "C1 C2", "ternary", 2, 7, 3, **bare)
    yield case("exact-masked", "C1 C2", "ternary", 1, 7, 4, key_mask=mask, **bare)
    yield case("exact-first-tokens", "C1 C2", "ternary", 0, 7, 4, chunks=0, **bare)
    summary = np.array([[[96.0, 1], [0, 0], [0, -7]], [[-96.0, 3], [96, 5], [0, 96]]])
    taken = Draw(f"{STEP}/exact-cancellation").ternary(2, 3, 2)
    taken[:, 0] = [[-95.0, 0], [95, -5]]
    unit = np.zeros((2, 3, 3))
    unit[:, :, 0] = 1.0
    yield case(
        "exact-cancellation", "C1 C2", "ternary", 1, 3, 4, **bare, summary=summary, v=taken,
        q_quad=unit, k_quad=unit, q_lin=unit, k_lin=unit,
    )  # fmt: skip


def _heads_cases() -> Iterator[Case]:
    def case(name: str, kind: str, rows: tuple[int, ...], b: int = 1, n: int = 2, s: int = 3, **options: Any) -> Case:
        draw = Draw(f"{HEADS}/{name}")
        make: Function = {"ternary": draw.ternary, "grid": draw.grid, "dense": draw.dense}[kind]
        shapes = {"z": (b, n, s), "gamma": (4, s), "beta": (4, s)}
        return Case(HEADS, name, {**{k: make(*v) for k, v in shapes.items()}, "rows": rows}, ("C1",), **options)

    yield case("paper", "grid", mca.ROWS_PAPER)
    yield case("lucidrains", "grid", mca.ROWS_LUCIDRAINS)
    yield case("reversed", "grid", (3, 2, 1, 0))
    yield case("cycle", "dense", (1, 2, 3, 0))
    for name, rows in (("paper", mca.ROWS_PAPER), ("lucidrains", mca.ROWS_LUCIDRAINS), ("cycle", (2, 3, 0, 1))):
        yield case(f"exact-{name}", "ternary", rows, exact=True)
    yield case("exact-one-feature", "ternary", (1, 0, 3, 2), s=1, n=7, exact=True)
    yield case("exact-wide", "ternary", (3, 0, 2, 1), n=2, s=7, exact=True)


def _unit_weights(draw: Draw, kind: str, d: int = 5, e: int = 3, s: int = 4) -> dict[str, np.ndarray]:
    make = draw.grid if kind == "grid" else draw.dense
    shapes = {"w_in": (d, 2 * e + s), "b_in": (2 * e + s,), "gamma": (4, s), "beta": (4, s), "w_out": (e, d)}
    return {k: make(*v) for k, v in shapes.items()} | {"b_out": make(d)}


def _unit_cases() -> Iterator[Case]:
    def case(name: str, cited: str, mix: str, b: int, n: int, c: int, kind: str = "grid", **given: Any) -> Case:
        draw = Draw(f"{UNIT}/{name}")
        only = {"only": given.pop("only")} if "only" in given else {}
        make = draw.grid if kind == "grid" else draw.dense
        made = {
            "x": make(b, n, 5), **_unit_weights(draw, kind), "key_mask": None, "segments": None, "bias": None,
            "positions": np.arange(n), "base": 10000.0, "mix": mix, "layout": "interleaved", "rows": mca.ROWS_PAPER,
            "chunk": c, "scale": 0.5, "kernel": "squared_relu", "normaliser": "visible", "documents": None,
        }  # fmt: skip
        return Case(UNIT, name, {**made, **given}, tuple(cited.split()), **only)

    yield case("su", "C1 C2 C3", "bidirectional", 2, 7, 3, normaliser="su")
    yield case("causal", "C1 C2 C3", "causal", 2, 7, 3)
    yield case("causal-strict", "C2", "causal_strict", 1, 7, 3)
    yield case("masked", "C2", "bidirectional", 3, 11, 4, key_mask=PADDED[[0, 1, 3]])
    yield case("packed", "C2", "causal", 2, 11, 3, segments=PACKED[:2], documents="same_document")
    yield case(
        "paper", "C1 C2", "causal", 1, 7, 3, normaliser="paper", scale=1 / 3, layout="half_split",
        bias=Draw(f"{UNIT}/paper/bias").grid(3, 3, low=-64, high=64),
    )  # fmt: skip
    yield case("lucidrains", "C1", "bidirectional", 1, 7, 3, normaliser="lucidrains", rows=mca.ROWS_LUCIDRAINS)
    yield case(
        "lucidrains-causal", "C1", "causal", 2, 11, 4, normaliser="lucidrains_causal", rows=mca.ROWS_LUCIDRAINS,
        kernel="laplace",
    )  # fmt: skip
    yield case(
        "lucidrains-masked", "C2", "bidirectional", 3, 11, 4, normaliser="lucidrains", rows=mca.ROWS_LUCIDRAINS,
        key_mask=PADDED[[0, 1, 3]], positions=None, base=None,
    )  # fmt: skip
    yield case("not-rotated", "C1 C3", "causal", 1, 7, 3, positions=None, base=None)
    yield case("no-bias", "C3", "bidirectional", 1, 7, 3, b_in=None, b_out=None)
    yield case(
        "long-positions", "C1", "causal", 1, 5, 2, layout="half_split",
        positions=np.array([4097, 3, 65537, 131071, 2049]),
    )  # fmt: skip
    yield case("dense", "C1 C2 C3", "bidirectional", 1, 7, 3, "dense", normaliser="su")
    yield case("one-token", "C2 C3", "bidirectional", 3, 1, 4)


def _document_cases(op: str) -> Iterator[Case]:
    def case(name: str, segments: Any) -> Case:
        # No float enters: one format is enough, and one more for those who have no other.
        return Case(op, name, {"segments": np.array(segments)}, ("C1", "C2"), only=("float64", "float32"))

    yield case("borders-inside-chunks", np.concatenate([PACKED, PACKED[:, -1:]], axis=1).reshape(3, 4, 3))
    yield case("borders-at-chunks", [[[0, 0], [1, 1], [1, 1], [2, 2]]])
    yield case("neighbours-share-one-token", [[[0, 0, 0], [0, 1, 1], [1, 2, 2], [2, 2, 3], [4, 4, 4]]])
    yield case("ranges-are-no-sets", [[[1, 3], [2, 2], [4, 4], [0, 9], [5, 5]]])
    yield case("ids-come-back", [[[7, 7], [8, 8], [7, 7]], [[-1, 0], [3, 3], [0, -1]]])
    yield case("chunks-of-one", [[[0], [0], [1], [2], [2]]])
    yield case("one-document-beside-several", [[[5, 5, 5], [5, 5, 5]], [[5, 6, 6], [7, 8, 9]]])


CASES = (*(c for mode in MODES for c in _whole_cases(mode)), *_step_cases(), *_heads_cases(), *_unit_cases())
CASES += (*_document_cases(EXACT), *_document_cases(OVERLAP))


# Laws.
def _pairs(case: Case) -> Dense:
    """Who reads whom under the case's arguments."""
    mode = case.op.split(".")[1] if case.op in WHOLE else case["mix"]
    shape = (case["v"] if "v" in case.arguments else case["x"]).shape[:2]
    valid = np.ones(shape, bool) if case["key_mask"] is None else np.broadcast_to(case["key_mask"], shape)
    return dense(mode, valid, case["segments"], case["chunk"], case["normaliser"], case["documents"])


def _identity_values(case: Case) -> np.ndarray:
    b, n, _ = case["v"].shape
    return np.broadcast_to(np.eye(n), (b, n, n)).copy()


def _per_row(total: np.ndarray, length: np.ndarray) -> np.ndarray:
    return np.where(length > 0, total / np.maximum(length, 1), 0.0)


def weights_of_the_linear_part(implementation: Function, case: Case) -> None:
    """With k_quad = 0 and one-hot values row i reads a far key j with weight q_lin_i . k_lin_j / N_lin, no other."""
    options = {"bias": None, "kernel": "squared_relu", "k_quad": 0 * case["k_quad"], "v": _identity_values(case)}
    out = run(implementation, case, **options)[0]
    pairs = _pairs(case)
    expected = _per_row(np.einsum("bis,bjs->bij", case["q_lin"], case["k_lin"]) * pairs.far, pairs.n_linear[..., None])
    close("weights_of_the_linear_part", case, out.value, expected, out.radius)


def weights_of_the_local_part(implementation: Function, case: Case) -> None:
    """With q_lin = 0 and one-hot values row i reads key j with kernel(scale q_quad_i . k_quad_j + bias) / N_loc."""
    out = run(implementation, case, q_lin=0 * case["q_lin"], v=_identity_values(case))[0]
    pairs, place = _pairs(case), np.arange(case["v"].shape[1]) % case["chunk"]
    scores = case["scale"] * np.einsum("bis,bjs->bij", case["q_quad"], case["k_quad"])
    if case["bias"] is not None:
        scores = scores + case["bias"][place[:, None], place]
    expected = _per_row(KERNELS[case["kernel"]](scores, pairs.near), pairs.n_local[..., None])
    # The formula is formed in float64 as well.
    close("weights_of_the_local_part", case, out.value, expected, out.radius + 1e-12 * np.abs(expected))


def lengths_of_every_normaliser(implementation: Function, case: Case) -> None:
    """With weights of 1 a row is (visible near keys)/N_loc + (visible far keys)/N_lin, for every normaliser."""
    b, n = case["v"].shape[:2]
    ones = {name: np.ones((b, n, 1)) for name in TOKENS}
    case = case.with_(**ones, bias=None, kernel="identity", scale=1.0)
    apart = [] if case["documents"] is None else [case]
    for name in NORMALISERS:
        for drawn_case in (*apart, case.with_(segments=None, documents=None)):
            one = drawn_case.with_(normaliser=name)
            out, pairs = run(implementation, one)[0], _pairs(one)
            expected = _per_row(pairs.near.sum(-1), pairs.n_local) + _per_row(pairs.far.sum(-1), pairs.n_linear)
            close("lengths_of_every_normaliser", one, out.value[..., 0], expected, out.radius[..., 0])


def a_sum_keeps_its_small_parts(implementation: Function, case: Case) -> None:
    """4096 + 1 + 1 + ... is carried from chunk to chunk without losing the ones."""
    b, n = case["v"].shape[:2]
    ones = {name: np.ones((b, n, 1)) for name in TOKENS} | {"k_quad": np.zeros((b, n, 1))}
    ones["v"][:, 0] = 4096.0
    case = case.with_(
        **ones, bias=None, kernel="identity", normaliser="unnormalised", chunk=2, key_mask=None, segments=None,
        documents=None,
    )  # fmt: skip
    out = run(implementation, case)[0]
    expected = _pairs(case).far @ ones["v"]
    close("a_sum_keeps_its_small_parts", case, out.value, expected, out.radius)


def fast_weights_do_not_depend_on_the_chunk(implementation: Function, case: Case) -> None:
    """One query and one key in both parts, weights that are the scores: exclusive linear attention for every c."""
    b, n = case["v"].shape[:2]
    case = case.with_(
        q_quad=case["q_lin"], k_quad=case["k_lin"], bias=None, kernel="identity", normaliser="unnormalised", scale=1.0,
        key_mask=None, segments=None, documents=None,
    )  # fmt: skip
    expected = np.einsum("bis,bjs,ij,bje->bie", case["q_lin"], case["k_lin"], np.tri(n, k=-1), case["v"])
    for chunk in {1, case["chunk"], n}:
        out = run(implementation, case, chunk=chunk)[0]
        close("fast_weights_do_not_depend_on_the_chunk", case, out.value, expected, out.radius)


def _edited(case: Case, tokens: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays with other content, exact in every format, at `tokens` (b, n)."""
    return {k: np.where(tokens[..., None], -2 * np.roll(case[k], 1, axis=-1) + 1, case[k]) for k in names}


def _inputs(case: Case) -> tuple[str, ...]:
    return TOKENS if case.op in WHOLE else ("x",)


def the_future_is_invisible(implementation: Function, case: Case) -> None:
    """Changing tokens from t on leaves every output before t as it is, bit for bit, in a causal operator."""
    if case.op == UNIT and case["mix"] == "bidirectional":
        case = case.with_(mix="causal")
    case = case.with_(segments=None, documents=None)
    b, n = case[_inputs(case)[0]].shape[:2]
    before = run(implementation, case)[0].value
    for t in {n // 3, n // 2, n - 1}:
        late = np.broadcast_to(np.arange(n) >= t, (b, n))
        after = run(implementation, case, **_edited(case, late, _inputs(case)))[0].value
        equal("the_future_is_invisible", case, after[:, :t], before[:, :t])


def masked_keys_are_invisible(implementation: Function, case: Case) -> None:
    """What stands in the keys and values of masked tokens moves nothing, bit for bit."""
    b, n = case["v"].shape[:2]
    mask = case["key_mask"] if case["key_mask"] is not None else np.arange(b * n).reshape(b, n) % 3 != 1
    case = case.with_(key_mask=mask)
    names = ("k_quad", "k_lin", "v")
    before = run(implementation, case)[0].value
    equal("masked_keys_are_invisible", case, run(implementation, case, **_edited(case, ~mask, names))[0].value, before)


def padding_changes_nothing(implementation: Function, case: Case) -> None:
    """Appending masked tokens leaves the outputs of the others as they are where lengths count visible keys."""
    case = case.with_(normaliser="visible", segments=None, documents=None)
    b, n = case[_inputs(case)[0]].shape[:2]
    mask = np.ones((b, n), bool) if case["key_mask"] is None else case["key_mask"]
    more = case["chunk"] + 1
    longer = {k: np.concatenate([case[k], np.repeat(2 * case[k][:, :1], more, axis=1)], 1) for k in _inputs(case)}
    if case.op == UNIT and case["positions"] is not None:
        longer["positions"] = np.concatenate([case["positions"], np.arange(more)])
    one = run(implementation, case)[0]
    two = run(implementation, case, **longer, key_mask=np.concatenate([mask, np.zeros((b, more), bool)], 1))[0]
    close("padding_changes_nothing", case, two.value[:, :n], one.value, two.radius[:, :n] + one.radius)


def documents_do_not_touch(implementation: Function, case: Case) -> None:
    """Editing one document moves another by exactly 0, wherever the borders of documents and chunks lie."""
    b, n = case[_inputs(case)[0]].shape[:2]
    segments = case["segments"] if case["segments"] is not None else (np.arange(b * n).reshape(b, n) * 2) // 5
    case = case.with_(segments=segments, documents="same_document")
    before = run(implementation, case)[0].value
    for document in np.unique(segments)[:3]:
        tokens = segments == document
        after = run(implementation, case, **_edited(case, tokens, _inputs(case)))[0].value
        equal("documents_do_not_touch", case, after[~tokens], before[~tokens])


def arguments_come_back(implementation: Function, case: Case) -> None:
    """Segment ids, masks and heads are the same after the call."""
    b, n = case["v"].shape[:2]
    run(implementation, case, segments=np.tile(np.arange(n) // 2, (b, 1)), documents="overlapping_chunks")


def overlapping_chunks_read_ranges(implementation: Function, case: Case) -> None:
    """A chunk reads the sums of the chunks whose range of ids meets its own, whole."""
    b, n = case["v"].shape[:2]
    ids = np.tile(np.arange(n) // max(case["chunk"] - 1, 1), (b, 1))
    segments = case["segments"] if case["documents"] == "overlapping_chunks" else ids
    case = case.with_(segments=segments, documents="overlapping_chunks", normaliser="unnormalised")
    weights_of_the_linear_part(implementation, case)
    weights_of_the_local_part(implementation, case)


def two_steps_are_one(implementation: Function, case: Case) -> None:
    """Tokens taken in two blocks, the state carried over, give the outputs and the state of one block."""
    n = case["v"].shape[1]
    whole = run(implementation, case)
    mask = np.ones(case["v"].shape[:2], bool) if case["key_mask"] is None else case["key_mask"]
    for t in {0, n // 2, n}:
        early = {name: case[name][:, :t] for name in TOKENS} | {"key_mask": mask[:, :t]}
        late = {name: case[name][:, t:] for name in TOKENS} | {"key_mask": mask[:, t:]}
        first = run(implementation, case, **early)
        state: dict[str, Any] = {name: out.value for name, out in zip(STATE, first[1:], strict=True)}
        state |= {"chunks": int(state["chunks"]), "counted": state["counted"].astype(np.int64)}
        state |= {"held_valid": state["held_valid"].astype(bool)}
        second = run(implementation, case, **late, **state)
        # An error of the carried sum reaches an output through q_lin; no length is below 1.
        carried = np.einsum("bis,bse->bie", np.abs(case["q_lin"][:, t:]), first[1].radius)
        slack = np.concatenate([first[0].radius, second[0].radius + carried], axis=1)
        y = np.concatenate([first[0].value, second[0].value], axis=1)
        close("two_steps_are_one", case, y, whole[0].value, slack + whole[0].radius)
        close(
            "two_steps_are_one", case, second[1].value, whole[1].value,
            first[1].radius + second[1].radius + whole[1].radius,
        )  # fmt: skip
        for one, other in zip(second[2:], whole[2:], strict=True):
            equal("two_steps_are_one", case, one.value, other.value)


def the_state_is_a_sum_over_closed_chunks(implementation: Function, case: Case) -> None:
    """S grows by k_lin_j v_j of the visible tokens of complete chunks, which leave the buffer."""
    out = run(implementation, case)
    f, c, n = case["held_v"].shape[1], case["chunk"], case["v"].shape[1]
    full = (f + n) // c * c
    mask = np.ones(case["v"].shape[:2], bool) if case["key_mask"] is None else case["key_mask"]
    k = np.concatenate([case["held_k_lin"], case["k_lin"]], axis=1)[:, :full]
    v = np.concatenate([case["held_v"], case["v"]], axis=1)[:, :full]
    valid = np.concatenate([case["held_valid"], mask], axis=1)
    expected = case["summary"] + np.einsum("bjs,bje,bj->bse", k, v, valid[:, :full])
    close("the_state_is_a_sum_over_closed_chunks", case, out[1].value, expected, out[1].radius)
    for index, value in ((2, case["chunks"] + full // c), (3, case["counted"] + valid[:, :full].sum(axis=1))):
        equal("the_state_is_a_sum_over_closed_chunks", case, out[index].value, value)
    held = np.concatenate([case["held_v"], case["v"]], axis=1)[:, full:]
    equal("the_state_is_a_sum_over_closed_chunks", case, out[6].value, held)


def the_carried_sum_is_read_through_q_lin(implementation: Function, case: Case) -> None:
    """With no local keys and no new linear ones a row is q_lin . S / N_lin."""
    options = {name: 0 * case[name] for name in ("k_quad", "k_lin", "held_k_quad", "held_k_lin")}
    out = run(implementation, case, bias=None, kernel="squared_relu", **options)[0]
    f = case["held_v"].shape[1]
    mask = np.ones(case["v"].shape[:2], bool) if case["key_mask"] is None else case["key_mask"]
    valid = np.concatenate([case["held_valid"], mask], axis=1)
    pairs = dense("causal", valid, None, case["chunk"], case["normaliser"], None, case["chunks"], case["counted"])
    total = np.einsum("bis,bse->bie", case["q_lin"], case["summary"])
    expected = _per_row(total, pairs.n_linear[:, f:, None])
    close("the_carried_sum_is_read_through_q_lin", case, out.value, expected, out.radius)


def weights_of_the_local_part_of_a_step(implementation: Function, case: Case) -> None:
    """With q_lin = 0 and one-hot values a row reads buffered and new keys with kernel(scale q.k + bias) / N_loc."""
    b, n = case["v"].shape[:2]
    f = case["held_v"].shape[1]
    held_v, v = (np.broadcast_to(part, (b, *part.shape)).copy() for part in np.split(np.eye(f + n), [f]))
    summary = np.zeros((b, case["q_lin"].shape[-1], f + n))
    out = run(implementation, case, summary=summary, held_v=held_v, v=v, q_lin=0 * case["q_lin"])[0]
    mask = np.ones((b, n), bool) if case["key_mask"] is None else case["key_mask"]
    valid = np.concatenate([case["held_valid"], mask], axis=1)
    pairs = dense("causal", valid, None, case["chunk"], case["normaliser"], None)
    keys = np.concatenate([case["held_k_quad"], case["k_quad"]], axis=1)
    scores = case["scale"] * np.einsum("bis,bjs->bij", case["q_quad"], keys)
    if case["bias"] is not None:
        place = np.arange(f + n) % case["chunk"]
        scores = scores + case["bias"][place[f:, None], place]
    expected = _per_row(KERNELS[case["kernel"]](scores, pairs.near[:, f:]), pairs.n_local[:, f:, None])
    tolerance = out.radius + 1e-12 * np.abs(expected)
    close("weights_of_the_local_part_of_a_step", case, out.value, expected, tolerance)


def rows_make_heads(implementation: Function, case: Case) -> None:
    """gamma_r = 2^r and beta_r = r for row r: the head that `rows` sends there is 2^r z + r."""
    s = case["z"].shape[-1]
    r = np.arange(4.0)[:, None] * np.ones(s)
    outputs = run(implementation, case, gamma=2.0**r, beta=r)
    for row, out in zip(case["rows"], outputs, strict=True):
        close("rows_make_heads", case, out.value, 2.0**row * case["z"] + row, out.radius)


def _constant_projection(case: Case, parts: slice) -> np.ndarray:
    """W_in with the given columns 0: those parts are the same for every token."""
    w_in = case["w_in"].copy()
    w_in[:, parts] = 0.0
    return w_in


def the_gate_is_the_tokens_own(implementation: Function, case: Case) -> None:
    """With v and z the same for all tokens an output depends on its own token alone."""
    e = case["w_out"].shape[0]
    b, n = case["x"].shape[:2]
    case = case.with_(w_in=_constant_projection(case, slice(e, None)))
    before = run(implementation, case)[0].value
    tokens = np.broadcast_to(np.arange(n) == n // 2, (b, n))
    after = run(implementation, case, **_edited(case, tokens, ("x",)))[0].value
    equal("the_gate_is_the_tokens_own", case, after[~tokens], before[~tokens])


def equal_tokens_give_a_closed_form(implementation: Function, case: Case) -> None:
    """Without rotation, tokens that differ in nothing: o = (u v (sum relu(a + bias)^2 / N_loc + l)) W_out + b_out."""
    case = case.with_(kernel="squared_relu", normaliser="visible", positions=None, base=None)
    case = case.with_(w_in=_constant_projection(case, slice(None)))
    out = run(implementation, case)[0]
    e = case["w_out"].shape[0]
    h = np.zeros(case["w_in"].shape[1]) if case["b_in"] is None else case["b_in"] / (1 + np.exp(-case["b_in"]))
    q_quad, k_quad, q_lin, k_lin = (case["gamma"][r] * h[2 * e :] + case["beta"][r] for r in case["rows"])
    pairs = _pairs(case)
    place = np.arange(case["x"].shape[1]) % case["chunk"]
    offset = 0.0 if case["bias"] is None else case["bias"][place[:, None], place]
    local = np.maximum(case["scale"] * float(q_quad @ k_quad) + offset, 0.0) ** 2
    read = _per_row((local * pairs.near).sum(-1), pairs.n_local) + float(q_lin @ k_lin) * (pairs.n_linear > 0)
    expected = (h[:e] * h[e : 2 * e] * read[..., None]) @ case["w_out"]
    if case["b_out"] is not None:
        expected = expected + case["b_out"]
    close("equal_tokens_give_a_closed_form", case, out.value, expected, out.radius + 1e-12 * np.abs(expected))


def equal_tokens_turn_by_their_positions(implementation: Function, case: Case) -> None:
    """Tokens alike but for their positions: scores are sums over pairs of |q||k| cos(phase + (p_i - p_j) theta)."""
    n, s = case["x"].shape[1], case["gamma"].shape[1]
    positions = np.arange(n) * 3 if case["positions"] is None else case["positions"]
    case = case.with_(
        bias=None, kernel="identity", normaliser="unnormalised", positions=positions, base=100.0,
        w_in=_constant_projection(case, slice(None)),
    )  # fmt: skip
    out, e = run(implementation, case)[0], case["w_out"].shape[0]
    h = np.zeros(case["w_in"].shape[1]) if case["b_in"] is None else case["b_in"] / (1 + np.exp(-case["b_in"]))
    turn = np.exp(1j * np.outer(positions, 100.0 ** (-2.0 * np.arange(s // 2) / s)))
    heads = []
    for r in case["rows"]:
        head = case["gamma"][r] * h[2 * e :] + case["beta"][r]
        one, two = (head[0::2], head[1::2]) if case["layout"] == "interleaved" else (head[: s // 2], head[s // 2 :])
        heads.append((one + 1j * two) * turn)
    local, linear = ((q @ k.conj().T).real for q, k in (heads[:2], heads[2:]))
    pairs = _pairs(case)
    read = (case["scale"] * local * pairs.near + linear * pairs.far).sum(axis=-1)
    expected = (h[:e] * h[e : 2 * e] * read[..., None]) @ case["w_out"]
    if case["b_out"] is not None:
        expected = expected + case["b_out"]
    # The formula is formed in float64 as well.
    own = 1e-11 * (1 + np.abs(expected).max())
    close("equal_tokens_turn_by_their_positions", case, out.value, expected, out.radius + own)


def ids_may_be_renamed(implementation: Function, case: Case) -> None:
    """Only the order of the ids matters, not their values."""
    one, two = run(implementation, case), run(implementation, case, segments=3 * case["segments"] - 7)
    for first, second in zip(one, two, strict=True):
        equal("ids_may_be_renamed", case, second.value, first.value)


def tokens_share_a_column(implementation: Function, case: Case) -> None:
    """same_document: a shared column of `member` means one id, columns in the order of ids; all sums are offered."""
    member, reads = (out.value for out in run(implementation, case))
    ids = case["segments"].reshape(len(case["segments"]), -1)
    flat = member.reshape(ids.shape + (-1,))
    equal("tokens_share_a_column", case, flat @ flat.swapaxes(1, 2), ids[:, :, None] == ids[:, None, :])
    equal("tokens_share_a_column", case, flat @ np.unique(ids), ids)
    equal("tokens_share_a_column", case, reads, np.ones(reads.shape))


def ranges_that_meet_are_read(implementation: Function, case: Case) -> None:
    """overlapping_chunks: some number lies in both closed ranges; nothing is split inside a chunk."""
    member, reads = (out.value for out in run(implementation, case))
    low, high = case["segments"].min(-1), case["segments"].max(-1)
    number = np.arange(low.min(), high.max() + 1)
    inside = (low[..., None] <= number) & (number <= high[..., None])
    equal("ranges_that_meet_are_read", case, reads, (inside[:, :, None] & inside[:, None, :]).any(-1))
    equal("ranges_that_meet_are_read", case, member, np.ones(case["segments"].shape + (1,)))


def a_common_shift_of_positions_changes_nothing(implementation: Function, case: Case) -> None:
    """Scores depend on differences of positions, in both parts."""
    n = case["x"].shape[1]
    base = 10000.0 if case["base"] is None else case["base"]
    one, two = (run(implementation, case, positions=np.arange(n) + k, base=base)[0] for k in (0, 1))
    close("a_common_shift_of_positions_changes_nothing", case, two.value, one.value, one.radius + two.radius)


def angle_zero_is_no_rotation(implementation: Function, case: Case) -> None:
    """All tokens at position 0 give what positions = None gives."""
    n = case["x"].shape[1]
    one = run(implementation, case, positions=np.zeros(n, np.int64), base=10000.0)[0]
    two = run(implementation, case, positions=None, base=None)[0]
    close("angle_zero_is_no_rotation", case, one.value, two.value, one.radius + two.radius)


def no_visible_key_gives_the_output_bias(implementation: Function, case: Case) -> None:
    """Where every key is masked the unit gives b_out, or zeros."""
    out = run(implementation, case, key_mask=np.zeros(case["x"].shape[:2], bool))[0]
    expected = np.zeros(out.value.shape) + (0.0 if case["b_out"] is None else case["b_out"])
    close("no_visible_key_gives_the_output_bias", case, out.value, expected, out.radius)


LAWS = (
    Law(weights_of_the_linear_part, WHOLE, ("C1", "C3")),
    Law(weights_of_the_local_part, WHOLE, ("C1",)),
    Law(lengths_of_every_normaliser, WHOLE, ("C3",)),
    Law(a_sum_keeps_its_small_parts, WHOLE),
    Law(fast_weights_do_not_depend_on_the_chunk, WHOLE[2:], ("C2",)),
    Law(the_future_is_invisible, (*CAUSAL, UNIT), ("C1",)),
    Law(masked_keys_are_invisible, WHOLE),
    Law(padding_changes_nothing, (*WHOLE, UNIT)),
    Law(documents_do_not_touch, (*WHOLE, UNIT)),
    Law(overlapping_chunks_read_ranges, WHOLE),
    Law(arguments_come_back, WHOLE),
    Law(two_steps_are_one, (STEP,), ("C1", "C2", "C3")),
    Law(the_state_is_a_sum_over_closed_chunks, (STEP,), ("C2",)),
    Law(the_carried_sum_is_read_through_q_lin, (STEP,), ("C1",)),
    Law(weights_of_the_local_part_of_a_step, (STEP,), ("C1",)),
    Law(rows_make_heads, (HEADS,), ("C1",)),
    Law(the_gate_is_the_tokens_own, (UNIT,), ("C3",)),
    Law(equal_tokens_give_a_closed_form, (UNIT,), ("C2", "C3")),
    Law(equal_tokens_turn_by_their_positions, (UNIT,), ("C1",)),
    Law(a_common_shift_of_positions_changes_nothing, (UNIT,), ("C1",)),
    Law(angle_zero_is_no_rotation, (UNIT,), ("C1",)),
    Law(no_visible_key_gives_the_output_bias, (UNIT,), ("C2",)),
    Law(ids_may_be_renamed, (EXACT, OVERLAP)),
    Law(tokens_share_a_column, (EXACT,), ("C1", "C2")),
    Law(ranges_that_meet_are_read, (OVERLAP,), ("C1", "C2")),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """One to eleven tokens in chunks of one to five; masks, documents, biases, every kernel and normaliser."""
    op = f"mixed_chunk_attention.{function}"
    names = [n for n in NORMALISERS if n != ("lucidrains" if function != "bidirectional" else "lucidrains_causal")]
    common = {
        "n": st.integers(1, 11), "c": st.integers(1, 5), "normaliser": st.sampled_from(names),
        "kernel": st.sampled_from(sorted(KERNELS)), "masked": st.booleans(), "biased": st.booleans(),
        "documents": st.sampled_from([None, "same_document", "overlapping_chunks"]),
    }  # fmt: skip

    def options(
        draw: Draw, n: int, c: int, normaliser: str, kernel: str, masked: bool, biased: bool, documents: str | None
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "key_mask": draw.mask(2, n) if masked else None,
            "segments": np.sort(draw.integers((2, n), 0, 4), axis=-1) if documents else None,
            "bias": draw.grid(c, c, low=-64, high=64) if biased else None,
            "chunk": c, "scale": 0.5, "kernel": kernel, "normaliser": normaliser, "documents": documents,
        }  # fmt: skip

    if function in MODES:
        return drawn(
            op, profile, lambda draw, n, **more: {**_tokens(draw, "grid", 2, n), **options(draw, n, **more)}, **common
        )
    if function == "step":

        def stream(draw: Draw, n: int, c: int, f: int, chunks: int, **more: Any) -> dict[str, Any]:
            held = _tokens(draw, "grid", 2, f % c)
            made = _tokens(draw, "grid", 2, n) | options(draw, n, c, documents=None, **more)
            made.pop("segments"), made.pop("documents")
            counted = np.minimum(draw.integers(2, 1, 9), chunks * c)
            state = (draw.grid(2, 3, 2) * min(chunks, 1), chunks, counted, held["k_quad"], held["k_lin"], held["v"])
            return {**dict(zip(STATE, (*state, draw.mask(2, f % c)), strict=True)), **made}

        common.pop("documents")
        return drawn(op, profile, stream, f=st.integers(0, 4), chunks=st.integers(0, 3), **common)
    if function == "scale_offset_heads":
        return drawn(
            op, profile,
            lambda draw, n, s, rows: {
                "z": draw.grid(2, n, s), "gamma": draw.grid(4, s), "beta": draw.grid(4, s), "rows": tuple(rows)
            },
            n=st.integers(1, 5), s=st.integers(1, 5), rows=st.permutations([0, 1, 2, 3]),
        )  # fmt: skip

    if op in (EXACT, OVERLAP):
        return drawn(
            op, profile, lambda draw, g, c, spread: {"segments": draw.integers((2, g, c), -1, spread)},
            g=st.integers(1, 5), c=st.integers(1, 4), spread=st.integers(0, 9),
        )  # fmt: skip

    def unit(
        draw: Draw, n: int, rotated: bool, with_bias: bool, mix: str, layout: str, rows: list[int], **more: Any
    ) -> dict[str, Any]:  # fmt: skip
        made = {"x": draw.grid(2, n, 5), **_unit_weights(draw, "grid"), **options(draw, n, **more)}
        made |= {} if with_bias else {"b_in": None, "b_out": None}
        made |= {"positions": draw.integers(n, 0, 40) if rotated else None, "base": 10000.0 if rotated else None}
        return {**made, "mix": mix, "layout": layout, "rows": tuple(rows)}

    return drawn(
        op, profile, unit, rotated=st.booleans(), with_bias=st.booleans(), mix=st.sampled_from(MODES),
        layout=st.sampled_from(sorted(ROTATIONS)), rows=st.permutations([0, 1, 2, 3]), **common,
    )  # fmt: skip


# Wrong implementations. One dense evaluation in float64 with a hook after each stage; a hook edits the variables.
Variables = dict[str, Any]
Hook = Callable[[Variables], Any]


def _flawed(mode: str, stage: str, hook: Hook) -> Function:
    def call(**given: Any) -> np.ndarray:
        w: Variables = dict(given)

        def reach(name: str) -> None:
            if name == stage:
                w.update(hook(w) or {})

        b, n = w["v"].shape[:2]
        w |= {"mode": mode, "n": n, "valid": np.ones((b, n), bool), "t": np.arange(n), "g": np.arange(n) // w["chunk"]}
        if w["key_mask"] is not None:
            w["valid"] = w["valid"] & w["key_mask"]
        reach("inputs")
        pairs = dense(mode, w["valid"], w["segments"], w["chunk"], w["normaliser"], w["documents"])
        w.update(pairs._asdict())
        reach("reach")
        place = np.arange(n) % w["chunk"]
        w["scores"] = w["scale"] * w["q_quad"] @ w["k_quad"].swapaxes(1, 2)
        w["offset"] = 0.0 if w["bias"] is None else w["bias"][place[:, None], place]
        w["weights"] = KERNELS[w["kernel"]](w["scores"] + w["offset"], w["near"])
        reach("weights")
        w["local"] = _per_row(w["weights"], w["n_local"][..., None]) @ w["v"]
        w["sums"] = (w["q_lin"] @ w["k_lin"].swapaxes(1, 2) * w["far"]) @ w["v"]
        w["linear"] = _per_row(w["sums"], w["n_linear"][..., None])
        reach("result")
        return w["local"] + w["linear"]

    return call


def _recount(w: Variables, near: np.ndarray, far: np.ndarray) -> Variables:
    """Other pairs, with the lengths that count them."""
    changed = {"near": near, "far": far}
    return changed | ({"n_local": near.sum(-1), "n_linear": far.sum(-1)} if w["normaliser"] == "visible" else {})


def _keys(w: Variables) -> np.ndarray:
    valid: np.ndarray = w["valid"][:, None, :]
    return valid


def _own_chunk(w: Variables) -> np.ndarray:
    return (w["g"][:, None] == w["g"][None, :]) & _keys(w)


def _within(w: Variables) -> np.ndarray:
    i, j = w["t"][:, None], w["t"][None, :]
    return {"bidirectional": np.ones((w["n"], w["n"]), bool), "causal": j <= i, "causal_strict": j < i}[w["mode"]]


def _chunk_pairs(w: Variables) -> np.ndarray:
    """Near pairs but for masks and documents."""
    same: np.ndarray = w["g"][:, None] == w["g"][None, :]
    return same & _within(w)


def _sum_pairs(w: Variables) -> np.ndarray:
    """Far pairs but for masks and documents."""
    earlier: np.ndarray = (w["g"][None, :] < w["g"][:, None]) | (w["mode"] == "bidirectional")
    return earlier


def _near(pairs: Callable[[Variables], np.ndarray]) -> Hook:
    return lambda w: _recount(w, pairs(w), w["far"])


def _far(pairs: Callable[[Variables], np.ndarray]) -> Hook:
    return lambda w: _recount(w, w["near"], pairs(w))


def _length(which: str, normalisers: str, formula: Callable[[Variables], Any]) -> Hook:
    """Another length where the normaliser is one of those named."""
    return lambda w: {which: formula(w) * np.ones_like(w[which])} if w["normaliser"] in normalisers.split() else {}


def _where(argument: str, value: str | None, hook: Hook) -> Hook:
    return lambda w: hook(w) if w[argument] == value else {}


def _bias(change: Callable[[Variables], np.ndarray]) -> Hook:
    return lambda w: {} if w["bias"] is None else {"bias": change(w)}


def _regrouped(w: Variables) -> Variables:
    """Chunks aligned at the end of the sequence."""
    g = (w["t"] + -w["n"] % w["chunk"]) // w["chunk"]
    near = (g[:, None] == g[None, :]) & _within(w) & _keys(w)
    far = ((g[None, :] < g[:, None]) | (w["mode"] == "bidirectional")) & _keys(w)
    return {} if w["documents"] else _recount(w, near, far)


def _ranges(w: Variables, meets: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Variables:
    if w["documents"] != "overlapping_chunks":
        return {}
    chunks = [w["segments"][:, w["g"] == h] for h in w["g"]]
    low, high = np.stack([x.min(1) for x in chunks], 1), np.stack([x.max(1) for x in chunks], 1)
    time = (w["g"][None, :] < w["g"][:, None]) | (w["mode"] == "bidirectional")
    return _recount(w, w["near"], meets(low, high) & time & _keys(w))


def _strict_ranges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low[:, :, None] < high[:, None, :]) & (high[:, :, None] > low[:, None, :])


def _first_ids(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low[:, :, None] == low[:, None, :]


def _low_precision_state(w: Variables, dtype: str) -> Variables:
    """The running sum over chunks rounded after each chunk; documents apart are left as they are."""
    if w["documents"]:
        return {}
    state = np.zeros((len(w["v"]), w["k_lin"].shape[-1], w["v"].shape[-1]))
    sums = np.zeros_like(w["v"])
    groups = w["g"][-1] + 1
    for h in range(groups):
        own = w["g"] == h
        if w["mode"] != "bidirectional":
            sums[:, own] = w["q_lin"][:, own] @ state
        k = (w["k_lin"] * w["valid"][..., None])[:, own]
        state = round_to(state + k.swapaxes(1, 2) @ w["v"][:, own], dtype)
    if w["mode"] == "bidirectional":
        sums = w["q_lin"] @ state
    return {"linear": _per_row(sums, w["n_linear"][..., None])}


def _masked_scores(w: Variables) -> Variables:
    seen = _own_chunk({**w, "valid": np.ones_like(w["valid"])}) & _within(w)
    scores = np.where(_keys(w), w["scores"] + w["offset"], 0.0)
    return {"weights": KERNELS[w["kernel"]](scores, seen)} if not w["documents"] else {}


def _same_ids(w: Variables) -> np.ndarray:
    same: np.ndarray = w["segments"][:, :, None] == w["segments"][:, None, :]
    return same


def _complete(w: Variables) -> np.ndarray:
    """True on tokens of complete chunks."""
    complete: np.ndarray = w["t"] < w["n"] // w["chunk"] * w["chunk"]
    return complete[:, None]


# What is wrong, in which operators, at which stage.
_B, _C, _X = MODES
_EXACT = partial(_where, "documents", "same_document")
_UNPACKED = partial(_where, "documents", None)
_RELU = partial(_where, "kernel", "squared_relu")
FLAWS: tuple[tuple[str, tuple[str, ...], str, Hook], ...] = (
    ("the scale is left out", MODES, "inputs", lambda w: {"scale": 1.0}),
    ("scores are multiplied by the root of the scale", MODES, "inputs", lambda w: {"scale": w["scale"] ** 0.5}),
    ("the quadratic queries serve both parts", MODES, "inputs", lambda w: {"q_lin": w["q_quad"]}),
    ("the quadratic keys serve both parts", MODES, "inputs", lambda w: {"k_lin": w["k_quad"]}),
    ("the bias is multiplied by the scale", MODES, "inputs", _bias(lambda w: w["scale"] * w["bias"])),
    ("the bias is transposed", MODES, "inputs", _bias(lambda w: w["bias"].T)),
    ("values come one token late", MODES, "inputs", lambda w: {"v": np.roll(w["v"], 1, axis=1)}),
    ("chunks are aligned at the end of the sequence", MODES, "reach", _regrouped),
    ("the prefix of sums is inclusive", (_C, _X), "reach", _far(lambda w: w["far"] | _own_chunk(w))),
    (
        "the prefix of sums leaves the last chunk out", (_C, _X), "reach",
        _far(lambda w: w["far"] & (w["g"][None, :] < w["g"][:, None] - 1)),
    ),
    (
        "the linear part is causal by token", (_C, _X), "reach",
        _far(lambda w: (w["t"][None, :] <= w["t"][:, None]) & _keys(w)),
    ),
    ("a token does not read itself", (_C,), "reach", _near(lambda w: w["near"] & ~np.eye(w["n"], dtype=bool))),
    ("a token reads itself", (_X,), "reach", _near(lambda w: w["near"] | (np.eye(w["n"], dtype=bool) & _keys(w)))),
    ("the linear part leaves the own chunk out", (_B,), "reach", _far(lambda w: w["far"] & ~_chunk_pairs(w))),
    ("masked keys enter the sums", MODES, "reach", _UNPACKED(lambda w: {"far": _sum_pairs(w) | w["far"]})),
    ("masked keys enter the chunk", MODES, "reach", _UNPACKED(lambda w: {"near": _chunk_pairs(w) | w["near"]})),
    (
        "masked keys count in N_lin", MODES, "reach",
        _UNPACKED(_length("n_linear", "visible", lambda w: _sum_pairs(w).sum(-1))),
    ),
    ("N_loc is c where it should count keys", MODES, "reach", _length("n_local", "visible", lambda w: w["chunk"])),
    ("N_loc is n where it should be c", MODES, "reach", _length("n_local", "su", lambda w: w["n"])),
    (
        "the linear sum is divided by the number of chunks, not of tokens", MODES, "reach",
        _length("n_linear", "su paper", lambda w: -(-w["n_linear"] // w["chunk"])),
    ),
    (
        "the printed length (g-1) n/c", (_C, _X), "reach",
        _length("n_linear", "su", lambda w: w["g"] * -(-w["n"] // w["chunk"])),
    ),
    (
        "the padded tail counts in n", (_B,), "reach",
        _UNPACKED(_length("n_linear", "su lucidrains", lambda w: (w["g"][-1] + 1) * w["chunk"])),
    ),
    (
        "the padded tail does not count in G c", (_B,), "reach",
        _length("n_linear", "paper", lambda w: np.minimum(w["n_linear"], w["n"])),
    ),
    (
        "the causal sum is divided by all n tokens", (_C, _X), "reach",
        lambda w: {"n_linear": 0 * w["n_linear"] + w["n"]},
    ),
    (
        "documents are separated in the sums only", MODES, "reach",
        _EXACT(_near(lambda w: _chunk_pairs(w) & _keys(w))),
    ),
    (
        "documents are separated in the chunk only", MODES, "reach",
        _EXACT(_far(lambda w: _sum_pairs(w) & _keys(w))),
    ),
    ("ranges of ids meet in their interiors only", MODES, "reach", lambda w: _ranges(w, _strict_ranges)),
    ("chunks are compared by their first id", MODES, "reach", lambda w: _ranges(w, _first_ids)),
    (
        "ranges of ids split the own chunk too", MODES, "reach",
        _where("documents", "overlapping_chunks", _near(lambda w: w["near"] & _same_ids(w))),
    ),
    ("relu is not squared", MODES, "weights", _RELU(lambda w: {"weights": np.sqrt(w["weights"])})),
    (
        "relu is left out of the square", MODES, "weights",
        _RELU(lambda w: {"weights": (w["scores"] + w["offset"]) ** 2 * w["near"]}),
    ),
    (
        "the bias is added after the kernel", MODES, "weights",
        lambda w: {"weights": KERNELS[w["kernel"]](w["scores"], w["near"]) + w["offset"] * w["near"]},
    ),
    ("the mask zeroes scores before the kernel", MODES, "weights", _masked_scores),
    (
        "rows are normalised to 1", MODES, "weights",
        lambda w: {"weights": _per_row(w["weights"], np.abs(w["weights"]).sum(-1, keepdims=True) + 1e-9)},
    ),
    (
        "queries are masked as well", MODES, "result",
        lambda w: {k: w[k] * w["valid"][..., None] for k in ("local", "linear")},
    ),
    (
        "the tail beyond complete chunks is dropped", MODES, "result",
        lambda w: {k: w[k] * _complete(w) for k in ("local", "linear")},
    ),
    ("the quadratic part is left out", MODES, "result", lambda w: {"local": 0 * w["local"]}),
    ("the linear part is left out", MODES, "result", lambda w: {"linear": 0 * w["linear"]}),
    (
        "0/0 in the first chunk", (_C, _X), "result",
        lambda w: {"linear": np.where(w["n_linear"][..., None] > 0, w["linear"], np.nan)},
    ),
    ("the carried sum loses one part in a thousand", MODES, "result", lambda w: {"linear": 0.999 * w["linear"]}),
)  # fmt: skip


def _flaws() -> Iterator[Mutant]:
    for bug, modes, stage, hook in FLAWS:
        for mode in modes:
            yield Mutant(f"mixed_chunk_attention.{mode}", bug, _flawed(mode, stage, hook))
    for mode in MODES:
        coarse = _flawed(mode, "result", lambda w: _low_precision_state(w, "bfloat16"))
        yield Mutant(f"mixed_chunk_attention.{mode}", "the carried sum is kept in bfloat16", coarse, precision=True)


def _flawed_step(before: Hook = dict, after: Callable[[Variables, list[Any]], Any] = lambda w, out: None) -> Function:
    """The step of the specification with its arguments or results edited."""

    def call(**given: Any) -> tuple[Any, ...]:
        w = {**given, **(before(given) or {})}
        out = [*(np.array(x) for x in _flat(_step(**w)))]
        after(w, out)
        return tuple(out)

    return call


def _flat(result: Any) -> tuple[Any, ...]:
    y, state = result
    return (y, *state)


def _scaled_state(w: Variables, out: list[Any]) -> None:
    out[1] = 0.999 * out[1]


def _coarse_state(w: Variables, out: list[Any]) -> None:
    out[1] = round_to(out[1], "bfloat16")


def _forgotten_counts(w: Variables, out: list[Any]) -> None:
    out[3] = w["counted"]


def _counted_in_place(w: Variables, out: list[Any]) -> None:
    w["counted"] += 1


def _chunk_number_stays(w: Variables, out: list[Any]) -> None:
    out[2] = np.array(w["chunks"])


def _new_tokens_only(w: Variables, out: list[Any]) -> None:
    n = w["v"].shape[1]
    full = (w["held_v"].shape[1] + n) // w["chunk"] * w["chunk"] - w["held_v"].shape[1]
    mask = np.ones(w["v"].shape[:2]) if w["key_mask"] is None else w["key_mask"]
    if full > 0:
        out[1] = w["summary"] + (w["k_lin"] * mask[..., None])[:, :full].swapaxes(1, 2) @ w["v"][:, :full]


def _overwritten_sum(w: Variables, out: list[Any]) -> None:
    if (w["held_v"].shape[1] + w["v"].shape[1]) // w["chunk"]:
        out[1] = out[1] - w["summary"]


_STEP_FLAWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the chunk number is not carried", {"before": lambda w: {"chunks": 0}}),
    ("the number of tokens is not carried", {"before": lambda w: {"counted": 0 * w["counted"]}}),
    ("the mask of the buffer is forgotten", {"before": lambda w: {"held_valid": np.ones_like(w["held_valid"])}}),
    ("the mask of new tokens is ignored", {"before": lambda w: {"key_mask": None}}),
    ("the sum is fed by quadratic keys", {"before": lambda w: {"k_lin": w["k_quad"], "held_k_lin": w["held_k_quad"]}}),
    ("buffered keys are not read", {"before": lambda w: {"held_v": 0 * w["held_v"]}}),
    ("the kernel forgets the scale", {"before": lambda w: {"scale": 1.0}}),
    ("the bias is ignored", {"before": lambda w: {"bias": None}}),
    ("the new sum loses one part in a thousand", {"after": _scaled_state}),
    ("tokens are not counted", {"after": _forgotten_counts}),
    ("the given state is changed", {"after": _counted_in_place}),
    ("the chunk number stays", {"after": _chunk_number_stays}),
    ("only new tokens enter the sum", {"after": _new_tokens_only}),
    ("a closed chunk overwrites the sum", {"after": _overwritten_sum}),
)


def _flawed_heads(z: Any, gamma: Any, beta: Any, rows: Any, how: str) -> tuple[np.ndarray, ...]:
    if how == "rows ignored":
        rows = mca.ROWS_PAPER
    if how == "rows inverted":
        rows = np.argsort(rows)
    if how == "queries and keys exchanged":
        rows = [rows[i] for i in (1, 0, 3, 2)]
    if how == "offset ignored":
        beta = 0 * beta
    if how == "offset before the scale":
        return tuple(gamma[r] * (z + beta[r]) for r in rows)
    if how == "scale and offset exchanged":
        return tuple(beta[r] * z + gamma[r] for r in rows)
    return tuple(gamma[r] * z + beta[r] for r in rows)


_HEADS_FLAWS = (
    "rows ignored", "rows inverted", "queries and keys exchanged", "offset ignored", "offset before the scale",
    "scale and offset exchanged",
)  # fmt: skip


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _flawed_unit(how: str, **w: Any) -> np.ndarray:
    e, n = w["w_out"].shape[0], w["x"].shape[1]
    h = w["x"] @ w["w_in"] + (0.0 if w["b_in"] is None or how == "b_in is ignored" else w["b_in"])
    active = h * _logistic(1.702 * h if how == "silu with beta 1.702" else h)
    u, v, z = (active[..., part] for part in (slice(0, e), slice(e, 2 * e), slice(2 * e, None)))
    if how == "z is not activated":
        z = h[..., 2 * e :]
    if how == "the gate is not activated":
        u = h[..., :e]
    if how == "columns in the order v, u":
        u, v = v, u
    rows = mca.ROWS_PAPER if how == "rows ignored" else w["rows"]
    positions, layout, base = w["positions"], w["layout"], w["base"]
    if positions is None and how == "no positions stand for 0, 1, 2, ...":
        positions, base = np.arange(n), 10000.0
    if positions is not None and how == "positions start again in every chunk":
        positions = positions % w["chunk"]
    if how == "the other rotary layout":
        layout = "half_split" if layout == "interleaved" else "interleaved"

    def turned(x: np.ndarray) -> np.ndarray:
        if positions is None:
            return x
        theta = rope.frequencies(x.shape[-1], base=500000.0 if how == "base 500000" else base)
        angles = rope.angles(positions, theta)
        return ROTATIONS[layout](x, -angles if how == "clockwise keys" else angles)

    heads = [w["gamma"][r] * z + w["beta"][r] for r in rows]
    skipped = {
        "linear heads are not rotated": (2, 3), "queries are not rotated": (0, 2), "keys are not rotated": (1, 3)
    }  # fmt: skip
    if how == "rotation before scale and offset":
        heads = [w["gamma"][r] * turned(z) + w["beta"][r] for r in rows]
    else:
        heads = [x if i in skipped.get(how, ()) else turned(x) for i, x in enumerate(heads)]
    if how == "clockwise keys" and positions is not None:
        angles = rope.angles(positions, rope.frequencies(z.shape[-1], base=w["base"]))
        for i, r in ((0, rows[0]), (2, rows[2])):
            heads[i] = ROTATIONS[layout](w["gamma"][r] * z + w["beta"][r], angles)
    if how == "values are rotated with the keys" and positions is not None:
        angles = rope.angles(positions, rope.frequencies(2, base=w["base"]))
        v = np.concatenate([ROTATIONS[layout](v[..., :2], angles), v[..., 2:]], axis=-1)
    segments, documents = (None, None) if how == "documents are ignored" else (w["segments"], w["documents"])
    mode = "bidirectional" if how == "never causal" else w["mix"]
    y = _whole(mode)(
        *heads, v, None if how == "the key mask is ignored" else w["key_mask"], segments,
        None if how == "the additive bias is ignored" else w["bias"], w["chunk"], w["scale"], w["kernel"],
        w["normaliser"], documents,
    )  # fmt: skip
    y = (u * y if how != "no gate" else y) @ w["w_out"]
    if how == "the residual is added":
        y = y + w["x"]
    return y if w["b_out"] is None or how == "b_out is ignored" else y + w["b_out"]


_UNIT_FLAWS = (
    "b_in is ignored", "b_out is ignored", "silu with beta 1.702", "z is not activated", "the gate is not activated",
    "columns in the order v, u", "rows ignored", "positions start again in every chunk", "the other rotary layout",
    "base 500000", "clockwise keys", "linear heads are not rotated", "queries are not rotated", "keys are not rotated",
    "rotation before scale and offset", "values are rotated with the keys", "documents are ignored", "never causal",
    "the key mask is ignored", "the additive bias is ignored", "no gate", "the residual is added",
    "no positions stand for 0, 1, 2, ...",
)  # fmt: skip


def _flawed_ranges(compare: Callable[[np.ndarray, np.ndarray], np.ndarray], **w: Any) -> tuple[np.ndarray, ...]:
    ids = w["segments"]
    return np.ones((*ids.shape, 1), bool), compare(ids.min(-1), ids.max(-1))


def _in_order_of_appearance(segments: np.ndarray) -> tuple[np.ndarray, ...]:
    ids = list(dict.fromkeys(segments.ravel().tolist()))
    return segments[..., None] == np.array(ids), mca.same_document(segments).reads


def _columns_by_range(segments: np.ndarray) -> tuple[np.ndarray, ...]:
    return segments[..., None] == np.arange(segments.min(), segments.max() + 1), mca.same_document(segments).reads


def _sets_of_ids(segments: np.ndarray) -> tuple[np.ndarray, ...]:
    present: np.ndarray = np.any(mca.same_document(segments).member, axis=-2)
    return np.ones((*segments.shape, 1), bool), (present[:, :, None] & present[:, None, :]).any(axis=-1)


def _fewer_sums(segments: np.ndarray) -> tuple[np.ndarray, ...]:
    return mca.same_document(segments).member, _sets_of_ids(segments)[1]


def _both_separations(segments: np.ndarray) -> tuple[np.ndarray, ...]:
    return mca.same_document(segments).member, mca.overlapping_chunks(segments).reads


def _one_side(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low[:, :, None] <= high[:, None, :]


_DOCUMENT_FLAWS: tuple[tuple[str, str, Function], ...] = (
    (EXACT, "columns in order of appearance", _in_order_of_appearance),
    (EXACT, "columns for ids that do not occur", _columns_by_range),
    (EXACT, "chunks that share no document are not read", _fewer_sums),
    (EXACT, "a column per chunk range", mca.overlapping_chunks),
    (OVERLAP, "ranges meet in their interiors only", partial(_flawed_ranges, _strict_ranges)),
    (OVERLAP, "chunks are compared by their first id", partial(_flawed_ranges, _first_ids)),
    (OVERLAP, "sets of ids are compared, not ranges", _sets_of_ids),
    (OVERLAP, "one side of the comparison is missing", partial(_flawed_ranges, _one_side)),
    (OVERLAP, "member separates documents", _both_separations),
)

MUTANTS = (
    *_flaws(),
    *(Mutant(STEP, bug, _flawed_step(**edits)) for bug, edits in _STEP_FLAWS),
    Mutant(STEP, "the sum is kept in bfloat16", _flawed_step(after=_coarse_state), precision=True),
    *(Mutant(HEADS, bug, partial(_flawed_heads, how=bug)) for bug in _HEADS_FLAWS),
    *(Mutant(UNIT, bug, partial(_flawed_unit, bug)) for bug in _UNIT_FLAWS),
    *(Mutant(op, bug, call) for op, bug, call in _DOCUMENT_FLAWS),
)


# Bugs that shipped, re-implemented.
def _edge_leak(w: Variables) -> Variables:
    """The first token of the next chunk is visible to the last token of a chunk."""
    edge = (w["t"][None, :] == w["t"][:, None] + 1) & (w["t"][None, :] % w["chunk"] == 0)
    return {"near": w["near"] | (edge & _keys(w))}


def _block_mean(w: Variables) -> Variables:
    own = w["chunk"] * (w["normaliser"] != "unnormalised")
    return {"far": w["far"] | _own_chunk(w), "n_linear": w["n_linear"] + own}


def _overwritten_ids(w: Variables) -> Variables:
    if w["segments"] is not None:
        w["segments"][...] = np.cumsum(np.ones_like(w["segments"]), axis=-1) - 1
    return {}


def _padding_counts(w: Variables) -> Variables:
    if w["normaliser"] != "visible":
        return {}
    return {"n_linear": 0 * w["n_linear"] + w["n"], "n_local": np.maximum(w["n_local"], _chunk_pairs(w).sum(-1))}


def _received(w: Variables, out: list[Any]) -> None:
    out[1] = w["summary"]


def _piece(mode: str, bug: str, stage: str, hook: Hook, url: str) -> Mutant:
    return Mutant(f"mixed_chunk_attention.{mode}", bug, _flawed(mode, stage, hook), url)


MUSEUM = (
    _piece(
        "causal", "the causal mask is dropped on the way to the chunk", "reach",
        lambda w: _recount(w, _own_chunk(w), w["far"]), "https://github.com/keras-team/keras/issues/23038",
    ),
    _piece(
        "causal", "the mean of the own block enters the linear part", "reach", _block_mean,
        "https://github.com/karpathy/nanochat/issues/844",
    ),
    _piece(
        "causal", "a leak at the edge of a chunk", "reach", _edge_leak,
        "https://github.com/tenstorrent/tt-metal/issues/48899",
    ),
    _piece(
        "causal", "an inverted mask", "inputs", lambda w: {"valid": ~w["valid"]},
        "https://github.com/neuro-galaxy/torch_brain/pull/74",
    ),
    _piece(
        "bidirectional", "masks are not supported", "inputs", lambda w: {"valid": np.ones_like(w["valid"])},
        "https://github.com/lucidrains/FLASH-pytorch/issues/1",
    ),
    _piece(
        "bidirectional", "sums are not reduced over groups", "reach",
        lambda w: {"far": w["far"] & (w["g"][:, None] == w["g"][None, :])},
        "https://github.com/lucidrains/FLASH-pytorch/issues/2",
    ),
    _piece(
        "bidirectional", "the relative position bias is missing", "inputs", lambda w: {"bias": None},
        "https://github.com/lucidrains/FLASH-pytorch/issues/9",
    ),
    _piece(
        "bidirectional", "padded keys stay in the normaliser", "reach", _padding_counts,
        "https://github.com/fla-org/flash-linear-attention/issues/1263",
    ),
    _piece(
        "causal", "document borders are lost", "inputs", lambda w: {"segments": None, "documents": None},
        "https://github.com/hiyouga/LlamaFactory/pull/10787",
    ),
    _piece(
        "bidirectional", "the caller's document ids are overwritten", "reach", _overwritten_ids,
        "https://github.com/fla-org/flash-linear-attention/issues/838",
    ),
    Mutant(
        STEP, "the carried state is not used", _flawed_step(before=lambda w: {"summary": 0 * w["summary"]}),
        "https://github.com/fla-org/flash-linear-attention/issues/285",
    ),
    Mutant(
        STEP, "the state returned is the one received", _flawed_step(after=_received),
        "https://github.com/fla-org/flash-linear-attention/issues/494",
    ),
)  # fmt: skip
