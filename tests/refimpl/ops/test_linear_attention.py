"""Linear attention against hand-worked numbers, flash-linear-attention's own results and its definition as a sum."""

import math
from collections.abc import Iterator
from functools import partial

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import check
from refimpl.ops import linear_attention as la
from tests.golden import collection, fla

CAUSAL = {"recurrent": la.recurrent, "quadratic": la.quadratic} | {
    f"chunked_{c}": partial(la.chunked, chunk_size=c) for c in (1, 2, 3, 7, 64)
}
FORMS = CAUSAL | {"bidirectional": la.bidirectional}
causal = pytest.mark.parametrize("form", CAUSAL.values(), ids=CAUSAL)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def unannotated() -> Iterator[None]:
    """Shape annotations off, so that a wrong shape reaches the operator's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def column(*values: float) -> np.ndarray:
    """One sequence, one head, one feature."""
    return np.array(values).reshape(1, -1, 1, 1)


def example(seed: int = 0, b: int = 2, n: int = 11, h: int = 3, d: int = 5, e: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "q": rng.uniform(0.1, 2, (b, n, h, d)),
        "k": rng.uniform(0.1, 2, (b, n, h, d)),
        "v": rng.standard_normal((b, n, h, e)),
    }


def by_definition(q, k, v, *, scale, log_decay=None, mask=None, initial_state=None, sees_all=False):
    """o_i = scale (sum over j of (q_i . k_j decayed from j to i) v_j + (q_i decayed from the start) S_0).

    Entry by entry, in sums over plain numbers; returns the outputs and the state after the last token.
    """
    b, n, h, d = q.shape
    e = v.shape[-1]
    g = np.zeros((b, n, h, d)) if log_decay is None else log_decay
    g = np.broadcast_to(g if g.ndim == 4 else g[..., None], (b, n, h, d))
    keep = np.ones((b, n), bool) if mask is None else mask
    S0 = np.zeros((b, h, d, e)) if initial_state is None else initial_state
    output, state = np.zeros((b, n, h, e)), np.zeros((b, h, d, e))
    for index in np.ndindex(b, h, e):
        i_b, i_h, i_e = index

        def read(i, f, i_b=i_b, i_h=i_h, i_e=i_e):
            """Feature f of the state that row i reads."""
            total = math.exp(math.fsum(g[i_b, s, i_h, f] for s in range(i + 1) if keep[i_b, s])) * S0[i_b, i_h, f, i_e]
            for j in range(n if sees_all else i + 1):
                if keep[i_b, j]:
                    decay = math.exp(math.fsum(g[i_b, s, i_h, f] for s in range(j + 1, i + 1) if keep[i_b, s]))
                    total += decay * k[i_b, j, i_h, f] * v[i_b, j, i_h, i_e]
            return total

        for i in range(n):
            output[i_b, i, i_h, i_e] = scale * math.fsum(q[i_b, i, i_h, f] * read(i, f) for f in range(d))
        for f in range(d):
            state[i_b, i_h, f, i_e] = read(n - 1, f) if n else S0[i_b, i_h, f, i_e]
    return output, state


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Values worked out by hand


@causal
def test_three_tokens(form) -> None:
    """States 4, 9, 21; the scale multiplies what is read."""
    output, state = form(column(1, 2, 3), column(1, 1, 2), column(4, 5, 6), scale=0.5)
    np.testing.assert_array_equal(output, column(2, 9, 31.5))
    np.testing.assert_array_equal(state, [[[[21.0]]]])


@causal
def test_decay_comes_before_the_token_is_added(form) -> None:
    """Halved each step from 8: 4 + 4 = 8, 4 + 5 = 9, 4.5 + 12 = 16.5."""
    halves = np.full((1, 3, 1), math.log(0.5))
    output, state = form(
        column(1, 2, 3),
        column(1, 1, 2),
        column(4, 5, 6),
        scale=1.0,
        log_decay=halves,
        initial_state=np.full((1, 1, 1, 1), 8.0),
    )
    close(output, column(8, 18, 49.5))
    close(state, np.full((1, 1, 1, 1), 16.5))


def test_every_row_reads_the_whole_without_causality() -> None:
    output, state = la.bidirectional(column(1, 2, 3), column(1, 1, 2), column(4, 5, 6), scale=0.5)
    np.testing.assert_array_equal(output, column(10.5, 21, 31.5))
    np.testing.assert_array_equal(state, [[[[21.0]]]])


@causal
def test_normaliser_and_epsilon(form) -> None:
    """Sums of keys 1, 2, 4: 2 / (0.5 + 0.5), 9 / (2 + 0.5), 31.5 / (6 + 0.5)."""
    output, state, normaliser = la.normalised(
        column(1, 2, 3), column(1, 1, 2), column(4, 5, 6), form=form, scale=0.5, epsilon=0.5
    )
    close(output, column(2, 3.6, 31.5 / 6.5))
    np.testing.assert_array_equal(state, [[[[21.0]]]])
    np.testing.assert_array_equal(normaliser, [[[4.0]]])


def test_normaliser_without_causality() -> None:
    """21 scale q over 4 scale q."""
    output, _, normaliser = la.normalised(
        column(1, 2, 3), column(1, 1, 2), column(4, 5, 6), form=la.bidirectional, scale=0.5, epsilon=0.0
    )
    close(output, column(5.25, 5.25, 5.25))
    np.testing.assert_array_equal(normaliser, [[[4.0]]])


def test_denominator_of_its_own() -> None:
    """Numerator 4, 18, 63 over features that are (1, 1, 1) against sums 2, 3, 7 of other keys."""
    output, _, normaliser = la.normalised(
        column(1, 2, 3),
        column(1, 1, 2),
        column(4, 5, 6),
        form=la.recurrent,
        scale=1.0,
        epsilon=0.0,
        q_normaliser=column(1, 1, 1),
        k_normaliser=column(2, 1, 4),
    )
    close(output, column(2, 6, 9))
    np.testing.assert_array_equal(normaliser, [[[7.0]]])


# Other people's results


@pytest.mark.parametrize("name", [name for name in fla.FORMS if "normalize" not in name])
@causal
def test_flash_linear_attention(form, name) -> None:
    """Retention among them, a constant decay; and the recurrence of HGRN, which is one head per feature."""
    run = fla.Run(name)
    found = form(**run.arguments)
    for got, expected in zip(found, run.double, strict=False):
        close(got, expected)


@pytest.mark.parametrize("name", [name for name in fla.FORMS if "normalize" in name])
@causal
def test_flash_linear_attention_normalised(form, name) -> None:
    run = fla.Run(name)
    for got, expected in zip(la.normalised(**run.arguments, form=form), run.double, strict=True):
        close(got, expected)


@causal
def test_flash_linear_attentions_scores(form) -> None:
    """Values that are one key each show the score of that key."""
    run = fla.Run("simple_gla_parallel")
    b, n, h, _ = run.arguments["q"].shape
    one_hot = {"v": np.broadcast_to(np.eye(n)[None, :, None], (b, n, h, n))}
    close(form(**run.arguments | one_hot).output.swapaxes(1, 2), run.arrays["scores"])
    ball, found = run.balls(**one_hot)[0], run.arrays["float32_scores"].swapaxes(1, 2)
    assert (np.abs(found - ball.value) <= ball.rad).all()
    assert not run.arrays.left - {"float32_o"}


@pytest.mark.parametrize("name", fla.FORMS)
def test_flash_linear_attention_in_float32_errs_as_float32_may(name) -> None:
    """The functions as they are published cast to float32 inside: each result within the bound of the judge."""
    run = fla.Run(name)
    for found, ball in zip(run.single, run.balls(), strict=False):
        assert found.shape == ball.shape and (np.abs(found - ball.value) <= ball.rad).all()
    assert run.arrays.left == ({"scores", "float32_scores"} if name == "simple_gla_parallel" else set())


def test_every_file_of_flash_linear_attention_is_reproduced_or_outside() -> None:
    assert collection.collected("fla_naive") == set(fla.FORMS) | set(fla.OUTSIDE)
    assert not collection.differing_copies("fla_naive")


@pytest.mark.parametrize("decay", ["none", "head", "feature"])
@pytest.mark.parametrize("masked", [False, True])
@causal
def test_definition(form, decay, masked) -> None:
    """Prime sizes, an initial state, masked tokens in the middle and at both ends, decay from 1 down to e^-30."""
    rng = np.random.default_rng(5)
    inputs = example(b=2, n=7, h=3, d=5, e=2)
    shape = {"none": None, "head": (2, 7, 3), "feature": (2, 7, 3, 5)}[decay]
    options = {
        "scale": -1.7,
        "log_decay": None if shape is None else -np.exp(rng.uniform(-3, 3.4, shape)),
        "mask": np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0]], bool) if masked else None,
        "initial_state": rng.standard_normal((2, 3, 5, 2)),
    }
    for actual, expected in zip(form(**inputs, **options), by_definition(**inputs, **options), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_definition_without_causality(masked) -> None:
    inputs = example(b=2, n=7, h=3, d=5, e=2)
    options = {
        "scale": 0.3,
        "mask": np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0]], bool) if masked else None,
        "initial_state": np.random.default_rng(6).standard_normal((2, 3, 5, 2)),
    }
    expected = by_definition(**inputs, **options, sees_all=True)
    for actual, wanted in zip(la.bidirectional(**inputs, **options), expected, strict=True):
        close(actual, wanted)


@every_form
def test_normalised_is_a_weighted_mean(form) -> None:
    """Against the definition's numerator and, with values of one, its denominator."""
    inputs = example(b=2, n=7, h=3, d=5, e=2)
    mask = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0]], bool)
    rng = np.random.default_rng(7)
    S, z = rng.standard_normal((2, 3, 5, 2)), rng.uniform(0, 1, (2, 3, 5))
    sees_all = form is la.bidirectional
    shared = {"scale": 0.3, "mask": mask, "sees_all": sees_all}
    above, state = by_definition(**inputs, initial_state=S, **shared)
    ones = inputs | {"v": np.ones((2, 7, 3, 1))}
    below, normaliser = by_definition(**ones, initial_state=z[..., None], **shared)
    actual = la.normalised(
        **inputs, form=form, scale=0.3, epsilon=1e-3, mask=mask, initial_state=S, initial_normaliser=z
    )
    close(actual.output, above / (below + 1e-3))
    close(actual.state, state)
    close(actual.normaliser, normaliser[..., 0])


