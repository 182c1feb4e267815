"""The graphs of mixed chunk attention: open sizes, prefix sums of three kinds, packed documents, a stream of steps."""

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
from export.ops import attention_kernel, rope
from export.ops import mixed_chunk_attention as mca
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention_kernel as spec_kernel
from refimpl.ops import mixed_chunk_attention as spec
from refimpl.ops import rope as spec_rope

S, E, CHUNK = 5, 7, 4
TOKENS = ("q_quad", "k_quad", "q_lin", "k_lin", "v")
STATE = ("summary", "chunks", "counted", "held_k_quad", "held_k_lin", "held_v", "held_valid")
MODES = {
    "bidirectional": (mca.bidirectional, spec.bidirectional),
    "causal": (mca.causal, spec.causal),
    "causal_matmul_prefix": (mca.causal_matmul_prefix, spec.causal),
    "causal_scan": (mca.causal_scan, spec.causal),
    "causal_strict": (mca.causal_strict, spec.causal_strict),
}
KERNELS = {
    "squared_relu": (partial(attention_kernel.squared_relu_constant, length=1),
                     partial(spec_kernel.squared_relu_constant, length=1)),
    "laplace": (attention_kernel.laplace, spec_kernel.laplace),
    "softmax": (attention_kernel.softmax, spec_kernel.softmax),
    "identity": (mca.identity, spec.identity),
}  # fmt: skip
NORMALISERS = ("su", "paper", "lucidrains", "lucidrains_causal", "unnormalised", "visible")


def rules(kernel="squared_relu", normaliser="visible", documents=None, chunk=CHUNK, scale=0.7):
    """The keyword arguments of the graph and of the specification."""
    found = []
    for side, package in enumerate((mca, spec)):
        rule = {"chunk": chunk, "scale": scale, "kernel": KERNELS[kernel][side]}
        rule["normaliser"] = getattr(package, normaliser)
        found.append(rule if documents is None else {**rule, "documents": getattr(package, documents)})
    return found


