"""Reports as tables in a terminal. Names that come from a model are cleaned, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from redpass.errors import clean
from redpass.record import (
    ActionRecord,
    BranchRecord,
    CostRecord,
    LatencyRecord,
    LayerRecord,
    Matrix,
    PassRecord,
    RunRecord,
)
from redpass.report import figures, rows
from redpass.report.heatmap import LEVELS, colors, levels

if TYPE_CHECKING:
    from redpass.analysis.inspection import Inspection

STYLES = {"good": "green", "bad": "red", "warn": "yellow", "plain": ""}
MOST_PLACES = 40
SHADES = " ░▒▓█"


def run_summary(record: RunRecord) -> RenderableType:
    """Returns what a run did: the verdict, the before/after table, the approximate actions."""
    words, tone = rows.verdict(record)
    head = Text.assemble((words, f"bold {STYLES[tone]}"), ". ", rows.summary(record))
    if record.verdict == "dry run":
        return Parts(head, "", costs(record.before), "", places(record))
    return Parts(head, "", before_after(record), *_lossy(record))


def before_after(record: RunRecord) -> Table:
    """Returns the before/after table."""
    table = _table("", "before", "after", "change", "", right=(1, 2, 3))
    for row in rows.before_after(record):
        change = Text(row.change, STYLES[row.tone])
        table.add_row(clean(row.name, 60), row.before, row.after, change, Text(row.note, "dim"))
    return table


def branches(records: Sequence[BranchRecord]) -> Table:
    """Returns the per-branch table, with the similarity where it was measured."""
    measured = any(record.similarity is not None for record in records)
    figured = any(record.entropy is not None for record in records)
    names = ["branch", "kind", "parameters", "FLOPs", *(["similarity", ""] if measured else [])]
    table = _table(*names, *(["entropy"] if figured else []), right=(2, 3, 4, 6))
    for record in records:
        cells: list[RenderableType] = [
            Text(clean(record.label, 80), "" if record.outcome == "kept" else "strike red"),
            record.kind,
            figures.count(record.parameters),
            figures.count(record.flops),
        ]
        if measured:
            cells += [figures.plain(record.similarity), _bar(record.similarity)]
        cells += [figures.plain(record.entropy)] if figured else []
        table.add_row(*cells)
    return table


def layers(records: Sequence[LayerRecord]) -> Table:
    """Returns the per-layer table, with the columns that hold figures."""
    columns: dict[str, list[float | None]] = {
        "block influence": [record.influence for record in records],
        "macro influence": [record.macro_influence for record in records],
        "entropy, nats": [record.entropy for record in records],
    }
    known = {k: found for k, found in columns.items() if any(v is not None for v in found)}
    table = _table("layer", "parameters", "FLOPs", *known, right=range(1, 6))
    for place, record in enumerate(records):
        table.add_row(
            Text(clean(record.label, 80), "strike red" if record.outcome == "dropped" else ""),
            figures.count(record.parameters),
            figures.count(record.flops),
            *(figures.plain(found[place]) for found in known.values()),
        )
    return table


def costs(record: CostRecord) -> Table:
    """Returns what a model costs, one line a figure."""
    table = weighed(record)
    table.add_row("graph nodes", str(record.nodes), "")
    return table


def weighed(record: CostRecord | Inspection) -> Table:
    """Returns a table of weights, work and cache, for more lines to follow."""
    sizes = ", ".join(f"{name} {value}" for name, value in record.sizes.items())
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row("parameters", figures.count(record.parameters), "")
    table.add_row("weights", figures.size(record.bytes), "")
    table.add_row("FLOPs", figures.count(record.flops), Text(sizes, "dim"))
    if record.kv_bytes_per_token:
        table.add_row("KV cache", figures.size(record.kv_bytes_per_token), Text("per token", "dim"))
    return table


def matrix(data: Matrix, *, color: bool = True) -> RenderableType:
    """Returns a heat map of two characters a cell.

    Args:
        color: whether the terminal has colours; shades stand for them where it has none.
    """
    axes = f"; down: {data.y_title}, across: {data.x_title}" if data.x_title else ""
    lines = [Text(clean(f"{data.title}{axes}"), "dim")]
    for label, row in zip(data.labels, levels(data), strict=True):
        line = Text()
        for level in row:
            line.append_text(_cell(level, data.alike, color))
        name = clean(label.removeprefix("after "), 40)
        lines.append(line.append(f" {name}", "dim"))
    scale = Text(f"{figures.plain(data.low, 3)} ")
    for level in range(LEVELS):
        scale.append_text(_cell(level, data.alike, color))
    lines.append(scale.append(f" {figures.plain(data.high, 3)}\n"))
    return Parts(*lines)


def passes(records: Iterable[PassRecord]) -> Table:
    """Returns one line a pass that was run."""
    table = _table(
        "pass", "promise", "applied", "skipped", "nodes", "time", "check", right=(2, 3, 4, 5)
    )
    for record in records:
        table.add_row(
            clean(record.spec, 60),
            record.exactness,
            str(record.applied),
            str(record.skipped),
            f"{record.nodes[0]} → {record.nodes[1]}",
            figures.seconds(record.seconds),
            Text(record.state, "dim"),
        )
    return table


def latency(records: Iterable[LatencyRecord], machine: Mapping[str, str]) -> RenderableType:
    """Returns the comparison of two models' speed, and the machine it was measured on."""
    names = ("runner", "sizes", "original", "optimized", "ratio", "quartiles")
    table = _table(*names, right=(2, 3, 4, 5))
    for item in records:
        if item.failure:
            table.add_row(item.runner, item.sizes, "", "", "", Text(clean(item.failure), "yellow"))
            continue
        low, high = item.spread
        style = STYLES["good" if high < 1 else "bad" if low > 1 else "plain"]
        table.add_row(
            item.runner,
            item.sizes,
            figures.milliseconds(item.original_ms),
            figures.milliseconds(item.optimized_ms),
            Text(f"{item.ratio:.3f}", style),
            Text(f"{low:.3f} to {high:.3f}", "dim"),
        )
    words = ", ".join(f"{name} {clean(value, 60)}" for name, value in machine.items())
    return Parts(table, Text(words, "dim"))


