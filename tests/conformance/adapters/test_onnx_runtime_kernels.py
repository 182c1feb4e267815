"""ONNX Runtime's kernels behind our argument names: literal values, declined combinations, the fused norm's epsilon."""

import fnmatch
import math

import numpy as np
import pytest

from conformance import vectors
from conformance.adapters import deviations, onnx_runtime_kernels
from conformance.budget import Profile
from conformance.case import OPERATORS, Unsupported, cases
from conformance.verdict import judge

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IMPLEMENTATIONS = onnx_runtime_kernels.implementations()
DEVIATIONS = deviations("onnxruntime-kernels")
FIRST = {}
# An inexact case, where the operator has one.
for case in sorted(cases(), key=lambda c: c.exact):
    if not any(fnmatch.fnmatchcase(case.id, line.pattern) for line in DEVIATIONS):
        FIRST.setdefault(case.op, case)
PLAIN = [i for i in IMPLEMENTATIONS if "pattern" not in i.name]
PATTERN = {i.profile.dtype: i for i in IMPLEMENTATIONS if "pattern" in i.name}


def function(op, dtype="float32"):
    return next(i.functions[op] for i in PLAIN if i.profile.dtype == dtype and op in i.functions)


def test_every_claim_is_an_operator():
    claimed = {op for i in IMPLEMENTATIONS for op in i.functions}
    assert len(claimed) > 15
    assert claimed <= set(OPERATORS())


@pytest.mark.parametrize("op", sorted({op for i in PLAIN for op in i.functions}))
def test_a_case_of_each_operator_passes_in_every_declared_precision(op):
    vector = vectors.build(FIRST[op])
    judged = [i for i in PLAIN if op in i.functions and i.profile.dtype in vector.case.dtypes]
    verdicts = [judge(i.name, i.functions[op], vector, i.profile) for i in judged]
    assert [v.message for v in verdicts if v.outcome not in ("pass", "skipped")] == []
    assert any(v.outcome == "pass" for v in verdicts)


def _of(line):
    return [
        c for c in cases() if fnmatch.fnmatchcase(c.id, line.pattern) and (line.dtype == "*" or line.dtype in c.dtypes)
    ]


@pytest.mark.parametrize("line", [d for d in DEVIATIONS if _of(d)], ids=lambda d: f"{d.pattern}-{d.dtype}")
def test_a_deviation_still_deviates(line):
    case = _of(line)[0]
    vector = vectors.build(case)
    judged = [i for i in IMPLEMENTATIONS if case.op in i.functions and line.dtype in ("*", i.profile.dtype)]
    assert any(judge(i.name, i.functions[case.op], vector, i.profile).failed for i in judged)


def test_the_fused_norm_puts_its_own_epsilon():
    x = np.array([[3e-4, -4e-4]])
    mean = 12.5e-8
    for epsilon in (1e-12, 1e-7, 3.0):
        wide = PATTERN["float64"].functions["norm.rms_norm"](x=x, epsilon=epsilon)
        np.testing.assert_allclose(wide, x / math.sqrt(mean + 1e-5), rtol=1e-7)
        narrow = PATTERN["float32"].functions["norm.rms_norm"](x=x.astype(np.float32), epsilon=epsilon)
        np.testing.assert_allclose(narrow, x / math.sqrt(mean + epsilon), rtol=1e-6)


@pytest.mark.parametrize("name", ["near-1e-7", "near-1e-12"])
def test_the_fused_norm_fails_by_logic_where_epsilon_counts(name):
    vector = vectors.build(next(c for c in cases(["norm.rms_norm"]) if c.name == name))
    verdicts = {t: judge(i.name, i.functions["norm.rms_norm"], vector, i.profile) for t, i in PATTERN.items()}
    assert {t: v.outcome for t, v in verdicts.items()} == {"float64": "logic", "float32": "pass"}
    assert verdicts["float64"].ratio > 1e14


def test_the_operator_keeps_epsilon_in_double():
    x = np.array([[3e-4, -4e-4]])
    y = function("norm.rms_norm", "float64")(x=x, epsilon=2.0**-40)
    np.testing.assert_allclose(y, x / math.sqrt(12.5e-8 + 2.0**-40), rtol=1e-15)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("norm.rms_norm", {"x": np.ones((1, 2)), "epsilon": 1e-12}),
        ("norm.layer_norm", {"x": np.ones((1, 2)), "scale": np.ones(2), "bias": np.ones(2), "epsilon": 1e-7}),
        ("lora.merge", {"W": np.ones((1, 1)), "A": np.ones((1, 1)), "B": np.ones((1, 1)), "scale": 1 / 3}),
    ],
)
def test_attributes_that_float32_does_not_hold_are_declined_in_double(op, arguments):
    with pytest.raises(Unsupported, match="float32"):
        function(op, "float64")(**arguments)


