"""The adapters of the project's own graphs: open sizes are used again, wrong graphs fail, files are written whole."""

import numpy as np
import pytest

from conformance.adapters import AdapterError, load
from conformance.adapters.graphs import on_graph, operators, write
from conformance.budget import Profile
from conformance.case import cases
from conformance.vectors import FOLDER
from conformance.vectors import load as load_vectors
from conformance.verdict import judge

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_one_graph_answers_for_every_size():
    from conformance.adapters.onnx_reference import _load

    loaded = []

    def load_(model):
        loaded.append(model)
        return _load(model)

    run = on_graph(operators()["norm.rms_norm"], 20, load_)
    for shape in ((2, 3, 5), (1, 1, 5), (7, 2, 3)):
        x = np.arange(1, 1 + np.prod(shape), dtype=np.float64).reshape(shape)
        assert np.allclose(run(x=x, epsilon=0.0)[0], x / np.sqrt((x * x).mean(-1, keepdims=True)), rtol=1e-15)
    assert len(loaded) == 1
    run(x=np.ones((2, 3)), epsilon=0.0)
    run(x=np.ones((2, 3, 5)), epsilon=1.0)
    assert len(loaded) == 3


@pytest.mark.parametrize("adapter", ["onnxruntime", "onnx-reference"])
def test_every_row_claims_what_export_has(adapter):
    names = list(operators())
    rows = load(adapter)
    for row in rows:
        claimed = set(row.functions)
        assert claimed == set(names) or "opset 23" in row.name and claimed < set(names)
    if adapter == "onnxruntime":
        levels = {(r.variant, r.profile.dtype) for r in rows}
        assert levels >= {(v, d) for v in ("off", "basic", "all") for d in ("float32", "float64")}


def test_a_graph_with_another_epsilon_fails():
    from conformance.adapters.onnx_runtime import _load

    right = operators()["norm.rms_norm"]

    def wrong(x, epsilon):
        return right(x, epsilon=1e-5)

    def outcomes(call):
        function = on_graph(call, 20, lambda model: _load(model, "all"))
        vectors = [v for v in load_vectors(FOLDER, ["norm.rms_norm"]) if "float64" in v.case.dtypes]
        return {judge("x", function, v, Profile("float64", "strict", "A64")).outcome for v in vectors}

    assert outcomes(right) == {"pass"}
    assert outcomes(wrong) & {"logic", "precision"}


def test_a_graph_is_written_for_an_operator(tmp_path):
    target = tmp_path / "sub" / "norm.onnx"
    assert write("norm.rms_norm", target, opset=23, dtype="float64") == {}
    model = onnx.load(target)
    onnx.checker.check_model(model, full_check=True)
    assert [i.name for i in model.graph.input] == ["x"] and [o.name for o in model.graph.output] == ["y"]
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(AdapterError, match="opset 20 or 23"):
        write("norm.rms_norm", target, opset=28, dtype="float64")
    with pytest.raises(AdapterError, match="float32 or float64"):
        write("norm.rms_norm", target, opset=20, dtype="float16")


def test_every_operator_of_the_corpus_has_a_graph():
    missing = {c.op for c in cases()} - operators().keys()
    assert not missing


def test_the_order_in_which_a_file_lists_arrays_asks_for_no_graph_of_its_own():
    from conformance.adapters.onnx_reference import _load

    loaded = []
    run = on_graph(operators()["norm.rms_norm_scaled"], 20, lambda model: loaded.append(model) or _load(model))
    given = {"x": np.array([[3.0, 4.0]]), "scale": np.array([1.0, 2.0]), "epsilon": 0.0}
    one, two = run(**given), run(**dict(reversed(given.items())))
    assert len(loaded) == 1 and np.array_equal(one, two)
    assert np.allclose(one, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-15)
