"""The judge of lora: references against values by hand, bounds against honest arithmetic, laws against known bugs."""

import numpy as np
import pytest

from conformance.adapters.spec import working_precision
from conformance.budget import Arithmetic, Profile
from conformance.case import reference
from conformance.law import LawFailed
from conformance.ops import lora as judged
from conformance.vectors import build
from conformance.verdict import check_law, compare, judge
from refimpl.ops import lora

CASES = {case.id.removeprefix("lora."): case for case in judged.CASES}
FUNCTIONS = {operator.function: operator for operator in judged.OPERATORS}
FLOAT32 = Profile("float32")
A = Arithmetic(Profile("float64", "strict", "A64"), digits=True)


def ball(values):
    return A.exact(np.asarray(values, float))


def values(made):
    return [part.value.tolist() for part in made] if isinstance(made, tuple) else made.value.tolist()


class TestReferencesByHand:
    # d = 2, e = 3, r = 1.
    W, A_, B = ball([[1, 2, 3], [4, 5, 6]]), ball([[1], [-2]]), ball([[3, 0, -1]])

    def test_scales(self):
        assert judged.scale_lora(A, 6.0, 4).value == 1.5
        assert judged.scale_rslora(A, 6.0, 4).value == 3.0

    def test_layer(self):
        assert values(judged.delta(A, self.A_, self.B, 0.5)) == [[1.5, 0, -0.5], [-3, 0, 1]]
        assert values(judged.merge(A, self.W, self.A_, self.B, 0.5)) == [[2.5, 2, 2.5], [1, 5, 7]]
        assert values(judged.unmerge(A, self.W, self.A_, self.B, 0.5)) == [[-0.5, 2, 3.5], [7, 5, 5]]
        assert values(judged.apply(A, ball([[1, 1]]), self.W, self.A_, self.B, 0.5)) == [[3.5, 7, 9.5]]
        assert values(judged.apply(A, ball([1, 1]), self.W, self.A_, self.B, 0.5)) == [3.5, 7, 9.5]
        assert values(judged.gradient_input(A, ball([[1, 0, 0]]), self.W, self.A_, self.B, 0.5)) == [[2.5, 1]]
        start = judged.merge_symmetric(A, self.W, self.A_, self.B, ball([[1], [0]]), ball([[0, 2, 0]]), 0.5)
        assert values(start) == [[2.5, 1, 2.5], [1, 5, 7]]

    def test_gradients_and_sgd(self):
        # G B^T = (2, 4), A^T G = (-1, 0).
        factor, other, G = ball([[1], [-1]]), ball([[2, 0]]), ball([[1, 2], [2, 2]])
        assert values(judged.gradients_dense(A, G, factor, other, 3.0)) == [[[6], [12]], [[-3, 0]]]
        assert values(judged.gradients_factored(A, ball(np.eye(2)), G, factor, other, 3.0)) == [[[6], [12]], [[-3, 0]]]
        assert values(judged.sgd(A, factor, other, G, 3.0, 0.5)) == [[[-2], [-7]], [[3.5, 0]]]
        moved = [[-27, 0], [-67.5, 0]]
        assert values(judged.sgd_update(A, factor, other, G, 3.0, 0.5)) == moved
        assert values(judged.update(A, factor, other, ball([[-2], [-7]]), ball([[3.5, 0]]), 3.0)) == moved
        assert values(judged.sgd_frozen(A, factor, other, G, 3.0, 0.5)) == [[3.5, 0]]
        assert values(judged.sgd_frozen_update(A, factor, G, 3.0, 0.5)) == [[4.5, 0], [-4.5, 0]]

    def test_random_projection(self):
        G, factor, other = ball([[1, 2], [3, 4]]), ball([[1, 0], [0, 2]]), ball([[1, 1], [0, 1]])
        expected = [[-1, -1.75], [-4.75, -6.75]]
        assert values(judged.random_projection_update(A, G, factor, other, 0.5)) == expected

    def test_adamw(self):
        # m = 3 over 0.75, v = 7 over 0.4375, root 4: 10 - 4 / (4 + 4), after a decay of 1 in 10.
        rule = {"step": 2, "learning_rate": 1.0, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 4.0, "weight_decay": 0.125}
        made = judged.adamw_array(A, ball([8]), ball([4]), ball([2]), ball([4]), **rule)
        assert values(made) == [[6.5], [3], [7]]

    def test_additive(self):
        assert values(judged.additive_delta(A, ball([[1, 2], [3, 4]]), ball([[5, 0, 0, 0], [0, 0, 0, 7]]))) == [
            [6, 2, 1, 2],
            [3, 4, 3, 11],
        ]
        G = ball([[1, 2, 3, 4], [5, 6, 7, 8]])
        assert values(judged.additive_gradients(A, G, 2)) == [[[4, 6], [12, 14]], [[1, 2, 3, 4], [5, 6, 7, 8]]]
        assert values(judged.additive_gradients(A, G, 1)) == [[[10], [26]], [[6, 8, 10, 12]]]
        assert values(judged.additive_update(A, ball([[1, 2], [3, 5]]), 1, 1.0)) == [[-7, -10], [-12, -15]]

    def test_orientation(self):
        assert values(judged.from_peft(A, self.W, self.B, self.A_))[0] == [[1, 4], [2, 5], [3, 6]]


