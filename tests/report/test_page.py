"""The HTML report: complete, self-contained, and safe against any name a model may carry."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from sample import DROPPED, hostile, sample

from redpass.record import CostRecord, Curve, CurvePoint, RunRecord
from redpass.report import rows
from redpass.report.curves import line_charts
from redpass.report.page import render

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and whether the tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return sample()


@pytest.fixture(scope="module")
def page(record: RunRecord) -> Page:
    return Page(render(record))


def test_every_section_is_there(page: Page) -> None:
    for text in (
        "budget met", "Before and after", "Where the redundancy is", "Branches",
        "What was done, and why", "What was skipped, and why", "Passes", "Where it came from",
    ):  # fmt: skip
        assert text in page.text


def test_every_figure_of_the_table_is_there(page: Page) -> None:
    figures = ["22.7 M", "20.9 M", "-7.8%", "5.44 G", "91.0 MB", "14.2 ms", "-20.4%"]
    notes = ["quartiles 0.788 to 0.806", "0.9843 ± 0.0011", "no C++ compiler was found"]
    for text in figures + notes:
        assert text in page.text


def test_every_action_and_skip_is_there(page: Page, record: RunRecord) -> None:
    for action in record.actions:
        assert action.target in page.text
        assert action.reason in page.text
    for skip in record.skips:
        assert skip.target in page.text
    assert "5e" * 32 in page.text
    assert record.command in page.text


def test_map_has_a_cell_a_pair_and_marks_what_was_removed(record: RunRecord) -> None:
    side = len(record.matrices[0].labels)
    page = Page(render(dataclasses.replace(record, matrices=record.matrices[:1], curves=[])))
    paths = [attributes for tag, attributes in page.elements if tag == "path"]
    assert sum("fill" in attributes for attributes in paths) == side * side
    assert sum(attributes.get("class") == "edge" for attributes in paths) == 2 * len(DROPPED)
    marked = [a for tag, a in page.elements if tag == "text" and a.get("class") == "gone"]
    assert len(marked) == 2 * len(DROPPED)
    assert "layers.3.attention / layers.2.feed-forward: " in page.text


def test_large_map_stays_small() -> None:
    text = render(sample(layers=64))
    assert Page(text).count("path") < 130
    assert len(text) < 300_000


def test_page_asks_for_nothing_from_outside(record: RunRecord) -> None:
    text = render(record)
    assert not re.findall(r"(?:src|href|@import|url\(|https?:)", text)
    assert "<script" not in text


def test_hostile_names_stay_text() -> None:
    text = render(hostile())
    page = Page(text)
    assert page.count("script") == 0
    assert "&lt;script&gt;alert(1)" in text
    assert "\x1b" not in text


def test_both_themes_and_print_have_colours(record: RunRecord) -> None:
    text = render(record)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


@pytest.mark.parametrize("verdict", rows.VERDICTS)
def test_every_verdict_has_words(record: RunRecord, verdict: str) -> None:
    page = Page(render(dataclasses.replace(record, verdict=verdict)))
    assert rows.VERDICTS[verdict][0] in page.text


def test_record_with_nothing_in_it() -> None:
    nothing = CostRecord(0, 0, 0.0, {}, 0, 0)
    record = dataclasses.replace(
        sample(), verdict="no budget", before=nothing, after=nothing, passes=[], actions=[],
        skips=[], quality=[], branches=[], matrices=[], latency=[], notes=[], machine={},
        layers=[], curves=[],
        command="", data="", data_digest="", model_digest="", budget="",
    )  # fmt: skip
    page = Page(render(record))
    assert "measured, nothing changed" in page.text
    for part in ("Before and after", "What was done", "Where the redundancy is", "Quality against"):
        assert part not in page.text
    idle = dataclasses.replace(record, passes=sample().passes)
    assert "no pass found anything to change" in Page(render(idle)).text


def test_figures_that_were_not_measured_are_not_numbers() -> None:
    record = sample()
    quality = [dataclasses.replace(q, stderr=None, value=float("nan")) for q in record.quality]
    values = [[None] * 25] * 25
    matrix = dataclasses.replace(record.matrices[0], values=values)
    layers = [dataclasses.replace(layer, influence=None) for layer in record.layers]
    curves = [
        dataclasses.replace(c, points=[CurvePoint(0.1, float("nan")), CurvePoint(0.2, 4.0, None)])
        for c in record.curves
    ]
    text = render(
        dataclasses.replace(
            record, quality=quality, matrices=[matrix], layers=layers, curves=curves
        )
    )
    assert "nan" not in Page(text).text
    assert "None" not in Page(text).text


def test_bars_and_curves_tell_their_figures_and_units(page: Page, record: RunRecord) -> None:
    assert "Influence of layers" in page.text
    assert "Influence of branches" in page.text
    assert "layers.4, block influence: 0.05" in page.text
    assert "layers.4, attention: " in page.text
    axes = ("parameters removed, %", "perplexity, lower is better (log scale)", "1,000")
    for text in ("Perplexity against parameters removed", *axes):
        assert text in page.text
    point = record.curves[2].points[1]
    words = f"{point.quality:.5g} ± {point.stderr:.2g} at 8.0% of parameters removed, step 1"
    assert f"block influence, one-shot: {words}" in page.text
    for curve in record.curves:
        assert page.text.count(curve.method) >= len(curve.points)


def test_map_of_spans_names_its_axes_and_leaves_out_what_there_is_not(record: RunRecord) -> None:
    spans = next(m for m in record.matrices if m.columns)
    page = Page(render(dataclasses.replace(record, matrices=[spans], curves=[])))
    known = sum(value is not None for row in spans.values for value in row)
    assert known < len(spans.labels) * len(spans.columns)
    paths = [attributes for tag, attributes in page.elements if tag == "path"]
    assert sum("fill" in attributes for attributes in paths) == known
    for text in ("layers in the span", "first layer of the span", "3 layers in the span / from "):
        assert text in page.text


def test_dropped_layers_are_struck_through(record: RunRecord) -> None:
    layers = [dataclasses.replace(record.layers[0], outcome="dropped"), *record.layers[1:]]
    page = Page(render(dataclasses.replace(record, layers=layers, branches=[])))
    rows = [a for tag, a in page.elements if tag == "tr" and a.get("class") == "gone"]
    assert len(rows) == 1
    assert [a for tag, a in page.elements if tag == "text" and a.get("class") == "gone"]


def test_what_was_removed_is_on_an_even_axis_however_small_the_first_step() -> None:
    points = [CurvePoint(removed, 1e-6 + removed, 0.0) for removed in (0.0, 0.002, 0.7)]
    [chart] = line_charts([Curve("greedy", "kl", "lower", points, "parameters")])
    assert [tick.text for tick in chart.columns] == ["0", "20", "40", "60", "80"]
    assert "log" in chart.y_title
