"""The project's own PyTorch operators: eager in four formats, and one case of each captured whole by torch.compile.

Capturing takes longer than all the rest: the adapter torchimpl-compiled captures every case, and generates its code.

Whole models are judged in float64 and float32: behind a layer or two the bounds of 16 bits say nothing.
float64 and float32 are strict. In 16 bits every operator computes its islands in float32 but rounds what passes from
one part to the next, which is the eager profile; STRICT names those that round once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.tensors import on_arrays, to_arrays, to_tensor
from conformance.budget import DTYPES, Profile
from conformance.case import OPERATORS, Function, Package, Unsupported, families
from conformance.model import MODELS
from conformance.models._encoder import Streaming

# One rounding, of the output: everything inside is float32 or better.
STRICT = ("activation.", "norm.", "rope.", "attention_kernel.")


def compiled(
    function: Function, backend: str, device: str = "cpu", *, dynamic: bool | None = True, most: int | None = None
) -> Function:
    """`function` as one graph of torch.compile; numbers, names and None are part of the graph.

    dynamic: True for open sizes from the first call on, None for torch's own choice: open where they have changed.
    most: how many such functions are compiled, each at most twice, for the sizes of its first case and for open ones; a
      case that needs another one is declined.
    """
    graphs: dict[Any, Any] = {}
    times: dict[Any, int] = {}

    def call(**arguments: Any) -> Any:
        import torch

        # In the order of their names: a file lists the arrays of a case in any order, and every order would be a graph.
        given = dict(sorted(arguments.items()))
        tensors = {k: to_tensor(v).to(device) for k, v in given.items() if isinstance(v, np.ndarray)}
        fixed = {k: v for k, v in given.items() if k not in tensors}
        key = repr(fixed), tuple((k, t.dtype, t.ndim) for k, t in tensors.items())
        if key not in graphs:
            if len(graphs) == most:
                raise Unsupported(f"{most} graph of every operator is captured here, all by torchimpl-compiled")
            _configure(captured_only=most is not None)
            turn = torch._dynamo.lookup_backend(backend)

            def count(graph: Any, inputs: Any) -> Any:
                times[key] = times.get(key, 0) + 1
                return turn(graph, inputs)

            graphs[key] = torch.compile(
                _with_own_code(lambda given: function(**given, **fixed)),
                fullgraph=True,
                dynamic=dynamic,
                backend=backend if most is None else count,
            )
        done = times.get(key, 0) > 1
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if done else "default"):
            try:
                return to_arrays(graphs[key](tensors))
            except RuntimeError as error:
                if done and "fail_on_recompile" in str(error):
                    raise Unsupported("sizes that ask for a third graph are left to torchimpl-compiled") from None
                raise

    return call


def _with_own_code(function: Any) -> Function:
    """The same function; Dynamo keeps graphs by their code, and would look through those of all operators for one."""
    code, cells = function.__code__.replace(), function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, None, cells)


def _configure(*, captured_only: bool) -> None:
    """Set the compiler up before its first graph: loading it takes seconds that a process without graphs is spared."""
    import torch
    from torch.fx.experimental import _config as fx_config

    # Every case of the corpus may ask for a graph of its own; the number of results may depend on values.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # Numbers of a case are configuration: sizes stay open, numbers are part of the graph.
    torch._dynamo.config.specialize_float = torch._dynamo.config.specialize_int = True
    # Sizes that are equal by chance are no one size: Inductor fails where a width is one more than the documents.
    fx_config.use_duck_shape = False
    # Dynamo flushes the processor's caches after every graph to time its guards, for a log that nobody reads here.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    if captured_only:
        # With open sizes, what shapes an operation gives is derived faster than it is found again.
        torch._dynamo.config.fake_tensor_cache_enabled = False


def whole(device: str = "cpu") -> Streaming:
    """A model of the specification's weights, of any Config, with the head that its case has; and its step."""
    modules: dict[Any, Any] = {}

    def module_of(weights: Any, config: Any, visible: Any) -> Any:
        from refimpl.model import Model as Specification
        from torchimpl.model import Model

        tensors = {name: to_tensor(array).to(device) for name, array in weights.items()}
        dtype = tensors["embedding.token"].dtype
        key = config, visible, dtype
        if key not in modules:
            head = MODELS()[config.model].HEAD
            modules[key] = Model(Specification(config, (head,), visible)).to(device, dtype).eval()
        module = modules[key]
        module.load_weights(tensors)
        return module

    def results(module: Any, states: Any) -> Any:
        (head,) = module.heads.values()
        return to_arrays((head(states[-1], module.encoder.embedding.token), *states))

    def given(inputs: Any) -> Any:
        return [None if array is None else to_tensor(array).to(device) for array in inputs]

    def call(weights: Any, *inputs: Any, config: Any, visible: str) -> Any:
        import torch

        module = module_of(weights, config, visible)
        with torch.no_grad():
            return results(module, module.hidden_states(*given(inputs)))

    def step(weights: Any, state: Any, *inputs: Any, config: Any, visible: str) -> Any:
        import torch

        module = module_of(weights, config, visible)
        state = module.initial_state(batch=inputs[0].shape[:-1]) if state is None else state
        with torch.no_grad():
            states, state = module.encoder.step(state, *given(inputs))
            return results(module, states), state

    return Streaming(call, step)


def rows(
    *,
    eager: Sequence[str] = DTYPES,
    captured: Sequence[str] = (),
    backend: str,
    dynamic: bool | None = True,
    most: int | None = None,
    device: str = "cpu",
) -> tuple[Implementation, ...]:
    """Eager rows in some formats, then rows compiled by `backend`, where the laws are left to the eager ones."""
    import torch

    torch.set_num_threads(1)
    package = Package("torchimpl.ops")
    for family in families():
        getattr(package, family)
    calls = {name: operator.of(package) for name, operator in OPERATORS().items()}
    found = []
    for variant, formats in (("", eager), ("compiled", captured)):
        for dtype in formats:
            made = {
                op: compiled(f, backend, device, dynamic=dynamic, most=most) if variant else on_arrays(f, device)
                for op, f in calls.items()
            }
            strict = {op: f for op, f in made.items() if not Profile(dtype).sixteen_bit or op.startswith(STRICT)}
            rest = {op: f for op, f in made.items() if op not in strict}
            version = f"torch {torch.__version__}, {backend if variant else 'eager'}, {device}"
            for functions, profile in ((strict, "strict"), (rest, "eager")):
                if functions:
                    name, declared = f"torchimpl {variant}".strip(), Profile(dtype, profile, "A64")
                    eagerly = not variant and functions is strict and not declared.sixteen_bit
                    models = dict.fromkeys(MODELS(), whole(device)) if eagerly else {}
                    found.append(
                        Implementation(
                            name, functions, declared, version, laws=not variant, variant=variant, models=models
                        )
                    )
    return tuple(found)


def implementations() -> tuple[Implementation, ...]:
    """Every format eagerly; a graph of every operator in float32, captured but not turned into code."""
    return rows(captured=("float32",), backend="eager", dynamic=None, most=1)
