"""Other people's checkpoints in our names: every layout, heads, constants, and everything that would be a guess."""

import json

import numpy as np
import pytest
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st

from refimpl import model as models
from refimpl import originals
from refimpl.models import gau_alpha, roformer, roformer_v2
from refimpl.models._heads import NextSentence, Pooler, TiedLM, TransformedLM
from refimpl.originals import OriginalError, Part, plan
from tests.golden import checkpoints
from tests.golden import originals as by_hand

# Distinct, so that no transposition hides.
BERT = {
    "vocab_size": 23, "hidden_size": 12, "embedding_size": 7, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 17, "hidden_act": "gelu", "type_vocab_size": 2,
}  # fmt: skip
V2 = {**BERT, "embedding_size": 12, "hidden_act": "relu"}
GAU = {
    "vocab_size": 23, "hidden_size": 6, "num_hidden_layers": 2, "intermediate_size": 11, "hidden_act": "swish",
    "attention_key_size": 4,
}  # fmt: skip
HEADS = (TransformedLM(), Pooler("tanh"), NextSentence())
NEW, OLD = "bert4keras-0.11.5", "bert4keras-0.11.3"


def config(given, model=roformer, dialect=NEW, **changes):
    if model is gau_alpha:
        sizes = {"expanded_size": given["intermediate_size"], "key_size": 4}
    else:
        sizes = {"embedding_size": given["embedding_size"], "heads": 3, "intermediate_size": given["intermediate_size"]}
    made = model.dialect(dialect, vocab_size=23, segments=2, hidden_size=given["hidden_size"], layers=2, **sizes)
    return made if not changes else type(made)(**{**made.__dict__, **changes})


def theirs(table, shapes, transposed):
    """Shapes under the names of a table that the golden figures were read with; it is written apart from the product's.

    transposed: whether matrices lie (out, in), tables aside.
    """
    found = {}
    for name, shape in shapes.items():
        layer = name.split(".")[1]
        generic = name.replace(f".{layer}.", ".{}.", 1) if name.startswith("layers.") else name
        turned = transposed and len(shape) == 2 and name not in by_hand.TABLES
        turned |= name == "next_sentence.kernel" and not transposed
        found[table[generic].format(layer)] = shape[::-1] if turned else shape
    return found


def tensorflow(given=BERT, heads=HEADS, model=roformer):
    return theirs(by_hand.BERT4KERAS, models.shapes(models.Model(config(given, model), heads, "bidirectional")), False)


def pytorch(given=BERT, heads=HEADS[:1], model=roformer):
    return theirs(by_hand.TORCH, models.shapes(models.Model(config(given, model), heads, "bidirectional")), True)


def gau(layout):
    d, e, s = 6, 11, 4
    made = {}
    for i in range(2):
        if layout == "tensorflow":
            made |= {
                f"GAU_alpha/encoder/layer_{i}/gau/i_dense/kernel": (d, 2 * e + s),
                f"GAU_alpha/encoder/layer_{i}/gau/o_dense/kernel": (e, d),
                f"GAU_alpha/encoder/layer_{i}/gau/q_scaleoffset/gamma": (s,),
                f"GAU_alpha/encoder/layer_{i}/gau/k_scaleoffset/gamma": (s,),
            }
            continue
        place = f"gau_alpha.encoder.layer.{i}.gau" if layout == "junnyu" else f"encoderLayer.{i}.gau"
        made |= {f"{place}.i_dense.weight": (2 * e + s, d), f"{place}.o_dense.weight": (d, e)}
        if layout == "junnyu":
            made |= {f"{place}.q_scaleoffset.weight": (s,), f"{place}.k_scaleoffset.weight": (s,)}
        else:
            made |= {f"{place}.offsetscale.gamma": (2, s)}
    word, segment, decoder = {
        "tensorflow": ("bert/embeddings/word_embeddings", "bert/embeddings/token_type_embeddings", ""),
        "junnyu": (
            "gau_alpha.embeddings.word_embeddings.weight", "gau_alpha.embeddings.token_type_embeddings.weight",
            "cls.predictions.decoder.weight",
        ),
        "bert4torch": (
            "embeddings.word_embeddings.weight", "embeddings.segment_embeddings.weight", "mlmDecoder.weight",
        ),
    }[layout]  # fmt: skip
    made |= {word: (23, d), segment: (2, d)}
    return made | ({decoder: (23, d)} if decoder else {})


