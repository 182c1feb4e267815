"""CAN in torch: by hand, against the authors' code and the specification; degenerate rows, 16 bits, gradients."""

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from conformance.budget import Profile
from conformance.case import Case, reference
from refimpl.check import DomainError, ShapeError
from refimpl.ops import can as spec
from torchimpl.ops import can

GOLDEN = Path(__file__).parents[2] / "golden" / "can"
FORMS = [can.alternating_normalization_loop, can.alternating_normalization]
HALVES = [torch.float16, torch.bfloat16]
ONE = {"alpha": 1.0, "iterations": 1}


def golden(pattern):
    paths = sorted(GOLDEN.glob(pattern))
    assert paths, f"no {pattern} in {GOLDEN}"
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def distribution(*shape, start=1, power=1.0):
    """Deterministic rows that sum to 1; a higher power makes them sharper."""
    count = torch.Size(shape).numel()
    x = (1 + torch.sin(1.7 * torch.arange(start, start + count, dtype=torch.float64) ** 1.3)) ** power
    return x.reshape(shape) / x.reshape(shape).sum(-1, keepdim=True)


def close(found, expected, tolerance=1e-13):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


CONFIDENT, UNCERTAIN, PRIOR = distribution(7, 5, power=3.0), distribution(3, 5, start=50), distribution(5, start=90)


def tensors(*rows):
    return tuple(torch.tensor(r, dtype=torch.float64) for r in rows)


# Uncertainty