# Laws


@settings(max_examples=20)
@given(
    n=st.integers(0, 9), split=st.integers(0, 9), chunk=st.integers(1, 11), gated=st.booleans(), seed=st.integers(0, 99)
)
def test_split_and_carry_is_the_whole(n, split, chunk, gated, seed) -> None:
    split = min(split, n)
    inputs = example(seed, b=2, n=n, h=3, d=5, e=2)
    decay = -np.random.default_rng(seed).uniform(0, 2, (2, n, 3)) if gated else None
    form = partial(la.chunked, chunk_size=chunk, scale=0.7)
    whole = la.recurrent(**inputs, scale=0.7, log_decay=decay)
    head, tail = slice(0, split), slice(split, n)
    first = form(**{x: a[:, head] for x, a in inputs.items()}, log_decay=None if decay is None else decay[:, head])
    second = form(
        **{x: a[:, tail] for x, a in inputs.items()},
        log_decay=None if decay is None else decay[:, tail],
        initial_state=first.state,
    )
    close(np.concatenate([first.output, second.output], axis=1), whole.output)
    close(second.state, whole.state)


@causal
def test_normalised_split_and_carry(form) -> None:
    inputs = example()
    call = partial(la.normalised, form=form, scale=0.7, epsilon=1e-3)
    whole = call(**inputs)
    first = call(**{x: a[:, :4] for x, a in inputs.items()})
    second = call(
        **{x: a[:, 4:] for x, a in inputs.items()},
        initial_state=first.state,
        initial_normaliser=first.normaliser,
    )
    close(np.concatenate([first.output, second.output], axis=1), whole.output)
    close(second.state, whole.state)
    close(second.normaliser, whole.normaliser)


