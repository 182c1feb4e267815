"""What is judged: operators, and cases that are inputs with the clauses they test.

An operator's arguments are arrays (float, int64, bool), numbers, strings, None and tuples of integers, so that a case
can be written to a file and read by any language. Float arrays are data in the storage format; numbers are exact.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from conformance import ops
from conformance.budget import DTYPES, Arithmetic, Ball, Profile, round_to

Function = Callable[..., Any]


class Package:
    """The operator files of one implementation, imported when first asked for: Package("refimpl.ops").rope.

    What calls an operator by a case's arguments takes the package as `of`, so that every package that has the names and
    arguments of the specification is called by the same lines.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, family: str) -> ModuleType:
        try:
            module = importlib.import_module(f"{self._name}.{family}")
        except ModuleNotFoundError as error:
            if error.name != f"{self._name}.{family}":
                raise
            raise AttributeError(f"{self._name} has no {family}") from None
        # Found once: a compiler that traces a call cannot trace an import.
        setattr(self, family, module)
        return module


SPEC = Package("refimpl.ops")


class Unsupported(Exception):
    """Raised by an implementation that does not provide a combination; the text is the reason that the report shows."""


@dataclass(frozen=True)
class Operator:
    """One judged operator.

    call: the specification (a function of refimpl.ops, or a few lines that resolve names to functions; these take the
      package as keyword `of`).
    reference: the independent derivation, reference(arithmetic, **arguments) -> Ball(s); float arrays arrive as Balls.
    outputs: the names of the results, in order.
    multilinear: a sum of products of its inputs; at least five exact vectors are owed.
    observe: what is compared, where outputs are not unique: observe(arguments, outputs) -> arrays; the reference gives
      the same observables. `observables` are then their names.
    """

    name: str
    call: Function
    reference: Function
    outputs: tuple[str, ...] = ("y",)
    multilinear: bool = False
    observe: Function | None = None
    observables: tuple[str, ...] = ()
    # The version of the operator's meaning: any change of semantics is a new integer.
    version: int = 1

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @property
    def function(self) -> str:
        return self.name.split(".")[1]

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of what is compared."""
        return self.observables or self.outputs

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments, in the order of the specification."""
        return tuple(name for name in inspect.signature(self.call).parameters if name != "of")

    def of(self, package: Package) -> Function:
        """The same operator of another package with the specification's names and arguments."""
        if "of" in inspect.signature(self.call).parameters:
            return partial(self.call, of=package)
        return getattr(getattr(package, self.family), self.function)


@dataclass(frozen=True)
class Case:
    """Arguments of one operator, and what is to be learned from them.

    clauses: labels of the operator's docstring that this case tests ("C1").
    exact: every permitted order gives the same number; rounded to its format, the output may miss the rounded result by
      what float32 arithmetic does (float64 for float64), whatever the profile.
    angle: "A64" for cases beyond position 2^17, judged only for implementations that declare exact angles.
    ill_conditioned: made so that the bound carries no information; its elements may be unverifiable.
    only: storage formats, where fewer than those that hold every float input exactly.
    profile: the declared precision; drawn cases carry it, the corpus is judged under the implementation's own.
    known: references of this case and of what laws make of it, where several laws ask for them; None keeps none.
    """

    op: str
    name: str
    arguments: Mapping[str, Any] = field(repr=False)
    clauses: tuple[str, ...] = ()
    exact: bool = False
    angle: str = "A32"
    ill_conditioned: bool = False
    only: tuple[str, ...] = DTYPES
    note: str = ""
    profile: Profile = Profile("float64", "strict", "A64")
    known: dict[Any, dict[str, Ball]] | None = field(default=None, repr=False, compare=False)

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Storage formats that hold every float input exactly."""
        # One array: rounding many small ones is slow.
        floats = np.concatenate([np.zeros(0), *(v.ravel() for v in self.arguments.values() if _is_float_array(v))])
        return tuple(t for t in self.only if np.array_equal(round_to(floats, t), floats))

    def with_(self, **changes: Any) -> Case:
        """The same case with some arguments replaced; float arrays are rounded to the storage format first (rule 0)."""
        rounded = {k: round_to(v, self.profile.dtype) if _is_float_array(v) else v for k, v in changes.items()}
        return replace(self, arguments={**self.arguments, **rounded})

    def under(self, profile: Profile) -> Case:
        return replace(self, profile=profile)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def _is_float_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def storage_type(dtype: str) -> np.dtype:
    """The NumPy dtype in which an implementation receives its float arrays (bfloat16 through ml_dtypes)."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def storage_arguments(case: Case) -> dict[str, Any]:
    """Fresh copies of the arguments, float arrays in the storage format of the case's profile."""
    target = storage_type(case.profile.dtype)
    return {
        k: v.astype(target) if _is_float_array(v) else v.copy() if isinstance(v, np.ndarray) else v
        for k, v in case.arguments.items()
    }


