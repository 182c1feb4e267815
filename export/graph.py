"""Writing an ONNX graph as one writes NumPy: values of a known rank and dtype, functions that become local functions.

Within `build`, the functions of this module and the operators of `Value` add nodes to the graph that is being written.
Ranks and dtypes are fixed, sizes stay open: `x.size(0)` is a value of the graph. `int(x.shape[-1])` reads the size from
the example and fixes it: the graph then takes that size only. A function marked `@function` becomes a local function of
the model, one for every body that differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

DOMAIN = "refimpl"
# Read by ONNX Runtime from 1.17 on; onnx writes a newer one by default, which older runtimes refuse.
IR_VERSION = 10
OPSETS = (20, 23)

Array = np.ndarray


class GraphError(ValueError):
    """A graph that cannot be written: a size that is not known, a value of another graph."""


class Dim:
    """One size of a value: open until its number is asked for. What is computed from open sizes is open too."""

    def __init__(self, example: int, name: str = "", roots: tuple[Dim, ...] = ()) -> None:
        self.example, self.name = example, name
        # The sizes of inputs from which this one is computed; itself where it is one.
        self.roots: tuple[Dim, ...] = roots or (self,)
        self.fixed = False

    def __index__(self) -> int:
        for root in self.roots:
            root.fixed = True
        return self.example

    __int__ = __index__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dim):
            return self is other or int(self) == int(other)
        return int(self) == other

    def __hash__(self) -> int:
        return id(self)

    def _with(self, other: int | Dim, result: int) -> Dim:
        return Dim(result, roots=self.roots + (other.roots if isinstance(other, Dim) else ()))

    def __add__(self, other: int | Dim) -> Dim:
        return self._with(other, self.example + _example(other))

    def __sub__(self, other: int | Dim) -> Dim:
        return self._with(other, self.example - _example(other))

    def __rsub__(self, other: int) -> Dim:
        return self._with(other, other - self.example)

    def __mul__(self, other: int | Dim) -> Dim:
        return self._with(other, self.example * _example(other))

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: int | Dim) -> Dim:
        return self._with(other, self.example // _example(other))

    def __mod__(self, other: int | Dim) -> Dim:
        return self._with(other, self.example % _example(other))

    # A comparison has a result, so it fixes the size.
    def __lt__(self, other: int) -> bool:
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        return int(self) >= int(other)

    def __bool__(self) -> bool:
        return int(self) != 0

    @property
    def said(self) -> int | str | None:
        """What the model declares: the number where it is fixed, otherwise a name."""
        return self.example if all(root.fixed for root in self.roots) else self.name or None

    def __repr__(self) -> str:
        return f"{self.name or 'size'}={self.example}"


def _example(size: int | Dim) -> int:
    return size.example if isinstance(size, Dim) else size


# A size: a number, an open size, or None where nothing is known about it.
Size = int | Dim | None


def agree(*sizes: Size) -> bool:
    """Whether sizes are equal as far as they are known, for checks that leave open sizes open."""
    return len({_example(size) for size in sizes if size is not None}) <= 1


class Scope:
    """The main graph, the body of a local function or the body of a loop, while it is written."""

    def __init__(self, kind: str, parent: Scope | None, model: Model) -> None:
        self.kind, self.parent, self.model = kind, parent, model
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[Value] = []
        # By identity: values of this function, and the values outside for which they stand.
        self.captured: dict[int, tuple[Value, Value]] = {}
        self.constants: dict[Any, Value] = {}
        self.initializers: list[onnx.TensorProto] = []
        # A loop's body sees the names around it, and must not repeat them.
        self.names: dict[str, int] = parent.names if kind == "body" and parent else {}

    def name(self, stem: str) -> str:
        count = self.names[stem] = self.names.get(stem, 0) + 1
        return stem if count == 1 else f"{stem}_{count}"

    def value(self, stem: str, dtype: Any, shape: Sequence[Size]) -> Value:
        return Value(self.name(stem), np.dtype(dtype), tuple(shape), self)

    def resolve(self, value: Value) -> str:
        """The name by which this scope knows a value; a local function receives what lies outside as an input."""
        if value.scope is self:
            return value.name
        if self.parent is None:
            raise GraphError(f"export: {value.name} is a value of another graph")
        if self.kind == "body":
            return self.parent.resolve(value)
        if id(value) not in self.captured:
            self.captured[id(value)] = value, self.value("outer", value.dtype, value.shape)
        return self.captured[id(value)][1].name


class Model:
    """What the scopes of one model share: its opset and its local functions."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.functions: dict[tuple[str, bytes], onnx.FunctionProto] = {}
        self.uses: dict[str, int] = {}

    @property
    def imports(self) -> list[onnx.OperatorSetIdProto]:
        return [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]

    def register(self, name: str, inputs: list[str], outputs: list[str], nodes: list[onnx.NodeProto]) -> str:
        """The name under which a function of this body is called."""
        body = helper.make_function(DOMAIN, "f", inputs, outputs, nodes, self.imports)
        key = name, body.SerializeToString(deterministic=True)
        if key not in self.functions:
            count = self.uses[name] = self.uses.get(name, 0) + 1
            body.name = name if count == 1 else f"{name}_{count}"
            self.functions[key] = body
        return self.functions[key].name


