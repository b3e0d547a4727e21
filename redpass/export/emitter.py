"""Builds an ONNX graph value by value: constants and sizes once each, views merged as they come.

Shapes are known from the program's fake values as expressions over dimension names, so a size is
read off an input once, and most reshapes need no size at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import sympy
from onnx_ir import tensor_adapters
from torch import Tensor, fx

from redpass import ops
from redpass.export.sizes import Shape, Size, UntranslatedError, shape_of, size_of, type_of
from redpass.half_precision import HALVES
from redpass.program import Program

MICROSOFT = "com.microsoft"
T = TypeVar("T")


@dataclass
class Emitter:
    """The ONNX graph under construction.

    Attributes:
        program: what is being written.
        opset: the version of the standard operators.
        values: what each translated node became; a tuple for a node with many results.
        shapes: sizes of a value, where known.
        known: results that are made once: constants, sizes, attention masks.
    """

    program: Program
    opset: int
    graph: ir.Graph = field(init=False)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    sources: dict[sympy.Symbol, tuple[ir.Value, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        imports = {"": self.opset, MICROSOFT: 1}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=imports, name="main")

    def call(
        self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Adds a node with one output and returns it. None stands for an input left out."""
        return self.calls(op, 1, *inputs, domain=domain, **attributes)[0]

    def calls(
        self, op: str, count: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Adds a node with `count` outputs and returns them."""
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=count)
        self.graph.append(node)
        return node.outputs

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Returns what `make` made at the first call with `key`."""
        if key not in self.known:
            self.known[key] = make()
        found: T = self.known[key]
        return found

    def value(self, item: Any) -> ir.Value:
        """Returns the ONNX value of a tensor-valued node."""
        if item.op == "get_attr":
            return self.weight(item)
        found = self.values[item]
        if not isinstance(found, ir.Value):
            raise UntranslatedError(f"a list of results used as one tensor: {item}")
        return found

    def constant(self, data: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """Returns an initializer with this content, one for all uses."""
        array = np.asarray(data, dtype=dtype.numpy())
        key = ("constant", dtype, array.shape, array.tobytes())
        return self.once(key, lambda: self.initializer(f"c{len(self.known)}", ir.tensor(array)))

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """Adds a named tensor to the file."""
        ports = (*self.program.signature.inputs, *self.program.signature.outputs)
        while name in self.graph.initializers or any(name == port.name for port in ports):
            name += "_"
        tensor.name = name
        value = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.initializers[name] = value
        self.shapes[value] = tuple(int(size) for size in tensor.shape)
        return value

    def weight(self, node: fx.Node, transposed: bool = False) -> ir.Value:
        """Returns the initializer of a weight, or of its transpose, whose name ends in `.T`."""
        name = str(node.target)
        tensor = self.program.weights[name]
        key = f"{name}.T" if transposed else name
        return self.once(("weight", key), lambda: self.initializer(key, _lazy(tensor, transposed)))

    def slice_of_weight(
        self, node: fx.Node, axis: int, start: int, end: int, transposed: bool = False
    ) -> ir.Value:
        """Returns the initializer of `start:end` of one axis of a weight, or its transpose."""
        tensor = self.program.weights[str(node.target)].narrow(axis, start, end - start)
        key = f"{node.target}[{start}:{end}]" + ".T" * transposed
        return self.once(("weight", key), lambda: self.initializer(key, _lazy(tensor, transposed)))

    def is_only_transposed(self, node: fx.Node) -> bool:
        """Whether a weight is read as the second operand of linear layers alone."""
        return node.op == "get_attr" and all(
            ops.is_call(user, "linear")
            and user.args[1] is node
            and user.args[0] is not node
            and len(shape_of(node)) == 2
            for user in node.users
        )

    def scalar(self, item: Any, dtype: ir.DataType) -> ir.Value:
        """Returns a Python number or a symbolic size as a tensor without axes."""
        size = size_of(item)
        if isinstance(size, int | float | bool):
            return self.constant(size, dtype)
        if isinstance(size, sympy.Expr):
            whole = self.call("Squeeze", self.size(size))
            return whole if dtype == ir.DataType.INT64 else self.cast(whole, dtype)
        raise UntranslatedError(f"a scalar of type {type(item).__name__}")

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Converts to another element type; the caller knows that it is another."""
        found = self.call("Cast", value, to=dtype)
        if value in self.shapes:
            self.shapes[found] = self.shapes[value]
        return found

    def size(self, size: Size) -> ir.Value:
        """Returns a size as an int64 tensor of shape [1]."""
        if isinstance(size, int | sympy.Integer):
            return self.constant([int(size)])
        return self.once(("size", size), lambda: self._size(size))

    def _size(self, size: sympy.Expr) -> ir.Value:
        if isinstance(size, sympy.Symbol):
            if size not in self.sources:
                raise UntranslatedError(f"the size {size} is no size of an input")
            value, axis = self.sources[size]
            return self.call("Shape", value, start=axis, end=axis + 1)
        name = type(size).__name__
        parts = [self.size(part) for part in size.args]
        if name in ("FloorDiv", "CleanDiv"):
            return self.call("Div", *parts)
        if name not in ("Add", "Mul", "Max", "Min"):
            raise UntranslatedError(f"the size {size}")
        if any(isinstance(part, sympy.Rational) and not part.is_integer for part in size.args):
            raise UntranslatedError(f"the size {size}")
        total = parts[0]
        for part in parts[1:]:
            total = self.call(name, total, part)
        return total

    def sizes(self, shape: Sequence[Size]) -> ir.Value:
        """Returns a shape as an int64 tensor."""
        if all(isinstance(size, int) for size in shape):
            return self.constant(list(shape))
        parts = [self.size(size) for size in shape]
        return parts[0] if len(parts) == 1 else self.call("Concat", *parts, axis=0)

    def at_least(self, size: Size) -> int:
        """Returns a lower bound of a size."""
        if isinstance(size, int):
            return size
        dims = self.program.signature.dims
        bounds = {s: dims.get(str(s), (0, None))[0] for s in size.free_symbols}
        return 0 if not size.is_Add and not size.is_Symbol else int(size.subs(bounds))

    def reshape(self, value: ir.Value, shape: Shape) -> ir.Value:
        """Returns `value` in another shape, reading through a reshape that made it."""
        source = value.producer()
        if source is not None and source.op_type == "Reshape" and source.inputs[0] in self.shapes:
            value = source.inputs[0] or value
        if self.shapes.get(value) == shape:
            return value
        key = ("reshape", value, shape)
        return self.once(key, lambda: self._reshape(value, shape))

    def _reshape(self, value: ir.Value, shape: Shape) -> ir.Value:
        found = self.call("Reshape", value, self._target(self.shapes.get(value, ()), shape))
        self.shapes[found] = shape
        return found

    def _target(self, old: Shape, new: Shape) -> ir.Value:
        """Returns the cheapest second operand of a Reshape: copied sizes are 0, one may be -1."""
        same = [i < len(old) and old[i] == size for i, size in enumerate(new)]
        target = [
            size if isinstance(size, int) else (0 if kept else size)
            for size, kept in zip(new, same, strict=True)
        ]
        if any(size == 0 and isinstance(size, int) for size in new):
            return self.sizes(new)
        left = [i for i, size in enumerate(target) if not isinstance(size, int)]
        # With a copied size of zero nothing says what -1 stands for.
        certain = all(self.at_least(s) > 0 for i, s in enumerate(new) if i not in left)
        if len(left) == 1 and certain:
            target[left[0]] = -1
        return self.sizes(target)

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """Permutes axes, merging with a transpose that made `value`."""
        source = value.producer()
        if source is not None and source.op_type == "Transpose":
            first = source.attributes["perm"].as_ints()
            before = source.inputs[0]
            assert before is not None
            value, order = before, [first[axis] for axis in order]
        if list(order) == list(range(len(order))):
            return value
        return self.once(("transpose", value, tuple(order)), lambda: self._transpose(value, order))

    def _transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        found = self.call("Transpose", value, perm=list(order))
        if value in self.shapes:
            self.shapes[found] = tuple(self.shapes[value][axis] for axis in order)
        return found

    def expand(self, value: ir.Value, shape: Shape) -> ir.Value:
        """Broadcasts `value` to `shape`; sizes that stay are not computed."""
        old = self.shapes[value]
        if old == shape:
            return value
        padded = (1,) * (len(shape) - len(old)) + old
        target = [1 if was == now else now for was, now in zip(padded, shape, strict=True)]
        found = self.call("Expand", value, self.sizes(target))
        self.shapes[found] = shape
        return found

    def slice(self, value: ir.Value, axis: int, start: Size, end: Size, step: int = 1) -> ir.Value:
        """Takes `start:end:step` of one axis."""
        key = ("slice", value, axis, start, end, step)
        ends = [self.size(size) for size in (start, end, axis, step)]
        return self.once(key, lambda: self.call("Slice", value, *ends))


def _lazy(tensor: Tensor, transposed: bool) -> Any:
    """Wraps a weight so that its bytes are made when the file is written, one at a time."""

    def make() -> Any:
        data = tensor.detach().cpu()
        data = data.float() if data.dtype in HALVES else data
        data = data.t() if transposed else data
        return tensor_adapters.TorchTensor(data.contiguous())

    shape = tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)
    return ir.LazyTensor(make, dtype=type_of(tensor.dtype), shape=ir.Shape(shape))
