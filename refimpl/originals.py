"""Other people's checkpoints in our names: which of their tensors holds each of our weights, and how it lies in there.

    bert/encoder/layer_3/attention/self/query/kernel      layers.3.attention.w_q, as it is
    roformer.encoder.layer.3.attention.self.query.weight  layers.3.attention.w_q, transposed
    encoderLayer.3.gau.offsetscale.gamma                  layers.3.gamma_q (row 0) and layers.3.gamma_k (row 1)

Names, shapes and their configuration decide; no tensor is looked at here. Nothing is guessed: what a configuration does
not tell is asked for, and a tensor without a place in the model is an error unless the caller leaves it out by name.

Source: held against checkpoints that their own code wrote and ran: bert4keras (RoFormer, RoFormerV2, GAU-α), Hugging
Face (RoFormer), JunnYu and bert4torch 0.4.0 and 0.5.4 (RoFormer, RoFormerV2, GAU-α). Read in their code only, since no
file of theirs was at hand: the next-sentence head of Hugging Face (which no published RoFormer has), and the tensors of
optimizers.
Differs: TensorFlow keeps kernels as (in, out), like us, but for the next-sentence head; PyTorch as (out, in).
"""

import fnmatch
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from refimpl import check
from refimpl import model as models
from refimpl.model import Model, Visible
from refimpl.models import _encoder, _heads