def bert4torch(given=BERT, *, norms=("layerNorm1", "layerNorm2")):
    """The names that bert4torch's own modules have, written from its code."""
    e, d, f, v = given["embedding_size"], 12, 17, 23
    made = {
        "embeddings.word_embeddings.weight": (v, e), "embeddings.segment_embeddings.weight": (2, e),
        "embeddings.layerNorm.weight": (e,), "embeddings.layerNorm.bias": (e,),
        "embeddings.embedding_hidden_mapping_in.weight": (d, e), "embeddings.embedding_hidden_mapping_in.bias": (d,),
        "pooler.weight": (d, d), "pooler.bias": (d,), "nsp.weight": (2, d), "nsp.bias": (2,),
        "mlmDense.weight": (e, d), "mlmDense.bias": (e,), "mlmLayerNorm.weight": (e,), "mlmLayerNorm.bias": (e,),
        "mlmBias": (v,), "mlmDecoder.weight": (v, e), "mlmDecoder.bias": (v,),
    }  # fmt: skip
    for i in range(2):
        layer = f"encoderLayer.{i}."
        for name in "qkvo":
            made |= {f"{layer}multiHeadAttention.{name}.weight": (d, d), f"{layer}multiHeadAttention.{name}.bias": (d,)}
        for name in norms:
            made |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
        made |= {
            f"{layer}feedForward.intermediateDense.weight": (f, d), f"{layer}feedForward.intermediateDense.bias": (f,),
            f"{layer}feedForward.outputDense.weight": (d, f), f"{layer}feedForward.outputDense.bias": (d,),
        }  # fmt: skip
    return made


def test_bert4keras_roformer_with_every_head():
    made = plan(tensorflow(), BERT, dialect=NEW)
    assert (made.layout, made.model) == ("bert4keras", models.Model(config(BERT), HEADS, "bidirectional"))
    assert made.parts["layers.1.attention.w_q"] == Part("bert/encoder/layer_1/attention/self/query/kernel", "as it is")
    assert made.parts["embedding.norm.scale"] == Part("bert/embeddings/LayerNorm/gamma", "as it is")
    assert made.parts["embedding.norm.bias"] == Part("bert/embeddings/LayerNorm/beta", "as it is")
    assert made.parts["next_sentence.kernel"] == Part("cls/seq_relationship/output_weights", "transposed")
    assert list(made.parts) == list(models.shapes(made.model))
    assert made.dialects == ("bert4keras-0.11.4", NEW)


@pytest.mark.parametrize("heads", [(), (TransformedLM(),), (Pooler("tanh"),), HEADS], ids=len)
def test_a_head_is_there_where_its_tensors_are(heads):
    assert plan(tensorflow(heads=heads), BERT, dialect=NEW).model.heads == heads


def test_bert4keras_roformer_v2_is_told_by_what_it_lacks():
    made = plan(tensorflow(V2, (TiedLM(),), roformer_v2), V2, dialect=OLD)
    assert made.model == models.Model(config(V2, roformer_v2, OLD), (TiedLM(),), "bidirectional")
    assert made.dialects == (OLD, "junnyu")


def test_a_tied_head_needs_equal_widths():
    given = {**V2, "embedding_size": 7}
    made = plan(tensorflow(given, (), roformer_v2), given, dialect=OLD)
    assert made.model.heads == ()


@pytest.mark.parametrize("layout", ["tensorflow", "junnyu", "bert4torch"])
def test_gau_alpha(layout):
    made = plan(gau(layout), GAU, dialect="bert4keras-0.11.4")
    assert made.model == models.Model(config(GAU, gau_alpha, "bert4keras-0.11.4"), (TiedLM(),), "bidirectional")
    expected = {
        "tensorflow": ("GAU_alpha/encoder/layer_1/gau/k_scaleoffset/gamma", "as it is", "as it is"),
        "junnyu": ("gau_alpha.encoder.layer.1.gau.k_scaleoffset.weight", "as it is", "transposed"),
        "bert4torch": ("encoderLayer.1.gau.offsetscale.gamma", "row 1", "transposed"),
    }[layout]
    assert made.parts["layers.1.gamma_k"] == Part(*expected[:2])
    assert made.parts["layers.1.w_in"].lies == expected[2]
    assert len(made.copies) == (layout != "tensorflow")


