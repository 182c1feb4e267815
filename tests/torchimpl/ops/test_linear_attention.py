"""Linear attention in torch: hand-worked states, forms against each other, gradients, 16 bits, captured graphs."""

import functools
import math

import numpy as np
import pytest
import torch

from refimpl.check import DomainError, ShapeError
from tests.golden import fla
from torchimpl.ops import linear_attention as la

FORMS = {
    "recurrent": la.recurrent,
    "quadratic": la.quadratic,
    "chunks of 1": functools.partial(la.chunked, chunk_size=1),
    "chunks of 3": functools.partial(la.chunked, chunk_size=3),
    "one chunk": functools.partial(la.chunked, chunk_size=10**9),
}


def draw(seed, b, n, h=2, d=3, e=5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, h, width, generator=rng, dtype=dtype) for width in (d, d, e)]


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[None, :, None, None]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_three_tokens_worked_by_hand(form):
    q, k, v = column(1.0, 2.0, 3.0), column(1.0, 10.0, 100.0), column(1.0, 1.0, -1.0)
    out = form(q, k, v, scale=2.0)
    # States 1, 11, -89.
    assert out.output.flatten().tolist() == [2, 44, -534]
    assert out.state.flatten().tolist() == [-89]
    # The state halves before a token is added, and begins at 8: 4 + 1, 2.5 + 10, 6.25 - 100.
    halving = torch.full((1, 3, 1), -math.log(2.0), dtype=torch.float64)
    start = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64)
    out = form(q, k, v, scale=2.0, log_decay=halving, initial_state=start)
    torch.testing.assert_close(out.output.flatten(), torch.tensor([10, 50, -562.5], dtype=torch.float64))
    # The second token is masked: 4 + 1, 5, 2.5 - 100.
    mask = torch.tensor([[True, False, True]])
    out = form(q, k, v, scale=2.0, log_decay=halving, initial_state=start, mask=mask)
    torch.testing.assert_close(out.output.flatten(), torch.tensor([10, 20, -585.0], dtype=torch.float64))
    # Documents of one token, none, and two, each from a state of its own.
    bounds, starts = torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 2, 3], dtype=torch.float64)[:, None, None, None]
    out = form(q, k, v, scale=1.0, cu_seqlens=bounds, initial_state=starts)
    assert out.output.flatten().tolist() == [2, 26, -261]
    assert out.state.flatten().tolist() == [2, 2, -87]


def test_bidirectional_worked_by_hand():
    q, k, v = column(1.0, 2.0, 3.0), column(1.0, 10.0, 100.0), column(1.0, 1.0, -1.0)
    assert la.bidirectional(q, k, v, scale=1.0).output.flatten().tolist() == [-89, -178, -267]
    starts = torch.tensor([1.0, 2, 3], dtype=torch.float64)[:, None, None, None]
    out = la.bidirectional(q, k, v, scale=1.0, cu_seqlens=torch.tensor([0, 1, 1, 3]), initial_state=starts)
    assert out.output.flatten().tolist() == [2, -174, -261]
    assert out.state.flatten().tolist() == [2, 2, -87]


@pytest.mark.parametrize("name", fla.FORMS)
def test_flash_linear_attention(name):
    """In float64, and in float32 within what the judge permits the form that it ran."""
    run, chunk = fla.Run(name), fla.CHUNKS.get(name)
    form = getattr(la, fla.FORMS[name])
    form = form if chunk is None else functools.partial(form, chunk_size=chunk)
    call = functools.partial(la.normalised, form=form) if run.normalised else form

    def results(dtype):
        given = {k: torch.tensor(v, dtype=dtype) if isinstance(v, np.ndarray) else v for k, v in run.arguments.items()}
        return call(**given)

    for found, expected in zip(results(torch.float64), run.double, strict=False):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-12, atol=1e-12)
    for found, expected, ball in zip(results(torch.float32), run.double, run.balls(), strict=False):
        # The running state may be kept in more.
        assert (np.abs(found.double().numpy() - expected) <= ball.rad).all()


def test_flash_linear_attentions_scores():
    """Values that are one key each show the score of that key."""
    run = fla.Run("simple_gla_parallel")
    b, n, h, _ = run.arguments["q"].shape
    arguments = run.arguments | {"v": np.broadcast_to(np.eye(n)[None, :, None], (b, n, h, n)).copy()}
    expected = run.arrays["scores"].swapaxes(1, 2)

    def scores(dtype):
        given = {k: torch.tensor(v, dtype=dtype) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        return la.quadratic(**given).output.double().numpy()

    np.testing.assert_allclose(scores(torch.float64), expected, rtol=1e-12, atol=1e-12)
    assert (np.abs(scores(torch.float32) - expected) <= run.balls(v=arguments["v"])[0].rad).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "feature"])
