"""Small programs with attention, built node by node: grouping, cache, rotary, norms, biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from building import Builder, aten
from torch import Tensor, fx

from redpass.data import Batches
from redpass.plan import Exactness
from redpass.program import Program
from redpass.verify.numbers import compare_outputs
from redpass.verify.reference import reference

WIDTH, DIM = 32, 8
getitem = __import__("operator").getitem


@dataclass(frozen=True)
class Attending:
    """What the attention of every layer is like.

    Attributes:
        fused: one linear for queries, keys and values.
        spelled: product, softmax and product in place of the fused op.
        repeats: key heads are repeated by `expand`, or by the op itself (`enable_gqa`).
        edit: changes the drawn weights before the graph is made.
    """

    heads: int = 4
    keys: int = 4
    layers: int = 1
    fused: bool = False
    spelled: bool = False
    cache: bool = False
    rotary: bool = False
    norms: bool = False
    bias: bool = True
    causal: bool = True
    position_bias: bool = False
    repeats: str = "expand"
    extra: str = ""
    edit: Any = field(default=None, compare=False)

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Draws the weights of a layer: `q`, `k`, `v`, `o`, and their biases `qb`, ..."""
        generator = torch.Generator().manual_seed(layer)
        sizes = {"q": self.heads, "k": self.keys, "v": self.keys}
        found = {
            name: torch.randn(count * DIM, WIDTH, generator=generator) / WIDTH**0.5
            for name, count in sizes.items()
        }
        found["q"] *= 3  # heads that look at some tokens more than at others
        found["o"] = torch.randn(WIDTH, self.heads * DIM, generator=generator) / WIDTH**0.5
        for name in (*sizes, "o"):
            found[f"{name}b"] = 0.1 * torch.randn(len(found[name]), generator=generator)
        if self.edit is not None:
            self.edit(found, layer)
        return found

    def program(self) -> Program:
        """Builds it."""
        b = Builder()
        x = b.input("x", "batch", "seq", WIDTH)
        past = "past+seq" if self.cache else "seq"
        shape = ("batch", self.heads if self.position_bias else 1, "seq", past)
        mask = b.input("bias", *shape) if self.cache or self.position_bias else None
        state, ports = [], []
        for layer in range(self.layers):
            x, kept = _Layer(self, b, layer).run(x, mask)
            ports += kept
        for number, node in enumerate(ports):
            name = f"past_{number}"
            state.append((name, f"present_{number}"))
            del node
        return b.program(x, *ports, state=tuple(state))

    def batches(self, count: int = 6, rows: int = 4, length: int = 9) -> Batches:
        """Returns rows with no past; hidden positions are told by the mask where there is one."""
        generator = torch.Generator().manual_seed(9)
        items = []
        for _ in range(count):
            item = {"x": torch.randn(rows, length, WIDTH, generator=generator)}
            heads = self.heads if self.position_bias else 1
            shut = torch.full((length, length), -1e9).triu(1) if self.causal else torch.zeros(1, 1)
            bias = shut.expand(rows, heads, length, length)
            if self.position_bias:
                slopes = torch.arange(1, heads + 1)[:, None, None] / heads
                far = (torch.arange(length)[:, None] - torch.arange(length)).abs()
                bias = bias - slopes * far
            items.append(item | {"bias": bias.contiguous()})
        return Batches(tuple(items), "drawn rows")


