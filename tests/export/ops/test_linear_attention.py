"""The graphs of linear attention: one graph for all sizes, prefix sums of three kinds, decay, packed documents."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from conformance import vectors, verdict
from conformance.adapters.graphs import on_graph
from conformance.budget import Profile
from conformance.case import OPERATORS
from export import operator
from export.graph import build
from export.ops import linear_attention as la
from refimpl.check import DomainError, ShapeError
from refimpl.ops import linear_attention as spec

B, H, D, E, CHUNK = 3, 2, 5, 7, 4
PREFIXES = {"chunked": la.chunked, "matmul": la.chunked_matmul_prefix, "scan": la.chunked_scan}
FORMS = {
    "recurrent": (la.recurrent, spec.recurrent),
    "quadratic": (la.quadratic, spec.quadratic),
    "bidirectional": (la.bidirectional, spec.bidirectional),
    **{name: (partial(f, chunk_size=CHUNK), partial(spec.chunked, chunk_size=CHUNK)) for name, f in PREFIXES.items()},
}
CAUSAL = [name for name in FORMS if name != "bidirectional"]


def session(model, level="ORT_ENABLE_ALL"):
    """arrays -> results, in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda arrays: tuple(made.run(None, {i.name: arrays[i.name] for i in made.get_inputs()}))


def made(n, b=B, seed=0, dtype=np.float64, decay="", mask=False, state=False):
    """Tokens and what else is asked for."""
    rng = np.random.default_rng([n, b, seed])
    arrays = {
        "q": rng.normal(size=(b, n, H, D)),
        "k": rng.normal(size=(b, n, H, D)),
        "v": rng.normal(size=(b, n, H, E)),
    }
    if decay:
        arrays["log_decay"] = -rng.exponential(size=(b, n, H, D) if decay == "feature" else (b, n, H))
    if state:
        arrays["initial_state"] = rng.normal(size=(b, H, D, E))
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    if mask:
        arrays["mask"] = rng.random((b, n)) < 0.7
        # Nothing is left of the last row.
        arrays["mask"][-1] = False
    return arrays