def test_neighbouring_query_heads_share_a_key_head():
    q, k = np.ones((1, 2, 6, 3), np.float32), np.ones((1, 1, 2, 3), np.float32)
    v = np.array([[[[10.0, 1.0], [20.0, 2.0]]]], np.float32)
    y = function("attention.attend")(q=q, k=k, v=v, mask=None, kernel="softmax", scale=1.0)
    np.testing.assert_array_equal(y[0, :, :, 0], [[10, 10, 10, 20, 20, 20]] * 2)


def test_attention_expands_a_key_mask_and_a_hidden_row_is_zero():
    q = np.full((2, 3, 1, 1), math.log(3.0), np.float32)
    k, v = (np.array([x, x], np.float32).reshape(2, 2, 1, 1) for x in ([1.0, 0.0], [8.0, 4.0]))
    mask = np.array([[True, True], [False, False]]).reshape(2, 1, 1, 2)
    y = function("attention.attend")(q=q, k=k, v=v, mask=mask, kernel="softmax", scale=1.0)
    np.testing.assert_allclose(y.ravel(), [7, 7, 7, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("kernel", "scale"), [("laplace", 1.0), ("softmax", -0.5)])
def test_what_attention_does_not_take_is_declined(kernel, scale):
    x = np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(Unsupported, match="Attention"):
        function("attention.attend")(q=x, k=x, v=x, mask=None, kernel=kernel, scale=scale)


def test_rotations_turn_counterclockwise_in_their_layout():
    x, positions = np.array([1.0, 0, 0, 0], np.float32).reshape(1, 1, 1, 4), np.array([[2]])
    c, s = math.cos(2.0), math.sin(2.0)
    turned = {
        "rope.rotate_interleaved": ({}, [c, s, 0, 0]),
        "rope.rotate_half_split": ({}, [c, 0, s, 0]),
        "rope.rotate_contiguous": ({"rotary_width": 2, "layout": "half_split"}, [c, s, 0, 0]),
        "rope.rotate_proportional": ({"rotary_width": 2}, [c, 0, s, 0]),
    }
    for op, (options, expected) in turned.items():
        y = function(op)(x=x, positions=positions, base=100.0, **options)
        np.testing.assert_allclose(y.ravel(), expected, atol=1e-7)


def test_linear_attention_decays_then_adds_then_reads():
    q, k = np.full((1, 3, 1, 1), 2.0, np.float32), np.array([1.0, 3.0, 100.0], np.float32).reshape(1, 3, 1, 1)
    v = np.array([[5.0, 1.0], [7.0, 2.0], [100.0, 100.0]], np.float32).reshape(1, 3, 1, 2)
    start = np.array([8.0, 0.0], np.float32).reshape(1, 1, 1, 2)
    log_decay = np.full((1, 3, 1), math.log(0.5), np.float32)
    mask = np.array([[True, True, False]])
    run = function("linear_attention.recurrent")
    y, state = run(q=q, k=k, v=v, scale=0.5, log_decay=log_decay, mask=mask, initial_state=start)
    # 8/2 + 5 = 9, 9/2 + 21 = 25.5; 0/2 + 1, 1/2 + 6; the masked token changes nothing.
    np.testing.assert_allclose(y[0, :, 0], [[9, 1], [25.5, 6.5], [25.5, 6.5]], rtol=1e-6)
    np.testing.assert_allclose(state[0, 0, 0], [25.5, 6.5], rtol=1e-6)
    with pytest.raises(Unsupported, match="packed"):
        run(q=q, k=k, v=v, scale=0.5, cu_seqlens=np.array([0, 1, 3]))


def test_gemm_is_scaled_and_added_in_that_order():
    W, A, B = np.array([[1.0, 2.0]]), np.array([[3.0]]), np.array([[5.0, 7.0]])
    np.testing.assert_array_equal(function("lora.merge", "float64")(W=W, A=A, B=B, scale=0.5), [[8.5, 12.5]])
    np.testing.assert_array_equal(function("lora.unmerge", "float64")(W=W, A=A, B=B, scale=0.5), [[-6.5, -8.5]])
    np.testing.assert_array_equal(function("lora.delta", "float64")(A=A, B=B, scale=2.0), [[30, 42]])


def test_the_profile_of_float16_rotations_is_not_looser_than_needed():
    vector = vectors.build(FIRST["rope.rotate_interleaved"])
    rotate = function("rope.rotate_interleaved", "float16")
    assert judge("onnxruntime", rotate, vector, Profile("float16", "fused", "A64")).outcome == "pass"
    assert judge("onnxruntime", rotate, vector, Profile("float16", "strict", "A64")).outcome == "precision"