class TestCorpus:
    def test_every_operator_has_six_cases_and_the_exact_ones_it_owes(self):
        for operator in judged.OPERATORS:
            mine = [case for case in judged.CASES if case.op == operator.name]
            assert len(mine) >= 6, operator.name
            assert not operator.multilinear or sum(case.exact for case in mine) >= 5, operator.name

    def test_one_square_weight_and_no_scale_of_one_elsewhere(self):
        """A wrong orientation shows only where shapes allow it, a lost scale only where it is not 1."""
        shapes = {case["A"].shape[0] == case["B"].shape[1] for case in judged.CASES if case.op == "lora.merge"}
        assert shapes == {True, False}
        assert not any(case.arguments.get("scale") == 1.0 for case in judged.CASES if not case.exact)

    def test_cancelling_cases_see_a_part_in_a_thousand(self):
        for name in ("merge", "apply", "unmerge", "gradient_input"):
            vector = build(CASES[f"{name}/exact-cancelling"])
            for dtype in vector.case.dtypes:

                def short(name=name, **arguments):
                    arguments["scale"] = 0.999 * arguments["scale"]
                    return getattr(lora, name)(**{k: _wide(v) for k, v in arguments.items()})

                assert judge("mutant", short, vector, Profile(dtype)).failed, (name, dtype)


def _wide(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_honest_arithmetic_stays_within_the_bound(function):
    """float32 in two orders; 16 bits rounded once at the end come close to their bound and stay below it."""
    call, worst = FUNCTIONS[function].call, 0.0
    for case in (c for c in judged.CASES if c.op == f"lora.{function}" and not c.exact):
        vector = build(case)
        for order in ("reversed", "split") if "float32" in case.dtypes else ():
            with working_precision("float32", order, eager=False):
                verdict = judge("honest", call, vector, FLOAT32)
            assert not verdict.failed, verdict.message
        for dtype in {"float16", "bfloat16"} & set(case.dtypes):
            outputs = call(**case.arguments)
            rounded = [np.asarray(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
            rounded = [_round(o, dtype) for o in rounded]
            ratio = compare(rounded, vector, Profile(dtype), exact=False).ratio
            assert ratio <= 1
            worst = max(worst, ratio)
    if function not in ("from_peft", "to_peft"):
        assert worst > 0.2


def _round(values_, dtype):
    from conformance.budget import round_to

    return round_to(values_, dtype)


@pytest.mark.parametrize("law", judged.LAWS, ids=lambda law: f"{law.name}-{law.operators[0]}")
def test_law_holds_for_the_specification(law):
    for op in law.operators:
        call = FUNCTIONS[op.removeprefix("lora.")].call
        for profile in (Profile("float64", "strict", "A64"), Profile("bfloat16", "fused")):
            verdict = check_law("spec", _stored(call, profile), law, op, profile, 3)
            assert not verdict.failed, verdict.message


def _stored(call, profile):
    def run(**arguments):
        made = call(**{k: _wide(v) for k, v in arguments.items()})
        return tuple(_round(np.asarray(m), profile.dtype) for m in (made if isinstance(made, tuple) else (made,)))

    return run


@pytest.mark.parametrize(
    ("law", "bug"),
    [
        ("scale_follows_alpha_and_r", "alpha not divided by r"),
        ("one_hot_factors_place_the_scale", "transposed where square"),
        ("zero_factor_gives_the_base", "the base left out"),
        ("scale_is_affine", "scale squared"),
        ("powers_of_two_move_between_the_factors", "B read in the other memory order"),
        ("start_of_the_symmetric_form_is_the_base", "the start not scaled"),
        ("rows_are_independent", "the first row for all"),
        ("one_hot_gradient_copies_the_factors", "no scale in dA"),
        ("rows_add_up", "the last row only"),
        ("unmoved_factors_give_zero", "the first order only"),
        ("one_moved_entry_shows_the_other_factor", "the product of the moves"),
        ("one_hot_gradient_moves_a_row_and_a_column", "the new A in the gradient of B"),
        ("one_hot_gradient_gives_a_cross", "the second order with the sign of the first"),
        ("orders_of_the_scale", "learning_rate once in the second order"),
        ("repeated_factors_change_nothing", "the sum over columns, not the mean"),
        ("states_are_running_means", "decay through the gradient (Adam)"),
        ("constant_gradient_moves_by_the_rate", "no correction of v"),
        ("decay_is_decoupled", "decay without learning_rate"),
        ("first_step_is_the_normalised_gradient", "AdamW on the dense gradient, then projected"),
        ("zero_gradient_lets_the_states_fade", "states start anew at every step"),
        ("one_entry_repeats_by_residue", "blocks instead of residues"),
        ("one_entry_of_the_gradient_reaches_two", "blocks instead of residues"),
        ("one_entry_of_the_gradient_gives_a_comb", "full training"),
        ("everything_is_transposed", "a square weight kept as it is"),
    ],
)
def test_law_fails_for_a_known_bug(law, bug):
    pairs = [
        (entry, mutant)
        for entry in judged.LAWS
        for mutant in (*judged.MUTANTS, *judged.MUSEUM)
        if entry.name == law and mutant.bug == bug and mutant.op in entry.operators
    ]
    assert pairs
    for entry, mutant in pairs:
        profile = Profile("float64", "strict", "A64")
        assert check_law("mutant", mutant.call, entry, mutant.op, profile, 25).outcome == "logic", mutant


def test_aliasing_is_seen():
    case = CASES["to_peft/exact-d5-e7-r3"]

    def views(W, A, B):
        return W.T, A.T, B.T

    with pytest.raises(LawFailed, match="a result shares memory of W"):
        judged.arguments_are_not_aliased(views, case)


def test_expected_values_do_not_depend_on_the_precision():
    case = CASES["sgd_update/grid"]
    wide, narrow = (reference(case.under(p), digits=True)["dW"] for p in (Profile("float64"), Profile("bfloat16")))
    assert np.array_equal(wide.value, narrow.value)
    assert (narrow.rad > wide.rad).all()
