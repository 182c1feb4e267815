"""Linear attention: a state of summed key-value products stands in for the attention matrix.

    o_t = scale q_t S_t,   S_t = exp(g_t) S_{t-1} + k_t' v_t,   g_t <= 0 the log decay, 0 where there is none

Specification: refimpl/ops/linear_attention.py. Exponents are sums of log decays, never differences of such sums, and so
never positive. Packed documents become the rows of a batch, each as long as the longest of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from export import check
from export.graph import Value, arange, constant, cumsum, exp, full, function, maximum, minimum, op, pad, scan, take
from export.graph import where as choose


class LinearAttention(NamedTuple):
    """The output (b, n, h, e) and the state (s, h, d, e) after the last token, one per sequence or packed document."""

    output: Value
    state: Value


class NormalisedLinearAttention(NamedTuple):
    """The output, the state and the summed keys (the normaliser z, (s, h, f)) after the last token."""

    output: Value
    state: Value
    normaliser: Value


@function
def recurrent(
    q: Value,
    k: Value,
    v: Value,
    *,
    scale: float,
    log_decay: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """Causal linear attention, token after token: a Scan."""
    return _run("recurrent", _recurrent, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


@function
def quadratic(
    q: Value,
    k: Value,
    v: Value,
    *,
    scale: float,
    log_decay: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """Causal linear attention through its n x n scores; with a decay per feature these are n x n x d."""
    return _run("quadratic", _quadratic, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


@function
def chunked(
    q: Value,
    k: Value,
    v: Value,
    *,
    chunk_size: int,
    scale: float,
    log_decay: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """Causal linear attention, quadratic inside chunks; the states between them are an exclusive CumSum.

    A sum that decays is no CumSum: with log_decay the states are those of `chunked_matmul_prefix`.
    """
    span = _in_chunks("chunked", chunk_size, _carry_cumsum)
    return _run("chunked", span, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


@function
def chunked_matmul_prefix(
    q: Value,
    k: Value,
    v: Value,
    *,
    chunk_size: int,
    scale: float,
    log_decay: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """As `chunked`; the states between chunks are a MatMul with a strictly lower triangle, decayed where asked."""
    span = _in_chunks("chunked_matmul_prefix", chunk_size, _carry_matmul)
    return _run("chunked_matmul_prefix", span, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


@function
def chunked_scan(
    q: Value,
    k: Value,
    v: Value,
    *,
    chunk_size: int,
    scale: float,
    log_decay: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """As `chunked`; a Scan over the chunks hands on one state, so that no two of them are in memory."""
    span = _in_chunks("chunked_scan", chunk_size, _carry_scan)
    return _run("chunked_scan", span, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


@function
def bidirectional(
    q: Value,
    k: Value,
    v: Value,
    *,
    scale: float,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
) -> LinearAttention:
    """Linear attention in which every token reads the state of the whole sequence; there is no decay."""
    return _run("bidirectional", _bidirectional, q, k, v, scale, None, mask, cu_seqlens, initial_state)


@function
def normalised(
    q: Value,
    k: Value,
    v: Value,
    *,
    form: Callable[..., LinearAttention],
    scale: float,
    epsilon: float,
    q_normaliser: Value | None = None,
    k_normaliser: Value | None = None,
    mask: Value | None = None,
    cu_seqlens: Value | None = None,
    initial_state: Value | None = None,
    initial_normaliser: Value | None = None,
) -> NormalisedLinearAttention:
    """Linear attention divided by the sum of its weights, which is `form` for values that are all one."""
    operation = "linear_attention.normalised"
    check.domain(operation, callable(form), "form to be one of the functions of this module", form=form)
    check.domain(operation, 0 <= epsilon < math.inf, "a finite epsilon >= 0", epsilon=epsilon)
    for names, one, other in (
        ("initial_state and initial_normaliser", initial_state, initial_normaliser),
        ("q_normaliser and k_normaliser", q_normaliser, k_normaliser),
    ):
        check.domain(operation, (one is None) == (other is None), f"{names}, both or neither", given=one is not None)
    above = form(q, k, v, scale=scale, mask=mask, cu_seqlens=cu_seqlens, initial_state=initial_state)
    q_z, k_z = (q, k) if q_normaliser is None or k_normaliser is None else (q_normaliser, k_normaliser)
    z = None
    if initial_normaliser is not None:
        check.real(operation, "initial_normaliser", initial_normaliser)
        expected = "initial_normaliser of shape (s, h, f)"
        check.shape(operation, initial_normaliser.ndim == 3, expected, initial_normaliser=initial_normaliser)
        z = initial_normaliser[..., None]
    ones = full((*(v.size(axis) for axis in range(3)), 1), 1, v.dtype)
    weights = form(q_z, k_z, ones, scale=scale, mask=mask, cu_seqlens=cu_seqlens, initial_state=z)
    below = weights.output + epsilon
    # Both sides of a choice are evaluated: the divisor is 1 where the quotient is not used.
    output = choose(below == 0, 0, above.output / choose(below == 0, 1, below))
    return NormalisedLinearAttention(output, above.state, weights.state[..., 0])


def sizes(x: Value) -> list[Value | int]:
    """The shape of x, in numbers where they are known."""
    return [size if isinstance(size, int) else x.size(axis) for axis, size in enumerate(x.shape)]


def grid(n: Value, chunk: int) -> tuple[Value, Value]:
    """Rows of a chunk and number of chunks for n tokens: at least one, and none longer than the sequence."""
    n = maximum(n, 1)
    rows = minimum(n, chunk)
    return rows, (n + rows - 1) // rows


def cut(x: Value, rows: Value, count: Value, *, axis: int) -> Value:
    """The tokens of an axis, padded with zeros, as two axes: `count` chunks of `rows` tokens."""
    axis %= x.ndim
    after = [rows * count - x.size(axis) if i == axis else 0 for i in range(x.ndim)]
    shape = sizes(x)
    return pad(x, [0] * x.ndim, after).reshape(*shape[:axis], count, rows, *shape[axis + 1 :])


# q, k (s, h, n, d), v (s, h, n, e), log decay (s, h, n, f), state (s, h, d, e) -> output, state.
Span = Callable[[Value, Value, Value, Value | None, Value | None], tuple[Value, Value]]
# The same for chunks, (s, h, G, c, ...), and the summed log decay of each, (s, h, G, f): what is read from the states
# that earlier chunks left, and the last state.
Carry = Callable[[Value, Value, Value, Value | None, Value | None], tuple[Value, Value]]


class _Packing(NamedTuple):
    # Of every place in the batch its token, and whether there is one; of every token its place in the flat batch.
    token: Value
    taken: Value
    place: Value


def _run(
    name: str,
    span: Span,
    q: Value,
    k: Value,
    v: Value,
    scale: float,
    log_decay: Value | None,
    mask: Value | None,
    cu_seqlens: Value | None,
    state: Value | None,
) -> LinearAttention:
    """Check what is known of the arguments, lay packed documents out as a batch, apply `span` with heads in front."""
    _check(f"linear_attention.{name}", q, k, v, scale, log_decay, mask, cu_seqlens, state)
    g = log_decay if log_decay is None or log_decay.ndim == 4 else log_decay[..., None]
    packing = None if cu_seqlens is None else _packing(cu_seqlens.cast(np.int64), q.size(1))
    q = q * scale
    if packing is not None:
        q, k, v = (_laid_out(x, packing) for x in (q, k, v))
        g = None if g is None else _laid_out(g, packing)
        mask = packing.taken if mask is None else packing.taken & _laid_out(mask, packing)
    if mask is not None:
        kept = mask[:, :, None, None]
        k, g = choose(kept, k, 0), None if g is None else choose(kept, g, 0)
    q, k, v = (x.swap(1, 2) for x in (q, k, v))
    output, state = span(q, k, v, None if g is None else g.swap(1, 2), state)
    output = output.swap(1, 2)
    if packing is not None:
        flat = output.reshape(output.size(0) * output.size(1), output.size(2), output.size(3))
        output = take(flat, packing.place, axis=0)[None]
    return LinearAttention(output, state)


def _check(
    operation: str,
    q: Value,
    k: Value,
    v: Value,
    scale: float,
    log_decay: Value | None,
    mask: Value | None,
    cu_seqlens: Value | None,
    state: Value | None,
) -> None:
    for letter, x in (("q", q), ("k", k), ("v", v)):
        check.real(operation, letter, x)
    fits = q.ndim == k.ndim == 4 and q.shape[2:] == k.shape[2:]
    check.shape(operation, fits, "q and k of one shape (b, n, h, d)", q=q, k=k, v=v)
    h, d = q.shape[2:]
    check.shape(operation, v.ndim == 4 and v.shape[2] == h, "v of shape (b, n, h, e)", q=q, k=k, v=v)
    check.domain(operation, math.isfinite(scale), "a finite scale", scale=scale)
    if log_decay is not None:
        check.real(operation, "log_decay", log_decay)
        fits = log_decay.shape[2:] in ((h,), (h, d))
        check.shape(operation, fits, "log_decay of shape (b, n, h) or (b, n, h, d)", log_decay=log_decay, q=q)
    if mask is not None:
        check.boolean(operation, "mask", mask)
        check.shape(operation, mask.ndim == 2, "a mask of shape (b, n)", mask=mask, q=q)
    if cu_seqlens is not None:
        check.integer(operation, "cu_seqlens", cu_seqlens)
        check.shape(operation, cu_seqlens.ndim == 1, "one bound more than documents", cu_seqlens=cu_seqlens)
    if state is not None:
        check.real(operation, "initial_state", state)
        fits = state.ndim == 4 and state.shape[1:] == (h, d, v.shape[3])
        expected = "one initial_state (h, d, e) per sequence or document"
        check.shape(operation, fits, expected, initial_state=state, q=q, v=v)


def _packing(bounds: Value, n: Value) -> _Packing:
    starts, ends = bounds[:-1], bounds[1:]
    longest = (ends - starts).max(0)
    position = arange(longest)
    t = arange(n)
    document = (t[:, None] >= ends).cast(np.int64).sum(-1)
    return _Packing(
        minimum(starts[:, None] + position, n - 1),
        position < (ends - starts)[:, None],
        document * longest + t - take(starts, document, axis=0),
    )


def _laid_out(x: Value, packing: _Packing) -> Value:
    """(1, n, ...) to (documents, longest, ...); a batch of any other size is refused when the graph runs."""
    alone = op("Squeeze", x, constant(np.array([0])), shape=x.shape[1:])
    return take(alone, packing.token, axis=0)


def _recurrent(q: Value, k: Value, v: Value, g: Value | None, S: Value | None) -> tuple[Value, Value]:
    n = q.size(2)
    # A Scan needs a token; one of zeros does not move the state.
    tokens = [pad(x, [0] * 4, [0, 0, maximum(1 - n, 0), 0]) for x in (q, k, v, g) if x is not None]

    def body(states: list[Value], token: list[Value]) -> tuple[list[Value], list[Value]]:
        (S,), (q, k, v, *decay) = states, token
        for g in decay:
            S = exp(g)[..., None] * S
        S = S + k[..., None] * v[..., None, :]
        return [S], [(q[..., None, :] @ S)[..., 0, :]]

    (S,), (output,) = scan(body, [_state(k, v, S)], [x.transpose(2, 0, 1, 3) for x in tokens])
    return output.transpose(1, 2, 0, 3)[:, :, :n], S


def _quadratic(q: Value, k: Value, v: Value, g: Value | None, S: Value | None) -> tuple[Value, Value]:
    output = _local(q, k, v, g)
    q, k = _decayed(q, k, g)
    stored = _stored(k, v)
    if S is None:
        return output, stored
    return output + q @ S, stored + (S if g is None else exp(g.sum(-2))[..., None] * S)


def _stored(k: Value, v: Value) -> Value:
    """Σ_j k_j' v_j over the tokens of axis 2; ONNX Runtime leaves the sum over no token unwritten."""
    return choose(k.size(2) > 0, k.swap(-1, -2) @ v, 0)


