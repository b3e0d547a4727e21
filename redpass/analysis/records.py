"""What `structure` finds, as frozen records. Nodes and weights are named, never referenced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from redpass.analysis.members import CouplingGroup

StatePair = tuple[str, str]
"""Input and output port of one state value (a layer's cached keys, say)."""


@dataclass(frozen=True)
class Norm:
    """One normalisation, whatever ops it is written in.

    Attributes:
        kind: `layer`, `rms`, `l2`, `group` or `batch`.
        output: node of the result, after gain and bias.
        input: node of the value normalised.
        weight: the gain's weight, or None; the gain is `weight + offset`.
        bias: the bias' weight, or None.
        eps: what is added to the variance; None when it is no constant.
        offset: 1.0 where the gain is stored around zero (Gemma), else 0.0.
        nodes: the nodes it is made of.
    """

    kind: str
    output: str
    input: str
    weight: str | None
    bias: str | None
    eps: float | None
    offset: float = 0.0
    nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Projection:
    """One linear map, or the part of a fused one, that feeds or reads attention heads.

    Attributes:
        node: the linear's node.
        output: node of its result with the bias, which may be added by an op of its own.
        weight: its weight; `axis` is the axis of it that `rows` index.
        bias: its bias, or None.
        rows: for each head, the indices along `axis` that belong to it, in order; an index
            appears under several heads when they share it. Empty where it could not be told.
    """

    node: str
    weight: str
    bias: str | None
    axis: int
    rows: tuple[Sequence[int], ...] = ()
    output: str = ""


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of queries and keys.

    Attributes:
        query: node of the rotated part of the queries.
        key: node of the rotated part of the keys, or None.
        tables: nodes of the cosine and sine tables.
        dims: how many dimensions of a head are rotated.
    """

    query: str
    key: str | None
    tables: tuple[str, ...]
    dims: int


@dataclass(frozen=True)
class Attention:
    """One softmax attention.

    Attributes:
        node: the fused attention node, or the softmax.
        query: projection of the queries; None where no single linear gives them.
        key: projection of the keys, likewise.
        value: projection of the values, likewise.
        output: projection that reads the heads, likewise.
        heads: query heads.
        kv_heads: distinct key heads.
        head_dim: width of a query head.
        value_dim: width of a value head.
        grouping: `MHA`, `GQA` or `MQA`.
        rotary: rotary embedding, or None.
        query_norm: output node of a norm on the queries after projection, or None.
        key_norm: the same for keys.
        scale: factor on the scores in all; None when it is no constant.
        softcap: bound `c` of scores `c * tanh(s / c)`, or None.
        mask: node of the mask or additive bias, or None.
        causal: whether later positions are hidden; None where the mask could not be evaluated.
        is_cross: whether keys come from elsewhere than the branch's own stream.
        key_of_head: for each query head, which of the distinct key heads it meets.
        key_cache: state pair of the keys, or None.
        value_cache: state pair of the values, or None.
        nodes: the nodes from the projections (without them) to the output projection.
    """

    node: str
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    grouping: str
    rotary: Rotary | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    scale: float | None = None
    softcap: float | None = None
    mask: str | None = None
    causal: bool | None = None
    is_cross: bool = False
    key_of_head: tuple[int, ...] = ()
    key_cache: StatePair | None = None
    value_cache: StatePair | None = None
    nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FeedForward:
    """`down(activation(gate(x)) * up(x))`, or without a gate `down(activation(up(x)))`.

    Attributes:
        up: one entry in `rows`: the rows of the weight that are `up` (all, or a part when fused).
        gate: likewise, or None.
        down: one entry in `rows`: the columns that read the inner width.
        inner: node of the value that `down` reads.
        width: the inner width.
        activation: `gelu`, `gelu_tanh`, `silu`, `relu`, ...; `none` for a bilinear one.
    """

    up: Projection
    gate: Projection | None
    down: Projection
    inner: str
    width: int
    activation: str


@dataclass(frozen=True)
class Experts:
    """Feed-forwards of which a router picks a few a token.

    Attributes:
        router: node of the linear that scores the experts; `router_weight` is its weight.
        count: experts.
        top_k: experts a token.
        weights: the experts' weights.
        stacked: whether each weight holds all experts along its first axis.
        width: inner width of one expert, or 0 where it could not be told.
        activation: as in `FeedForward`, or `unknown`.
        shared: weights of what runs for every token beside the experts.
    """

    router: str
    router_weight: str
    count: int
    top_k: int
    weights: tuple[str, ...]
    stacked: bool
    width: int
    activation: str
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Branch:
    """What one skip connection jumps over: `x' = x + b(x)`.

    Dropping it is `Replace(join, other)`, and `DropState` of its `state`. Parallel branches may
    share one join, each being the other's `other`: after dropping one, look at the result again.

    Attributes:
        label: for reports and options: `layers.3.attention`; unique.
        kind: `attention`, `feed-forward`, `experts`, `mixed` (more than one of these, or one
            beside other learned maps) or `other`.
        entry: node of `x`.
        exit: node of `b(x)`, the value that is added.
        join: node of the add that has `exit` as an operand.
        other: node of the join's other operand.
        after: node of the stream's value after it: the last add of the sum that `join` is part
            of, or the norm of that in a post-norm model.
        form: `pre-norm`, `post-norm`, `parallel` (one of several that read the same `x`),
            `sandwich` (norms before and after, both in the branch), `output-norm` (a norm after,
            in the branch) or `plain`.
        nodes: nodes that are needed for this branch only.
        path: nodes that depend on `entry` and lead to `exit`.
        layer: index of its layer.
        state: (input, output) ports of state that only this branch uses.
        weights: weights read on its path, by name; others may read them too.
        attention: its attention, or None.
        feed_forward: its feed-forward, or None.
        experts: its experts, or None.
    """

    label: str
    kind: str
    entry: str
    exit: str
    join: str
    other: str
    after: str
    form: str
    nodes: frozenset[str]
    path: frozenset[str]
    layer: int
    state: tuple[StatePair, ...]
    weights: tuple[str, ...]
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Layer:
    """A repeating group of branches.

    Attributes:
        index: place in the program, from 0.
        branches: labels.
        equal_to: index of the first layer with the same graph up to weights (its own if none).
        stream: which residual stream it is on, from 0.
    """

    index: int
    branches: tuple[str, ...]
    equal_to: int
    stream: int = 0


@dataclass(frozen=True)
class Structure:
    """All that was found; `notes` says what was not understood, and why.

    Attributes:
        branches: in order of execution.
        layers: in order.
        stream: nodes of the residual stream's values, in order; of all streams one after the
            other where a program has several (encoder and decoder).
        norms: every normalisation in the graph, in order.
        coupling_groups: what must be cut together.
    """

    branches: tuple[Branch, ...] = ()
    layers: tuple[Layer, ...] = ()
    stream: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ()
    coupling_groups: tuple[CouplingGroup, ...] = ()
    notes: tuple[str, ...] = ()
    streams: tuple[tuple[str, ...], ...] = field(default=())

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attentions of all branches, in order."""
        return tuple(b.attention for b in self.branches if b.attention is not None)

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forwards of all branches, in order."""
        return tuple(b.feed_forward for b in self.branches if b.feed_forward is not None)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The experts of all branches, in order."""
        return tuple(b.experts for b in self.branches if b.experts is not None)

    def branch(self, label: str) -> Branch:
        """Returns the branch called `label`. Raises KeyError."""
        return {branch.label: branch for branch in self.branches}[label]
