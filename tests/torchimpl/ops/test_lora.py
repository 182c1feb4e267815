"""LoRA in torch: golden runs of PEFT, hand values, autograd and the specification's closed forms, 16 bits, errors."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.autograd import gradcheck
from torch.testing import assert_close

from conformance.budget import Arithmetic, Profile, tanh, unit_roundoff
from conformance.case import Case, as_tuple, reference
from conformance.ops import lora as judged
from refimpl.check import DomainError, ShapeError
from refimpl.ops import lora as spec
from torchimpl.ops import lora

GOLDEN = Path(__file__).parents[2] / "golden" / "peft_lora"
ADAMW = {
    "linear_r4_a8": (0.01, 0.9, 0.999, 1e-8, 0.01),
    "linear_r4_a8_rslora": (0.01, 0.9, 0.999, 1e-8, 0.01),
    "linear_r3_a5_nobias": (0.003, 0.8, 0.95, 1e-6, 0.1),
}
MOMENTUM = {"linear_r4_a8": (0.1, 0.0), "linear_r4_a8_rslora": (0.1, 0.0), "linear_r3_a5_nobias": (0.05, 0.9)}
STEP = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}
HALVES = [torch.float16, torch.bfloat16]


def numbers(*shape, start=1):
    """Deterministic numbers in (-1, 1)."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(start, start + count, dtype=torch.float64) ** 1.3).reshape(shape)


# W, A, B, G with distinct prime axes; two axes of rows.
W, A, B, G = numbers(7, 11), numbers(7, 3, start=90), numbers(3, 11, start=150), numbers(7, 11, start=200)
X, DY = numbers(2, 5, 7, start=300), numbers(2, 5, 11, start=400)
NEW_A, NEW_B = A + 0.1 * numbers(7, 3, start=600), B + 0.1 * numbers(3, 11, start=700)


def close(found, expected, tolerance=1e-12):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def on_arrays(function, *tensors, **numbers_):
    """The specification on the same values."""
    return function(*(t.detach().numpy() for t in tensors), **numbers_)