Shape = tuple[int, ...]
Lies = Literal["as it is", "transposed", "row 0", "row 1"]
LAYOUTS: Mapping[str, str] = {
    "bert4keras": "TensorFlow names of bert4keras",
    "huggingface": "PyTorch names of Hugging Face and JunnYu",
    "bert4torch": "PyTorch names of bert4torch",
}
# Of the rows below: the column, and what follows a dense layer's or a norm's name there.
_COLUMNS = {"bert4keras": 0, "huggingface": 1, "bert4torch": 2}
_DENSE = {"bert4keras": ("/kernel", "/bias"), "huggingface": (".weight", ".bias"), "bert4torch": (".weight", ".bias")}
_NORM = {"bert4keras": ("/gamma", "/beta"), "huggingface": (".weight", ".bias"), "bert4torch": (".weight", ".bias")}
# {} is the layer; | stands between names of which a file has one.
_TF, _HF, _B4T = "bert/encoder/layer_{}/", "roformer.encoder.layer.{}.", "encoderLayer.{}."
_DENSE_LAYERS = {
    ("embedding.mapping.kernel", "embedding.mapping.bias"): (
        "bert/encoder/embedding_hidden_mapping_in",
        "roformer.embeddings_project|roformer.encoder.embedding_hidden_mapping_in",
        "embeddings.embedding_hidden_mapping_in",
    ),
    **{
        (f"layers.{{}}.attention.w_{name[0]}", f"layers.{{}}.attention.b_{name[0]}"): (
            f"{_TF}attention/self/{name}", f"{_HF}attention.self.{name}", f"{_B4T}multiHeadAttention.{name[0]}",
        )
        for name in ("query", "key", "value")
    },
    ("layers.{}.attention.w_o", "layers.{}.attention.b_o"): (
        f"{_TF}attention/output/dense", f"{_HF}attention.output.dense", f"{_B4T}multiHeadAttention.o",
    ),
    ("layers.{}.feed_forward.w_in", "layers.{}.feed_forward.b_in"): (
        f"{_TF}intermediate/dense", f"{_HF}intermediate.dense", f"{_B4T}feedForward.intermediateDense",
    ),
    ("layers.{}.feed_forward.w_out", "layers.{}.feed_forward.b_out"): (
        f"{_TF}output/dense", f"{_HF}output.dense", f"{_B4T}feedForward.outputDense",
    ),
    ("mlm.transform.kernel", "mlm.transform.bias"): (
        "cls/predictions/transform/dense", "cls.predictions.transform.dense", "mlmDense",
    ),
    ("pooler.kernel", "pooler.bias"): ("bert/pooler/dense", "roformer.pooler.dense", "pooler"),
}  # fmt: skip
_NORMS = {
    ("embedding.norm.scale", "embedding.norm.bias"): (
        "bert/embeddings/LayerNorm", "roformer.embeddings.LayerNorm", "embeddings.layerNorm",
    ),
    ("layers.{}.attention_norm.scale", "layers.{}.attention_norm.bias"): (
        f"{_TF}attention/output/LayerNorm", f"{_HF}attention.output.LayerNorm",
        f"{_B4T}layerNorm1|{_B4T}attnLayerNorm",
    ),
    ("layers.{}.feed_forward_norm.scale", "layers.{}.feed_forward_norm.bias"): (
        f"{_TF}output/LayerNorm", f"{_HF}output.LayerNorm", f"{_B4T}layerNorm2|{_B4T}ffnLayerNorm",
    ),
    ("mlm.norm.scale", "mlm.norm.bias"): (
        "cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm", "mlmLayerNorm",
    ),
}  # fmt: skip
# What has a name of its own in full.
_GAU = ("GAU_alpha/encoder/layer_{}/gau/", "gau_alpha.encoder.layer.{}.gau.", "encoderLayer.{}.gau.")
_OTHERS = {
    "embedding.token": (
        "bert/embeddings/word_embeddings",
        "roformer.embeddings.word_embeddings.weight|gau_alpha.embeddings.word_embeddings.weight",
        "embeddings.word_embeddings.weight",
    ),
    "embedding.segment": (
        "bert/embeddings/token_type_embeddings",
        "roformer.embeddings.token_type_embeddings.weight|gau_alpha.embeddings.token_type_embeddings.weight",
        "embeddings.segment_embeddings.weight",
    ),
    "layers.{}.w_in": (f"{_GAU[0]}i_dense/kernel", f"{_GAU[1]}i_dense.weight", f"{_GAU[2]}i_dense.weight"),
    "layers.{}.gamma_q": (
        f"{_GAU[0]}q_scaleoffset/gamma", f"{_GAU[1]}q_scaleoffset.weight", f"{_GAU[2]}offsetscale.gamma",
    ),
    "layers.{}.gamma_k": (
        f"{_GAU[0]}k_scaleoffset/gamma", f"{_GAU[1]}k_scaleoffset.weight", f"{_GAU[2]}offsetscale.gamma",
    ),
    "layers.{}.w_out": (f"{_GAU[0]}o_dense/kernel", f"{_GAU[1]}o_dense.weight", f"{_GAU[2]}o_dense.weight"),
    "mlm.bias": (
        "cls/predictions/output_bias", "cls.predictions.bias|cls.predictions.decoder.bias", "mlmBias|mlmDecoder.bias",
    ),
    "next_sentence.kernel": ("cls/seq_relationship/output_weights", "cls.seq_relationship.weight", "nsp.weight"),
    "next_sentence.bias": ("cls/seq_relationship/output_bias", "cls.seq_relationship.bias", "nsp.bias"),
}  # fmt: skip
# Tensors that a file may hold a second time, and of which of our weights they are a copy.
_COPIES = {
    "bert4keras": {},
    "huggingface": {"cls.predictions.decoder.weight": "embedding.token", "cls.predictions.decoder.bias": "mlm.bias"},
    "bert4torch": {"mlmDecoder.weight": "embedding.token", "mlmDecoder.bias": "mlm.bias"},
}  # fmt: skip
# Tensors without a part in the result: the state of an optimizer, tables that every reader can compute.
_LEFT_OUT = {
    "bert4keras": r"global_step|beta[12]_power|(.+/)?(adam_[mv]|Adam(_1)?|(AdamWeightDecay|LAMB)Optimizer(_1)?)(/.+)?",
    "huggingface": r"((roformer|gau_alpha)\.)?(encoder\.embed_positions\.weight|embeddings\.position_ids)",
    "bert4torch": r"embeddings\.position_ids",
}
# A name that is there in every checkpoint of a layout and model. The first that is found decides, so that models are
# told apart by what the next one lacks.
_SIGNS = (
    ("bert4keras", "gau_alpha", "GAU_alpha/encoder/layer_0/gau/i_dense/kernel"),
    ("bert4keras", "roformer", "bert/encoder/layer_0/attention/output/LayerNorm/gamma"),
    ("bert4keras", "roformer_v2", "bert/encoder/layer_0/attention/self/query/kernel"),
    ("huggingface", "gau_alpha", "gau_alpha.encoder.layer.0.gau.i_dense.weight"),
    ("huggingface", "roformer", "roformer.encoder.layer.0.attention.output.LayerNorm.weight"),
    ("huggingface", "roformer_v2", "roformer.encoder.layer.0.attention.self.query.weight"),
    ("bert4torch", "gau_alpha", "encoderLayer.0.gau.i_dense.weight"),
    ("bert4torch", "roformer", "encoderLayer.0.layerNorm1.weight"),
    ("bert4torch", "roformer", "encoderLayer.0.attnLayerNorm.weight"),
    ("bert4torch", "roformer_v2", "encoderLayer.0.multiHeadAttention.q.weight"),
)
# Where a PyTorch file is of the encoder alone, its names lack this beginning.
_PREFIX = re.compile(r"(?:roformer|gau_alpha)\.")
_LEARNED_POSITIONS = re.compile(r"(.*[/.])?position_embeddings(\.weight)?")
# What they call an activation, and what it is. bert4keras' gelu is the erf form unless set_gelu("tanh") was called.
ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
# Settings of theirs that ask for another calculation than the model's, with the values that do not.
_SETTINGS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "roformer": {"norm_type": ("layer_norm",), "use_bias": (True,), "model_type": ("roformer",)},
    "roformer_v2": {
        "norm_type": ("rms", "rms_norm", "rmsnorm"), "use_bias": (False,), "model_type": ("roformer", "roformer_v2"),
    },
    "gau_alpha": {
        "use_bias": (False,), "normalization": ("softmax_plus",), "attention_scale": (True,),
        "model_type": ("gau_alpha",),
    },
}  # fmt: skip
_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
    "rotary_value": (False,), "add_cross_attention": (False,), "use_relative_position": (False,),
    "shared_segment_embeddings": (False,), "conditional_size": (None, False),
}  # fmt: skip


