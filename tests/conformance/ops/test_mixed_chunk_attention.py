"""The judge of mixed chunk attention: its definition by hand, its laws, its bounds and what it rejects."""

import functools
import math

import numpy as np
import pytest

from conformance.adapters.spec import implementations
from conformance.budget import Arithmetic, Profile
from conformance.case import OPERATORS, Case, as_tuple, reference, storage_type
from conformance.law import LawFailed
from conformance.ops import mixed_chunk_attention as judged
from conformance.strategies import of
from conformance.vectors import build
from conformance.verdict import check_law, judge

EXACT = Arithmetic(Profile("float64", angle="A64"), digits=True)
MUTANTS = {(m.op.split(".")[1], m.bug): m.call for m in (*judged.MUTANTS, *judged.MUSEUM)}
LAWS = {law.name: law for law in judged.LAWS}


def spec(function):
    return OPERATORS()[f"mixed_chunk_attention.{function}"].call


def case(function, name):
    return next(c for c in judged.CASES if c.id == f"mixed_chunk_attention.{function}/{name}")


def test_pairs_and_lengths_by_hand():
    valid = np.array([[True, False, True, True, True]])
    pairs = judged.dense("causal", valid, None, 2, "visible", None)
    np.testing.assert_array_equal(
        pairs.near[0].astype(int),
        [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
    )
    np.testing.assert_array_equal(
        pairs.far[0].astype(int),
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 1, 0]],
    )
    assert pairs.n_local.tolist() == [[1, 1, 1, 2, 1]] and pairs.n_linear.tolist() == [[0, 0, 1, 1, 3]]
    for normaliser, length in (("su", [0, 0, 2, 2, 4]), ("lucidrains_causal", [2] * 5), ("unnormalised", [1] * 5)):
        assert judged.dense("causal", valid, None, 2, normaliser, None).n_linear.tolist() == [length]
    for normaliser, length in (("su", 5), ("paper", 6), ("lucidrains", 5), ("visible", 4)):
        assert judged.dense("bidirectional", valid, None, 2, normaliser, None).n_linear.tolist() == [[length] * 5]
    assert judged.dense("causal_strict", valid, None, 2, "visible", None).n_local.tolist() == [[0, 1, 0, 1, 0]]
    stream = judged.dense("causal", valid, None, 2, "su", None, 3, np.array([5]))
    assert stream.n_linear.tolist() == [[6, 6, 8, 8, 10]]
    assert judged.dense("causal", valid, None, 2, "visible", None, 3, np.array([5])).n_linear.tolist() == [
        [5, 5, 6, 6, 8]
    ]


def test_pairs_of_packed_documents_by_hand():
    valid, segments = np.ones((1, 5), bool), np.array([[0, 1, 1, 1, 2]])
    same = judged.dense("bidirectional", valid, segments, 2, "paper", "same_document")
    assert same.near.sum(-1).tolist() == [[1, 1, 2, 2, 1]] and same.far.sum(-1).tolist() == [[1, 3, 3, 3, 1]]
    # Document 1 lies in two chunks of two.
    assert same.n_linear.tolist() == [[2, 4, 4, 4, 2]]
    ranges = judged.dense("bidirectional", valid, segments, 2, "visible", "overlapping_chunks")
    assert ranges.near.sum(-1).tolist() == [[2, 2, 2, 2, 1]] and ranges.far.sum(-1).tolist() == [[4, 4, 4, 4, 1]]
    member, reads = judged._same_document(EXACT, segments[:, :4].reshape(1, 2, 2))
    assert member.astype(int).tolist() == [[[[1, 0], [0, 1]], [[0, 1], [0, 1]]]] and reads.all()
    _, reads = judged._overlapping_chunks(EXACT, np.array([[[0, 0], [0, 1], [2, 2]]]))
    assert reads.astype(int).tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]