def test_hugging_face_with_tied_tensors_twice_and_a_table_of_positions():
    tensors = {
        **pytorch(), "cls.predictions.decoder.weight": (23, 7), "cls.predictions.decoder.bias": (23,),
        "roformer.encoder.embed_positions.weight": (64, 4),
    }  # fmt: skip
    made = plan(tensors, {**BERT, "layer_norm_eps": 1e-12, "model_type": "roformer"})
    assert made.model == models.Model(config(BERT, dialect="huggingface"), (TransformedLM(),), "bidirectional")
    assert made.copies == {
        "cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert made.left_out == ("roformer.encoder.embed_positions.weight",)
    assert made.parts["mlm.transform.kernel"] == Part("cls.predictions.transform.dense.weight", "transposed")
    assert made.parts["embedding.token"].lies == "as it is"


def test_hugging_face_saves_an_encoder_alone_without_its_prefix():
    bare = {name.removeprefix("roformer."): shape for name, shape in pytorch(heads=()).items()}
    made = plan(bare, {**BERT, "layer_norm_eps": 1e-12})
    assert made.model.heads == ()
    assert made.parts["layers.0.attention.w_k"].theirs == "encoder.layer.0.attention.self.key.weight"


def test_a_bias_that_is_there_by_its_second_name_alone():
    tensors = pytorch()
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    made = plan(tensors, {**BERT, "layer_norm_eps": 1e-12})
    assert (made.parts["mlm.bias"].theirs, made.copies) == ("cls.predictions.decoder.bias", {})


@pytest.mark.parametrize("norms", [("layerNorm1", "layerNorm2"), ("attnLayerNorm", "ffnLayerNorm")])
def test_bert4torch_roformer(norms):
    made = plan(bert4torch(norms=norms), BERT, dialect="junnyu")
    assert (made.layout, made.model.heads) == ("bert4torch", HEADS)
    assert made.parts["layers.1.attention_norm.scale"].theirs == f"encoderLayer.1.{norms[0]}.weight"
    assert made.parts["next_sentence.kernel"] == Part("nsp.weight", "transposed")
    assert made.copies == {"mlmDecoder.weight": "embeddings.word_embeddings.weight", "mlmDecoder.bias": "mlmBias"}


def test_a_gau_of_bert4torch_has_one_epsilon_in_its_layers():
    # Measured: with 1e-7 in the configuration its embedding has 1e-7, and its layers 1e-12.
    assert plan(gau("bert4torch"), {**GAU, "layer_norm_eps": 1e-12}).model.config.epsilon == 1e-12
    with pytest.raises(OriginalError, match="layer_norm_eps 1e-12, which bert4torch's GAU has.*; received 1e-07"):
        plan(gau("bert4torch"), {**GAU, "layer_norm_eps": 1e-7})


def test_bert4torch_roformer_v2():
    keep = ("q.weight", "k.weight", "v.weight", "o.weight", "Dense.weight", "embeddings.weight", "mlmDecoder.weight")
    tensors = {name: s for name, s in bert4torch(V2).items() if name.endswith(keep) and name != "mlmDense.weight"}
    assert plan(tensors, V2, dialect="junnyu").model.config == config(V2, roformer_v2, "junnyu")


def test_junnyu_v2_is_named_by_its_norm():
    given = {**V2, "norm_type": "rms", "use_bias": False, "model_type": "roformer", "layer_norm_eps": 1e-12}
    made = plan(pytorch(V2, (), roformer_v2), given)
    assert made.model.config == config(V2, roformer_v2, "junnyu")
    assert originals.model_of_config(given) == "roformer_v2"


def test_optimizers_have_no_part():
    slots = [f"bert/embeddings/LayerNorm/gamma/{slot}" for slot in ("adam_m", "adam_v", "Adam", "Adam_1")]
    extra = dict.fromkeys([*slots, "global_step", "beta1_power", "beta2_power"], ())
    assert set(plan({**tensorflow(), **extra}, BERT, dialect=NEW).left_out) == set(extra)


def test_what_is_ignored_by_name_is_as_if_it_were_not_there():
    tensors = {**tensorflow(), "classifier/kernel": (12, 5), "classifier/bias": (5,)}
    made = plan(tensors, BERT, dialect=NEW, ignore=["classifier/*", "cls/seq*", "bert/pooler/*"])
    assert made.model.heads == (TransformedLM(),)
    assert "classifier/bias" in made.ignored
    with pytest.raises(OriginalError, match=r"expected a pattern that some of the \d+ names match; received 'clas'"):
        plan(tensors, BERT, dialect=NEW, ignore=["clas"])


@pytest.mark.parametrize(
    ("lies", "expected"),
    [("as it is", [[1, 2, 3], [4, 5, 6]]), ("transposed", [[1, 4], [2, 5], [3, 6]]), ("row 0", [1, 2, 3]),
     ("row 1", [4, 5, 6])],
)  # fmt: skip
def test_how_a_weight_lies(lies, expected):
    tensor = np.array([[1, 2, 3], [4, 5, 6]])
    taken = Part("w", lies).take(tensor)
    assert taken.tolist() == expected
    assert np.shares_memory(taken, tensor)
    assert Part("w", lies).shape(taken.shape) == tensor.shape


@settings(max_examples=25, deadline=None)
@drawn_from(
    sizes=st.fixed_dictionaries(
        {name: st.integers(1, 4) for name in ("embedding_size", "layers", "heads", "intermediate_size")}
    ),
    heads=st.sampled_from([(), HEADS[:1], HEADS[1:2], HEADS[1:], HEADS]),
    turned=st.booleans(),
)
def test_every_weight_comes_back(sizes, heads, turned):
    """Law: what is laid down under their names, turned as they turn it, is planned as the same weights."""
    # PyTorch names of the heads below the masked-language one are not in the table that was written by hand.
    heads = heads[:1] if turned and heads[:1] == HEADS[:1] else () if turned else heads
    held = roformer.dialect(OLD, vocab_size=5, segments=2, hidden_size=6 * sizes["heads"], **sizes)
    shapes = models.shapes(models.Model(held, heads, "bidirectional"))
    drawn = np.random.default_rng(0)
    weights = {name: drawn.standard_normal(shape) for name, shape in shapes.items()}
    lying = theirs(by_hand.TORCH if turned else by_hand.BERT4KERAS, shapes, turned)
    tensors = {}
    for (name, shape), (ours, array) in zip(lying.items(), weights.items(), strict=True):
        matrix = turned and array.ndim == 2 and ours not in by_hand.TABLES
        tensors[name] = array.T if matrix or (ours == "next_sentence.kernel" and not turned) else array
        assert tensors[name].shape == shape
    given = {
        "vocab_size": 5, "hidden_size": held.hidden_size, "embedding_size": held.embedding_size, "hidden_act": "gelu",
        "num_hidden_layers": held.layers, "num_attention_heads": held.heads,
        "intermediate_size": held.intermediate_size,
    }  # fmt: skip
    made = plan({name: array.shape for name, array in tensors.items()}, given, dialect=OLD)
    assert (made.model.config, made.model.heads) == (held, heads)
    for ours, array in weights.items():
        assert np.array_equal(made.parts[ours].take(tensors[made.parts[ours].theirs]), array)


def test_the_dialect_is_asked_for_and_each_is_explained():
    with pytest.raises(OriginalError) as caught:
        plan(tensorflow(), BERT)
    assert "does not tell the release of bert4keras" in str(caught.value)
    for told in (f"{OLD} (epsilon 1e-12, mlm_epsilon 1e-12)", f"{NEW} (epsilon 1e-07, mlm_epsilon 1e-12)"):
        assert told in str(caught.value)
    with pytest.raises(OriginalError, match=r"expected a dialect among bert4keras-0\.11\.3 .*; received 'bert4keras'"):
        plan(tensorflow(), BERT, dialect="bert4keras")
    with pytest.raises(OriginalError, match="does not tell layer_norm_eps"):
        plan(pytorch(), BERT)
    # bert4keras does not read this key, so it tells nothing there.
    with pytest.raises(OriginalError, match="does not tell the release"):
        plan(tensorflow(), {**BERT, "layer_norm_eps": 1e-12})


def test_the_epsilon_of_a_configuration_is_taken():
    made = plan(pytorch(), {**BERT, "layer_norm_eps": 1e-5})
    assert (made.model.config.epsilon, made.model.config.mlm_epsilon, made.dialects) == (1e-5, 1e-5, ())
    # bert4torch has 1e-12 in its head, whatever the configuration says.
    made = plan(bert4torch(), {**BERT, "layer_norm_eps": 1e-5})
    assert (made.model.config.epsilon, made.model.config.mlm_epsilon) == (1e-5, 1e-12)
    made = plan(gau("junnyu"), {**GAU, "layer_norm_eps": 1e-9})
    assert (made.model.config.epsilon, made.model.config.n_min) == (1e-9, 1)
    with pytest.raises(OriginalError, match=r"epsilon 1e-12 of layer_norm_eps; received bert4keras-0\.11\.5 \(epsilon"):
        plan(pytorch(), {**BERT, "layer_norm_eps": 1e-12}, dialect=NEW)


def test_the_tanh_form_of_gelu_is_read():
    made = plan(tensorflow(), {**BERT, "hidden_act": "gelu_new"}, dialect=NEW)
    assert made.model.config.activation == "gelu_tanh"
    # Dialects are their constants; the activation is the configuration's.
    assert made.dialects == ("bert4keras-0.11.4", NEW)


def test_who_sees_whom():
    tensors, given = pytorch(), {**BERT, "layer_norm_eps": 1e-12}
    assert plan(tensors, given).model.visible == "bidirectional"
    assert plan(tensors, {**given, "is_decoder": True}).model.visible == "causal"
    assert plan(tensors, given, visible="unilm").model.visible == "unilm"
    # A mask is what a caller gives, whatever the configuration says of its use.
    assert plan(tensors, {**given, "is_decoder": True}, visible="unilm").model.visible == "unilm"


def test_an_untied_head_must_have_its_own_table_to_compare():
    tensors, given = pytorch(), {**BERT, "layer_norm_eps": 1e-12, "tie_word_embeddings": False}
    with pytest.raises(
        OriginalError, match=r"a tensor cls\.predictions\.decoder\.weight, since the configuration says"
    ):
        plan(tensors, given)
    assert plan({**tensors, "cls.predictions.decoder.weight": (23, 7)}, given).copies
    assert plan(pytorch(heads=()), given).model.heads == ()


def test_what_follows_the_pooler():
    assert plan(tensorflow(), BERT, dialect=NEW, pooler="linear").model.heads[1] == Pooler("linear")
    tensors = {**pytorch(), "roformer.pooler.dense.weight": (12, 12), "roformer.pooler.dense.bias": (12,)}
    given = {**BERT, "layer_norm_eps": 1e-12, "pooler_activation": "linear"}
    assert plan(tensors, given).model.heads[-1] == Pooler("linear")
    with pytest.raises(OriginalError, match="expected the pooler to be linear"):
        plan(tensors, given, pooler="tanh")
    with pytest.raises(OriginalError, match="expected a checkpoint with a pooler"):
        plan(pytorch(), {**BERT, "layer_norm_eps": 1e-12}, pooler="tanh")


@pytest.mark.parametrize("name", ["bert/encoder/layer_1/output/dense/bias", "cls/predictions/output_bias",
                                  "bert/pooler/dense/kernel"])  # fmt: skip
def test_a_missing_tensor_is_named(name):
    tensors = {**tensorflow()}
    del tensors[name]
    with pytest.raises(OriginalError, match=f"missing: {name}; without a place in the model: none"):
        plan(tensors, BERT, dialect=NEW)


@pytest.mark.parametrize("name", ["bert/encoder/layer_2/output/dense/bias", "bert/extra", "output_bias"])
def test_a_tensor_that_is_left_over_is_named(name):
    with pytest.raises(OriginalError, match=f"missing: none; without a place in the model: {name}"):
        plan({**tensorflow(), name: (3,)}, BERT, dialect=NEW)


def test_junnyu_v2_has_a_bias_in_its_mapping_that_the_model_has_not():
    given = {**V2, "embedding_size": 7, "layer_norm_eps": 1e-12}
    tensors = {**pytorch(given, (), roformer_v2), "roformer.embeddings_project.bias": (12,)}
    with pytest.raises(OriginalError, match=r"without a place in the model: roformer\.embeddings_project\.bias"):
        plan(tensors, given)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bert/encoder/layer_0/intermediate/dense/kernel", (17, 12), r"of shape \(12, 17\) for layers\.0\.feed"),
        ("cls/seq_relationship/output_weights", (12, 2), r"of shape \(2, 12\) for next_sentence\.kernel"),
        ("bert/embeddings/word_embeddings", (24, 7), r"of shape \(23, 7\) for embedding\.token; received \(24, 7\)"),
    ],
)
def test_another_shape_is_named(name, shape, message):
    with pytest.raises(OriginalError, match=message):
        plan({**tensorflow(), name: shape}, BERT, dialect=NEW)