@every_form
def test_packed_documents_are_separate(form) -> None:
    """Lengths 4, 0, 5 and 2; the second is empty and keeps its initial state."""
    inputs = example(b=1)
    bounds = np.array([0, 4, 4, 9, 11])
    mask = np.array([[1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1]], bool)
    rng = np.random.default_rng(3)
    S, z = rng.standard_normal((4, 3, 5, 7)), rng.uniform(0, 1, (4, 3, 5))
    call = partial(la.normalised, form=form, scale=0.7, epsilon=1e-3)
    packed = call(**inputs, mask=mask, cu_seqlens=bounds, initial_state=S, initial_normaliser=z)
    for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = call(
            **{x: a[:, lo:hi] for x, a in inputs.items()},
            mask=mask[:, lo:hi],
            initial_state=S[i : i + 1],
            initial_normaliser=z[i : i + 1],
        )
        np.testing.assert_array_equal(packed.output[:, lo:hi], alone.output)
        np.testing.assert_array_equal(packed.state[i], alone.state[0])
        np.testing.assert_array_equal(packed.normaliser[i], alone.normaliser[0])
    np.testing.assert_array_equal(packed.state[1], S[1])
    np.testing.assert_array_equal(packed.normaliser[1], z[1])


@causal
def test_packed_documents_decay_alone(form) -> None:
    inputs = example(b=1)
    decay = -np.random.default_rng(4).uniform(0, 2, (1, 11, 3))
    packed = form(**inputs, scale=0.7, log_decay=decay, cu_seqlens=np.array([0, 4, 11]))
    for i, t in enumerate((slice(0, 4), slice(4, 11))):
        alone = form(**{x: a[:, t] for x, a in inputs.items()}, scale=0.7, log_decay=decay[:, t])
        close(packed.output[:, t], alone.output)
        close(packed.state[i], alone.state[0])