def test_the_reference_on_two_chunks_of_two():
    x = np.array([1.0, 2, 3, 4]).reshape(1, 4, 1)
    arguments = dict.fromkeys(judged.TOKENS, x) | {"v": np.ones((1, 4, 1)), "key_mask": None, "segments": None}
    arguments |= {"bias": None, "chunk": 2, "scale": 1.0, "kernel": "squared_relu", "documents": None}
    for function, normaliser, expected in (
        ("bidirectional", "su", [5, 15, 120, 210]),
        ("causal", "visible", [1, 10, 85.5, 206]),
        ("causal_strict", "unnormalised", [0, 4, 9, 156]),
    ):
        op = f"mixed_chunk_attention.{function}"
        y = reference(Case(op, "hand", {**arguments, "normaliser": normaliser}), digits=True)["y"]
        assert y.value[0, :, 0].tolist() == expected


def test_the_reference_of_kernels():
    scores, near = EXACT.exact(np.array([[[-1.0, 2.0, 0.0]]])), np.array([[[True, True, False]]])
    weights = functools.partial(judged.weights, EXACT, scores, near)
    assert weights("squared_relu").value.tolist() == [[[0, 4, 0]]]
    assert weights("identity").value.tolist() == [[[-1, 2, 0]]]
    np.testing.assert_allclose(weights("softmax").value[0, 0], [1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3)), 0])
    z = [(x - math.sqrt(0.5)) * math.sqrt(2 * math.pi) for x in (-1, 2)]
    expected = [*(0.5 * math.erfc(-t) for t in z), 0]
    np.testing.assert_allclose(weights("laplace").value[0, 0], expected, rtol=1e-13)


def test_the_reference_of_a_step():
    # One buffered token of value 5, a closed chunk of sum 7; two new tokens close the chunk of three.
    one = np.ones((1, 2, 1))
    arguments = {
        "summary": np.full((1, 1, 1), 7.0), "chunks": 1, "counted": np.array([3]), "held_k_quad": one[:, :1],
        "held_k_lin": 2 * one[:, :1], "held_v": 5 * one[:, :1], "held_valid": np.array([[True]]), "q_quad": one,
        "k_quad": one, "q_lin": one, "k_lin": one, "v": np.array([[[1.0], [2.0]]]),
        "key_mask": np.array([[True, False]]),
        "bias": None, "chunk": 3, "scale": 1.0, "kernel": "squared_relu", "normaliser": "visible",
    }  # fmt: skip
    out = reference(Case(judged.STEP, "hand", arguments), digits=True)
    np.testing.assert_allclose(out["y"].value[0, :, 0], [6 / 2 + 7 / 3, 6 / 2 + 7 / 3], rtol=1e-15)
    assert out["summary"].value.tolist() == [[[7 + 2 * 5 + 1]]]
    assert out["chunks"].value == 2 and out["counted"].value.tolist() == [5] and out["held_v"].shape == (1, 0, 1)


@pytest.mark.parametrize("dtype, name", [("float64", "strict"), ("float32", "strict"), ("bfloat16", "eager")])
def test_laws_hold_for_the_specification(dtype, name):
    for law in judged.LAWS:
        op = law.operators[0]
        profile = Profile(dtype, name, "A64" if dtype == "float64" else "A32")
        made = next(i for i in implementations() if i.profile == profile)
        verdict = check_law(made.name, made.functions[op], law, op, profile, 4)
        assert verdict.outcome == "pass", verdict.message


