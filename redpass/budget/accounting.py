"""What a program costs, as one record, at stated sizes."""

from __future__ import annotations

from redpass.analysis.cost import total_cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.program import Program
from redpass.record import CostRecord


def usual_sizes(program: Program) -> dict[str, int]:
    """Returns one size per named dimension: the usual one, else the smallest that is allowed."""
    return {
        name: min(max(DEFAULT_SIZES.get(name, 8), low), high if high is not None else 1 << 30)
        for name, (low, high) in program.signature.dims.items()
    }


def cost_record(program: Program, sizes: dict[str, int], file_bytes: int = 0) -> CostRecord:
    """Returns the counted costs of `program`, FLOPs at `sizes`."""
    found = total_cost(program)
    known = {name: sizes[name] for name in program.signature.dims if name in sizes}
    return CostRecord(
        parameters=found.parameters,
        bytes=found.bytes,
        flops=float(found.flops(known)),
        sizes=dict(sizes),
        kv_bytes_per_token=found.kv_bytes_per_token,
        nodes=len(program.graph.nodes),
        file_bytes=file_bytes,
    )