class _Layer:
    def __init__(self, what: Attending, b: Builder, layer: int) -> None:
        self.what, self.b, self.layer = what, b, layer
        self.w = {
            name: b.weight(f"layers.{layer}.{name}", value)
            for name, value in what.weights(layer).items()
            if what.bias or not name.endswith("b")
        } if not what.fused else {}  # fmt: skip
        self.drawn = what.weights(layer)

    def linear(self, x: fx.Node, name: str) -> fx.Node:
        return self.b.call(aten.linear.default, x, self.w[name], self.w.get(f"{name}b"))

    def run(self, x: fx.Node, mask: fx.Node | None) -> tuple[fx.Node, list[fx.Node]]:
        b, what = self.b, self.what
        sizes = [b.call(aten.sym_size.int, x, axis) for axis in (0, 1)]
        q, k, v = (self.heads(part, n, sizes) for part, n in self.parts(x))
        if what.norms:
            gains = [b.weight(f"layers.{self.layer}.{n}_norm", torch.rand(DIM) + 0.5) for n in "qk"]
            q, k = (
                b.call(aten.rms_norm.default, value, [DIM], gain, 1e-6)
                for value, gain in zip((q, k), gains, strict=True)
            )
        if what.rotary:
            q, k = self.turned(q, sizes[1]), self.turned(k, sizes[1])
        kept = []
        if what.cache:
            k, v = (self.cached(value, 2 * self.layer + n) for n, value in enumerate((k, v)))
            kept = [k, v]
        y = self.core(q, k, v, mask)
        if what.extra == "gate":
            gate = b.weight(f"layers.{self.layer}.gate", torch.rand(what.heads, 1, 1) + 0.5)
            y = b.call(aten.mul.Tensor, y, gate)
        y = b.call(aten.transpose.int, y, 1, 2)
        y = b.call(aten.reshape.default, y, [*sizes, what.heads * DIM])
        if what.fused:
            self.w = {n: b.weight(f"layers.{self.layer}.{n}", self.drawn[n]) for n in ("o", "ob")}
        return b.call(aten.add.Tensor, x, self.linear(y, "o")), kept

    def parts(self, x: fx.Node) -> list[tuple[fx.Node, int]]:
        b, what = self.b, self.what
        counts = [what.heads, what.keys, what.keys]
        if not what.fused:
            made = [self.linear(x, name) for name in "qkv"]
            if what.extra == "wide norm":
                gain = b.weight(f"layers.{self.layer}.wide", torch.rand(what.heads * DIM) + 0.5)
                made[0] = b.call(aten.rms_norm.default, made[0], [what.heads * DIM], gain, 1e-6)
            return list(zip(made, counts, strict=True))
        matrix = torch.cat([self.drawn[name] for name in "qkv"])
        offset = torch.cat([self.drawn[f"{name}b"] for name in "qkv"])
        names = [f"layers.{self.layer}.{name}" for name in ("qkv", "qkvb")]
        w, bias = (b.weight(n, value) for n, value in zip(names, (matrix, offset), strict=True))
        both = b.call(aten.linear.default, x, w, bias)
        split = b.call(aten.split_with_sizes.default, both, [n * DIM for n in counts], -1)
        return [(b.call(getitem, split, i), count) for i, count in enumerate(counts)]

    def heads(self, part: fx.Node, count: int, sizes: list[fx.Node]) -> fx.Node:
        view = self.b.call(aten.view.default, part, [*sizes, count, DIM])
        return self.b.call(aten.transpose.int, view, 1, 2)

    def turned(self, value: fx.Node, length: fx.Node) -> fx.Node:
        """Rotary embedding by halves; position 0 is the first of the call."""
        b = self.b
        steps = b.call(aten.arange.default, length, dtype=torch.float32)
        rates = b.weight(f"rates_{value.name}", 0.5 ** torch.arange(DIM // 2).float())
        column = b.call(aten.unsqueeze.default, steps, 1)
        half = b.call(aten.mul.Tensor, column, rates)
        angles = b.call(aten.cat.default, [half, half], -1)
        left = b.call(aten.slice.Tensor, value, 3, 0, DIM // 2)
        right = b.call(aten.slice.Tensor, value, 3, DIM // 2, DIM)
        swapped = b.call(aten.cat.default, [b.call(aten.neg.default, right), left], -1)
        straight = b.call(aten.mul.Tensor, value, b.call(aten.cos.default, angles))
        across = b.call(aten.mul.Tensor, swapped, b.call(aten.sin.default, angles))
        return b.call(aten.add.Tensor, straight, across)

    def cached(self, value: fx.Node, number: int) -> fx.Node:
        with self.b.graph.inserting_after(self._last_input()):
            past = self.b.input(f"past_{number}", "batch", self.what.keys, "past", DIM)
        return self.b.call(aten.cat.default, [past, value], 2)

    def _last_input(self) -> fx.Node:
        return [node for node in self.b.graph.nodes if node.op == "placeholder"][-1]

    def core(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> fx.Node:
        b, what = self.b, self.what
        times = what.heads // what.keys
        grouped = times > 1 and what.repeats == "op"
        if times > 1 and not grouped:
            k, v = self.repeated(k, times), self.repeated(v, times)
        if not what.spelled:
            is_causal = what.causal and mask is None
            named: dict[str, Any] = {"enable_gqa": True} if grouped else {}
            args = (q, k, v, mask, 0.0, is_causal)
            return b.call(aten.scaled_dot_product_attention.default, *args, **named)
        turned = b.call(aten.transpose.int, k, 2, 3)
        scores = b.call(aten.mul.Tensor, b.call(aten.matmul.default, q, turned), DIM**-0.5)
        scores = scores if mask is None else b.call(aten.add.Tensor, scores, mask)
        weights = b.call(aten.softmax.int, scores, -1)
        return b.call(aten.matmul.default, weights, v)

    def repeated(self, value: fx.Node, times: int) -> fx.Node:
        b, keys = self.b, self.what.keys
        sizes = [b.call(aten.sym_size.int, value, axis) for axis in (0, 2)]
        wide = b.call(aten.unsqueeze.default, value, 2)
        wide = b.call(aten.expand.default, wide, [sizes[0], keys, times, sizes[1], DIM])
        return b.call(aten.reshape.default, wide, [sizes[0], keys * times, sizes[1], DIM])


def check_same(before: Program, after: Program, batches: Batches) -> None:
    """Compares the first output by the rule for reordered arithmetic."""
    from redpass.verify.inputs import complete

    def named(outputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"out0": outputs[0]}

    for batch in batches:
        old, new = complete(before, batch), complete(after, batch)
        truth = named(reference(before, old))
        verdict = compare_outputs(truth, named(before(**old)), named(after(**new)), "drawn rows")
        assert verdict.passed, verdict.reason
        exact = reference(after, new)[0]
        assert torch.allclose(truth["out0"], exact, rtol=1e-6, atol=1e-6)


__all__ = ["DIM", "WIDTH", "Attending", "Exactness", "check_same"]
