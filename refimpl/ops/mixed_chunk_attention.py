"""Mixed chunk attention (FLASH): quadratic attention inside chunks of c tokens, linear attention between them.

    o_i = (1/N_loc) Σ_(j in chunk of i) kernel(scale q_quad_i·k_quad_j + bias_ij) v_j + (1/N_lin) q_lin_i Σ_h S_h
    S_h = Σ_(j in chunk h) k_lin_jᵀ v_j

Source: Hua et al., Transformer Quality in Linear Time, arXiv:2202.10447; https://kexue.fm/archives/8934

There is no head axis: queries and keys are (b, n, s), values (b, n, e); any number of leading axes stands for b. The
tail is padded to G = ceil(n/c) chunks and always masked. Public code disagrees on scale, kernel and lengths:

    who                                   scale   kernel                              normaliser
    article 8934                          1/√s    squared_relu_constant(length=1)     su
    paper, pseudo-code                    1/c     squared_relu_constant(length=1)     paper
    FLASH-pytorch                         1/c     squared_relu_constant(length=1)     lucidrains, lucidrains_causal
      the same with laplace_attn_fn       1/c     laplace                             as above
    fast weight layers (causal_strict)    1       identity                            unnormalised
    recommended, blind to padding         1/√s    squared_relu_constant(length=1)     visible
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from refimpl import check
from refimpl.ops import gau, rope
from refimpl.ops.attention import project

# Rows of gamma and beta that make (q_quad, k_quad, q_lin, k_lin): the paper's pseudo-code, and FLASH-pytorch.
ROWS_PAPER = (0, 1, 2, 3)
ROWS_LUCIDRAINS = (0, 2, 1, 3)


class Reach(NamedTuple):
    """What every row reads, in counts: all that a normaliser may know. G chunks of c rows, the padded tail included."""

    chunk: int
    # Tokens in the array (while streaming: seen so far), masked ones included, tail padding not.
    tokens: int
    # Chunks whose sum S_h the row reads; visible keys in its own chunk; visible keys inside those S_h.
    chunks: Int[np.ndarray, "*_b _G _c"]
    local: Int[np.ndarray, "*_b _G _c"]
    linear: Int[np.ndarray, "*_b _G _c"]


class Lengths(NamedTuple):
    """N_loc and N_lin, one for all rows or one per row. Where a length is 0 that part of the output is 0."""

    local: Int[np.ndarray, "..."] | int
    linear: Int[np.ndarray, "..."] | int


class Documents(NamedTuple):
    """How packed documents are kept apart: tokens share a document column of `member`, chunk g reads the S_h of h."""

    member: Bool[np.ndarray, "*_b _G _c _D"]
    reads: Bool[np.ndarray, "*_b _G _G"]


class Heads(NamedTuple):
    """The four scaled and shifted copies of the shared features, in the order in which the operators take them."""

    q_quad: Float[np.ndarray, "*b n s"]
    k_quad: Float[np.ndarray, "*b n s"]
    q_lin: Float[np.ndarray, "*b n s"]
    k_lin: Float[np.ndarray, "*b n s"]


class State(NamedTuple):
    """A causal stream: the sum S over complete chunks, their number and valid tokens, and the open chunk's buffer."""

    summary: Float[np.ndarray, "*b s e"]
    chunks: int
    counted: Int[np.ndarray, "*b"]
    k_quad: Float[np.ndarray, "*b f s"]
    k_lin: Float[np.ndarray, "*b f s"]
    v: Float[np.ndarray, "*b f e"]
    valid: Bool[np.ndarray, "*b f"]


def su(reach: Reach) -> Lengths:
    """N_loc = c, N_lin = c times the chunks read, at most n, masked tokens too; causally (g-1) c for chunk g = 1 ... G.

    Read both ways that is n, not n rounded up to whole chunks.

    Differs: the article prints 1/((g-1) n/c) for the causal sum; only (g-1) c counts the tokens summed.
    """
    return Lengths(reach.chunk, np.minimum(reach.chunks * reach.chunk, reach.tokens))


def paper(reach: Reach) -> Lengths:
    """N_loc = 1 (scores are divided by c before the kernel), N_lin = c times the number of chunks read.

    Differs: at the first causal chunk the pseudo-code is 0/0, which the PyTorch transcription keeps as NaN.
    """
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
    """N_loc = the visible keys of the row's chunk, N_lin = the visible keys of the chunks read; padding never counts.

    Causally N_loc counts the visible keys j <= i, a padded row's own not; with causal_strict those of j < i.

    Source: a correction of article 8934, which notes that the paper neglects padding.
    """
    return Lengths(reach.local, reach.linear)


