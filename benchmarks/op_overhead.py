"""What a `redpass::` op costs on the CPU beside the ATen operators it stands for.

    python benchmarks/op_overhead.py

Each op is timed in turn with the chain of ATen calls that a traced model has in its place: process
time, one thread, the median of alternating runs. Below 1.03 it costs nothing that matters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from redpass.codegen import ops

SHAPES = ((1, 1), (1, 128), (4, 512))
"""(batch, positions)."""

Case = tuple[str, Callable[[], Any], Callable[[], Any]]


def cases(batch: int, length: int) -> list[Case]:
    """Returns (name, the op, what it replaces) at GPT-2's width."""
    torch.manual_seed(0)
    width, heads, head, wide, rank = 768, 12, 64, 2048, 192
    x, y = torch.randn(batch, length, width), torch.randn(batch, length, width)
    weight = torch.randn(width)
    gate, up = torch.randn(wide, width), torch.randn(wide, width)
    low, high = torch.randn(rank, width), torch.randn(width, rank)
    q = torch.randn(batch, length, heads, head).transpose(1, 2)
    k, v = torch.randn_like(q), torch.randn_like(q)
    table = torch.randn(1, length, head)
    clusters = [index // 2 for index in range(heads)]
    past = torch.randn(batch, heads, 512, head)
    call = torch.ops.redpass

    def norm() -> Any:
        total = x + y
        return total, functional.rms_norm(total, (width,), weight, 1e-5)

    def turn(t: torch.Tensor) -> torch.Tensor:
        half = head // 2
        turned = torch.cat((-t[..., half:], t[..., :half]), -1)
        return t * table.unsqueeze(1) + turned * table.unsqueeze(1)

    def attend(queries: torch.Tensor, keys: torch.Tensor) -> Any:
        return functional.scaled_dot_product_attention(queries, keys, keys)

    one = q[:, :, :1].contiguous()
    few = [t[:, ::2].contiguous() for t in (q, k, one, past)]
    return [
        ("add_norm", lambda: call.add_norm(x, y, weight, None, 1e-5, "rms"), norm),
        ("rotary", lambda: call.rotary(q, k, table, table, False), lambda: (turn(q), turn(k))),
        (
            "gated_feed_forward",
            lambda: call.gated_feed_forward(x, gate, up, None, None, "silu"),
            lambda: functional.silu(functional.linear(x, gate)) * functional.linear(x, up),
        ),
        (
            "low_rank_linear",
            lambda: call.low_rank_linear(x, low, high, weight, "none"),
            lambda: functional.linear(functional.linear(x, low), high, weight),
        ),
        (
            "clustered_attention, all heads apart",
            lambda: call.clustered_attention(
                q, k, v, list(range(heads)), [], [], None, False, 0, None
            ),
            lambda: functional.scaled_dot_product_attention(q, k, v),
        ),
        (
            "clustered_attention, clusters of 2",
            lambda: call.clustered_attention(
                few[0], few[1], v, clusters, [], [], None, False, 0, None
            ),
            lambda: functional.scaled_dot_product_attention(q, k, v),
        ),
        (
            "clustered_attention, clusters of 2, one token on 512",
            lambda: call.clustered_attention(
                few[2], few[3], past, clusters, [], [], None, False, 0, None
            ),
            lambda: attend(one, past),
        ),
    ]


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of `theirs`, and those of `ours` over them."""
    count = max(1, int(0.01 / max(1e-7, seconds(theirs, 3))))
    pairs = [(seconds(ours, count), seconds(theirs, count)) for _ in range(15)]
    return statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def seconds(function: Callable[[], Any], count: int) -> float:
    """Process time of one call."""
    start = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - start) / count


@torch.inference_mode()
def main() -> None:
    """Prints one line for each op and shape."""
    torch.set_num_threads(1)
    ops.register()
    print(f"{'op':54} {'batch x positions':>18} {'ATen, us':>10} {'ratio':>6}")
    for batch, length in SHAPES:
        for name, ours, theirs in cases(batch, length):
            base, found = ratio(ours, theirs)
            print(f"{name:54} {f'{batch} x {length}':>18} {1e6 * base:10.1f} {found:6.2f}")


if __name__ == "__main__":
    main()
