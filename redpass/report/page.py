"""The HTML report: one self-contained page, drawn from the record alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from redpass.errors import clean
from redpass.record import RunRecord
from redpass.report import figures, rows
from redpass.report.bars import bar_charts
from redpass.report.curves import line_charts
from redpass.report.heatmap import heat_map

if TYPE_CHECKING:
    from jinja2 import Environment


def render(record: RunRecord) -> str:
    """Returns the page. Text that comes from a model is escaped; nothing is loaded from outside."""
    gone = rows.removed(record)
    words, tone = rows.verdict(record)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            record=record,
            verdict=words,
            tone=tone,
            table=rows.before_after(record),
            tiles=rows.headline(record),
            maps=[heat_map(matrix, gone) for matrix in record.matrices],
            bars=bar_charts(record),
            curves=line_charts(record.curves),
            done=rows.action_groups(record),
            skipped=rows.skip_groups(record),
            slowest=max((item.seconds for item in record.passes), default=0.0),
            rows=rows,
            figures=figures,
        )
    )


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("redpass.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = clean
    return environment
