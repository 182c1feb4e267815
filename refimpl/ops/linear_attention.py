"""Linear attention: a state of summed key-value products stands in for the attention matrix.

    o_t = scale q_t S_t,   S_t = exp(g_t) S_{t-1} + k_t' v_t,   g_t <= 0 the log decay, 0 where there is none

Source: Katharopoulos et al. 2020, equations 8 to 12 and 16 to 20; kexue.fm 7546; with decay, Yang et al. 2023 (GLA).
A feature map such as activation.elu_plus_one is applied to q and k by the caller.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from refimpl import check


class LinearAttention(NamedTuple):
    """The output and the state after the last token, one state per sequence or per packed document."""

    output: Float[np.ndarray, "b n h e"]
    state: Float[np.ndarray, "s h d e"]


class NormalisedLinearAttention(NamedTuple):
    """The output, the state and the summed keys (the normaliser z) after the last token."""

    output: Float[np.ndarray, "b n h e"]
    state: Float[np.ndarray, "s h d e"]
    normaliser: Float[np.ndarray, "s h f"]


def recurrent(
    q: Shaped[np.ndarray, "b n h d"],
    k: Shaped[np.ndarray, "b n h d"],
    v: Shaped[np.ndarray, "b n h e"],
    *,
    scale: float,
    log_decay: Shaped[np.ndarray, "b n h *f"] | None = None,
    mask: Bool[np.ndarray, "b n"] | None = None,
    cu_seqlens: Int[np.ndarray, " p"] | None = None,
    initial_state: Shaped[np.ndarray, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention, token after token.

        S = exp(g_t) S + k_t' v_t,   o_t = scale q_t S
    log_decay g is one number per head (b, n, h) or per key feature (b, n, h, d). cu_seqlens (0, ..., n) bounds the
    documents packed into a batch of one; initial_state and the final state then hold one state per document.

    C1. Row t must read a state that already holds token t, and nothing of the tokens after t.
    C2. The state must decay before token t is added; a log decay of zero must equal no decay.
    C3. A masked token (mask False) must leave the state as it was: its key, value and decay count for nothing.
    C4. Tokens split anywhere, the state handed on, must give the output and the state of the whole.
    C5. A packed document must start from its own initial state, end in its own, and see no other document.
    C6. No tokens, or an empty document, must return the initial state.
    C7. The scale must multiply what is read (initial state included), never what is stored.
    Raises: ShapeError; DomainError for a positive log_decay, for cu_seqlens that do not rise from 0 to n.
    Precision: bounded against ((|q||k|' . decay)|v| + |q||S_0| . decay) |scale|, decayed like the values themselves.
    Source: Katharopoulos et al. 2020, equations 18 to 20 (scale 1). Retention: log_decay = ln(1 - 2^(-5-h)).
    Differs: flash-linear-attention and ONNX LinearAttention scale by d^(-1/2) unless told (ONNX: also for scale 0, and
    its default rule is gated_delta). fla's layer masks v alone, so padded keys stay in a normaliser.
    """
    return _run("recurrent", _recurrent, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def quadratic(
    q: Shaped[np.ndarray, "b n h d"],
    k: Shaped[np.ndarray, "b n h d"],
    v: Shaped[np.ndarray, "b n h e"],
    *,
    scale: float,
    log_decay: Shaped[np.ndarray, "b n h *f"] | None = None,
    mask: Bool[np.ndarray, "b n"] | None = None,
    cu_seqlens: Int[np.ndarray, " p"] | None = None,
    initial_state: Shaped[np.ndarray, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention through its n x n scores.

        o = scale ((q k' . exp(G_i - G_j)) on and below the diagonal) v + scale (q exp(G)) S_0,   G = cumulative g

    C1. Output and state must equal those of `recurrent` for the same arguments.
    Raises: as `recurrent`.
    Precision: as `recurrent`; a difference of G carries an error of |G| roundings, so strong decay over a long span
    loses digits that `recurrent` and small chunks keep.
    Source: Katharopoulos et al. 2020, equation 8 with a causal mask.
    Differs: the parallel forms of flash-linear-attention take no initial state.
    """
    return _run("quadratic", _quadratic, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def chunked(
    q: Shaped[np.ndarray, "b n h d"],
    k: Shaped[np.ndarray, "b n h d"],
    v: Shaped[np.ndarray, "b n h e"],
    *,
    chunk_size: int,
    scale: float,
    log_decay: Shaped[np.ndarray, "b n h *f"] | None = None,
    mask: Bool[np.ndarray, "b n"] | None = None,
    cu_seqlens: Int[np.ndarray, " p"] | None = None,
    initial_state: Shaped[np.ndarray, "s h d e"] | None = None,
) -> LinearAttention:
    """Causal linear attention, quadratic inside chunks of chunk_size tokens and recurrent between them.

        chunk g of every document: quadratic(q_g, k_g, v_g) from the state S_g that the chunks before it left

    C1. Output and state must equal those of `recurrent` for any chunk_size >= 1; the last chunk may be shorter.
    C2. Chunks must be counted from the start of each document, not of the packed array.
    Raises: as `recurrent`; DomainError for chunk_size < 1.
    Precision: as `recurrent`, with one rounding more per chunk where the state is stored.
    Source: Hua et al. 2022 (FLASH), section 3.3; Yang et al. 2023, section 4.
    Differs: flash-linear-attention's naive form fixes chunks of 64 that must divide n, and drops the initial state.
    """
    size = check.integer("linear_attention.chunked", "chunk_size", chunk_size)
    check.shape("linear_attention.chunked", size.ndim == 0, "a single chunk_size", chunk_size=size)
    check.domain("linear_attention.chunked", bool(size >= 1), "chunk_size >= 1", chunk_size=chunk_size)
    span = partial(_chunked, chunk_size=int(size))
    return _run("chunked", span, q, k, v, scale, log_decay, mask, cu_seqlens, initial_state)


def bidirectional(
    q: Shaped[np.ndarray, "b n h d"],
    k: Shaped[np.ndarray, "b n h d"],
    v: Shaped[np.ndarray, "b n h e"],
    *,
    scale: float,
    mask: Bool[np.ndarray, "b n"] | None = None,
    cu_seqlens: Int[np.ndarray, " p"] | None = None,
    initial_state: Shaped[np.ndarray, "s h d e"] | None = None,
) -> LinearAttention:
    """Linear attention in which every token reads the state of the whole sequence; there is no decay.

        S = S_0 + k' v,   o_t = scale q_t S

    C1. Every row must read the same state: that of all tokens of its own document that the mask keeps.
    C2. The last row and the state must equal those of `recurrent` without decay.
    Raises: as `recurrent`.
    Precision: bounded against (|q| (|k|'|v| + |S_0|)) |scale|.
    Source: Katharopoulos et al. 2020, equations 5 and 6; kexue.fm 7546.
    Differs: FLASH divides by n (mixed_chunk_attention).
    """
    return _run("bidirectional", _bidirectional, q, k, v, scale, None, mask, cu_seqlens, initial_state)


def normalised(
    q: Shaped[np.ndarray, "b n h d"],
    k: Shaped[np.ndarray, "b n h d"],
    v: Shaped[np.ndarray, "b n h e"],
    *,
    form: Callable[..., LinearAttention],
    scale: float,
    epsilon: float,
    q_normaliser: Shaped[np.ndarray, "b n h f"] | None = None,
    k_normaliser: Shaped[np.ndarray, "b n h f"] | None = None,
    mask: Bool[np.ndarray, "b n"] | None = None,
    cu_seqlens: Int[np.ndarray, " p"] | None = None,
    initial_state: Shaped[np.ndarray, "s h d e"] | None = None,
    initial_normaliser: Shaped[np.ndarray, "s h f"] | None = None,
) -> NormalisedLinearAttention:
    """Linear attention divided by the sum of its weights.

    form is one of the functions above; its chunk_size or log_decay is bound with functools.partial.

        o_t = scale q_t S_t / (scale <q_t, z_t> + epsilon),   z the state of form for values that are all one
    q_normaliser and k_normaliser stand in for q and k in the denominator: give q and k rotated (rope) and these two
    not, and the denominator stays positive. Features should be non-negative, or the denominator may vanish.

    C1. With epsilon 0 and v constant over the tokens the output must be v itself.
    C2. A masked key must leave both the state and the normaliser.
    C3. Where the denominator is exactly zero (no key left, epsilon 0) the output must be zero.
    C4. epsilon must be added once, to the scaled sum. State and normaliser must be handed on together.
    C5. The denominator must be formed from q_normaliser and k_normaliser where they are given, and z then sums those.
    Raises: as `form`; DomainError for a negative epsilon, or where one argument of a pair is given without the other.
    Precision: the quotient rule; the denominator against |q||k|' summed. No information where it is mostly cancelled.
    Source: Katharopoulos et al. 2020, equations 18 to 20; the un-rotated denominator, kexue.fm 8265.
    Differs: epsilon is 1e-10 in flash-linear-attention, 1e-6 in Katharopoulos's code. fla normalises by default in
    chunk_linear_attn only, and returns z as (b, 1, h, d).
    """
    operation = "linear_attention.normalised"
    check.domain(operation, callable(form), "form to be one of the functions of this module", form=form)
    eps = check.real(operation, "epsilon", epsilon)
    check.shape(operation, eps.ndim == 0, "a single epsilon", epsilon=eps)
    check.domain(operation, bool(eps >= 0), "epsilon >= 0", epsilon=epsilon)
    for names, one, other in (
        ("initial_state and initial_normaliser", initial_state, initial_normaliser),
        ("q_normaliser and k_normaliser", q_normaliser, k_normaliser),
    ):
        check.domain(operation, (one is None) == (other is None), f"{names}, both or neither", given=one is not None)
    shared: dict[str, Any] = {"scale": scale, "mask": mask, "cu_seqlens": cu_seqlens}
    numerator = form(q, k, v, initial_state=initial_state, **shared)
    b, n, h, _ = numerator.output.shape
    q_z = check.real(operation, "q_normaliser", q if q_normaliser is None else q_normaliser)
    k_z = check.real(operation, "k_normaliser", k if k_normaliser is None else k_normaliser)
    fits = q_z.ndim == 4 and q_z.shape == k_z.shape and q_z.shape[:3] == (b, n, h)
    check.shape(
        operation, fits, "both of shape (b, n, h, f)", q_normaliser=q_z, k_normaliser=k_z, output=numerator.output
    )
    z = None
    if initial_normaliser is not None:
        z = check.real(operation, "initial_normaliser", initial_normaliser)
        expected = (*numerator.state.shape[:2], k_z.shape[-1])
        check.shape(operation, z.shape == expected, f"initial_normaliser of shape {expected}", initial_normaliser=z)
        z = z[..., None]
    weights = form(q_z, k_z, np.ones((b, n, h, 1)), initial_state=z, **shared)
    denominator = weights.output + eps
    # both branches of where are evaluated: the divisor is made 1 where the result is not used
    output = np.where(denominator == 0, 0.0, numerator.output / np.where(denominator == 0, 1.0, denominator))
    return NormalisedLinearAttention(output, numerator.state, weights.state[..., 0])


Array = np.ndarray
Span = Callable[..., tuple[Array, Array]]


def _run(
    name: str, span: Span, q: Any, k: Any, v: Any, scale: Any, log_decay: Any, mask: Any, cu_seqlens: Any, state: Any
) -> LinearAttention:
    """Check the arguments, then apply `span` to the tokens of each document."""
    operation = f"linear_attention.{name}"
    q, k, v = (check.real(operation, letter, x) for letter, x in (("q", q), ("k", k), ("v", v)))
    check.shape(operation, q.ndim == 4 and q.shape == k.shape, "q and k of one shape (b, n, h, d)", q=q, k=k, v=v)
    b, n, h, d = q.shape
    check.shape(operation, v.ndim == 4 and v.shape[:3] == (b, n, h), "v of shape (b, n, h, e)", q=q, k=k, v=v)
    factor = check.real(operation, "scale", scale)
    check.shape(operation, factor.ndim == 0, "a single scale", scale=factor)
    g = np.zeros((b, n, h, 1))
    if log_decay is not None:
        g = check.real(operation, "log_decay", log_decay)
        fits = g.shape in ((b, n, h), (b, n, h, d))
        check.shape(operation, fits, "log_decay of shape (b, n, h) or (b, n, h, d)", log_decay=g, q=q)
        check.domain(operation, bool((g <= 0).all()), "log_decay <= 0", largest=float(g.max(initial=0)))
        g = g if g.ndim == 4 else g[..., None]
    if mask is not None:
        keep = check.boolean(operation, "mask", mask)
        check.shape(operation, keep.shape == (b, n), "a mask of shape (b, n)", mask=keep, q=q)
        k, g = (np.where(keep[:, :, None, None], x, 0.0) for x in (k, g))
    parts = [(slice(0, n), slice(0, b))]
    if cu_seqlens is not None:
        bounds = check.integer(operation, "cu_seqlens", cu_seqlens)
        check.shape(operation, bounds.ndim == 1 and len(bounds) > 1, "one bound more than documents", cu_seqlens=bounds)
        check.shape(operation, b == 1, "a batch of one when documents are packed", q=q, cu_seqlens=bounds)
        rising = bounds[0] == 0 and bounds[-1] == n and bool((np.diff(bounds) >= 0).all())
        check.domain(operation, bool(rising), f"cu_seqlens rising from 0 to n={n}", cu_seqlens=bounds.tolist())
        pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        parts = [(slice(lo, hi), slice(i, i + 1)) for i, (lo, hi) in enumerate(pairs)]
    sequences = b if cu_seqlens is None else len(parts)
    S = np.zeros((sequences, h, d, v.shape[-1])) if state is None else check.real(operation, "initial_state", state)
    expected = "one initial_state (h, d, e) per sequence or document"
    check.shape(operation, S.shape == (sequences, h, d, v.shape[-1]), expected, initial_state=S, q=q, v=v)
    q = q * factor
    spans = [span(q[:, t], k[:, t], v[:, t], g[:, t], S[i]) for t, i in parts]
    return LinearAttention(np.concatenate([o for o, _ in spans], axis=1), np.concatenate([s for _, s in spans], axis=0))


def _recurrent(q: Array, k: Array, v: Array, g: Array, S: Array) -> tuple[Array, Array]:
    output = np.zeros_like(v)
    for t in range(q.shape[1]):
        S = np.exp(g[:, t, :, :, None]) * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        output[:, t] = np.einsum("bhd,bhde->bhe", q[:, t], S)
    return output, S


def _quadratic(q: Array, k: Array, v: Array, g: Array, S: Array) -> tuple[Array, Array]:
    n = q.shape[1]
    G = np.cumsum(g, axis=1)
    total = g.sum(axis=1)
    causal = np.tri(n, dtype=bool)[:, :, None, None]
    # exp of the difference, never a quotient of exps: exp(-G_j) alone overflows
    decay = np.where(causal, np.exp(np.where(causal, G[:, :, None] - G[:, None, :], 0.0)), 0.0)
    decay = np.broadcast_to(decay, (*decay.shape[:-1], q.shape[-1]))
    scores = np.einsum("bnhd,bmhd,bnmhd->bhnm", q, k, decay)
    output = np.einsum("bhnm,bmhe->bnhe", scores, v) + np.einsum("bnhd,bhde->bnhe", q * np.exp(G), S)
    stored = np.einsum("bnhd,bnhe->bhde", k * np.exp(total[:, None] - G), v)
    return output, np.exp(total)[..., None] * S + stored


def _chunked(q: Array, k: Array, v: Array, g: Array, S: Array, *, chunk_size: int) -> tuple[Array, Array]:
    outputs = []
    # one empty chunk where there are no tokens
    for start in range(0, max(q.shape[1], 1), chunk_size):
        t = slice(start, start + chunk_size)
        output, S = _quadratic(q[:, t], k[:, t], v[:, t], g[:, t], S)
        outputs.append(output)
    return np.concatenate(outputs, axis=1), S


def _bidirectional(q: Array, k: Array, v: Array, g: Array, S: Array) -> tuple[Array, Array]:
    S = S + np.einsum("bnhd,bnhe->bhde", k, v)
    return np.einsum("bnhd,bhde->bnhe", q, S), S