def pass_list(described: Iterable[Mapping[str, Any]]) -> Table:
    """Returns one line a pass that could be run."""
    table = _table("pass", "promise", "runs", "removes", "options")
    for item in described:
        options = ", ".join(f"{name}={value}" for name, value in item["options"].items())
        name = Text(item["name"], "bold")
        promise, runs = item["exactness"], item["runs"]
        table.add_row(name, promise, runs, item["removes"], Text(options, "dim"))
    return table


def places(record: RunRecord, place: str = "") -> RenderableType:
    """Returns every place that was looked at, what became of it and why.

    Args:
        place: only places whose name contains this; without it long groups are cut.
    """
    parts: list[RenderableType] = []
    for group in rows.action_groups(record):
        chosen = [a for a in group.actions if place in a.target or place in a.key]
        if chosen:
            head = _group_head(group, len(chosen))
            lines = [(a.target, *_why(a)) for a in chosen]
            parts += [head, _lines(lines, cut=not place), ""]
    for group in rows.skip_groups(record):
        found = [s for s in group.skips if place in s.target]
        if found:
            shown = [(s.target, s.reason, "") for s in found]
            parts += [_group_head(group, len(found)), _lines(shown, cut=not place), ""]
    return Parts(*parts[:-1])


def _group_head(group: rows.Group, count: int) -> Text:
    rule = group.skips[0].rule if group.skips else group.title
    style = f"bold {STYLES[group.tone]}"
    return Text.assemble((group.outcome, style), f" {count} x ", (clean(rule, 80), "bold"))


def _why(action: ActionRecord) -> tuple[str, str]:
    """What decided about an action, and what else is known: for what was done, its reason."""
    known = "; ".join(part for part in (action.reason, rows.evidence(action)) if part)
    is_done = action.outcome in ("applied", "planned") or not action.why
    return (known, action.why) if is_done else (action.why, known)


def _lines(found: list[tuple[str, str, str]], *, cut: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for target, decisive, known in found[: MOST_PLACES if cut else None]:
        why = Text(clean(decisive, 400))
        if known:
            why.append(f"\n{clean(known, 400)}", "dim")
        table.add_row(Text(f"  {clean(target, 80)}"), why)
    if cut and len(found) > MOST_PLACES:
        table.add_row(Text(f"  and {len(found) - MOST_PLACES} more", "dim"), "")
    return table


def _lossy(record: RunRecord) -> list[RenderableType]:
    """The approximate actions that were applied: what cost quality, and what repaired it."""
    parts: list[RenderableType] = []
    lossy = {item.name for item in record.passes if item.exactness == "approximate"}
    for group in rows.action_groups(record):
        if group.pass_name in lossy and group.outcome == "applied":
            is_repair = not group.actions[0].saving
            names = rows.shown((action.target for action in group.actions), 12)
            said = clean(group.actions[0].why, 400) if is_repair else names
            parts.append(Text.assemble((f"{group.title}: ", "bold"), said))
    return ["", *parts] if parts else []


def _bar(share: float | None, width: int = 8) -> Text:
    if share is None or share != share:
        return Text("")
    full = round(max(0.0, min(1.0, share)) * width)
    return Text.assemble(("━" * full, "blue"), ("┄" * (width - full), "dim"))


def _cell(level: int, alike: str, color: bool) -> Text:
    if level < 0:
        return Text("  ")
    if color:
        return Text("██", colors(alike)[level])
    shown = level if alike == "high" else LEVELS - 1 - level
    return Text(2 * SHADES[shown * len(SHADES) // LEVELS])


def _table(*names: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for index, name in enumerate(names):
        side: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(name, justify=side, no_wrap=index == 0)  # names stay whole
    return table