def test_top_entropy_by_hand():
    p = torch.tensor([[0.25] * 4, [0.5, 0.25, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).double()
    close(can.top_entropy(p, top=3), [1.0, 1.5 * log(2) / log(3), log(2) / log(3), 0.0])
    close(can.top_entropy(p, top=2), [1, (log(3) - 2 / 3 * log(2)) / log(2), 1, 0])
    close(can.top_entropy(p[:1, :2], top=3), [1.0])
    assert can.top_entropy(torch.zeros(2, 3, 5), top=3).tolist() == [[1.0] * 3] * 2
    assert can.top_entropy(torch.zeros(0, 5), top=3).shape == (0,)
    close(can.top_entropy_unnormalized(p[:1], top=2), [0.5])
    close(can.top_entropy_unnormalized(p[:1], top=9), [1.0])


def test_ambiguous_any_includes_its_upper_end():
    p = torch.tensor([[0.45, 0.45, 0.1, 0.0], [0.9, 0.05, 0.05, 0.0], [0.4, 0.2, 0.2, 0.2]])
    assert can.ambiguous_any(p, threshold=0.99, max_top=2).tolist() == [True, False, False]
    # The entropy of three is 0.946, of four 0.961.
    assert [can.ambiguous_any(p, threshold=0.95, max_top=t)[2].item() for t in (3, 4, 99)] == [False, True, True]


def within(found, expected, op, **arguments):
    """In float32, inputs rounded first, no further off than the judge permits."""
    case = Case(f"can.{op}", "golden", arguments, profile=Profile("float32"))
    ball = next(iter(reference(case, blur=2.0**-24).values()))
    assert found.dtype == torch.float32 and np.isfinite(ball.rad).all()
    assert (np.abs(found.double().numpy() - expected) <= ball.rad).all()


@golden("split_*.npz")
def test_ambiguous_any_reproduces_the_authors_split(path):
    data = np.load(path)
    p, max_k = torch.from_numpy(data["probs"]), int(data["max_k"])
    # Their upper end is excluded; None means all classes.
    named = {"threshold": float(data["threshold"]), "max_top": p.shape[1] if max_k < 0 else max_k - 1}
    for given in (p, p.float()):
        found = can.ambiguous_any(given, **named)
        assert found.nonzero()[:, 0].tolist() == data["ambiguous_ids"].tolist()
        assert (~found).nonzero()[:, 0].tolist() == data["confident_ids"].tolist()
    for top, expected in enumerate(data["topk_entropy"].T, start=2):
        close(can.top_entropy(p, top=top), expected)
        within(can.top_entropy(p.float(), top=top), expected, "top_entropy", p=data["probs"], top=top)
    # Their other rule, the entropy of all classes, by which nothing is left out.
    whole = can.top_entropy(p, top=p.shape[1])
    close(whole, data["entropy"])
    within(can.top_entropy(p.float(), top=p.shape[1]), data["entropy"], "top_entropy", p=data["probs"], top=p.shape[1])
    for rule, name in ((whole >= named["threshold"], "ambiguous"), (whole < named["threshold"], "confident")):
        assert rule.nonzero()[:, 0].tolist() == data[f"full_entropy_{name}_ids"].tolist()


@golden("blog_*.npz")
def test_adjust_reproduces_the_article(path):
    data = np.load(path)
    p, prior = torch.from_numpy(data["probs"]), torch.from_numpy(data["prior"])
    named = {"top": int(data["k"]), "threshold": float(data["threshold"])}
    named |= {"alpha": float(data["alpha"]), "iterations": int(data["iters"])}
    close(can.top_entropy(p, top=named["top"]), data["uncertainty"])
    found = can.top_entropy(p.float(), top=named["top"])
    within(found, data["uncertainty"], "top_entropy", p=data["probs"], top=named["top"])
    adjusted, uncertain = can.adjust(p, prior, **named)
    assert uncertain.tolist() == data["ambiguous"].tolist()
    close(adjusted, data["adjusted"], 1e-12)
    assert torch.equal(adjusted[~uncertain], p[~uncertain])
    assert adjusted.argmax(dim=1).tolist() == data["argmax_after"].tolist()
    adjusted, uncertain = can.adjust(p.float(), prior.float(), **named)
    assert uncertain.tolist() == data["ambiguous"].tolist()
    within(adjusted, data["adjusted"], "adjust", p=data["probs"], prior=data["prior"], **named)


@golden("rsa_*.npz")
def test_official_variant_reproduces_the_authors_code(path):
    data = np.load(path)
    arrays = {"confident": data["X_confident"], "uncertain": data["X_ambiguous"]}
    k = arrays["uncertain"].shape[1]
    arrays["prior"] = data["prior"] if "prior" in data.files else np.full(k, 1 / k)
    for depth in range(int(data["depth"]) + 1):
        named = {"alpha": float(data["alpha"]), "iterations": depth}
        op = can.alternating_normalization_official
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        close(op(**given, **named).T, data[f"V{depth}"])
        found = op(**{name: tensor.float() for name, tensor in given.items()}, **named)
        within(found, data[f"V{depth}"].T, op.__name__, **arrays, **named)


@golden("rsa_*.npz")
def test_rounds_of_the_authors_code(path):
    """Theirs begin with the prior and the rows: between every second array of a chain lies one round of ours."""
    data = np.load(path)
    stack = np.concatenate([data["X_confident"], data["X_ambiguous"][:1]])
    k, op = stack.shape[1], can.alternating_normalization_official
    prior = data["prior"] if "prior" in data.files else np.full(k, 1 / k)
    named = {"alpha": float(data["alpha"]), "iterations": 1}

    def whole(rows):
        """Every row under all the others, in both formats."""
        made = []
        for i in range(len(rows)):
            arrays = {"confident": np.delete(rows, i, axis=0), "uncertain": rows[i : i + 1], "prior": prior}
            given = {name: torch.from_numpy(array) for name, array in arrays.items()}
            made.append(op(**given, **named).numpy())
            found = op(**{name: tensor.float() for name, tensor in given.items()}, **named)
            within(found, made[-1], op.__name__, **arrays, **named)
        return np.concatenate(made)

    np.testing.assert_array_equal(stack.T, data["one_lexicon"])
    close(torch.from_numpy(whole(stack)).T, data["one_viewer1"], 1e-12)
    rows = stack * prior / ((stack * prior).sum(axis=1, keepdims=True) + spec.OFFICIAL_EPSILON)
    for step in range(1, 2 * int(data["depth"]) + 1, 2):
        close(torch.from_numpy(rows[-1:]).T, data[f"creatorchain_C{step}"], 1e-12)
        rows = whole(rows)
    if "costs" in data.files:
        weight, rows = np.exp(data["costs"])[:, None], stack
        for step in range(int(data["depth"]) + 1):
            close(torch.from_numpy(rows[-1:]).T, data[f"costs_V{step}"], 1e-12)
            rows = whole(rows * weight)


# The prior


def test_class_prior_counts_and_smooths():
    labels = torch.tensor([0, 2, 2, 2])
    assert can.class_prior(labels, classes=4, smoothing=0.0).tolist() == [0.25, 0, 0.75, 0]
    close(can.class_prior(labels.int(), classes=4, smoothing=1.0), [0.25, 0.125, 0.5, 0.125])
    close(can.class_prior(labels[:0], classes=5, smoothing=0.5), [0.2] * 5)


# Alternating normalisation


@pytest.mark.parametrize("form", FORMS)
def test_one_round_by_hand(form):
    # Columns 5/4 and 3/4, so b -> [1/10, 1/2] -> [1, 5]/6.
    close(form(*tensors([[0.75, 0.25]], [[0.5, 0.5]], [0.25, 0.75]), **ONE), [[1 / 6, 5 / 6]])
    # A class that no confident row has: b has all of it.
    got = form(*tensors([[1.0, 0.0]], [[1.0, 0.25]], [0.5, 0.5]), **ONE)
    close(got, [[1 / 3, 2 / 3]])


@pytest.mark.parametrize("form", FORMS)
def test_degenerate_rows(form):
    confident, uncertain, prior = tensors([[0.5, 0.5, 0.0]], [[0.0, 0.0, 1.0], [0.25, 0.5, 0.25]], [0.5, 0.5, 0.0])
    # No class in common with the prior: the row comes back.
    assert form(confident, uncertain, prior, alpha=2.0, iterations=3)[0].tolist() == [0, 0, 1]
    assert torch.equal(form(confident, uncertain, prior, alpha=1.0, iterations=0), uncertain)
    # Without confident rows the prior on the support of b; with alpha = 0 the prior.
    close(form(confident[:0], uncertain, prior, **ONE)[1], [0.5, 0.5, 0])
    close(form(confident, uncertain, prior, alpha=0.0, iterations=2), [[0.5, 0.5, 0]] * 2)
    assert form(confident, uncertain[:0], prior, alpha=1.0, iterations=2).shape == (0, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "iterations"), [(1.0, 1), (0.5, 4), (2.0, 3), (1.0, 8), (0.0, 2), (4.0, 4)])
def test_equals_the_specification(form, alpha, iterations):
    # Zeros in every place, and a row of zeros.
    confident, uncertain = CONFIDENT * (CONFIDENT > 0.03), UNCERTAIN * (UNCERTAIN > 0.1)
    confident[2], uncertain[1] = 0, 0
    named = {"alpha": alpha, "iterations": iterations}
    for given in ((CONFIDENT, UNCERTAIN, PRIOR), (confident, uncertain, PRIOR), (confident, UNCERTAIN, 7 * PRIOR)):
        expected = spec.alternating_normalization_loop(*(t.numpy() for t in given), **named)
        close(form(*given, **named), expected, 1e-12)


# Sharp rows that b turns over: factors of the frame leave the range of float64, and what is left of it is wrong.
SHARP = [[3.1e-4, 1.8e-19, 2.5e-2], [8.2e-5, 1.6e-3, 1.2e-5]]
TURNING = [[7.1e-3, 0.18, 1.4e-2], [0.15, 4.3e-5, 0.081]]


def test_rows_beyond_the_frame():
    given, named = tensors(SHARP, TURNING, [0.4, 0.25, 0.35]), {"alpha": 3.0, "iterations": 3}
    rows, beyond = can._framed(given[0], torch.ones(2, 1) == 1, *given[1:], *named.values())
    expected = torch.from_numpy(spec.alternating_normalization_loop(*(t.numpy() for t in given), **named))
    assert ((rows - expected).abs() > 0.1).any(dim=1)[beyond].any()
    close(can.alternating_normalization(*given, **named), expected)
    given[1].requires_grad_()
    can.alternating_normalization(*given, **named).square().sum().backward()
    assert given[1].grad.isfinite().all()
    # The uncertain rows stay out of the frame there as well.
    p, named = torch.cat([given[0], given[1].detach()]), named | {"top": 3, "threshold": 0.3}
    expected = spec.adjust(p.numpy(), given[2].numpy(), **named)
    assert expected.uncertain.tolist() == [False, False, True, True]
    close(can.adjust(p, given[2], **named).probabilities, expected.probabilities)


def test_more_rows_beyond_the_frame_than_a_block_holds_are_nan(monkeypatch):
    # Two rows under three confident ones of two classes.
    monkeypatch.setattr(can, "BLOCK_ELEMENTS", 2 * 4 * 2)
    given = tensors([[0.5, 0.5], [0.5, 0.5], [0.02, 0.98]], [[0.999, 0.001], [0.4, 0.4], [0.998, 0.002]], [0.5, 0.5])
    named = {"alpha": 4.0, "iterations": 8}
    rows = can.alternating_normalization(*given, **named)
    expected = can.alternating_normalization_loop(*given, **named)
    lost = rows.isnan().all(dim=1)
    assert lost.sum() == 1
    close(rows[~lost], expected[~lost])


def test_blocks_do_not_show(monkeypatch):
    forms = [*FORMS, can.alternating_normalization_official]
    given = CONFIDENT, UNCERTAIN, PRIOR
    whole = [form(*given, alpha=0.5, iterations=4) for form in forms]
    # One row, then two in a block.
    for size in (1, 2 * 8 * 5):
        monkeypatch.setattr(can, "BLOCK_ELEMENTS", size)
        for form, expected in zip(forms, whole, strict=True):
            close(form(*given, alpha=0.5, iterations=4), expected)


@pytest.mark.parametrize(("alpha", "iterations", "top"), [(1.0, 1, 3), (2.0, 3, 3), (0.0, 2, 2), (0.5, 3, 11)])
@pytest.mark.parametrize("threshold", [-1.0, 0.9, 2.0])
def test_adjust_equals_the_specification(alpha, iterations, top, threshold):
    """Every row uncertain, some, none; alpha = 0 counts rows that are no part of the frame unless they are left out."""
    p = torch.cat([CONFIDENT, UNCERTAIN, torch.zeros(1, 5, dtype=torch.float64)])
    named = {"top": top, "threshold": threshold, "alpha": alpha, "iterations": iterations}
    expected = spec.adjust(p.numpy(), PRIOR.numpy(), **named)
    found = can.adjust(p, PRIOR, **named)
    assert found.uncertain.tolist() == expected.uncertain.tolist()
    close(found.probabilities, expected.probabilities, 1e-12)
    assert torch.equal(found.probabilities[~found.uncertain], p[~found.uncertain])


@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bits_neither_stall_nor_vanish(dtype):
    # bfloat16 counts to 256, float16 to 2048: next to 4096 equal rows, b = (1, 1)/2 stays what it is.
    even = torch.full((4096, 2), 0.5, dtype=dtype)
    skewed = torch.tensor([[0.75, 0.25]], dtype=dtype)
    for form in (*FORMS, can.alternating_normalization_official):
        got = form(even, skewed, even[0], **ONE)
        # b over the columns 2048.75 and 2048.25: 3 : 1 but for 2.4e-4.
        assert got.dtype == dtype
        assert_close(got.float(), torch.tensor([[0.75, 0.25]]), rtol=0, atol=torch.finfo(dtype).eps)
    # 1e-10 is nothing in float16: a class of weight 2^-10 squared five times over would be.
    small = torch.tensor([[1.0, 2.0**-10]], dtype=dtype)
    assert can.alternating_normalization_official(small, small, even[0], alpha=2.0, iterations=2).isfinite().all()
    assert (
        can.top_entropy(small, top=2).dtype == can.adjust(small, even[0], top=2, threshold=0.5, **ONE)[0].dtype == dtype
    )


def test_gradients():
    # Away from zero, below which powers have no value to differentiate.
    p = (torch.cat([CONFIDENT, UNCERTAIN]) + 0.1).requires_grad_()
    assert gradcheck(lambda p: can.top_entropy(p, top=3), (p,))
    assert gradcheck(lambda p: can.top_entropy_unnormalized(p, top=3), (p,))
    given = [(t + 0.1).requires_grad_() for t in (CONFIDENT, UNCERTAIN, PRIOR)]
    for form in (*FORMS, can.alternating_normalization_official):
        for alpha, iterations in ((1.0, 1), (0.5, 3), (2.0, 2)):
            named = {"alpha": alpha, "iterations": iterations}
            assert gradcheck(lambda *t, form=form, named=named: form(*t, **named), given, fast_mode=True)
    named = {"top": 3, "threshold": 0.9, "alpha": 0.5, "iterations": 2}
    assert gradcheck(lambda p, q: can.adjust(p, q, **named).probabilities, (p, given[2]), fast_mode=True)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_gradients_at_zeros_are_finite(alpha):
    confident, uncertain, prior = tensors(
        [[0.5, 0.5, 0.0], [0, 0, 0]], [[0, 0, 1.0], [0.5, 0.5, 0], [0] * 3], [1, 1, 0]
    )
    given = [t.requires_grad_() for t in (confident, uncertain, prior)]
    for form in (*FORMS, can.alternating_normalization_official):
        grads = torch.autograd.grad(form(*given, alpha=alpha, iterations=3).square().sum(), given, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
    for entropy in (can.top_entropy, can.top_entropy_unnormalized):
        (grad,) = torch.autograd.grad(entropy(uncertain, top=2).sum(), uncertain)
        assert grad.isfinite().all()


def test_compiled_with_open_sizes_equals_eager():
    def call(p, prior):
        return can.adjust(p, prior, top=3, threshold=0.8, alpha=1.0, iterations=1)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    p = torch.cat([CONFIDENT, UNCERTAIN]).float()
    for rows in (10, 8):
        assert_close(tuple(compiled(p[:rows], PRIOR.float())), tuple(call(p[:rows], PRIOR.float())))


@pytest.mark.parametrize("form", [*FORMS, can.alternating_normalization_official])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"confident": CONFIDENT[:, :4]}, ShapeError, r"confident \(n, k\), uncertain \(b, k\), prior \(k,\)"),
        ({"uncertain": UNCERTAIN[0]}, ShapeError, r"uncertain of shape \(5,\)"),
        ({"prior": PRIOR[None]}, ShapeError, r"prior of shape \(1, 5\)"),
        ({"prior": PRIOR[:1]}, ShapeError, "with k >= 2"),
        ({"confident": CONFIDENT.long()}, DomainError, "confident must be a floating tensor"),
        ({"alpha": -0.5}, DomainError, "alpha >= 0, received alpha=-0.5"),
        ({"alpha": float("nan")}, DomainError, "alpha=nan"),
        ({"iterations": -1}, DomainError, "iterations >= 0"),
        ({"iterations": 1.5}, DomainError, "iterations=1.5"),
    ],
)
def test_normalisations_refuse(form, change, error, says):
    given = {"confident": CONFIDENT, "uncertain": UNCERTAIN, "prior": PRIOR, **ONE} | change
    with pytest.raises(error, match=rf"can\.{form.__name__}: .*{says}"):
        form(**given)


LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: can.top_entropy(CONFIDENT[:, :1], top=2), ShapeError, "can.top_entropy: .* k >= 2"),
        (lambda: can.top_entropy(CONFIDENT, top=1), DomainError, "an integer top >= 2, received top=1"),
        (lambda: can.top_entropy_unnormalized(CONFIDENT, top=2.5), DomainError, "top=2.5"),
        (lambda: can.ambiguous_any(CONFIDENT, threshold=float("inf"), max_top=3), DomainError, "a finite threshold"),
        (lambda: can.ambiguous_any(CONFIDENT, threshold=0.5, max_top=1), DomainError, "an integer max_top >= 2"),
        (lambda: can.adjust(CONFIDENT[0], PRIOR, top=3, threshold=0.5, **ONE), ShapeError, r"p \(n, k\)"),
        (lambda: can.adjust(CONFIDENT, PRIOR[:3], top=3, threshold=0.5, **ONE), ShapeError, "can.adjust: expected"),
        (lambda: can.adjust(CONFIDENT, PRIOR, top=1, threshold=0.5, **ONE), DomainError, "top >= 2"),
        (lambda: can.adjust(CONFIDENT, PRIOR, top=3, threshold=float("nan"), **ONE), DomainError, "a finite threshold"),
        (lambda: can.class_prior(LABELS.double(), classes=3, smoothing=1.0), DomainError, "labels must be a tensor of"),
        (lambda: can.class_prior(LABELS[None], classes=3, smoothing=1.0), ShapeError, r"labels \(n,\)"),
        (lambda: can.class_prior(LABELS, classes=0, smoothing=1.0), DomainError, "classes >= 1"),
        (lambda: can.class_prior(LABELS, classes=3, smoothing=-1.0), DomainError, "smoothing >= 0"),
        (lambda: can.class_prior(LABELS[:0], classes=3, smoothing=0.0), DomainError, "a label or smoothing > 0"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