@pytest.mark.parametrize("name", sorted(ADAMW))
def test_against_peft(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        data = {k: torch.from_numpy(archive[k]) for k in archive.files if archive[k].dtype.kind == "f"}
        alpha, r, root = float(archive["lora_alpha"]), int(archive["r"]), bool(archive["use_rslora"])
    scale = (lora.scale_rslora if root else lora.scale_lora)(alpha=alpha, r=r)
    assert scale == pytest.approx(data["scaling"].item(), rel=1e-15)
    weights = lora.from_peft(data["W"], data["lora_A"], data["lora_B"])
    x, bias = data["x"], data.get("bias", 0.0)
    y = lora.apply(x, *weights, scale=scale) + bias
    close(y, data["y"])
    close(lora.merge(*weights, scale=scale).T, data["merged_weight"])
    close(lora.delta(weights.A, weights.B, scale=scale).T, data["delta_weight"])
    dy = 2 * (y - data["target"]) / y.numel()
    gradients = lora.gradients_factored(x, dy, weights.A, weights.B, scale=scale)
    close(gradients.A.T, data["grad_A"])
    close(gradients.B.T, data["grad_B"])
    close(lora.gradient_input(dy, *weights, scale=scale), data["grad_x"])
    rule = dict(zip(STEP, ADAMW[name], strict=True))
    zero_A, zero_B = torch.zeros_like(weights.A), torch.zeros_like(weights.B)
    state = lora.AdamWFactors(weights.A, weights.B, zero_A, zero_A, zero_B, zero_B)
    for step in (1, 2, 3):
        y = lora.apply(x, weights.W, state.A, state.B, scale=scale) + bias
        dense = x.T @ (2 * (y - data["target"]) / y.numel())
        state = lora.adamw(state.A, state.B, dense, *state[2:], scale=scale, step=step, **rule)
        close(state.A.T, data[f"adamw_A_after_step{step}"])
        close(state.B.T, data[f"adamw_B_after_step{step}"])


def within(function, given, due, **named):
    """In float32, inputs rounded first, no further off than the judge permits; None is due where nothing is known."""
    found = as_tuple(function(*(torch.tensor(array).float() for array in given), **named))
    names = [name for name in inspect.signature(function).parameters if name not in named]
    arguments = dict(zip(names, given, strict=True)) | named
    case = Case(f"lora.{function.__name__}", "golden", arguments, profile=Profile("float32"))
    balls = reference(case, blur=unit_roundoff("float32")).values()
    for tensor, expected, ball in zip(found, due, balls, strict=True):
        if expected is not None:
            assert tensor.dtype == torch.float32 and np.isfinite(ball.rad).all()
            assert (np.abs(tensor.double().numpy() - expected) <= ball.rad).all()


@pytest.mark.parametrize("name", sorted(ADAMW))
def test_against_peft_in_float32(name):
    """Every step from the factors that PEFT had before it."""
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    W, A, B = spec.from_peft(*(data[key] for key in ("W", "lora_A", "lora_B")))
    x, bias, scale = data["x"], data.get("bias", 0.0), float(data["scaling"])
    within(lora.apply, (x, W, A, B), (data["y"] - bias,), scale=scale)
    within(lora.apply, (x, W, A, B), (data["y_base"] - bias,), scale=0.0)
    within(lora.delta, (A, B), (data["delta_weight"].T,), scale=scale)
    within(lora.merge, (W, A, B), (data["merged_weight"].T,), scale=scale)
    within(lora.unmerge, (data["merged_weight"].T, A, B), (W,), scale=scale)
    within(lora.apply, (x, data["merged_weight"].T, A, B), (data["merged_y"] - bias,), scale=0.0)
    dy = 2 * (data["y"] - data["target"]) / data["y"].size
    gradients = data["grad_A"].T, data["grad_B"].T
    within(lora.gradients_factored, (x, dy, A, B), gradients, scale=scale)
    within(lora.gradients_dense, (x.T @ dy, A, B), gradients, scale=scale)
    within(lora.gradient_input, (dy, W, A, B), (data["grad_x"],), scale=scale)

    def dense(A, B):
        y = x @ (W + scale * A @ B) + bias
        return x.T @ (2 * (y - data["target"]) / y.size)

    rate, momentum = MOMENTUM[name]
    before, now = (A, B), (A, B)
    for step in (1, 2, 3):
        after = tuple(data[f"sgd_{letter}_after_step{step}"].T for letter in "AB")
        # Momentum repeats the move before: what is left is the plain step.
        plain = tuple(new - momentum * (old - older) for new, old, older in zip(after, now, before, strict=True))
        within(lora.sgd, (*now, dense(*now)), plain, scale=scale, learning_rate=rate)
        before, now = now, after
    rule = dict(zip(STEP, ADAMW[name], strict=True))
    state = spec.AdamWFactors(A, B, *(np.zeros_like(factor) for factor in (A, A, B, B)))
    for step in (1, 2, 3):
        given = (*state[:2], dense(*state[:2]), *state[2:])
        after = tuple(data[f"adamw_{letter}_after_step{step}"].T for letter in "AB")
        # PEFT's moments are not known: the next step has those of the specification.
        within(lora.adamw, given, (*after, *(None,) * 4), scale=scale, step=step, **rule)
        state = spec.adamw(*given, scale=scale, step=step, **rule)


@pytest.mark.parametrize("name", ["adapter", "adapter_rslora"])
def test_pefts_adapters_in_float32(name):
    """y = fc2(tanh(fc1(x))) with the adapters of a folder that PEFT wrote, and without them."""
    folder = GOLDEN / name
    io, base = dict(np.load(folder / "io.npz")), load_file(folder / "base_model.safetensors")
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scale = (lora.scale_rslora if told["use_rslora"] else lora.scale_lora)(alpha=told["lora_alpha"], r=told["r"])
    a = Arithmetic(Profile("float32"))

    def layers():
        """The weights of both layers; those of one that is not adapted have factors of rank 1 that are 0."""
        for fc in ("fc1", "fc2"):
            (e, d), prefix = base[f"{fc}.weight"].shape, f"base_model.model.{fc}.lora"
            empty = {"A": np.zeros((1, d), np.float32), "B": np.zeros((e, 1), np.float32)}
            A, B = (factors.get(f"{prefix}_{letter}.weight", empty[letter]) for letter in "AB")
            yield fc, spec.from_peft(base[f"{fc}.weight"], A, B), base.get(f"{fc}.bias", np.zeros(e, np.float32))

    for scales, expected in ((scale, io["y_float64"]), (0.0, io["y_base"])):
        found, ball = torch.tensor(io["x"]), a.exact(io["x"])
        for fc, weights, bias in layers():
            found = lora.apply(found, *(torch.tensor(w).float() for w in weights), scale=scales) + torch.tensor(bias)
            ball = (judged.apply(a, ball, *map(a.exact, weights), scales).stored() + a.exact(bias)).stored()
            if fc == "fc1":
                found, ball = found.tanh(), tanh(ball).stored()
        # `y_base` is known in float32 only, as PEFT made it: it may err as well.
        bound = ball.finished().rad * (1 if scales else 2)
        assert found.dtype == torch.float32 and (np.abs(found.numpy() - expected) <= bound).all()
        assert (np.abs(ball.value - io["y" if scales else "y_base"]) <= ball.finished().rad).all()
    for fc, weights, _ in layers():
        within(lora.merge, weights, (io[f"merged_{fc}_weight"].T,), scale=scale)


def test_by_hand():
    # d = 2, e = 3, r = 1.
    w, a, b = (
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        torch.tensor([[1.0], [-2.0]]),
        torch.tensor([[3.0, 0, -1]]),
    )
    assert lora.delta(a, b, scale=0.5).tolist() == [[1.5, 0, -0.5], [-3, 0, 1]]
    assert lora.merge(w, a, b, scale=0.5).tolist() == [[2.5, 2, 2.5], [1, 5, 7]]
    assert lora.unmerge(w, a, b, scale=0.5).tolist() == [[-0.5, 2, 3.5], [7, 5, 5]]
    assert lora.apply(torch.tensor([[1.0, 1.0]]), w, a, b, scale=0.5).tolist() == [[3.5, 7, 9.5]]
    assert lora.apply(torch.tensor([1.0, 1.0]), w, a, b, scale=0.5).tolist() == [3.5, 7, 9.5]
    assert lora.apply(torch.ones(0, 2), w, a, b, scale=0.5).shape == (0, 3)
    assert lora.gradient_input(torch.tensor([1.0, 0, 0]), w, a, b, scale=0.5).tolist() == [2.5, 1]
    assert lora.merge_symmetric(w, a, b, a, b, scale=0.5).tolist() == w.tolist()
    # r = 2 on a 2 x 4 weight: A[i, j mod 2] + B[i mod 2, j].
    got = lora.additive_delta(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[10.0, 20, 30, 40], [50, 60, 70, 80]]))
    assert got.tolist() == [[11, 22, 31, 42], [53, 64, 73, 84]]
    sums = lora.additive_gradients(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), r=2)
    assert sums.A.tolist() == [[4, 6], [12, 14]] and sums.B.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert lora.scale_lora(alpha=5, r=3) == 5 / 3 and lora.scale_rslora(alpha=5.0, r=4) == 2.5


