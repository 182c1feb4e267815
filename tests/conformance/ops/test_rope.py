"""The references of rope by hand, its laws on right and wrong implementations, its bounds on honest arithmetic."""

import functools
import math

import numpy as np
import pytest

from conformance import vectors, verdict
from conformance.adapters import spec
from conformance.budget import MP, Arithmetic, Profile, round_to
from conformance.case import OPERATORS, reference
from conformance.ops import rope

FLOAT32 = Profile("float32")
# To 50 digits, from tables of the constants.
COS_2 = "-0.41614683654714238699756822950076218976600077107554"
SIN_2 = "0.90929742682568169539601986591174484270225497144789"


@functools.cache
def vector(identifier):
    return vectors.build(next(c for c in rope.CASES if c.id == identifier))


def implementation(name):
    return next(i for i in spec.implementations() if i.name == name)


def judged(function, identifier, profile):
    return verdict.judge("mine", function, vector(identifier), profile)


# References.


def test_reference_of_one_pair_is_the_sine_and_cosine_of_the_position():
    a = Arithmetic(FLOAT32, digits=True)
    x = a.exact(np.array([[[[1.0, 0.0]]]]))
    out = rope.rotate(a, x, np.array([[[2]]]), 10000.0)
    assert [MP.nstr(v, 45) for v in out.mid.ravel()] == [MP.nstr(MP.mpf(v), 45) for v in (COS_2, SIN_2)]


@pytest.mark.parametrize(
    ("layout", "width", "pair"),
    [
        ("interleaved", 6, [(0, 1), (2, 3), (4, 5)]),
        ("half_split", 6, [(0, 3), (1, 4), (2, 5)]),
        ("interleaved", 4, [(0, 1), (2, 3)]),
        ("half_split", 4, [(0, 2), (1, 3)]),
        ("proportional", 4, [(0, 3), (1, 4)]),
    ],
)
def test_reference_of_every_layout_by_hand(layout, width, pair):
    x, p, counted = [1.0, 2.0, 3.0, 5.0, 7.0, 11.0], 3, 6 if layout == "proportional" else width
    expected = list(x)
    for i, (one, two) in enumerate(pair):
        angle = p * 1000.0 ** (-2 * i / counted)
        expected[one] = x[one] * math.cos(angle) - x[two] * math.sin(angle)
        expected[two] = x[one] * math.sin(angle) + x[two] * math.cos(angle)
    a = Arithmetic(FLOAT32, digits=True)
    out = rope.rotate(a, a.exact(np.array([x])), np.array([p]), 1000.0, layout=layout, rotary_width=width)
    np.testing.assert_allclose(out.value[0], expected, rtol=1e-14)


def test_reference_of_the_scalings_by_hand():
    a = Arithmetic(FLOAT32)
    np.testing.assert_allclose(rope.frequencies(a, 6, 1000.0).value, [1, 0.1, 0.01], rtol=1e-15)
    np.testing.assert_allclose(rope.frequencies_linear(a, 6, 1000.0, 4.0).value, [0.25, 0.025, 0.0025], rtol=1e-15)
    ntk = [1.0, 0.1 / 2, 0.01 / 4]
    np.testing.assert_allclose(rope.frequencies_ntk(a, 6, 1000.0, 4.0).value, ntk, rtol=1e-15)
    # 1 + 2 (192 - 128)/128 = 2.
    grown = [1.0, 0.1 / math.sqrt(2), 0.01 / 2]
    np.testing.assert_allclose(rope.frequencies_dynamic_ntk(a, 6, 1000.0, 2.0, 192, 128).value, grown, rtol=1e-15)
    # Indices 3 ln(L / 2 pi beta) / ln 1000 for L = 200: 0.0 (floor of -0.002) and 2 (ceiling of 1.503).
    yarn = [1.0, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4]
    np.testing.assert_allclose(rope.frequencies_yarn(a, 6, 1000.0, 4.0, 200, 32.0, 1.0).value, yarn, rtol=1e-15)
    np.testing.assert_allclose(rope.yarn_magnitude(a, math.e**5).value, 1.5, rtol=1e-15)
    assert rope.yarn_magnitude(a, 0.5).value == 1.0


