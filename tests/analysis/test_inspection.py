"""What `redpass inspect` shows, as data."""

from __future__ import annotations

import json

import pytest
from zoo import load

from redpass.analysis import cost, inspection


def test_rows_of_llama() -> None:
    shown = inspection(load("llama"), {"batch": 2, "seq": 16})
    assert [row.label for row in shown.rows] == [
        "layers.0.attention", "layers.0.feed-forward",
        "layers.1.attention", "layers.1.feed-forward",
    ]  # fmt: skip
    attention, feed_forward = shown.rows[:2]
    assert (attention.attention, attention.heads, attention.kv_heads) == ("GQA", 4, 2)
    assert attention.details == ("rotary", "causal")
    assert attention.kv_bytes_per_token == 2 * 2 * 8 * 4
    assert (feed_forward.width, feed_forward.activation) == (64, "silu")
    assert feed_forward.details == ("gated",)
    assert shown.sizes == {"batch": 2, "seq": 16, "past": 0}
    assert (shown.layers, shown.rows[2].equal_to) == (2, 0)
    assert shown.coupling_groups == {"stream": 1, "heads": 2, "inner": 2}
    assert shown.inputs[0] == "input_ids:int64[batch,seq]"
    assert len(shown.state) == 4


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_totals_are_rows_and_rest(name: str) -> None:
    program = load(name)
    shown = inspection(program)
    counted = cost(program)
    assert shown.parameters == sum(row.parameters for row in shown.rows) + shown.rest["parameters"]
    assert shown.flops == sum(row.flops for row in shown.rows) + shown.rest["flops"]
    assert shown.bytes == counted.bytes
    assert shown.kv_bytes_per_token == sum(row.kv_bytes_per_token for row in shown.rows)


def test_experts_are_described() -> None:
    row = inspection(load("mixtral")).rows[1]
    assert (row.kind, row.width, row.activation) == ("experts", 64, "silu")
    assert row.details == ("top 2 of 4",)


def test_json_round_trip() -> None:
    plain = inspection(load("llama")).to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rows"][0]["details"] == ["rotary", "causal"]
    assert plain["dims"]["seq"] == [1, None]