def close(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max(initial=0) <= tolerance * max(1, np.abs(other).max(initial=0))


def nodes(model):
    """Every node, those of functions and loops too."""

    def within(found):
        for node in found:
            yield node
            for attribute in node.attribute:
                yield from within(attribute.g.node)

    yield from within(model.graph.node)
    for function in model.functions:
        yield from within(function.node)


@pytest.mark.parametrize("more", [{}, {"decay": "head"}, {"decay": "feature", "mask": True, "state": True}], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_one_graph_answers_for_every_length_and_batch(name, more):
    call, expected = FORMS[name]
    if name == "bidirectional":
        more = {**more, "decay": ""}
    built = build(partial(call, scale=0.7), made(6, **more), opset=20)
    assert not any(axis in (0, 1) for (argument, axis) in built.fixed if argument != "initial_state")
    assert ("initial_state", 0) not in built.fixed
    run = session(built.model)
    for n in (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 1):
        for b in (1, B):
            arrays = made(n, b, **more)
            close(run(arrays), expected(**arrays, scale=0.7), 1e-13)


@pytest.mark.parametrize("name", FORMS)
def test_a_graph_traced_with_one_token_is_as_open(name):
    call, expected = FORMS[name]
    run = session(build(partial(call, scale=0.7), made(1, 1, mask=True), opset=20).model)
    arrays = made(11, mask=True)
    close(run(arrays), expected(**arrays, scale=0.7), 1e-13)


@pytest.mark.parametrize("name", FORMS)
def test_float32_keeps_its_digits(name):
    call, expected = FORMS[name]
    arrays = made(19, dtype=np.float32, state=True)
    got = session(build(partial(call, scale=3**-0.5), arrays, opset=20).model)(arrays)
    assert all(x.dtype == np.float32 for x in got)
    close(got, expected(**arrays, scale=3**-0.5), 1e-6)


@pytest.mark.parametrize("variant", ["matmul", "scan"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_other_prefixes_pass_the_corpus_of_chunked(variant, dtype):
    package = SimpleNamespace(linear_attention=SimpleNamespace(**{**vars(la), "chunked": PREFIXES[variant]}))
    judged = 0
    for op in ("linear_attention.chunked", "linear_attention.normalised"):
        function = on_graph(_of(op, package), 20, session)
        for vector in vectors.load(names=[op]):
            if dtype in vector.case.dtypes and (op.endswith("chunked") or vector.case["form"] == "chunked"):
                found = verdict.judge(variant, function, vector, Profile(dtype, "strict", "A64"))
                assert found.outcome == "pass", f"{vector.case.id}: {found.message}"
                judged += 1
    assert judged > 15


def _of(op, package):
    return package.linear_attention.chunked if op.endswith("chunked") else OPERATORS()[op].of(package)


def test_onnx_itself_reads_the_loops():
    for name in ("recurrent", "scan"):
        call, expected = FORMS[name]
        arrays = made(6, decay="head")
        model = build(partial(call, scale=0.7), made(1, 1, decay="head"), opset=20).model
        close(ReferenceEvaluator(model).run(None, arrays), expected(**arrays, scale=0.7), 1e-13)


@pytest.mark.parametrize("name", [*FORMS, "normalised"])
def test_files_of_opset_20_are_valid_and_hold_nothing_newer(name):
    if name == "normalised":
        call, more = partial(la.normalised, form=la.quadratic, epsilon=1e-6), {}
    else:
        call, more = FORMS[name][0], {"state": True, "decay": "" if name == "bidirectional" else "head"}
    model = build(partial(call, scale=0.7), made(6, mask=True, **more), opset=20).model
    onnx.checker.check_model(model, full_check=True)
    for node in nodes(model):
        if node.domain == "":
            assert onnx.defs.get_schema(node.op_type, 20).since_version <= 20


def test_the_default_is_a_cumsum_and_the_variants_are_not():
    def operators(name):
        return {node.op_type for node in nodes(build(partial(FORMS[name][0], scale=1.0), made(6), opset=20).model)}

    assert "CumSum" in operators("chunked") and not {"Scan", "Loop"} & operators("chunked")
    assert not {"CumSum", "Scan", "Loop"} & operators("matmul")
    assert "Scan" in operators("scan") and "CumSum" not in operators("scan")


@pytest.mark.parametrize("name", CAUSAL)
def test_half_of_the_state_is_left_after_every_token(name):
    # S = 8, 8/2 + 2 = 6, 6/2 + 4 = 7, (masked) 7, 7/2 + 1 = 4.5, read by 1, 2, 1, 3, 2 and scaled by 10.
    arrays = {
        "q": np.array([1.0, 2, 1, 3, 2]),
        "k": np.array([2.0, 1, 2, 9, 1]),
        "v": np.array([4.0, 2, 2, 9, 1]),
        "log_decay": np.full(5, np.log(0.5)),
    }
    arrays = {letter: x[None, :, None, None] for letter, x in arrays.items()}
    arrays["mask"] = np.array([[True, True, True, False, True]])
    output, state = session(build(partial(FORMS[name][0], scale=10.0), arrays, opset=20).model)(arrays)
    assert output.ravel() == pytest.approx([80, 120, 70, 210, 90], rel=1e-15)
    assert state.ravel() == pytest.approx([4.5], rel=1e-15)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("shape", [(1, 24, H), (1, 24, H, D)], ids=["head", "feature"])
def test_a_weak_decay_keeps_its_digits_beside_strong_ones(name, shape):
    # Resets of -3000 raise a running sum to 36000, of which float32 keeps no more than 0.004: differences of such
    # sums would be wrong in the third digit, and exp(-G) alone would overflow.
    call, expected = FORMS[name]
    arrays = made(24, 1, dtype=np.float32, state=True)
    reset = np.arange(24).reshape(1, 24, *[1] * (len(shape) - 2)) % 2 == 0
    arrays["log_decay"] = np.where(reset & (np.arange(24).reshape(reset.shape) < 20), -3000, -0.01 * np.ones(shape))
    arrays["log_decay"] = arrays["log_decay"].astype(np.float32)
    got = session(build(partial(call, scale=1.0), arrays, opset=20).model)(arrays)
    exact = spec.recurrent(**{k: x.astype(np.float64) for k, x in arrays.items()}, scale=1.0)
    close(got, exact, 1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_packed_documents_of_any_number_and_length(name):
    call, expected = FORMS[name]

    def packed(*lengths, seed=0):
        arrays = made(sum(lengths), 1, seed=seed, decay="" if name == "bidirectional" else "head")
        arrays["mask"] = np.random.default_rng(seed).random((1, sum(lengths))) < 0.7
        arrays["cu_seqlens"] = np.cumsum([0, *lengths])
        arrays["initial_state"] = np.random.default_rng(seed + 1).normal(size=(len(lengths), H, D, E))
        return arrays

    built = build(partial(call, scale=0.7), packed(3, 2), opset=20)
    assert ("cu_seqlens", 0) not in built.fixed and ("initial_state", 0) not in built.fixed
    run = session(built.model)
    for lengths in ((1,), (5, 0, CHUNK, 1), (0,), (2, 9, 0), (0, 0)):
        arrays = packed(*lengths, seed=len(lengths))
        close(run(arrays), expected(**arrays, scale=0.7), 1e-13)


def test_packed_documents_need_a_batch_of_one():
    arrays = made(4, 1) | {"cu_seqlens": np.array([0, 1, 4])}
    run = session(build(partial(la.chunked, chunk_size=2, scale=1.0), arrays, opset=20).model)
    with pytest.raises(Exception, match="Dimension of input 0 must be 1"):
        run(made(4, 2) | {"cu_seqlens": np.array([0, 1, 4])})


@pytest.mark.parametrize("name", ["recurrent", "quadratic", "chunked", "matmul", "scan", "bidirectional"])
def test_a_row_that_sees_no_key_is_zero_when_divided(name):
    call, expected = FORMS[name]
    arrays = made(6, mask=True)
    # Features must be positive, or the sum of weights may vanish by chance.
    arrays |= {letter: np.abs(arrays[letter]) for letter in "qk"}
    call = partial(la.normalised, form=call, scale=0.5, epsilon=0.0)
    built = build(call, made(3, 1, mask=True), opset=20)
    assert not any(axis in (0, 1) for _, axis in built.fixed)
    got = session(built.model)(arrays)
    close(got, spec.normalised(**arrays, form=expected, scale=0.5, epsilon=0.0), 1e-12)
    assert (got[0][-1] == 0).all()


def test_values_that_are_all_one_come_back_beside_an_own_denominator():
    rng = np.random.default_rng(5)
    arrays = made(6, 1) | {"q_normaliser": rng.random((1, 6, H, 3)), "k_normaliser": rng.random((1, 6, H, 3))}
    arrays |= {"initial_state": rng.random((1, H, D, E)), "initial_normaliser": rng.random((1, H, 3))}
    options = {"scale": 0.5, "epsilon": 0.25}
    call = partial(la.normalised, form=partial(la.chunked, chunk_size=4), **options)
    expected = spec.normalised(**arrays, form=partial(spec.chunked, chunk_size=4), **options)
    close(session(build(call, arrays, opset=20).model)(arrays), expected, 1e-13)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("name", FORMS)
def test_a_scale_is_not_rounded_to_float32(name, level):
    # ONNX Runtime's fused MatMul holds a constant factor in float32.
    call, expected = FORMS[name]
    arrays = made(9)
    got = session(build(partial(call, scale=1 / 3), arrays, opset=20).model, level)(arrays)
    close(got, expected(**arrays, scale=1 / 3), 1e-14)


BAD = [
    ({"k": np.zeros((1, 4, H, D + 1))}, ShapeError, "q and k of one shape"),
    ({"v": np.zeros((1, 4, H + 1, E))}, ShapeError, "v of shape"),
    ({"q": np.zeros((1, 4, D))}, ShapeError, "q and k of one shape"),
    ({"q": np.zeros((1, 4, H, D), int)}, DomainError, "q must be a floating value"),
    ({"scale": np.inf}, DomainError, "a finite scale"),
    ({"log_decay": np.zeros((1, 4, H, D + 1))}, ShapeError, "log_decay of shape"),
    ({"mask": np.ones((1, 4))}, DomainError, "mask must be boolean"),
    ({"mask": np.ones((1, 1, 4), bool)}, ShapeError, "a mask of shape"),
    ({"cu_seqlens": np.array([0.0, 4.0])}, DomainError, "cu_seqlens must be integers"),
    ({"cu_seqlens": np.array([[0, 4]])}, ShapeError, "one bound more than documents"),
    ({"initial_state": np.zeros((1, H, E, D))}, ShapeError, "one initial_state"),
    ({"initial_state": np.zeros((H, D, E))}, ShapeError, "one initial_state"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_what_does_not_fit_is_refused_while_the_graph_is_written(change, error, text):
    with pytest.raises(error, match=f"linear_attention.quadratic.*{text}"):
        operator.model(la.quadratic, {**made(4, 1), "scale": 1.0, **change}, opset=20)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_a_chunk_has_a_whole_number_of_tokens(chunk_size):
    with pytest.raises(DomainError, match="chunked_scan: expected chunk_size >= 1"):
        operator.model(la.chunked_scan, {**made(4), "scale": 1.0, "chunk_size": chunk_size}, opset=20)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epsilon": -1e-6}, "a finite epsilon >= 0"),
        ({"form": "quadratic"}, "form to be one of the functions"),
        ({"q_normaliser": np.ones((1, 4, H, 3))}, "q_normaliser and k_normaliser, both or neither"),
        ({"initial_state": np.ones((1, H, D, E))}, "initial_state and initial_normaliser, both or neither"),
    ],
)
def test_what_a_division_cannot_take_is_refused(change, text):
    arguments = {**made(4, 1), "form": la.quadratic, "scale": 1.0, "epsilon": 0.0}
    with pytest.raises(DomainError, match=text):
        operator.model(la.normalised, arguments | change, opset=20)
