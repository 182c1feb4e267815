"""What others stumbled over when they deployed such models: shown on the pinned runtimes, and absent from our files.

Further traps stand where they belong: ONNX Runtime's float64 fusion of RMS norm in ops/test_norm.py, tail chunks in
ops/test_mixed_chunk_attention.py (every length), one visible key and fully masked rows in ops/test_attention_kernel.py.
"""

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.models import gau_alpha
from refimpl.models._heads import SentenceEmbedding

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch")

from export import graph, model  # noqa: E402

CONFIG = gau_alpha.Config(
    vocab_size=31, segments=2, hidden_size=32, layers=2, expanded_size=64, key_size=16, rotary_base=10000.0,
    n_min=1, epsilon=1e-12,
)  # fmt: skip
MODEL = specification.Model(CONFIG, (SentenceEmbedding("mean_of_tokens"),), "bidirectional")


def built(opset):
    drawn = np.random.default_rng(0)
    scale = {"gamma_q": 1.0, "gamma_k": 1.0}
    weights = {
        name: (drawn.normal(size=shape) * scale.get(name.rpartition(".")[2], shape[0] ** -0.5)).astype(np.float32)
        for name, shape in specification.shapes(MODEL).items()
    }
    return model.build(MODEL, weights, opset=opset)


def answer(proto, token_ids):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    mask = np.ones(token_ids.shape, np.bool_)
    return session.run(["embedding"], {"token_ids": token_ids, "segment_ids": 0 * token_ids, "mask": mask})[0]


@pytest.mark.parametrize("opset", graph.OPSETS)
def test_a_sentence_alone_and_in_a_batch(opset):
    token_ids = np.random.default_rng(1).integers(0, 31, (4, 24))
    proto = built(opset)
    whole, alone = answer(proto, token_ids), answer(proto, token_ids[:1])
    assert np.abs(whole[0] - alone[0]).max() <= 1e-6 * np.abs(whole).max()


def test_dynamic_int8_depends_on_the_batch(tmp_path):
    """One scale for the activations of all sentences: a neighbour changes the answer, so it is not exported."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    proto = onnx.inliner.inline_local_functions(built(20))
    onnx.save(proto, tmp_path / "float.onnx")
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"])
    quantized = onnx.load(tmp_path / "int8.onnx")
    assert any("Integer" in node.op_type or "DynamicQuantize" in node.op_type for node in quantized.graph.node)
    token_ids = np.random.default_rng(1).integers(0, 31, (4, 24))
    whole, alone = answer(quantized, token_ids), answer(quantized, token_ids[:1])
    assert np.abs(whole[0] - alone[0]).max() > 1e-4 * np.abs(whole).max()


def test_the_newest_format_of_onnx_is_not_loaded():
    """onnx stamps its newest opset and format unless told otherwise; ours are told (graph.OPSETS, graph.IR_VERSION)."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    newest = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    with pytest.raises(Exception, match="(?i)opset|ir.version"):
        onnxruntime.InferenceSession(onnx.helper.make_model(newest).SerializeToString())
    for opset in graph.OPSETS:
        proto = built(opset)
        assert proto.ir_version == graph.IR_VERSION
        assert answer(proto, np.zeros((1, 1), np.int64)).shape == (1, 32)
