"""What `redpass::` ops cost on the CPU beside the ATen operators they stand for.

    python benchmarks/op_overhead.py [--out benchmarks/results]

Each op is timed in turn with the chain of ATen calls that a model has in its place, two ways:

- in a program: a graph of that chain, and a graph with the op; what users of `redpass` run;
- called: `torch.ops.redpass.<op>` from Python, and the chain from Python.

Process time, one thread; ratios are medians of alternating runs. Up to 1.03 nothing is lost. Where
both graphs are the very same calls, "same" stands beside the ratio: what is then measured is noise.
Attention ends in what a model does with it: the heads of a position side by side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attend

import redpass
from redpass.codegen import ops
from redpass.codegen.folder import versions
from redpass.codegen.ops.latent_attention.reference import latent_attention
from redpass.codegen.ops.rotary.reference import rotary
from redpass.program import Program

SHAPES = ((1, 1), (1, 128), (4, 512))
"""(batch, positions)."""

WIDTH, HEADS, HEAD, INNER, RANK = 768, 12, 64, 2048, 192
"""Those of GPT-2, with a gated feed-forward and a factored linear."""

PAST = 512
"""Keys that one token attends to."""

ROUNDS = 25


@dataclass(frozen=True)
class Side:
    """A function, and what it is called on: the first is an input, the others are weights."""

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def __call__(self) -> Any:
        return self.function(*self.tensors)

    def program(self) -> Program:
        """Returns a program of this function that gives what the function does."""
        x = self.tensors[0]
        example = {"x": x}
        shape = ",".join(map(str, x.shape))
        program = redpass.load(_Module(self), example=example, inputs=[f"x:float32[{shape}]"])
        for found, wanted in zip(program.module(x), _flat(self()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        return program

    def run(self, program: Program) -> Callable[[], Any]:
        """Returns a call of what `program` runs."""
        module, x = program.module, self.tensors[0]
        return lambda: module(x)


class _Module(nn.Module):
    def __init__(self, side: Side) -> None:
        super().__init__()
        self.function = side.function
        for index, tensor in enumerate(side.tensors[1:]):
            self.register_buffer(f"b{index}", tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.buffers())


def _flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


Case = tuple[str, Side, Side]
"""Name, the op, what it stands for."""


def cases(batch: int, length: int) -> Iterator[Case]:
    """Yields every op at one shape."""
    torch.manual_seed(0)
    call = torch.ops.redpass
    x, y = torch.randn(batch, length, WIDTH), torch.randn(batch, length, WIDTH)
    gain = torch.rand(WIDTH) + 0.5
    yield (
        "add_norm",
        Side(lambda x, y, w: call.add_norm(x, y, w, None, 1e-5, "rms"), (x, y, gain)),
        Side(_norm, (x, y, gain)),
    )
    gate, up = torch.randn(INNER, WIDTH), torch.randn(INNER, WIDTH)
    yield (
        "gated_feed_forward",
        Side(lambda x, g, u: call.gated_feed_forward(x, g, u, None, None, "silu"), (x, gate, up)),
        Side(_gated, (x, gate, up)),
    )
    factors = x, torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK), torch.randn(WIDTH)
    yield (
        "low_rank_linear",
        Side(lambda x, d, u, b: call.low_rank_linear(x, d, u, b, "none"), factors),
        Side(lambda x, d, u, b: functional.linear(functional.linear(x, d), u, b), factors),
    )
    q, k, v = (torch.randn(batch, length, HEADS, HEAD).transpose(1, 2) for _ in range(3))
    tables = torch.randn(1, length, HEAD), torch.randn(1, length, HEAD)
    yield (
        "rotary",
        Side(lambda q, k, c, s: call.rotary(q, k, c, s, False), (q, k, *tables)),
        Side(lambda q, k, c, s: rotary(q, k, c, s, False), (q, k, *tables)),
    )
    yield from attention_cases("all positions", q, k, v)
    one = torch.randn(batch, HEADS, 1, HEAD)
    past = [torch.randn(batch, HEADS, PAST, HEAD) for _ in range(2)]
    yield from attention_cases(f"one token on {PAST}", one, *past)
    yield latent_case(batch)


def _norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, functional.rms_norm(total, (WIDTH,), weight, 1e-5)


def _gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def attention_cases(label: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    """Yields even and uneven clusters against the heads spread out, and against all apart."""
    name = f"clustered_attention, {label}"
    even, uneven = [head // 2 for head in range(HEADS)], [0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 5]
    few, shared = (x[:, ::2].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    if q.is_contiguous():
        few, shared = few.contiguous(), shared.contiguous()
    table = torch.tensor(uneven)

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1)

    def chosen(x: Tensor) -> Tensor:
        return x.index_select(1, table)

    for kind, clusters, spread in (("", even, repeated), (", uneven", uneven, chosen)):

        def op(q: Tensor, k: Tensor, v: Tensor, clusters: list[int] = clusters) -> Tensor:
            attended = torch.ops.redpass.clustered_attention
            return joined(attended(q, k, v, clusters, [], [], None, False, 0, None))

        def chain(q: Tensor, k: Tensor, v: Tensor, spread: Any = spread) -> Tensor:
            return joined(attend(spread(q), spread(k), v))

        ours = Side(op, (few, shared, v))
        yield f"{name}{kind}, against heads spread out", ours, Side(chain, (few, shared, v))
        if not kind:
            alone = spread(q[:, ::2]), spread(k[:, ::2]), v
            apart = Side(lambda *given: joined(attend(*given)), alone)
            yield f"{name}, against all heads apart", ours, apart


def joined(x: Tensor) -> Tensor:
    """Returns the heads of each position side by side."""
    return x.transpose(1, 2).flatten(2)


def latent_case(batch: int) -> Case:
    """Returns one token over a latent cache of half the bytes."""
    tensors = (
        torch.randn(batch, HEADS, 1, HEAD),
        torch.randn(batch, PAST, 3, 128), torch.randn(HEADS, HEAD, 128) / 8,
        torch.randn(batch, PAST, 3, 128), torch.randn(HEADS, HEAD, 128) / 8,
        torch.randn(1, PAST, HEAD // 2), torch.randn(1, PAST, HEAD // 2),
    )  # fmt: skip

    def op(*given: Tensor) -> Any:
        return torch.ops.redpass.latent_attention(*given, None, False, None)

    def chain(query: Tensor, *given: Tensor) -> Any:
        keys, up, values, down, cos, sin = given
        return latent_attention(query, keys, up, values, down, cos, sin, None, False, None)

    return f"latent_attention, one token on {PAST}", Side(op, tensors), Side(chain, tensors)


def calls(program: Program) -> list[tuple[str, ...]]:
    """What a program runs, call by call, whatever its nodes are called."""
    places: dict[fx.Node, str] = {}
    found = list[tuple[str, ...]]()
    for node in program.module.graph.nodes:
        places[node] = f"#{len(places)}"
        if node.op == "call_function":
            given = fx.node.map_arg((node.args, dict(node.kwargs)), places.__getitem__)
            found.append((str(node.target), str(given)))
    return found


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, float]:
    """Returns the seconds of both, and those of `ours` over those of `theirs`."""
    count = max(1, int(0.01 / max(1e-7, seconds(theirs, 3))))
    seconds(ours, 3)
    pairs = [(seconds(ours, count), seconds(theirs, count)) for _ in range(ROUNDS)]
    one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return one, other, statistics.median(a / b for a, b in pairs)


def seconds(function: Callable[[], Any], count: int) -> float:
    """Process time of one call."""
    start = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - start) / count


HEAD_LINES = (
    "| op | batch x positions | ATen in a program, µs | ratio | ATen called, µs | ratio |",
    "|---|---|---|---|---|---|",
)


@torch.inference_mode()
def main() -> None:
    """Prints and writes one line for each op and shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    ops.register()
    lines = list(HEAD_LINES)
    print("\n".join(lines))
    for batch, length in SHAPES:
        for name, ours, theirs in cases(batch, length):
            with torch.inference_mode(False), torch.no_grad():
                programs = ours.program(), theirs.program()
                same = " same" if calls(programs[0]) == calls(programs[1]) else ""
                _, base, held = ratio(ours.run(programs[0]), theirs.run(programs[1]))
            _, called, overhead = ratio(ours, theirs)
            cells = (name, f"{batch} x {length}", f"{1e6 * base:.1f}", f"{held:.2f}{same}",
                     f"{1e6 * called:.1f}", f"{overhead:.2f}")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            write(out, lines)


def write(out: Path, lines: list[str]) -> None:
    """Writes `op_overhead.md`."""
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    text = f"# What ops cost on the CPU\n\nMade by `python benchmarks/op_overhead.py`; {about}.\n\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "op_overhead.md").write_text(f"{text}{head.rstrip()}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
