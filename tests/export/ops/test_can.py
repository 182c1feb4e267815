"""can as graphs: equal to the specification at every number of rows, degenerate rows, blocks, speed of one round."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from export import graph
from export.ops import can
from refimpl.check import DomainError, ShapeError
from refimpl.ops import can as spec

FORMS = ("alternating_normalization_loop", "alternating_normalization", "alternating_normalization_official")
SIMPLE = {"alpha": 1.0, "iterations": 1}


def sessions(model: onnx.ModelProto) -> list[Callable[..., list[np.ndarray]]]:
    """ONNX Runtime, everything optimised, and onnx's own evaluator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = {i.name for i in session.get_inputs()}
    evaluator = ReferenceEvaluator(model)
    return [
        lambda **arrays: session.run(None, {k: v for k, v in arrays.items() if k in names}),
        lambda **arrays: evaluator.run(None, arrays),
    ]


def built(call: Callable[..., Any], examples: dict[str, Any], opset: int = 20) -> graph.Built:
    made = graph.build(call, examples, opset=opset)
    onnx.checker.check_model(made.model, full_check=True)
    return made


def found_by(call: Callable[..., Any], **arrays: np.ndarray) -> list[np.ndarray]:
    """The results of ONNX Runtime, after onnx's evaluator gave the same."""
    one, two = (run(**arrays) for run in sessions(built(call, arrays).model))
    for ours, other in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-12, atol=1e-300)
    return one


