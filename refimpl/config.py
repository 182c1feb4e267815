"""Configurations of models: frozen dataclasses, checked where they are made and read from JSON in this one place.

The key "model" of the JSON object names a file of refimpl/models, whose Config takes all the other keys.
"""

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from refimpl import check, models


def known() -> tuple[str, ...]:
    """The names of the models. The directory is the registry; _private files are no models."""
    return tuple(sorted(file.name for file in pkgutil.iter_modules(models.__path__) if not file.name.startswith("_")))


def check_types(held: Any, operation: str = "") -> None:
    """Every field of a dataclass holds what its annotation says: int, float (an int will do), bool, str or a Literal.

    operation: how errors begin, where it is not the name of a Config.
    Raises: DomainError naming the field; for NaN and infinity too, and for a bool in the place of a number.
    """
    operation = operation or f"{held.model}.Config"
    for name, kind in _fields(type(held)).items():
        value = getattr(held, name)
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
    return made(f"{model}.Config", importlib.import_module(f"refimpl.models.{model}").Config, "model", given)


def made(operation: str, kind: type, tag: str, given: Mapping[str, Any]) -> Any:
    """The dataclass `kind` of all the keys of a JSON object but `tag`, which told which kind it is.

    Raises: DomainError for an unknown or missing key, and as `kind` itself.
    """
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    check_keys(operation, given, known=(tag, *_fields(kind)), required=required)
    return kind(**{key: value for key, value in given.items() if key != tag})


def check_keys(operation: str, given: Mapping[str, Any], *, known: Sequence[str], required: Sequence[str]) -> None:
    """Every key of a JSON object is known, and what is required is there.

    Raises: DomainError naming the keys.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        raise check.DomainError(f"{operation}: unknown key {_quoted(unknown)}; the known keys are {', '.join(known)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise check.DomainError(f"{operation}: missing key {_quoted(missing)}; received {', '.join(map(str, given))}")


def read(file: str | Path) -> Any:
    """The configuration in a JSON file.

    Raises: as `from_dict` and `read_json`.
    """
    return from_dict(read_json(file))


def read_json(file: str | Path) -> Any:
    """What a JSON file holds.

    Raises: DomainError for a file that is no JSON, and for a key that stands twice, of which a reader could only take
        one.
    """
    return parsed(Path(file).read_bytes(), str(file))


def parsed(text: str | bytes, where: str) -> Any:
    """What a JSON text holds; `where` is how errors call it.

    Raises: as `read_json`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except check.DomainError:
        raise
    except (ValueError, RecursionError) as error:
        raise check.DomainError(f"config: {where} is no JSON: {error}") from None


def write(config: Any, file: str | Path) -> None:
    """Write the JSON file that `read` reads."""
    write_json(to_dict(config), file)


def write_json(told: Any, file: str | Path) -> None:
    """Write the JSON file that `read_json` reads."""
    Path(file).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


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
