"""Mixed chunk attention (FLASH): quadratic attention inside chunks of c tokens, linear attention between them.

    o_i = (1/N_loc) Σ_(j in chunk of i) kernel(scale q_quad_i·k_quad_j + bias_ij) v_j + (1/N_lin) q_lin_i Σ_h S_h
    S_h = Σ_(j in chunk h) k_lin_jᵀ v_j

Specification: refimpl/ops/mixed_chunk_attention.py. In 16 bits scores, kernels and the sums over chunks are float32;
products with values stay in the storage format, except in float16, which sums of values leave: there all of them are
float32, from the scores to the mixed values.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from torchimpl import check
from torchimpl.ops import gau, rope
from torchimpl.ops.attention import project

# Rows of gamma and beta that make (q_quad, k_quad, q_lin, k_lin): the paper's pseudo-code, and FLASH-pytorch.
ROWS_PAPER = (0, 1, 2, 3)
ROWS_LUCIDRAINS = (0, 2, 1, 3)

# Up to so many chunks their prefix sums are a matrix product on the CPU.
_FEW_CHUNKS = 256


class Reach(NamedTuple):
    """What every row reads, in counts: all that a normaliser may know. G chunks of c rows, the padded tail included."""

    chunk: int
    # Tokens in the array (while streaming: seen so far), masked ones included, tail padding not.
    tokens: int
    # Chunks whose sum S_h the row reads; visible keys in its own chunk; visible keys inside those S_h.
    chunks: Int[Tensor, "*_b _G _c"]
    local: Int[Tensor, "*_b _G _c"]
    linear: Int[Tensor, "*_b _G _c"]


class Lengths(NamedTuple):
    """N_loc and N_lin, one for all rows or one per row. Where a length is 0 that part of the output is 0."""

    local: Int[Tensor, "..."] | int
    linear: Int[Tensor, "..."] | int


class Documents(NamedTuple):
    """How packed documents are kept apart: tokens share a document column of `member`, chunk g reads the S_h of h."""

    member: Bool[Tensor, "*_b _G _c _D"]
    reads: Bool[Tensor, "*_b _G _G"]


class Heads(NamedTuple):
    """The four scaled and shifted copies of the shared features, in the order in which the operators take them."""

    q_quad: Float[Tensor, "*b n s"]
    k_quad: Float[Tensor, "*b n s"]
    q_lin: Float[Tensor, "*b n s"]
    k_lin: Float[Tensor, "*b n s"]


class State(NamedTuple):
    """A causal stream: the sum S over complete chunks, their number and valid tokens, and the open chunk's buffer."""

    summary: Float[Tensor, "*b s e"]
    chunks: int
    counted: Int[Tensor, "*b"]
    k_quad: Float[Tensor, "*b f s"]
    k_lin: Float[Tensor, "*b f s"]
    v: Float[Tensor, "*b f e"]
    valid: Bool[Tensor, "*b f"]


def su(reach: Reach) -> Lengths:
    """N_loc = c, N_lin = the tokens of the chunks read, masked ones too: n, or causally (g-1) c for chunk g."""
    return Lengths(reach.chunk, (reach.chunks * reach.chunk).clamp(max=reach.tokens))


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
    """N_loc = the visible keys of the row's chunk, N_lin = those of the chunks read; padding never counts."""
    return Lengths(reach.local, reach.linear)