@every_form
@pytest.mark.parametrize("left", [0, 2])
def test_padding_changes_no_real_token(form, left) -> None:
    inputs = example()
    call = partial(la.normalised, form=form, scale=0.7, epsilon=1e-3)
    padded = {x: np.pad(a, ((0, 0), (left, 3 - left), (0, 0), (0, 0)), constant_values=9.0) for x, a in inputs.items()}
    mask = np.pad(np.ones((2, 11), bool), ((0, 0), (left, 3 - left)))
    real, longer = call(**inputs), call(**padded, mask=mask)
    close(longer.output[:, left : left + 11], real.output)
    close(longer.state, real.state)
    close(longer.normaliser, real.normaliser)


@causal
def test_masked_token_does_not_decay_the_state(form) -> None:
    inputs = example(n=6)
    decay = -np.random.default_rng(8).uniform(0.1, 2, (2, 6, 3, 5))
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0]], bool)
    kept = form(**{x: a[:, mask[0]] for x, a in inputs.items()}, scale=0.7, log_decay=decay[:, mask[0]])
    masked = form(**inputs, scale=0.7, log_decay=decay, mask=mask)
    close(masked.output[:, mask[0]], kept.output)
    close(masked.state, kept.state)


@causal
def test_past_is_untouched_by_the_future(form) -> None:
    inputs = example()
    edited = {x: a.copy() for x, a in inputs.items()}
    for a in edited.values():
        a[:, 6:] = 3.0
    before, after = form(**inputs, scale=0.7).output, form(**edited, scale=0.7).output
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.array_equal(before[:, 6:], after[:, 6:])


