"""The linears of an attention with other heads: their weights, and the first values with heads.

Queries, keys and values may come from one linear. It stays one; where they are no longer equally
wide, slices take the place of the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.heads.axes import Factor, Unfit, named, new_node, plain_form
from redpass.analysis.heads.forms import Forms
from redpass.analysis.heads.sites import HeadSite, Side
from redpass.analysis.linears import Linear, new_name
from redpass.plan import Edit, Insert, Ref, SetArgument, SetCall, SetWeight, WeightRef

aten = torch.ops.aten


class Weights:
    """The new projections of queries, keys and values.

    Args:
        parts: kind -> new heads (`head_cuts.Part`), or None.
        what: ends the names of new weights and nodes.
        forms: gets the sizes of what the linears give.

    Attributes:
        splits: kind -> first value with an axis for heads, and the axes of heads and channels;
            for those whose linear is another one.
        skipped: nodes that nobody reads any more.
    """

    def __init__(self, site: HeadSite, parts: Mapping[str, Any], what: str, forms: Forms) -> None:
        self.site, self.parts, self.what, self.forms = site, parts, what, forms
        self.splits: dict[str, tuple[fx.Node, int, int]] = {}
        self.skipped: set[fx.Node] = set()

    def edits(self) -> list[Edit]:
        """Returns the edits, and fills `splits` and `skipped`. Raises `Unfit`."""
        made: list[Edit] = []
        by_linear: dict[str, list[Side]] = {}
        for side in self.site.sides.values():
            by_linear.setdefault(side.linear.node, []).append(side)
        for sides in by_linear.values():
            if any(self.parts[side.kind] is not None for side in sides):
                made += self._linear(sides)
        return made

    def _linear(self, sides: list[Side]) -> Iterator[Edit]:
        linear = sides[0].linear
        old = torch.cat([side.features.flatten() for side in sides])
        if not torch.equal(old.sort()[0], torch.arange(linear.outs)):
            raise Unfit(f"{linear.node} makes something else beside its heads")
        rows, biases, widths = [], [], []
        for side in sides:
            weight, bias = self._new(side)
            rows.append(weight.flatten(0, 1))
            biases.append(bias)
            widths.append(len(rows[-1]))
        bias = None if None in biases else torch.cat([b.flatten() for b in biases if b is not None])
        name = sides[0].projection.bias
        matrix = torch.cat(rows)
        yield from self.swap(self.site, linear, matrix, bias, self.what, name)
        yield from self._splits(sides, Factor("features", linear.outs, len(matrix)), widths)

    def _new(self, side: Side) -> tuple[Tensor, Tensor | None]:
        """The side's heads from now on."""
        new, program = self.parts[side.kind], self.site.program
        weight, bias = side.weight(program), side.bias(program)
        if new is None:
            return weight, bias
        if (new.bias is None) != (bias is None):
            raise Unfit(f"{side.linear.node} has a bias and the new heads have none, or they do")
        dtype = weight.dtype
        return new.weight.to(dtype), None if bias is None else new.bias.to(dtype)

    @staticmethod
    def swap(
        site: HeadSite, linear: Linear, matrix: Tensor, bias: Tensor | None, what: str,
        bias_name: str | None = None,
    ) -> Iterator[Edit]:  # fmt: skip
        """Yields the edits that give a linear another matrix and, where told, another bias."""
        program = site.program
        dtype = program.weights[linear.weight].dtype
        name = new_name(program, linear.weight, what)
        yield linear.store(name, matrix.to(dtype), f"{linear.weight}, other heads")
        yield from _reads(program.nodes[linear.node], linear.weight, name)
        bias_name = bias_name or linear.bias
        if bias is not None and bias_name is not None:
            name = new_name(program, bias_name, what)
            yield SetWeight(name, bias.to(dtype).contiguous(), f"{bias_name}, other heads")
            nodes = [n for n in program.weight_nodes if str(n.target) == bias_name]
            for reader in {user: None for node in nodes for user in node.users}:
                yield from _reads(reader, bias_name, name)

    def _splits(self, sides: list[Side], features: Factor, widths: list[int]) -> Iterator[Edit]:
        trunk = self._trunk(sides[0], features)
        for side in sides:
            self.splits[side.kind] = self._split_of(side, trunk)
        firsts = {split[0] for split in self.splits.values()}
        middle = self._middle(trunk, {self.splits[side.kind][0] for side in sides})
        for node in (*trunk, *middle):
            for user in node.users:
                is_lead = ops.is_call(user, "sym_size") and node in trunk and user.args[1] != -1
                if user not in trunk and user not in middle and user not in firsts and not is_lead:
                    raise Unfit(f"{user.name} reads queries, keys or values before they are heads")
        self.skipped |= middle
        end = trunk[-1]
        start = 0
        for side, width in zip(sides, widths, strict=True):
            source = end.name
            if len(sides) > 1:
                source = self._fresh(f"{end.name}_{side.kind}_{self.what}")
                before = min((s[0] for s in self.splits.values()), key=self._order).name
                args = (Ref(end.name), -1, start, start + width)
                yield Insert(source, aten.slice.Tensor, args, before)
            yield from self._split(side, end, source)
            start += width

    def _fresh(self, name: str) -> str:
        return new_node(self.site.program, name)

    def _order(self, node: fx.Node) -> int:
        return self.site.flow.order[node]

    def _trunk(self, side: Side, features: Factor) -> list[fx.Node]:
        """The nodes behind the linear that hold all it gives along their last axis, in order."""
        line = torch.arange(features.old)
        mask = (1 << 32) - 1
        found = []
        for node in sorted(side.operand.known, key=self._order):
            held = side.operand.known[node]
            fits = isinstance(held, Tensor) and held.shape[-1] == features.old
            if fits and bool(((held & mask) == line).all()) and not side.place(node, side.features):
                found.append(node)
        if not found or found[0].name != side.linear.node:
            raise Unfit(f"what {side.linear.node} gives could not be followed")
        self.forms.known[found[0]] = (*plain_form(found[0])[:-1], (features,))
        self.forms.run(found)
        return found

    def _split_of(self, side: Side, trunk: list[fx.Node]) -> tuple[fx.Node, int, int]:
        for node in sorted(side.operand.nodes | {side.node}, key=self._order):
            if node not in trunk and (place := side.place(node, side.features)):
                return node, *place
        raise Unfit(f"no value has an axis for the {side.kind} heads")

    def _middle(self, trunk: list[fx.Node], firsts: set[fx.Node]) -> set[fx.Node]:
        """What lies between the trunk and the first values with heads."""
        found: set[fx.Node] = set()
        for first in firsts:
            found |= self.site.flow.between(trunk[-1], first)
        return found - firsts - set(trunk)

    def _split(self, side: Side, end: fx.Node, source: str) -> Iterator[Edit]:
        """Gives the first value with heads its new sizes, or makes one like it."""
        node, heads, channels = self.splits[side.kind]
        new = self.parts[side.kind]
        count, width = (side.heads, side.width) if new is None else new.weight.shape[:2]
        lead = plain_form(end)[:-1]
        rest = tuple(a for i, a in enumerate(plain_form(node)) if i not in (heads, channels))
        if rest != lead:
            raise Unfit(f"{node.name} has other axes than what {side.linear.node} gives")
        if ops.is_call(node, *ops.RESHAPES) and (heads, channels) == (len(lead), len(lead) + 1):
            given: Any = node.args[1]
            sizes = named([*given[: len(lead)], int(count), int(width)])
            yield SetCall(node.name, (Ref(source), list(sizes)), dict(node.kwargs))
            return
        split = self._fresh(f"{node.name}_{self.what}")
        args = (Ref(source), -1, [int(count), int(width)])
        yield Insert(split, aten.unflatten.int, args, node.name)
        order = [*range(len(lead))]
        for axis, place in sorted(((heads, len(lead)), (channels, len(lead) + 1))):
            order.insert(axis, place)
        if order != sorted(order):
            turned = self._fresh(f"{split}_turned")
            yield Insert(turned, aten.permute.default, (Ref(split), order), node.name)
            split = turned
        for user in node.users:
            yield SetArgument(user.name, node.name, split)


def _reads(node: fx.Node, old: str, new: str) -> Iterator[Edit]:
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and str(operand.target) == old:
            yield SetArgument(node.name, operand.name, WeightRef(new))
