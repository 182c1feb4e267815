"""The module that a run starts from: the weights of a model folder or new ones, under the heads that a task needs."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refimpl import model as specification
from refimpl.models import _heads
from torchimpl import checkpoint
from torchimpl import model as modules
from torchimpl.training.run import TrainError


class Source(NamedTuple):
    """What a run starts from; without weights, and with "" for their SHA-256, where all are to be new."""

    model: specification.Model
    weights: dict[str, torch.Tensor]
    sha256: str


def language_model(model: specification.Model, visible: str) -> specification.Model:
    """The model with a language head alone, its own or else that of its kind, and `visible` as the task needs it."""
    kept = [head for head in model.heads if "mlm_logits" in head.outputs]
    roformer = hasattr(model.config, "activation") and hasattr(model.config, "mlm_epsilon")
    heads = kept or [_heads.TransformedLM() if roformer else _heads.TiedLM()]
    return _changed(model, tuple(heads), visible)


def classifier(model: specification.Model, labels: int, pooling: str) -> specification.Model:
    """The model with a classifier of so many classes alone: its own, where that has as many and the same pooling."""
    head = _heads.SequenceClassifier(labels=labels, pooling=pooling)  # type: ignore[arg-type]
    poolers = [held for held in model.heads if isinstance(held, _heads.Pooler)] or [_heads.Pooler(activation="tanh")]
    return _changed(model, (*(poolers if pooling == "pooler" else ()), head), model.visible)


def pooling(model: specification.Model) -> str:
    """How the model's own classifier pools; the mean of the tokens where it has none."""
    own = [head.pooling for head in model.heads if isinstance(head, _heads.SequenceClassifier)]
    return own[0] if own else "mean_of_tokens"


def read(path: Path) -> Source:
    """The model of a folder with its weights and their hash, or that of a JSON file without.

    Raises: as checkpoint.load and refimpl.model.read; TrainError for a path that is neither.
    """
    if path.is_dir():
        held = checkpoint.load(path)
        return Source(held.model, held.weights, held.sha256)
    if path.is_file():
        return Source(specification.read(path), {}, "")
    raise TrainError(f"train: {path} is neither a model folder nor the JSON file of a model")


def start(source: Source, model: specification.Model, *, seed: int, dropout: float | None = None) -> modules.Model:
    """The module of `model`: new weights from the seed, then those of the source where both have the same part.

    A head is the same part where all its sizes are equal; the encoder is in any case. dropout: instead of 0.1.
    """
    options: dict[str, Any] = {}
    if dropout is not None:
        names = ("hidden_dropout",) if model.config.model == "flash" else ("hidden_dropout", "attention_dropout")
        options = dict.fromkeys(names, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = modules.Model(model, **options)
    same = set(specification.encoder_of(model).shapes(model.config))
    for head in model.heads:
        if head in source.model.heads:
            same |= set(head.shapes(model.config))
    module.load_weights({n: source.weights.get(n, held) if n in same else held for n, held in module.weights().items()})
    return module


def _changed(model: specification.Model, heads: tuple[Any, ...], visible: str) -> specification.Model:
    config = model.config
    # FLASH says in its Config who sees whom.
    if config.model == "flash" and config.mix != visible:
        config = dataclasses.replace(config, mix=visible)
    return specification.Model(config, heads, visible)  # type: ignore[arg-type]
