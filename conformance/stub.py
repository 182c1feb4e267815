"""What a stranger needs to know of an operator or of a model's step, and the adapter file to begin with."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from typing import Any

import numpy as np

from conformance.case import OPERATORS, Case, cases, families, reference


def documentation(op: str) -> str:
    """The specification's docstring: definition, formula, clauses, sources."""
    family, _, function = op.partition(".")
    module = importlib.import_module(f"refimpl.ops.{family}")
    text = inspect.getdoc(getattr(module, function, OPERATORS()[op].call))
    return text or ""


def _samples(op: str) -> list[Case]:
    return [c for c in cases([op]) if c.op == op]


def rows(op: str) -> list[tuple[str, str, str]]:
    """(name, kind, shapes or values) of every argument and result."""
    samples = _samples(op)
    made = []
    for name in OPERATORS()[op].parameters:
        values = [c.arguments[name] for c in samples if name in c.arguments]
        arrays = any(isinstance(v, np.ndarray) for v in values)
        # Of an array some shapes, of anything else every value that a case has.
        shown = list(dict.fromkeys(_shape(v) for v in values))
        kind = _kind(values) + ("" if len(values) == len(samples) else ", or not given")
        made.append((name, kind, "  ".join(shown[: 6 if arrays else 14])))
    first = reference(samples[0]) if OPERATORS()[op].observe is None else {}
    for name in OPERATORS()[op].outputs:
        shape = _shape(first[name].value) + " in the first case" if name in first else ""
        made.append((f"-> {name}", "result", shape))
    return made


def conventions(op: str) -> str:
    """What the family's cases mean by their names and layouts."""
    return inspect.getdoc(families()[op.partition(".")[0]]) or ""


def _parameters(op: str) -> list[str]:
    """Arguments in order; those that some case leaves out get None."""
    samples = _samples(op)
    names = OPERATORS()[op].parameters
    absent = {n for n in names if any(n not in c.arguments for c in samples)}
    first = next((i for i, n in enumerate(names) if n in absent), len(names))
    return [n if i < first else f"{n}=None" for i, n in enumerate(names)]


def _kind(values: list[Any]) -> str:
    kinds = dict.fromkeys(
        {"f": "float array", "i": "int64 array", "b": "bool array"}[v.dtype.kind]
        if isinstance(v, np.ndarray)
        else "None"
        if v is None
        else type(v).__name__
        for v in values
    )
    return " or ".join(kinds)


def _shape(value: Any) -> str:
    return str(value.shape).replace(" ", "") if isinstance(value, np.ndarray) else repr(value)


def adapter(names: list[str]) -> str:
    """A Python file that claims the operators and raises NotImplementedError until it is filled in."""
    lines = ["import numpy as np", ""]
    for op in names:
        operator = OPERATORS()[op]
        result = operator.outputs[0] if len(operator.outputs) == 1 else f"({', '.join(operator.outputs)})"
        lines += [
            "",
            f"def {op.replace('.', '_')}({', '.join(_parameters(op))}):",
            f"    raise NotImplementedError  # return {result}",
            "",
        ]
    claims = ", ".join(f'"{op}": {op.replace(".", "_")}' for op in names)
    lines += ["", f"IMPLEMENTS = {{{claims}}}", 'PROFILE = {"float64": "strict", "float32": "strict"}', ""]
    return "\n".join(lines)


def steps(name: str) -> str:
    """How the specification reads a model's causal text piece by piece: what a step must do."""
    module = importlib.import_module(f"refimpl.models.{name}")
    parts = [f"The step in the specification, refimpl.models.{name}, of the encoder alone:"]
    for function in (module.initial_state, module.step):
        signature = inspect.signature(function)
        names = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        plain = signature.replace(parameters=names, return_annotation=signature.empty)
        text = f"{function.__name__}{plain}\n{textwrap.indent(inspect.getdoc(function) or '', '  ')}"
        parts.append(textwrap.indent(text, "  "))
    return "\n\n".join(parts)


def model_adapter(name: str) -> str:
    """A Python file that claims a model, its step beside it, and raises NotImplementedError until it is filled in."""
    inputs = "token_ids, segment_ids, mask, positions, *, config, visible"
    return f"""import numpy as np


def {name}(weights, {inputs}):
    raise NotImplementedError  # return logits, x_0, ..., x_L


def step(weights, state, {inputs}):
    raise NotImplementedError  # return (logits, x_0, ..., x_L), state


# Without this line no text is read piece by piece, and the laws of steps are skipped.
{name}.step = step

IMPLEMENTS = {{"{name}": {name}}}
PROFILE = {{"float64": "strict", "float32": "strict"}}
"""
