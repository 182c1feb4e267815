"""What a stranger needs to know of an operator or of a model, and the adapter file to begin with.

Nothing of it is written here: names, shapes, types and clauses are read from the specification, values from the cases.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from conformance.case import OPERATORS, Case, Unsupported, cases, families, reference
from conformance.model import CASES, MODELS
from conformance.models._encoder import INPUTS
from refimpl.models import _encoder, _heads
from refimpl.ops import mixed_chunk_attention

# What the names in a Config stand for. A divisor is explained where it is used.
NAMED: Mapping[str, Mapping[str, Any]] = {
    "activation": _encoder.ACTIVATIONS,
    "kernel": _encoder.KERNELS,
    "rotation": _encoder.ROTATIONS,
    "mix": {name: getattr(mixed_chunk_attention, name) for name in ("bidirectional", "causal")},
    "normaliser": {
        name: getattr(mixed_chunk_attention, name)
        for name in ("su", "paper", "lucidrains", "lucidrains_causal", "unnormalised", "visible")
    },
    "rows": {name: getattr(mixed_chunk_attention, f"ROWS_{name.upper()}") for name in ("paper", "lucidrains")},
}
LOGITS: Mapping[type, Callable[..., np.ndarray]] = {
    _heads.TransformedLM: _heads.masked_lm_transformed,
    _heads.TiedLM: _heads.masked_lm_tied,
}


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


@dataclass(frozen=True)
class _Size:
    """The name of a size in the place of its number, so that what is made of it can be read."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __mul__(self, other: Any) -> _Size:
        return _Size(f"{self} * {other}")

    def __rmul__(self, other: Any) -> _Size:
        return _Size(f"{other} * {self}")

    def __add__(self, other: Any) -> _Size:
        return _Size(f"{self} + {other}")


def weights(name: str) -> list[str]:
    """Name and shape of every weight of a model and of its head; layer i stands for all of them."""
    module, head = _specification(name), MODELS()[name].HEAD
    names = [field.name for field in fields(module.Config)]

    def shapes(**equal: _Size) -> dict[str, tuple[Any, ...]]:
        config = SimpleNamespace(**{**{n: _Size(n) for n in names}, "layers": 1, **equal})
        return {**module.shapes(config), **head.shapes(config)}

    every, narrow = shapes(), "embedding_size" in names
    always = shapes(embedding_size=_Size("hidden_size")) if narrow else every
    shown = {n.replace("layers.0.", "layers.i."): n for n in every}
    width = max(map(len, shown))
    return [
        f"{text:{width}}  ({', '.join(map(str, every[n]))}{',' if len(every[n]) == 1 else ''})"
        + ("" if n in always else ", where embedding_size is not hidden_size")
        for text, n in shown.items()
    ]


def config_fields(name: str) -> list[str]:
    """The fields of a model's Config as its source has them: comments, names and types, which are written out."""
    config = _specification(name).Config
    kinds, lines = get_type_hints(config), inspect.getsource(config).splitlines()
    (made,) = ast.parse(textwrap.dedent("\n".join(lines))).body
    held = {field.name for field in fields(config)}
    found = []
    for node in getattr(made, "body", ()):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in held:
            above: list[str] = []
            while lines[node.lineno - 2 - len(above)].strip().startswith("#"):
                above.append(lines[node.lineno - 2 - len(above)].strip())
            found += [*reversed(above), f"{node.target.id}: {_type(kinds[node.target.id])}"]
    return found


def config_properties(name: str) -> list[str]:
    """What a model's Config makes of its fields: docstring and expression."""
    made = []
    for text, held in vars(_specification(name).Config).items():
        if isinstance(held, property) and held.fget is not None:
            code = _tree(held.fget).body[1:]
            made += [f"{text}: {inspect.getdoc(held)}", *(f"    {ast.unparse(line)}" for line in code)]
    return made


def config_values(name: str) -> list[str]:
    """The values of every field in the cases."""
    made = []
    for field in fields(_specification(name).Config):
        values = sorted({getattr(case.config, field.name) for case in CASES()[name].values()})
        made.append(f"{field.name}: {', '.join(map(_value, values))}")
    return made


def config_names(name: str) -> list[str]:
    """What the names that a Config's field may hold stand for: an operator, or a function with its docstring."""
    made = []
    for field, kind in get_type_hints(_specification(name).Config).items():
        if get_origin(kind) is Literal and field in NAMED:
            made += [f"{field} {_value(option)}: {_meaning(NAMED[field][option])}" for option in get_args(kind)]
    return made


def inputs(name: str) -> list[str]:
    """Every argument of a model behind its weights: kinds, and shapes or values in the cases."""
    held = list(CASES()[name].values())
    made = []
    for argument in INPUTS:
        values = [getattr(case, argument) for case in held]
        shown = dict.fromkeys(_shape(v) for v in values if v is not None)
        made.append(f"{argument}: {_kind(values)}; {' or '.join(shown)} in the cases")
    seen = dict.fromkeys(case.visible for case in held)
    same = all(case.visible == getattr(case.config, "mix", "") for case in held)
    text = f"visible: a string, {' or '.join(map(_value, seen))}"
    return [*made, text + (", the same as config.mix" if same else "")]


