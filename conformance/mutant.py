"""Known-wrong implementations: the suite must reject every one of them, and names the one a failure equals.

MUTANTS are designed (one changed constant, sign, axis or boundary each); the MUSEUM re-implements bugs that shipped,
each with the address of its public thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.budget import Profile
from conformance.case import Function, families

if TYPE_CHECKING:
    from conformance.vectors import Vector


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation of one operator, with the arguments of the specification.

    bug: what is wrong, in words that a report can quote. url: the public thread of a museum piece.
    equivalent: a proof, where the mutant is in truth the same function (survivors are declared last).
    precision: the formula is right and the arithmetic too coarse (a 16-bit state), so a failure is one of precision.
    """

    op: str
    bug: str
    call: Function = field(repr=False)
    url: str = ""
    equivalent: str = ""
    precision: bool = False

    def __str__(self) -> str:
        return f"{self.bug} ({self.url})" if self.url else self.bug


def mutants(op: str | None = None) -> Iterable[Mutant]:
    """Designed mutants and museum pieces, of one operator or of all."""
    for module in families().values():
        for mutant in (*module.MUTANTS, *module.MUSEUM):
            if op is None or mutant.op == op:
                yield mutant


@dataclass(frozen=True)
class Kill:
    """How one mutant fares: the vectors and the laws that reject it."""

    mutant: Mutant
    vectors: tuple[str, ...]
    laws: tuple[str, ...]


def kills(mutant: Mutant, vectors: list[Vector], profile: Profile, examples: int) -> Kill:
    """Judge a mutant as if it were an implementation: by every vector of its operator, and by every law."""
    from conformance.verdict import check_law, judge

    def in_storage(**arguments: Any) -> Any:
        # A mutant computes in float64, whatever the storage format of its arguments.
        wide = {
            k: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind not in "biu" else v
            for k, v in arguments.items()
        }
        with np.errstate(all="ignore"):
            return mutant.call(**wide)

    by_vectors = [
        v.case.name
        for v in vectors
        if v.case.op == mutant.op and profile.dtype in v.case.dtypes and judge("mutant", in_storage, v, profile).failed
    ]
    module = families()[mutant.op.split(".")[0]]
    by_laws = [
        law.name
        for law in module.LAWS
        if examples
        and mutant.op in law.operators
        and check_law("mutant", in_storage, law, mutant.op, profile, examples, shrink=False).failed
    ]
    return Kill(mutant, tuple(by_vectors), tuple(by_laws))
