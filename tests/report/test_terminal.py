"""Tables in a terminal: nothing is cut that matters, and no name is markup or control code."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from sample import DROPPED, hostile, sample

from redpass.record import ActionRecord
from redpass.report import terminal


def drawn(part: RenderableType, width: int = 80, color: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=color, markup=False, highlight=False,
        color_system="truecolor" if color else None,
    )  # fmt: skip
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_summary_tells_verdict_figures_and_what_went() -> None:
    text = drawn(terminal.run_summary(sample()))
    for part in ("budget met", "-16.9%", "0.9843 ± 0.0011", *DROPPED):
        assert part in text


def test_what_a_repair_brought_stands_below_what_went() -> None:
    why = "cosine 0.9701 without, 0.9843 with it on choosing data"
    record = sample()
    repaired = ActionRecord(
        99, "refit_projections.ridge:stream", "refit_projections", "stream", "9 projections fitted "
        "anew", "applied", why,
    )  # fmt: skip
    ran = replace(record.passes[-1], name="refit_projections", spec="refit_projections")
    record = replace(record, actions=[*record.actions, repaired], passes=[*record.passes, ran])
    lines = drawn(terminal.run_summary(record), 140).splitlines()
    (line,) = (line for line in lines if "refit_projections.ridge" in line)
    assert why in line
    assert "drop_noops" not in lines[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_tables_fit_every_width(width: int) -> None:
    record = sample()
    parts = (
        terminal.before_after(record),
        terminal.branches(record.branches),
        terminal.passes(record.passes),
    )
    for part in parts:
        assert max(map(len, drawn(part, width).splitlines())) <= width


def test_names_stay_whole_in_80_columns() -> None:
    record = sample()
    text = drawn(terminal.branches(record.branches))
    for branch in record.branches:
        assert branch.label in text


def test_map_with_and_without_colours() -> None:
    data = sample(2).matrices[0]
    plain = drawn(terminal.matrix(data, color=False), 100)
    assert "\x1b" not in plain
    assert len({*plain} & {*terminal.SHADES}) > 2, "without colours shades tell the figures apart"
    assert "38;2;" in drawn(terminal.matrix(data), 100, color=True)


def test_layers_show_the_columns_that_were_measured() -> None:
    layers = sample().layers
    whole = drawn(terminal.layers(layers), 100)
    assert "macro influence" in whole
    assert "0.4002" in whole
    partly = [replace(layer, macro_influence=None) for layer in layers]
    assert "macro influence" not in drawn(terminal.layers(partly), 100)
    assert "block influence" in drawn(terminal.layers(partly), 100)


def test_map_of_distances_is_dense_where_parts_are_alike() -> None:
    spans = next(m for m in sample().matrices if m.alike == "low")
    lines = drawn(terminal.matrix(spans, color=False), 100).splitlines()
    assert "down: layers in the span, across: first layer of the span" in lines[0]
    dense = [sum(map(terminal.SHADES.index, line[:24])) for line in lines[1:13]]
    assert dense[0] > dense[-1] > 0
    assert lines[12][2:24].strip() == ""


def test_place_chooses_what_is_told() -> None:
    text = drawn(terminal.places(sample(), "layers.7"), 200)
    assert "layers.7.attention" in text
    assert "applied" in text
    assert "layers.8" not in text
    low = drawn(terminal.places(sample(), "layers.0"), 200)
    assert "similarity 0.7200 is below 0.8" in low


def test_hostile_names_draw_nothing_on_the_terminal() -> None:
    record = hostile()
    tables = [terminal.run_summary(record), terminal.branches(record.branches)]
    for part in (*tables, terminal.places(record), terminal.matrix(record.matrices[0])):
        assert "\x1b" not in drawn(part, 200)


def test_latency_tells_ratio_and_failure() -> None:
    record = sample()
    text = drawn(terminal.latency(record.latency, record.machine), 120)
    for part in ("0.796", "0.788 to 0.806", "no C++ compiler was found", "torch 2.13.0"):
        assert part in text
