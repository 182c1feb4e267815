"""What the comparison before writing sees: subtly wrong graphs, its figures and bounds, the requests that it makes."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from refimpl.models import flash, gau_alpha

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
# Only now: these need the packages above.
model, parity, graph = map(importlib.import_module, ("export.model", "export.parity", "export.graph"))
ParityError = parity.ParityError

SIZES = {
    "vocab_size": 11, "segments": 3, "labels": 5, "hidden_size": 7, "layers": 2, "expanded_size": 13, "key_size": 4,
    "rotary_base": 10000.0,
}  # fmt: skip
GAU = gau_alpha.Config(**SIZES, n_min=1, epsilon=1e-12)
FLASH = flash.Config(
    **SIZES, chunk=5, mix="bidirectional", kernel="laplace", divisor="root_key_size", normaliser="visible",
    rows="paper", rotation="half_split", epsilon=1e-6,
)  # fmt: skip
SPECIFICATIONS = {"gau_alpha": gau_alpha, "flash": flash}


def weights(config, dtype=np.float64):
    # Rounded, so that both formats hold the same numbers.
    drawn = np.random.default_rng(0)
    shapes = SPECIFICATIONS[config.model].shapes(config)
    return {name: (drawn.normal(size=shape) / 2).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def graphs(config):
    """The right file and its twin."""
    return [model.build(config, weights(config, dtype)) for dtype in (np.float32, np.float64)]


@pytest.mark.parametrize("config", [GAU, FLASH], ids=lambda config: config.model)
def test_a_right_graph_passes(config):
    twin, file = parity.check(*graphs(config), config, weights(config))
    assert twin.runtime.startswith("onnx ") and twin.runtime.endswith(" ReferenceEvaluator")
    assert file.runtime.startswith("onnxruntime ")
    assert (twin.dtype, file.dtype) == ("float64", "float32")
    for found, least in ((twin, 1e-12), (file, 5e-6)):
        assert found.cases == len(list(parity.cases(config)))
        # These weights amplify little.
        assert least <= found.bound < 2 * least
        assert found.worst <= found.bound
        output, rest = found.where.split(", ", 1)
        assert output in ("logits", "embedding", "last_hidden_state")
        assert rest in [case.name for case in parity.cases(config)]
    # Rounded in one format and not in the other.
    assert twin.worst < 1e-14 < 1e-8 < file.worst


def changed(name, change):
    """The graph of another weight."""
    return lambda w, inputs, config: ({**w, name: change(w[name])}, inputs, config)


def asked(name, change):
    """The graph of another input."""
    return lambda w, inputs, config: (w, {**inputs, name: change(inputs[name])}, config)


def configured(**fields):
    """The graph of another configuration."""
    return lambda w, inputs, config: (w, inputs, replace(config, **fields))


# The model, what is wrong in its graph, the first request that shows it. The first three are too small for float32.
WRONG = {
    "another epsilon": (GAU, configured(epsilon=1e-5), "logits, length 1, batch 1, mask: every token"),
    "one weight 1e-9 off": (
        GAU,
        changed("layers.1.w_out", lambda w: w + 1e-9 * (np.arange(13 * 7) == 40).reshape(13, 7)),
        "logits, length 1, batch 1, mask: every token",
    ),
    "another rotation": (GAU, configured(rotary_base=1e30), "logits, length 2, batch 1, mask: every token"),
    "mask ignored": (GAU, asked("mask", lambda m: m | ~m), "logits, length 1, batch 1, mask: no token"),
    # Right as long as all padding is at the end.
    "mask taken for a length": (
        GAU,
        asked("mask", lambda m: graph.arange(m.size(1))[None] < m.cast(np.int64).sum(1, keepdims=True)),
        "logits, length 2, batch 1, mask: one token",
    ),
    "segments ignored": (GAU, asked("segment_ids", lambda s: s * 0), "logits, length 1, batch 1, mask: every token"),
    "not a number": (GAU, changed("classifier.bias", lambda w: w * np.nan), "logits, length 1, batch 1, mask: every"),
    # Right up to the border of the first chunk.
    "another chunk": (FLASH, configured(chunk=7), "logits, length 6, batch 1, mask: every token"),
}
REFUSED = [(bug, "ReferenceEvaluator") for bug in WRONG] + [(bug, "onnxruntime") for bug in list(WRONG)[3:]]


@pytest.mark.parametrize(("bug", "runtime"), REFUSED)
def test_a_wrong_graph_is_refused_with_the_request_that_shows_it(monkeypatch, bug, runtime):
    config, wrong, place = WRONG[bug]
    module = importlib.import_module(f"export.models.{config.model}")
    forward = module.forward

    def other(w, *, config, **inputs):
        w, inputs, config = wrong(w, inputs, config)
        return forward(w, **inputs, config=config)

    file, twin = graphs(config)
    monkeypatch.setattr(module, "forward", other)
    off_file, off_twin = graphs(config)
    pair = (off_file, twin) if runtime == "onnxruntime" else (file, off_twin)
    with pytest.raises(ParityError, match=f"^export: .*{runtime}.*: {place}.*: the error is .* the bound "):
        parity.check(*pair, config, weights(config))


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
    # Where all is 0, there is no share.
    assert compared((X, Y), (2 * X, 0 * Y - 4e-7)) == ("runtime", "float64", 2, 1e-6, 4e-7, "y, second")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([(X + 8e-3, Y), (2 * X, 0 * Y)], r"x, first: the error is 0\.002 of .*, the bound 1\.0e-03"),
        ([(X, Y), (2 * X, 0 * Y + 2e-6)], "y, second: the error is 2e-06 of the largest element, the bound 1.0e-06"),
        ([(X, Y * [[1, np.nan, 1]]), (2 * X, 0 * Y)], "y, first: the error is nan"),
        ([(X, Y), (2 * X + np.inf, 0 * Y)], "x, second: the error is inf"),
        ([(X, Y), (2 * X[0], 0 * Y)], r"x, second: shape \(2,\), the specification has \(1, 2\)"),
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
        (lambda w, k: w * k, 1),
        (lambda w, k: w**k, 40),
        (lambda w, k: np.exp(-w * k), 40 * 1.5),
        (lambda w, k: w * k / (w * k), 0),
        # The change of the output is a share of its largest element.
        (lambda w, k: np.stack([w, 1000 * w / w]), 1.5e-3),
    ],
)
def test_the_sensitivity_of_models_known_by_hand(forward, expected):
    def model_of(weights, k, *, config):
        return forward(weights["w"], k), k * weights["w"]

    weights, asked = {"w": np.array(1.5)}, [Case("", {"k": np.float64(k)}) for k in (2, 40, 3)]
    before = [model_of(weights, **case.inputs, config=None) for case in asked]
    found = parity.sensitivity(model_of, None, weights, asked, before)
    np.testing.assert_allclose(found, [expected, 1], rtol=1e-6, atol=1e-6)


def test_weights_move_apart_from_each_other():
    def ratios(weights, *, config):
        return (weights["a"] / weights["a"][::-1] * weights["b"],)

    # Between -3 and 3, and 0 or 1 if weights moved together.
    weights = {"a": np.ones(100), "b": np.ones(100)}
    assert parity.sensitivity(ratios, None, weights, [Case("", {})], [(np.ones(100),)]) == pytest.approx([3], rel=1e-6)


@pytest.mark.parametrize(
    ("moved", "twin", "file"),
    [
        # 16 roundings of 2^-53 and of 2^-24 are 1.8e-15 and 9.5e-7.
        ([0, 1, 5], [1e-12, 1e-12, 1e-12], [5e-6, 5e-6, 5e-6]),
        ([1e4, 5, 1e6], [1.776e-11, 1e-12, 1.776e-9], [9.537e-3, 5e-6, 0.9537]),
    ],
)
def test_bounds_grow_with_the_sensitivity_of_each_output(monkeypatch, moved, twin, file):
    seen = []
    monkeypatch.setattr(parity, "sensitivity", lambda *arguments: moved)
    monkeypatch.setattr(parity, "compare", lambda *arguments, bounds: seen.append(bounds))
    parity.check(*graphs(GAU), GAU, weights(GAU))
    assert [list(each) for each in seen] == [["logits", "embedding", "last_hidden_state"]] * 2
    for found, expected in zip(seen, (twin, file), strict=True):
        assert list(found.values()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (GAU, [1, 2, 63, 64, 65, 512]),
        (FLASH, [1, 2, 4, 5, 6, 11, 63, 64, 65, 512]),
        (replace(FLASH, chunk=1), [1, 2, 3, 63, 64, 65, 512]),
        (replace(FLASH, chunk=512), [1, 2, 63, 64, 65, 511, 512, 513, 1025]),
    ],
)
def test_every_length_is_asked_with_every_mask(config, lengths):
    masks = ["every token", "all but a tail", "one token", "no token", "each"]
    found = list(parity.cases(config))
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
