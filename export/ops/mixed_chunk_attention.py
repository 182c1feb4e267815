"""Mixed chunk attention (FLASH): quadratic attention inside chunks of c tokens, linear attention between them.

    o_i = (1/N_loc) Σ_(j in chunk of i) kernel(scale q_quad_i·k_quad_j + bias_ij) v_j + (1/N_lin) q_lin_i Σ_h S_h
    S_h = Σ_(j in chunk h) k_lin_jᵀ v_j

Specification: refimpl/ops/mixed_chunk_attention.py. Lengths divide the weights and the queries, which are narrower than
the values. A sequence shorter than c is one chunk of its own length.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import (
    Value,
    arange,
    concat,
    constant,
    cumsum,
    full,
    function,
    maximum,
    minimum,
    op,
    pad,
    scan,
    take,
    where,
)
from export.ops import gau, rope
from export.ops.attention import project
from export.ops.linear_attention import cut, grid, sizes

# Rows of gamma and beta that make (q_quad, k_quad, q_lin, k_lin): the paper's pseudo-code, and FLASH-pytorch.
ROWS_PAPER = (0, 1, 2, 3)
ROWS_LUCIDRAINS = (0, 2, 1, 3)


class Reach(NamedTuple):
    """What every row reads, in int64 counts that broadcast to (*b, G, c)."""

    chunk: int
    # Tokens in the array (while streaming: seen so far), masked ones included, tail padding not.
    tokens: Value
    # Chunks whose sum S_h the row reads; visible keys in its own chunk; visible keys inside those S_h.
    chunks: Value
    local: Value
    linear: Value


class Lengths(NamedTuple):
    """N_loc and N_lin, one for all rows or one per row. Where a length is 0 that part of the output is 0."""

    local: Value | int
    linear: Value | int


class Documents(NamedTuple):
    """How packed documents are kept apart: tokens share a document column of `member`, chunk g reads the S_h of h.

    member (*b, G, c, D), reads (*b, G, G), both boolean.
    """

    member: Value
    reads: Value


class Heads(NamedTuple):
    """The four scaled and shifted copies of the shared features, in the order in which the operators take them."""

    q_quad: Value
    k_quad: Value
    q_lin: Value
    k_lin: Value


class State(NamedTuple):
    """A causal stream: the sum S over complete chunks, their number and valid tokens, and the open chunk's buffer."""

    summary: Value
    chunks: Value | int
    counted: Value
    k_quad: Value
    k_lin: Value
    v: Value
    valid: Value


def su(reach: Reach) -> Lengths:
    """N_loc = c, N_lin = the tokens of the chunks read, masked ones too: n, or causally (g-1) c for chunk g."""
    return Lengths(reach.chunk, minimum(reach.chunks * reach.chunk, reach.tokens))


def paper(reach: Reach) -> Lengths:
    """N_loc = 1 (scores are divided by c before the kernel), N_lin = c times the number of chunks read."""
    return Lengths(1, reach.chunks * reach.chunk)


def lucidrains(reach: Reach) -> Lengths:
    """N_loc = 1, N_lin = n without the tail padding, masked tokens included: not for causal use."""
    return Lengths(1, reach.tokens)


def lucidrains_causal(reach: Reach) -> Lengths:
    """N_loc = 1, N_lin = c whatever the number of chunks, so that the linear part grows with the position."""
    return Lengths(1, reach.chunk)


def unnormalised(reach: Reach) -> Lengths:
    """N_loc = N_lin = 1."""
    return Lengths(1, 1)


def visible(reach: Reach) -> Lengths:
    """N_loc = the visible keys of the row's chunk, N_lin = the visible keys of the chunks read."""
    return Lengths(reach.local, reach.linear)


@function
def identity(scores: Value, mask: Value | None) -> Value:
    """An attention kernel whose weight is the score itself, and 0 where masked: that of the fast weight layers."""
    check.real("mixed_chunk_attention.identity", "scores", scores)
    return scores if mask is None else where(check.boolean("mixed_chunk_attention.identity", "mask", mask), scores, 0)


