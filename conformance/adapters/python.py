"""A stranger's Python file: `IMPLEMENTS = {"rope.rotate_interleaved": function, ...}` and an optional PROFILE.

A function receives the operator's arguments by name (`refimpl ops NAME` prints them) as NumPy arrays in the storage
format, bfloat16 as ml_dtypes.bfloat16, and returns an array, or a tuple in the order of the operator's outputs.
PROFILE = {"float32": "strict", "bfloat16": "eager"} names the formats to judge and the arithmetic declared for each;
without it: float64 and float32. "float32": "strict A64" declares exact angles at any position.
IMPLEMENTS = {"roformer": function} names a whole model; `refimpl ops roformer` tells how it is called. Its attribute
`step`, where it has one, is the function that reads a causal text piece by piece.
What a function does not provide it declines by raising conformance.case.Unsupported("why").
The file is run as Python code with your rights: judge only files that you would run.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from conformance.adapters import AdapterError, Implementation
from conformance.budget import Profile
from conformance.case import OPERATORS
from conformance.law import contained
from conformance.model import MODELS

DEFAULT_PROFILE = {"float64": "strict", "float32": "strict"}
# What refusals of a PROFILE end with.
FORM = '; a format holds a profile and, where it is told, an angle class: "strict" or "strict A32"'


def load_file(target: str) -> ModuleType:
    """The module of a Python file that is in no package; its neighbours can be imported, as when it is a script."""
    path = Path(target).expanduser()
    if not path.is_file():
        raise AdapterError(f"adapter python:{target}: no such file")
    spec = importlib.util.spec_from_file_location(f"_refimpl_adapter_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise AdapterError(f"adapter python:{target}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    # As the import system does: dataclasses and pickle look their module up by name.
    sys.modules[spec.name] = module
    # It stays: a function may import its neighbour only when it is called.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with contained():
            spec.loader.exec_module(module)
    except Exception as error:
        raise AdapterError(f"adapter python:{target}: {type(error).__name__} while importing it: {error}") from error
    return module


def implementations(target: str) -> tuple[Implementation, ...]:
    """Import the file and read what it claims."""
    path, module = Path(target), load_file(target)
    claimed = getattr(module, "IMPLEMENTS", None)
    if not isinstance(claimed, dict) or not claimed:
        raise AdapterError(f'adapter python:{target}: expected IMPLEMENTS = {{"operator": function, ...}} in the file')
    for name, function in claimed.items():
        if name not in OPERATORS() and name not in MODELS():
            raise AdapterError(
                f"adapter python:{target}: IMPLEMENTS names {name!r}, which is no operator or model; see `refimpl ops`"
            )
        if not callable(function):
            raise AdapterError(f"adapter python:{target}: IMPLEMENTS[{name!r}] is not callable: {function!r}")
        if name in MODELS() and hasattr(function, "step") and not callable(function.step):
            raise AdapterError(
                f"adapter python:{target}: the step of IMPLEMENTS[{name!r}] is not callable: {function.step!r}; "
                "a model that has none has no such attribute"
            )
    declared = getattr(module, "PROFILE", DEFAULT_PROFILE)
    if not isinstance(declared, dict) or not declared:
        raise AdapterError(
            f'adapter python:{target}: expected PROFILE = {{"float32": "strict", ...}}, received {declared!r}{FORM}'
        )
    version = str(getattr(module, "__version__", ""))
    functions, models = ({n: f for n, f in claimed.items() if (n in MODELS()) == whole} for whole in (False, True))
    return tuple(
        Implementation(path.name, functions, _profile(target, dtype, text), version, models=models)
        for dtype, text in declared.items()
    )


def _profile(target: str, dtype: str, text: str) -> Profile:
    words = str(text).split()
    try:
        angle = words[1] if len(words) > 1 else "A64" if dtype == "float64" else "A32"
        return Profile(dtype, words[0] if words else "strict", angle)
    except ValueError as error:
        raise AdapterError(f"adapter python:{target}: PROFILE: {error}{FORM}") from None