def test_autograd_through_apply_is_every_closed_form():
    x, w, a, b = (t.clone().requires_grad_() for t in (X, W, A, B))
    lora.apply(x, w, a, b, scale=0.7).backward(DY)
    factored = lora.gradients_factored(X, DY, A, B, scale=0.7)
    dense = lora.gradients_dense(w.grad, A, B, scale=0.7)
    theirs = on_arrays(spec.gradients_factored, X, DY, A, B, scale=0.7)
    for dA, dB in (factored, dense, theirs):
        close(a.grad, dA)
        close(b.grad, dB)
    close(x.grad, lora.gradient_input(DY, W, A, B, scale=0.7))
    close(x.grad, on_arrays(spec.gradient_input, DY, W, A, B, scale=0.7))
    # The gradient through the merged weight is the dense one.
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    lora.merge(W, a, b, scale=0.7).backward(G)
    for found, expected in zip((a.grad, b.grad), on_arrays(spec.gradients_dense, G, A, B, scale=0.7), strict=True):
        close(found, expected)


def test_autograd_through_the_additive_delta_is_its_closed_form():
    a, b, dense = numbers(6, 2).requires_grad_(), numbers(2, 4).requires_grad_(), numbers(6, 4, start=50)
    lora.additive_delta(a, b).backward(dense)
    dA, dB = lora.additive_gradients(dense, r=2)
    close(a.grad, dA)
    close(b.grad, dB)
    close(lora.additive_update(dense, r=2, learning_rate=0.3), -0.3 * lora.additive_delta(dA, dB))


RULE = {"scale": 0.7, "learning_rate": 0.3}
STATES = (*(0.1 * numbers(7, 3, start=s) for s in (800, 900)), *(0.1 * numbers(3, 11, start=s) for s in (1000, 1100)))
STATES = tuple(s if i % 2 == 0 else s.abs() for i, s in enumerate(STATES))
SAME = {
    "delta": ((A, B), {"scale": 0.7}),
    "apply": ((X, W, A, B), {"scale": 0.7}),
    "merge": ((W, A, B), {"scale": 0.7}),
    "unmerge": ((W, A, B), {"scale": 0.7}),
    "merge_symmetric": ((W, A, B, NEW_A[:, :2], NEW_B[:2]), {"scale": 0.7}),
    "update": ((A, B, NEW_A, NEW_B), {"scale": 0.7}),
    "sgd": ((A, B, G), RULE),
    "sgd_update": ((A, B, G), RULE),
    "sgd_frozen": ((A, B, G), RULE),
    "sgd_frozen_update": ((A, G), RULE),
    "random_projection_update": ((G, A, B), {"learning_rate": 0.3}),
    "adamw": ((A, B, G, *STATES), {"scale": 0.7, "step": 5, **STEP}),
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_equals_the_specification_and_leaves_its_arguments_alone(name):
    given, named = SAME[name]
    before = [t.clone() for t in given]
    made, expected = getattr(lora, name)(*given, **named), on_arrays(getattr(spec, name), *given, **named)
    pairs = zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]
    for found, wanted in pairs:
        close(found, wanted)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


