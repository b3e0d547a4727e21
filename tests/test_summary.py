"""From measurements to the tables and maps of a record."""

from __future__ import annotations

import math

import pytest

from redpass import Program, Splits
from redpass.data import Batches
from redpass.facts import Facts
from redpass.summary import (
    branch_records,
    layer_records,
    layers_within,
    matrices,
    measured_redundancy,
)

LAYERS = [f"layers.{number}" for number in range(12)]
SIZES = {"batch": 1, "seq": 8}


@pytest.mark.parametrize(
    ("places", "gone"),
    [
        ({"layers.1"}, {1}),
        ({"layers.9-11"}, {9, 10, 11}),
        ({"layers.2", "layers.4-5"}, {2, 4, 5}),
        ({"layers.1.attention", "other.3-4", "layers.3-99"}, set()),
        (set(), set()),
    ],
)
def test_layers_of_a_span_are_within_it(places: set[str], gone: set[int]) -> None:
    assert layers_within(LAYERS, places) == {f"layers.{number}" for number in gone}


def test_layers_of_one_of_two_streams() -> None:
    labels = [f"stream{stream}.layers.{number}" for stream in (0, 1) for number in range(3)]
    assert layers_within(labels, {"stream1.layers.0-1"}) == set(labels[3:5])


def test_dropped_layers_spans_and_branches_are_marked(residual: Program) -> None:
    branch = "layers.0.feed-forward"
    rows = branch_records(residual, SIZES, None, {branch, "layers.2-3"})
    assert [row.outcome for row in rows] == ["dropped", "kept", "dropped", "dropped"]
    layers = layer_records(residual, rows, None)
    assert [layer.outcome for layer in layers] == ["dropped", "kept", "dropped", "dropped"]
    assert layers[0].branches == [branch]
    assert layers[0].parameters == rows[0].parameters > 0
    assert layers[0].influence is None


def test_without_data_nothing_is_measured(residual: Program) -> None:
    assert measured_redundancy(Facts(residual)) is None
    assert matrices(None) == []


def test_maps_hold_what_was_measured(residual: Program, residual_data: Splits) -> None:
    measured = measured_redundancy(Facts(residual, residual_data.calibration))
    assert measured is not None
    stream, cka, spans = matrices(measured)
    assert len(stream.labels) == len(cka.labels) == 5
    assert spans.columns == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert spans.labels == ["1", "2", "3", "4"]
    assert spans.values[1][2] == measured.distance.distances[2][1]
    assert spans.values[1][3] is None
    known = [value for row in spans.values for value in row if value is not None]
    assert (spans.low, spans.high) == (min(known), max(known))


def test_too_few_tokens_leave_out_the_map_that_needs_more(residual: Program) -> None:
    import torch

    one = Batches(({"x": torch.ones(1, 1, 8)},))
    measured = measured_redundancy(Facts(residual, one))
    assert measured is not None
    assert len(matrices(measured)) == 2
    assert all(math.isfinite(value) for value in measured.influence.layers.values())
    rows = branch_records(residual, SIZES, measured)
    assert [row.entropy for row in rows] == [None] * 4