def as_tuple(result: Any) -> tuple[Any, ...]:
    """One array, a tuple or a NamedTuple of arrays (nested ones flattened), as a flat tuple."""
    if isinstance(result, (tuple, list)):
        return tuple(leaf for part in result for leaf in as_tuple(part))
    return (result,)


def reference(case: Case, *, digits: bool = False, blur: float = 0.0) -> dict[str, Ball]:
    """The expected observables of a case, with the radius that the case's profile permits, output rounding included.

    blur: relative radius of the float inputs, where an implementation is supposed to have rounded them.
    """
    operator = OPERATORS()[case.op]
    arithmetic = Arithmetic(case.profile, digits)

    def given(values: np.ndarray) -> Ball:
        exact = arithmetic.exact(values)
        return arithmetic.ball(exact, blur * np.abs(np.where(np.isfinite(values), values, 0.0))) if blur else exact

    arguments = {k: given(v) if _is_float_array(v) else v for k, v in case.arguments.items()}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        balls = as_tuple(operator.reference(arithmetic, **arguments))
        if len(balls) != len(operator.judged):
            raise TypeError(f"{case.op}: the reference gives {len(balls)} results, expected {operator.judged}")
        finished = [_sayable(b).finished() if isinstance(b, Ball) else _discrete(arithmetic, b) for b in balls]
    return dict(zip(operator.judged, finished, strict=True))


def known_reference(case: Case) -> dict[str, Ball]:
    """`reference`, derived once where the case remembers; the radii are then read-only."""
    if case.known is None:
        return reference(case)
    key = case.op, case.profile, *((k, _content(v)) for k, v in case.arguments.items())
    if key not in case.known:
        case.known[key] = reference(case)
        for ball in case.known[key].values():
            ball.mid.flags.writeable = ball.rad.flags.writeable = False
    return case.known[key]


def _content(value: Any) -> Any:
    """What tells two arguments apart: bytes of arrays, the text of all else (0.0 and -0.0 are equal, and differ)."""
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def _sayable(ball: Ball) -> Ball:
    """Where the radius is lost the midpoint may be NaN as well; a NaN with a radius of 0 is a defined result."""
    lost = ~np.isfinite(ball.rad)
    return Ball(np.where(lost & np.isnan(ball.value), 0.0, ball.mid), np.where(lost, np.inf, ball.rad), ball.arithmetic)


def _discrete(arithmetic: Arithmetic, values: Any) -> Ball:
    """Integers, booleans and masked -inf entries: no radius."""
    array = np.asarray(values, np.float64)
    return Ball(array, np.zeros(array.shape), arithmetic)


@lru_cache(maxsize=1)
def families() -> dict[str, ModuleType]:
    """The operator families: the files of conformance/ops, in alphabetical order. The directory is the registry."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    return {name: importlib.import_module(f"conformance.ops.{name}") for name in names}


@lru_cache(maxsize=1)
def OPERATORS() -> dict[str, Operator]:
    """Every judged operator by name."""
    return {operator.name: operator for module in families().values() for operator in module.OPERATORS}


def cases(names: Sequence[str] | None = None) -> list[Case]:
    """Every case of the corpus, or those of the named operators or families."""
    every = [case for module in families().values() for case in module.CASES]
    return every if names is None else [c for c in every if selected(c.op, names)]


def selected(op: str, names: Sequence[str]) -> bool:
    """Whether an operator is meant by one of `names`: its own name, or its family's."""
    return any(op == name or op.startswith(name + ".") for name in names)