_SCOPE: ContextVar[Scope] = ContextVar("scope")


def scope() -> Scope:
    """The scope that is being written."""
    try:
        return _SCOPE.get()
    except LookupError:
        raise GraphError("export: an operator of export.ops is called outside of export.graph.build") from None


def opset() -> int:
    """The version of ONNX's operators that the model may use: 20 (primitives) or 23."""
    return scope().model.opset


@contextmanager
def _within(inner: Scope) -> Iterator[Scope]:
    token = _SCOPE.set(inner)
    try:
        yield inner
    finally:
        _SCOPE.reset(token)


class Value:
    """A tensor of the graph: its name, dtype and shape (numbers, open sizes, None where unknown)."""

    # NumPy leaves operators between an array and a Value to the Value.
    __array_ufunc__ = None

    def __init__(self, name: str, dtype: np.dtype, shape: tuple[Size, ...], scope: Scope) -> None:
        self.name, self.dtype, self.scope = name, dtype, scope
        # Not Size: int(x.shape[-1]) is how a size is asked for, and fails where it is None.
        self.shape: tuple[Any, ...] = shape
        # The size that this value is the number of.
        self.dim: Size = None

    __hash__ = object.__hash__

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    def size(self, axis: int) -> Value:
        """The size of an axis as an int64 scalar of the graph; a constant where it is known."""
        known = self.shape[axis]
        if isinstance(known, int):
            number = constant(np.int64(known))
            number.dim = known
            return number
        axis %= self.ndim
        made = op("Shape", self, start=axis, end=axis + 1, dtype=np.int64, shape=(1,))
        made = op("Squeeze", made, constant(np.array([0])), dtype=np.int64, shape=())
        made.dim = known
        return made

    # Arithmetic broadcasts as NumPy does; numbers take the dtype of the other side.
    def __add__(self, other: Any) -> Value:
        return _binary("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return _binary("Add", other, self)

    def __sub__(self, other: Any) -> Value:
        return _binary("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return _binary("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return _binary("Mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return _binary("Mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return _binary("Div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return _binary("Div", other, self)

    # ONNX divides integers towards zero: for what is not negative that is the floor.
    __floordiv__ = __truediv__

    def __mod__(self, other: Any) -> Value:
        return _binary("Mod", self, other)

    def __pow__(self, other: Any) -> Value:
        return _binary("Pow", self, other)

    def __rpow__(self, other: Any) -> Value:
        return _binary("Pow", other, self)

    def __neg__(self) -> Value:
        return _unary("Neg", self)

    def __abs__(self) -> Value:
        return _unary("Abs", self)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return _binary("Equal", self, other, dtype=np.bool_)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return ~(self == other)

    def __lt__(self, other: Any) -> Value:
        return _binary("Less", self, other, dtype=np.bool_)

    def __le__(self, other: Any) -> Value:
        return _binary("LessOrEqual", self, other, dtype=np.bool_)

    def __gt__(self, other: Any) -> Value:
        return _binary("Greater", self, other, dtype=np.bool_)

    def __ge__(self, other: Any) -> Value:
        return _binary("GreaterOrEqual", self, other, dtype=np.bool_)

    def __and__(self, other: Any) -> Value:
        return _binary("And", self, other, dtype=np.bool_)

    def __or__(self, other: Any) -> Value:
        return _binary("Or", self, other, dtype=np.bool_)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Value:
        return _unary("Not", self)

    def __bool__(self) -> bool:
        raise GraphError(f"export: the value of {self.name} is not known while the graph is written; use where(...)")

    def __matmul__(self, other: Value) -> Value:
        return matmul(self, other)

    def __getitem__(self, index: Any) -> Value:
        return _indexed(self, index)

    def cast(self, dtype: Any) -> Value:
        if np.dtype(dtype) == self.dtype:
            return self
        made = op("Cast", self, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dtype=dtype, shape=self.shape)
        made.dim = self.dim
        return made

    def transpose(self, *order: int) -> Value:
        order = tuple(axis % self.ndim for axis in order)
        return op("Transpose", self, perm=order, shape=[self.shape[axis] for axis in order])

    def swap(self, one: int, other: int) -> Value:
        """Two axes exchanged."""
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        return self.transpose(*order)

    def reshape(self, *sizes: Any) -> Value:
        """Numbers, values of the graph (int64 scalars) and at most one -1."""
        return op("Reshape", self, shape_of(*sizes), allowzero=1, shape=[_known(s) for s in sizes])

    def regroup(self, axes: int, *sizes: int) -> Value:
        """The last `axes` axes reshaped to `sizes`, which are numbers; the axes before them stay, and stay open."""
        kept = self.ndim - axes
        if 0 in sizes:
            return self.reshape(*(self.size(axis) for axis in range(kept)), *sizes)
        # 0 stands for the size that the axis has: no node has to ask for it.
        shape = constant(np.array([0] * kept + list(sizes), np.int64))
        return op("Reshape", self, shape, shape=(*self.shape[:kept], *sizes))

    def broadcast_to(self, *sizes: Any) -> Value:
        """As NumPy's broadcast_to; a size of this value may be 1."""
        return op("Expand", self, shape_of(*sizes), shape=[_known(s) for s in sizes])

    def sum(self, axis: int | Sequence[int], *, keepdims: bool = False) -> Value:
        return _reduced("ReduceSum", self, axis, keepdims)

    def mean(self, axis: int | Sequence[int], *, keepdims: bool = False) -> Value:
        return _reduced("ReduceMean", self, axis, keepdims)

    def max(self, axis: int | Sequence[int], *, keepdims: bool = False) -> Value:
        return _reduced("ReduceMax", self, axis, keepdims)

    def min(self, axis: int | Sequence[int], *, keepdims: bool = False) -> Value:
        return _reduced("ReduceMin", self, axis, keepdims)

    def __repr__(self) -> str:
        return f"Value({self.name}, {self.dtype}, {self.shape})"


def op(
    kind: str, *inputs: Any, outputs: int = 1, dtype: Any = None, shape: Any = None, domain: str = "", **attributes: Any
) -> Any:
    """A node. `dtype` and `shape` of the outputs are those of the first input where not given.

    None leaves an optional input out. With several outputs, `dtype` and `shape` are lists, one entry each.
    """
    here = scope()
    given = [x if x is None or isinstance(x, Value) else constant(x) for x in inputs]
    first = next((x for x in given if x is not None), None)
    if first is None and (dtype is None or shape is None):
        raise GraphError(f"export: {kind} without inputs needs dtype and shape")
    dtypes = dtype if outputs > 1 else [first.dtype if dtype is None else dtype]  # type: ignore[union-attr]
    shapes = shape if outputs > 1 else [first.shape if shape is None else shape]  # type: ignore[union-attr]
    made = [here.value(kind.lower(), d, s) for d, s in zip(dtypes, shapes, strict=True)]
    names = ["" if x is None else here.resolve(x) for x in given]
    here.nodes.append(helper.make_node(kind, names, [m.name for m in made], domain=domain, **attributes))
    return made[0] if outputs == 1 else tuple(made)


def constant(value: Any, dtype: Any = None) -> Value:
    """A constant: a number or an array; numbers are float64, int64 or bool unless `dtype` says otherwise."""
    array = np.asarray(value, dtype)
    here = scope()
    key = array.dtype.str, array.shape, array.tobytes()
    if key not in here.constants:
        made = here.value("constant", array.dtype, array.shape)
        here.nodes.append(helper.make_node("Constant", [], [made.name], value=numpy_helper.from_array(array)))
        here.constants[key] = made
    return here.constants[key]


def initializer(name: str, array: Array) -> Value:
    """A weight: stored once in the model, under its own name. Only the main graph holds weights."""
    here = scope()
    if here.kind != "main":
        raise GraphError(f"export: the weight {name} must be made in the main graph")
    made = here.value(name, array.dtype, array.shape)
    here.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), made.name))
    return made


def shape_of(*sizes: Any) -> Value:
    """A shape as an int64 vector, from numbers and int64 scalars of the graph."""
    if not any(isinstance(s, Value) for s in sizes):
        return constant(np.array([int(s) for s in sizes], np.int64))
    parts = [s.reshape(1) if isinstance(s, Value) else constant(np.array([int(s)], np.int64)) for s in sizes]
    return op("Concat", *parts, axis=0, dtype=np.int64, shape=(len(parts),))


def _known(size: Any) -> Size:
    if isinstance(size, Value):
        return size.dim
    return None if size == -1 else int(size)


def _pair(one: Any, other: Any) -> tuple[Value, Value]:
    """Both sides as values of one dtype."""
    for side, number in ((one, other), (other, one)):
        whole = isinstance(side, Value) and not isinstance(number, Value) and not side.is_float
        if whole and np.asarray(number).dtype.kind == "f":
            raise GraphError(f"export: {number!r} meets {side}; cast the integers first")
    if not isinstance(one, Value):
        one = constant(one, other.dtype)
    elif not isinstance(other, Value):
        other = constant(other, one.dtype)
    if one.dtype != other.dtype:
        raise GraphError(f"export: expected one dtype, received {one} and {other}; cast one of them")
    return one, other


def broadcast(*shapes: Sequence[Size]) -> tuple[Size, ...]:
    """The shape of a broadcast result."""
    rank = max(map(len, shapes))
    padded = [(*[1] * (rank - len(s)), *s) for s in shapes]
    return tuple(_common(sizes) for sizes in zip(*padded, strict=True))


def _common(sizes: Sequence[Size]) -> Size:
    """A size that is 1 gives way; then a number is better than an open size."""
    wide = [s for s in sizes if not (isinstance(s, int) and s == 1)]
    wide = [s for s in wide if not (isinstance(s, Dim) and s.example == 1)] or wide
    if not wide:
        return 1
    return next((s for s in wide if isinstance(s, int)), next((s for s in wide if s is not None), None))


def _binary(kind: str, one: Any, other: Any, dtype: Any = None) -> Value:
    one, other = _pair(one, other)
    return op(kind, one, other, dtype=dtype, shape=broadcast(one.shape, other.shape))


def _unary(kind: str, x: Value) -> Value:
    return op(kind, x)


def _reduced(kind: str, x: Value, axis: int | Sequence[int], keepdims: bool) -> Value:
    axes = {a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)}
    shape = [1 if i in axes else s for i, s in enumerate(x.shape) if keepdims or i not in axes]
    return op(kind, x, constant(np.array(sorted(axes), np.int64)), keepdims=int(keepdims), shape=shape)