def identity(scores: Float[Tensor, "*s"], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*s"]:
    """An attention kernel whose weight is the score itself, and 0 where masked: that of the fast weight layers."""
    check.real("mixed_chunk_attention.identity", "scores", scores)
    if mask is None:
        return scores
    return scores.masked_fill(~check.boolean("mixed_chunk_attention.identity", "mask", mask), 0)


def same_document(segments: Int[Tensor, "..."]) -> Documents:
    """Exact separation: a token reads its own segment id only, in its chunk and in every sum.

    One column per id that occurs: the host waits for their number, and a graph captured whole has it as an open size
    (torch._dynamo.config.capture_dynamic_output_shape_ops). The linear part costs as many times more as there are ids.
    Raises: ShapeError unless segments are (..., G, c); DomainError unless they are integers.
    """
    segments = _chunked_ids("mixed_chunk_attention.same_document", segments)
    ids = torch.unique(segments) if segments.numel() > 0 else segments.new_zeros(1)
    # What a compiled graph cannot see, and Inductor asks of what a product contracts.
    torch._check(ids.shape[0] >= 1)
    member = segments[..., None] == ids
    shape = (*segments.shape[:-1], segments.shape[-2])
    return Documents(member, torch.ones(shape, dtype=torch.bool, device=segments.device))


def overlapping_chunks(segments: Int[Tensor, "..."]) -> Documents:
    """The paper's separation: chunk g reads S_h where the ranges [least id, largest id] of both chunks meet.

    Raises: as `same_document`.
    """
    segments = _chunked_ids("mixed_chunk_attention.overlapping_chunks", segments)
    low, high = segments.aminmax(dim=-1)
    reads = (low[..., :, None] <= high[..., None, :]) & (high[..., :, None] >= low[..., None, :])
    return Documents(torch.ones_like(segments, dtype=torch.bool)[..., None], reads)


def bidirectional(
    q_quad: Float[Tensor, "*b n s"],
    k_quad: Float[Tensor, "..."],
    q_lin: Float[Tensor, "..."],
    k_lin: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    key_mask: Bool[Tensor, "..."] | None = None,
    segments: Int[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Tensor],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Tensor], Documents] | None = None,
) -> Float[Tensor, "*b n _"]:
    """Every token reads its own chunk quadratically and the sums of all chunks, its own included, linearly.

    Without documents there is one sum, of all tokens.
    Raises: ShapeError for shapes that do not fit; DomainError for dtypes, a chunk that is no integer of at least 1, a
    scale that is not finite, or only one of segments and documents.
    """
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    heads = (q_quad, k_quad, q_lin, k_lin, v)
    return _mix(_checked("mixed_chunk_attention.bidirectional", heads, key_mask, segments, bias, rule), rule, None)


def causal(
    q_quad: Float[Tensor, "*b n s"],
    k_quad: Float[Tensor, "..."],
    q_lin: Float[Tensor, "..."],
    k_lin: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    key_mask: Bool[Tensor, "..."] | None = None,
    segments: Int[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Tensor],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Tensor], Documents] | None = None,
) -> Float[Tensor, "*b n _"]:
    """Every token reads its chunk up to itself quadratically and the sums of strictly earlier chunks linearly.

    Raises: as `bidirectional`.
    """
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    heads = (q_quad, k_quad, q_lin, k_lin, v)
    return _mix(_checked("mixed_chunk_attention.causal", heads, key_mask, segments, bias, rule), rule, 0)


def causal_strict(
    q_quad: Float[Tensor, "*b n s"],
    k_quad: Float[Tensor, "..."],
    q_lin: Float[Tensor, "..."],
    k_lin: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    key_mask: Bool[Tensor, "..."] | None = None,
    segments: Int[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Tensor],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Tensor], Documents] | None = None,
) -> Float[Tensor, "*b n _"]:
    """As `causal`, but no token reads itself: the local sum runs over j < i.

    Raises: as `bidirectional`.
    """
    rule = _Rule(chunk, scale, kernel, normaliser, documents)
    heads = (q_quad, k_quad, q_lin, k_lin, v)
    return _mix(_checked("mixed_chunk_attention.causal_strict", heads, key_mask, segments, bias, rule), rule, -1)


def initial_state(*, batch: tuple[int, ...], s: int, e: int) -> State:
    """The state before the first token, in torch's default dtype and on its default device.

    `step` takes it to the dtype and the device of the tokens.
    """
    none, valid = torch.zeros(*batch, 0, s), torch.zeros(*batch, 0, dtype=torch.bool)
    return State(torch.zeros(*batch, s, e), 0, valid.sum(dim=-1), none, none, torch.zeros(*batch, 0, e), valid)


