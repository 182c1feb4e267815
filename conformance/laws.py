"""The laws by family: `laws.rope.composition(my_rotate, case)` raises LawFailed where my_rotate breaks it."""

from __future__ import annotations

from types import SimpleNamespace

from conformance.case import families


def __getattr__(family: str) -> SimpleNamespace:
    if family.startswith("_") or family not in families():
        raise AttributeError(f"laws: no operator family {family!r}; expected one of {', '.join(families())}")
    return SimpleNamespace(**{law.name: law.check for law in families()[family].LAWS})


def __dir__() -> list[str]:
    return list(families())
