"""Checkpoints in the files and names of their originals, made of the arrays that are kept here."""

import json
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# What JunnYu's configuration of tests/golden/roformer/jy_roformer.npz tells, as far as anybody reads it.
JUNNYU = {
    "model_type": "roformer", "norm_type": "layer_norm", "use_bias": True, "hidden_act": "gelu", "vocab_size": 115,
    "type_vocab_size": 2, "embedding_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "layer_norm_eps": 1e-12, "rotary_value": False, "pooler_activation": "tanh",
    "is_decoder": False, "tie_word_embeddings": True, "hidden_dropout_prob": 0.1,
}  # fmt: skip
VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n的\n"


def gau_alpha(folder):
    """bert4keras' checkpoint of a GAU-α with its configuration and a vocabulary; what it gives, by release."""
    shutil.copytree(HERE / "bundle" / "gau_alpha", folder, ignore=shutil.ignore_patterns("weights.json"))
    shutil.copy(HERE / "gau_alpha" / "bert_config.json", folder)
    (folder / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    return dict(np.load(HERE / "gau_alpha" / "b4k_gau_alpha.npz"))


def tensorflow(folder, kept, config, layers, more=None):
    """bert4keras' checkpoint with the golden arrays `kept` where it has them, and random numbers elsewhere.

    more: tensors that bert4keras does not write.
    """
    from tests.golden.originals import BERT4KERAS
    from tests.refimpl import test_bundle as bundles

    drawn, tensors = np.random.default_rng(5), {}
    for ours, name in BERT4KERAS.items():
        for i in range(layers if "{}" in ours else 1):
            theirs = name.format(i)
            if theirs.startswith("GAU"):
                continue
            if theirs in kept:
                tensors[theirs] = kept[theirs]
            elif "layers" in ours and config["hidden_act"] == "gelu":
                d, f = config["hidden_size"], config["intermediate_size"]
                last = ours.rpartition(".")[2]
                shape = {"w_in": (d, f), "w_out": (f, d), "b_in": (f,)}.get(last, (d, d) if last[:2] == "w_" else (d,))
                tensors[theirs] = drawn.standard_normal(shape).astype(np.float32)
    tensors |= more or {}
    folder.mkdir()
    bundles.write(folder / "bert_model.ckpt", {name: bundles.stored(array) for name, array in tensors.items()})
    (folder / "bert_config.json").write_text(json.dumps(config))
    return tensors


def junnyu():
    """The tensors of JunnYu's RoFormer under their names, tied ones twice as in his files; and what it gives."""
    arrays = dict(np.load(HERE / "roformer" / "jy_roformer.npz"))
    tensors = {name: arrays.pop(name) for name in list(arrays) if not name.startswith("io/")}
    tensors["cls.predictions.decoder.weight"] = tensors["roformer.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    return tensors, {name.removeprefix("io/"): array for name, array in arrays.items()}


def write(folder, tensors, config=None, *, name="model.safetensors", vocabulary=True):
    """A folder as save_pretrained writes it; `name` ends in .safetensors, or in .bin for a file of torch.save."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / name)
    else:
        import torch

        torch.save({key: torch.tensor(array) for key, array in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if vocabulary:
        (folder / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    return folder