def test_all_forms_are_one(decay, packed):
    b, n = (1, 13) if packed else (2, 13)
    q, k, v = draw(1, b, n)
    rng = torch.Generator().manual_seed(2)
    given = {"scale": 0.7, "mask": torch.rand(b, n, generator=rng) < 0.7}
    if decay:
        shape = (b, n, 2) if decay == "head" else (b, n, 2, 3)
        given["log_decay"] = -3 * torch.rand(*shape, generator=rng, dtype=torch.float64)
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 4, 4, 11, 13])
    given["initial_state"] = torch.randn(4 if packed else b, 2, 3, 5, generator=rng, dtype=torch.float64)
    expected = la.recurrent(q, k, v, **given)
    for form in list(FORMS.values())[1:]:
        for one, other in zip(form(q, k, v, **given), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_tokens_may_be_split_anywhere():
    q, k, v = draw(3, 2, 11)
    g = -torch.rand(2, 11, 2, 3, dtype=torch.float64)
    whole = la.chunked(q, k, v, chunk_size=4, scale=0.5, log_decay=g)
    for cut in (0, 1, 6, 11):
        first = la.chunked(q[:, :cut], k[:, :cut], v[:, :cut], chunk_size=4, scale=0.5, log_decay=g[:, :cut])
        last = (x[:, cut:] for x in (q, k, v))
        second = la.chunked(*last, chunk_size=4, scale=0.5, log_decay=g[:, cut:], initial_state=first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], dim=1), whole.output)
        torch.testing.assert_close(second.state, whole.state)


def test_strong_decay_neither_overflows_nor_loses_digits():
    # exp(-G) is beyond float32 after the first token, and G reaches 2 ** 17.
    n = 4096
    q, k, v = (torch.ones(1, n, 1, 2) for _ in range(3))
    g = torch.full((1, n, 1, 2), -32.0)
    g[:, -1] = -0.5
    for form in (la.quadratic, functools.partial(la.chunked, chunk_size=64)):
        out = form(q[:, -700:], k[:, -700:], v[:, -700:], scale=1.0, log_decay=g[:, -700:, :, 0])
        assert out.output[0, -1, 0, 0] == pytest.approx(2 * (1 + math.exp(-0.5)), rel=1e-6)
    out = la.chunked(q, k, v, chunk_size=64, scale=1.0, log_decay=g)
    assert out.output[0, -1, 0, 0] == pytest.approx(2 * (1 + math.exp(-0.5)), rel=1e-6)


def test_normalised_worked_by_hand():
    q, k, v = column(1.0, 1.0, 1.0), column(1.0, 3.0, 4.0), column(8.0, 4.0, -4.0)
    out = la.normalised(q, k, v, form=la.recurrent, scale=0.5, epsilon=0.0)
    assert out.output.flatten().tolist() == [8, 5, 0.5]
    assert (out.state.item(), out.normaliser.item()) == (4, 8)
    # One and the same with a denominator of its own; epsilon meets the scaled sum.
    own = la.normalised(q, k, v, form=la.quadratic, scale=0.5, epsilon=0.5, q_normaliser=q, k_normaliser=k)
    torch.testing.assert_close(own.output.flatten(), torch.tensor([4, 10 / 2.5, 2 / 4.5], dtype=torch.float64))


def test_normalised_row_without_a_key_is_zero_with_a_finite_gradient():
    q, k, v = (x.abs().requires_grad_() for x in draw(4, 1, 5))
    mask = torch.tensor([[False, False, True, True, False]])
    out = la.normalised(q, k, v, form=la.quadratic, scale=1.0, epsilon=0.0, mask=mask)
    assert (out.output[:, :2] == 0).all()
    out.output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (k.grad[:, :2] == 0).all()


@pytest.mark.parametrize("form", [*list(FORMS)[:2], "chunks of 3"])
@pytest.mark.parametrize("decay", [(), (2,), (2, 3)], ids=["none", "head", "feature"])
def test_gradients(form, decay):
    q, k, v = (x.requires_grad_() for x in draw(5, 1, 5, e=2))
    S = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    g = (-torch.rand(1, 5, *decay, dtype=torch.float64) - 0.1).requires_grad_() if decay else None
    # The second document is empty, the first token masked throughout.
    fixed = {"cu_seqlens": torch.tensor([0, 1, 1, 5]), "mask": torch.tensor([[False, True, True, False, True]])}

    def call(q, k, v, S, *g):
        given = fixed | ({"log_decay": g[0]} if g else {})
        return tuple(FORMS[form](q, k, v, scale=0.7, initial_state=S, **given))

    assert torch.autograd.gradcheck(call, (q, k, v, S, *([] if g is None else [g])))


