"""Hypothesis strategies for every operator's inputs, by family.

`strategies.rope()` draws cases of the family's first operator in float64; `strategies.rope("rotate_half_split",
dtype="bfloat16")` of another, in another storage format. A drawn case has .arguments, .profile and case["x"].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from conformance.budget import Profile
from conformance.case import OPERATORS, Case, families

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def of(op: str, profile: Profile) -> SearchStrategy[Case]:
    """Cases of one operator under a declared precision."""
    operator = OPERATORS()[op]
    drawn: SearchStrategy[Case] = families()[operator.family].strategy(operator.function, profile)
    return drawn


def __getattr__(family: str) -> Callable[..., SearchStrategy[Case]]:
    if family.startswith("_") or family not in families():
        raise AttributeError(f"strategies: no operator family {family!r}; expected one of {', '.join(families())}")

    def strategy(
        function: str | None = None, *, dtype: str = "float64", profile: str = "strict", angle: str = "A32"
    ) -> SearchStrategy[Case]:
        chosen = function or families()[family].OPERATORS[0].function
        return of(f"{family}.{chosen}", Profile(dtype, profile, "A64" if dtype == "float64" else angle))

    strategy.__name__ = family
    return strategy


def __dir__() -> list[str]:
    return list(families())
