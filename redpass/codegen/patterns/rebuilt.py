"""Heads that a matrix makes of latents, with what may stand between: a bias, a norm, views."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.linears import Linear, new_name
from redpass.analysis.provenance import Tracer
from redpass.analysis.records import Norm
from redpass.plan import SetWeight
from redpass.program import Program


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """Heads `[b, n, t, d]` that a matrix makes of latents.

    Attributes:
        latents: the node they are made of, `[b, t, r]`, or `[b, g, t, r]` where groups are apart.
        weight: name of the matrix.
        ups: it, as `[n, d, r]`.
        nodes: the nodes from the product to the heads.
        norm: what normalises them on the way, over the columns of a head.
        shifted: whether a weight is added to them on the way.
    """

    latents: fx.Node
    weight: str
    ups: Tensor
    nodes: tuple[fx.Node, ...]
    norm: Norm | None = None
    shifted: bool = False

    @property
    def groups(self) -> int:
        """How many latents a position has."""
        shape = self.latents.meta["val"].shape
        return int(shape[1]) if len(shape) == 4 else 1

    def stored(self, program: Program) -> SetWeight:
        """The matrix as the op reads it: a view where strides allow."""
        return SetWeight(
            new_name(program, self.weight, "heads"), self.ups, f"{self.weight} by heads"
        )


@dataclass(frozen=True)
class Reader:
    """Reads heads that are made of latents.

    Attributes:
        by_node: the linears of the program.
        norms: node of the result -> norm.
    """

    program: Program
    tracer: Tracer
    by_node: Mapping[str, Linear]
    norms: Mapping[str, Norm]

    def read(self, node: fx.Node) -> Rebuilt | None:
        """Reads heads that have more numbers than the latent they are made of."""
        way = list(self._way(node))
        made = way[-1]
        shape = node.meta["val"].shape
        found = self._product(made)
        if found is None or len(shape) != 4 or found[1].shape[1] <= found[1].shape[2]:
            return None
        latents, ups, weight = found
        heads, width = int(shape[1]), int(shape[3])
        norms = [self.norms[step.name] for step in way if step.name in self.norms]
        if len(norms) > 1 or not self._is_in_order(way, (len(ups), heads, width)):
            return None
        linear = self.by_node.get(made.name)
        shifted = any(ops.is_call(step, "add") and step.name not in self.norms for step in way)
        shifted |= linear is not None and linear.bias is not None
        inner = [self.program.nodes[name] for norm in norms for name in norm.nodes]
        nodes = tuple(dict.fromkeys([*way, *inner]))
        norm = norms[0] if norms else None
        return Rebuilt(latents, weight, ups.reshape(heads, width, -1), nodes, norm, shifted)

    def _way(self, node: fx.Node) -> Iterator[fx.Node]:
        """Back from `node` through views, norms and sums with a weight, to what makes it."""
        while True:
            yield node
            before = self._before(node)
            if before is None:
                return
            node = before

    def _before(self, node: fx.Node) -> fx.Node | None:
        if node.name in self.norms:
            return self.program.nodes[self.norms[node.name].input]
        source = node.args[0] if node.args else None
        if ops.is_view(node) and isinstance(source, fx.Node):
            return source
        if ops.is_call(node, "add") and len(node.all_input_nodes) == 2:
            plain = [n for n in node.all_input_nodes if self.program.weight(n) is None]
            return plain[0] if len(plain) == 1 else None
        return None

    def _product(self, made: fx.Node) -> tuple[fx.Node, Tensor, str] | None:
        """The latents, the matrix `[groups, heads of a group * d, r]` and its name."""
        linear = self.by_node.get(made.name)
        if linear is not None:
            latents = self.program.nodes[linear.input]
            ups = linear.matrix(self.program).unsqueeze(0)
            return (latents, ups, linear.weight) if latents.meta["val"].dim() == 3 else None
        operands = [arg for arg in made.args[:2] if isinstance(arg, fx.Node)]
        found = self.program.weight(operands[1]) if len(operands) == 2 else None
        if found is None or found.dim() != 3 or not ops.is_call(made, "matmul", "bmm"):
            return None
        sizes = operands[0].meta["val"].shape
        fits = len(sizes) == 4 and sizes[1] == len(found)
        return (operands[0], found.mT, str(operands[1].target)) if fits else None

    def _is_in_order(self, way: list[fx.Node], sizes: tuple[int, int, int]) -> bool:
        """Whether head `i` is the `i`-th part of what was made, and positions stay.

        Where it is normalised, the last axis must be the columns of one head.
        """
        groups, heads, width = sizes
        shape = self.tracer.shape(way[-1])
        if shape is None or heads % groups or shape[-1] * groups != heads * width:
            return False
        count = math.prod(shape) // (groups * shape[-1] * shape[0])
        lines = torch.arange(shape[0] * count * heads * width)
        labels = lines.reshape(shape[0], count, groups, shape[-1])
        held = labels.transpose(1, 2) if len(shape) == 4 else labels.flatten(2)
        for before, step in zip(way[::-1], way[-2::-1], strict=False):
            if step.name in self.norms:
                rows = held.reshape(-1, held.shape[-1])
                if held.shape[-1] != width or not _are_heads(rows):
                    return False
            elif not ops.is_call(step, "add"):
                found = self.tracer.run([step], {before: held}).get(step)
                if not isinstance(found, Tensor):
                    return False
                held = found
        wanted = lines.reshape(shape[0], count, heads, width).transpose(1, 2)
        return held.shape == wanted.shape and bool((held == wanted).all())


def _are_heads(rows: Tensor) -> bool:
    """Whether each row is the numbers from a multiple of its length on, in order."""
    width = rows.shape[1]
    return bool((rows == rows[:, :1] // width * width + torch.arange(width)).all())