class OriginalError(check.SpecError):
    """A checkpoint that is not understood, or that would have to be guessed at."""


@dataclass(frozen=True)
class Part:
    """The tensor of theirs that one of our weights is, and how it lies in there."""

    theirs: str
    lies: Lies

    def shape(self, ours: Shape) -> Shape:
        """The shape that their tensor must have for ours."""
        return {"as it is": ours, "transposed": ours[::-1]}.get(self.lies, (2, *ours))

    def take(self, tensor: Any) -> Any:
        """Our weight as a view of their tensor, of NumPy or of torch."""
        if self.lies == "transposed":
            return tensor.T
        return tensor if self.lies == "as it is" else tensor[int(self.lies[-1])]


@dataclass(frozen=True)
class Plan:
    """What a checkpoint holds, and how a model of ours is made of it; `plan` has checked that nothing is lacking."""

    layout: str
    model: Model
    # By our names.
    parts: Mapping[str, Part]
    # Tensors that are there twice: the name of the copy, and of what it must be equal to bit by bit.
    copies: Mapping[str, str]
    # Known to have no part in the result, and what the caller left out.
    left_out: tuple[str, ...]
    ignored: tuple[str, ...]
    # The dialects whose constants these are.
    dialects: tuple[str, ...]


def plan(
    tensors: Mapping[str, Shape],
    given: Mapping[str, Any] | None,
    *,
    model: str | None = None,
    dialect: str | None = None,
    visible: Visible | None = None,
    pooler: Literal["tanh", "linear"] | None = None,
    ignore: Sequence[str] = (),
) -> Plan:
    """How the tensors of a checkpoint, by name and shape, make a model of ours.

    given: the configuration beside them, as JSON has it. model, dialect, visible, pooler: what it does not tell; a
        pooler is BERT's, tanh, where nothing else is said. ignore: patterns (*, ?) of names to leave out.

    C1. A head must be there where any of its tensors is; TiedLM, which has none of its own, where the widths allow it.
    C2. Every tensor must have a place in the model, be a copy, or be left out by name; every weight must have a tensor.
    C3. Constants must be those of `dialect`, or of the configuration (layer_norm_eps); they must not contradict.
    Raises: OriginalError for names that are not understood, tensors that are missing, left over or of another shape,
        a configuration that is missing or asks for another calculation, and what would have to be guessed;
        DomainError as the model's Config.
    """
    ignored = _ignored(tensors, ignore)
    held = {name: shape for name, shape in tensors.items() if name not in ignored}
    layout, found = recognise(held)
    name = found if model is None else model
    check.domain("originals.plan", name in _SETTINGS, f"a model among {', '.join(_SETTINGS)}", model=name)
    if given is None:
        _refuse("a configuration beside the weights, which tells heads and activation", "none")
    left_out = tuple(key for key in held if re.fullmatch(_LEFT_OUT[layout], key))
    held = {key: shape for key, shape in held.items() if key not in left_out}
    config = read_config(given, held, layout=layout, model=name, dialect=dialect)
    made = Model(config, _found_heads(layout, held, given, config, pooler), _visible(given, visible))
    shapes = models.shapes(made)
    parts = {ours: part for ours in shapes if (part := _part(layout, ours, held)) is not None}
    copies = {
        copy: parts[ours].theirs
        for copy, ours in _COPIES[layout].items()
        if copy in held and ours in parts and parts[ours].theirs != copy
    }
    _check_names(layout, held, shapes, parts, copies)
    _check_tied(layout, given, made, copies)
    for ours, part in parts.items():
        _check_shape(part.theirs, held[part.theirs], part.shape(shapes[ours]), ours)
    for copy, of in copies.items():
        _check_shape(copy, held[copy], held[of], f"a copy of {of}")
    return Plan(layout, made, parts, copies, left_out, ignored, equal_dialects(config))


