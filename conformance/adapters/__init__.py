"""How an implementation is reached. Only the modules in this folder import what they adapt, and only when asked.

An adapter module has `implementations() -> tuple[Implementation, ...]`: one entry per declared precision.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.budget import Profile
from conformance.case import Function

if TYPE_CHECKING:
    from conformance.runner import ExpectedFailure


class AdapterError(ValueError):
    """An adapter that cannot be loaded: unknown name, missing package, a file without IMPLEMENTS."""


@dataclass(frozen=True)
class Implementation:
    """Functions by operator name, under one declared precision. What is not there is not claimed.

    laws: False leaves this one to the vectors, where a sibling that differs in the order of sums only has the laws.
    variant: what tells this one from its siblings in a report, where they are shown as rows of their own.
    models: whole models by name, as conformance/model.py calls one.
    examples: how many drawn cases a law sees where no number is asked for and the default is too dear (a graph has to
    be written and loaded for every one); the report says so.
    """

    name: str
    functions: Mapping[str, Function] = field(repr=False)
    profile: Profile
    version: str = ""
    laws: bool = True
    examples: int | None = None
    variant: str = ""
    models: Mapping[str, Function] = field(default_factory=dict, repr=False)

    def claims(self, name: str) -> bool:
        """Whether an operator or a model is judged."""
        return name in self.functions or name in self.models


DEVIATIONS = Path(__file__).parent / "deviations"

# Command-line name -> (module of this folder, extra that installs what it adapts).
ADAPTERS = {
    "spec": ("spec", "conformance"),
    "torchimpl": ("torchimpl", "torch"),
    "torchimpl-compiled": ("torchimpl_compiled", "torch"),
    "cuda": ("cuda", "torch"),
    "onnxruntime": ("onnx_runtime", "export"),
    "onnx-reference": ("onnx_reference", "export"),
    "torch": ("pytorch", "torch"),
    "onnxruntime-kernels": ("onnx_runtime_kernels", "demo"),
    "rotary-embedding-torch": ("rotary_embedding_torch", "demo"),
    "FLASH-pytorch": ("flash_pytorch", "demo"),
    "peft": ("peft", "demo"),
    "scikit-learn": ("scikit_learn", "demo"),
}


def load(name: str) -> tuple[Implementation, ...]:
    """The implementations behind an adapter's name, or `python:FILE` for a stranger's file."""
    kind, _, target = name.partition(":")
    if kind == "python":
        from conformance.adapters import python

        return python.implementations(target)
    if name not in ADAPTERS:
        hint = f"; did you mean python:{name}?" if name.endswith(".py") else ""
        raise AdapterError(f"adapter: expected one of {', '.join(ADAPTERS)} or python:FILE, received {name!r}{hint}")
    module, extra = ADAPTERS[name]
    try:
        loaded = importlib.import_module(f"conformance.adapters.{module}")
        made: tuple[Implementation, ...] = loaded.implementations()
    except ImportError as error:
        raise AdapterError(
            f"adapter {name}: {error.name or error} is not installed; pip install 'refimpl[{extra}]'"
        ) from None
    return made


def deviations(name: str) -> list[ExpectedFailure]:
    """What is known to deviate in a shipped adapter, with reasons: deviations/<name>.txt."""
    from conformance.runner import read_expected_failures

    path = DEVIATIONS / f"{name}.txt"
    return read_expected_failures(path) if path.is_file() else []