def test_a_copy_of_another_shape_is_named():
    tensors = {**pytorch(), "cls.predictions.decoder.weight": (7, 23)}
    with pytest.raises(OriginalError, match=r"decoder\.weight of shape \(23, 7\) for a copy of roformer\.embeddings"):
        plan(tensors, {**BERT, "layer_norm_eps": 1e-12})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, r"hidden_act one of gelu, .*; received 'mish'"),
        ({"hidden_act": None}, "hidden_act one of"),
        ({"rotary_value": True}, r"rotary_value False for roformer; received True"),
        ({"rotary_value": 0}, "rotary_value False for roformer; received 0"),
        ({"add_cross_attention": True}, "add_cross_attention False"),
        ({"use_relative_position": True}, "use_relative_position False"),
        ({"model_type": "bert"}, "model_type 'roformer' for roformer; received 'bert'"),
        ({"norm_type": "rms"}, "norm_type 'layer_norm'"),
        ({"use_bias": False}, "use_bias True"),
        ({"hidden_size": None}, "hidden_size of the configuration to be a whole number"),
        ({"hidden_size": True}, "hidden_size of the configuration to be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads of the configuration to be a whole number from 1 on"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers of at most \d+, as there are tensors; received 1000000000"),
        ({"type_vocab_size": 3}, "type_vocab_size 2, as the table of segments has rows; received 3"),
        ({"attention_head_size": 8}, "attention_head_size of hidden_size / num_attention_heads, 12 / 3; received 8"),
        ({"is_decoder": 1}, "is_decoder to be true or false"),
    ],
)
def test_a_configuration_that_asks_for_something_else(changes, message):
    with pytest.raises(OriginalError, match=message):
        plan(tensorflow(), {**BERT, **changes}, dialect=NEW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "squared_relu"}, "normalization 'softmax_plus'"),
        ({"attention_scale": False}, "attention_scale True"),
        ({"hidden_act": "relu"}, "hidden_act swish for gau_alpha"),
        ({"attention_key_size": 5}, "attention_key_size 4, as gamma has numbers; received 5"),
        ({"embedding_size": 5}, "embedding_size 6, as hidden_size; received 5"),
        ({"use_bias": True}, "use_bias False"),
    ],
)
def test_a_gau_that_is_not_alpha(changes, message):
    with pytest.raises(OriginalError, match=message):
        plan(gau("tensorflow"), {**GAU, **changes}, dialect=NEW)