def recognise(names: Collection[str]) -> tuple[str, str]:
    """The layout and the model that the names of a checkpoint's tensors are of.

    Raises: OriginalError for names that no layout has, and for BERT, whose learned positions tell it from RoFormer.
    """
    for layout, model, sign in _SIGNS:
        if sign in names or (layout == "huggingface" and _PREFIX.sub("", sign) in names):
            learned = [name for name in names if _LEARNED_POSITIONS.fullmatch(name)]
            if learned:
                _refuse("a model without learned positions", f"{learned[0]}, as BERT has it")
            return layout, model
    expected = "; ".join(f"{says}, such as {_sign(layout)}" for layout, says in LAYOUTS.items())
    _refuse(f"the tensors of a known layout ({expected})", _few(sorted(names)))


def unused(names: Collection[str], layout: str) -> frozenset[str]:
    """The tensors that hold no numbers of their own: copies of others, states of optimizers, computed tables."""
    return frozenset(name for name in names if re.fullmatch(_LEFT_OUT[layout], name) or name in _COPIES[layout])


def read_config(
    given: Mapping[str, Any], tensors: Mapping[str, Shape], *, layout: str, model: str, dialect: str | None
) -> Any:
    """The Config of ours that a configuration of theirs describes.

    Sizes stand in it, or are those of the tensors: segments, key_size, and embedding_size where it is not given.

    Raises: as `plan`.
    """
    if not isinstance(given, Mapping):
        _refuse("a configuration that is a JSON object", type(given).__name__)
    for key, values in {**_EVERYWHERE, **_SETTINGS[model]}.items():
        told = given.get(key, values[0])
        # 1 and True are equal, so they are told apart by type.
        if not any(told == value and type(told) is type(value) for value in values):
            _refuse(f"{key} {' or '.join(map(repr, values))} for {model}", repr(told))
    sizes = _sizes(given, tensors, layout, model)
    module = importlib.import_module(f"refimpl.models.{model}")
    return module.Config(**sizes, **constants(given, layout=layout, model=model, dialect=dialect))