@function
def same_document(segments: Value) -> Documents:
    """Exact separation: a token reads its own segment id only, in its chunk and in every sum."""
    segments = _chunked_ids("mixed_chunk_attention.same_document", segments)
    member = segments[..., None] == op("Unique", segments, sorted=1, shape=(None,))
    sizes = [segments.size(i) for i in range(segments.ndim - 1)]
    return Documents(member, full((*sizes, sizes[-1]), True, np.bool_))


@function
def overlapping_chunks(segments: Value) -> Documents:
    """The paper's separation: chunk g reads S_h where the ranges [least id, largest id] of both chunks meet."""
    segments = _chunked_ids("mixed_chunk_attention.overlapping_chunks", segments)
    low, high = segments.min(-1), segments.max(-1)
    reads = (low[..., :, None] <= high[..., None, :]) & (high[..., :, None] >= low[..., None, :])
    return Documents(full((*(segments.size(i) for i in range(segments.ndim)), 1), True, np.bool_), reads)


@function
def bidirectional(
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    segments: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """Every token reads its own chunk quadratically and the sums of all chunks, its own included, linearly."""
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked("bidirectional", (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, rule, None, None, _join_all)


@function
def causal(
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    segments: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """Every token reads its chunk up to itself quadratically and the sums of strictly earlier chunks linearly.

    The sums before a chunk are an exclusive CumSum; with `documents` they are a MatMul with `reads`, here and in the
    two variants.
    """
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked("causal", (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, rule, _up_to, _before, _join_cumsum)


@function
def causal_matmul_prefix(
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    segments: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """As `causal`; the sums before a chunk are a MatMul with a strictly lower triangle."""
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked("causal_matmul_prefix", (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, rule, _up_to, _before, _join_matmul)


@function
def causal_scan(
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    segments: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """As `causal`; a Scan over the chunks hands on one sum, so that no two of them are in memory."""
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked("causal_scan", (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, rule, _up_to, _before, _join_scan)


@function
def causal_strict(
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    segments: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """As `causal`, but no token reads itself: the local sum runs over j < i."""
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked("causal_strict", (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, rule, _before, _before, _join_cumsum)


def initial_state(*, batch: tuple[int, ...], s: int, e: int) -> State:
    """The state before the first token, in constants: nothing summed, nothing buffered."""
    none, valid = constant(np.zeros((*batch, 0, s))), constant(np.zeros((*batch, 0), np.bool_))
    counted = constant(np.zeros(batch, np.int64))
    return State(constant(np.zeros((*batch, s, e))), 0, counted, none, none, constant(np.zeros((*batch, 0, e))), valid)


@function
def step(
    state: State,
    q_quad: Value,
    k_quad: Value,
    q_lin: Value,
    k_lin: Value,
    v: Value,
    key_mask: Value | None = None,
    bias: Value | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
) -> tuple[Value, State]:
    """The outputs of the next n tokens of a causal stream and the state after them; n may be any number, 0 too.

    All of the state may be inputs and outputs of the model, state.chunks as an int64 scalar. The state takes the dtype
    of the tokens. While the chunk stays open, rows are formed for the new tokens only.
    """
    rule = _Rule(chunk, scale, kernel, normaliser, None)
    new = _checked("step", (q_quad, k_quad, q_lin, k_lin, v), key_mask, None, bias, rule)
    state = _checked_state(state, new)
    k_quad, k_lin = _joined(state.k_quad, new.k_quad), _joined(state.k_lin, new.k_lin)
    v = _joined(state.v, new.v)
    fresh = full(sizes(new.v)[:-1], True, np.bool_) if new.valid is None else new.valid
    valid = concat([state.valid, fresh], axis=-1)
    closed = v.size(-2) // chunk
    whole = closed * chunk
    # The sum before the first chunk, before the second and so on; the last is that of the new state.
    keys = where(valid[..., :whole, None], k_lin[..., :whole, :], 0)
    sums = _in_chunks(keys, chunk, closed).swap(-1, -2) @ _in_chunks(v[..., :whole, :], chunk, closed)
    sums = cumsum(concat([state.summary[..., None, :, :], sums], axis=-3), axis=-3)

    def join(weights: Value, q: Value, _: Callable[[], Value], v: Value) -> Value:
        return weights @ v + q @ sums[..., : q.size(-3), :, :]

    given = _Given(new.q_quad, k_quad, new.q_lin, k_lin, v, valid, None, new.bias)
    out = _mix(given, rule, _up_to, _before, join, _Past(state.v.size(-2), state.chunks, state.counted))
    counted = state.counted + valid[..., :whole].cast(np.int64).sum(-1)
    k_quad, k_lin, v = (x[..., whole:, :] for x in (k_quad, k_lin, v))
    return out, State(sums[..., -1, :, :], closed + state.chunks, counted, k_quad, k_lin, v, valid[..., whole:])


@function
def scale_offset_heads(z: Value, gamma: Value, beta: Value, *, rows: tuple[int, ...]) -> Heads:
    """The four heads of one shared projection, each with a scale and an offset of its own."""
    operation = "mixed_chunk_attention.scale_offset_heads"
    for name, x in (("gamma", gamma), ("beta", beta)):
        check.real(operation, name, x)
    fits = gamma.ndim == 2 and int(gamma.shape[0]) == 4 and gamma.shape == beta.shape
    check.shape(operation, fits, "gamma and beta of shape (4, s)", gamma=gamma, beta=beta)
    check.domain(operation, sorted(rows) == [0, 1, 2, 3], "rows that are a permutation of (0, 1, 2, 3)", rows=rows)
    return Heads(*(gau.scale_offset(z, gamma[r], beta[r]) for r in rows))


@function
def unit(
    x: Value,
    key_mask: Value | None,
    segments: Value | None,
    bias: Value | None,
    positions: Value | None,
    frequencies: Value | None,
    w_in: Value,
    b_in: Value | None,
    gamma: Value,
    beta: Value,
    w_out: Value,
    b_out: Value | None,
    *,
    mix: Callable[..., Value],
    rotate: Callable[..., Value],
    rows: tuple[int, ...],
    chunk: int,
    scale: float,
    kernel: Callable[..., Value],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Value], Documents] | None = None,
) -> Value:
    """The FLASH layer without its norm and residual: a gated attention unit over mixed chunk attention.

    mix: bidirectional, causal, one of its variants, or causal_strict.
    """
    operation = "mixed_chunk_attention.unit"
    check.shape(operation, gamma.ndim == 2, "gamma of shape (4, s)", gamma=gamma)
    u, v, z = gau.parts(x, w_in, b_in, key_width=int(gamma.shape[-1]))
    heads = scale_offset_heads(z, gamma, beta, rows=rows)
    paired = (positions is None) == (frequencies is None)
    check.domain(operation, paired, "positions and frequencies together", positions=positions, frequencies=frequencies)
    if positions is not None and frequencies is not None:
        turn = rope.angles(positions, frequencies)
        heads = Heads(*(rotate(head, turn) for head in heads))
    options = {"chunk": chunk, "scale": scale, "kernel": kernel, "normaliser": normaliser, "documents": documents}
    return project(u * mix(*heads, v, key_mask, segments, bias, **options), w_out, b_out)


class _Rule(NamedTuple):
    chunk: int
    scale: float
    kernel: Callable[..., Value]
    normaliser: Callable[[Reach], Lengths]
    documents: Callable[[Value], Documents] | None


class _Given(NamedTuple):
    q_quad: Value
    k_quad: Value
    q_lin: Value
    k_lin: Value
    v: Value
    # Of every token; None: all of them.
    valid: Value | None
    segments: Value | None
    bias: Value | None


class _Past(NamedTuple):
    # Buffered tokens, which stand before the queries; complete chunks, and the visible keys inside them.
    held: Value
    chunks: Value | int
    counted: Value


# Which keys a row reads and which chunks a chunk reads, from their numbers.
Order = Callable[[Value, Value], Value]
# Weights inside the chunks, queries, the keys when asked for, and values, all (*b, G, c, ...) -> outputs.
Join = Callable[[Value, Value, Callable[[], Value], Value], Value]


def _checked(
    name: str,
    heads: tuple[Value, Value, Value, Value, Value],
    key_mask: Value | None,
    segments: Value | None,
    bias: Value | None,
    rule: _Rule,
) -> _Given:
    operation = f"mixed_chunk_attention.{name}"
    received = dict(zip(("q_quad", "k_quad", "q_lin", "k_lin", "v"), heads, strict=True))
    for letter, x in received.items():
        check.real(operation, letter, x)
    fits = len({x.ndim for x in heads}) == 1 and heads[0].ndim >= 2 and len({int(x.shape[-1]) for x in heads[:4]}) == 1
    check.shape(operation, fits, "four heads of one shape (..., n, s), v (..., n, e)", **received)
    check.domain(operation, rule.chunk >= 1, "chunk >= 1", chunk=rule.chunk)
    check.domain(operation, math.isfinite(rule.scale), "a finite scale", scale=rule.scale)
    paired = (segments is None) == (rule.documents is None)
    check.domain(operation, paired, "segments and documents together", documents=rule.documents)
    v = heads[4]
    if key_mask is not None:
        key_mask = _per_token(operation, "key_mask", check.boolean(operation, "key_mask", key_mask), v)
    if segments is not None:
        segments = _per_token(operation, "segments", check.integer(operation, "segments", segments), v)
    if bias is not None:
        check.real(operation, "bias", bias)
        fits = tuple(map(int, bias.shape)) == (rule.chunk,) * 2
        check.shape(operation, fits, f"bias of shape {(rule.chunk,) * 2}", bias=bias)
    return _Given(*heads, key_mask, segments, bias)


def _checked_state(state: State, new: _Given) -> State:
    operation = "mixed_chunk_attention.step"
    floats = {name: getattr(state, name) for name in ("summary", "k_quad", "k_lin", "v")}
    for name, x in floats.items():
        check.real(operation, name, x)
    counted = check.integer(operation, "counted", state.counted)
    valid = check.boolean(operation, "valid", state.valid)
    rank, s, e = new.v.ndim, int(new.q_lin.shape[-1]), int(new.v.shape[-1])
    fits = all(x.ndim == rank for x in floats.values()) and (counted.ndim, valid.ndim) == (rank - 2, rank - 1)
    widths = [tuple(map(int, x.shape[-2:])) if name == "summary" else int(x.shape[-1]) for name, x in floats.items()]
    fits = fits and widths == [(s, e), s, s, e]
    expected = f"a state of s = {s}, e = {e} and {rank - 2} axes more"
    check.shape(operation, fits, expected, counted=counted, valid=valid, **floats)
    chunks = state.chunks
    if isinstance(chunks, Value):
        chunks = check.integer(operation, "chunks", chunks)
        check.shape(operation, chunks.ndim == 0, "a single number of chunks", chunks=chunks)
    else:
        check.domain(operation, chunks >= 0, "chunks >= 0", chunks=chunks)
    summary, k_quad, k_lin, v = (x.cast(new.v.dtype) for x in floats.values())
    return State(summary, chunks, counted, k_quad, k_lin, v, valid)


def _chunked_ids(operation: str, segments: Value) -> Value:
    segments = check.integer(operation, "segments", segments)
    check.shape(operation, segments.ndim >= 2, "segments of shape (..., G, c)", segments=segments)
    return segments


def _per_token(operation: str, name: str, x: Value, v: Value) -> Value:
    check.shape(operation, 1 <= x.ndim < v.ndim, f"{name} that broadcasts to the tokens (..., n)", **{name: x}, v=v)
    return x.broadcast_to(*sizes(v)[:-1])


def _mix(
    given: _Given, rule: _Rule, within: Order | None, across: Order | None, join: Join, past: _Past | None = None
) -> Value:
    """The outputs of the queries. within, across: None where every key and every chunk is read."""
    total, n = given.v.size(-2), given.q_quad.size(-2)
    rows, count = grid(total, rule.chunk)
    in_chunks = partial(cut, rows=rows, count=count, axis=-2)
    row = key = arange(rows)
    bias = None if given.bias is None else given.bias[:rows, :rows]
    # Not beside the MatMul: ONNX Runtime rounds a constant factor there to float32, in float64 graphs too.
    q_quad, q_lin = given.q_quad * rule.scale, given.q_lin
    if past is None:
        q_quad, q_lin = in_chunks(q_quad), in_chunks(q_lin)
    else:
        # Buffered rows were answered before. In a single chunk they are left out, among several they are dropped below.
        first = where(total <= rule.chunk, past.held, 0)
        before, none = [0] * (q_lin.ndim - 2) + [past.held, 0], [0] * q_lin.ndim
        q_quad, q_lin = (in_chunks(pad(x, before, none))[..., first:, :] for x in (q_quad, q_lin))
        row, bias = row[first:], None if bias is None else bias[first:]
    k_quad, v = in_chunks(given.k_quad), in_chunks(given.v)

    # Without a mask the padded tail is still to be hidden.
    if given.valid is None:
        valid = (arange(rows * count) < total).reshape(count, rows)
    else:
        valid = cut(given.valid, rows, count, axis=-1)
    seen = valid[..., None, :] if within is None else within(row[:, None], key) & valid[..., None, :]
    g = arange(count)
    reads = full((count, count), True, np.bool_) if across is None else across(g[:, None], g)
    documents = None
    if rule.documents is not None:
        found = rule.documents(_segments(given, rows, count))
        member = found.member.cast(v.dtype)
        seen = seen & (member @ member.swap(-1, -2) > 0)
        documents = Documents(found.member, found.reads & reads)
    scores = q_quad @ k_quad.swap(-1, -2)
    weights = rule.kernel(scores if bias is None else scores + bias, seen)

    tokens, (chunks, linear) = total, _counts(valid, reads, documents)
    if past is not None:
        tokens, chunks = total + past.chunks * rule.chunk, chunks + past.chunks
        linear = linear + past.counted[..., None, None]
    lengths = rule.normaliser(Reach(rule.chunk, tokens, chunks, seen.cast(np.int64).sum(-1), linear))
    weights, q_lin = _over(weights, lengths.local), _over(q_lin, lengths.linear)

    def keys() -> Value:
        return in_chunks(given.k_lin if given.valid is None else where(given.valid[..., None], given.k_lin, 0))

    out = join(weights, q_lin, keys, v) if documents is None else weights @ v + _apart(q_lin, keys(), v, documents)
    out = out.reshape(*sizes(v)[:-3], count * out.size(-2), v.size(-1))
    return out[..., :n, :] if past is None else out[..., past.held - first : past.held - first + n, :]


def _segments(given: _Given, rows: Value, count: Value) -> Value:
    """The ids in chunks. The tail repeats the last, so that it neither is a document nor widens its chunk's range."""
    ids = given.segments
    assert ids is not None
    total = ids.size(-1)
    # No token: one id, of which nothing comes.
    ids = pad(ids, [0] * ids.ndim, [0] * (ids.ndim - 1) + [maximum(1 - total, 0)])
    ids = take(ids, minimum(arange(rows * count), maximum(total, 1) - 1), axis=-1)
    return ids.reshape(*sizes(ids)[:-1], count, rows)


def _counts(valid: Value, reads: Value, documents: Documents | None) -> tuple[Value, Value]:
    """Of every row the chunks that it reads and the visible keys in them, broadcasting to (*b, G, c)."""
    if documents is None:
        reads = reads.cast(np.int64)
        return reads.sum(-1, keepdims=True), reads @ valid.cast(np.int64).sum(-1, keepdims=True)
    member, reads = documents.member.cast(np.int64), documents.reads.cast(np.int64)
    chunks = reads @ member.max(-2)
    visible = reads @ (member * valid.cast(np.int64)[..., None]).sum(-2)
    return (member * chunks[..., None, :]).sum(-1), (member * visible[..., None, :]).sum(-1)


def _over(x: Value, length: Value | int) -> Value:
    """x / length along the rows, 0 where the length is 0."""
    if isinstance(length, int):
        if length == 1:
            return x
        # Spread over the rows: see `_mix` on constant factors.
        length = full((x.size(-2),), length, np.int64)
    # Finite numbers over infinity are 0.
    divisor = where(length > 0, length.cast(x.dtype), np.inf)
    return x / divisor[..., None]


def _apart(q: Value, k: Value, v: Value, documents: Documents) -> Value:
    """The linear part where every document has sums of its own: one column of `member` after the other."""
    member, reads = documents.member, documents.reads.cast(v.dtype)

    def column(rows: Value) -> Value:
        sums = where(rows[..., None], k, 0).swap(-1, -2) @ v
        read = _read(reads, sums)
        return where(rows[..., None], q @ read, 0)

    if member.shape[-1] == 1:
        return column(member[..., 0])

    def body(states: list[Value], columns: list[Value]) -> tuple[list[Value], list[Value]]:
        return [states[0] + column(columns[0])], []

    lead = range(member.ndim - 1)
    (out,), _ = scan(body, [full(sizes(v), 0, v.dtype)], [member.transpose(-1, *lead)])
    return out


def _read(weights: Value, sums: Value) -> Value:
    """Σ_h weights_gh S_h."""
    shape = sizes(sums)
    return (weights @ sums.reshape(*shape[:-2], sums.size(-2) * sums.size(-1))).reshape(*shape)


def _join_all(weights: Value, q: Value, keys: Callable[[], Value], v: Value) -> Value:
    k = keys()
    lead = sizes(v)[:-3]
    tokens = [*lead, v.size(-3) * v.size(-2)]
    whole = k.reshape(*tokens, k.size(-1)).swap(-1, -2) @ v.reshape(*tokens, v.size(-1))
    return weights @ v + q @ whole[..., None, :, :]


def _join_cumsum(weights: Value, q: Value, keys: Callable[[], Value], v: Value) -> Value:
    return weights @ v + q @ cumsum(keys().swap(-1, -2) @ v, axis=-3, exclusive=True)


def _join_matmul(weights: Value, q: Value, keys: Callable[[], Value], v: Value) -> Value:
    g = arange(v.size(-3))
    return weights @ v + q @ _read(_before(g[:, None], g).cast(v.dtype), keys().swap(-1, -2) @ v)


def _join_scan(weights: Value, q: Value, keys: Callable[[], Value], v: Value) -> Value:
    def body(states: list[Value], chunk: list[Value]) -> tuple[list[Value], list[Value]]:
        (total,), (weights, q, k, v) = states, chunk
        return [total + k.swap(-1, -2) @ v], [weights @ v + q @ total]

    lead = v.ndim - 3
    chunks = [x.transpose(lead, *range(lead), -2, -1) for x in (weights, q, keys(), v)]
    nothing = full((*sizes(v)[:lead], q.size(-1), v.size(-1)), 0, v.dtype)
    _, (out,) = scan(body, [nothing], chunks)
    return out.transpose(*range(1, lead + 1), 0, -2, -1)


def _up_to(row: Value, key: Value) -> Value:
    return key <= row


def _before(row: Value, key: Value) -> Value:
    return key < row


def _in_chunks(x: Value, chunk: int, count: Value) -> Value:
    """(..., count · chunk, w) to (..., count, chunk, w)."""
    return x.reshape(*sizes(x)[:-2], count, chunk, x.size(-1))


def _joined(first: Value, second: Value) -> Value:
    return concat([first, second], axis=-2)