def step(
    state: State,
    q_quad: Float[Tensor, "*b n s"],
    k_quad: Float[Tensor, "..."],
    q_lin: Float[Tensor, "..."],
    k_lin: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    key_mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    *,
    chunk: int,
    scale: float,
    kernel: Callable[..., Tensor],
    normaliser: Callable[[Reach], Lengths],
) -> tuple[Float[Tensor, "*b n _"], State]:
    """The outputs of the next n tokens of a causal stream and the state after them; n may be any number, 0 too.

    The tokens that the open chunk has room for read it as it stands, the others are `causal` behind a carried sum: one
    token costs one row of a chunk. The sum is kept in float32 for 16-bit tokens.
    Raises: as `causal`, and ShapeError for a state that does not fit.
    """
    op = "mixed_chunk_attention.step"
    rule = _Rule(chunk, scale, kernel, normaliser, None)
    new = _checked(op, (q_quad, k_quad, q_lin, k_lin, v), key_mask, None, bias, rule)
    state = _checked_state(op, state, new, chunk)
    if new.v.shape[-2] == 0:
        # Inductor ends in a ValueRangeError where it indexes into no rows.
        return new.v.clone(), state
    room = min(new.v.shape[-2], chunk - state.v.shape[-2])
    early, late = new.cut(0, room), new.cut(room, None)
    out = _open_chunk(early, rule, state, late.v.shape[-2])
    state = _advanced(state, early, chunk)
    if late.v.shape[-2] > 0:
        out = torch.cat([out, _mix(late, rule, 0, state)], dim=-2)
        state = _advanced(state, late, chunk)
    return out, state


def scale_offset_heads(
    z: Float[Tensor, "*b n s"], gamma: Float[Tensor, "..."], beta: Float[Tensor, "..."], *, rows: tuple[int, ...]
) -> Heads:
    """The four heads of one shared projection, each with a scale and an offset of its own.

    Raises: ShapeError unless gamma and beta are (4, s); DomainError unless rows is a permutation of 0 ... 3.
    """
    op = "mixed_chunk_attention.scale_offset_heads"
    check.real(op, "gamma", gamma)
    check.real(op, "beta", beta)
    fits = gamma.ndim == 2 and gamma.shape[0] == 4 and gamma.shape == beta.shape
    check.shape(op, fits, "gamma and beta of shape (4, s)", gamma=gamma, beta=beta)
    check.domain(op, sorted(rows) == [0, 1, 2, 3], "rows that are a permutation of (0, 1, 2, 3)", rows=rows)
    return Heads(*(gau.scale_offset(z, gamma[r], beta[r]) for r in rows))


def unit(
    x: Float[Tensor, "*b n d"],
    key_mask: Bool[Tensor, "..."] | None,
    segments: Int[Tensor, "..."] | None,
    bias: Float[Tensor, "..."] | None,
    positions: Int[Tensor, "..."] | None,
    frequencies: Float[Tensor, " r"] | None,
    w_in: Float[Tensor, "..."],
    b_in: Float[Tensor, "..."] | None,
    gamma: Float[Tensor, "..."],
    beta: Float[Tensor, "..."],
    w_out: Float[Tensor, "..."],
    b_out: Float[Tensor, "..."] | None,
    *,
    mix: Callable[..., Tensor],
    rotate: Callable[..., Tensor],
    rows: tuple[int, ...],
    chunk: int,
    scale: float,
    kernel: Callable[..., Tensor],
    normaliser: Callable[[Reach], Lengths],
    documents: Callable[[Tensor], Documents] | None = None,
) -> Float[Tensor, "*b n _"]:
    """The FLASH layer without its norm and residual: a gated attention unit over mixed chunk attention.

    The four heads are rotated in one call, on a leading axis of their own. In float16 everything between the two dense
    layers is float32.
    Raises: ShapeError and DomainError as the functions it is made of.
    """
    op = "mixed_chunk_attention.unit"
    check.real(op, "gamma", gamma)
    u, v, z = gau.parts(x, w_in, b_in, key_width=gamma.shape[-1] if gamma.ndim else 0)
    heads = scale_offset_heads(z, gamma, beta, rows=rows)
    paired = (positions is None) == (frequencies is None)
    check.domain(op, paired, "positions and frequencies together", positions=positions, frequencies=frequencies)
    if positions is not None and frequencies is not None:
        heads = Heads(*rotate(torch.stack(heads), rope.angles(positions, frequencies)))
    if v.dtype == torch.float16:
        heads, v = Heads(*(head.float() for head in heads)), v.float()
    options = {"chunk": chunk, "scale": scale, "kernel": kernel, "normaliser": normaliser, "documents": documents}
    mixed = u * mix(*heads, v, key_mask, segments, bias, **options)
    return project(mixed.to(x.dtype), w_out, b_out)