def test_no_configuration():
    with pytest.raises(OriginalError, match="expected a configuration beside the weights"):
        plan(tensorflow(), None, dialect=NEW)
    with pytest.raises(OriginalError, match="expected a configuration that is a JSON object; received list"):
        plan(tensorflow(), [1], dialect=NEW)
    for value in ("1e-12", -1.0, float("nan"), True):
        with pytest.raises(OriginalError, match="layer_norm_eps to be a number that is not negative"):
            plan(pytorch(), {**BERT, "layer_norm_eps": value})


def test_bert_is_refused_by_its_positions():
    tensors = {**tensorflow(), "bert/embeddings/position_embeddings": (512, 7)}
    with pytest.raises(OriginalError, match="without learned positions; received bert/embeddings/position_embeddings"):
        plan(tensors, BERT, dialect=NEW)


def test_names_of_nobody_are_refused():
    with pytest.raises(OriginalError, match=r"the tensors of a known layout \(TensorFlow names.*; received a, b"):
        originals.recognise(["b", "a"])


def test_the_model_may_be_named_and_the_names_must_fit():
    with pytest.raises(OriginalError, match="without a place in the model: bert/embeddings/LayerNorm/beta"):
        plan(tensorflow(heads=()), {**BERT, "hidden_act": "relu"}, model="roformer_v2", dialect=NEW)
    with pytest.raises(ValueError, match="expected a model among roformer, roformer_v2, gau_alpha"):
        plan(tensorflow(), BERT, model="bert", dialect=NEW)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_type": "roformer"}, "roformer"),
        ({"model_type": "roformer", "norm_type": "rms"}, "roformer_v2"),
        ({"model_type": "gau_alpha"}, "gau_alpha"),
    ],
)
def test_the_model_that_a_configuration_names(given, expected):
    assert originals.model_of_config(given) == expected


def test_a_configuration_that_names_no_model():
    with pytest.raises(OriginalError, match=r"expected the model to be named \(roformer, roformer_v2, gau_alpha\)"):
        originals.model_of_config(json.loads((checkpoints.HERE / "gau_alpha" / "bert_config.json").read_text()))