def _indexed(x: Value, index: Any) -> Value:
    """NumPy's basic indexing: integers, slices of numbers or int64 scalars, None, an ellipsis; one array at most."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.ndim - taken)
    else:
        items += [slice(None)] * (x.ndim - taken)
    if taken > x.ndim:
        raise GraphError(f"export: {taken} indices into {x}")
    axis, new, dropped = 0, [], []
    starts, stops, steps, cut = [], [], [], []
    place = 0
    for item in items:
        if item is None:
            new.append(place)
            place += 1
            continue
        if isinstance(item, slice):
            # Not by ==: a bound may be a value, and values compare into the graph.
            if not (item.start is None and item.stop is None and item.step is None):
                starts.append(0 if item.start is None else item.start)
                stops.append(np.iinfo(np.int64).max if item.stop is None else item.stop)
                steps.append(1 if item.step is None else item.step)
                if steps[-1] < 0:
                    starts[-1] = -1 if item.start is None else item.start
                    stops[-1] = np.iinfo(np.int64).min if item.stop is None else item.stop
                cut.append(axis)
            place += 1
        elif isinstance(item, (int, np.integer)):
            dropped.append((axis, int(item)))
        else:
            x = take(x, item, axis=axis)
            place += 1
        axis += 1
    if cut:
        shape = list(x.shape)
        for a, start, stop, step in zip(cut, starts, stops, steps, strict=True):
            shape[a] = _sliced(shape[a], start, stop, step)
        vectors = [shape_of(*starts), shape_of(*stops), constant(np.array(cut)), constant(np.array(steps))]
        x = op("Slice", x, *vectors, shape=shape)
    for a, at in reversed(dropped):
        shape = [s for i, s in enumerate(x.shape) if i != a]
        x = op("Gather", x, constant(np.int64(at)), axis=a, shape=shape)
    if new:
        rest = iter(x.shape)
        shape = [1 if i in new else next(rest) for i in range(x.ndim + len(new))]
        x = op("Unsqueeze", x, constant(np.array(new, np.int64)), shape=shape)
    return x


def _sliced(size: Size, start: Any, stop: Any, step: int) -> Size:
    if not (isinstance(start, (int, np.integer)) and isinstance(stop, (int, np.integer))):
        return None
    if size is None:
        return None
    end = int(stop) if -(1 << 62) < int(stop) < 1 << 62 else None
    length = len(range(*slice(int(start), end, step).indices(_example(size))))
    return length if isinstance(size, int) else Dim(length, roots=size.roots)


def take(x: Value, indices: Any, *, axis: int) -> Value:
    """Gather along an axis."""
    indices = indices if isinstance(indices, Value) else constant(np.asarray(indices, np.int64))
    axis %= x.ndim
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return op("Gather", x, indices, axis=axis, shape=shape)


def matmul(one: Value, other: Value) -> Value:
    """Matrix product of the last two axes, leading axes broadcast; a vector is a row (left) or a column (right)."""
    if other.ndim == 1:
        return op("MatMul", one, other, shape=one.shape[:-1])
    if one.ndim == 1:
        return op("MatMul", one, other, shape=(*other.shape[:-2], other.shape[-1]))
    lead = broadcast(one.shape[:-2], other.shape[:-2])
    return op("MatMul", one, other, shape=(*lead, one.shape[-2], other.shape[-1]))


def einsum(equation: str, *operands: Value) -> Value:
    """ONNX's Einsum: letters only, no ellipsis."""
    terms, _, result = equation.partition("->")
    sizes: dict[str, Size] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        for letter, size in zip(term.strip(), operand.shape, strict=True):
            if sizes.get(letter) is None:
                sizes[letter] = size
    return op("Einsum", *operands, equation=equation, shape=[sizes[letter] for letter in result.strip()])


