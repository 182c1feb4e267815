"""Hypothesis strategies for every operator's inputs, by family.

`strategies.rope()` draws cases of the family's first operator in float64; `strategies.rope("rotate_half_split",
dtype="bfloat16")` of another, in another storage format. A drawn case has .arguments, .profile and case["x"].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from conformance.budget import Profile
from conformance.case import OPERATORS, Case, families

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def of(op: str, profile: Profile) -> SearchStrategy[Case]:
    """Cases of one operator under a declared precision."""
    operator = OPERATORS()[op]
    drawn: SearchStrategy[Case] = families()[operator.family].strategy(operator.function, profile)
    return drawn


def search(op: str, profile: Profile, examples: int, visit: Callable[[Case], None], *, shrink: bool = True) -> None:
    """Call `visit` on drawn cases, the same on every machine; where it raises, it raises last on the smallest case."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    # Without a seed of its own Hypothesis would take one from the text of the function below.
    @seed(0)
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        report_multiple_bugs=False,
    )
    @given(of(op, profile))
    def holds(case: Case) -> None:
        visit(case)

    holds()


@lru_cache(maxsize=8)
def sample(op: str, profile: Profile, examples: int) -> tuple[Case, ...]:
    """The cases of `search`, drawn once for all the laws of an operator; read-only, and with a memory of their own."""
    made = []
    for case in _drawn(op, profile.angle, examples):
        floats = {k: v for k, v in case.arguments.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
        made.append(replace(case.under(profile).with_(**floats), known={}))
    for value in (v for case in made for v in case.arguments.values() if isinstance(v, np.ndarray)):
        value.flags.writeable = False
    return tuple(made)


@lru_cache(maxsize=256)
def _drawn(op: str, angle: str, examples: int) -> tuple[Case, ...]:
    """Cases before their arrays are rounded to a storage format: what a strategy draws depends on the angles alone."""
    found: list[Case] = []
    search(op, Profile("float64", "strict", angle), examples, found.append, shrink=False)
    return tuple(found)


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