def _in_chunks(name: str, chunk_size: int, carry: Carry) -> Span:
    operation = f"linear_attention.{name}"
    check.domain(operation, isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size >= 1", chunk_size=chunk_size)
    return partial(_chunked, chunk_size=chunk_size, carry=carry)


def _chunked(
    q: Value, k: Value, v: Value, g: Value | None, S: Value | None, *, chunk_size: int, carry: Carry
) -> tuple[Value, Value]:
    n = q.size(2)
    rows, count = grid(n, chunk_size)
    q, k, v = (cut(x, rows, count, axis=2) for x in (q, k, v))
    g = None if g is None else cut(g, rows, count, axis=2)
    local = _local(q, k, v, g)
    q, k = _decayed(q, k, g)
    read, S = carry(q, k, v, None if g is None else g.sum(-2), S)
    output = local + read
    return output.reshape(v.size(0), v.size(1), count * rows, v.size(4))[:, :, :n], S


def _bidirectional(q: Value, k: Value, v: Value, _: Value | None, S: Value | None) -> tuple[Value, Value]:
    stored = _stored(k, v)
    S = stored if S is None else stored + S
    return q @ S, S


def _state(k: Value, v: Value, S: Value | None) -> Value:
    """The given state, or one of zeros."""
    return full((k.size(0), k.size(1), k.size(-1), v.size(-1)), 0, v.dtype) if S is None else S


def _local(q: Value, k: Value, v: Value, g: Value | None) -> Value:
    """Causal attention among the tokens of axis -2, from nothing."""
    t = arange(q.size(-2))
    causal = t[:, None] >= t
    if g is None:
        return choose(causal, q @ k.swap(-1, -2), 0) @ v
    decay = choose(causal, exp(_between(g, exclusive=False)), 0)
    if int(g.shape[-1]) == 1:
        return (q @ k.swap(-1, -2) * decay[..., 0, :, :]) @ v
    products = q.swap(-1, -2)[..., None] * k.swap(-1, -2)[..., None, :]
    return (products * decay).sum(-3) @ v


def _between(g: Value, *, exclusive: bool) -> Value:
    """(..., n, f) to (..., f, n, n): the log decay from j to i, the sum of g over j < t <= i, or j < t < i."""
    t = arange(g.size(-2))
    later = choose(t[:, None] > t, g.swap(-1, -2)[..., None], 0)
    return cumsum(later, axis=-2, exclusive=exclusive)


def _decayed(q: Value, k: Value, g: Value | None) -> tuple[Value, Value]:
    """Queries that read the state before the first token, and keys as they stand in the state after the last."""
    if g is None:
        return q, k
    axis = constant(np.int64(g.ndim - 2))
    return q * exp(op("CumSum", g, axis)), k * exp(op("CumSum", g, axis, exclusive=1, reverse=1))


def _carry_cumsum(q: Value, k: Value, v: Value, total: Value | None, S: Value | None) -> tuple[Value, Value]:
    if total is not None:
        return _carry_matmul(q, k, v, total, S)
    sums = k.swap(-1, -2) @ v
    before = cumsum(sums, axis=2, exclusive=True)
    if S is not None:
        before = before + S[:, :, None]
    return q @ before, before[:, :, -1] + sums[:, :, -1]


def _carry_matmul(q: Value, k: Value, v: Value, total: Value | None, S: Value | None) -> tuple[Value, Value]:
    sums = k.swap(-1, -2) @ v
    g = arange(sums.size(2))
    earlier = g[:, None] > g
    if total is None:
        before = _weighted(earlier.cast(v.dtype), sums)
    else:
        weights = choose(earlier, exp(_between(total, exclusive=True)), 0)
        if int(total.shape[-1]) == 1:
            before = _weighted(weights[..., 0, :, :], sums)
        else:
            before = (weights @ sums.swap(2, 3)).swap(2, 3)
    if S is not None:
        kept = S[:, :, None]
        before = before + (kept if total is None else exp(cumsum(total, axis=2, exclusive=True))[..., None] * kept)
    last = before[:, :, -1]
    if total is not None:
        last = exp(total[:, :, -1])[..., None] * last
    return q @ before, last + sums[:, :, -1]


def _weighted(weights: Value, sums: Value) -> Value:
    """Σ_l weights_gl sums_l over the chunks of axis 2."""
    shape = sizes(sums)
    return (weights @ sums.reshape(*shape[:3], sums.size(3) * sums.size(4))).reshape(*shape)


def _carry_scan(q: Value, k: Value, v: Value, total: Value | None, S: Value | None) -> tuple[Value, Value]:
    def body(states: list[Value], chunk: list[Value]) -> tuple[list[Value], list[Value]]:
        (S,), (q, k, v, *decay) = states, chunk
        read = q @ S
        for total in decay:
            S = exp(total)[..., None] * S
        return [S + k.swap(-1, -2) @ v], [read]

    chunks = [x.transpose(2, 0, 1, *range(3, x.ndim)) for x in (q, k, v, total) if x is not None]
    (S,), (read,) = scan(body, [_state(k, v, S)], chunks)
    return read.transpose(1, 2, 0, 3, 4), S
