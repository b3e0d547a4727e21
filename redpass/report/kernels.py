"""What `redpass emit` shows: the kernels written, what they use, the places left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from redpass.errors import clean

if TYPE_CHECKING:
    from redpass.codegen.emit import Emitted
    from redpass.codegen.folder import Built
    from redpass.plan import Skip


def emitted(
    files: Sequence[Emitted], built: Sequence[Built], skips: Sequence[Skip]
) -> Iterator[RenderableType]:
    """Yields the parts of what is shown."""
    if not files:
        yield "no hot path was found: nothing in this graph has a kernel"
    else:
        yield _files(files)
    if built:
        yield _usage(built)
    if skips:
        yield _skips(skips)


def _files(files: Sequence[Emitted]) -> Table:
    table = Table(title="kernels", title_justify="left")
    for name in ("file", "op", "places", "epilogue"):
        table.add_column(name)
    for file in files:
        tail = "; ".join(line.partition(" = ")[2] for line in file.tail)
        table.add_row(f"{file.name}.py", file.op, str(len(file.places)), clean(tail, 60))
    return table


def _usage(built: Sequence[Built]) -> Table:
    table = Table(title="compiled ahead of time", title_justify="left")
    for name in ("kernel", "for", "target"):
        table.add_column(name)
    for name in ("registers", "spilled bytes", "shared bytes"):
        table.add_column(name, justify="right")
    for item in built:
        report = item.report
        figures = (report.registers, report.spills, report.shared)
        table.add_row(report.kernel, item.sample, report.target, *map(str, figures))
    return table


def _skips(skips: Sequence[Skip]) -> Table:
    table = Table(title="left out", title_justify="left")
    for name in ("place", "rule", "reason"):
        table.add_column(name)
    for skip in skips:
        table.add_row(clean(skip.target, 40), skip.rule, clean(skip.reason, 100))
    return table
