"""What a configuration says of its dialect, for `refimpl models explain`.

explaining.of(Path("bert_config.json"), "roformer_v2").equal
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl import config, dialects, originals
from refimpl import model as specification
from refimpl.dialects import Measured
from torchimpl import source as sources


@dataclass(frozen=True)
class Explained:
    """The dialects of a model, those that a configuration equals, and how far each is from it."""

    path: Path
    model: str
    # In words: whose configuration it is and what it tells.
    told: str
    # That the dialects are measured against: those of the configuration, or of the first dialect where it tells none.
    constants: Mapping[str, Any]
    equal: tuple[str, ...]
    dialects: Mapping[str, Mapping[str, Any]]
    measured: tuple[Measured, ...]
    besides: Mapping[str, tuple[str, ...]]
    legend: str


def of(path: Path, model: str | None = None, seed: int = 0) -> Explained:
    """The explanation of a configuration: of a model folder, of Hugging Face or JunnYu, or a bert_config.json.

    model: its model, which the last does not name.

    Raises: OriginalError where the model is not named; DomainError for JSON that is malformed, and for flash and
        flash_quad, whose conventions are keys of their Configs; SourceError for a file that cannot be read.
    """
    given = config.parsed(sources.text(path), str(path))
    if isinstance(given, Mapping) and ("encoder" in given or "model" in given):
        held = specification.from_dict(given).config if "encoder" in given else config.from_dict(given)
        named, told = held.model, "a configuration of ours"
        stated: dict[str, Any] | None = {key: getattr(held, key) for key in next(iter(dialects.of(named).values()))}
    else:
        named, told, stated = _theirs(given, model)
    known = dialects.of(named)
    equal = tuple(
        name
        for name, one in known.items()
        if stated is not None and all(one[key] == stated[key] for key in one if key != "activation")
    )
    constants = {} if stated is None else stated
    if stated is None:
        first = next(iter(known))
        constants = {**known[first], "activation": originals.ACTIVATIONS[given["hidden_act"]]}
        against = f"{first}, the first of them"
    else:
        against = "the configuration"
    families = {name.split("-")[0]: dialects.besides(named, name) for name in known}
    legend = (
        f"vectors and logits: largest difference from {against}, against the largest magnitude, in a random model of "
        f"6 layers on texts of {dialects.LONG} and of {dialects.SHORT} tokens (seed {seed}); float64"
    )
    if "activation" in constants:
        told += f"; activation {constants['activation']}, as every dialect has it here"
    kept = {key: value for key, value in constants.items() if key in next(iter(known.values()))}
    found = dialects.measured(named, kept, seed=seed)
    return Explained(path, named, told, kept, equal, known, found, families, legend)


def _theirs(given: Any, model: str | None) -> tuple[str, str, dict[str, Any] | None]:
    if not isinstance(given, Mapping):
        raise originals.OriginalError("originals: expected a configuration that is a JSON object, received another")
    named = originals.model_of_config(given) if model is None else model
    dialects.of(named)
    if given.get("layer_norm_eps") is None:
        # Whichever dialect stands in: the rest of the configuration is looked at.
        originals.constants(given, layout="bert4keras", model=named, dialect="bert4keras-0.11.3")
        return named, "which does not tell its dialect: conversion asks for it", None
    found = originals.constants(given, layout="huggingface", model=named, dialect=None)
    return named, f"layer_norm_eps {given['layer_norm_eps']:g}", found