class _Rule(NamedTuple):
    chunk: int
    scale: float
    kernel: Callable[..., Tensor]
    normaliser: Callable[[Reach], Lengths]
    documents: Callable[[Tensor], Documents] | None


class _Given(NamedTuple):
    """Checked arguments, the heads and values of one dtype. valid and segments have one entry per token; None: all."""

    q_quad: Tensor
    k_quad: Tensor
    q_lin: Tensor
    k_lin: Tensor
    v: Tensor
    valid: Tensor | None
    segments: Tensor | None
    bias: Tensor | None

    def cut(self, start: int, stop: int | None) -> "_Given":
        """The tokens from start to stop."""
        q_quad, k_quad, q_lin, k_lin, v = (x[..., start:stop, :] for x in self[:5])
        valid, segments = (None if x is None else x[..., start:stop] for x in self[5:7])
        return _Given(q_quad, k_quad, q_lin, k_lin, v, valid, segments, self.bias)


def _checked(
    op: str,
    heads: tuple[Tensor, ...],
    key_mask: Tensor | None,
    segments: Tensor | None,
    bias: Tensor | None,
    rule: _Rule,
) -> _Given:
    received = dict(zip(("q_quad", "k_quad", "q_lin", "k_lin", "v"), heads, strict=True))
    for name, x in received.items():
        check.real(op, name, x)
    q_quad, k_quad, q_lin, k_lin, v = heads
    one_shape = q_quad.ndim >= 2 and q_quad.shape == k_quad.shape == q_lin.shape == k_lin.shape
    fits = one_shape and v.ndim == q_quad.ndim and v.shape[:-1] == q_quad.shape[:-1]
    check.shape(op, fits, "four heads of one shape (..., n, s), v (..., n, e)", **received)
    whole = isinstance(rule.chunk, int) and rule.chunk >= 1
    check.domain(op, whole, "an integer chunk >= 1", chunk=rule.chunk)
    check.domain(op, -math.inf < rule.scale < math.inf, "a finite scale", scale=rule.scale)
    paired = (segments is None) == (rule.documents is None)
    check.domain(op, paired, "segments and documents together", documents=rule.documents)
    if key_mask is not None:
        key_mask = _per_token(op, "key_mask", check.boolean(op, "key_mask", key_mask), v)
    if segments is not None:
        segments = _per_token(op, "segments", check.integer(op, "segments", segments), v)
    if bias is not None:
        check.real(op, "bias", bias)
        check.shape(op, bias.shape == (rule.chunk,) * 2, f"bias of shape {(rule.chunk,) * 2}", bias=bias)
    q_quad, k_quad, q_lin, k_lin, v = (x.to(q_quad.dtype) for x in heads)
    return _Given(q_quad, k_quad, q_lin, k_lin, v, key_mask, segments, bias)


def _checked_state(op: str, state: State, new: _Given, chunk: int) -> State:
    real = ("summary", "k_quad", "k_lin", "v")
    summary, k_quad, k_lin, v = (check.real(op, name, getattr(state, name)) for name in real)
    counted, valid = check.integer(op, "counted", state.counted), check.boolean(op, "valid", state.valid)
    b, s, e, f = new.v.shape[:-2], new.q_lin.shape[-1], new.v.shape[-1], valid.shape[-1] if valid.ndim else chunk
    fits = summary.shape == (*b, s, e) and counted.shape == b and valid.shape == (*b, f)
    fits = fits and k_quad.shape == k_lin.shape == (*b, f, s) and v.shape == (*b, f, e)
    # Only then: Dynamo puts no number into a text that it takes for open, as it does a chunk that was another before.
    if not (fits and f < chunk):
        expected = f"a state of b = {tuple(b)}, s = {s}, e = {e} with fewer than c = {chunk} buffered tokens"
        received = {"summary": summary, "counted": counted, "k_quad": k_quad, "k_lin": k_lin, "v": v, "valid": valid}
        check.shape(op, False, expected, **received)
    check.domain(op, state.chunks >= 0, "chunks >= 0", chunks=state.chunks)
    device, dtype = new.v.device, new.v.dtype
    k_quad, k_lin, v = (x.to(device, dtype) for x in (k_quad, k_lin, v))
    summary = summary.to(device, check.island(new.v).dtype)
    return State(summary, state.chunks, counted.to(device), k_quad, k_lin, v, valid.to(device))


