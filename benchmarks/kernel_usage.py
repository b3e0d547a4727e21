"""Registers, spills and shared memory of every kernel, compiled without a GPU.

    python benchmarks/kernel_usage.py [--all]

Writes `benchmarks/results/kernel_usage.md`: the default config of each op at its first sample size,
or with `--all` all configs at all sizes, for each dtype and target.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from redpass.codegen import aot
from redpass.codegen.ops import OPS, Config, Op
from redpass.codegen.ops.op import DTYPES, Arguments, compiling_for

TARGETS = ("sm_80", "sm_90")
HEADER = """# What kernels use

Compiled ahead of time by Triton {version}, no GPU: `python benchmarks/kernel_usage.py{all}`. Shared
memory and spills in bytes; a card has 166912 (sm_80) and 232448 (sm_90) of shared memory a block.

| op | size | dtype | target | kernel | blocks, warps, stages | registers | spills | shared |
|---|---|---|---|---|---|---|---|---|
"""


def rows(name: str, op: Op, everything: bool, cache: Path) -> Iterator[str]:
    """Yields a line of the table for each kernel that is launched."""
    for dtype in DTYPES:
        samples = list(op.samples(dtype))
        for label, arguments in samples if everything else samples[:1]:
            for target in TARGETS:
                with compiling_for(aot.TARGETS[target]):
                    configs = op.configs(*arguments)
                for config in configs if everything else configs[:1]:
                    kind = str(dtype).removeprefix("torch.")
                    for line in used(op, arguments, target, cache, config):
                        yield f"| {name} | {label} | {kind} | {target} | {line} |\n"


def used(op: Op, arguments: Arguments, target: str, cache: Path, config: Config) -> Iterator[str]:
    blocks = ", ".join(f"{key} {value}" for key, value in config.blocks)
    blocks = f"{blocks}; {config.warps}, {config.stages}"
    for report in aot.build(op, arguments, target, cache, config):
        numbers = f"{report.registers} | {report.spills} | {report.shared}"
        yield f"`{report.kernel}` | {blocks} | {numbers}"


def main() -> None:
    everything = "--all" in sys.argv[1:]
    text = HEADER.format(version=triton.__version__, all=" --all" if everything else "")
    with tempfile.TemporaryDirectory() as folder:
        for name, op in OPS.items():
            text += "".join(rows(name, op, everything, Path(folder)))
            print(name, flush=True)
    target = Path(__file__).parent / "results" / "kernel_usage.md"
    target.write_text(text)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