def model_of_config(given: Mapping[str, Any]) -> str:
    """The model that a configuration of Hugging Face or JunnYu names; those of bert4keras and bert4torch name none.

    Raises: OriginalError where none is named.
    """
    kind, norm = given.get("model_type"), given.get("norm_type", "layer_norm")
    if kind == "roformer":
        return "roformer" if norm == "layer_norm" else "roformer_v2"
    if kind not in ("roformer_v2", "gau_alpha"):
        _refuse(f"the model to be named ({', '.join(_SETTINGS)}), since the configuration does not", repr(kind))
    return str(kind)


def constants(given: Mapping[str, Any], *, layout: str, model: str, dialect: str | None) -> dict[str, Any]:
    """The constants of a Config of ours that a configuration of theirs tells, and a dialect where it does not.

    Raises: OriginalError as `plan`.
    """
    act = given.get("hidden_act")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        _refuse(f"hidden_act one of {', '.join(ACTIVATIONS)}", repr(act))
    if model == "gau_alpha" and ACTIVATIONS[act] != "silu":
        _refuse("hidden_act swish for gau_alpha", repr(act))
    # In its layers; the norm of the embedding has the one of the configuration.
    if model == "gau_alpha" and layout == "bert4torch" and given.get("layer_norm_eps", 1e-12) != 1e-12:
        _refuse("layer_norm_eps 1e-12, which bert4torch's GAU has whatever is said", repr(given["layer_norm_eps"]))
    dialects = importlib.import_module(f"refimpl.models.{model}").DIALECTS
    found = dict(_constants(given, layout, dialects, dialect))
    return found | ({"activation": ACTIVATIONS[act]} if "activation" in found else {})


def equal_dialects(config: Any) -> tuple[str, ...]:
    """The dialects of its model whose constants a Config has; the activation is not among them, since files tell it."""
    dialects = getattr(importlib.import_module(f"refimpl.models.{config.model}"), "DIALECTS", {})
    return tuple(
        name
        for name, constants in dialects.items()
        if all(getattr(config, key) == value for key, value in constants.items() if key != "activation")
    )


def _constants(
    given: Mapping[str, Any], layout: str, dialects: Mapping[str, Mapping[str, Any]], dialect: str | None
) -> Mapping[str, Any]:
    told = ", ".join(f"{name} ({_listed(constants)})" for name, constants in dialects.items())
    if dialect is not None and dialect not in dialects:
        _refuse(f"a dialect among {told}", repr(dialect))
    # bert4keras does not read the key.
    stated = given.get("layer_norm_eps") if layout != "bert4keras" else None
    if stated is not None and (type(stated) not in (int, float) or not stated >= 0):
        _refuse("layer_norm_eps to be a number that is not negative", repr(stated))
    if dialect is None:
        if stated is None:
            tells = "layer_norm_eps" if layout != "bert4keras" else "the release of bert4keras"
            _refuse(f"a dialect, since the configuration does not tell {tells}; one of {told}", "none")
        # bert4torch has 1e-12 in the masked-language head whatever its configuration says.
        own = {"epsilon": stated} | ({"mlm_epsilon": stated} if layout == "huggingface" else {})
        return {key: own.get(key, value) for key, value in dialects["junnyu"].items()}
    if stated is not None and stated != dialects[dialect]["epsilon"]:
        _refuse(f"a dialect with the epsilon {stated:g} of layer_norm_eps", f"{dialect} ({_listed(dialects[dialect])})")
    return dialects[dialect]