@pytest.mark.parametrize(
    "law, function, bug",
    [
        ("weights_of_the_linear_part", "causal", "the prefix of sums is inclusive"),
        ("weights_of_the_linear_part", "bidirectional", "sums are not reduced over groups"),
        ("weights_of_the_local_part", "bidirectional", "the bias is added after the kernel"),
        ("lengths_of_every_normaliser", "causal", "the printed length (g-1) n/c"),
        ("lengths_of_every_normaliser", "bidirectional", "the padded tail counts in n"),
        ("a_sum_keeps_its_small_parts", "causal", "the carried sum is kept in bfloat16"),
        ("fast_weights_do_not_depend_on_the_chunk", "causal_strict", "a token reads itself"),
        ("the_future_is_invisible", "causal", "a leak at the edge of a chunk"),
        ("the_future_is_invisible", "unit", "never causal"),
        ("masked_keys_are_invisible", "bidirectional", "masked keys enter the sums"),
        ("padding_changes_nothing", "bidirectional", "padded keys stay in the normaliser"),
        ("documents_do_not_touch", "causal", "document borders are lost"),
        ("overlapping_chunks_read_ranges", "causal", "chunks are compared by their first id"),
        ("arguments_come_back", "bidirectional", "the caller's document ids are overwritten"),
        ("two_steps_are_one", "step", "the chunk number is not carried"),
        ("the_state_is_a_sum_over_closed_chunks", "step", "only new tokens enter the sum"),
        ("the_carried_sum_is_read_through_q_lin", "step", "the carried state is not used"),
        ("weights_of_the_local_part_of_a_step", "step", "the bias is ignored"),
        ("rows_make_heads", "scale_offset_heads", "rows inverted"),
        ("the_gate_is_the_tokens_own", "unit", "columns in the order v, u"),
        ("equal_tokens_give_a_closed_form", "unit", "z is not activated"),
        ("equal_tokens_turn_by_their_positions", "unit", "base 500000"),
        ("a_common_shift_of_positions_changes_nothing", "unit", "queries are not rotated"),
        ("angle_zero_is_no_rotation", "unit", "no positions stand for 0, 1, 2, ..."),
        ("no_visible_key_gives_the_output_bias", "unit", "the residual is added"),
        ("ids_may_be_renamed", "same_document", "columns for ids that do not occur"),
        ("tokens_share_a_column", "same_document", "columns in order of appearance"),
        ("ranges_that_meet_are_read", "overlapping_chunks", "sets of ids are compared, not ranges"),
    ],
)
def test_laws_reject(law, function, bug):
    profile = Profile("float64", angle="A64")
    op = f"mixed_chunk_attention.{function}"
    with np.errstate(all="ignore"):
        verdict = check_law("mutant", MUTANTS[function, bug], LAWS[law], op, profile, 40)
    assert verdict.failed


@pytest.mark.parametrize("function", [*judged.MODES, "step", "unit"])
def test_bounds_are_met_and_not_idle(function):
    """A result rounded once to 16 bits comes near its bound; one wrong in the fourth digit misses it in float32."""
    name = {"step": "several-chunks", "unit": "su"}.get(function, "su")
    vector = build(case(function, name))

    def rounded(wrong, **arguments):
        wide = {k: v.astype(float) if getattr(v, "dtype", None) is not None and v.dtype.kind == "f" else v
                for k, v in arguments.items()}  # fmt: skip
        out = as_tuple(spec(function)(**wide))
        return tuple(wrong * x if np.asarray(x).dtype.kind == "f" else x for x in out)

    for dtype in ("float16", "float32"):
        verdict = judge("rounded", functools.partial(rounded, 1.0), vector, Profile(dtype))
        assert verdict.outcome == "pass"
    target = storage_type("float16")

    def stored(**arguments):
        return tuple(
            np.asarray(x).astype(target) if np.asarray(x).dtype.kind == "f" else x for x in rounded(1.0, **arguments)
        )

    assert 0.2 < judge("stored", stored, vector, Profile("float16")).ratio <= 1
    assert judge("wrong", functools.partial(rounded, 1.001), vector, Profile("float32")).failed


def test_a_state_off_by_a_thousandth_is_seen_even_in_bfloat16():
    for function in judged.MODES:
        vector = build(case(function, "exact-cancellation"))
        wrong = MUTANTS[function, "the carried sum loses one part in a thousand"]

        def in_storage(wrong=wrong, **arguments):
            return wrong(**{k: v.astype(float) if isinstance(v, np.ndarray) else v for k, v in arguments.items()})

        assert judge("spec", spec(function), vector, Profile("float64", angle="A64")).outcome == "pass"
        assert judge("wrong", in_storage, vector, Profile("bfloat16")).failed


def test_drawn_cases_fit_the_operators():
    from hypothesis import given, settings

    for function in (*judged.MODES, "step", "scale_offset_heads", "unit", "same_document", "overlapping_chunks"):
        op = f"mixed_chunk_attention.{function}"

        @settings(max_examples=5)
        @given(of(op, Profile("float32")))
        def fits(drawn):
            assert set(drawn.arguments) == set(OPERATORS()[drawn.op].parameters)

        fits()


def test_a_law_says_what_it_saw():
    wrong = MUTANTS["causal", "the prefix of sums is inclusive"]
    with pytest.raises(LawFailed, match=r"law weights_of_the_linear_part \(float64-strict\): out\["):
        judged.weights_of_the_linear_part(wrong, case("causal", "su"))