@pytest.mark.parametrize("name", sorted(SAME))
def test_gradients(name):
    given, named = SAME[name]
    assert gradcheck(
        lambda *t: getattr(lora, name)(*t, **named), [t.clone().requires_grad_() for t in given], fast_mode=True
    )


def test_gradients_where_a_factor_or_a_state_is_zero():
    zero = torch.zeros_like(B).requires_grad_()
    assert gradcheck(lambda b: lora.apply(X, W, A, b, scale=0.7), (zero,), fast_mode=True)
    nothing = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    made = lora.adamw_array(nothing, nothing, nothing, nothing.detach(), step=1, **STEP)
    made.parameter.sum().backward()
    assert nothing.grad.isfinite().all()


def test_updates_are_the_difference_of_the_weights():
    new = lora.sgd(A, B, G, **RULE)
    close(lora.sgd_update(A, B, G, **RULE), lora.update(A, B, *new, scale=0.7))
    frozen = lora.sgd_frozen(A, B, G, **RULE)
    close(frozen, new.B)
    close(lora.sgd_frozen_update(A, G, **RULE), lora.update(A, B, A, frozen, scale=0.7))


def test_nothing_is_aliased():
    # With an axis of length 1 a transpose is contiguous already.
    for w_t, a, b in [(W, A[:, :1].T, B[:1].T), (W.T, A.T, B.T)]:
        given = (w_t, a, b) if w_t.shape == (b.shape[0], a.shape[1]) else (w_t.T, a, b)
        made = lora.from_peft(*given)
        back = lora.to_peft(*made)
        for one, two, three in zip(given, made, back, strict=True):
            assert len({t.untyped_storage().data_ptr() for t in (one, two, three)}) == 3
            assert torch.equal(one, three) and torch.equal(one.T, two) and two.is_contiguous()


@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bit_weights_are_rounded_once(dtype):
    w, a, b, g = (t.to(dtype) for t in (W, A, B, G))
    wide = [t.double() for t in (w, a, b, g)]
    half = torch.finfo(dtype).eps / 2

    def once(found, exact, size):
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= half * exact.abs() + 1e-6 * size).all()

    once(lora.delta(a, b, scale=0.3), 0.3 * wide[1] @ wide[2], 10)
    once(lora.merge(w, a, b, scale=0.3), wide[0] + 0.3 * wide[1] @ wide[2], 10)
    once(lora.merge_symmetric(w, a, b, a, b, scale=0.3), wide[0], 10)
    once(lora.sgd(a, b, g, **RULE).A, wide[1] - 0.21 * wide[3] @ wide[2].T, 10)
    once(lora.sgd(a, b, g, **RULE).B, wide[2] - 0.21 * wide[1].T @ wide[3], 10)
    once(lora.gradients_dense(g, a, b, scale=0.3).B, 0.3 * wide[1].T @ wide[3], 10)
    # 4096 ones: bfloat16 counts to 256, float16 would stall at 2048.
    assert lora.additive_gradients(torch.ones(4096, 1, dtype=dtype), r=1).B.item() == 4096
    # A B is beyond 65504, scale A B is not.
    big = torch.full((1, 1), 1024.0, dtype=dtype)
    assert lora.delta(big, big, scale=2.0**-8).item() == 4096


@pytest.mark.parametrize("dtype", HALVES)
def test_adamw_keeps_its_states_in_their_own_format(dtype):
    tiny = torch.full((3,), 2.0**-14)
    made = lora.adamw_array(torch.ones(3, dtype=dtype), tiny.to(dtype), tiny * 0, tiny * 0, step=1, **STEP)
    assert (made.parameter.dtype, made.m.dtype, made.v.dtype) == (dtype, torch.float32, torch.float32)
    # 2^-28 is below the smallest float16.
    assert_close(made.v, torch.full((3,), 0.001 * 2.0**-28))
    assert_close(made.parameter.float(), torch.full((3,), 1 - 0.0101), rtol=0, atol=torch.finfo(dtype).eps)


