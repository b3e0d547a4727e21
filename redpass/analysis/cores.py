"""Attention cores: one fused op, or the product, softmax and product it is spelled out as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.maps import back_to_maps
from redpass.analysis.stream import is_learned

FUSED = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
PRODUCTS = ("matmul", "bmm", "baddbmm")


@dataclass(frozen=True, eq=False)
class Core:
    """Scores, softmax and weighted sum.

    Attributes:
        node: the fused op, or the softmax.
        query: operand of the scores, `[..., positions, dim]`.
        key: operand of the scores; `[..., positions, dim]`, or with both swapped when spelled.
        value: operand of the sum, `[..., positions, dim]`.
        output: node of the weighted sum.
        masks: masks and additive biases.
        factor: product of the constant factors between the operands and the softmax, None when
            one is no constant.
        softcap: `c` of `c * tanh(s / c)`, or None.
        causal: the fused op's own flag.
        nodes: nodes from the scores to the output.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    output: fx.Node
    masks: tuple[fx.Node, ...]
    factor: float | None
    softcap: float | None = None
    causal: bool = False
    nodes: frozenset[fx.Node] = field(default_factory=frozenset)

    @property
    def is_fused(self) -> bool:
        """Whether it is one op."""
        return self.node is self.output


def find_cores(flow: Flow) -> tuple[Core, ...]:
    """Finds all attention cores in graph order. A router's softmax is none."""
    found = (_core_at(flow, node) for node in flow.nodes if node in flow.live)
    return tuple(core for core in found if core is not None)


def side_inputs(flow: Flow, cores: tuple[Core, ...]) -> frozenset[tuple[fx.Node, fx.Node]]:
    """The (mask, reader) pairs of all cores whose mask is made by no learned map."""
    found = set()
    for core in cores:
        for mask in core.masks:
            if not back_to_maps(flow, mask)[1]:
                found |= {(mask, user) for user in mask.users if user in core.nodes}
    return frozenset(found)


def _core_at(flow: Flow, node: fx.Node) -> Core | None:
    if ops.is_call(node, *FUSED):
        return _fused(flow, node)
    return _spelled(flow, node) if ops.is_call(node, "softmax", "_softmax") else None


def _fused(flow: Flow, node: fx.Node) -> Core | None:
    query, key, value = node.args[:3]
    if not all(isinstance(a, fx.Node) for a in (query, key, value)):
        return None
    output = node
    if isinstance(node.meta.get("val"), tuple | list):
        output = next((u for u in node.users if u.args[1:] == (0,)), node)
    mask = _argument(node, "attn_mask", "attn_bias")
    scale = _argument(node, "scale")
    sizes = flow.shape(query)  # type: ignore[arg-type]
    width = sizes[-1] if sizes else None
    default = width**-0.5 if isinstance(width, int) else None
    return Core(
        node, query, key, value, output,  # type: ignore[arg-type]
        masks=(mask,) if isinstance(mask, fx.Node) else (),
        factor=default if scale is None else flow.scalar(scale),
        causal=bool(_argument(node, "is_causal") or False),
        nodes=frozenset({node, output}),
    )  # fmt: skip


def _argument(node: fx.Node, *names: str) -> Any:
    try:
        return ops.argument(node, *names)
    except KeyError:
        return None


def _spelled(flow: Flow, softmax: fx.Node) -> Core | None:
    walk = _Scores(flow)
    walk.visit(softmax.all_input_nodes[0])
    product = next(_products_of(flow, softmax), None)
    if walk.product is None or product is None:
        return None
    scores, output, value = walk.product, product[0], product[1]
    operands = [a for a in scores.args if isinstance(a, fx.Node)]
    if ops.is_call(scores, "baddbmm"):
        walk.baddbmm(scores)
        operands = operands[1:]
    return Core(
        softmax, operands[0], operands[1], value, output,
        masks=tuple(walk.masks), factor=walk.factor, softcap=walk.softcap,
        nodes=flow.between(scores, output) | {scores},
    )  # fmt: skip


def _products_of(flow: Flow, softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yields (product, values) of the products that take the probabilities first."""
    todo = [softmax]
    for _ in range(32):
        if not todo:
            return
        node = todo.pop(0)
        for user in node.users:
            if ops.is_call(user, *PRODUCTS):
                left, right = user.args[-2:] if ops.is_call(user, "baddbmm") else user.args[:2]
                if left is node and flow.is_live_float(right):
                    yield user, right  # type: ignore[misc]
            elif flow.is_no_op(user) or ops.is_view(user) or ops.is_elementwise(user):
                todo.append(user)


class _Scores:
    """Walks back from a softmax to the product of queries and keys, noting what it passes."""

    LIMIT = 64

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.product: fx.Node | None = None
        self.masks: list[fx.Node] = []
        self.factor: float | None = 1.0
        self.softcap: float | None = None
        self.steps = 0

    def visit(self, node: fx.Node) -> bool:
        """Follows `node` towards the product; returns whether it was reached."""
        self.steps += 1
        if self.steps > self.LIMIT:
            return False
        if ops.is_call(node, *PRODUCTS):
            return self._reach(node)
        passes = self.flow.is_no_op(node) or ops.is_view(node) or ops.is_elementwise(node)
        if not passes and not ops.is_call(node, "cat", "masked_fill", "where", "index_put"):
            return False
        reached = [a for a in node.all_input_nodes if self._leads(a) and self.visit(a)]
        if reached:
            self._note(node, reached)
        return bool(reached)

    def _leads(self, node: fx.Node) -> bool:
        return self.flow.is_live_float(node)

    def _reach(self, node: fx.Node) -> bool:
        operands = [a for a in node.args if isinstance(a, fx.Node)][-2:]
        if not all(self.flow.is_live_float(a) for a in operands) or is_learned(self.flow, node):
            return False
        if self.product is None:
            self.product = node
        return self.product is node

    def baddbmm(self, node: fx.Node) -> None:
        """Takes factor and bias of a product that adds a bias."""
        if node.kwargs.get("beta", 1) != 0:
            self.masks.append(node.args[0])  # type: ignore[arg-type]
        self._times(self.flow.scalar(node.kwargs.get("alpha", 1)))

    def _note(self, node: fx.Node, reached: list[fx.Node]) -> None:
        rest = [a for a in node.args if a not in reached and a is not node]
        if ops.is_call(node, "mul"):
            self._times(self.flow.scalar(rest[0]) if rest else None)
        elif ops.is_call(node, "div"):
            number = self.flow.scalar(rest[0]) if rest else None
            self._times(1 / number if number else None)
        elif ops.is_call(node, "tanh"):
            self._cap(node)
        elif ops.is_call(node, "add", "masked_fill", "where"):
            masks = [a for a in rest if isinstance(a, fx.Node) and self.flow.scalar(a) is None]
            self.masks += masks[:1]

    def _times(self, number: float | None) -> None:
        self.factor = None if number is None or self.factor is None else self.factor * number

    def _cap(self, tanh: fx.Node) -> None:
        after = next(iter(self.flow.readers(tanh)), None)
        if after is not None and ops.is_call(after, "mul"):
            numbers = [self.flow.scalar(a) for a in after.args[:2]]
            self.softcap = next((n for n in numbers if n is not None), None)
