"""What is known of a residual stream that is to be turned: plain records."""

from __future__ import annotations

from dataclasses import dataclass, field

from redpass.analysis.axes import Dimension
from redpass.analysis.couplings import Couplings

WRITES = "writes"
"""`Turn.by` of what enters the stream."""

READS = "reads"
"""`Turn.by` of what reads the stream itself, without a norm between."""


@dataclass(frozen=True)
class Turn:
    """An axis of a weight that is the stream's width, as one node reads it.

    Attributes:
        weight: its name.
        node: the node that reads it.
        axis: the axis.
        by: `WRITES`, `READS`, or the output of the norm whose result meets the axis.
        gain: weight that what is written is multiplied with before it is added, or "".
        is_copied: whether the node gets a turned copy, because others read the weight as it is.
    """

    weight: str
    node: str
    axis: int
    by: str
    gain: str = ""
    is_copied: bool = False


@dataclass(frozen=True)
class Unit:
    """A gain or bias over the stream's width that moves into the weights around it.

    Attributes:
        node: the node that reads it.
        weight: its name.
        value: what it holds from now on, in all places.
    """

    node: str
    weight: str
    value: float


@dataclass(frozen=True)
class Crossing:
    """A value that needs a product of its own, because no weight can take up the turn.

    Attributes:
        node: the value.
        users: the nodes that read it across the border.
        by: as in `Turn`; with `WRITES` the value comes in, else it goes out.
    """

    node: str
    users: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads the stream.

    Attributes:
        output: node of its result, after gain and bias.
        input: the value of the stream.
        is_centred: whether it takes the mean off.
        eps: what is added to the variance.
        weight: the gain's weight, or None.
        offset: what is added to the gain.
        bias: the bias' weight, or None.
        readers: linears that read its result.
        can_shift: whether all that read its result can take up a constant.
    """

    output: str
    input: str
    is_centred: bool
    eps: float
    weight: str | None
    offset: float
    bias: str | None
    readers: tuple[str, ...]
    can_shift: bool


@dataclass(frozen=True)
class Tie:
    """A table that words are looked up in and that is read again as the matrix of the output.

    Attributes:
        weight: its name; `axis` is the stream's width.
        lookups: nodes that look words up.
        heads: linears that read it behind `norm`, with the value each reads.
        norm: output of the norm.
    """

    weight: str
    axis: int
    lookups: tuple[str, ...]
    heads: tuple[tuple[str, str], ...]
    norm: str


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream with all that writes to it and reads from it.

    Attributes:
        label: `stream`, `stream.2`, ...
        width: how many features it has.
        values: nodes whose width changes with it.
        turns: axes of weights.
        units: gains and biases that move elsewhere.
        crossings: values that are turned by a product of their own.
        norms: in graph order.
        ties: tables that are both written from and read with.
        obstacle: why it cannot be turned, or "".
    """

    label: str
    width: int
    values: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    units: tuple[Unit, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    norms: tuple[StreamNorm, ...] = ()
    ties: tuple[Tie, ...] = ()
    obstacle: str = ""
    dimension: Dimension | None = field(default=None, repr=False)
    couplings: Couplings | None = field(default=None, repr=False)

    @property
    def has_mean(self) -> bool:
        """Whether one of the directions must be the mean over features."""
        return any(norm.is_centred for norm in self.norms)
