"""Carries dimensions through a graph: which axes of which weights are one and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.axes import (
    Axis,
    Dimension,
    Segment,
    fix,
    fresh,
    length,
    reshaped,
    resolve,
    unify,
)
from redpass.analysis.flow import Flow

POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d",
         "adaptive_avg_pool1d", "upsample_nearest2d", "upsample_bilinear2d", "interpolate",
         "constant_pad_nd", "pad", "roll", "flip", "softmax", "cumsum")  # fmt: skip
NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm")
BATCH_NORMS = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
"""As `batch_norm`, with statistics that inference has no use for beside the result."""
GROUPED = ("_grouped_mm", "grouped_mm_fallback", "bmm")


class Couplings:
    """The axes of every value and weight of a graph, unified op by op in one pass."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.axes: dict[fx.Node, Any] = {}
        for node in flow.nodes:
            if node.op == "get_attr" or flow.shape(node) is not None or _is_list(node):
                self.axes[node] = self._of(node)
        for value in flow.program.outputs:
            if isinstance(value, fx.Node) and isinstance(self.axes.get(value), list):
                fix(self.axes[value], "it is a public output's size")

    def of(self, name: str) -> list[Axis]:
        """The axes of the value called `name`, in terms of root dimensions."""
        return [resolve(axis) for axis in self.axes[self.flow.program.nodes[name]]]

    def _of(self, node: fx.Node) -> Any:
        if _is_list(node):
            return self._pieces(node)
        shape = self.flow.shape(node)
        if shape is None:
            return None
        rule = self._rule(node)
        found = rule(node) if rule is not None else None
        if found is None or len(found) != len(shape):
            self._give_up(node)
            return [fresh(size) for size in shape]
        return found

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        if node.op != "call_function":
            return self._source
        name = ops.base_name(node)
        if name == "getitem":
            return self._item
        found: Any = getattr(self, f"_{name.strip('_')}", None)
        if found is not None and callable(found):
            return found  # type: ignore[no-any-return]
        for names, rule in self._families():
            if name in names:
                return rule
        return self._elementwise if self._is_elementwise(node) else None

    def _families(self) -> list[tuple[Sequence[str], Callable[..., Any]]]:
        return [
            ((*ops.SHAPE_ONLY,), self._viewed),
            (("conv1d", "conv2d", "conv3d"), self._convolution),
            (POOLS, self._pooled),
            (NORMS, self._normed),
            (GROUPED, self._grouped),
            (("t", "numpy_T", "mT", "adjoint"), self._turned),
            (("mean", "sum", "amax", "max", "var", "linalg_vector_norm"), self._reduced),
            (("expand", "expand_as", "slice"), self._resized),
        ]  # fmt: skip

    def _is_elementwise(self, node: fx.Node) -> bool:
        return ops.is_elementwise(node) or self.flow.is_no_op(node)

    def _give_up(self, node: fx.Node) -> None:
        for arg in node.all_input_nodes:
            axes = self.axes.get(arg)
            if isinstance(axes, list) and not ops.is_size(node) and ops.is_float(arg):
                fix([a for a in axes if a], f"{ops.base_name(node) or node.op} is not understood")

    def _source(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        axes = [fresh(size) for size in shape]
        if node.op == "placeholder":
            fix(axes, "it is a public input's size")
        return axes

    def _linear(self, node: fx.Node) -> Any:
        x, weight = self.axes[node.args[0]], self.axes[node.args[1]]  # type: ignore[index]
        unify(x[-1], weight[1])
        self._bias(node.args[2] if len(node.args) > 2 else None, weight[0])
        return [*x[:-1], weight[0]]

    def _addmm(self, node: fx.Node) -> Any:
        bias, x, weight = (self.axes[a] for a in node.args[:3])  # type: ignore[index]
        unify(x[1], weight[0])
        unify(bias[-1], weight[1])
        return [x[0], weight[1]]

    def _matmul(self, node: fx.Node) -> Any:
        left, right = (self.axes[a] for a in node.args[:2])  # type: ignore[index]
        if len(right) != 2 or len(left) < 2:
            return self._grouped(node) if len(left) == len(right) else None
        unify(left[-1], right[0])
        return [*left[:-1], right[1]]

    _mm = _matmul

    def _grouped(self, node: fx.Node) -> Any:
        left, right = (self.axes[a] for a in node.args[:2])  # type: ignore[index]
        unify(left[-1], right[-2])
        return [*left[:-1], right[-1]]

    def _embedding(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        table = self.axes[node.args[0]]  # type: ignore[index]
        return [*([()] * (len(shape) - 1)), table[1]]

    def _convolution(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        x, weight = self.axes[node.args[0]], self.axes[node.args[1]]  # type: ignore[index]
        groups = ops.argument(node, "groups")
        if groups == 1:
            unify(x[1], weight[1])
        else:
            self._in_groups(groups, x[1], weight[0])
        self._bias(node.args[2] if len(node.args) > 2 else None, weight[0])
        return [x[0], weight[0], *(fresh(size) for size in shape[2:])]

    def _in_groups(self, groups: int, *axes: Axis) -> None:
        """A group's channels stay or go together; a depthwise convolution has one each."""
        if groups == 1:
            fix(axes, "a group norm mixes its channels")
            return
        whole = Dimension(groups)
        for axis in axes:
            unify(axis, (Segment(whole, length(axis) // groups),))

    def _bias(self, bias: Any, axis: Axis) -> None:
        if isinstance(bias, fx.Node):
            unify(self.axes[bias][0], axis)

    def _normed(self, node: fx.Node) -> Any:
        x = self.axes[node.args[0]]  # type: ignore[index]
        place = -1 if ops.is_call(node, "layer_norm", "rms_norm") else 1
        if ops.is_call(node, "group_norm"):
            self._in_groups(int(ops.argument(node, "num_groups")), x[1])
        for arg in node.args[1:]:
            if isinstance(arg, fx.Node) and len(self.axes[arg]) == 1:
                unify(self.axes[arg][0], x[place])
        return list(x)

    def _pooled(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        x = self.axes[node.args[0]]  # type: ignore[index]
        before = self.flow.shape(node.args[0]) or ()  # type: ignore[arg-type]
        pairs = zip(x, before, shape, strict=True)
        return [axis if old == new else fresh(new) for axis, old, new in pairs]

    def _reduced(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        x = self.axes[node.args[0]]  # type: ignore[index]
        place = 2 if ops.is_call(node, "linalg_vector_norm") else 1
        dims: Any = node.args[place] if len(node.args) > place else None
        if isinstance(dims, fx.Node):  # the larger of two values, not the largest of one
            return self._elementwise(node)
        if dims is None:
            return None
        gone = {d % len(x) for d in (dims if isinstance(dims, list | tuple) else [dims])}
        if len(shape) == len(x):
            return [() if i in gone else axis for i, axis in enumerate(x)]
        return [axis for i, axis in enumerate(x) if i not in gone]

    def _viewed(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        before = self.flow.shape(node.args[0]) or ()  # type: ignore[arg-type]
        return reshaped(self.axes[node.args[0]], before, shape)  # type: ignore[index]

    def _reshape_as(self, node: fx.Node) -> Any:
        found = self._viewed(node)
        for axis, other in zip(found, self.axes[node.args[1]], strict=True):  # type: ignore[index]
            unify(axis, other)
        return [a or b for a, b in zip(found, self.axes[node.args[1]], strict=True)]  # type: ignore[index]

    _view_as = _reshape_as

    def _resized(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        x = self.axes[node.args[0]]  # type: ignore[index]
        before = self.flow.shape(node.args[0]) or ()  # type: ignore[arg-type]
        x = [()] * (len(shape) - len(x)) + list(x)
        before = (None,) * (len(shape) - len(before)) + tuple(before)
        for axis, old, new in zip(x, before, shape, strict=True):
            if old != new:
                fix((axis,), "only a part of it is read")
        pairs = zip(x, before, shape, strict=True)
        return [axis if old == new else fresh(new) for axis, old, new in pairs]

    def _turned(self, node: fx.Node) -> Any:
        return list(self.axes[node.args[0]])[::-1]  # type: ignore[index]

    def _transpose(self, node: fx.Node) -> Any:
        x = list(self.axes[node.args[0]])  # type: ignore[index]
        i, j = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
        x[i], x[j] = x[j], x[i]
        return x

    def _permute(self, node: fx.Node) -> Any:
        x = self.axes[node.args[0]]  # type: ignore[index]
        return [x[d] for d in node.args[1]]  # type: ignore[union-attr, index]

    def _select(self, node: fx.Node) -> Any:
        x = list(self.axes[node.args[0]])  # type: ignore[index]
        fix((x.pop(int(node.args[1])),), "only a part of it is read")  # type: ignore[arg-type]
        return x

    def _index(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        x = self.axes[node.args[0]]  # type: ignore[index]
        places: Any = node.args[1]
        if any(place is None for place in places):
            return None
        kept = x[len(places) :]
        return [*([()] * (len(shape) - len(kept))), *kept]

    def _cat(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        # `cat` skips an empty one-dimensional operand whatever the others' rank (an empty cache).
        parts = [self.axes[p] for p in node.args[0] if len(self.axes[p]) == len(shape)]  # type: ignore[union-attr, index]
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        dim %= len(shape)
        for part in parts[1:]:
            for i in range(len(shape)):
                if i != dim:
                    unify(parts[0][i], part[i])
        joined = tuple(segment for part in parts for segment in part[dim])
        whole = joined if all(part[dim] for part in parts) else fresh(shape[dim])
        return [whole if i == dim else parts[0][i] for i in range(len(shape))]

    def _pieces(self, node: fx.Node) -> Any:
        """Chunks and splits: each piece is a fresh axis; the axis cut in pieces is made of them."""
        sizes = [_value_sizes(v) or [] for v in node.meta["val"]]
        first: Any = node.args[0] if node.args else None
        x = self.axes.get(first)
        name = ops.base_name(node)
        if x and name in BATCH_NORMS:
            return [self._normed(node), *([() for _ in size] for size in sizes[1:])]
        if not x or name not in ("chunk", "split", "split_with_sizes") or not all(sizes):
            self._give_up(node)
            return [[fresh(s) for s in size] for size in sizes]
        dim = int(ops.argument(node, "dim")) % len(x)
        pieces = [[*x[:dim], fresh(size[dim]), *x[dim + 1 :]] for size in sizes]
        unify(x[dim], tuple(segment for piece in pieces for segment in piece[dim]))
        return pieces

    def _sizes(self, node: fx.Node) -> Sequence[Any]:
        return self.flow.shape(node) or ()

    def _item(self, node: fx.Node) -> Any:
        pieces = self.axes.get(node.args[0])  # type: ignore[arg-type]
        return list(pieces[node.args[1]]) if pieces else None  # type: ignore[index]

    def _elementwise(self, node: fx.Node) -> Any:
        shape = self._sizes(node)
        result: list[Axis] = [() for _ in shape]
        for arg in node.all_input_nodes:
            axes = self.axes.get(arg)
            if not isinstance(axes, list) or ops.is_size(arg):
                continue
            for i, axis in enumerate(reversed(axes), 1):
                if i <= len(result) and axis:
                    unify(result[-i], axis)
                    result[-i] = result[-i] or axis
        return result


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)


def _value_sizes(value: Any) -> list[Any] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else [s if isinstance(s, int) else s.node.expr for s in shape]