def _chunked_ids(op: str, segments: Tensor) -> Tensor:
    segments = check.integer(op, "segments", segments)
    check.shape(op, segments.ndim >= 2 and segments.shape[-1] >= 1, "segments of shape (..., G, c)", segments=segments)
    return segments


def _per_token(op: str, name: str, x: Tensor, v: Tensor) -> Tensor:
    fits = x.ndim >= 1 and check.broadcasts(x.shape, v.shape[:-1])
    check.shape(op, fits, f"{name} that broadcasts to the tokens {tuple(v.shape[:-1])}", **{name: x}, v=v)
    return x.expand(v.shape[:-1])


def _mix(given: _Given, rule: _Rule, diagonal: int | None, past: State | None = None) -> Tensor:
    """Whole chunks at once; diagonal: that of the triangle of keys which a chunk reads of itself, None for all keys."""
    c, n = rule.chunk, given.v.shape[-2]
    if n == 0:
        return given.v
    q_quad, k_quad, q_lin, k_lin, v = (_chunks(x, c) for x in given[:5])
    g, device = v.shape[-3], v.device
    earlier = torch.ones(g, g, dtype=torch.bool, device=device).tril(-1 if diagonal is not None else g)
    valid = _valid(given, g, c)
    mask = None if valid is None else valid[..., None, :]
    if diagonal is not None:
        lower = torch.ones(c, c, dtype=torch.bool, device=device).tril(diagonal)
        mask = lower if mask is None else mask & lower
    if given.segments is not None and rule.documents is not None:
        # The tail repeats the last id, so that it neither is a document nor widens the range of its chunk.
        token = torch.arange(g * c, device=device).clamp(max=n - 1)
        member, reads = rule.documents(given.segments[..., token].reshape(*v.shape[:-1]))
        reads = reads & earlier
        own = _in_one_document(member, k_quad.dtype)
        mask = own if mask is None else mask & own
        # One block of s features per document: a document's sum meets only the queries of its own members.
        counted = member if valid is None else member & valid[..., None]
        q_lin, k_lin = _spread(member, q_lin), _spread(counted, k_lin)
        sums = check.island(_wide(k_lin).mT @ _wide(v))
        if torch.compiler.is_compiling() and q_quad.shape[-1] * v.shape[-1] > 0:
            # Inductor does not find out that with a document there are sums.
            torch._check(sums.shape[-2] * sums.shape[-1] >= 1)
        S = (reads.to(sums.dtype) @ sums.flatten(-2)).unflatten(-1, sums.shape[-2:])
        chunks = _summed(member, reads, member.any(dim=-2))
        linear = _summed(member, reads, counted.sum(dim=-2))
    else:
        if given.valid is not None and valid is not None:
            k_lin = k_lin.masked_fill(~valid[..., None], 0)
        held = torch.full((g,), c, device=device) if valid is None else valid.sum(dim=-1)
        if diagonal is None:
            # Summed by chunks: one product over all tokens leaves the threads of a CPU without work.
            S = check.island(_wide(k_lin).mT @ _wide(v)).sum(dim=-3, keepdim=True)
            linear = held.sum(dim=-1, keepdim=True)[..., None]
        else:
            S = _prefix(check.island(_wide(k_lin).mT @ _wide(v)), past)
            linear = (held.cumsum(dim=-1) - held)[..., None]
        chunks = earlier.sum(dim=-1)[:, None]
    if past is not None:
        linear, chunks, n = linear + past.counted[..., None, None], chunks + past.chunks, n + past.chunks * c
    local = torch.full((1,), c, device=device) if mask is None else mask.sum(dim=-1)
    rows = v.shape[:-1]
    reach = Reach(c, n, chunks.expand(rows), local.expand(rows), linear.expand(rows))
    mixed = _combined(q_quad, k_quad, q_lin, S, v, mask, given.bias, reach, rule)
    return mixed.flatten(-3, -2)[..., : given.v.shape[-2], :]