def test_gradients_of_the_rest():
    q, k, v = (x.abs().requires_grad_() for x in draw(6, 1, 4, e=2))
    fixed = {"scale": 0.7, "mask": torch.tensor([[False, True, True, False]])}
    whole = functools.partial(la.bidirectional, cu_seqlens=torch.tensor([0, 1, 4]))
    assert torch.autograd.gradcheck(lambda *x: tuple(whole(*x, **fixed)), (q, k, v))
    form = functools.partial(la.chunked, chunk_size=2)
    for epsilon in (0.0, 0.5):
        run = functools.partial(la.normalised, form=form, epsilon=epsilon, **fixed)
        assert torch.autograd.gradcheck(lambda *x, run=run: tuple(run(*x)), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [la.recurrent, la.quadratic, functools.partial(la.chunked, chunk_size=64)])
def test_sixteen_bits_neither_stall_nor_overflow(form, dtype):
    n = 1024
    ones = torch.ones(1, n, 1, 1, dtype=dtype)
    out = form(ones, ones, ones, scale=1.0)
    assert out.output.dtype == dtype
    # A running sum in bfloat16 would stop at 256.
    assert out.output[0, -1].item() == n
    assert (out.state.dtype, out.state.item()) == (torch.float32, n)
    # k v = 90000 is beyond float16, the scaled output is not.
    large = torch.full((1, 3, 1, 1), 300.0, dtype=dtype)
    out = form(ones[:, :3], large, large, scale=2.0**-10)
    assert out.output[0, -1].item() == pytest.approx(3 * 90000 / 1024, rel=2**-8)


def test_state_handed_on_token_by_token_does_not_stall():
    one, state = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), None
    for _ in range(512):
        state = la.recurrent(one, one, one, scale=1.0, initial_state=state).state
    assert state.item() == 512


def test_normalised_in_sixteen_bits_divides_in_float32():
    ones = torch.ones(1, 4096, 1, 1, dtype=torch.bfloat16)
    form = functools.partial(la.chunked, chunk_size=64)
    out = la.normalised(ones, ones, 3 * ones, form=form, scale=1.0, epsilon=0.0)
    assert out.output.dtype == torch.bfloat16 and (out.output == 3).all()
    assert (out.normaliser.dtype, out.normaliser.item()) == (torch.float32, 4096)


def test_the_loop_over_tokens_is_captured():
    run = functools.partial(la.recurrent, scale=0.5, cu_seqlens=torch.tensor([0, 2, 2, 7]))
    captured = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    q, k, v = draw(7, 1, 7)
    torch.testing.assert_close(captured(q, k, v), run(q, k, v))


def test_compiled_chunks_equal_eager_ones():
    run = functools.partial(la.chunked, chunk_size=4, scale=0.5)
    q, k, v = draw(8, 2, 11, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v), rtol=1e-5, atol=1e-5)


def error(kind, text, function, *arguments, **options):
    with pytest.raises(kind, match=text):
        function(*arguments, **options)


def test_errors():
    q, k, v = draw(9, 2, 4)
    bounds = torch.tensor([0, 1, 4])
    run = functools.partial(la.recurrent, scale=1.0)
    error(ShapeError, "q and k of one shape", run, q, k[:, :3], v)
    error(ShapeError, "v of shape", run, q, k, v[:, :3])
    error(DomainError, "k must be a floating tensor", run, q, k.long(), v)
    error(DomainError, "finite scale", la.recurrent, q, k, v, scale=math.inf)
    error(ShapeError, "log_decay of shape", run, q, k, v, log_decay=-q[..., :2])
    error(DomainError, "log_decay must be", run, q, k, v, log_decay=q.long())
    error(DomainError, "mask must be a boolean", run, q, k, v, mask=torch.ones(2, 4))
    error(ShapeError, "a mask of shape", run, q, k, v, mask=torch.ones(2, 3, dtype=torch.bool))
    error(ShapeError, "a batch of one", run, q, k, v, cu_seqlens=bounds)
    error(DomainError, "cu_seqlens must be", run, q[:1], k[:1], v[:1], cu_seqlens=bounds.double())
    error(ShapeError, "one bound more", run, q[:1], k[:1], v[:1], cu_seqlens=bounds[:1])
    error(ShapeError, "one initial_state", run, q, k, v, initial_state=v)
    for size in (0, 2.0):
        error(DomainError, "chunk_size >= 1", la.chunked, q, k, v, chunk_size=size, scale=1.0)
    normal = functools.partial(la.normalised, form=la.recurrent, scale=1.0)
    error(DomainError, "form to be", la.normalised, q, k, v, form="recurrent", scale=1.0, epsilon=0.0)
    error(DomainError, "epsilon >= 0", normal, q, k, v, epsilon=-1.0)
    S = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    error(DomainError, "both or neither", normal, q, k, v, epsilon=0.0, initial_state=S)
    error(DomainError, "both or neither", normal, q, k, v, epsilon=0.0, q_normaliser=q)
    error(ShapeError, r"\(b, n, h, f\)", normal, q, k, v, epsilon=0.0, q_normaliser=q, k_normaliser=k[:, :3])
    error(ShapeError, "beside", normal, q, k, v, epsilon=0.0, initial_state=S, initial_normaliser=S[..., 0, :])
