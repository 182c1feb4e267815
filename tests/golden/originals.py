"""The models as their original implementations compute them, and the same asked of the specification.

`copy` reads a part of each folder, which is kept in tests/golden/roformer and tests/golden/gau_alpha. `whole` reads the
folders that the parts were taken from, at shared/golden beside the repository, and skips the test where they are not.
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

from refimpl.models import _encoder, gau_alpha
from refimpl.ops import attention_kernel, gau, rope

COPIES = Path(__file__).parent / "roformer"
WHOLE = Path(__file__).parents[3] / "shared" / "golden"

# The weights' names in TensorFlow checkpoints of bert4keras, {} being the layer.
BERT4KERAS = {
    "embedding.token": "bert/embeddings/word_embeddings",
    "embedding.segment": "bert/embeddings/token_type_embeddings",
    "embedding.norm.scale": "bert/embeddings/LayerNorm/gamma",
    "embedding.norm.bias": "bert/embeddings/LayerNorm/beta",
    "embedding.mapping.kernel": "bert/encoder/embedding_hidden_mapping_in/kernel",
    "embedding.mapping.bias": "bert/encoder/embedding_hidden_mapping_in/bias",
    "layers.{}.attention.w_q": "bert/encoder/layer_{}/attention/self/query/kernel",
    "layers.{}.attention.b_q": "bert/encoder/layer_{}/attention/self/query/bias",
    "layers.{}.attention.w_k": "bert/encoder/layer_{}/attention/self/key/kernel",
    "layers.{}.attention.b_k": "bert/encoder/layer_{}/attention/self/key/bias",
    "layers.{}.attention.w_v": "bert/encoder/layer_{}/attention/self/value/kernel",
    "layers.{}.attention.b_v": "bert/encoder/layer_{}/attention/self/value/bias",
    "layers.{}.attention.w_o": "bert/encoder/layer_{}/attention/output/dense/kernel",
    "layers.{}.attention.b_o": "bert/encoder/layer_{}/attention/output/dense/bias",
    "layers.{}.attention_norm.scale": "bert/encoder/layer_{}/attention/output/LayerNorm/gamma",
    "layers.{}.attention_norm.bias": "bert/encoder/layer_{}/attention/output/LayerNorm/beta",
    "layers.{}.feed_forward.w_in": "bert/encoder/layer_{}/intermediate/dense/kernel",
    "layers.{}.feed_forward.b_in": "bert/encoder/layer_{}/intermediate/dense/bias",
    "layers.{}.feed_forward.w_out": "bert/encoder/layer_{}/output/dense/kernel",
    "layers.{}.feed_forward.b_out": "bert/encoder/layer_{}/output/dense/bias",
    "layers.{}.feed_forward_norm.scale": "bert/encoder/layer_{}/output/LayerNorm/gamma",
    "layers.{}.feed_forward_norm.bias": "bert/encoder/layer_{}/output/LayerNorm/beta",
    "mlm.transform.kernel": "cls/predictions/transform/dense/kernel",
    "mlm.transform.bias": "cls/predictions/transform/dense/bias",
    "mlm.norm.scale": "cls/predictions/transform/LayerNorm/gamma",
    "mlm.norm.bias": "cls/predictions/transform/LayerNorm/beta",
    "mlm.bias": "cls/predictions/output_bias",
    "pooler.kernel": "bert/pooler/dense/kernel",
    "pooler.bias": "bert/pooler/dense/bias",
    "next_sentence.kernel": "cls/seq_relationship/output_weights",
    "next_sentence.bias": "cls/seq_relationship/output_bias",
    "layers.{}.w_in": "GAU_alpha/encoder/layer_{}/gau/i_dense/kernel",
    "layers.{}.gamma_q": "GAU_alpha/encoder/layer_{}/gau/q_scaleoffset/gamma",
    "layers.{}.gamma_k": "GAU_alpha/encoder/layer_{}/gau/k_scaleoffset/gamma",
    "layers.{}.w_out": "GAU_alpha/encoder/layer_{}/gau/o_dense/kernel",
}
# And in those of Hugging Face and JunnYu.
TORCH = {
    "embedding.token": "roformer.embeddings.word_embeddings.weight",
    "embedding.segment": "roformer.embeddings.token_type_embeddings.weight",
    "embedding.norm.scale": "roformer.embeddings.LayerNorm.weight",
    "embedding.norm.bias": "roformer.embeddings.LayerNorm.bias",
    "embedding.mapping.kernel": "roformer.embeddings_project.weight",
    "embedding.mapping.bias": "roformer.embeddings_project.bias",
    "layers.{}.attention.w_q": "roformer.encoder.layer.{}.attention.self.query.weight",
    "layers.{}.attention.b_q": "roformer.encoder.layer.{}.attention.self.query.bias",
    "layers.{}.attention.w_k": "roformer.encoder.layer.{}.attention.self.key.weight",
    "layers.{}.attention.b_k": "roformer.encoder.layer.{}.attention.self.key.bias",
    "layers.{}.attention.w_v": "roformer.encoder.layer.{}.attention.self.value.weight",
    "layers.{}.attention.b_v": "roformer.encoder.layer.{}.attention.self.value.bias",
    "layers.{}.attention.w_o": "roformer.encoder.layer.{}.attention.output.dense.weight",
    "layers.{}.attention.b_o": "roformer.encoder.layer.{}.attention.output.dense.bias",
    "layers.{}.attention_norm.scale": "roformer.encoder.layer.{}.attention.output.LayerNorm.weight",
    "layers.{}.attention_norm.bias": "roformer.encoder.layer.{}.attention.output.LayerNorm.bias",
    "layers.{}.feed_forward.w_in": "roformer.encoder.layer.{}.intermediate.dense.weight",
    "layers.{}.feed_forward.b_in": "roformer.encoder.layer.{}.intermediate.dense.bias",
    "layers.{}.feed_forward.w_out": "roformer.encoder.layer.{}.output.dense.weight",
    "layers.{}.feed_forward.b_out": "roformer.encoder.layer.{}.output.dense.bias",
    "layers.{}.feed_forward_norm.scale": "roformer.encoder.layer.{}.output.LayerNorm.weight",
    "layers.{}.feed_forward_norm.bias": "roformer.encoder.layer.{}.output.LayerNorm.bias",
    "mlm.transform.kernel": "cls.predictions.transform.dense.weight",
    "mlm.transform.bias": "cls.predictions.transform.dense.bias",
    "mlm.norm.scale": "cls.predictions.transform.LayerNorm.weight",
    "mlm.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "mlm.bias": "cls.predictions.bias",
}
TORCH_GAU_ALPHA = {
    "embedding.token": "gau_alpha.embeddings.word_embeddings.weight",
    "embedding.segment": "gau_alpha.embeddings.token_type_embeddings.weight",
    "layers.{}.w_in": "gau_alpha.encoder.layer.{}.gau.i_dense.weight",
    "layers.{}.gamma_q": "gau_alpha.encoder.layer.{}.gau.q_scaleoffset.weight",
    "layers.{}.gamma_k": "gau_alpha.encoder.layer.{}.gau.k_scaleoffset.weight",
    "layers.{}.w_out": "gau_alpha.encoder.layer.{}.gau.o_dense.weight",
}
TABLES = ("embedding.token", "embedding.segment")


class Original(NamedTuple):
    """Weights under their original names; the arrays of the float64 run and of the float32 run by file and name."""

    weights: dict[str, np.ndarray]
    double: dict[str, np.ndarray]
    single: dict[str, np.ndarray]


def whole(folder):
    """Everything in one folder of the golden figures."""
    from safetensors.numpy import load_file

    if not (WHOLE / folder).is_dir():
        pytest.skip(f"no shared/golden/{folder} beside the repository; the parts in tests/golden/roformer are tested")
    # model.safetensors of the torch ports, weights.safetensors of bert4keras.
    file = next((WHOLE / folder).glob("*.safetensors"))
    runs = {"float64": {}, "float32": {}}
    for archive in sorted((WHOLE / folder).glob("*.npz")):
        kind, _, precision = archive.stem.partition("_")
        for name, array in np.load(archive).items():
            if kind == "dialect":
                run, _, rest = name.partition("_")
                runs[run][f"{precision}/{rest}"] = array
            else:
                runs[precision][f"{kind}/{name}"] = array
    return Original(load_file(file), runs["float64"], runs["float32"])


def copy(folder):
    """The part of a folder that is kept here."""
    place = COPIES.parent / "gau_alpha" if "gau_alpha" in folder else COPIES
    arrays = dict(np.load(place / f"{folder}.npz"))
    theirs = ("bert/", "cls", "roformer.", "GAU_alpha/", "gau_alpha.")
    kept = {name: arrays.pop(name) for name in list(arrays) if name.startswith(theirs)}
    return Original(kept, arrays, {})


def weights_bert4keras(original, shapes):
    """The weights that `shapes` names; only the kernel of the next-sentence head lies transposed."""
    found = {name: original.weights[_theirs(BERT4KERAS, name)] for name in shapes}
    return {name: array.T if name == "next_sentence.kernel" else array for name, array in found.items()}


def weights_torch(original, shapes, names=TORCH):
    """The weights that `shapes` names; torch keeps matrices as (out, in), tables as they are."""
    found = {name: original.weights[_theirs(names, name)] for name in shapes}
    return {name: array.T if array.ndim == 2 and name not in TABLES else array for name, array in found.items()}


def of_bert4keras(model, config, encoder, logits, arrays):
    """What the specification has for the arrays of a folder of bert4keras; `logits` is the masked-language head."""
    ids, segments = arrays["io/token_ids"], arrays["io/segment_ids"]
    mask = _encoder.mask_from_ids_bert4keras(ids)

    def read(config, ids, segments, visible=_encoder.bidirectional):
        mask = _encoder.mask_from_ids_bert4keras(ids)
        return model.hidden_states(encoder, ids, segments, mask, config=config, visible=visible)

    states = read(config, ids, segments)
    got = {f"io/hidden_{i}": state for i, state in enumerate(states)}
    for i in range(config.layers):
        layer = _encoder.layer_of(encoder, i)
        steps = model.layer(
            layer, states[i], _encoder.bidirectional(mask, segments), np.arange(ids.shape[1]), config=config
        )
        got |= {f"io/attn_out_{i}": steps.attention, f"io/attn_norm_{i}": steps.middle}
        got |= {f"io/ffn_out_{i}": steps.feed_forward}
    got["io/last_hidden_state"] = states[-1]
    got["io/mlm_logits"] = logits(states[-1], config)
    got["io/mlm_probs"] = softmax(got["io/mlm_logits"])
    for name, visible in (("lm", _encoder.causal), ("unilm", _encoder.unilm)):
        last = read(config, ids, segments, visible)[-1]
        got |= {f"io/{name}_last_hidden_state": last, f"io/{name}_mlm_logits": logits(last, config)}
    edge = arrays.get("edge/token_ids"), arrays.get("edge/segment_ids")
    if edge[0] is not None:
        got["edge/last_hidden_state"] = read(config, *edge)[-1]
        got["edge/mlm_logits"] = logits(got["edge/last_hidden_state"], config)
        sizes = {name: getattr(config, name) for name in next(iter(model.SIZES.values()))}
        old = model.dialect("bert4keras-0.11.3", **sizes)
        got["0.11.3/last_hidden_state"] = read(old, ids, segments)[-1]
        got["0.11.3/mlm_logits"] = logits(got["0.11.3/last_hidden_state"], old)
        got["0.11.3/edge_last_hidden_state"] = read(old, *edge)[-1]
    return got


def of_torch(model, config, encoder, logits, arrays):
    """What the specification has for the arrays of a folder of Hugging Face or JunnYu."""
    ids, segments = arrays["io/input_ids"], arrays["io/token_type_ids"]
    mask = arrays["io/attention_mask"] == 1
    weights_of_keys, softmax_ = [], attention_kernel.softmax

    def recorded(scores, mask):
        weights_of_keys.append(softmax_(scores, mask))
        return weights_of_keys[-1]

    with mock.patch.object(attention_kernel, "softmax", recorded):
        states = model.hidden_states(encoder, ids, segments, mask, config=config)
    got = {f"io/hidden_{i}": state for i, state in enumerate(states)}
    got |= {f"io/attentions_{i}": weights for i, weights in enumerate(weights_of_keys)}
    got |= {"io/last_hidden_state": states[-1], "io/logits": logits(states[-1], config)}
    last = model.hidden_states(encoder, ids, segments, config=config)[-1]
    got |= {"io/nomask_last_hidden_state": last, "io/nomask_logits": logits(last, config)}
    if "io/attention_mask_3d" in arrays:
        last = model.hidden_states(encoder, ids, segments, mask, config=config, visible=_encoder.causal)[-1]
        got |= {"io/mask3d_last_hidden_state": last, "io/mask3d_logits": logits(last, config)}
        ids, segments = arrays["io/edge_input_ids"], arrays["io/edge_token_type_ids"]
        mask = arrays["io/edge_attention_mask"] == 1
        # JunnYu adds -1e4 to the scores of hidden keys, so that a row of nothing but hidden keys sees them all.
        mask |= ~mask.any(axis=-1, keepdims=True)
        got["io/edge_last_hidden_state"] = model.hidden_states(encoder, ids, segments, mask, config=config)[-1]
        got["io/float32tables_last_hidden_state"] = states[-1]
        got["io/float32tables_logits"] = got["io/logits"]
    return got


def gau_of_bert4keras(read, logits, config, encoder, arrays):
    """What a GAU-α has for the arrays of a folder of bert4keras.

    read(ids, segments, mask, visible=name, config=config) are hidden states, logits(hidden) those of the tied head.
    """
    ids, segments = arrays["io/token_ids"], arrays["io/segment_ids"]
    mask = _encoder.mask_from_ids_bert4keras(ids)
    states = read(ids, segments, mask)
    got = {f"io/hidden_{i}": state for i, state in enumerate(states)}
    for i in range(config.layers):
        got[f"io/gau_out_{i}"] = unit(_encoder.layer_of(encoder, i), states[i], mask, config)
    got |= {"io/last_hidden_state": states[-1], "io/mlm_logits": logits(states[-1])}
    got["io/mlm_probs"] = softmax(got["io/mlm_logits"])
    for name, visible in (("lm", "causal"), ("unilm", "unilm")):
        last = read(ids, segments, mask, visible=visible)[-1]
        got |= {f"io/{name}_last_hidden_state": last, f"io/{name}_mlm_logits": logits(last)}
    edge = arrays["edge/token_ids"], arrays["edge/segment_ids"]
    edge = (*edge, _encoder.mask_from_ids_bert4keras(edge[0]))
    got["edge/last_hidden_state"] = read(*edge)[-1]
    got["edge/mlm_logits"] = logits(got["edge/last_hidden_state"])
    sizes = {name: getattr(config, name) for name in gau_alpha.SIZES["base"]}
    # 0.11.3 attends to everything alike where one key is seen: in the text of nothing but id 0 all vectors are alike.
    for release in ("0.11.3", "0.11.4"):
        old = gau_alpha.dialect(f"bert4keras-{release}", **sizes)
        got[f"{release}/last_hidden_state"] = read(ids, segments, mask, config=old)[-1]
        got[f"{release}/mlm_logits"] = logits(got[f"{release}/last_hidden_state"])
        got[f"{release}/edge_last_hidden_state"] = read(*edge, config=old)[-1]
    return got


def gau_of_junnyu(read, logits, arrays):
    """What a GAU-α has for the arrays of JunnYu's folder; `read` and `logits` as above.

    In read(..., alike_without_keys=True) a token that sees nothing attends to everything alike.
    """
    ids, segments = arrays["io/input_ids"], arrays["io/token_type_ids"]
    mask, weights_of_keys, kernel = arrays["io/attention_mask"] == 1, [], gau_alpha.softmax_plus

    def recorded(scores, mask, n_min):
        weights_of_keys.append(kernel(scores, mask, n_min=n_min))
        return weights_of_keys[-1]

    with mock.patch.object(gau_alpha, "softmax_plus", recorded):
        states = read(ids, segments, mask)
    got = {f"io/hidden_{i}": state for i, state in enumerate(states)}
    got |= {f"io/attentions_{i}": weights for i, weights in enumerate(weights_of_keys)}
    got |= {"io/last_hidden_state": states[-1], "io/logits": logits(states[-1])}
    for name, last in (
        ("mask3d", read(ids, segments, mask, visible="causal")[-1]),
        # Given no mask, he takes every id 0 for padding, position 0 too.
        ("nomask", read(ids, segments, ids != 0)[-1]),
        ("float32tables", states[-1]),
    ):
        got |= {f"io/{name}_last_hidden_state": last, f"io/{name}_logits": logits(last)}
    edge = (arrays[f"io/edge_{name}"] for name in ("input_ids", "token_type_ids", "attention_mask"))
    ids, segments, mask = edge
    # -1e4 stands in the place of hidden scores: where all are hidden, the weights are all alike.
    got["io/edge_last_hidden_state"] = read(ids, segments, mask == 1, alike_without_keys=True)[-1]
    return got


def gau_reader(encoder, config):
    """`read` of the two functions above, by the specification."""
    standard = config

    def read(ids, segments, mask, *, visible="bidirectional", config=standard, alike_without_keys=False):
        seen, kernel = _encoder.VISIBLE[visible], alike if alike_without_keys else gau_alpha.softmax_plus
        with mock.patch.object(gau_alpha, "softmax_plus", kernel):
            return gau_alpha.hidden_states(encoder, ids, segments, mask, config=config, visible=seen)

    return read


def alike(scores, mask, n_min):
    """softmax_plus with equal weights for all tokens in the rows that see none."""
    nothing = ~np.broadcast_to(mask, scores.shape).any(axis=-1, keepdims=True)
    return np.where(nothing, 1 / scores.shape[-1], attention_kernel.softmax_plus(scores, mask, n_min=n_min))


def unit(w, x, mask, config):
    """What a gated attention unit adds, before the sum and its norm."""
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    return gau.unit(
        x, _encoder.bidirectional(mask, mask), None, np.arange(x.shape[-2]), frequencies,
        w["w_in"], None, w["gamma_q"], None, w["gamma_k"], None, w["w_out"], None,
        rotate=rope.rotate_interleaved, kernel=partial(attention_kernel.softmax_plus, n_min=config.n_min),
    )  # fmt: skip


def errors(got, expected):
    """The largest error of every array of real numbers in `expected`, against its largest magnitude."""
    real = {name: array for name, array in expected.items() if array.dtype.kind == "f"}
    assert real.keys() <= got.keys(), sorted(real.keys() - got.keys())
    assert [name for name, array in real.items() if got[name].shape != array.shape] == []
    # NaN is beyond every bound.
    apart = {name: np.nan_to_num(np.abs(got[name] - array), nan=np.inf) for name, array in real.items()}
    return {name: float(apart[name].max() / np.abs(array).max()) for name, array in real.items()}


def softmax(logits):
    """Probabilities of the last axis."""
    return attention_kernel.softmax(logits, None)


def _theirs(names, ours):
    layer = re.search(r"\d+", ours)
    return names[ours.replace(layer[0], "{}", 1)].format(layer[0]) if layer else names[ours]
