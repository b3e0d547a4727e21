"""What `redpass inspect` shows in a terminal: totals, ports, and a line a kind of branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from redpass.errors import clean
from redpass.report import figures, rows
from redpass.report.terminal import weighed

if TYPE_CHECKING:
    from redpass.analysis.inspection import Inspection, Row


def tables(found: Inspection) -> RenderableType:
    """Returns the whole view; equal layers in a row are shown once."""
    title = Text.assemble((clean(found.source), "bold"), f"  {clean(found.task)}")
    parts: list[RenderableType] = [title, "", _totals(found), "", *_ports(found)]
    if found.rows:
        parts += ["", _branches(found)]
    parts += [Text.assemble(("note ", "yellow"), clean(note, 400)) for note in found.notes]
    return Group(*parts)


def _totals(found: Inspection) -> Table:
    table = weighed(found)
    table.add_row("layers", str(found.layers), "")
    table.add_row("graph nodes", str(found.nodes), "")
    return table


def _ports(found: Inspection) -> Iterator[Text]:
    state = {name for pair in found.state for name in pair}
    for head, ports in (("in", found.inputs), ("out", found.outputs)):
        plain = [clean(port) for port in ports if port.partition(":")[0] not in state]
        yield Text(f"{head:4}{', '.join(plain)}")
    if found.state:
        names = [f"{entry} → {leave}" for entry, leave in found.state]
        yield Text(f"    and {len(names)} cache pairs: {rows.shown(names, 1)}")
    if found.dims:
        yield Text("    with " + ", ".join(_span(*item) for item in found.dims.items()), "dim")


def _branches(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    cached = bool(found.kv_bytes_per_token)
    table.add_column("layers", no_wrap=True)
    table.add_column("branch", no_wrap=True)
    table.add_column("what")
    for name in ("parameters", "FLOPs", *(["KV/token"] if cached else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for span, members in _runs(found.rows):
        for row in members:
            cells = [figures.count(row.parameters), figures.count(row.flops)]
            cells += [figures.size(row.kv_bytes_per_token)] if cached else []
            table.add_row(span, clean(row.label, 60), _words(row), *cells)
    rest = found.rest
    cells = [figures.count(rest["parameters"]), figures.count(rest["flops"])]
    table.add_row("", Text("rest", "dim"), Text("embeddings, heads, norms", "dim"), *cells)
    return table


def _runs(found: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yields, for each run of layers with equal graphs, the layers and the rows of the first."""
    layers = [list(members) for _, members in groupby(found, key=lambda row: row.layer)]
    for _, run in groupby(layers, key=lambda members: members[0].equal_to):
        equal = list(run)
        first, last = equal[0][0].layer, equal[-1][0].layer
        yield (f"{first}" if first == last else f"{first}-{last}"), equal[0]


def _words(row: Row) -> str:
    parts = [] if row.kind in row.label else [row.kind]
    if row.heads:
        heads = f"{row.heads}" if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}"
        parts.append(f"{row.attention} {heads} x {row.head_dim}")
    if row.width:
        parts.append(f"{row.activation} {row.width}")
    return ", ".join((*parts, *row.details))


def _span(name: str, bounds: tuple[int, int | None]) -> str:
    low, high = bounds
    text = f"{low} or more" if high is None else f"{low} to {high}"
    return f"{clean(name, 40)} {text}"