def where(condition: Value, one: Any, other: Any) -> Value:
    """Elementwise choice."""
    one, other = _pair(one, other)
    return op("Where", condition, one, other, dtype=one.dtype, shape=broadcast(condition.shape, one.shape, other.shape))


def minimum(one: Any, other: Any) -> Value:
    return _binary("Min", one, other)


def maximum(one: Any, other: Any) -> Value:
    return _binary("Max", one, other)


def exp(x: Value) -> Value:
    return _unary("Exp", x)


def log(x: Value) -> Value:
    return _unary("Log", x)


def sqrt(x: Value) -> Value:
    return _unary("Sqrt", x)


def sin(x: Value) -> Value:
    return _unary("Sin", x)


def cos(x: Value) -> Value:
    return _unary("Cos", x)


def tanh(x: Value) -> Value:
    return _unary("Tanh", x)


def sigmoid(x: Value) -> Value:
    return _unary("Sigmoid", x)


def concat(values: Sequence[Value], *, axis: int) -> Value:
    """Values joined along an axis that they have."""
    axis %= values[0].ndim
    sizes = [v.shape[axis] for v in values]
    whole = None if any(s is None for s in sizes) else sum(s for s in sizes if s is not None)
    rest = [_common([v.shape[i] for v in values]) for i in range(values[0].ndim)]
    rest[axis] = whole
    return op("Concat", *values, axis=axis, shape=rest)