def test_compiled_with_open_sizes_equals_eager():
    def call(x, w, a, b):
        return lora.apply(x, w, a, b, scale=0.7), lora.merge(w, a, b, scale=0.7)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n in (5, 3):
        given = [t.float() for t in (X[:, :n], W, A, B)]
        assert_close(compiled(*given), call(*given))


@pytest.mark.parametrize("name", sorted(set(SAME) - {"sgd_frozen_update"}))
def test_factors_that_do_not_fit_are_refused(name):
    given, named = SAME[name]
    at_A = next(i for i, t in enumerate(given) if t is A)
    at_B = next(i for i, t in enumerate(given) if t is B)
    for bad_A, bad_B in ((A, B[:2]), (A[0], B), (A[:, :0], B[:0]), (A[None], B)):
        arguments = list(given)
        arguments[at_A], arguments[at_B] = bad_A, bad_B
        op = "gradients_dense" if name == "adamw" else name
        with pytest.raises(ShapeError, match=rf"^lora\.{op}: expected A \(d, r\), B \(r, e\).*received A of shape"):
            getattr(lora, name)(*arguments, **named)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: lora.delta(A, B, scale=float("inf")), DomainError, "scale a finite number, received scale=inf"),
        (lambda: lora.delta(A, B, scale=None), DomainError, "lora.delta: expected scale a finite number"),
        (lambda: lora.delta(A.long(), B, scale=1.0), DomainError, "A must be a floating tensor"),
        (lambda: lora.scale_lora(alpha="16", r=4), DomainError, "lora.scale_lora: expected alpha a finite number"),
        (lambda: lora.scale_lora(alpha=16, r=0), DomainError, "r an integer >= 1, received r=0"),
        (lambda: lora.scale_rslora(alpha=16, r=True), DomainError, "r an integer >= 1"),
        (lambda: lora.sgd(A, B, G, scale=1.0, learning_rate=-0.1), DomainError, "learning_rate >= 0, received"),
        (lambda: lora.sgd(A, B, G[:3], **RULE), ShapeError, r"G \(d, e\)"),
        (lambda: lora.sgd_frozen_update(A, G[:3], **RULE), ShapeError, "lora.sgd_frozen_update: expected A"),
        (lambda: lora.apply(X[..., :5], W, A, B, scale=1.0), ShapeError, r"x \(..., d\) with d=7, received x of"),
        (lambda: lora.apply(torch.tensor(1.0), W, A, B, scale=1.0), ShapeError, r"x \(..., d\) with d=7"),
        (lambda: lora.merge(W.T, A, B, scale=1.0), ShapeError, r"lora.merge: expected .* W \(d, e\)"),
        (lambda: lora.gradient_input(X, W, A, B, scale=1.0), ShapeError, r"dy \(..., e\) with e=11"),
        (lambda: lora.gradients_factored(X, DY[0], A, B, scale=1.0), ShapeError, "equal leading axes"),
        (lambda: lora.update(A, B, A[:, :2], B[:2], scale=1.0), ShapeError, "new factors of the shapes of the old"),
        (lambda: lora.merge_symmetric(W, A, B, A, B[:2], scale=1.0), ShapeError, "lora.merge_symmetric: expected A"),
        (lambda: lora.adamw_array(A, A, A, A[:3], step=1, **STEP), ShapeError, "four equal shapes"),
        (lambda: lora.adamw_array(A, A, A, A, step=0, **STEP), DomainError, "step an integer >= 1"),
        (lambda: lora.adamw_array(A, A, A, A, step=1, **(STEP | {"beta_2": 1.0})), DomainError, r"in \[0, 1\)"),
        (lambda: lora.adamw_array(A, A, A, A, step=1, **(STEP | {"epsilon": 0.0})), DomainError, "epsilon > 0"),
        (lambda: lora.adamw_array(A, A, A, A, step=1, **(STEP | {"weight_decay": -1.0})), DomainError, "weight_decay"),
        (lambda: lora.additive_delta(A, B), ShapeError, "r dividing d and e"),
        (lambda: lora.additive_gradients(G, r=2), ShapeError, "r=2 dividing d and e"),
        (lambda: lora.additive_update(G, r=0, learning_rate=0.1), DomainError, "lora.additive_update: expected r an"),
        (lambda: lora.from_peft(W, A, B), ShapeError, r"W_t \(e, d\), lora_A \(r, d\)"),
        (lambda: lora.to_peft(W.T, A, B), ShapeError, "lora.to_peft: expected A"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