def _sizes(given: Mapping[str, Any], tensors: Mapping[str, Shape], layout: str, model: str) -> dict[str, int]:
    def size(key: str) -> int:
        value = given.get(key)
        if type(value) is not int or value < 1:
            _refuse(f"{key} of the configuration to be a whole number from 1 on", repr(value))
        return value

    def held(ours: str, axis: int) -> int:
        part = _part(layout, ours, tensors)
        if part is None or not tensors[part.theirs]:
            _refuse(f"a tensor for {ours}: {_names(layout, ours)}", "none of that name")
        return tensors[part.theirs][axis]

    segments, layers, d = held("embedding.segment", 0), size("num_hidden_layers"), size("hidden_size")
    if given.get("type_vocab_size", segments) != segments:
        _refuse(f"type_vocab_size {segments}, as the table of segments has rows", repr(given["type_vocab_size"]))
    # A name is made for every layer, so that a forged number would fill the memory.
    if layers > len(tensors):
        _refuse(f"num_hidden_layers of at most {len(tensors)}, as there are tensors", layers)
    common = {"vocab_size": size("vocab_size"), "segments": segments, "hidden_size": d, "layers": layers}
    embedding = d if given.get("embedding_size") is None else size("embedding_size")
    if model == "gau_alpha":
        if embedding != d:
            _refuse(f"embedding_size {d}, as hidden_size", embedding)
        s = held("layers.0.gamma_k", -1)
        if given.get("attention_key_size", s) != s:
            _refuse(f"attention_key_size {s}, as gamma has numbers", repr(given["attention_key_size"]))
        return {**common, "expanded_size": size("intermediate_size"), "key_size": s}
    heads = size("num_attention_heads")
    for key in ("attention_head_size", "attention_key_size"):
        if given.get(key) is not None and size(key) * heads != d:
            _refuse(f"{key} of hidden_size / num_attention_heads, {d} / {heads}", given[key])
    return {**common, "embedding_size": embedding, "heads": heads, "intermediate_size": size("intermediate_size")}


def _found_heads(
    layout: str,
    tensors: Mapping[str, Shape],
    given: Mapping[str, Any],
    config: Any,
    pooler: Literal["tanh", "linear"] | None,
) -> tuple[Any, ...]:
    def there(head: Any) -> bool:
        return any(_part(layout, ours, tensors) is not None for ours in head.shapes(config))

    heads: list[Any] = []
    transformed = hasattr(config, "mlm_epsilon")
    decoder = next(iter(_COPIES[layout]), "")
    if transformed and (there(_heads.TransformedLM()) or decoder in tensors):
        heads.append(_heads.TransformedLM())
    # Where the widths differ bert4keras has a matrix before the table, and leaves it out of its checkpoints; the ports
    # in PyTorch have none, so that their heads do not run.
    if not transformed and _encoder.table_width(config) == config.hidden_size:
        heads.append(_heads.TiedLM())
    has_pooler = there(_heads.Pooler("tanh"))
    stated = given.get("pooler_activation")
    if has_pooler or there(_heads.NextSentence()):
        if pooler is not None and stated not in (None, pooler):
            _refuse(f"the pooler to be {stated}, as the configuration says", pooler)
        heads.append(_heads.Pooler(pooler or ("tanh" if stated is None else stated)))
    elif pooler is not None:
        _refuse("a checkpoint with a pooler", f"none, and pooler {pooler}")
    if there(_heads.NextSentence()):
        heads.append(_heads.NextSentence())
    return tuple(heads)