def identity(scores: Shaped[np.ndarray, "*s"], mask: Shaped[np.ndarray, "..."] | None) -> Float[np.ndarray, "*s"]:
    """An attention kernel whose weight is the score itself, and 0 where masked: that of the fast weight layers."""
    scores = check.real("mixed_chunk_attention.identity", "scores", scores)
    return scores if mask is None else scores * check.boolean("mixed_chunk_attention.identity", "mask", mask)


def same_document(segments: Shaped[np.ndarray, "..."]) -> Documents:
    """Exact separation: a token reads its own segment id only, in its chunk and in every sum.

    C1. Tokens must share a column of `member` if and only if their ids are equal, so that editing one document moves
        another by exactly 0. Columns stand in the order of the ids.
    C2. `reads` must be True throughout. Chunks keep their global borders: a document that starts at a multiple of c
        equals the document alone, another does not.
    """
    segments = _chunked_ids("mixed_chunk_attention.same_document", segments)
    member = segments[..., None] == np.unique(segments)
    return Documents(member, np.ones(segments.shape[:-1] + segments.shape[-2:-1], dtype=np.bool_))


def overlapping_chunks(segments: Shaped[np.ndarray, "..."]) -> Documents:
    """The paper's separation: chunk g reads S_h where the ranges [least id, largest id] of both chunks meet.

    C1. `reads` must compare closed ranges; a range is no set, so [1, 3] meets [2, 2]. Ids of masked tokens count.
    C2. `member` must be one column of True: neither the own chunk nor a sum is split, so that where a chunk holds a
        border one document moves the other.
    Source: segment_ids_to_mask in the pseudo-code of arXiv:2202.10447.
    """
    segments = _chunked_ids("mixed_chunk_attention.overlapping_chunks", segments)
    low, high = segments.min(axis=-1), segments.max(axis=-1)
    reads = (low[..., :, None] <= high[..., None, :]) & (high[..., :, None] >= low[..., None, :])
    return Documents(np.ones(segments.shape + (1,), dtype=np.bool_), reads)


