"""What the comparison before writing sees: subtly wrong graphs, its figures and bounds, the requests that it makes."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import flash, gau_alpha
from refimpl.models._heads import MultipleChoice, SequenceClassifier, SpanPointer

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
# Only now: these need the packages above.
model, parity, graph = map(importlib.import_module, ("export.model", "export.parity", "export.graph"))
ParityError = parity.ParityError

SIZES = {
    "vocab_size": 11, "segments": 3, "hidden_size": 7, "layers": 2, "expanded_size": 13, "key_size": 4,
    "rotary_base": 10000.0,
}  # fmt: skip
HEADS = (SequenceClassifier(labels=5, pooling="mean_of_tokens"),)
OUTPUTS = ("last_hidden_state", "logits", "embedding")
GAU = Model(gau_alpha.Config(**SIZES, n_min=1, epsilon=1e-12), HEADS, "bidirectional")
FLASH = Model(
    flash.Config(
        **SIZES, chunk=5, mix="bidirectional", kernel="laplace", divisor="root_key_size", normaliser="visible",
        rows="paper", rotation="half_split", epsilon=1e-6,
    ),
    HEADS, "bidirectional",
)  # fmt: skip
CHOOSING = Model(GAU.config, (MultipleChoice("mean_of_tokens"), SpanPointer(size=4, rotary_base=100.0)), "causal")


def configured_model(whole, **fields):
    return replace(whole, config=replace(whole.config, **fields))


def weights(whole, dtype=np.float64):
    # Rounded, so that both formats hold the same numbers.
    drawn = np.random.default_rng(0)
    shapes = specification.shapes(whole)
    return {name: (drawn.normal(size=shape) / 2).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def graphs(whole, stored=False):
    """The right file and its twin, which need not hold the weights."""
    file = model.build(whole, weights(whole, np.float32))
    return [file, model.build(whole, weights(whole), stored=stored)]


@pytest.mark.parametrize("whole", [GAU, FLASH], ids=lambda whole: whole.config.model)
def test_a_right_graph_passes(whole):
    twin, file = parity.check(*graphs(whole, stored=whole is FLASH), whole, weights(whole))
    assert twin.runtime.startswith("onnx ") and twin.runtime.endswith(" ReferenceEvaluator")
    assert file.runtime.startswith("onnxruntime ")
    assert (twin.dtype, file.dtype) == ("float64", "float32")
    for found, least in ((twin, 1e-12), (file, 5e-6)):
        assert found.cases == len(list(parity.cases(whole)))
        # These weights amplify little.
        assert least <= found.bound < 2 * least
        assert found.worst <= found.bound
        output, rest = found.where.split(", ", 1)
        assert output in OUTPUTS
        assert rest in [case.name for case in parity.cases(whole)]
    # Rounded in one format and not in the other.
    assert twin.worst < 1e-14 < 1e-8 < file.worst


def changed(name, change):
    """The graph of another weight."""
    return lambda w, inputs, whole: ({**w, name: change(w[name])}, inputs, whole)


def asked(name, change):
    """The graph of another input."""
    return lambda w, inputs, whole: (w, {**inputs, name: change(inputs[name])}, whole)


def configured(**fields):
    """The graph of another configuration."""
    return lambda w, inputs, whole: (w, inputs, configured_model(whole, **fields))


# The model, what is wrong in its graph, the first request that shows it. The first three are too small for float32.
WRONG = {
    "another epsilon": (GAU, configured(epsilon=1e-5), "last_hidden_state, length 1, batch 1, mask: every token"),
    "one weight 1e-9 off": (
        GAU,
        changed("layers.1.w_out", lambda w: w + 1e-9 * (np.arange(13 * 7) == 40).reshape(13, 7)),
        "last_hidden_state, length 1, batch 1, mask: every token",
    ),
    "another rotation": (GAU, configured(rotary_base=1e30), "last_hidden_state, length 2, batch 1, mask: every token"),
    "mask ignored": (GAU, asked("mask", lambda m: m | ~m), "last_hidden_state, length 1, batch 1, mask: no token"),
    # Right as long as all padding is at the end.
    "mask taken for a length": (
        GAU,
        asked("mask", lambda m: graph.arange(m.size(1))[None] < m.cast(np.int64).sum(1, keepdims=True)),
        "last_hidden_state, length 2, batch 1, mask: one token",
    ),
    "segments ignored": (
        GAU,
        asked("segment_ids", lambda s: s * 0),
        "last_hidden_state, length 1, batch 1, mask: every token",
    ),
    "not a number": (GAU, changed("classifier.bias", lambda w: w * np.nan), "logits, length 1, batch 1, mask: every"),
    # Right up to the border of the first chunk.
    "another chunk": (FLASH, configured(chunk=7), "last_hidden_state, length 6, batch 1, mask: every token"),
}
REFUSED = [(bug, "ReferenceEvaluator") for bug in WRONG] + [(bug, "onnxruntime") for bug in list(WRONG)[3:]]


@pytest.mark.parametrize(("bug", "runtime"), REFUSED)
def test_a_wrong_graph_is_refused_with_the_request_that_shows_it(monkeypatch, bug, runtime):
    whole, wrong, place = WRONG[bug]
    forward = model.forward

    def other(w, *, model, **inputs):
        w, inputs, off = wrong(w, inputs, model)
        return forward(w, **inputs, model=off)

    file, twin = graphs(whole, stored=True)
    monkeypatch.setattr(model, "forward", other)
    off_file, off_twin = graphs(whole, stored=True)
    pair = (off_file, twin) if runtime == "onnxruntime" else (file, off_twin)
    with pytest.raises(ParityError, match=f"^export: .*{runtime}.*: {place}.*: the error is .* the bound "):
        parity.check(*pair, whole, weights(whole))


Case, X, Y = parity.Case, np.array([[1.0, -4.0]]), np.array([[8.0, 0.0, 2.0]])
ASKED = [Case("first", {"k": np.float64(0)}), Case("second", {"k": np.float64(1)})]
EXPECTED = [(X, Y), (2 * X, 0 * Y)]


def compared(*made):
    """The figures of a run with these results for the two requests, or its refusal."""

    def run(inputs):
        return made[int(inputs["k"])]

    return parity.compare("runtime", "float64", run, ASKED, EXPECTED, bounds={"x": 1e-3, "y": 1e-6})


def test_the_figures_are_those_of_the_error_nearest_to_its_bound():
    exact = compared((X, Y), (2 * X, 0 * Y))
    assert exact == ("runtime", "float64", 2, 1e-3, 0.0, "nowhere: equal bit for bit")
    # 2e-4 of the largest element is a fifth of the bound of x, 5e-7 half of the bound of y.
    found = compared((X, Y + [[0, 4e-6, 0]]), (2 * X + 16e-4, 0 * Y))
    assert found == ("runtime", "float64", 2, 1e-6, 5e-7, "y, first")
    assert compared((X, Y), (2 * X + 16e-4, 0 * Y)) == ("runtime", "float64", 2, 1e-3, 2e-4, "x, second")
    # What is small here and large elsewhere is a share of the median request: 4e-7 of 4 is 1e-7.
    assert compared((X, Y), (2 * X, 0 * Y - 4e-7)) == ("runtime", "float64", 2, 1e-6, 1e-7, "y, second")


def test_errors_are_shares_of_the_largest_finite_element():
    expected = [(X, Y), (2 * X, 0 * Y), (X / 8, Y * np.array([np.inf, 1, 0]))]
    # Largest elements 4, 8, 1/2 and 8, 0, 0; a request is not measured by less than the median one.
    with np.errstate(invalid="ignore"):
        found = parity.scales([(x, np.nan_to_num(y, nan=0.0, posinf=np.inf)) for x, y in expected])
    assert found == [[4, 8], [8, 1], [4, 1]]
    assert parity.scales([(0 * X,), (0 * X,)]) == [[1], [1]]


def test_infinities_stand_where_they_are_expected():
    hidden = np.array([[-np.inf, 4.0, -np.inf]])

    def of(found):
        given = lambda inputs: (found,)  # noqa: E731
        return parity.compare("runtime", "float64", given, ASKED[:1], [(hidden,)], bounds={"x": 1e-3})

    assert of(hidden).worst == 0
    assert of(hidden + 2e-3).worst == 5e-4
    for wrong in (hidden * [[1, np.inf, 1]], -hidden, np.nan_to_num(hidden, neginf=-1e12), hidden * np.nan):
        with pytest.raises(ParityError, match="x, first: the error is (inf|nan)"):
            of(wrong)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([(X + 12e-3, Y), (2 * X, 0 * Y)], r"x, first: the error is 0\.002 of .*, the bound 1\.0e-03"),
        ([(X, Y), (2 * X, 0 * Y + 8e-6)], "y, second: the error is 2e-06 of the largest element, the bound 1.0e-06"),
        ([(X, Y * [[1, np.nan, 1]]), (2 * X, 0 * Y)], "y, first: the error is nan"),
        ([(X, Y), (2 * X + np.inf, 0 * Y)], "x, second: the error is inf"),
        ([(X, Y), (2 * X[0], 0 * Y)], r"x, second: shape \(2,\), the specification has \(1, 2\)"),
        ([(X,), (2 * X, 0 * Y)], "first: 1 outputs, the specification has 2: x, y"),
        ([(X, Y), (2 * X, 0 * Y, Y)], "second: 3 outputs, the specification has 2: x, y"),
        # Would broadcast.
        ([(X, Y[:, :1]), (2 * X, 0 * Y)], r"y, first: shape \(1, 1\), the specification has \(1, 3\)"),
    ],
)
def test_what_leaves_its_bound_is_named(made, message):
    with pytest.raises(ParityError, match=rf"^export: runtime( \(float64\))?: {message}"):
        compared(*made)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        # The change is a share of the largest element of the median request where that is larger.
        (lambda w, k: w * k, 1),
        (lambda w, k: w**k, 40),
        (lambda w, k: np.exp(-w * k), 3 * 1.5),
        (lambda w, k: w * k / (w * k), 0),
        # The change of the output is a share of its largest element.
        (lambda w, k: np.stack([w, 1000 * w / w]), 1.5e-3),
    ],
)
def test_the_sensitivity_of_models_known_by_hand(forward, expected):
    def model_of(weights, inputs):
        return forward(weights["w"], inputs["k"]), inputs["k"] * weights["w"]

    weights, asked = {"w": np.array(1.5)}, [Case("", {"k": np.float64(k)}) for k in (2, 40, 3)]
    before = [model_of(weights, case.inputs) for case in asked]
    found = parity.sensitivity(model_of, weights, asked, before)
    np.testing.assert_allclose(found, [expected, 1], rtol=1e-6, atol=1e-6)


def test_weights_move_apart_from_each_other():
    def ratios(weights, inputs):
        return (weights["a"] / weights["a"][::-1] * weights["b"],)

    # Between -3 and 3, and 0 or 1 if weights moved together.
    weights = {"a": np.ones(100), "b": np.ones(100)}
    assert parity.sensitivity(ratios, weights, [Case("", {})], [(np.ones(100),)]) == pytest.approx([3], rel=1e-6)


@pytest.mark.parametrize(
    ("moved", "twin", "file"),
    [
        # 16 roundings of 2^-53 and of 2^-24 are 1.8e-15 and 9.5e-7.
        ([0, 1, 5], [1e-12, 1e-12, 1e-12], [5e-6, 5e-6, 5e-6]),
        ([1e4, 5, 1e3], [1.776e-11, 1e-12, 1.776e-12], [9.537e-3, 5e-6, 9.537e-4]),
    ],
)
def test_bounds_grow_with_the_sensitivity_of_each_output(monkeypatch, moved, twin, file):
    seen = []
    monkeypatch.setattr(parity, "sensitivity", lambda *arguments: moved)
    monkeypatch.setattr(parity, "compare", lambda *arguments, bounds: seen.append(bounds))
    parity.check(*graphs(GAU), GAU, weights(GAU))
    assert [tuple(each) for each in seen] == [OUTPUTS] * 2
    for found, expected in zip(seen, (twin, file), strict=True):
        assert list(found.values()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    # 2^-24 and 2^-53 sixteen times are the ceilings at 10,486 and at 562,950 roundings.
    [("float32", 10_485, 10_486), ("float64", 562_949, 562_950)],
)
def test_a_model_that_amplifies_too_much_is_refused(dtype, least, most):
    assert parity.bounds(dtype, {"x": least, "y": 1.0})["x"] == pytest.approx(parity.CEILINGS[dtype], rel=1e-4)
    for moved in (most, 1e9, np.inf, np.nan):
        with pytest.raises(ParityError) as raised:
            parity.bounds(dtype, {"y": 1.0, "x": moved})
        said = str(raised.value)
        assert "the model amplifies roundings: x moves" in said and f"ceiling {parity.CEILINGS[dtype]:g}" in said
        assert f"In {dtype} this model can be neither verified nor relied on" in said
        assert ("--dtype float64 may do" in said) == (dtype == "float32")


def test_such_a_model_is_refused_before_anything_is_compared():
    # Two classes that cancel: 3e4 (x - x) plus a hundredth, for every text of token 0.
    whole = Model(GAU.config, (SequenceClassifier(labels=1, pooling="mean_of_tokens"),), "bidirectional")
    held = weights(whole)
    for name in held:
        if name.endswith("w_out") or name == "embedding.segment":
            held[name] = 0 * held[name]
    held["embedding.token"] = np.ones((11, 7))
    held["classifier.kernel"] = np.array([[3e4], [-3e4], [0], [0], [0], [0], [0.25]])
    single = {name: array.astype(np.float32) for name, array in held.items()}
    file, twin = model.build(whole, single), model.build(whole, held, stored=False)
    with pytest.raises(ParityError, match="amplifies roundings: logits moves .*float32 graph may be .*ceiling 0.01"):
        parity.check(file, twin, whole, held)
    # In float64 nothing is lost.
    double = model.build(whole, held)
    assert all(figures.worst <= figures.bound < 1e-9 for figures in parity.check(double, twin, whole, held))


@pytest.mark.parametrize(
    ("whole", "lengths"),
    [
        (GAU, [1, 2, 63, 64, 65, 512]),
        (FLASH, [1, 2, 4, 5, 6, 11, 63, 64, 65, 512]),
        (configured_model(FLASH, chunk=1), [1, 2, 3, 63, 64, 65, 512]),
        (configured_model(FLASH, chunk=512), [1, 2, 63, 64, 65, 511, 512, 513, 1025]),
    ],
)
def test_every_length_is_asked_with_every_mask(whole, lengths):
    masks = ["every token", "all but a tail", "one token", "no token", "each"]
    found = list(parity.cases(whole))
    assert [case.name for case in found] == [
        f"length {n}, batch {4 if mask == 'each' else 1}, mask: {mask}"
        for n in lengths
        for mask in (masks[:1] if n == 512 else masks)
    ]
    for case in found:
        ids, segments, mask = (case.inputs[name] for name in ("token_ids", "segment_ids", "mask"))
        assert case.name.startswith(f"length {mask.shape[1]}, batch {mask.shape[0]}, ")
        assert ids.shape == segments.shape == mask.shape
        assert (ids.dtype, segments.dtype, mask.dtype) == (np.int64, np.int64, np.bool_)
    held = {name: np.unique(np.concatenate([case.inputs[name].ravel() for case in found])) for name in found[0].inputs}
    assert held["token_ids"].tolist() == list(range(11))
    assert held["segment_ids"].tolist() == [0, 1, 2]


def test_masks_and_ids_are_the_same_every_time():
    found, again = ({case.name: case.inputs for case in parity.cases(FLASH)} for _ in range(2))
    rows = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    for name, row in zip(("every token", "all but a tail", "one token", "no token"), rows, strict=True):
        assert found[f"length 5, batch 1, mask: {name}"]["mask"].astype(int).tolist() == [row]
    assert found["length 5, batch 4, mask: each"]["mask"].astype(int).tolist() == rows
    assert list(found) == list(again)
    for name, inputs in found.items():
        for each, array in inputs.items():
            np.testing.assert_array_equal(array, again[name][each])


def test_questions_are_asked_with_three_choices():
    found = {case.name: case.inputs for case in parity.cases(CHOOSING)}
    assert len(found) == len(list(parity.cases(GAU)))
    assert found["length 2, batch 1 x 1, mask: one token"]["mask"].tolist() == [[[False, True]]]
    each = found["length 2, batch 2 x 3, mask: each"]
    assert each["mask"].astype(int).tolist() == [[[1, 1], [1, 0], [0, 1]], [[0, 0], [1, 0], [1, 1]]]
    assert each["token_ids"].shape == each["segment_ids"].shape == (2, 3, 2)
    for figures in parity.check(*graphs(CHOOSING), CHOOSING, weights(CHOOSING)):
        assert figures.worst <= figures.bound