def stack(values: Sequence[Value], *, axis: int) -> Value:
    """Values joined along a new axis."""
    axis %= values[0].ndim + 1
    index = (*[slice(None)] * axis, None)
    return concat([v[index] for v in values], axis=axis)


def cumsum(x: Value, *, axis: int, exclusive: bool = False) -> Value:
    return op("CumSum", x, constant(np.int64(axis % x.ndim)), exclusive=int(exclusive))


def arange(stop: Any) -> Value:
    """0 ... stop - 1, int64; `stop` is a number or an int64 scalar of the graph."""
    if isinstance(stop, int):
        return constant(np.arange(stop))
    return op("Range", constant(np.int64(0)), stop, constant(np.int64(1)), dtype=np.int64, shape=(stop.dim,))


def full(sizes: Sequence[Any], value: Any, dtype: Any) -> Value:
    """A value everywhere; sizes are numbers or int64 scalars of the graph."""
    return constant(np.asarray(value, dtype)).broadcast_to(*sizes)


def pad(x: Value, before: Sequence[Any], after: Sequence[Any], value: Any = 0) -> Value:
    """Constant padding; amounts are numbers or int64 scalars of the graph, one for each axis."""
    shape = [
        None if s is None or isinstance(b, Value) or isinstance(a, Value) else s + b + a
        for s, b, a in zip(x.shape, before, after, strict=True)
    ]
    return op("Pad", x, shape_of(*before, *after), constant(value, x.dtype), shape=shape)