@every_form
def test_constant_values_come_back(form) -> None:
    """Weights that sum to one leave a constant alone."""
    inputs = example()
    inputs["v"] = np.broadcast_to(inputs["v"][:, :1], inputs["v"].shape)
    close(la.normalised(**inputs, form=form, scale=0.7, epsilon=0.0).output, inputs["v"])


def test_denominator_without_rotation_stays_positive() -> None:
    """Rotated by half a turn the scores are negative; the denominator of the un-rotated features is not."""
    inputs = example()
    turned = {"q": inputs["q"], "k": -inputs["k"], "v": inputs["v"]}
    own = {"q_normaliser": inputs["q"], "k_normaliser": inputs["k"]}
    plain = la.normalised(**inputs, form=la.recurrent, scale=1.0, epsilon=0.5)
    mixed = la.normalised(**turned, **own, form=la.recurrent, scale=1.0, epsilon=0.5)
    close(mixed.output, -plain.output)
    close(mixed.normaliser, plain.normaliser)


@causal
def test_zero_log_decay_is_no_decay(form) -> None:
    inputs = example()
    plain, gated = form(**inputs, scale=0.7), form(**inputs, scale=0.7, log_decay=np.zeros((2, 11, 3)))
    np.testing.assert_array_equal(plain.output, gated.output)
    np.testing.assert_array_equal(plain.state, gated.state)


@causal
def test_per_head_decay_is_one_decay_for_all_features(form) -> None:
    inputs = example()
    decay = -np.random.default_rng(9).uniform(0, 2, (2, 11, 3))
    head = form(**inputs, scale=0.7, log_decay=decay)
    feature = form(**inputs, scale=0.7, log_decay=np.repeat(decay[..., None], 5, axis=-1))
    close(head.output, feature.output)
    close(head.state, feature.state)


@causal
def test_decay_to_nothing_does_not_overflow(form) -> None:
    """e^-800 is zero and e^800 infinite: each row reads its own token alone."""
    inputs = example()
    output, _ = form(**inputs, scale=1.0, log_decay=np.full((2, 11, 3), -800.0))
    weights = np.einsum("bnhd,bnhd->bnh", inputs["q"], inputs["k"])
    close(output, weights[..., None] * inputs["v"])


# Degenerate input


@every_form
@pytest.mark.parametrize(
    ("b", "n", "h", "d", "e"), [(2, 0, 3, 5, 7), (0, 4, 3, 5, 7), (2, 4, 0, 5, 7), (2, 4, 3, 0, 7), (2, 4, 3, 5, 0)]
)
def test_empty_axes(form, b, n, h, d, e) -> None:
    initial = np.full((b, h, d, e), 3.0)
    output, state = form(np.ones((b, n, h, d)), np.ones((b, n, h, d)), np.ones((b, n, h, e)), scale=1.0)
    assert output.shape == (b, n, h, e)
    assert not output[:, :, :, : e if d == 0 else 0].any()
    np.testing.assert_array_equal(state, np.full((b, h, d, e), float(n)))
    nothing = np.ones((b, 0, h, d))
    _, state = form(nothing, nothing, np.ones((b, 0, h, e)), scale=1.0, initial_state=initial)
    np.testing.assert_array_equal(state, initial)


@every_form
def test_no_key_left(form) -> None:
    inputs = example()
    nothing = np.zeros((2, 11), bool)
    for epsilon in (0.0, 1e-6):
        result = la.normalised(**inputs, form=form, scale=1.0, epsilon=epsilon, mask=nothing)
        for part in result:
            np.testing.assert_array_equal(part, np.zeros_like(part))