def session(model, level="ORT_ENABLE_ALL"):
    """arrays -> results, in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda arrays: tuple(made.run(None, {i.name: arrays[i.name] for i in made.get_inputs()}))


def tokens(n, *batch, seed=0, dtype=np.float64):
    rng = np.random.default_rng([n, *batch, seed])
    return {name: rng.normal(size=(*batch, n, E if name == "v" else S)).astype(dtype) for name in TOKENS}


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    error = np.subtract(got, expected, dtype=np.float64)
    assert np.abs(error).max(initial=0) <= tolerance * max(1, np.abs(expected).max(initial=0))


def agrees(mode, traced, arrays, *, tolerance=1e-13, **rule):
    """A graph written for `traced` gives what the specification gives for every one of `arrays`; the built model."""
    call, expected = MODES[mode]
    ours, theirs = rules(**rule)
    built = build(partial(call, **ours), traced, opset=20)
    run = session(built.model)
    for given in arrays:
        close(run(given)[0], expected(**given, **theirs), tolerance)
    return built


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


# No token, one, less than a chunk, a chunk, a tail of one token, several chunks, a tail again.
LENGTHS = (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 4 * CHUNK + 1)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_answers_for_every_length_and_batch(mode):
    built = agrees(mode, tokens(6, 2), [tokens(n, b) for n in LENGTHS for b in (1, 3)])
    assert {axis for _, axis in built.fixed} == {2}


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_traced_with_one_token_is_as_open(mode):
    agrees(mode, tokens(1, 1), [tokens(11, 3), tokens(1, 2)])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_masks_hide_keys_whatever_the_kernel(mode, kernel):
    def masked(n, b, *shape):
        kept = np.random.default_rng([n, b]).random(shape) < 0.6
        # A row of which nothing is left, and one with a single visible key.
        kept[0] = False
        if b > 2:
            kept[-1] = np.arange(n) == n // 2
        bias = np.random.default_rng(1).normal(size=(CHUNK, CHUNK))
        return tokens(n, b) | {"key_mask": kept, "bias": bias}

    built = agrees(mode, masked(6, 2, 2, 6), [masked(n, b, b, n) for n in LENGTHS for b in (1, 3)], kernel=kernel)
    assert all(axis in ((0, 1) if name == "bias" else (2,)) for name, axis in built.fixed)
    # An axis of one stands for all; the same graph takes it.
    agrees(mode, masked(6, 2, 2, 6), [masked(9, 2, 1, 9), masked(9, 2, 2, 1)], kernel=kernel)
    one_row = {**masked(9, 2, 1, 9), "key_mask": np.arange(9) % 3 != 1}
    agrees(mode, {**masked(6, 2, 2, 6), "key_mask": np.ones(6, bool)}, [one_row], kernel=kernel)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("mode", MODES)
def test_every_normaliser_is_given_the_counts(mode, normaliser):
    def masked(n, b):
        return tokens(n, b) | {"key_mask": np.random.default_rng(n).random((b, n)) < 0.6}

    agrees(mode, masked(6, 2), [masked(n, 2) for n in LENGTHS], normaliser=normaliser)


@pytest.mark.parametrize("documents", ["same_document", "overlapping_chunks"])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_documents(mode, documents):
    def packed(n, b, count):
        rng = np.random.default_rng([n, b, count])
        ids = np.sort(rng.integers(3, 3 + count, size=(b, n)), axis=1)
        return tokens(n, b) | {"segments": ids, "key_mask": rng.random((b, n)) < 0.8}

    cases = [packed(n, b, count) for n in (0, 1, CHUNK, 11) for b in (1, 3) for count in (1, 2, 6)]
    one_row = packed(11, 3, 4)
    one_row["segments"] = one_row["segments"][:1]
    for normaliser in ("visible", "su"):
        built = agrees(mode, packed(6, 2, 2), [*cases, one_row], documents=documents, normaliser=normaliser)
        assert not any(name in ("segments", "key_mask") for name, _ in built.fixed)


def test_documents_that_come_back_are_one():
    ids = np.array([[4, 4, 4, 5, 6, 6, 6, 7, 4, 5, 5], [3, 3, 1, 1, 1, 3, 3, 0, 0, 2, 3]])
    arrays = tokens(11, 2) | {"segments": ids}
    for mode in MODES:
        agrees(mode, tokens(1, 1) | {"segments": ids[:1, :1]}, [arrays], documents="same_document")


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_leading_axes(mode):
    agrees(mode, tokens(3), [tokens(9), tokens(1)])
    mask = {"key_mask": np.random.default_rng(0).random((2, 1, 9)) < 0.6}
    agrees(mode, tokens(1, 1, 1) | {"key_mask": np.ones((1, 1, 1), bool)}, [tokens(9, 2, 3) | mask])


@pytest.mark.parametrize("mode", MODES)
def test_float32_keeps_its_digits(mode):
    arrays = tokens(19, 2, dtype=np.float32)
    agrees(mode, tokens(1, 1, dtype=np.float32), [arrays], tolerance=1e-6, scale=3**-0.5)


@pytest.mark.parametrize("normaliser", ["su", "lucidrains_causal"])
@pytest.mark.parametrize("mode", MODES)
def test_scale_and_chunk_are_not_rounded_to_float32(mode, normaliser):
    # ONNX Runtime's fused MatMul holds a constant factor in float32, in float64 too.
    agrees(mode, tokens(1, 1), [tokens(11, 2)], tolerance=1e-14, scale=1 / 3, chunk=3, normaliser=normaliser)


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_whole_numbers_by_hand(mode):
    # Chunks (1, 2, 3) and (4, 5); every query and key is 1, so that a row adds up values. The local weight is 1.
    ones = np.ones((1, 5, 1))
    arrays = dict.fromkeys(TOKENS, ones) | {"v": np.array([1.0, 2, 3, 4, 5])[None, :, None]}
    ours, _ = rules(normaliser="unnormalised", chunk=3, scale=1.0)
    (got,) = session(build(partial(MODES[mode][0], **ours), arrays, opset=20).model)(arrays)
    expected = {"bidirectional": [6 + 15, 21, 21, 9 + 15, 24], "causal_strict": [0, 1, 3, 6, 6 + 4]}
    assert got.ravel().tolist() == expected.get(mode, [1, 3, 6, 6 + 4, 6 + 9])


@pytest.mark.parametrize("variant", ["causal_matmul_prefix", "causal_scan"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_other_prefixes_pass_the_corpus_of_causal(variant, dtype):
    op = "mixed_chunk_attention.causal"
    own = SimpleNamespace(**{**vars(mca), "causal": getattr(mca, variant)})
    package = SimpleNamespace(mixed_chunk_attention=own, attention_kernel=attention_kernel)
    function = on_graph(OPERATORS()[op].of(package), 20, session)
    corpus = [vector for vector in vectors.load(names=[op]) if dtype in vector.case.dtypes]
    assert len(corpus) > 15
    for vector in corpus:
        found = verdict.judge(variant, function, vector, Profile(dtype, "strict", "A64"))
        assert found.outcome == "pass", f"{vector.case.id}: {found.message}"


def test_the_default_is_a_cumsum_and_the_variants_are_not():
    def operators(mode):
        return [n.op_type for n in nodes(build(partial(MODES[mode][0], **rules()[0]), tokens(6, 2), opset=20).model)]

    assert "CumSum" in operators("causal") and not {"Scan", "Loop"} & set(operators("causal"))
    assert not {"CumSum", "Scan", "Loop"} & set(operators("causal_matmul_prefix"))
    assert "Scan" in operators("causal_scan") and "CumSum" not in operators("causal_scan")
    # One sum over all tokens, none for a chunk.
    assert "CumSum" not in operators("bidirectional") and operators("bidirectional").count("MatMul") == 5


# A stream of steps.
def step(kernel="squared_relu", normaliser="visible", chunk=CHUNK, scale=0.7):
    """`step` with the fields of the state as arguments of their own."""

    rule, _ = rules(kernel, normaliser, None, chunk, scale)

    def call(key_mask=None, bias=None, **arrays):
        state = mca.State(*(arrays.pop(name) for name in STATE))
        return mca.step(state, **arrays, key_mask=key_mask, bias=bias, **rule)

    return call


def nothing(*batch, dtype=np.float64, s=S, e=E):
    """The state before the first token."""
    held = [np.zeros((*batch, 0, width), dtype) for width in (s, s, e)]
    counted = np.zeros(batch, np.int64)
    first = (np.zeros((*batch, s, e), dtype), np.int64(0), counted, *held, np.zeros((*batch, 0), bool))
    return dict(zip(STATE, map(np.asarray, first), strict=True))


def buffered(f, *batch, dtype=np.float64):
    """The same with f tokens in the buffer, to write a graph for."""
    first = nothing(*batch, dtype=dtype)
    held = {k: np.zeros((*batch, f, *x.shape[len(batch) + 1 :]), x.dtype) for k, x in first.items() if "held" in k}
    return first | held


def streamed(run, arrays, pieces, *batch, dtype=np.float64):
    """The outputs of pieces of a sequence, each given the state of the one before."""
    state, at, found = nothing(*batch, dtype=dtype), 0, []
    for n in pieces:
        piece = {name: x[..., at : at + n, :] if name in TOKENS else x[..., at : at + n] for name, x in arrays.items()}
        if "bias" in arrays:
            piece["bias"] = arrays["bias"]
        got, *after = run(piece | state)
        state, at = dict(zip(STATE, after, strict=True)), at + n
        assert got.dtype == state["summary"].dtype == state["held_v"].dtype == dtype
        assert state["chunks"] == at // CHUNK and state["held_v"].shape[-2] == at % CHUNK
        found.append(got)
    return np.concatenate(found, axis=-2), state


PIECES = ([1] * 19, [19], [3, 1, 0, 7, 1, 4, 3], [4, 4, 4, 4, 3], [0, 5, 9, 2, 3], [2, 2, 8, 7])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("extra", [False, True], ids=["bare", "mask and bias"])
# Not lucidrains: it divides by the tokens that are known, and a stream knows them later.
@pytest.mark.parametrize("normaliser", sorted({*NORMALISERS} - {"lucidrains"}))
def test_a_stream_through_one_session_is_the_whole(normaliser, extra, dtype, tolerance):
    arrays = tokens(19, 2, dtype=dtype)
    if extra:
        rng = np.random.default_rng(7)
        arrays |= {"bias": rng.normal(size=(CHUNK, CHUNK)).astype(dtype), "key_mask": rng.random((2, 19)) < 0.6}
    # Written for other sizes than any that come.
    traced = {name: x if name == "bias" else x[:1, :7] for name, x in arrays.items()}
    built = build(step(normaliser=normaliser), {**traced, **buffered(2, 1, dtype=dtype)}, opset=20)
    assert not any(axis < 2 for name, axis in built.fixed if name not in ("bias", "summary"))
    assert ("summary", 0) not in built.fixed
    run = session(built.model)
    ours, theirs = rules(normaliser=normaliser)
    (whole,) = session(build(partial(mca.causal, **ours), traced, opset=20).model)(arrays)
    close(whole, spec.causal(**arrays, **theirs), tolerance)
    left = spec.step(spec.initial_state(batch=(2,), s=S, e=E), **arrays, **theirs)[1]
    for pieces in PIECES:
        got, state = streamed(run, arrays, pieces, 2, dtype=dtype)
        close(got, whole, tolerance)
        for one, other in zip(state.values(), left, strict=True):
            close(one, np.asarray(other), tolerance)


@pytest.mark.parametrize("batch", [(), (3, 2)])
def test_a_stream_has_any_number_of_leading_axes(batch):
    arrays = tokens(19, *batch)
    run = session(build(step(kernel="softmax"), {**tokens(2, *batch), **nothing(*batch)}, opset=20).model)
    expected = spec.causal(**arrays, **rules("softmax")[1])
    for pieces in PIECES:
        close(streamed(run, arrays, pieces, *batch)[0], expected, 1e-12)


def test_the_number_of_chunks_may_be_a_number_and_the_state_a_constant():
    ours, theirs = rules("softmax", "su")

    def call(**arrays):
        early, late = ({name: x[:, span] for name, x in arrays.items()} for span in (slice(7), slice(7, None)))
        _, state = mca.step(mca.initial_state(batch=(2,), s=S, e=E), **early, **ours)
        return mca.step(state._replace(chunks=1), **late, **ours)

    arrays = tokens(13, 2, dtype=np.float32)
    got, *state = session(build(call, arrays, opset=20).model)(arrays)
    close(got, spec.causal(**arrays, **theirs)[:, 7:], 1e-6)
    assert state[1] == 3 and state[0].dtype == np.float32


def test_a_step_leaves_the_buffered_rows_out_while_the_chunk_is_open():
    # The kernel is given the rows of the new tokens only; when a chunk closes, those of whole chunks.
    seen = {}

    def kernel(scores, mask):
        seen["rows"] = scores.size(-2)
        return attention_kernel.softmax(scores, mask)

    def call(**arrays):
        state = mca.State(*(arrays.pop(name) for name in STATE))
        rule = rules("softmax")[0] | {"kernel": kernel}
        # The undecorated function, so that its inner values can be results.
        y, _ = mca.step.__wrapped__(state, **arrays, **rule)
        return y, seen["rows"]

    run = session(build(call, {**tokens(1, 1), **buffered(2, 1)}, opset=20).model)
    assert [int(run({**tokens(n, 1), **buffered(2, 1)})[1]) for n in (0, 1, 2, 3, 9)] == [0, 1, 2, CHUNK, CHUNK]


@pytest.mark.parametrize("name", [*MODES, "step", "documents"])
def test_files_of_opset_20_are_valid_and_hold_nothing_newer(name):
    arrays = tokens(6, 2) | {"key_mask": np.ones((2, 6), bool), "bias": np.zeros((CHUNK, CHUNK))}
    if name == "step":
        model = build(step(), {**arrays, **nothing(2)}, opset=20).model
    elif name == "documents":
        arrays["segments"] = np.zeros((2, 6), np.int64)
        model = build(partial(mca.causal, **rules(documents="same_document")[0]), arrays, opset=20).model
    else:
        model = build(partial(MODES[name][0], **rules()[0]), arrays, opset=20).model
    onnx.checker.check_model(model, full_check=True)
    for node in nodes(model):
        if node.domain == "":
            assert onnx.defs.get_schema(node.op_type, 20).since_version <= 20


def test_onnx_itself_reads_the_loops():
    arrays = tokens(11, 2) | {"segments": np.arange(22).reshape(2, 11) // 5}
    for mode, more in (("causal_scan", {}), ("causal", {"documents": "same_document"})):
        given = arrays if more else tokens(11, 2)
        ours, theirs = rules(**more)
        model = build(partial(MODES[mode][0], **ours), given, opset=20).model
        close(ReferenceEvaluator(model).run(None, given)[0], spec.causal(**given, **theirs), 1e-13)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mix", ["bidirectional", "causal", "causal_scan"])
def test_a_unit_of_any_length(mix, dtype, opset):
    width, s, e = 11, 6, 7
    rng = np.random.default_rng(2)
    shapes = {"w_in": (width, 2 * e + s), "b_in": (2 * e + s,), "gamma": (4, s), "beta": (4, s), "w_out": (e, width)}
    weights = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    weights["b_out"] = rng.normal(size=width).astype(dtype)
    options = {"rows": mca.ROWS_LUCIDRAINS}

    def sequence(n, b):
        rng = np.random.default_rng([n, b])
        return {
            "x": rng.normal(size=(b, n, width)).astype(dtype),
            "key_mask": rng.random((b, n)) < 0.7,
            "positions": np.arange(n) + 3,
            "bias": rng.normal(size=(CHUNK, CHUNK)).astype(dtype),
        }

    def call(**arrays):
        theta = rope.frequencies(s, base=100.0)
        options_ = {**options, "mix": MODES[mix][0], "rotate": rope.rotate_half_split, **rules("laplace")[0]}
        return mca.unit(**arrays, segments=None, frequencies=theta, **options_)

    built = build(call, sequence(5, 2) | weights, opset=opset)
    onnx.checker.check_model(built.model, full_check=True)
    assert not any(name in ("key_mask", "positions") or (name == "x" and axis < 2) for name, axis in built.fixed)
    run = session(built.model)
    theta = spec_rope.frequencies(s, base=100.0)
    theirs = {**options, "mix": MODES[mix][1], "rotate": spec_rope.rotate_half_split, **rules("laplace")[1]}
    for n, b in ((1, 1), (CHUNK, 3), (11, 2)):
        arrays = sequence(n, b) | weights
        expected = spec.unit(**arrays, segments=None, frequencies=theta, **theirs)
        close(run(arrays)[0], expected, 1e-12 if dtype == np.float64 else 2e-6)


def test_rows_and_tuples_are_those_of_the_specification():
    assert (mca.ROWS_PAPER, mca.ROWS_LUCIDRAINS) == (spec.ROWS_PAPER, spec.ROWS_LUCIDRAINS)
    for name in ("Reach", "Lengths", "Documents", "Heads", "State"):
        assert getattr(mca, name)._fields == getattr(spec, name)._fields


ODD = np.zeros((1, 6, S + 1))
IDS = np.zeros((1, 6), np.int64)
BAD = [
    ({"k_lin": ODD}, ShapeError, "four heads of one shape"),
    ({"v": np.zeros((6, E))}, ShapeError, "four heads of one shape"),
    ({"v": np.zeros((1, 6, E), int)}, DomainError, "v must be a floating value"),
    ({"chunk": 0}, DomainError, "chunk >= 1"),
    ({"scale": np.nan}, DomainError, "a finite scale"),
    ({"segments": IDS}, DomainError, "segments and documents together"),
    ({"documents": mca.same_document}, DomainError, "segments and documents together"),
    ({"segments": IDS * 1.0, "documents": mca.same_document}, DomainError, "segments must be integers"),
    ({"key_mask": IDS}, DomainError, "key_mask must be boolean"),
    ({"key_mask": np.ones((1, 1, 6), bool)}, ShapeError, "key_mask that broadcasts to the tokens"),
    ({"bias": np.zeros((CHUNK, CHUNK + 1))}, ShapeError, "bias of shape"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[f"{text} {list(c)}" for c, _, text in BAD])
def test_what_does_not_fit_is_refused_while_the_graph_is_written(change, error, text):
    with pytest.raises(error, match=f"mixed_chunk_attention.causal: .*{text}"):
        operator.model(mca.causal, {**tokens(6, 1), **rules()[0], **change}, opset=20)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"summary": np.zeros((1, E, S))}, ShapeError, "a state of s = 5, e = 7 and 1 axes more"),
        ({"counted": np.zeros((1, 1), np.int64)}, ShapeError, "a state of s = 5"),
        ({"held_v": np.zeros((1, 2, S))}, ShapeError, "a state of s = 5"),
        ({"held_valid": np.zeros((1, 2))}, DomainError, "valid must be boolean"),
        ({"counted": np.zeros(1)}, DomainError, "counted must be integers"),
        ({"chunks": np.zeros(1, np.int64)}, ShapeError, "a single number of chunks"),
        ({"chunks": -1}, DomainError, "chunks >= 0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, error, text):
    with pytest.raises(error, match=f"mixed_chunk_attention.step: .*{text}"):
        operator.model(step(), {**tokens(6, 1), **nothing(1), **change}, opset=20)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"rows": (0, 1, 2, 2)}, DomainError), ({"gamma": np.ones((3, S))}, ShapeError), ({"beta": ODD[0]}, ShapeError)],
)
def test_heads_need_four_rows(change, error):
    arguments = {"z": np.ones((1, 3, S)), "gamma": np.ones((4, S)), "beta": np.ones((4, S)), "rows": (0, 1, 2, 3)}
    with pytest.raises(error, match="scale_offset_heads"):
        operator.model(mca.scale_offset_heads, arguments | change, opset=20)


def test_positions_need_frequencies():
    arrays = {"x": np.ones((1, 3, 5)), "w_in": np.ones((5, 10)), "gamma": np.ones((4, 4)), "beta": np.ones((4, 4))}
    arrays |= {"w_out": np.ones((3, 5)), "positions": np.arange(3)}
    rest = dict.fromkeys(("key_mask", "segments", "bias", "frequencies", "b_in", "b_out"))
    options = {"mix": mca.causal, "rotate": rope.rotate_half_split, "rows": mca.ROWS_PAPER, **rules()[0]}
    with pytest.raises(DomainError, match="positions and frequencies together"):
        operator.model(mca.unit, arrays | rest | options, opset=20)


def test_ids_come_in_chunks():
    for call in (mca.same_document, mca.overlapping_chunks):
        with pytest.raises(ShapeError, match=r"segments of shape \(\.\.\., G, c\)"):
            operator.model(call, {"segments": np.zeros(3, np.int64)}, opset=20)
