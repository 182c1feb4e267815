"""Linear attention: a state of summed key-value products stands in for the attention matrix.

    o_t = scale q_t S_t,   S_t = exp(g_t) S_{t-1} + k_t' v_t,   g_t <= 0 the log decay, 0 where there is none

Specification: refimpl/ops/linear_attention.py. In 16 bits everything between the arguments and the output is formed in
float32, and states and normalisers stay in float32: kept in 16 bits, a running sum stalls. Log decays are added up in
float64 (float32 on devices without it), and exp is taken of differences that are at most 0. Neither the signs of the
decays nor the order of cu_seqlens is looked at.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from torchimpl import check

# Tokens that are summed at once where documents are packed and no chunk size is given.
_SPAN = 64


class LinearAttention(NamedTuple):
    """The output and the state after the last token, one state per sequence or per packed document."""

    output: Float[Tensor, "b n h e"]
    state: Float[Tensor, "s h d e"]


class NormalisedLinearAttention(NamedTuple):
    """The output, the state and the summed keys (the normaliser z) after the last token."""

    output: Float[Tensor, "b n h e"]
    state: Float[Tensor, "s h d e"]
    normaliser: Float[Tensor, "s h f"]


def recurrent(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    *,
    scale: float,
    log_decay: Float[Tensor, "b n h *f"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    cu_seqlens: Int[Tensor, " p"] | None = None,
    initial_state: Float[Tensor, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention, token after token.

    A Python loop when run, torch's scan when captured: the form for few tokens and for comparison, not for training.
    Packed documents stand side by side, so that a token costs as much as they are many.
    Raises: ShapeError for shapes, DomainError for dtypes and a scale that is not finite.
    """
    return _run("recurrent", _recurrent, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def quadratic(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    *,
    scale: float,
    log_decay: Float[Tensor, "b n h *f"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    cu_seqlens: Int[Tensor, " p"] | None = None,
    initial_state: Float[Tensor, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention through its n x n scores; with a decay per feature, of n x n x d numbers.

    Raises: as `recurrent`.
    """
    return _run("quadratic", _quadratic, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def chunked(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    *,
    chunk_size: int,
    scale: float,
    log_decay: Float[Tensor, "b n h *f"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    cu_seqlens: Int[Tensor, " p"] | None = None,
    initial_state: Float[Tensor, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention, quadratic inside chunks of chunk_size tokens and summed between them.

    Without decay and documents the states of the chunks are a cumulative sum. Otherwise they are one product with the
    decays between chunks, whose cost grows with the square of their number: chunk_size should not be far below √n.
    Every document is padded to whole chunks. Within a chunk a decay per feature costs no more memory than q.
    Raises: as `recurrent`; DomainError unless chunk_size is an integer of at least 1.
    """
    whole = isinstance(chunk_size, int) and chunk_size >= 1
    check.domain("linear_attention.chunked", whole, "an integer chunk_size >= 1", chunk_size=chunk_size)
    span = partial(_chunked, chunk_size=chunk_size)
    return _run("chunked", span, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def bidirectional(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    *,
    scale: float,
    mask: Bool[Tensor, "b n"] | None = None,
    cu_seqlens: Int[Tensor, " p"] | None = None,
    initial_state: Float[Tensor, "s h d e"] | None = None,
) -> LinearAttention:
    """Linear attention in which every token reads the state of the whole sequence or document; there is no decay.

    Raises: as `recurrent`.
    """
    return _run("bidirectional", _bidirectional, q, k, v, scale, None, mask, cu_seqlens, initial_state)


def normalised(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    *,
    form: Callable[..., LinearAttention],
    scale: float,
    epsilon: float,
    q_normaliser: Float[Tensor, "b n h f"] | None = None,
    k_normaliser: Float[Tensor, "b n h f"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    cu_seqlens: Int[Tensor, " p"] | None = None,
    initial_state: Float[Tensor, "s h d e"] | None = None,
    initial_normaliser: Float[Tensor, "s h f"] | None = None,
) -> NormalisedLinearAttention:
    """Linear attention divided by epsilon and the sum of its weights; 0 where that is exactly 0.

    Without q_normaliser numerator and denominator are one call of `form`: the values get a column of ones.
    Raises: as `form`; DomainError for a negative epsilon, or where one argument of a pair is given without the other.
    """
    operation = "linear_attention.normalised"
    check.domain(operation, callable(form), "form to be one of the functions of this module", form=form)
    check.domain(operation, _finite(epsilon) and epsilon >= 0, "a finite epsilon >= 0", epsilon=epsilon)
    for names, one, other in (
        ("initial_state and initial_normaliser", initial_state, initial_normaliser),
        ("q_normaliser and k_normaliser", q_normaliser, k_normaliser),
    ):
        check.domain(operation, (one is None) == (other is None), f"{names}, both or neither", given=one is not None)
    dtype = check.real(operation, "q", q).dtype
    q, k, v = (check.island(check.real(operation, name, x)) for name, x in (("q", q), ("k", k), ("v", v)))
    shared: dict[str, Any] = {"scale": scale, "mask": mask, "cu_seqlens": cu_seqlens}
    one, z = v.new_ones(*v.shape[:-1], 1), None
    if initial_normaliser is not None:
        f = (q if q_normaliser is None else q_normaliser).shape[-1:]
        z = check.island(check.real(operation, "initial_normaliser", initial_normaliser))
        sequences = check.real(operation, "initial_state", initial_state).shape[:2]
        expected = "initial_normaliser (s, h, f) beside initial_state (s, h, d, e)"
        fits = z.ndim == 3 and z.shape == (*sequences, *f)
        check.shape(operation, fits, expected, initial_normaliser=z, initial_state=initial_state)
        z = z[..., None]
    # Compiled, a width of e + 1 for an open e makes Inductor fail (ValueRangeError, torch 2.13.0). There numerator and
    # denominator are two calls as well, whose equal parts the compiler merges.
    if (q_normaliser is None or k_normaliser is None) and not torch.compiler.is_compiling():
        S = None if z is None else torch.cat([check.island(initial_state), z], dim=-1)
        both = form(q, k, torch.cat([v, one], dim=-1), initial_state=S, **shared)
        (above, below), (state, z) = (x.split([v.shape[-1], 1], dim=-1) for x in both)
    else:
        pair = (
            ("q_normaliser", q if q_normaliser is None else q_normaliser),
            ("k_normaliser", k if k_normaliser is None else k_normaliser),
        )
        q_z, k_z = (check.island(check.real(operation, name, x)) for name, x in pair)
        fits = q_z.ndim == 4 and q_z.shape == k_z.shape and q_z.shape[:3] == v.shape[:3]
        check.shape(operation, fits, "both of shape (b, n, h, f)", q_normaliser=q_z, k_normaliser=k_z, v=v)
        above, state = form(q, k, v, initial_state=initial_state, **shared)
        below, z = form(q_z, k_z, one, initial_state=z, **shared)
    below = below + epsilon
    zero = below == 0
    # Two choices, for the gradient: a quotient that is not used must be finite all the same.
    output = (above / below.masked_fill(zero, 1)).masked_fill(zero, 0)
    return NormalisedLinearAttention(output.to(dtype), state, z.squeeze(-1))


class _Given(NamedTuple):
    """Checked arguments, heads before tokens, all in one dtype; q is scaled, masked tokens are 0 in k and g."""

    q: Tensor
    k: Tensor
    v: Tensor
    # (b, h, n, 1 or d) in the dtype of sums of log decays.
    g: Tensor | None
    bounds: Tensor | None
    # (s, h, d, e)
    state: Tensor


def _run(
    name: str,
    span: Callable[[_Given], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    log_decay: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> LinearAttention:
    """Check the arguments, then apply `span` to them."""
    operation = f"linear_attention.{name}"
    for letter, x in (("q", q), ("k", k), ("v", v)):
        check.real(operation, letter, x)
    check.shape(operation, q.ndim == 4 and q.shape == k.shape, "q and k of one shape (b, n, h, d)", q=q, k=k, v=v)
    b, n, h, d = q.shape
    check.shape(operation, v.ndim == 4 and v.shape[:3] == (b, n, h), "v of shape (b, n, h, e)", q=q, k=k, v=v)
    check.domain(operation, _finite(scale), "a finite scale", scale=scale)
    dtype = check.island(q).dtype
    heads = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]
    g, bounds = None, None
    if log_decay is not None:
        g = check.real(operation, "log_decay", log_decay)
        fits = g.shape == (b, n, h) or g.shape == (b, n, h, d)
        check.shape(operation, fits, "log_decay of shape (b, n, h) or (b, n, h, d)", log_decay=g, q=q)
        g = g.to(torch.float32 if g.device.type == "mps" else torch.float64)
        g = (g if g.ndim == 4 else g[..., None]).transpose(1, 2)
    if mask is not None:
        hidden = ~check.boolean(operation, "mask", mask)
        check.shape(operation, mask.shape == (b, n), "a mask of shape (b, n)", mask=mask, q=q)
        hidden = hidden[:, None, :, None]
        heads[1], g = heads[1].masked_fill(hidden, 0), None if g is None else g.masked_fill(hidden, 0)
    if cu_seqlens is not None:
        bounds = check.integer(operation, "cu_seqlens", cu_seqlens)
        check.shape(operation, bounds.ndim == 1 and len(bounds) > 1, "one bound more than documents", cu_seqlens=bounds)
        check.shape(operation, b == 1, "a batch of one when documents are packed", q=q, cu_seqlens=bounds)
    expected = (b if bounds is None else len(bounds) - 1, h, d, v.shape[-1])
    if initial_state is None:
        state = heads[2].new_zeros(expected)
    else:
        state = check.real(operation, "initial_state", initial_state).to(dtype)
        text = "one initial_state (h, d, e) per sequence or document"
        check.shape(operation, state.shape == expected, text, initial_state=state, q=q, v=v)
    output, state = span(_Given(heads[0] * scale, heads[1], heads[2], g, bounds, state))
    return LinearAttention(output.transpose(1, 2).to(q.dtype), state)


def _recurrent(x: _Given) -> tuple[Tensor, Tensor]:
    n = x.q.shape[2]
    if n == 0:
        return x.v, x.state
    # A document sees the tokens of the others as if they were masked.
    member = _members(x.bounds, n, x.q.device)[..., None, None, None]
    decay = x.q.new_ones(1).expand(1, 1, n, 1) if x.g is None else x.g.exp().to(x.q.dtype)
    tokens = (*(y.movedim(2, 0).contiguous() for y in (x.q, x.k, x.v, decay)), member)

    def token(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, decay, member = now
        S = torch.where(member, decay[..., None] * S + k[..., None] * v[..., None, :], S)
        row = (q[..., None, :] @ S).squeeze(-2)
        return S, row if x.bounds is None else (row * member[..., 0]).sum(dim=0, keepdim=True)

    if torch.compiler.is_compiling():
        from torch._higher_order_ops.scan import scan

        S, output = scan(token, x.state, tokens)
        return output.movedim(0, 2), S
    S, rows = x.state, []
    for now in zip(*(y.unbind() for y in tokens), strict=True):
        S, row = token(S, now)
        rows.append(row)
    return torch.stack(rows, dim=2), S


def _quadratic(x: _Given) -> tuple[Tensor, Tensor]:
    n = x.q.shape[2]
    member = _members(x.bounds, n, x.q.device)
    own = (member[:, None] & member).any(dim=-1)
    visible = own.tril()
    reading, writing, state = x.q, x.k, x.state
    if x.g is None:
        scores = (x.q @ x.k.mT).masked_fill(~visible, 0)
    else:
        # Sums that begin with the document: what other documents hold moves them by not so much as a rounding.
        before, after, whole = (m.to(x.g.dtype) @ x.g for m in (visible, own.triu(1), member.mT))
        scores = _scores(x.q, x.k, before, visible)
        reading, writing = reading * _exp(before, reading), writing * _exp(after, writing)
        state = state * _exp(whole.movedim(2, 0).flatten(0, 1)[..., None], state)
    if x.bounds is None:
        return scores @ x.v + reading @ x.state, state + writing.mT @ x.v
    D = member.to(x.q.dtype)
    output = scores @ x.v + torch.einsum("ns,bhnd,shde->bhne", D, reading, x.state)
    return output, state + torch.einsum("ns,bhnd,bhne->shde", D, writing, x.v)


def _chunked(x: _Given, chunk_size: int) -> tuple[Tensor, Tensor]:
    n = x.q.shape[2]
    # No chunk needs to be longer than the array.
    grid = _grid(x.bounds, n, min(chunk_size, max(n, 1)), x.q.device)
    q, k, v = (_laid(y, grid) for y in (x.q, x.k, x.v))
    reading, writing, whole = q, k, None
    if x.g is None:
        local = (q @ k.mT).tril() @ v
    else:
        g = _laid(x.g, grid)
        G = g.cumsum(dim=-2)
        whole = G[..., -1, :]
        reading, writing = q * _exp(G, q), k * _exp(whole[..., None, :] - G, k)
        if g.shape[-1] == 1:
            local = _scores(q, k, G, q.new_ones(grid.size, grid.size, dtype=torch.bool).tril()) @ v
        else:
            local = _halved(q, k, v, g)
    before, state = _states(writing.mT @ v, whole, grid, x)
    return _tokens(local + reading @ before, grid, n), state


def _bidirectional(x: _Given) -> tuple[Tensor, Tensor]:
    if x.bounds is None:
        S = x.state + x.k.mT @ x.v
        return x.q @ S, S
    n = x.q.shape[2]
    grid = _grid(x.bounds, n, _SPAN, x.q.device)
    q, k, v = (_laid(y, grid) for y in (x.q, x.k, x.v))
    own = torch.arange(len(x.state), device=q.device)[:, None] == grid.owner
    S = x.state + torch.einsum("sg,bhgde->shde", own.to(q.dtype), k.mT @ v)
    return _tokens(q @ S.transpose(0, 1)[:, grid.owner], grid, n), S


class _Grid(NamedTuple):
    """How tokens are laid out in chunks of `size`, every document beginning with one of its own."""

    size: int
    # Whose a chunk is, the first chunk after every document, and the place of every token (None: its own number).
    owner: Tensor
    after: Tensor
    place: Tensor | None


def _grid(bounds: Tensor | None, n: int, size: int, device: torch.device) -> _Grid:
    if bounds is None:
        owner = torch.zeros(max(-(-n // size), 1), dtype=torch.int64, device=device)
        return _Grid(size, owner, owner[:1] + len(owner), None)
    documents = len(bounds) - 1
    chunks = (bounds.diff() + (size - 1)).div(size, rounding_mode="floor")
    after = chunks.cumsum(dim=0)
    t = torch.arange(n, device=device)
    document = torch.searchsorted(bounds[1:], t, right=True)
    place = (after - chunks)[document] * size + (t - bounds[document])
    # As many chunks as there can be; those past the last document stay empty.
    number = torch.arange(max((n + documents * (size - 1)) // size, 1), device=device)
    owner = torch.searchsorted(after, number, right=True).clamp(max=documents - 1)
    return _Grid(size, owner, after, place)


def _laid(x: Tensor, grid: _Grid) -> Tensor:
    # (b, h, n, f) to (b, h, chunks, size, f), 0 where no token stands.
    room = len(grid.owner) * grid.size
    if grid.place is None:
        # contiguous: padding by 0 keeps the order of memory, padding as torch.compile foresees it does not.
        x = functional.pad(x.contiguous(), (0, 0, 0, room - x.shape[2]))
    else:
        x = x.new_zeros(*x.shape[:2], room, x.shape[3]).index_copy(2, grid.place, x)
    return x.unflatten(2, (len(grid.owner), grid.size))


def _tokens(x: Tensor, grid: _Grid, n: int) -> Tensor:
    # The way back of _laid.
    x = x.flatten(2, 3)
    return x[:, :, :n] if grid.place is None else x[:, :, grid.place]


def _states(stored: Tensor, whole: Tensor | None, grid: _Grid, x: _Given) -> tuple[Tensor, Tensor]:
    """The state before every chunk and after every document, from what the chunks store and how much they decay."""
    if whole is None and x.bounds is None:
        S = torch.cat([x.state[:, :, None], stored], dim=2).cumsum(dim=2)
        return S[:, :, :-1], S[:, :, -1]
    # Every state reads the chunks of its document that lie before its own time.
    chunks, documents = len(grid.owner), len(grid.after)
    number = torch.arange(chunks, device=stored.device)
    time = torch.cat([number, grid.after])[:, None]
    of = torch.cat([grid.owner, torch.arange(documents, device=stored.device)])
    reads = (of[:, None] == grid.owner) & (number < time)
    S = x.state[:, :, None] if x.bounds is None else x.state.transpose(0, 1)[None, :, of]
    if whole is None:
        S = S + (reads.to(stored.dtype) @ stored.flatten(-2)).unflatten(-1, stored.shape[-2:])
    else:
        G = reads.to(whole.dtype) @ whole
        past = (G[:, :, :chunks] + whole).mT[..., None, :]
        # One matrix per decay, (b, h, 1 or d, states, chunks); it acts on the features that share it.
        weights = _exp((G.mT[..., None] - past).masked_fill(~reads, -math.inf), stored)
        f = whole.shape[-1]
        parts = stored.unflatten(3, (f, stored.shape[3] // f)).transpose(2, 3)
        parts = (weights @ parts.flatten(-2)).unflatten(-1, parts.shape[-2:]).transpose(2, 3)
        S = parts.flatten(3, 4) + _exp(G, S)[..., None] * S
    last = S[:, :, -1] if x.bounds is None else S[0, :, chunks:].transpose(0, 1)
    return S[:, :, :chunks], last


def _scores(q: Tensor, k: Tensor, G: Tensor, visible: Tensor) -> Tensor:
    """q k' . exp(G_i - G_j) where visible, for cumulative log decays G."""
    if G.shape[-1] == 1:
        return (q @ k.mT) * _exp((G - G.mT).masked_fill(~visible, -math.inf), q)
    decay = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(~visible[..., None], -math.inf)
    return torch.einsum("...nd,...nmd,...md->...nm", q, _exp(decay, q), k)


def _halved(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Causal attention with a decay per feature, by halves: (..., c, d) without c x c x d numbers.

    Between the second half of a block and its first, exp(G_i - G_j) is the product of two factors of at most 1, the
    decay since the middle and the decay until the middle; inside the halves, the same again.
    """
    c, size, m = q.shape[-2], 1, 1
    while size < c:
        size *= 2
    q, k, v, g = (functional.pad(x, (0, 0, 0, size - c)) for x in (q, k, v, g))
    G = g.cumsum(dim=-2)
    output = (q * k).sum(dim=-1, keepdim=True) * v
    while m < size:
        parts = (x.unflatten(-2, (size // (2 * m), 2, m)).unbind(-3) for x in (q, k, v, G, output))
        (_, q2), (k1, _), (v1, _), (G1, G2), (o1, o2) = parts
        middle = G1[..., -1:, :]
        scores = (q2 * _exp(G2 - middle, q2)) @ (k1 * _exp(middle - G1, k1)).mT
        output = torch.cat([o1, o2 + scores @ v1], dim=-2).flatten(-3, -2)
        m *= 2
    return output[..., :c, :]


def _exp(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).exp()


def _members(bounds: Tensor | None, n: int, device: torch.device) -> Tensor:
    # (n, documents)
    if bounds is None:
        return torch.ones(n, 1, dtype=torch.bool, device=device)
    t = torch.arange(n, device=device)[:, None]
    return (bounds[:-1] <= t) & (t < bounds[1:])


def _finite(number: float) -> bool:
    return isinstance(number, (int, float)) and -math.inf < number < math.inf