def bidirectional(
    q_quad: Shaped[np.ndarray, "*b n s"],
    k_quad: Shaped[np.ndarray, "..."],
    q_lin: Shaped[np.ndarray, "..."],
    k_lin: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    key_mask: Shaped[np.ndarray, "..."] | None = None,
    segments: Shaped[np.ndarray, "..."] | None = None,
    bias: Shaped[np.ndarray, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., np.ndarray],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[np.ndarray], Documents] | None = None,
) -> Float[np.ndarray, "*b n _"]:
    """Every token reads its own chunk quadratically and the sums of all chunks, its own included, linearly.

    o_i = (1/N_loc) Σ_(j in chunk of i) kernel(scale q_quad_i·k_quad_j + bias_ij) v_j + (1/N_lin) q_lin_i Σ_(all h) S_h

    C1. Must equal the dense operator with these weights on every pair of tokens.
    C2. Masked keys and the padded tail must have weight 0 after the kernel and be absent from S_h: a bias, or a kernel
        with kernel(0) != 0, must not bring them back. Queries are not masked.
    C3. `normaliser` must be given the counts of `Reach`; a part whose length is 0 must be 0, never NaN.
    C4. `segments` and `documents` come together; a token kept apart must be neither read nor counted by `visible`;
        su and paper count the whole chunks of c tokens from which a row reads, su no more than the n of the array.
    C5. `bias` (c, c) must be added after the scale and before the kernel, by positions inside the chunk.
    Raises: ShapeError for shapes that do not fit; DomainError for chunk < 1, NaN or infinity, a mask that is not
        boolean, segments that are not integers, or only one of segments and documents.
    Precision: sums of products in any order, against the same sums of absolute values; the local part as its kernel.
    Source: arXiv:2202.10447, section 3.3 and pseudo-code.
    Differs: FLASH-pytorch with reduce_group_non_causal_attn=False reads its own S_g only, still divided by n.
    """
    op = "mixed_chunk_attention.bidirectional"
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked(op, (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, _all, _all, rule)


def causal(
    q_quad: Shaped[np.ndarray, "*b n s"],
    k_quad: Shaped[np.ndarray, "..."],
    q_lin: Shaped[np.ndarray, "..."],
    k_lin: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    key_mask: Shaped[np.ndarray, "..."] | None = None,
    segments: Shaped[np.ndarray, "..."] | None = None,
    bias: Shaped[np.ndarray, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., np.ndarray],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[np.ndarray], Documents] | None = None,
) -> Float[np.ndarray, "*b n _"]:
    """Every token reads its chunk up to itself quadratically and the sums of strictly earlier chunks linearly.

    o_i = (1/N_loc) Σ_(j <= i in chunk g) kernel(...)_ij v_j + (1/N_lin) q_lin_i Σ_(h < g) S_h

    C1. Changing tokens from t on must leave every output before t bit-identical, inside the chunk of t too.
    C2. The prefix of sums must be exclusive, since S_g holds later tokens; the first chunk's linear part must be 0.
    C3. c >= n must be purely quadratic; c = 1 must be a diagonal plus an exclusive linear attention.
    C4. Otherwise as `bidirectional`.
    Raises, Precision, Source: as `bidirectional`.
    Differs: a PyTorch transcription of the pseudo-code accumulates inclusively and keeps the upper triangle.
    """
    op = "mixed_chunk_attention.causal"
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked(op, (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, _lower, _strictly_lower, rule)


def causal_strict(
    q_quad: Shaped[np.ndarray, "*b n s"],
    k_quad: Shaped[np.ndarray, "..."],
    q_lin: Shaped[np.ndarray, "..."],
    k_lin: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    key_mask: Shaped[np.ndarray, "..."] | None = None,
    segments: Shaped[np.ndarray, "..."] | None = None,
    bias: Shaped[np.ndarray, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., np.ndarray],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[np.ndarray], Documents] | None = None,
) -> Float[np.ndarray, "*b n _"]:
    """As `causal`, but no token reads itself: the local sum runs over j < i.

    C1. The first output must be 0, and no output may depend on its own token's key or value.
    C2. With the kernel `identity`, lengths of 1 and the same queries and keys in both parts, c must not matter: it is
        exclusive linear attention.
    C3. Otherwise as `causal`.
    Source: the fast weight layers of google-research, where v_j is a gradient known only after step j.
    """
    op = "mixed_chunk_attention.causal_strict"
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    given = _checked(op, (q_quad, k_quad, q_lin, k_lin, v), key_mask, segments, bias, rule)
    return _mix(given, _strictly_lower, _strictly_lower, rule)


def initial_state(*, batch: tuple[int, ...], s: int, e: int) -> State:
    """The state before the first token: nothing summed, nothing buffered."""
    none, valid = np.zeros(batch + (0, s)), np.zeros(batch + (0,), dtype=np.bool_)
    return State(np.zeros(batch + (s, e)), 0, valid.sum(axis=-1), none, none, np.zeros(batch + (0, e)), valid)


