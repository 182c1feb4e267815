"""All operators of torchimpl at once: names and arguments of the specification, no look at values, errors."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import refimpl.ops
from conformance.adapters.tensors import to_tensor
from conformance.case import OPERATORS, Package, as_tuple, cases

FAMILIES = sorted(m.name for m in pkgutil.iter_modules(refimpl.ops.__path__))
# Their results have as many rows as the values say; everywhere else a size that depends on values is a wait.
SIZED_BY_VALUES = {"head.decode_spans", "mixed_chunk_attention.same_document"}
# Angles are float64 whatever they turn.
ALWAYS_FLOAT64 = {"rope.angles"}
# The rule of one operator is a plain callback on the host.
ON_THE_HOST = {"whitening.search"}


def functions(package, family):
    module = importlib.import_module(f"{package}.ops.{family}")
    return {
        name: f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and not name.startswith("_") and f.__module__ == module.__name__
    }


@pytest.mark.parametrize("package", ["torchimpl", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_arguments_are_the_specifications(package, family):
    mine = functions(package, family)
    for name, spec in functions("refimpl", family).items():
        if package == "export" and f"{family}.{name}" in ON_THE_HOST:
            continue
        assert name in mine, f"{package}/ops/{family}.py has no {name}"
        wanted = [(p.name, p.kind, p.default) for p in inspect.signature(spec).parameters.values()]
        found = [(p.name, p.kind, p.default) for p in inspect.signature(mine[name]).parameters.values()]
        assert found == wanted, f"{package}.ops.{family}.{name}"


@pytest.mark.parametrize("op", sorted(set(OPERATORS()) - SIZED_BY_VALUES))
def test_no_operator_looks_at_values(op):
    """A fake tensor has a shape and no values: whoever asks for one fails here."""
    call = OPERATORS()[op].of(Package("torchimpl.ops"))
    for case in [c for c in cases([op]) if c.op == op and c.arguments.get("documents") != "same_document"][:3]:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = {
                k: mode.from_tensor(to_tensor(v)) if isinstance(v, np.ndarray) else v for k, v in case.arguments.items()
            }
            made = as_tuple(call(**given))
        expected = as_tuple(OPERATORS()[op].call(**case.arguments))
        assert [tuple(np.shape(e)) for e in expected] == [tuple(m.shape) if hasattr(m, "shape") else () for m in made]


@pytest.mark.parametrize("op", sorted(set(OPERATORS()) - SIZED_BY_VALUES - ALWAYS_FLOAT64))
def test_the_format_of_the_input_is_the_format_of_the_output(op):
    call = OPERATORS()[op].of(Package("torchimpl.ops"))
    case = next(c for c in cases([op]) if c.op == op)
    for dtype in (torch.float64, torch.bfloat16):
        given = {
            k: to_tensor(v).to(dtype if v.dtype.kind == "f" else None) if isinstance(v, np.ndarray) else v
            for k, v in case.arguments.items()
        }
        if not any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in given.values()):
            continue
        # What follows the output may be a running state, which stays float32.
        first = as_tuple(call(**given))[0]
        assert not (isinstance(first, torch.Tensor) and first.is_floating_point()) or first.dtype == dtype, op
