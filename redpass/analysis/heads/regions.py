"""`pick_channels`: ops between a projection and the core, when heads keep some channels only.

Rotary positions and norms work on single channels, so a head that loses some must take the same
ones out of every table it meets: cosines, sines, gains. Which channels stand where is known from
the indices that `provenance` carries through the graph. Each value's new indices are the old ones
with those of lost channels left out, and a call with its new sizes is run on them: only if it
gives what is expected the cut is made, so any layout that passes is right.

    q [b, 4, s, 64], heads keep pairs of their own   ->   q [b, 4, s, 40]
    mul(q, cos [b, 1, s, 64])                        ->   mul(q, cos' [b, 4, s, 40])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.attention import SHIFT
from redpass.analysis.flow import concrete
from redpass.analysis.heads.axes import Factor, Unfit, named, new_node, plain_form
from redpass.analysis.heads.joins import Job
from redpass.analysis.heads.planes import Planes
from redpass.analysis.heads.sites import Side
from redpass.analysis.heads.tables import entries
from redpass.analysis.linears import new_name
from redpass.analysis.provenance import DEFAULT_SIZE, Tracer
from redpass.plan import Insert, Ref, SetArgument, SetCall, SetWeight, WeightRef

aten = torch.ops.aten
FAR = 1 << 31
MASK = (1 << SHIFT) - 1


def pick_channels(job: Job, side: Side, planes: Planes, start: fx.Node) -> None:
    """Follows the channels that stay from the first value with heads to the rotated one.

    Raises:
        Unfit: an op that does not let the choice through.
    """
    region = _Region(job, side, planes, start)
    region.run()


@dataclass(eq=False)
class _Region:
    job: Job
    side: Side
    planes: Planes
    start: fx.Node

    def __post_init__(self) -> None:
        part, side = self.job.parts[self.side.kind], self.side
        assert part is not None
        assert part.kept is not None
        self.part = part
        self.kept = torch.zeros(side.linear.outs, dtype=torch.bool)
        self.kept[side.features.gather(1, part.kept).flatten()] = True
        self.old = self.side.operand.known
        self.new: dict[fx.Node, Any] = {}
        flow = self.job.site.flow
        self.sizes = Tracer(flow).sizes
        self.end = flow.program.nodes[self.planes.points[side.kind]]
        inside = {self.start, *flow.between(self.start, self.end)}
        self.nodes = sorted(inside, key=flow.order.__getitem__)

    def run(self) -> None:
        for node in self.nodes:
            if node is not self.start:
                self._step(node)
            if node in self.old:
                self.new[node] = self._left(self.old[node])
            self.job.forms.known[node] = self._form(node)

    def _form(self, node: fx.Node) -> Any:
        """The sizes as the walk behind sees them; lists of pieces are read inside alone."""
        if node not in self.old or not isinstance(self.old[node], Tensor):
            return plain_form(node) if isinstance(node.meta["val"], Tensor) else ()
        form: list[Any] = list(plain_form(node))
        place = self.side.place(node, self.side.features)
        if place is not None:
            form[place[0]] = (self.job.factor(self.side),)
        axis = self._axis(self.old[node])
        if axis is not None:
            form[axis] = (Factor("width", self.old[node].shape[axis], self.new[node].shape[axis]),)
        return tuple(form)

    def _held(self, held: Tensor) -> Tensor:
        return self.kept[held & MASK]

    def _axis(self, held: Tensor) -> int | None:
        """The axis along which channels go: equally many of every line, not all, not none."""
        stays = self._held(held)
        if bool(stays.all()):
            return None
        for axis in reversed(range(held.dim())):
            counts = stays.sum(axis)
            if bool((counts == counts.flatten()[0]).all()) and counts.flatten()[0] > 0:
                return axis
        raise Unfit("the channels that stay are not equally many in all heads")

    def _left(self, held: Any) -> Any:
        """The indices without those of lost channels."""
        if not isinstance(held, Tensor):
            return tuple(self._left(each) for each in held)
        axis = self._axis(held)
        if axis is None:
            return held
        places = self._places(held, axis)
        return held.gather(axis, places)

    def _places(self, held: Tensor, axis: int) -> Tensor:
        """Where along `axis` what stays is, rising."""
        stays = self._held(held)
        count = int(stays.sum(axis).flatten()[0])
        order = stays.to(torch.int8).argsort(dim=axis, descending=True, stable=True)
        return order.narrow(axis, 0, count)

    def _step(self, node: fx.Node) -> None:
        """Gives one call its new sizes and tables."""
        if node not in self.old:
            self._reduced(node)
        elif ops.is_call(node, "rms_norm"):
            self._normed(node)
        elif ops.is_call(node, "layer_norm", "softmax", "_softmax"):
            raise Unfit(f"{node.name} mixes channels before they are rotated")
        elif ops.is_elementwise(node) or ops.is_call(node, *ops.CASTS, *ops.COPIES, *ops.DROPOUTS):
            self._elementwise(node)
        elif not ops.is_call(node, "view_as_complex", "view_as_real"):
            self._moved(node)

    def _reduced(self, node: fx.Node) -> None:
        """Means of squares inside a norm of heads are over what stays."""
        norm = self.planes.norms.get(self.side.kind)
        if norm is None or node.name not in norm.nodes:
            raise Unfit(f"{node.name} mixes channels before they are rotated")

    def _moved(self, node: fx.Node) -> None:
        """A view or a join, with the sizes it names; checked by running it on indices."""
        expected = self._left(self.old[node])
        args, kwargs = list(node.args), dict(node.kwargs)
        axis = self._axis(self.old[node]) if isinstance(self.old[node], Tensor) else None
        if ops.is_call(node, *ops.RESHAPES, "expand") and axis is not None:
            sizes: Any = list(args[1])  # type: ignore[arg-type]
            at = axis + len(sizes) - node.meta["val"].dim()
            if isinstance(sizes[at], int) and sizes[at] != -1:
                sizes[at] = expected.shape[axis]
            args[1] = sizes
        elif ops.is_call(node, "unflatten") and axis is not None:
            parts: Any = list(args[2])  # type: ignore[arg-type]
            first = axis - int(args[1]) % (node.meta["val"].dim() - len(parts) + 1)  # type: ignore[arg-type]
            if 0 <= first < len(parts) and parts[first] != -1:
                parts[first] = expected.shape[axis]
            args[2] = parts
        elif ops.is_call(node, "slice"):
            args = self._sliced(node)
        elif ops.is_call(node, "split_with_sizes", "split"):
            args[1] = self._pieces(node, expected)
        if not _is_same(self._tried(node, args, kwargs), expected):
            raise Unfit(f"{node.name} moves channels in a way that was not followed")
        if args != list(node.args):
            self.job.made.append(SetCall(node.name, *named((tuple(args), kwargs))))

    def _sliced(self, node: fx.Node) -> list[Any]:
        """A slice with the places that its ends have from now on."""
        source: Any = node.args[0]
        held = self.old[source]
        dim, start, end, step = (ops.argument(node, n) for n in ("dim", "start", "end", "step"))
        dim %= held.dim()
        if self._axis(held) != dim or step != 1:
            return list(node.args)
        stays = self._held(held).movedim(dim, 0).flatten(1)
        before = torch.nn.functional.pad(stays.cumsum(0), (0, 0, 1, 0))
        bounds = [0 if start is None else start, FAR if end is None else end]
        found: list[Any] = [source, dim]
        for bound in bounds:
            if not isinstance(bound, int):
                raise Unfit(f"{node.name} takes channels up to a place that is not fixed")
            place = bound + held.shape[dim] if bound < 0 else bound
            count = before[min(place, held.shape[dim])]
            if not bool((count == count[0]).all()):
                raise Unfit(f"{node.name} parts channels of which heads keep different numbers")
            found.append(bound if place >= FAR else int(count[0]))
        return found

    def _pieces(self, node: fx.Node, expected: Any) -> Any:
        dim = int(ops.argument(node, "dim"))
        sizes = [piece.shape[dim] for piece in expected]
        if ops.is_call(node, "split") and isinstance(node.args[1], int):
            return sizes[0]
        return sizes

    def _tried(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What a call gives of the new indices."""

        def value(operand: fx.Node) -> Any:
            if operand in self.new:
                return self.new[operand]
            return concrete(operand.meta["val"], self.sizes, DEFAULT_SIZE)

        try:
            given = fx.node.map_arg((tuple(args), kwargs), value)
            target: Any = aten.reshape.default if ops.is_call(node, "view") else node.target
            return target(*given[0], **given[1])  # type: ignore[index]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise Unfit(f"{node.name} does not fit the channels that stay") from error

    def _elementwise(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            value = operand.meta.get("val")
            if operand in self.new or operand in self.job.forms.known or ops.is_size(operand):
                continue
            if isinstance(value, Tensor) and value.dim():
                self._table(node, operand)

    def _normed(self, node: fx.Node) -> None:
        """A fused norm over fewer channels; its gain, one for each head, is multiplied after."""
        held, users = self.old[node], list(node.users)
        spot = self.side.place(node, self.side.features)
        norm = self.planes.norms.get(self.side.kind)
        if spot is None or spot[1] != held.dim() - 1 or norm is None or norm.output != node.name:
            raise Unfit(f"{node.name} normalises heads together")
        if self._axis(held) is None:
            return
        args: list[Any] = list(node.args)
        table, args[1], args[2] = args[2], [self.new[args[0]].shape[-1]], None
        self.job.made.append(SetCall(node.name, *named((tuple(args), dict(node.kwargs)))))
        gains = self._gains(node, table)
        name = new_node(self.job.site.program, f"{node.name}_{self.job.what}")
        before = min(users, key=self.job.site.flow.order.__getitem__).name
        self.job.made.append(Insert(name, aten.mul.Tensor, (Ref(node.name), gains), before))
        self.job.made += [SetArgument(user.name, node.name, name) for user in users]

    def _table(self, node: fx.Node, table: fx.Node) -> None:
        """Lets a node read those entries of a table that belong to the channels that stay."""
        held = self.old[node]
        axis = self._axis(held)
        if axis is None:
            return
        rank = node.meta["val"].dim()
        place = axis - rank + table.meta["val"].dim()
        if place < 0 or ops.expression(table.meta["val"].shape[place]) == 1:
            return
        lines = self._places(held, axis).movedim(axis, -1)
        heads = next((a for a in range(lines.dim() - 1) if _varies(lines, a)), None)
        moved = lines.flatten(0, -2)[None] if heads is None else lines.movedim(heads, 0)
        each = moved.flatten(1, -2)[:, 0]
        if not bool((moved.flatten(1, -2) == each[:, None]).all()):
            raise Unfit(f"{node.name} has channels in other places at every position")
        norm = self.planes.norms.get(self.side.kind)
        if norm is not None and node.name == norm.output:
            gains = self._gains(node, table)
            self.job.made.append(SetArgument(node.name, table.name, gains))
            return
        at = None if heads is None else heads - axis + place
        found = entries(self.job, table, place, each, at)
        self.job.made.append(SetArgument(node.name, table.name, found))

    def _gains(self, node: fx.Node, table: fx.Node) -> WeightRef:
        """A norm's gain, for each head the entries and factors of its own."""
        value, gain, kept = self.job.site.flow.constant(table), self.part.gain, self.part.kept
        spot = self.side.place(node, self.side.features)
        if value is None or gain is None or kept is None or spot is None:
            raise Unfit(f"the gain of {node.name} is no weight of its own")
        new = value.double().flatten()[kept] * gain
        shape = [1] * node.meta["val"].dim()
        shape[spot[0]], shape[spot[1]] = new.shape
        name = new_name(self.job.site.program, f"{self.side.linear.weight}.gain", self.job.what)
        new = new.reshape(shape[min(spot) :]).to(value.dtype)
        self.job.made.append(SetWeight(name, new, "gain of the channels that stay"))
        return WeightRef(name)


def _varies(lines: Tensor, axis: int) -> bool:
    return not bool((lines == lines.narrow(axis, 0, 1)).all())


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    pieces = isinstance(left, list | tuple) and isinstance(right, list | tuple)
    return pieces and len(left) == len(right) and all(map(_is_same, left, right))