def scan(
    body: Callable[..., tuple[Sequence[Value], Sequence[Value]]], states: Sequence[Value], sequences: Sequence[Value]
) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """ONNX Scan over axis 0: body(states, elements) -> (states, outputs); the last states, and the outputs stacked.

    The body may use values from around it.
    """
    here = scope()
    with _within(Scope("body", here, here.model)) as inner:
        held = [inner.value("state", s.dtype, s.shape) for s in states]
        seen = [inner.value("element", s.dtype, s.shape[1:]) for s in sequences]
        after, made = body(held, seen)
        results = [op("Identity", v) for v in (*after, *made)]
        graph = helper.make_graph(
            inner.nodes, "body", [_info(v, open_=True) for v in (*held, *seen)], [_info(v, open_=True) for v in results]
        )
    count = len(states)
    shapes = [s.shape for s in states] + [(sequences[0].shape[0], *v.shape) for v in made]
    values = op(
        "Scan", *states, *sequences, body=graph, num_scan_inputs=len(sequences), outputs=len(shapes),
        dtype=[v.dtype for v in results], shape=shapes,
    ) if len(shapes) > 1 else (
        op("Scan", *states, *sequences, body=graph, num_scan_inputs=len(sequences), dtype=results[0].dtype,
           shape=shapes[0]),
    )  # fmt: skip
    return tuple(values[:count]), tuple(values[count:])


def loop(
    body: Callable[[Sequence[Value]], tuple[Value, Sequence[Value]]], states: Sequence[Value], *, most: int
) -> tuple[Value, ...]:
    """ONNX Loop: body(states) -> (whether to go on, states), at least once and at most `most` times; the last states.

    The body may use values from around it.
    """
    here = scope()
    with _within(Scope("body", here, here.model)) as inner:
        heads = [inner.value("round", np.int64, ()), inner.value("going", np.bool_, ())]
        held = [inner.value("state", s.dtype, s.shape) for s in states]
        going, after = body(held)
        results = [op("Identity", v) for v in (going, *after)]
        graph = helper.make_graph(
            inner.nodes, "body", [_info(v, open_=True) for v in (*heads, *held)],
            [_info(v, open_=True) for v in results],
        )  # fmt: skip
    count, start = constant(np.int64(most)), constant(np.bool_(True))
    made = [here.value("loop", s.dtype, s.shape) for s in states]
    names = [here.resolve(v) for v in (count, start, *states)]
    here.nodes.append(helper.make_node("Loop", names, [m.name for m in made], body=graph))
    return tuple(made)