def step(
    state: State,
    q_quad: Shaped[np.ndarray, "*b n s"],
    k_quad: Shaped[np.ndarray, "..."],
    q_lin: Shaped[np.ndarray, "..."],
    k_lin: Shaped[np.ndarray, "..."],
    v: Shaped[np.ndarray, "..."],
    key_mask: Shaped[np.ndarray, "..."] | None = None,
    bias: Shaped[np.ndarray, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., np.ndarray],
    normaliser: Callable[[Reach], Lengths],
) -> tuple[Float[np.ndarray, "*b n _"], State]:
    """The outputs of the next n tokens of a causal stream and the state after them; n may be any number, 0 too.

    C1. However the sequence is split into blocks, the outputs must be those of `causal` on the whole; a normaliser that
        reads the length of the whole (`lucidrains`) is given that of the stream so far.
    C2. A complete chunk must be added to S and leave the buffer; f = tokens mod c stay behind.
    C3. The given state must not be changed. Positions, hence RoPE, go on from block to block.
    Raises: as `causal`, and ShapeError for a state that does not fit.
    Precision: as `causal`; a state rounded to a storage type adds one unit of it per chunk.
    Source: https://kexue.fm/archives/8934. A packed document is a stream of its own.
    """
    op = "mixed_chunk_attention.step"
    rule = _Rule(chunk, scale, kernel, normaliser, None)
    new = _checked(op, (q_quad, k_quad, q_lin, k_lin, v), key_mask, None, bias, rule)
    state = _checked_state(op, state, new, chunk)
    f = state.v.shape[-2]
    # Buffered rows were answered before: zeros stand in for their queries, and their outputs are dropped.
    k_quad, k_lin = _joined(state.k_quad, new.k_quad), _joined(state.k_lin, new.k_lin)
    q_quad, q_lin = _joined(np.zeros_like(state.k_quad), new.q_quad), _joined(np.zeros_like(state.k_lin), new.q_lin)
    v, valid = _joined(state.v, new.v), np.concatenate([state.valid, new.valid], axis=-1)
    whole = _Given(q_quad, k_quad, q_lin, k_lin, v, valid, None, new.bias)
    out = _mix(whole, _lower, _strictly_lower, rule, state)[..., f:, :]
    full = v.shape[-2] // chunk * chunk
    keys = k_lin[..., :full, :] * valid[..., :full, None]
    summary = state.summary + keys.swapaxes(-1, -2) @ v[..., :full, :]
    counted = state.counted + valid[..., :full].sum(axis=-1)
    k_quad, k_lin, v, valid = k_quad[..., full:, :], k_lin[..., full:, :], v[..., full:, :], valid[..., full:]
    return out, State(summary, state.chunks + full // chunk, counted, k_quad, k_lin, v, valid)


def scale_offset_heads(
    z: Shaped[np.ndarray, "*b n s"],
    gamma: Shaped[np.ndarray, "..."],
    beta: Shaped[np.ndarray, "..."],
    *,
    rows: tuple[int, ...],
) -> Heads:
    """The four heads of one shared projection, each with a scale and an offset of its own.

    head = γ_r ⊙ z + β_r,   r = the row that `rows` names for (q_quad, k_quad, q_lin, k_lin)

    C1. Rows must be taken in the order of `rows`, which names each of the four once.
    Raises: ShapeError unless gamma and beta are (4, s); DomainError unless rows is a permutation of 0 ... 3.
    Precision: as gau.scale_offset.
    Source: the pseudo-code of arXiv:2202.10447 (ROWS_PAPER).
    Differs: FLASH-pytorch stores (q_quad, q_lin, k_quad, k_lin), ROWS_LUCIDRAINS.
    """
    op = "mixed_chunk_attention.scale_offset_heads"
    gamma, beta = check.real(op, "gamma", gamma), check.real(op, "beta", beta)
    fits = gamma.ndim == 2 and gamma.shape[0] == 4 and gamma.shape == beta.shape
    check.shape(op, fits, "gamma and beta of shape (4, s)", gamma=gamma, beta=beta)
    check.domain(op, sorted(rows) == [0, 1, 2, 3], "rows that are a permutation of (0, 1, 2, 3)", rows=rows)
    return Heads(*(gau.scale_offset(z, gamma[r], beta[r]) for r in rows))


def unit(
    x: Shaped[np.ndarray, "*b n d"],
    key_mask: Shaped[np.ndarray, "..."] | None,
    segments: Shaped[np.ndarray, "..."] | None,
    bias: Shaped[np.ndarray, "..."] | None,
    positions: Shaped[np.ndarray, "..."] | None,
    frequencies: Shaped[np.ndarray, " r"] | None,
    w_in: Shaped[np.ndarray, "..."],
    b_in: Shaped[np.ndarray, "..."] | None,
    gamma: Shaped[np.ndarray, "..."],
    beta: Shaped[np.ndarray, "..."],
    w_out: Shaped[np.ndarray, "..."],
    b_out: Shaped[np.ndarray, "..."] | None,
    *,
    mix: Callable[..., np.ndarray],
    rotate: Callable[..., np.ndarray],
    rows: tuple[int, ...],
    chunk: int,
    scale: float,
    kernel: Callable[..., np.ndarray],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[np.ndarray], Documents] | None = None,
) -> Float[np.ndarray, "*b n _"]:
    """The FLASH layer without its norm and residual: a gated attention unit over mixed chunk attention.

    o = (u ⊙ mix(heads, v)) W_out + b_out,   [u | v | z] = silu(x W_in + b_in),   heads = R(scale_offset_heads(z))

    C1. All four heads must be rotated, at the positions of the whole sequence, not of the chunk; u and v never are.
        positions = None must rotate nothing.
    C2. `mix` is bidirectional, causal or causal_strict, and must be given key_mask, segments and bias.
    C3. Columns and activation as gau.parts; u must multiply before W_out.
    Raises: ShapeError and DomainError as the functions it is made of.
    Precision: chained: dense, silu, rotation, mix, gate, dense.
    Source: the pseudo-code of arXiv:2202.10447; https://kexue.fm/archives/8934.
    Differs: FLASH-pytorch projects [v | u] by one matrix and z by another. It and the paper normalise before the unit,
        the article after the residual. The paper rotates half-split, FLASH-pytorch interleaved on 32 features.
    """
    op = "mixed_chunk_attention.unit"
    u, v, z = gau.parts(x, w_in, b_in, key_width=np.shape(gamma)[-1] if np.ndim(gamma) else 0)
    heads = scale_offset_heads(z, gamma, beta, rows=rows)
    paired = (positions is None) == (frequencies is None)
    check.domain(op, paired, "positions and frequencies together", positions=positions, frequencies=frequencies)
    if positions is not None and frequencies is not None:
        turn = rope.angles(positions, frequencies)
        heads = Heads(*(rotate(head, turn) for head in heads))
    options = {"chunk": chunk, "scale": scale, "kernel": kernel, "normaliser": normaliser, "documents": documents}
    return project(u * mix(*heads, v, key_mask, segments, bias, **options), w_out, b_out)