def test_reference_of_permutations_by_hand():
    a = Arithmetic(FLOAT32)
    assert rope.half_split_order(a, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert rope.interleaved_order(a, 6).tolist() == [0, 3, 1, 4, 2, 5]
    moved = rope.permute_projection(a, a.exact(np.arange(10.0)), 2, np.array([0, 2, 1, 3]))
    assert moved.value.tolist() == [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]
    arrays = [a.exact(np.arange(6.0)[None] + k) for k in (0, 10, 20, 30)]
    out = rope.permute_gau(a, *arrays[:2], arrays[2][:, 2:], arrays[3][:, 2:], 4, np.array([0, 2, 1]))
    assert [o.value[0].tolist() for o in out] == [
        [0, 1, 2, 4, 3, 5],
        [10, 11, 12, 14, 13, 15],
        [22, 24, 23, 25],
        [32, 34, 33, 35],
    ]


def test_a_law_sees_the_radius_that_a_vector_has():
    """float64 midpoints of the laws and 50-digit ones of the vectors differ by less than the radius says."""
    for case in rope.CASES:
        case = case.under(Profile("float64", "strict", "A64"))
        fast, slow = reference(case), reference(case, digits=True)
        for name, ball in fast.items():
            assert (np.abs(ball.value - slow[name].value) <= ball.rad).all(), (case.id, name)


# Bounds.


def rotated_in_float32(x, positions, base, exponent=lambda i, d: -2 * i / d):
    """Half-split rotation as a float32 implementation forms it, frequencies through exp and log."""
    d = x.shape[-1]
    i = np.arange(d // 2, dtype=np.float32)
    theta = np.exp(exponent(i, np.float32(d)).astype(np.float32) * np.log(np.float32(base)))
    phi = (positions.astype(np.float32)[..., None] * theta)[..., None, :]
    cos, sin = np.cos(phi), np.sin(phi)
    a, b = np.split(x.astype(np.float32), 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


@pytest.mark.parametrize("name", ["grid", "long-positions", "base-500000", "wide-head", "magnitudes"])
def test_honest_float32_angles_pass_where_their_class_reaches(name):
    found = judged(rotated_in_float32, f"rope.rotate_half_split/{name}", FLOAT32)
    assert found.outcome == "pass", found.message


def test_float32_angles_are_not_judged_beyond_their_class_unless_declared():
    identifier = "rope.rotate_half_split/very-long-positions"
    assert judged(rotated_in_float32, identifier, FLOAT32).outcome == "skipped"
    assert judged(rotated_in_float32, identifier, Profile("float32", "strict", "A64")).failed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_16_bits_uses_between_a_fifth_and_all_of_the_bound(dtype):
    wide = implementation(f"spec {dtype}")
    for op in rope.ROTATIONS:
        found = judged(wide.functions[op], f"{op}/grid", wide.profile)
        assert found.outcome == "pass"
        assert 0.2 < found.ratio <= 1.0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_frequencies_of_16_bits_fail_at_long_positions_in_every_format(dtype):
    def coarse(x, positions, base):
        wide = x.astype(np.float64)
        theta = round_to(base ** (-2.0 * np.arange(x.shape[-1] // 2) / x.shape[-1]), "bfloat16")
        phi = (positions[..., None] * theta)[..., None, :]
        a, b = np.split(wide, 2, axis=-1)
        return np.concatenate([a * np.cos(phi) - b * np.sin(phi), a * np.sin(phi) + b * np.cos(phi)], -1).astype(
            x.dtype
        )

    profile = Profile(dtype, "eager" if dtype != "float32" else "strict")
    assert judged(coarse, "rope.rotate_half_split/long-positions", profile).outcome == "logic"


def test_the_angle_class_alone_moves_the_bound_at_long_positions():
    case = vector("rope.rotate_half_split/long-positions").case.under(FLOAT32)
    exact = case.under(Profile("float32", "strict", "A64"))
    radius = {k: reference(c, digits=True)["y"].rad.max() for k, c in (("A32", case), ("A64", exact))}
    assert radius["A32"] > 100 * radius["A64"]


# Laws and mutants.


@pytest.mark.parametrize("name", ["spec float64", "spec float32 reversed", "spec bfloat16 eager"])
def test_laws_hold_for_the_specification(name):
    right = implementation(name)
    for law in rope.LAWS:
        for op in law.operators:
            found = verdict.check_law("spec", right.functions[op], law, op, right.profile, 5)
            assert not found.failed, found.message


@pytest.mark.parametrize(
    ("op", "bug", "law"),
    [
        ("rotate_interleaved", "clockwise rotation", "impulse_response"),
        ("rotate_interleaved", "positions clipped at 2047", "relative_position"),
        ("rotate_interleaved", "positions start at 1", "position_zero_is_identity"),
        ("rotate_half_split", "cos and sin repeated pairwise, as for interleaved pairs", "composition"),
        ("rotate_interleaved", "positions ignored, arange used", "tokens_carry_their_positions"),
        ("rotate_contiguous", "features that pass through are lost", "rest_passes_through"),
        ("rotate_contiguous", "exponent over the width of the head", "impulse_response"),
        ("angles", "positions cut to integers", "outer_product"),
        ("frequencies", "one value for each feature", "width_zero_is_empty"),
        ("frequencies", "exponent -i/D", "geometric"),
        ("frequencies_linear", "multiplied by the factor", "factor_divides"),
        ("frequencies_ntk", "factor without the exponent D/(D-2)", "ends_of_the_spectrum"),
        ("frequencies_dynamic_ntk", "grows by n/n_max only", "grows_past_the_training_length"),
        ("frequencies_yarn", "indices not clamped", "ramp"),
        ("yarn_magnitude", "logarithm to base 10", "tenth_of_the_logarithm"),
        ("half_split_order", "the inverse order", "even_features_first"),
        ("interleaved_order", "the inverse order", "halves_in_turn"),
        ("permute_projection", "the first head only", "labels_travel"),
        ("permute_gau", "beta forgotten", "shared_features_travel_together"),
    ],
)
def test_every_law_fails_for_a_wrong_implementation(op, bug, law):
    op = f"rope.{op}"
    mutant = next(m for m in rope.MUTANTS if m.op == op and m.bug == bug)
    wanted = next(x for x in rope.LAWS if x.name == law and op in x.operators)
    found = verdict.check_law("mutant", mutant.call, wanted, op, Profile("float64", "strict", "A64"), 25)
    if law == "width_zero_is_empty":
        # This one is right at width 0; the law is there for those that divide by it.
        assert not found.failed
        return
    assert found.outcome == "logic", found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vectors_kill_every_mutant_and_museum_piece():
    survivors = []
    for mutant in (*rope.MUTANTS, *rope.MUSEUM):
        mine = [c for c in rope.CASES if c.op == mutant.op and "float64" in c.dtypes]
        profile = Profile("float64", "strict", "A64")
        if not any(verdict.judge("mutant", mutant.call, vector(c.id), profile).failed for c in mine):
            survivors.append(f"{mutant.op}: {mutant.bug}")
    assert survivors == []


def test_known_bugs_are_told_apart_by_name():
    names = [(m.op, m.bug) for m in (*rope.MUTANTS, *rope.MUSEUM)]
    assert len(set(names)) == len(names)
    assert all(m.url.startswith("https://github.com/") for m in rope.MUSEUM)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_known_bug_is_recognised_and_mistaken_for_no_other():
    profile = Profile("float64", "strict", "A64")
    for mutant in (*rope.MUTANTS, *rope.MUSEUM):
        mine = [vector(c.id) for c in rope.CASES if c.op == mutant.op and "float64" in c.dtypes]
        found = [(verdict.judge("mutant", mutant.call, v, profile), v) for v in mine]
        assert [m.bug for m, _ in verdict.diagnose(found)] == [mutant.bug], mutant.op


def test_every_operator_has_the_cases_it_owes():
    for operator in rope.OPERATORS:
        mine = [c for c in rope.CASES if c.op == operator.name]
        assert len(mine) >= 6
        assert not operator.multilinear or sum(c.exact for c in mine) >= 5
        assert operator.name in OPERATORS()
