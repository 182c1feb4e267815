"""identify: every convention is named, nothing else is."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from conformance.adapters import AdapterError
from conformance.budget import round_to
from conformance.case import Unsupported
from conformance.identify import functions, identify

D = 16


def powers(width, base=10000.0):
    return base ** (-2.0 * np.arange(width // 2) / width)


def pairs(layout, rotary, width=D):
    i = np.arange(rotary // 2)
    return {
        "interleaved": (2 * i, 2 * i + 1),
        "half_split": (i, i + rotary // 2),
        "proportional": (i, i + width // 2),
    }[layout]


def rotation(first, second, theta, positions=lambda p: p, dtype=np.float64):
    """An implementation of its own: y = x cos + partner sin, feature by feature."""

    def function(x, p):
        phi = (np.asarray(positions(p), dtype)[..., None] * theta.astype(dtype))[..., None, :]
        y = x.astype(dtype)
        a, b = y[..., first], y[..., second]
        y[..., first], y[..., second] = a * np.cos(phi) - b * np.sin(phi), a * np.sin(phi) + b * np.cos(phi)
        return y

    return function


def of(layout, rotary=D, width=D, *, theta=None, sign=1, **options):
    theta = powers(width if layout == "proportional" else rotary) if theta is None else theta
    return rotation(*pairs(layout, rotary, width), sign * theta[: rotary // 2], **options)


CONVENTIONS = list(
    itertools.product(
        [("interleaved", 16), ("half_split", 16), ("interleaved", 8), ("half_split", 8), ("proportional", 8)],
        [1, -1],
        [10000.0, 500000.0, 1234.5],
    )
)


@pytest.mark.parametrize(("layout", "sign", "base"), CONVENTIONS)
def test_layout_sign_part_and_base_are_named(layout, sign, base):
    kind, rotary = layout
    found = identify(of(kind, rotary, sign=sign, theta=powers(D if kind == "proportional" else rotary, base)))
    assert found.named, str(found)
    assert (found.layout, found.rotary_width) == layout
    assert found.direction == {1: "counter-clockwise", -1: "clockwise"}[sign]
    assert found.base == pytest.approx(base, rel=1e-5)
    assert found.operator == {
        ("interleaved", 16): "rope.rotate_interleaved",
        ("half_split", 16): "rope.rotate_half_split",
        ("proportional", 8): "rope.rotate_proportional",
    }.get(layout, "rope.rotate_contiguous")


@pytest.mark.parametrize("width", [2, 4, 6, 10, 64, 128])
def test_widths(width):
    found = identify(of("half_split", width, width, theta=powers(width, 5e6)), width=width)
    assert found.named, str(found)
    assert found.rotary_width == width
    assert np.isnan(found.base) if width == 2 else found.base == 5e6


def test_a_quarter_of_a_wide_head():
    found = identify(of("proportional", 32, 128, theta=powers(128, 1e6)), width=128)
    assert str(found) == (
        "proportional partial (32 of 128 features), counter-clockwise, base 1000000, exponent over 128 "
        "(rope.rotate_proportional)"
    )


def test_a_contiguous_block_with_the_exponent_of_the_head_is_told_by_its_usual_base():
    found = identify(of("half_split", 8, theta=powers(16, 10000.0)))
    assert (found.named, found.base, found.exponent_width) == (True, 10000.0, 16)


def test_reversed_frequencies():
    found = identify(of("interleaved", theta=powers(D)[::-1]))
    assert (found.named, found.order, found.base) == (True, "reversed", 10000.0)
    assert "reversed order" in str(found)


@pytest.mark.parametrize("rotary", [16, 8])
def test_the_concatenating_shortcut(rotary):
    order = np.r_[0:rotary:2, 1:rotary:2, rotary:D]
    plain = of("interleaved", rotary)
    found = identify(lambda x, p: plain(x, p)[..., order])
    assert found.named
    assert found.layout == "interleaved"
    assert found.output.startswith("un-interleaved")


def test_linear_scaling():
    found = identify(of("half_split", theta=powers(D) / 8))
    assert (found.named, found.scaling, found.factor, found.base) == (True, "linear", 8.0, 10000.0)


def test_ntk_scaling_is_another_base_and_says_so():
    found = identify(of("half_split", theta=powers(D, 10000.0 * 4 ** (16 / 14))))
    assert found.named
    assert "NTK scaling by 4" in str(found)


@pytest.mark.parametrize("ramp", [(0, 3), (1, 5), (2, 6), (5, 9)])
def test_yarn_with_its_magnitude(ramp):
    lo, hi = ramp
    share = np.clip((hi - np.arange(8)) / (hi - lo), 0, 1)
    plain = of("half_split", theta=powers(D) * (share + (1 - share) / 4))
    found = identify(lambda x, p: (1 + 0.1 * np.log(4)) * plain(x, p))
    assert (found.named, found.scaling, found.factor, found.ramp) == (True, "yarn", 4.0, ramp), str(found)
    assert found.magnitude == pytest.approx(1.138629, rel=1e-5)


def test_yarn_without_its_magnitude_is_noted():
    share = np.clip((5 - np.arange(8)) / 4, 0, 1)
    found = identify(of("half_split", theta=powers(D) * (share + (1 - share) / 4)))
    assert (found.scaling, found.factor, found.ramp) == ("yarn", 4.0, (1, 5))
    assert "without YaRN's magnitude" in found.notes


def test_half_of_the_exponent_is_noted():
    found = identify(of("interleaved", theta=powers(D, 100.0)))
    assert found.base == pytest.approx(100)
    assert "or base 10000 with the exponent -i/16" in found.notes


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_working_precision_does_not_hide_a_convention(layout):
    single = identify(of(layout, dtype=np.float32))
    assert (single.named, single.base) == (True, 10000.0), str(single)
    for dtype in ("float16", "bfloat16"):
        plain = of(layout)
        found = identify(lambda x, p, plain=plain, dtype=dtype: round_to(plain(x, p), dtype))
        assert (found.named, found.layout, found.base) == (True, layout, 10000.0), str(found)


@pytest.mark.parametrize(
    ("form", "reach"),
    [
        ("b n h d", lambda f: f),
        ("b h n d", lambda f: lambda x, p: f(x.swapaxes(1, 2), p).swapaxes(1, 2)),
        ("b n d", lambda f: lambda x, p: f(x[:, :, None], p)[:, :, 0] if x.ndim == 3 else 1 / 0),
        ("n d", lambda f: lambda x, p: f(x[None, :, None], p[None])[0, :, 0] if x.ndim == 2 else 1 / 0),
    ],
)
def test_axes_are_found_out_or_given(form, reach):
    function = reach(of("half_split"))
    assert identify(function).form == form
    assert identify(function, form=form).named


def test_tensors_are_tried_where_torch_is_loaded():
    torch = pytest.importorskip("torch")
    theta = torch.tensor(powers(D), dtype=torch.float32)

    def function(x, positions):
        phi = (positions[..., None] * theta)[:, :, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * phi.cos() - b * phi.sin(), a * phi.sin() + b * phi.cos()], dim=-1)

    found = identify(function)
    assert (found.named, found.layout) == (True, "half_split"), str(found)


def test_short_tables_are_probed_as_far_as_they_reach():
    plain = of("half_split")

    def function(x, p):
        if p.max() >= 512:
            raise IndexError(p.max())
        return plain(x, p)

    found = identify(function)
    assert (found.named, found.probed_to) == (True, 511)


# What is no rotation, or a rotation that departs.


def last_features(x, p):
    y = x.copy()
    y[..., 8:] = of("interleaved", 8, 8)(x[..., 8:], p)
    return y


def lost(x, p):
    y = of("interleaved", 8)(x, p)
    y[..., 8:] = 0
    return y


def repeated_tables(x, p):
    phi = (p[..., None, None] * powers(D)).repeat(2, axis=-1)
    return x * np.cos(phi) + np.concatenate([-x[..., 8:], x[..., :8]], axis=-1) * np.sin(phi)


def one_pair_off(x, p):
    theta = powers(D)
    theta[3] *= 1.001
    return of("half_split", theta=theta)(x, p)


def mixed_signs(x, p):
    return of("half_split", theta=powers(D) * np.array([1, -1] * 4))(x, p)


def unsupported(x, p):
    raise Unsupported("half_split only")


PLAIN = of("interleaved")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, p: x, "nothing is rotated"),
        (lambda x, p: PLAIN(x, 0 * p), "nothing is rotated"),
        (lambda x, p: PLAIN(x, np.arange(p.shape[-1]) + 0 * p), "index of the token"),
        (lambda x, p: np.zeros_like(x), "nothing is rotated|positions have no effect"),
        (lambda x, p: np.tanh(PLAIN(x, p)), "pair \\(0, 1\\) is not rotated at position 1"),
        (lambda x, p: PLAIN(x, p) * (1 + np.abs(x).mean(axis=-1, keepdims=True) / 10), "not linear|is not rotated"),
        (lambda x, p: PLAIN(x + x.mean(axis=1, keepdims=True), p), "tokens depend on one another"),
        (lambda x, p: PLAIN(np.roll(x, 1, axis=1), p), "tokens depend on one another"),
        (lambda x, p: x + np.sin(p)[..., None, None], "depends on 16 input features"),
        (lambda x, p: x * np.cos(p)[..., None, None], "no feature is rotated"),
        (lambda x, p: -PLAIN(x, p), "changes its sign"),
        (lambda x, p: PLAIN(x, p)[..., np.r_[3, 0:3, 4:16]], "order of its own"),
        (last_features, "no known layout"),
        (lost, "feature 8 is lost"),
        (repeated_tables, "pair \\(0, 8\\) is not rotated"),
        (one_pair_off, "pair 3 is 0.03165"),
        (mixed_signs, "clockwise, others counter-clockwise"),
        (of("interleaved", positions=lambda p: p + 1), "angles begin as at position 1"),
        (of("interleaved", positions=lambda p: np.minimum(p, 2047)), "position 2049.*as at position 2047"),
        (of("interleaved", positions=lambda p: p % 1024), "position 1025.*as at position 1"),
        (of("interleaved", positions=lambda p: round_to(p, "bfloat16")), "position 377.*as at position 376"),
        (of("interleaved", theta=round_to(powers(D), "bfloat16")), "frequency of pair"),
        (of("interleaved", theta=powers(D, 10000.0) * 10 ** (-0.5)), "exponent is counted from 1"),
        (of("interleaved", theta=1 / powers(D)), "wrong sign, 10000\\^\\(\\+2i/16\\)"),
        (of("interleaved", theta=np.linspace(1, 0.01, 8)), "frequency of pair"),
        (lambda x, p: x[..., :8], "none of the forms"),
        (lambda x: x, "none of the forms.*TypeError"),
        (lambda x, p: x * np.nan, "not finite"),
        (unsupported, "not provided: half_split only"),
        (lambda x, p: PLAIN(x, p) * np.array([1.0, 2.0])[:, None], "two equal heads"),
    ],
)
def test_what_is_no_convention_is_called_none_and_why(function, says):
    found = identify(function)
    assert not found.named
    assert str(found).startswith("none: ")
    assert re.search(says, str(found)), str(found)


def test_none_names_the_closest_convention():
    found = identify(of("half_split", positions=lambda p: np.minimum(p, 2047)))
    assert (found.layout, found.base) == ("half_split", 10000.0)
    assert "Closest: half_split, counter-clockwise, base 10000 (rope.rotate_half_split)" in str(found)


def test_conventions_are_frozen_and_compare_by_value():
    found = identify(of("half_split"))
    assert found == identify(of("half_split"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.base = 1.0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="width >= 2"):
        identify(PLAIN, width=1)
    with pytest.raises(ValueError, match="form"):
        identify(PLAIN, form="d n")


# Functions behind a command-line argument.


def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def turn(x, positions):\n"
        "    phi = (positions[..., None] * 500000.0 ** (-np.arange(8) / 8))[:, :, None]\n"
        "    a, b = x[..., :8], x[..., 8:]\n"
        "    return np.concatenate([a * np.cos(phi) - b * np.sin(phi), a * np.sin(phi) + b * np.cos(phi)], -1)\n"
    )
    found = {name: identify(f) for name, f in functions(f"{path}:turn").items()}
    assert str(found["turn"]) == "half_split, counter-clockwise, base 500000 (rope.rotate_half_split)"
    with pytest.raises(AdapterError, match="no function 'other'"):
        functions(f"{path}:other")
    with pytest.raises(AdapterError, match="no such file"):
        functions(f"{tmp_path}/absent.py:turn")
    path.write_text("1 / 0\n")
    with pytest.raises(AdapterError, match="ZeroDivisionError"):
        functions(f"{path}:turn")


def test_an_adapter_that_rotates(tmp_path):
    path = tmp_path / "adapter.py"
    path.write_text(
        "from conformance.ops.rope import _rotate_interleaved, _rotate_contiguous\n"
        "IMPLEMENTS = {'rope.rotate_interleaved': _rotate_interleaved, 'rope.rotate_contiguous': _rotate_contiguous}\n"
        "PROFILE = {'float32': 'strict'}\n"
    )
    found = {name: identify(f) for name, f in functions(f"python:{path}").items()}
    assert {name: (c.layout, c.rotary_width, c.base) for name, c in found.items()} == {
        "rope.rotate_interleaved": ("interleaved", 16, 10000.0),
        "rope.rotate_contiguous interleaved": ("interleaved", 8, 10000.0),
        "rope.rotate_contiguous half_split": ("half_split", 8, 10000.0),
    }


def test_an_adapter_that_does_not_rotate(tmp_path):
    path = tmp_path / "adapter.py"
    path.write_text("IMPLEMENTS = {'rope.half_split_order': lambda width: None}\n")
    with pytest.raises(AdapterError, match=r"no rope\.rotate_\* operator"):
        functions(f"python:{path}")