class _Rule(NamedTuple):
    chunk: int
    scale: float
    kernel: Callable[..., np.ndarray]
    normaliser: Callable[[Reach], Lengths]
    documents: Callable[[np.ndarray], Documents] | None


class _Given(NamedTuple):
    q_quad: np.ndarray
    k_quad: np.ndarray
    q_lin: np.ndarray
    k_lin: np.ndarray
    v: np.ndarray
    valid: np.ndarray
    segments: np.ndarray | None
    bias: np.ndarray | None


def _checked(
    op: str,
    heads: tuple[np.ndarray, ...],
    key_mask: np.ndarray | None,
    segments: np.ndarray | None,
    bias: np.ndarray | None,
    rule: _Rule,
) -> _Given:
    names = ("q_quad", "k_quad", "q_lin", "k_lin", "v")
    q_quad, k_quad, q_lin, k_lin, v = (check.real(op, name, x) for name, x in zip(names, heads, strict=True))
    received = dict(zip(names, (q_quad, k_quad, q_lin, k_lin, v), strict=True))
    one_shape = q_quad.ndim >= 2 and q_quad.shape == k_quad.shape == q_lin.shape == k_lin.shape
    fits = one_shape and v.ndim == q_quad.ndim and v.shape[:-1] == q_quad.shape[:-1]
    check.shape(op, fits, "four heads of one shape (..., n, s), v (..., n, e)", **received)
    check.domain(op, rule.chunk >= 1, "chunk >= 1", chunk=rule.chunk)
    check.domain(op, math.isfinite(rule.scale), "a finite scale", scale=rule.scale)
    paired = (segments is None) == (rule.documents is None)
    check.domain(op, paired, "segments and documents together", documents=rule.documents)
    valid = np.ones(v.shape[:-1], dtype=np.bool_) if key_mask is None else check.boolean(op, "key_mask", key_mask)
    valid = _per_token(op, "key_mask", valid, v)
    if segments is not None:
        segments = _per_token(op, "segments", check.integer(op, "segments", segments), v)
    if bias is not None:
        bias = check.real(op, "bias", bias)
        check.shape(op, bias.shape == (rule.chunk,) * 2, f"bias of shape {(rule.chunk,) * 2}", bias=bias)
    return _Given(q_quad, k_quad, q_lin, k_lin, v, valid, segments, bias)


def _checked_state(op: str, state: State, new: _Given, chunk: int) -> State:
    summary, k_quad, k_lin, v = (
        check.real(op, name, getattr(state, name)) for name in ("summary", "k_quad", "k_lin", "v")
    )
    counted, valid = check.integer(op, "counted", state.counted), check.boolean(op, "valid", state.valid)
    b, s, e, f = new.v.shape[:-2], new.q_lin.shape[-1], new.v.shape[-1], valid.shape[-1] if valid.ndim else chunk
    fits = (summary.shape, counted.shape, valid.shape) == (b + (s, e), b, b + (f,))
    fits = fits and k_quad.shape == k_lin.shape == b + (f, s) and v.shape == b + (f, e)
    expected = f"a state of b = {b}, s = {s}, e = {e} with fewer than c = {chunk} buffered tokens"
    received = {"summary": summary, "counted": counted, "k_quad": k_quad, "k_lin": k_lin, "v": v, "valid": valid}
    check.shape(op, fits and f < chunk, expected, **received)
    check.domain(op, state.chunks >= 0, "chunks >= 0", chunks=state.chunks)
    return State(summary, state.chunks, counted, k_quad, k_lin, v, valid)


