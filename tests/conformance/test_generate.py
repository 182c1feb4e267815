"""The generator that any language can repeat."""

import numpy as np
import pytest

from conformance.budget import DTYPES, round_to
from conformance.generate import Draw, fnv1a


def test_fnv1a_matches_the_published_values():
    assert fnv1a("") == 0xCBF29CE484222325
    assert fnv1a("a") == 0xAF63DC4C8601EC8C
    assert fnv1a("foobar") == 0x85944171F73967E8


def test_splitmix64_matches_the_published_values():
    draw = Draw("")
    draw._seed = 1234567
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert draw.words(3).tolist() + draw.words(2).tolist() == published


def test_grid_is_exact_in_every_storage_format():
    values = Draw("grid").grid(3000, exponent=-6)
    assert values.min() == -127 / 64 and values.max() == 127 / 64
    for dtype in DTYPES:
        assert np.array_equal(round_to(values, dtype), values)


@pytest.mark.parametrize(("bits", "holds", "loses"), [(24, "float32", "float16"), (53, "float64", "float32")])
def test_dense_needs_exactly_its_bits(bits, holds, loses):
    values = Draw("dense").dense(200, bits=bits)
    assert np.abs(values).max() <= 1 and values.min() < -0.9
    assert np.array_equal(round_to(values, holds), values)
    assert not np.array_equal(round_to(values, loses), values)


def test_distribution_rows_sum_to_exactly_one():
    rows = Draw("rows").distribution(50, 7)
    assert (rows > 0).all() and (rows.sum(axis=1) == 1).all()


def test_permutation_and_mask():
    assert sorted(Draw("p").permutation(17).tolist()) == list(range(17))
    kept = Draw("m").mask(4000, keep=0.25).mean()
    assert 0.22 < kept < 0.28


def test_names_separate_streams_and_repeat():
    assert np.array_equal(Draw("x").words(5), Draw("x").words(5))
    assert not np.array_equal(Draw("x").words(5), Draw("y").words(5))