def stack(n: int, b: int, k: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with zero classes, one class that no confident row has, a prior that is not normalised."""
    rng = np.random.default_rng(seed + 100 * n + b)
    confident, uncertain = rng.dirichlet(np.full(k, 0.5), n), rng.dirichlet(np.ones(k), b)
    confident[:, 1] = 0
    uncertain[b // 2 :, 2] = 0
    return {"confident": confident, "uncertain": uncertain, "prior": rng.uniform(0.5, 3, k)}


# Entropies.
@pytest.mark.parametrize("function", ["top_entropy", "top_entropy_unnormalized"])
@pytest.mark.parametrize("top", [2, 3, 11])
def test_entropies(function, top):
    rng = np.random.default_rng(top)
    made = built(lambda p: getattr(can, function)(p, top=top), {"p": rng.dirichlet(np.ones(7), 3)})
    assert made.fixed == {("p", 1): 7}
    rows = np.concatenate([rng.dirichlet(np.full(7, 0.3), 5), np.eye(7)[:2], np.zeros((1, 7))])
    rows[0, 2:] = 0
    for p in (rows, rows[:1], rows[:0]):
        for run in sessions(made.model):
            np.testing.assert_allclose(run(p=p)[0], getattr(spec, function)(p, top=top), rtol=1e-14, atol=2e-16)


def test_entropies_by_hand():
    """Two equal leaders of four, one certain class, nothing known; 0 ln 0 is 0 and never NaN."""
    p = np.array([[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    half = np.log(2) / np.log(3)
    np.testing.assert_allclose(found_by(lambda p: can.top_entropy(p, top=3), p=p)[0], [half, 0, 1, 1], atol=1e-15)
    # Three equal classes of 119, against the entropy of all of them.
    wide = np.zeros((1, 119))
    wide[0, [3, 50, 118]] = 1 / 3
    (found,) = found_by(lambda p: can.top_entropy_unnormalized(p, top=3), p=wide)
    np.testing.assert_allclose(found, [np.log(3) / np.log(119)], rtol=1e-14)


def test_top_is_clamped_to_the_classes():
    """Two classes with top 3: divided by ln 3, nothing would ever be uncertain."""
    assert found_by(lambda p: can.top_entropy(p, top=3), p=np.array([[0.5, 0.5]]))[0].tolist() == [1.0]


@pytest.mark.parametrize("max_top", [2, 3, 7, 99])
def test_ambiguous_any(max_top):
    rng = np.random.default_rng(max_top)
    made = built(lambda p: can.ambiguous_any(p, threshold=0.8, max_top=max_top), {"p": rng.dirichlet(np.ones(7), 2)})
    for n in (0, 1, 40):
        p = np.concatenate([rng.dirichlet(np.full(7, 0.6), n), np.zeros((1, 7)), np.eye(7)[:1]])
        expected = spec.ambiguous_any(p, threshold=0.8, max_top=max_top)
        for run in sessions(made.model):
            (found,) = run(p=p)
            assert found.dtype == bool and found.tolist() == expected.tolist()


def test_ambiguous_any_tries_every_top():
    # 0.65 for two leaders, 0.725 for three, 0.774 for four.
    p = np.array([[80, 16, 16, 16], [60, 60, 4, 4], [126, 1, 1, 0]]) / 128
    for max_top, first in ((2, False), (3, False), (4, True), (9, True)):
        (found,) = found_by(lambda p, top=max_top: can.ambiguous_any(p, threshold=0.75, max_top=top), p=p)
        assert found.tolist() == [first, True, False]


# Priors.
def test_class_prior():
    labels = np.array([0, 2, 2, 2])
    made = built(lambda labels: can.class_prior(labels, classes=4, smoothing=1.0), {"labels": labels})
    assert made.fixed == {}
    for run in sessions(made.model):
        assert run(labels=labels)[0].tolist() == [0.25, 0.125, 0.5, 0.125]
        assert run(labels=labels[:0])[0].tolist() == [0.25] * 4
        long = np.random.default_rng(0).integers(0, 3, 1009)
        np.testing.assert_allclose(run(labels=long)[0], spec.class_prior(long, classes=4, smoothing=1.0), rtol=1e-15)


def test_class_prior_of_short_integers():
    (found,) = found_by(
        lambda labels: can.class_prior(labels, classes=3, smoothing=0.0), labels=np.array([1, 1], np.int32)
    )
    assert found.dtype == np.float64 and found.tolist() == [0, 1, 0]


# Rounds.
@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_one_graph_answers_for_every_number_of_rows(function, alpha, iterations):
    numbers = {"alpha": alpha, "iterations": iterations}
    made = built(lambda **inputs: getattr(can, function)(**inputs, **numbers), stack(4, 2))
    assert made.fixed == {}
    for n, b, k in ((4, 2, 5), (0, 1, 5), (1, 0, 5), (7, 3, 11), (0, 0, 5)):
        arrays = stack(n, b, k)
        expected = getattr(spec, function)(**arrays, **numbers)
        for run in sessions(made.model):
            (found,) = run(**arrays)
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_float32(function, iterations):
    arrays = {name: array.astype(np.float32) for name, array in stack(13, 3).items()}
    numbers = {"alpha": 0.5, "iterations": iterations}
    (found,) = found_by(lambda **inputs: getattr(can, function)(**inputs, **numbers), **arrays)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, getattr(spec, function)(**arrays, **numbers), rtol=2e-6)


@pytest.mark.parametrize("function", FORMS[:2])
def test_a_class_never_confidently_predicted_takes_all(function):
    """No epsilon: column sums 1, 1, 0 leave a share of 1/3, 1/3 and, however small, 1."""
    arrays = {
        "confident": np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]),
        "uncertain": np.array([[0.5, 0.5, 2.0**-40], [0.5, 0.5, 2.0**-1000], [0.5, 0.5, 0.0]]),
        "prior": np.ones(3),
    }
    (found,) = found_by(lambda **inputs: getattr(can, function)(**inputs, **SIMPLE), **arrays)
    np.testing.assert_allclose(found, [[0.2, 0.2, 0.6], [0.2, 0.2, 0.6], [0.5, 0.5, 0]], rtol=1e-15)


@pytest.mark.parametrize("function", FORMS[:2])
@pytest.mark.parametrize("iterations", [1, 2])
def test_rows_without_a_rule_come_back(function, iterations):
    """A row that shares no class with the prior and a row of zeros stay; a zero column stays zero."""
    arrays = {
        "confident": np.array([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]),
        "uncertain": np.array([[0.0, 0.0, 0.875], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
        "prior": np.array([1.0, 1.0, 0.0]),
    }
    numbers = {"alpha": 1.0, "iterations": iterations}
    (found,) = found_by(lambda **inputs: getattr(can, function)(**inputs, **numbers), **arrays)
    assert found[:2].tolist() == arrays["uncertain"][:2].tolist()
    np.testing.assert_allclose(found[2], getattr(spec, function)(**arrays, **numbers)[2], rtol=1e-14)


def test_rows_do_not_see_each_other(monkeypatch):
    """Blocks of every size give the same, the last one filled up or not."""
    arrays, numbers = stack(7, 11), {"alpha": 0.5, "iterations": 3}
    expected = spec.alternating_normalization(**arrays, **numbers)
    for block in (1, 2, 5, 11, 64):
        monkeypatch.setattr(can, "BLOCK_ELEMENTS", 7 * block)
        (found,) = found_by(lambda **inputs: can.alternating_normalization(**inputs, **numbers), **arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


SHARP = {
    "confident": np.array([[125, 1, 1, 1], [1, 125, 1, 1], [2, 1, 124, 1], [60, 60, 4, 4]]) / 128,
    "uncertain": np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.125, 0.5, 0.125, 0.25]]),
    "prior": np.array([1.0, 2, 3, 2]),
}


@pytest.mark.parametrize(("alpha", "iterations"), [(4.0, 4), (8.0, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_factors_beyond_the_frame_are_left_to_the_loop(alpha, iterations, dtype):
    """Powers of powers leave float64 (and float32 long before): 8^4 takes 2^-1 to 2^-4096."""
    arrays = {name: array.astype(dtype) for name, array in SHARP.items()}
    numbers = {"alpha": alpha, "iterations": iterations}
    (found,) = found_by(lambda **inputs: can.alternating_normalization(**inputs, **numbers), **arrays)
    expected = spec.alternating_normalization_loop(**arrays, **numbers)
    wide = dtype == np.float64
    # Entries of 1e-119 are as good as those near one.
    np.testing.assert_allclose(found, expected, rtol=1e-10 if wide else 1e-6, atol=1e-300 if wide else 1e-37)


def test_without_the_limit_the_factors_are_lost(monkeypatch):
    monkeypatch.setattr(can, "FRAME_LIMIT", 0.0)
    made = built(lambda **inputs: can.alternating_normalization(**inputs, alpha=8.0, iterations=4), SHARP)
    assert np.isnan(sessions(made.model)[0](**SHARP)[0]).any()


# Adjusting.
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("threshold", [-0.5, 0.6, 0.9, 1.5])
def test_adjust(iterations, threshold):
    """All rows uncertain, some, none; in one graph."""
    rng = np.random.default_rng(iterations)
    numbers = {"top": 3, "threshold": threshold, "alpha": 0.5, "iterations": iterations}
    prior = rng.uniform(0.5, 3, 7)
    made = built(lambda p, prior: can.adjust(p, prior, **numbers), {"p": rng.dirichlet(np.ones(7), 3), "prior": prior})
    assert made.fixed == {("p", 1): 7}
    for n in (0, 1, 2, 29):
        p = rng.dirichlet(np.full(7, 0.4), n)
        expected = spec.adjust(p, prior, **numbers)
        for run in sessions(made.model):
            found, uncertain = run(p=p, prior=prior)
            assert uncertain.tolist() == expected.uncertain.tolist()
            assert np.array_equal(found[~uncertain], p[~uncertain])
            np.testing.assert_allclose(found, expected.probabilities, rtol=1e-13, atol=1e-300)


def test_adjust_by_hand():
    """Three certain rows for class 0, one for class 1: an even row becomes prior / (counts + 1/4), to sum one."""
    p = np.concatenate([np.eye(3)[[0, 0, 1]], np.full((1, 3), 0.25), np.eye(3)[:1]])
    found, uncertain = found_by(
        lambda p, prior: can.adjust(p, prior, top=3, threshold=0.75, **SIMPLE), p=p, prior=np.array([13.0, 5.0, 1.0])
    )
    # 13/13, 5/5, 4: shares 1, 1, 1 of the prior over 3.25, 1.25, 0.25.
    assert uncertain.tolist() == [False, False, False, True, False]
    np.testing.assert_allclose(found[3], np.array([4.0, 4.0, 4.0]) / 12, rtol=1e-15)
    assert np.array_equal(np.delete(found, 3, 0), np.delete(p, 3, 0))


def test_zeros_inside_the_top_are_on_one_side():
    """0 ln 0 as NaN would put the first two rows on no side at all."""
    p = np.array([[64, 64, 0, 0], [128, 0, 0, 0], [100, 20, 8, 0]]) / 128
    found, uncertain = found_by(
        lambda p, prior: can.adjust(p, prior, top=3, threshold=0.5, **SIMPLE), p=p, prior=np.full(4, 0.25)
    )
    assert uncertain.tolist() == [True, False, True]
    # The only confident row has class 0: shares 64/192 and 1, then 100/228, 1 and 1.
    np.testing.assert_allclose(found, [[0.25, 0.75, 0, 0], [1, 0, 0, 0], np.array([25, 57, 57, 0]) / 139], rtol=1e-15)


# Speed and form.
def test_one_round_needs_no_loop():
    def kinds(function: str, iterations: int) -> set[str]:
        numbers = {"alpha": 0.5, "iterations": iterations}
        made = built(lambda **inputs: getattr(can, function)(**inputs, **numbers), stack(4, 2))
        return {node.op_type for f in made.model.functions for node in f.node}

    assert "Scan" not in kinds("alternating_normalization", 1) | kinds("alternating_normalization_official", 1)
    assert not {"Compress", "NonZero"} & kinds("alternating_normalization", 1)
    assert "Scan" in kinds("alternating_normalization_loop", 1) & kinds("alternating_normalization", 2)


def test_the_closed_form_is_faster_than_the_loop():
    """2000 confident rows, 300 uncertain ones, 15 classes. Twenty times is promised; five suit a busy machine."""
    rng = np.random.default_rng(0)
    arrays = {
        "confident": rng.dirichlet(np.full(15, 0.3), 2000).astype(np.float32),
        "uncertain": rng.dirichlet(np.ones(15), 300).astype(np.float32),
        "prior": rng.dirichlet(np.ones(15)).astype(np.float32),
    }
    seconds, results = {}, {}
    for function, tries in (("alternating_normalization", 20), ("alternating_normalization_loop", 2)):
        made = graph.build(lambda f=function, **inputs: getattr(can, f)(**inputs, **SIMPLE), arrays, opset=20)
        run = sessions(made.model)[0]
        best = np.inf
        for _ in range(tries):
            start = time.perf_counter()
            results[function] = run(**arrays)[0]
            best = min(best, time.perf_counter() - start)
        seconds[function] = best
    closed, loop = (seconds[f"alternating_normalization{form}"] for form in ("", "_loop"))
    np.testing.assert_allclose(*results.values(), rtol=2e-5)
    assert loop >= 5 * closed, f"closed form {closed * 1e3:.2f} ms, loop {loop * 1e3:.1f} ms: {loop / closed:.1f} times"


@pytest.mark.parametrize("function", FORMS)
def test_opset_20_holds_nothing_newer(function):
    made = built(lambda **inputs: getattr(can, function)(**inputs, alpha=0.5, iterations=3), stack(4, 2))
    assert {o.domain: o.version for o in made.model.opset_import} == {"": 20, "refimpl": 1}
    for node in (node for f in made.model.functions for node in f.node if node.domain == ""):
        assert onnx.defs.get_schema(node.op_type, 20).since_version <= 20


# Errors.
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p, **_: can.top_entropy(p, top=1), DomainError),
        (lambda p, **_: can.top_entropy(p, top=2.0), DomainError),
        (lambda p, **_: can.top_entropy(p[:, :1], top=2), ShapeError),
        (lambda p, **_: can.top_entropy_unnormalized(p, top=1), DomainError),
        (lambda p, **_: can.ambiguous_any(p, threshold=np.nan, max_top=3), DomainError),
        (lambda p, **_: can.ambiguous_any(p, threshold=0.5, max_top=1), DomainError),
        (lambda labels, **_: can.class_prior(labels, classes=0, smoothing=1.0), DomainError),
        (lambda labels, **_: can.class_prior(labels, classes=3, smoothing=-1.0), DomainError),
        (lambda labels, **_: can.class_prior(labels[None], classes=3, smoothing=1.0), ShapeError),
        (lambda p, **_: can.class_prior(p, classes=3, smoothing=1.0), DomainError),
        (lambda p, prior, **_: can.alternating_normalization(p, p, prior[:-1], **SIMPLE), ShapeError),
        (lambda p, prior, **_: can.alternating_normalization_loop(p, p[:, 1:], prior, **SIMPLE), ShapeError),
        (lambda p, prior, **_: can.alternating_normalization_official(p, p[0], prior, **SIMPLE), ShapeError),
        (lambda p, prior, **_: can.alternating_normalization(p, p, prior, alpha=-1.0, iterations=1), DomainError),
        (lambda p, prior, **_: can.alternating_normalization(p, p, prior, alpha=1.0, iterations=-1), DomainError),
        (lambda p, prior, **_: can.alternating_normalization(p, p, prior, alpha=1.0, iterations=1.5), DomainError),
        (lambda labels, p, prior: can.alternating_normalization(labels, p, prior, **SIMPLE), DomainError),
        (lambda p, prior, **_: can.adjust(p[0], prior, top=3, threshold=0.5, **SIMPLE), ShapeError),
        (lambda p, prior, **_: can.adjust(p, prior, top=3, threshold=np.inf, **SIMPLE), DomainError),
        (lambda p, prior, **_: can.adjust(p, prior, top=1, threshold=0.5, **SIMPLE), DomainError),
    ],
)
def test_errors_name_the_operation(call, error):
    examples = {"p": np.ones((3, 5)), "prior": np.ones(5), "labels": np.zeros(3, np.int64)}
    with pytest.raises(error, match=r"can\.\w+: .*(expected|must)"):
        graph.build(call, examples, opset=20)