def _chunked_ids(op: str, segments: np.ndarray) -> np.ndarray:
    segments = check.integer(op, "segments", segments)
    check.shape(op, segments.ndim >= 2 and segments.shape[-1] >= 1, "segments of shape (..., G, c)", segments=segments)
    return segments


def _per_token(op: str, name: str, array: np.ndarray, v: np.ndarray) -> np.ndarray:
    expected = f"{name} that broadcasts to the tokens {v.shape[:-1]}"
    common = check.broadcast(op, expected, **{name: array[..., None], "v": v})
    check.shape(op, common == v.shape and array.ndim >= 1, expected, **{name: array}, v=v)
    return np.broadcast_to(array, v.shape[:-1])


def _mix(
    given: _Given,
    within: Callable[[int], np.ndarray],
    across: Callable[[int], np.ndarray],
    rule: _Rule,
    past: State | None = None,
) -> np.ndarray:
    chunk = rule.chunk
    n = given.v.shape[-2]
    if n == 0:
        return np.zeros_like(given.v)
    q_quad, k_quad, q_lin, k_lin, v = (_chunks(x, chunk, np.zeros_like) for x in given[:5])
    valid = _chunks(given.valid[..., None], chunk, np.zeros_like)[..., 0]
    g = v.shape[-3]
    if given.segments is None or rule.documents is None:
        member, reads = np.ones((g, chunk, 1), dtype=np.bool_), across(g)
    else:
        # The tail repeats the last id, so that it neither is a document nor widens the range of its chunk.
        member, reads = rule.documents(_chunks(given.segments[..., None], chunk, np.copy)[..., 0])
        reads = reads & across(g)
    mask = within(chunk) & np.any(member[..., :, None, :] & member[..., None, :, :], axis=-1) & valid[..., None, :]
    scores = rule.scale * (q_quad @ k_quad.swapaxes(-1, -2))
    local = rule.kernel(scores if given.bias is None else scores + given.bias, mask) @ v
    # One block of s features per document: a document's sum meets only the queries of its own members.
    counted = member & valid[..., None]
    sums = _spread(counted, k_lin).swapaxes(-1, -2) @ v
    carried = (reads @ _flat(sums)).reshape(sums.shape)
    linear = (member * (reads.astype(int) @ counted.sum(axis=-2))[..., None, :]).sum(axis=-1)
    chunks = (member * (reads.astype(int) @ member.any(axis=-2).astype(int))[..., None, :]).sum(axis=-1)
    if past is not None:
        carried = carried + past.summary[..., None, :, :]
        linear, chunks, n = linear + past.counted[..., None, None], chunks + past.chunks, n + past.chunks * chunk
    lengths = rule.normaliser(Reach(chunk, n, np.broadcast_to(chunks, valid.shape), mask.sum(axis=-1), linear))
    mixed = _over(local, lengths.local) + _over(_spread(member, q_lin) @ carried, lengths.linear)
    return mixed.reshape(mixed.shape[:-3] + (g * chunk, v.shape[-1]))[..., : given.v.shape[-2], :]


def _all(size: int) -> np.ndarray:
    return np.ones((size, size), dtype=np.bool_)


def _lower(size: int) -> np.ndarray:
    return np.tri(size, dtype=np.bool_)


def _strictly_lower(size: int) -> np.ndarray:
    return np.tri(size, k=-1, dtype=np.bool_)


def _chunks(x: np.ndarray, chunk: int, fill: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    # (..., n, f) to (..., G, c, f); `fill` makes the padding out of repeated last rows.
    n = x.shape[-2]
    tail = fill(np.repeat(x[..., -1:, :], -n % chunk, axis=-2))
    return _joined(x, tail).reshape(x.shape[:-2] + (math.ceil(n / chunk), chunk, x.shape[-1]))


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.concatenate([first, second], axis=-2)


def _spread(member: np.ndarray, x: np.ndarray) -> np.ndarray:
    # (..., c, D) and (..., c, s) to (..., c, D s).
    return _flat(member[..., :, None] * x[..., None, :])


def _flat(x: np.ndarray) -> np.ndarray:
    # -1 cannot stand for the length here: it has no answer for empty arrays.
    return x.reshape(x.shape[:-2] + (x.shape[-2] * x.shape[-1],))


def _over(total: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    length = np.asarray(length)[..., None]
    return total * (length > 0) / (length + (length == 0))