def _open_chunk(early: _Given, rule: _Rule, state: State, late: int) -> Tensor:
    """The rows of tokens for which the open chunk has room; `late` more follow them in the array."""
    f, n, c = state.v.shape[-2], early.v.shape[-2], rule.chunk
    held = _held(state, early)
    k_quad, v = (functional.pad(x, (0, 0, 0, c - f - n))[..., None, :, :] for x in (held.k_quad, held.v))
    place = torch.arange(c, device=v.device)
    mask = (place <= place[f : f + n, None]) & functional.pad(held.valid, (0, c - f - n))[..., None, :]
    rows = (*early.v.shape[:-2], 1, n)
    chunks = torch.full((1,), state.chunks, device=v.device)
    local, linear = mask.sum(dim=-1)[..., None, :], state.counted[..., None, None]
    tokens = state.chunks * c + f + n + late
    reach = Reach(c, tokens, *(x.expand(rows) for x in (chunks, local, linear)))
    bias = None if early.bias is None else early.bias[f : f + n]
    q_quad, q_lin, S = (x[..., None, :, :] for x in (early.q_quad, early.q_lin, state.summary))
    return _combined(q_quad, k_quad, q_lin, S, v, mask[..., None, :, :], bias, reach, rule).squeeze(-3)


def _advanced(state: State, new: _Given, chunk: int) -> State:
    """The state after more tokens: chunks that they complete are summed and leave the buffer."""
    held = _held(state, new)
    full = held.v.shape[-2] // chunk * chunk
    keys, valid = held.k_lin[..., :full, :], held.valid[..., :full]
    added = check.island(_wide(keys.masked_fill(~valid[..., None], 0)).mT @ _wide(held.v[..., :full, :]))
    k_quad, k_lin, v = (x[..., full:, :] for x in (held.k_quad, held.k_lin, held.v))
    counted, chunks = state.counted + valid.sum(dim=-1), state.chunks + full // chunk
    return State(state.summary + added, chunks, counted, k_quad, k_lin, v, held.valid[..., full:])


def _held(state: State, new: _Given) -> State:
    """The state with the buffer grown by new tokens."""
    pairs = ((state.k_quad, new.k_quad), (state.k_lin, new.k_lin), (state.v, new.v))
    valid = state.valid.new_ones(new.v.shape[:-1]) if new.valid is None else new.valid
    k_quad, k_lin, v = (torch.cat(pair, dim=-2) for pair in pairs)
    valid = torch.cat([state.valid, valid], dim=-1)
    return State(state.summary, state.chunks, state.counted, k_quad, k_lin, v, valid)


def _combined(
    q_quad: Tensor,
    k_quad: Tensor,
    q_lin: Tensor,
    S: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    reach: Reach,
    rule: _Rule,
) -> Tensor:
    """Both parts of the rows of every chunk, (*b, G, rows, e); S is one sum per chunk, or (*b, 1, s, e) one for all."""
    lengths = rule.normaliser(reach)
    q, k = check.island(q_quad).flatten(0, -3), check.island(k_quad).flatten(0, -3)
    scores = torch.baddbmm(q.new_zeros(1) if bias is None else bias.to(q.dtype), q, k.mT, alpha=rule.scale)
    scores = scores.view(*v.shape[:-2], q.shape[-2], k.shape[-2])
    weights = rule.kernel(scores, None if mask is None else mask.expand(scores.shape))
    # Divided before the products, where the operands are narrower than what they make, and than its gradient.
    weights, q_lin = _divided(weights, lengths.local), _divided(check.island(q_lin), lengths.linear)
    weights, q_lin, S, values = (x.to(_wide(v).dtype) for x in (weights, q_lin, S, v))
    S = S.expand(*v.shape[:-2], *S.shape[-2:])
    # In place: a product that was just made is in no gradient, and an output of n x e is worth not copying.
    mixed = torch.bmm(weights.flatten(0, -3), values.flatten(0, -3))
    mixed = mixed.baddbmm_(q_lin.flatten(0, -3), S.flatten(0, -3))
    return mixed.to(v.dtype).view(*v.shape[:-2], *mixed.shape[-2:])