def results(name: str) -> list[str]:
    """What a model returns: the logits, then the hidden states as the specification lists them."""
    first = inspect.getdoc(_specification(name).hidden_states) or ""
    return [
        "(logits, state, state, ...): a tuple of 2 + config.layers float arrays",
        "logits (b, n, vocab_size): of the masked language model, no softmax",
        "states (b, n, hidden_size), called x_0, x_1, ... in reports:",
        f"    {_paragraph(first)}",
    ]


def declining() -> str:
    """How a combination is declined."""
    why = _paragraph(inspect.getdoc(Unsupported) or "")
    return textwrap.fill(f'To decline a mode or a convention: raise {_dotted(Unsupported)}("why"). {why}', 116)


def model_documentation(name: str) -> str:
    """All that is needed to write a model: arguments and results, then the specification's formulas and clauses."""
    module = _specification(name)
    head = LOGITS[type(MODELS()[name].HEAD)]
    reached = list(dict.fromkeys(_reached([module.hidden_states, head])))
    operators = sorted({_operator(f) for f in reached} & OPERATORS().keys())
    shared = [f for f in reached if f.__module__ == _encoder.__name__ and _computes(f)]
    seen = dict.fromkeys(case.visible for case in CASES()[name].values())
    parts = {
        "weights: a dict of float arrays in the storage format; kernels are (in, out), y = x W": weights(name),
        f"config: a {_dotted(module.Config)}, as JSON refimpl.config.to_dict(config)": config_fields(name),
        "what it makes of them": config_properties(name),
        "what the names in it stand for": config_names(name),
        "its values in the cases": config_values(name),
        "inputs": [*inputs(name), "", *_lines(_encoder.checked_inputs)],
        "visible": [f"{_value(mode)}: {_indented(inspect.getdoc(_encoder.VISIBLE[mode]))}" for mode in seen],
        "returns": results(name),
        "the specification of the encoder": [*_lines(module), "", *_lines(module.hidden_states)],
        f"the specification of the logits, {head.__name__}": _lines(head),
        "parts that models share": [f"{f.__name__}: {_indented(inspect.getdoc(f))}" for f in shared],
        "operators that it is made of (refimpl ops NAME prints each)": operators,
    }
    texts = [f"{title}:\n{textwrap.indent(chr(10).join(lines), '  ')}" for title, lines in parts.items() if lines]
    return "\n\n".join([*texts, declining()])


def _specification(name: str) -> ModuleType:
    return importlib.import_module(f"refimpl.models.{name}")


def _lines(held: Any) -> list[str]:
    return (inspect.getdoc(held) or "").splitlines()


def _indented(text: str | None) -> str:
    return textwrap.indent(text or "", "  ").lstrip()


def _paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _value(value: Any) -> str:
    return json.dumps(value)


def _type(kind: Any) -> str:
    return " | ".join(map(_value, get_args(kind))) if get_origin(kind) is Literal else str(kind.__name__)


def _dotted(held: type) -> str:
    return f"{held.__module__}.{held.__name__}"


def _computes(function: Any) -> bool:
    """Whether a function that models share makes arrays of arrays."""
    named = function.__name__.startswith(("check", "layer")) or function in _encoder.VISIBLE.values()
    return "ndarray" in str(function.__annotations__.get("return")) and not named


def _operator(function: Any) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def _meaning(held: Any) -> str:
    if not callable(held):
        return repr(held)
    options = ", ".join(f"{k}={v!r}" for k, v in held.keywords.items()) if isinstance(held, partial) else ""
    function = held.func if isinstance(held, partial) else held
    operator = _operator(function)
    if operator in OPERATORS():
        return f"{operator}{f' with {options}' if options else ''}; see refimpl ops {operator}"
    return _indented(inspect.getdoc(function))


def _tree(function: Callable[..., Any]) -> ast.FunctionDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef)
    return node


def _reached(functions: list[Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    """The functions of the specification that these use; what an operator is made of is its own matter."""
    left, met = list(functions), set(functions)
    while left:
        function = left.pop(0)
        there = vars(sys.modules[function.__module__])
        for node in ast.walk(_tree(function)):
            found: Any = None
            if isinstance(node, ast.Name):
                found = there.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = getattr(there.get(node.value.id), node.attr, None)
            if inspect.isfunction(found) and found.__module__.startswith("refimpl.") and found not in met:
                met.add(found)
                yield found
                if found.__module__.startswith("refimpl.models."):
                    left.append(found)


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
    given = "token_ids, segment_ids, mask, positions, *, config, visible"
    parts = {"weights, by name": weights(name), "config": config_fields(name), "inputs": inputs(name)}
    parts["returns"] = results(name)
    told = "\n\n".join(f"{title}:\n{textwrap.indent(chr(10).join(lines), '    ')}" for title, lines in parts.items())
    return f'''"""An adapter of the model {name}, to fill in; `refimpl ops {name}` prints its formulas and clauses.

{told}

{declining()}
"""

import numpy as np


def {name}(weights, {given}):
    raise NotImplementedError  # return logits, x_0, ..., x_L


def step(weights, state, {given}):
    raise NotImplementedError  # return (logits, x_0, ..., x_L), state


# Without this line no text is read piece by piece, and the laws of steps are skipped.
{name}.step = step

IMPLEMENTS = {{"{name}": {name}}}
PROFILE = {{"float64": "strict", "float32": "strict"}}
'''
