"""Configurations of models: frozen dataclasses, checked where they are made and read from JSON in this one place.

The key "model" of the JSON object names a file of refimpl/models, whose Config takes all the other keys.
"""

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from refimpl import check, models


def known() -> tuple[str, ...]:
    """The names of the models. The directory is the registry; _private files are no models."""
    return tuple(sorted(file.name for file in pkgutil.iter_modules(models.__path__) if not file.name.startswith("_")))


def check_types(config: Any) -> None:
    """Every field of a dataclass holds what its annotation says: int, float (an int will do), bool, str or a Literal.

    Raises: DomainError naming the field; for NaN and infinity too, and for a bool in the place of a number.
    """
    operation = f"{config.model}.Config"
    for name, kind in _fields(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            # 1 and True are equal, so they are told apart by type.
            fits = any(value == choice and type(value) is type(choice) for choice in choices)
            expected = "one of " + ", ".join(map(repr, choices))
        elif kind is float:
            fits = type(value) in (int, float) and math.isfinite(value)
            expected = "a finite number"
        else:
            fits = type(value) is kind
            expected = f"of type {kind.__name__}"
        check.domain(operation, fits, f"{name} {expected}", **{name: value})


def to_dict(config: Any) -> dict[str, Any]:
    """What `from_dict` makes the same configuration of."""
    return {"model": config.model, **dataclasses.asdict(config)}


def from_dict(given: Mapping[str, Any]) -> Any:
    """The Config of the model that the key "model" names, made of all the other keys.

    Raises: DomainError for an unknown model, an unknown or missing key, and as the Config itself.
    """
    check.domain("config", isinstance(given, Mapping), "a JSON object", received=given)
    model = given.get("model")
    if model not in known():
        raise check.DomainError(f'config: expected "model" to be one of {", ".join(known())}, received {model!r}')
    kind = importlib.import_module(f"refimpl.models.{model}").Config
    fields = _fields(kind)
    rest = {key: value for key, value in given.items() if key != "model"}
    unknown = [key for key in rest if key not in fields]
    if unknown:
        keys = ", ".join(["model", *fields])
        raise check.DomainError(f"{model}.Config: unknown key {_quoted(unknown)}; the known keys are {keys}")
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in rest]
    if missing:
        raise check.DomainError(
            f"{model}.Config: missing key {_quoted(missing)}; received {', '.join(map(str, given))}"
        )
    return kind(**rest)


def read(file: str | Path) -> Any:
    """The configuration in a JSON file.

    Raises: as `from_dict`, and for a key that stands twice, of which a reader could only take one.
    """
    return from_dict(json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=_once))


def write(config: Any, file: str | Path) -> None:
    """Write the JSON file that `read` reads."""
    Path(file).write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def _fields(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise check.DomainError(f"config: the key {_quoted(twice)} stands twice")
    return dict(pairs)


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
