"""`Forms`: how sizes follow when an attention gets fewer heads, or heads of another width.

Every axis of a value is a product of entries: sizes that stay, and `Factor`s, which become another
number. From the values whose axes are known the forms run forward through the graph; a call that
names a size that changes gets a `SetCall`. What cannot be followed (an op that mixes heads, a
weight with a place for each head) raises `Unfit` with the reason, so nothing is cut half.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from redpass import ops
from redpass.analysis.heads.axes import (
    Axis,
    Factor,
    Form,
    Unfit,
    is_equal,
    is_touched,
    named,
    new_size,
    old_size,
    plain_form,
    take,
)
from redpass.plan import Edit, ResizeState, SetCall
from redpass.program import Program

FAR = 1 << 31
"""Ends of slices beyond this mean the end of the axis."""

REDUCTIONS = ("mean", "sum", "amax", "amin", "var")


class Forms:
    """Runs forms through parts of a program and gathers the edits they need.

    Attributes:
        known: node -> its form; only values with a factor in it, or that were set by the caller.
        edits: calls with new sizes, and resized state.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[fx.Node, Any] = {}
        self.edits: list[Edit] = []
        pairs = program.signature.state
        self._state = {program.input_node(pair[0]): pair for pair in pairs}
        self._order = {node: place for place, node in enumerate(program.graph.nodes)}

    def run(self, inside: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None) -> None:
        """Gives a form to every node of `inside` that reads one with a form.

        Args:
            stop: nodes that are not looked at, nor what only they lead to.

        Raises:
            Unfit: a node that does not let the change through.
        """
        for node in sorted(inside, key=self._order.__getitem__):
            if node in self.known or (stop is not None and stop(node)):
                continue
            if any(operand in self.known for operand in node.all_input_nodes):
                form = self._step(node)
                if form is not None:
                    self.known[node] = form

    def of(self, node: fx.Node) -> Form:
        """Returns the form of a node's value, plain where nothing is known of it."""
        found: Form = self.known[node] if node in self.known else plain_form(node)
        return found

    def _step(self, node: fx.Node) -> Any:
        if ops.is_size(node):
            return self._size(node)
        name = ops.base_name(node)
        if node.target is operator.getitem:
            return self.known[_args(node)[0]][_args(node)[1]]
        rule = getattr(self, f"_{name}", None)
        if rule is not None and ops.namespace(node) == "aten":
            return rule(node)
        if ops.is_call(node, *ops.RESHAPES):
            return self._reshape(node)
        if ops.is_call(node, *REDUCTIONS):
            return self._reduce(node)
        same = ops.is_call(node, *ops.CASTS, *ops.COPIES, *ops.DROPOUTS, "softmax", "_softmax")
        if same:
            return self._along_last(node, "softmax" in name)
        if ops.is_elementwise(node):
            return self._broadcast(node, [a for a in node.all_input_nodes if _is_tensor(a)])
        raise Unfit(f"{node.name} ({name}) is not understood between heads and projections")

    def _size(self, node: fx.Node) -> None:
        source: Any = node.args[0] if node.args else None
        is_read = ops.is_call(node, "sym_size") and source in self.known
        if is_read and is_touched(self.of(source)[_args(node)[1]]):
            raise Unfit(f"{node.name} reads the number of heads")

    def _broadcast(self, node: fx.Node, operands: Sequence[fx.Node]) -> Form:
        forms = [self.of(operand) for operand in operands]
        rank = node.meta["val"].dim()
        found: list[Axis] = []
        for place in range(-rank, 0):
            axes = [form[place] for form in forms if len(form) >= -place]
            wide = [axis for axis in axes if not is_equal(old_size(axis), 1)] or axes[:1]
            touched = next((axis for axis in wide if is_touched(axis)), wide[0])
            if is_touched(touched) and any(axis != touched for axis in wide):
                raise Unfit(f"{node.name} joins heads with a value that has a place for each")
            found.append(touched)
        return tuple(found)

    def _along_last(self, node: fx.Node, is_mixing: bool) -> Form:
        form = self.of(node.all_input_nodes[0])
        if is_mixing and is_touched(form[int(_args(node)[1])]):
            raise Unfit(f"{node.name} mixes heads")
        return form

    def _layer_norm(self, node: fx.Node) -> Form:
        form = self.of(_args(node)[0])
        count = len(_args(node)[1])
        if any(map(is_touched, form[-count:])):
            raise Unfit(f"{node.name} normalises over heads together")
        return form

    _rms_norm = _layer_norm

    def _reduce(self, node: fx.Node) -> Form:
        form = list(self.of(_args(node)[0]))
        given = ops.argument(node, "dim")
        dims = [given] if isinstance(given, int) else list(given or range(len(form)))
        dims = [dim % len(form) for dim in dims]
        if any(is_touched(form[dim]) for dim in dims):
            raise Unfit(f"{node.name} sums over heads together")
        if node.meta["val"].dim() == len(form):
            return tuple((1,) if d in dims else axis for d, axis in enumerate(form))
        return tuple(axis for d, axis in enumerate(form) if d not in dims)

    def _transpose(self, node: fx.Node) -> Form:
        form = list(self.of(_args(node)[0]))
        a, b = (int(dim) for dim in _args(node)[1:3])
        form[a], form[b] = form[b], form[a]
        return tuple(form)

    def _permute(self, node: fx.Node) -> Form:
        form = self.of(_args(node)[0])
        return tuple(form[dim] for dim in _args(node)[1])

    def _unsqueeze(self, node: fx.Node) -> Form:
        form = list(self.of(_args(node)[0]))
        form.insert(int(_args(node)[1]) % (len(form) + 1), (1,))
        return tuple(form)

    def _slice(self, node: fx.Node) -> Form:
        form = list(self.of(_args(node)[0]))
        dim, start, end = (ops.argument(node, name) for name in ("dim", "start", "end"))
        dim %= len(form)
        if not is_touched(form[dim]):
            form[dim] = plain_form(node)[dim]
        elif start not in (0, None) or not (end is None or (isinstance(end, int) and end >= FAR)):
            raise Unfit(f"{node.name} takes some heads or channels only")
        return tuple(form)

    def _select(self, node: fx.Node) -> Form:
        form = list(self.of(_args(node)[0]))
        if is_touched(form.pop(int(_args(node)[1]))):
            raise Unfit(f"{node.name} takes one head or channel only")
        return tuple(form)

    def _split(self, node: fx.Node) -> list[Form]:
        form = self.of(_args(node)[0])
        dim = int(ops.argument(node, "dim")) % len(form)
        if is_touched(form[dim]):
            raise Unfit(f"{node.name} parts heads or channels")
        pieces = [ops.expression(value.shape[dim]) for value in node.meta["val"]]
        return [(*form[:dim], (piece,), *form[dim + 1 :]) for piece in pieces]

    _chunk = _split_with_sizes = _split

    def _cat(self, node: fx.Node) -> Form:
        parts: Any = _args(node)[0]
        form = next(self.of(part) for part in parts if part in self.known)
        dim = int(ops.argument(node, "dim")) % len(form)
        if is_touched(form[dim]):
            raise Unfit(f"{node.name} joins heads or channels with others")
        for part in parts:
            if part not in self.known:
                self._join_state(part, node, form)
            elif any(a != b for d, (a, b) in enumerate(zip(self.of(part), form)) if d != dim):  # noqa: B905
                raise Unfit(f"{node.name} joins heads of two kinds")
        return (*form[:dim], plain_form(node)[dim], *form[dim + 1 :])

    def _stack(self, node: fx.Node) -> Form:
        parts: Any = _args(node)[0]
        forms = [self.of(part) for part in parts]
        if any(form != forms[0] for form in forms):
            raise Unfit(f"{node.name} stacks heads of two kinds")
        dim = int(ops.argument(node, "dim")) % (len(forms[0]) + 1)
        return (*forms[0][:dim], (len(parts),), *forms[0][dim:])

    def _join_state(self, part: fx.Node, node: fx.Node, form: Form) -> None:
        """A cached value that new positions are joined to gets the same heads."""
        others = [user for user in part.users if user is not node and not ops.is_size(user)]
        if part not in self._state or others:
            raise Unfit(f"{node.name} joins heads with {part.name}, which is no cache of its own")
        for axis, entries in enumerate(form):
            if is_touched(entries) and not is_equal(new_size(entries), old_size(entries)):
                pair = self._state[part]
                self.edits.append(ResizeState(*pair, axis, int(new_size(entries))))

    def _matmul(self, node: fx.Node) -> Form:
        left, right = (self.of(operand) for operand in _args(node)[-2:])
        if not is_equal(new_size(left[-1]), new_size(right[-2])):
            raise Unfit(f"{node.name} multiplies heads of two widths")
        lead = self._leading(node, left[:-2], right[:-2])
        return (*lead, left[-2], right[-1])

    _bmm = _matmul

    def _leading(self, node: fx.Node, left: Form, right: Form) -> Form:
        found = []
        for place in range(-max(len(left), len(right)), 0):
            axes = [form[place] for form in (left, right) if len(form) >= -place]
            wide = [axis for axis in axes if not is_equal(old_size(axis), 1)] or axes[:1]
            if any(not is_equal(new_size(axis), new_size(wide[0])) for axis in wide):
                raise Unfit(f"{node.name} multiplies values with different heads")
            found.append(next(filter(is_touched, wide), wide[0]))
        return tuple(found)

    def _scaled_dot_product_attention(self, node: fx.Node) -> Form:
        query, key, value = (self.of(operand) for operand in _args(node)[:3])
        grouped = bool(ops.argument(node, "enable_gqa"))
        pairs = [(query[-1], key[-1])] + ([] if grouped else [(query[-3], key[-3])])
        pairs += [(key[-3], value[-3])] if len(query) > 3 else []
        for one, other in pairs:
            if not is_equal(new_size(one), new_size(other)):
                raise Unfit(f"{node.name} would get queries, keys and values of different heads")
        lead = tuple(b if is_touched(b) else a for a, b in zip(query[:-2], value[:-2], strict=True))
        return (*(query[:-2] if grouped else lead), query[-2], value[-1])

    def _expand(self, node: fx.Node) -> Form:
        form = self.of(_args(node)[0])
        after = plain_form(node)
        form = ((),) * (len(after) - len(form)) + form
        found = tuple(
            a if is_touched(a) or is_equal(old_size(a), old_size(b)) else b
            for a, b in zip(form, after, strict=True)
        )
        self._name(node, found)
        return found

    def _reshape(self, node: fx.Node) -> Form:
        """Elements keep their order: runs of axes before and after have equal products."""
        entries = [entry for axis in self.of(_args(node)[0]) for entry in axis]
        entries = [e for e in entries if isinstance(e, Factor) or not is_equal(e, 1)]
        found = tuple(take(entries, size[0], node) for size in plain_form(node))
        self._name(node, found)
        return found

    def _flatten(self, node: fx.Node) -> Form:
        form = self.of(_args(node)[0])
        start, end = (int(ops.argument(node, n)) % len(form) for n in ("start_dim", "end_dim"))
        merged = tuple(entry for axis in form[start : end + 1] for entry in axis)
        return (*form[:start], merged, *form[end + 1 :])

    def _name(self, node: fx.Node, form: Sequence[Axis]) -> None:
        """Gives a call that names all sizes of its result the new ones."""
        sizes: Any = list(_args(node)[1])
        for place, axis in enumerate(form):
            new = new_size(axis)
            if not is_equal(new, old_size(axis)):
                sizes[place] = int(new) if new.is_Integer else -1
        if sizes.count(-1) > 1:
            raise Unfit(f"{node.name} gets several sizes that are not fixed")
        if sizes != list(_args(node)[1]):
            args = named((_args(node)[0], sizes, *_args(node)[2:]))
            self.edits.append(SetCall(node.name, args, dict(node.kwargs)))


def _args(node: fx.Node) -> Any:
    return node.args


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