def _divided(x: Tensor, length: Tensor | int) -> Tensor:
    """x / length, 0 where the length is 0."""
    if not isinstance(length, Tensor):
        return x if length == 1 else x * (1 / length if length > 0 else 0.0)
    length = length.to(x.dtype)[..., None]
    none = length <= 0
    return x * (1 / length.masked_fill(none, 1)).masked_fill(none, 0)


def _prefix(sums: Tensor, past: State | None) -> Tensor:
    """Of (*b, G, s, e): the sum of the chunks before every chunk, from the past on."""
    g = sums.shape[-3]
    if sums.device.type == "cpu" and not torch.compiler.is_exporting() and g <= _FEW_CHUNKS:
        # The CPU adds up along an outer axis several times more slowly than it multiplies by a triangle of ones.
        earlier = torch.ones(g, g, dtype=sums.dtype).tril(-1)
        S = (earlier @ sums.flatten(-2)).view(sums.shape)
        return S if past is None else S + past.summary[..., None, :, :]
    first = torch.zeros_like(sums[..., :1, :, :]) if past is None else past.summary[..., None, :, :]
    return torch.cat([first, sums[..., :-1, :, :]], dim=-3).cumsum_(dim=-3)


def _in_one_document(member: Tensor, dtype: torch.dtype) -> Tensor:
    """Per chunk, (*b, G, c, c): whether two of its tokens share a document."""
    if torch.compiler.is_compiling():
        # Inductor asks of a product's operand how many documents there are; this it fuses, without the pairs in memory.
        return (member[..., :, None, :] & member[..., None, :, :]).any(dim=-1)
    return member.to(dtype) @ member.to(dtype).mT > 0


def _summed(member: Tensor, reads: Tensor, counts: Tensor) -> Tensor:
    """Per row, the counts (*b, G, D) of the chunks that it reads, in the columns of its documents."""
    # No integers are multiplied on every device; these are exact.
    dtype = torch.float32 if member.device.type == "mps" else torch.float64
    total = reads.to(dtype) @ counts.to(dtype)
    return (member * total[..., None, :]).sum(dim=-1).to(torch.int64)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    # (*b, n, f) to (*b, G, c, f), with zeros for the tail.
    n = x.shape[-2]
    tail = -n % chunk
    # While a graph is exported, whether there is a tail is open, and padding by 0 is right as well.
    if torch.compiler.is_exporting() or tail > 0:
        x = functional.pad(x, (0, 0, 0, tail))
    # Sizes are written out: a graph with open sizes does not know that those of unflatten are the same numbers.
    return x.reshape(*x.shape[:-2], -(-n // chunk), chunk, x.shape[-1])


def _valid(given: _Given, g: int, chunk: int) -> Tensor | None:
    # (*b, G, c) or (G, c): what is a visible key; None where everything is.
    n = given.v.shape[-2]
    if given.valid is not None:
        return functional.pad(given.valid, (0, g * chunk - n)).reshape(*given.valid.shape[:-1], g, chunk)
    if torch.compiler.is_exporting() or n % chunk > 0:
        return (torch.arange(g * chunk, device=given.v.device) < n).reshape(g, chunk)
    return None


def _spread(member: Tensor, x: Tensor) -> Tensor:
    # (*b, G, c, D) and (*b, G, c, s) to (*b, G, c, D s).
    return (member[..., None] * x[..., None, :]).flatten(-2)


def _wide(x: Tensor) -> Tensor:
    # What meets values: bfloat16 has the range of float32, float16 has not.
    return x.float() if x.dtype == torch.float16 else x
