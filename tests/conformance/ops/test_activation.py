"""The judge of activation: its reference against tables, its laws on right and wrong functions, its bounds."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.case import Case, reference, storage_type
from conformance.ops import activation as family
from conformance.vectors import build
from conformance.verdict import check_law, judge
from refimpl.ops import activation

FLOAT64 = Profile("float64", "strict", "A64")


def _expected(name: str, *values: float) -> np.ndarray:
    return reference(Case(f"activation.{name}", "by-hand", {"x": np.array(values)}), digits=True)["y"].value


def test_reference_by_hand() -> None:
    assert _expected("relu", -3.0, 0.0, 2.5).tolist() == [0.0, 0.0, 2.5]
    # 1 / (1 + 1/e), the normal distribution at 1, and the tanh form at 1, all from tables.
    np.testing.assert_allclose(_expected("silu", 1.0, -1.0, 0.0), [0.7310585786300049, -0.2689414213699951, 0.0])
    np.testing.assert_allclose(
        _expected("gelu_erf", 1.0, -1.0, 2.0), [0.841344746068543, -0.158655253931457, 1.9544997361]
    )
    np.testing.assert_allclose(_expected("gelu_tanh", 1.0, -1.0), [0.8411919906082768, -0.15880800939172324])
    np.testing.assert_allclose(_expected("elu_plus_one", -1.0, 0.0, 2.0), [0.36787944117144233, 1.0, 3.0])


@pytest.mark.parametrize(
    ("law", "op", "bug"),
    [
        ("reflection", "activation.relu", "negative slope 0.01"),
        ("reflection", "activation.silu", "logistic function without the factor x"),
        ("odds", "activation.silu", "beta 1.702"),
        ("odds", "activation.gelu_tanh", "erf form instead"),
        ("odds", "activation.gelu_tanh", "cubic coefficient 0.0447"),
        ("taylor_series", "activation.gelu_erf", "tanh form instead of erf"),
        ("two_sided", "activation.relu", "sign lost: min(x, 0)"),
        ("exponential_below_zero", "activation.elu_plus_one", "alpha 0.5"),
        ("line_above_zero", "activation.elu_plus_one", "clipped at 1"),
    ],
)
def test_laws_hold_and_fail(law: str, op: str, bug: str) -> None:
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    right = getattr(activation, op.split(".")[1])
    assert check_law("right", right, chosen, op, FLOAT64, 10).outcome == "pass"
    assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 10).outcome == "logic"


def test_elementwise_fails_where_elements_mix() -> None:
    law = next(entry for entry in family.LAWS if entry.name == "elementwise")
    assert check_law("right", activation.silu, law, "activation.silu", FLOAT64, 10).outcome == "pass"
    mixed = check_law("wrong", lambda x: activation.silu(x - x.mean()), law, "activation.silu", FLOAT64, 10)
    assert mixed.outcome == "logic"


@pytest.mark.parametrize("mutant", [*family.MUTANTS, *family.MUSEUM], ids=lambda m: f"{m.op}: {m.bug}")
def test_every_mutant_dies_by_a_vector(mutant) -> None:
    with np.errstate(all="ignore"):
        verdicts = [judge("wrong", mutant.call, build(c), FLOAT64) for c in family.CASES if c.op == mutant.op]
    assert any(v.outcome in ("logic", "precision") for v in verdicts)


def test_the_cancelling_forms_of_public_code_pass() -> None:
    """x (1 + erf) / 2, x (1 + tanh) / 2 and elu(x) + 1 in float32 arithmetic."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    forms = {
        "gelu_erf": lambda t: 0.5 * t * (1 + torch.erf(t / 2**0.5)),
        "gelu_tanh": lambda t: 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
        "elu_plus_one": lambda t: functional.elu(t) + 1,
        "silu": functional.silu,
        "relu": functional.relu,
    }
    for name, form in forms.items():
        for case in (c for c in family.CASES if c.op == f"activation.{name}" and "float32" in c.dtypes):
            verdict = judge(
                "torch", lambda x, form=form: form(torch.from_numpy(x)).numpy(), build(case), Profile("float32")
            )
            assert verdict.outcome == "pass", (case.id, verdict.message)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_16_bits_nearly_fills_the_bound(dtype: str) -> None:
    worst = 0.0
    for case in family.CASES:
        if dtype in case.dtypes and not case.exact:
            function = getattr(activation, case.op.split(".")[1])
            rounded = lambda x, f=function: f(x.astype(np.float64)).astype(storage_type(dtype))  # noqa: E731
            verdict = judge("right", rounded, build(case), Profile(dtype))
            assert verdict.outcome == "pass", verdict.message
            worst = max(worst, verdict.ratio)
    assert 0.2 < worst <= 1
