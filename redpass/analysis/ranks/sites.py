"""`sites`: the weights that two thin linears may stand for, and the edits that put them there.

A site is a weight with every linear that reads it: a tied weight is cut in all its places or not
at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from redpass.analysis.linears import Linear, Linears, identity, linears, new_name, opaque
from redpass.analysis.ranks.whitening import check_rank
from redpass.analysis.tokens import Tokens
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.plan import Edit, SetArgument, SetWeight
from redpass.program import Program


@dataclass(frozen=True)
class Site:
    """A weight and the linears that read it.

    Attributes:
        label: the weight's name, without `.weight`: names the place in options and reports.
        linears: all of them, in graph order.
    """

    label: str
    linears: tuple[Linear, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(outs, ins)`."""
        return self.linears[0].outs, self.linears[0].ins

    @property
    def break_even(self) -> int:
        """The largest rank at which two thin linears hold fewer numbers than the weight."""
        outs, ins = self.shape
        return (outs * ins - 1) // (outs + ins)

    def size(self, rank: int) -> int:
        """How many numbers two thin linears of this rank hold."""
        return rank * sum(self.shape)

    def rank(self, share: float) -> int:
        """The largest rank that leaves at most a share of the weight's numbers."""
        outs, ins = self.shape
        return int(share * outs * ins / (outs + ins))

    def check(self, rank: int) -> None:
        """Raises `UsageError` for a rank that the weight cannot have or that saves nothing."""
        check_rank(rank, self.shape, self.label)
        if rank > self.break_even:
            raise UsageError(
                f"at rank {rank} two linears hold more numbers than the one",
                place=self.label,
                hint=f"give a rank up to {self.break_even}",
            )


@dataclass(frozen=True)
class Sites:
    """What may be factored, by label; and what may not, with the reason, by label or node."""

    found: Mapping[str, Site]
    skips: Mapping[str, str]


def sites(program: Program, facts: Facts | None = None) -> Sites:
    """Finds the weights that only linears read. Looks at shapes, never at data."""
    table = linears(program) if facts is None else facts.get(linears)
    found: dict[str, Site] = {}
    skips: dict[str, str] = dict(opaque(program, table))
    tokens = Tokens(program)
    for group in _by_weight(program, table):
        site = Site(group[0].weight.removesuffix(".weight"), group)
        reason = _why_not(site, table, tokens)
        if reason:
            skips[site.label] = reason
        else:
            found[site.label] = site
    return Sites(found, skips)


def _by_weight(program: Program, table: Linears) -> Iterator[tuple[Linear, ...]]:
    groups: dict[object, list[Linear]] = {}
    for linear in table.by_node.values():
        groups.setdefault(identity(program.weights[linear.weight]), []).append(linear)
    yield from map(tuple, groups.values())


def _why_not(site: Site, table: Linears, tokens: Tokens) -> str:
    first = site.linears[0]
    dtype = tokens.program.weights[first.weight].dtype
    if table.readers[first.weight] != len(site.linears):
        return f"'{first.weight}' is read by something else than a linear, too"
    if len({linear.transposed for linear in site.linears}) > 1:
        return f"'{first.weight}' is read both as it is and transposed"
    if dtype.itemsize < 2:
        return f"a weight of {dtype} is quantised"
    if any(_is_thin(linear, table) for linear in site.linears):
        return "it is one of two thin linears already"
    if any(tokens.width(linear.input) != linear.ins for linear in site.linears):
        return "the features of its input are not on the last axis"
    return ""


def _is_thin(linear: Linear, table: Linears) -> bool:
    """Whether nothing stands between it and another linear, and the width between is narrow."""
    before = table.by_node.get(linear.input)
    if before is not None and linear.ins < min(before.ins, linear.outs):
        return True
    after = table.by_input.get(linear.node, ())
    return any(linear.outs < min(linear.ins, other.outs) for other in after)


def factored(
    program: Program, site: Site, thin: tuple[Tensor, Tensor], means: Sequence[Tensor | None]
) -> tuple[Edit, ...]:
    """Returns the edits that put two thin linears in place of each of a site's linears.

    The linear's node stays and becomes the second one; the first one is new.

    Args:
        thin: `[outs, rank]` and `[rank, ins]`, whose product stands for the weight.
        means: mean input of each linear whose bias is to make up for the mean of what is cut.
    """
    first = site.linears[0]
    rank = len(thin[1])
    dtype = program.weights[first.weight].dtype
    names = [new_name(program, first.weight, what) for what in ("up", "down")]
    source = f"{first.weight}, cut to rank {rank}"
    edits: list[Edit] = [
        first.store(name, part.to(dtype), source) for name, part in zip(names, thin, strict=True)
    ]
    for linear, mean in zip(site.linears, means, strict=True):
        edits += _thin_pair(program, linear, names)
        if mean is not None:
            edits += _moved_bias(program, linear, mean, thin)
    return tuple(edits)


def _thin_pair(program: Program, linear: Linear, names: Sequence[str]) -> list[Edit]:
    node = f"{linear.node}_down"
    while node in program.nodes:
        node += "_"
    return [
        linear.call(node, linear.input, names[1], None, linear.node),
        SetArgument(linear.node, linear.input, node),
        *linear.swap(program, linear.weight, names[0]),
    ]


def _moved_bias(
    program: Program, linear: Linear, mean: Tensor, thin: tuple[Tensor, Tensor]
) -> list[Edit]:
    """The bias that gives the mean output back: `b + (W - W') mean`."""
    offset = linear.offset(program)
    assert offset is not None
    assert linear.bias is not None
    exact = linear.matrix(program).double() @ mean
    moved = offset.double() + exact - thin[0] @ (thin[1] @ mean)
    name = new_name(program, linear.bias, "rank")
    value = SetWeight(name, moved.to(offset.dtype), f"{linear.bias}, with the mean of what is cut")
    return [value, *linear.swap(program, linear.bias, name)]