def function(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make every call a node that calls a local function of the model; values inside arguments become its inputs."""
    family = call.__module__.rpartition(".")[2]

    @wraps(call)
    def wrapped(*positional: Any, **named: Any) -> Any:
        outer = scope()
        inner = Scope("function", outer, outer.model)
        given: list[Value] = []

        def enter(value: Value) -> Value:
            given.append(value)
            made = inner.value("x", value.dtype, value.shape)
            made.dim = value.dim
            inner.inputs.append(made)
            return made

        with _within(inner):
            result = call(*_mapped(enter, positional), **_mapped(enter, named))
            leaves: list[Value] = []
            _mapped(leaves.append, result)
            results = [op("Identity", leaf) for leaf in leaves]
        inputs = [v.name for v in (*inner.inputs, *(seen for _, seen in inner.captured.values()))]
        name = outer.model.register(f"{family}.{call.__name__}", inputs, [r.name for r in results], inner.nodes)
        made = [outer.value(call.__name__, leaf.dtype, leaf.shape) for leaf in leaves]
        arguments = [outer.resolve(v) for v in (*given, *(outside for outside, _ in inner.captured.values()))]
        outer.nodes.append(helper.make_node(name, arguments, [m.name for m in made], domain=DOMAIN))
        rest = iter(made)
        return _mapped(lambda _: next(rest), result)

    return wrapped


def _mapped(change: Callable[[Value], Any], nest: Any) -> Any:
    """`nest` with every Value changed: tuples, named tuples, lists, dicts and dataclasses are gone into."""
    if isinstance(nest, Value):
        return change(nest)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(_mapped(change, leaf) for leaf in nest))
    if isinstance(nest, (tuple, list)):
        return type(nest)(_mapped(change, leaf) for leaf in nest)
    if isinstance(nest, dict):
        return {key: _mapped(change, leaf) for key, leaf in nest.items()}
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        fields = {f.name: _mapped(change, getattr(nest, f.name)) for f in dataclasses.fields(nest)}
        return dataclasses.replace(nest, **fields)
    return nest


@dataclasses.dataclass(frozen=True)
class Built:
    """A model, and the sizes of its inputs that are fixed, by input name and axis."""

    model: onnx.ModelProto
    fixed: Mapping[tuple[str, int], int]


def build(
    call: Callable[..., Any], examples: Mapping[str, Array], *, opset: int, outputs: Sequence[str] | None = None
) -> Built:
    """The model of `call(**inputs)`: one input for each example, which gives its rank and dtype.

    outputs: names of the results, in order (y, or y_0, y_1 ... where not given).
    """
    if opset not in OPSETS:
        raise GraphError(f"export: expected an opset among {OPSETS}, received {opset}")
    model = Model(opset)
    with _within(Scope("main", None, model)) as main:
        inputs = {}
        for name, example in examples.items():
            sizes = [Dim(n, f"{name}_{axis}") for axis, n in enumerate(example.shape)]
            inputs[name] = main.value(name, example.dtype, sizes)
        leaves: list[Any] = []
        _leaves(call(**inputs), leaves)
        names = list(outputs or (["y"] if len(leaves) == 1 else [f"y_{i}" for i in range(len(leaves))]))
        if len(names) != len(leaves):
            raise GraphError(f"export: {len(leaves)} results, expected {', '.join(names)}")
        results = []
        for name, leaf in zip(names, leaves, strict=True):
            value = leaf if isinstance(leaf, Value) else constant(leaf)
            made = main.value(name, value.dtype, value.shape)
            main.nodes.append(helper.make_node("Identity", [main.resolve(value)], [made.name]))
            results.append(made)
    # Sizes that were asked for are numbers now.
    graph = helper.make_graph(
        main.nodes, "main", [_info(v) for v in inputs.values()], [_info(v) for v in results], main.initializers
    )
    written = helper.make_model(
        graph,
        functions=list(model.functions.values()),
        opset_imports=model.imports,
        ir_version=IR_VERSION,
        producer_name="refimpl",
    )
    fixed = {
        (name, axis): size.example
        for name, value in inputs.items()
        for axis, size in enumerate(value.shape)
        if isinstance(size, Dim) and size.fixed
    }
    return Built(written, fixed)


def _leaves(nest: Any, found: list[Any]) -> None:
    if isinstance(nest, (tuple, list)):
        for leaf in nest:
            _leaves(leaf, found)
    else:
        found.append(nest)


def _info(value: Value, *, open_: bool = False) -> onnx.ValueInfoProto:
    """A typed input or output; `open_` leaves every size open."""
    sizes = [None if open_ else size.said if isinstance(size, Dim) else size for size in value.shape]
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), sizes)