def test_rows_before_the_first_key_are_zero() -> None:
    inputs = example()
    mask = np.ones((2, 11), bool)
    mask[0, :3] = False
    output = la.normalised(**inputs, form=la.recurrent, scale=1.0, epsilon=0.0, mask=mask).output
    assert not output[0, :3].any()
    assert output[0, 3:].all()
    assert output[1].all()


@every_form
def test_result_is_float64_and_arguments_stay(form) -> None:
    inputs = {x: a.astype(np.float32) for x, a in example(b=1).items()}
    others = {
        "mask": np.arange(11)[None] % 3 > 0,
        "cu_seqlens": np.array([0, 4, 11], np.int32),
        "initial_state": np.ones((2, 3, 5, 7), np.float32),
        "initial_normaliser": np.ones((2, 3, 5), np.float32),
    }
    kept = {x: a.copy() for x, a in (inputs | others).items()}
    result = la.normalised(**inputs, **others, form=form, scale=1.0, epsilon=0.1)
    assert [part.dtype for part in result] == [np.float64] * 3
    for x, a in (inputs | others).items():
        np.testing.assert_array_equal(a, kept[x])


# Errors


def wrong(**changes):
    return example(b=1) | {"scale": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": np.ones((1, 11, 3, 4))}, r"q and k of one shape.*k of shape \(1, 11, 3, 4\)"),
        ({"q": np.ones((11, 3, 5)), "k": np.ones((11, 3, 5))}, r"q and k of one shape.*\(11, 3, 5\)"),
        ({"v": np.ones((1, 10, 3, 7))}, r"v of shape \(b, n, h, e\).*\(1, 10, 3, 7\)"),
        ({"v": np.ones((1, 11, 3))}, r"v of shape.*\(1, 11, 3\)"),
        ({"scale": np.ones(3)}, r"a single scale.*\(3,\)"),
        ({"log_decay": np.zeros((1, 11, 3, 4))}, r"log_decay of shape.*\(1, 11, 3, 4\)"),
        ({"log_decay": np.zeros((11, 3))}, r"log_decay of shape.*\(11, 3\)"),
        ({"mask": np.ones((11,), bool)}, r"a mask of shape \(b, n\).*\(11,\)"),
        ({"cu_seqlens": np.array([0])}, r"one bound more than documents.*\(1,\)"),
        ({"cu_seqlens": np.array([[0, 11]])}, r"one bound more than documents.*\(1, 2\)"),
        ({"initial_state": np.ones((1, 3, 7, 5))}, r"one initial_state.*\(1, 3, 7, 5\)"),
        ({"initial_state": np.ones((1, 3, 5, 7)), "cu_seqlens": np.array([0, 4, 11])}, r"one initial_state"),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_wrong_shapes(changes, words) -> None:
    with pytest.raises(check.ShapeError, match=rf"linear_attention\.recurrent: expected .*{words}"):
        la.recurrent(**wrong(**changes))


@pytest.mark.usefixtures("unannotated")
def test_packing_needs_a_batch_of_one() -> None:
    with pytest.raises(check.ShapeError, match=r"a batch of one.*q of shape \(2, 11, 3, 5\)"):
        la.quadratic(**example(), scale=1.0, cu_seqlens=np.array([0, 11]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": np.full((1, 11, 3, 5), np.nan)}, "q must be finite, received nan"),
        ({"log_decay": np.full((1, 11, 3), -np.inf)}, "log_decay must be finite"),
        ({"log_decay": np.full((1, 11, 3), 0.25)}, r"log_decay <= 0, received largest=0\.25"),
        ({"scale": None}, "scale must hold real numbers"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"mask": np.ones((1, 11))}, "mask must be boolean"),
        ({"cu_seqlens": np.array([0.0, 11.0])}, "cu_seqlens must be integers"),
        ({"cu_seqlens": np.array([0, 7, 4, 11])}, r"rising from 0 to n=11, received cu_seqlens=\[0, 7, 4, 11\]"),
        ({"cu_seqlens": np.array([1, 11])}, "rising from 0"),
        ({"cu_seqlens": np.array([0, 10])}, "rising from 0 to n=11"),
        ({"initial_state": np.full((1, 3, 5, 7), np.inf)}, "initial_state must be finite"),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_values_outside_the_domain(changes, words) -> None:
    with pytest.raises(check.DomainError, match=rf"linear_attention\.recurrent: .*{words}"):
        la.recurrent(**wrong(**changes))


@pytest.mark.parametrize("form", ["quadratic", "bidirectional"])
def test_errors_name_the_form(form) -> None:
    with pytest.raises(check.DomainError, match=rf"^linear_attention\.{form}: v must be finite"):
        getattr(la, form)(**wrong(v=np.full((1, 11, 3, 7), np.inf)))


@pytest.mark.parametrize(
    ("chunk_size", "error", "words"),
    [
        (0, check.DomainError, "chunk_size >= 1, received chunk_size=0"),
        (-3, check.DomainError, "chunk_size >= 1"),
        (2.0, check.DomainError, "chunk_size must be integers"),
        (True, check.DomainError, "chunk_size must be integers"),
        (np.array([2, 3]), check.ShapeError, "a single chunk_size"),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_chunk_size(chunk_size, error, words) -> None:
    with pytest.raises(error, match=rf"linear_attention\.chunked: .*{words}"):
        la.chunked(**wrong(chunk_size=chunk_size))


S, Z = np.ones((1, 3, 5, 7)), np.ones((1, 3, 5))
Q = np.ones((1, 11, 3, 5))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"epsilon": -1e-6}, check.DomainError, r"epsilon >= 0, received epsilon=-1e-06"),
        ({"epsilon": np.ones(2)}, check.ShapeError, "a single epsilon"),
        ({"form": "recurrent"}, check.DomainError, "form to be one of the functions.*form='recurrent'"),
        ({"initial_state": S}, check.DomainError, "initial_state and initial_normaliser, both or neither"),
        ({"initial_normaliser": Z}, check.DomainError, "initial_state and initial_normaliser, both or neither"),
        ({"q_normaliser": Q}, check.DomainError, "q_normaliser and k_normaliser, both or neither"),
        ({"k_normaliser": Q}, check.DomainError, "q_normaliser and k_normaliser, both or neither"),
        ({"q_normaliser": Q, "k_normaliser": Q[:, :, :, :2]}, check.ShapeError, r"both of shape \(b, n, h, f\)"),
        ({"q_normaliser": Q[:, :3], "k_normaliser": Q[:, :3]}, check.ShapeError, r"both of shape \(b, n, h, f\)"),
        ({"q_normaliser": Q * np.nan, "k_normaliser": Q}, check.DomainError, "q_normaliser must be finite"),
        (
            {"initial_state": S, "initial_normaliser": Z[0]},
            check.ShapeError,
            r"initial_normaliser of shape \(1, 3, 5\), received initial_normaliser of shape \(3, 5\)",
        ),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_normalised_arguments(changes, error, words) -> None:
    with pytest.raises(error, match=rf"linear_attention\.normalised: .*{words}"):
        la.normalised(**(wrong(form=la.recurrent, epsilon=0.1) | changes))


def test_no_silent_defaults() -> None:
    """Where implementations disagree (scale, epsilon, chunk size, form) the caller must say."""
    inputs = example()
    with pytest.raises(TypeError, match="scale"):
        la.recurrent(**inputs)
    with pytest.raises(TypeError, match="chunk_size"):
        la.chunked(**inputs, scale=1.0)
    with pytest.raises(TypeError, match="epsilon"):
        la.normalised(**inputs, form=la.recurrent, scale=1.0)
    with pytest.raises(TypeError, match="form"):
        la.normalised(**inputs, epsilon=0.0, scale=1.0)