def _visible(given: Mapping[str, Any], visible: Visible | None) -> Visible:
    decoder = given.get("is_decoder", False)
    if type(decoder) is not bool:
        _refuse("is_decoder to be true or false", repr(decoder))
    # Who sees whom is a mask that a caller may give, so what is asked for goes first.
    return visible or ("causal" if decoder else "bidirectional")


def _part(layout: str, ours: str, tensors: Collection[str]) -> Part | None:
    for theirs in _names(layout, ours).split(" or "):
        if theirs in tensors:
            return Part(theirs, _lies(layout, ours))
    return None


def _names(layout: str, ours: str) -> str:
    """What a weight of ours may be called, with ` or ` between the names; empty where it has none."""
    layer = re.match(r"layers\.(\d+)\.", ours)
    generic = ours if layer is None else f"layers.{{}}.{ours[layer.end() :]}"
    names = [name.format(layer and layer[1]) for name in _TABLE[layout].get(generic, "").split("|") if name]
    if layout == "huggingface":
        names += [_PREFIX.sub("", name, count=1) for name in names if _PREFIX.match(name)]
    return " or ".join(dict.fromkeys(names))


def _lies(layout: str, ours: str) -> Lies:
    if layout == "bert4keras":
        return "transposed" if ours == "next_sentence.kernel" else "as it is"
    if layout == "bert4torch" and re.search(r"gamma_[qk]$", ours):
        return "row 0" if ours.endswith("q") else "row 1"
    return "transposed" if re.search(r"(kernel|\.w_\w+)$", ours) else "as it is"


def _table(layout: str) -> dict[str, str]:
    """Our names, {} for the layer, and theirs with | between those of which a file has one."""
    column, made = _COLUMNS[layout], {}
    for rows, (first, second) in ((_DENSE_LAYERS, _DENSE[layout]), (_NORMS, _NORM[layout])):
        for (one, other), columns in rows.items():
            made[one] = "|".join(name + first for name in columns[column].split("|"))
            made[other] = "|".join(name + second for name in columns[column].split("|"))
    return made | {ours: columns[column] for ours, columns in _OTHERS.items()}


_TABLE = {layout: _table(layout) for layout in LAYOUTS}


def _sign(layout: str) -> str:
    return next(sign for known_as, _, sign in _SIGNS if known_as == layout)


def _ignored(names: Collection[str], patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            _refuse(f"a pattern that some of the {len(names)} names match", repr(pattern))
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _check_names(
    layout: str,
    tensors: Collection[str],
    shapes: Mapping[str, Shape],
    parts: Mapping[str, Part],
    copies: Mapping[str, str],
) -> None:
    missing = [_names(layout, ours) or ours for ours in shapes if ours not in parts]
    used = {part.theirs for part in parts.values()} | copies.keys()
    extra = sorted(name for name in tensors if name not in used)
    if missing or extra:
        raise OriginalError(
            f"originals: the tensors are not those of the configuration; missing: {_few(missing)}; without a place in "
            f"the model: {_few(extra)}"
        )


def _check_tied(layout: str, given: Mapping[str, Any], model: Model, copies: Collection[str]) -> None:
    """Where a configuration says that the table of the logits is another, its tensor must be there to be compared."""
    decoder = next(iter(_COPIES[layout]), "")
    if "mlm_logits" in models.outputs(model) and given.get("tie_word_embeddings") is False and decoder not in copies:
        _refuse(f"a tensor {decoder}, since the configuration says that tie_word_embeddings is false", "none")


def _check_shape(name: str, shape: Shape, expected: Shape, ours: str) -> None:
    if shape != expected:
        _refuse(f"{name} of shape {expected} for {ours}", shape)


def _listed(constants: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in constants.items() if key not in ("activation", "rotary_base"))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def _refuse(expected: str, received: Any) -> NoReturn:
    raise OriginalError(f"originals: expected {expected}; received {received}")
