"""What an ONNX file looks like: names, sizes, weights, operators; and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from redpass.errors import ExportError, UsageError
from redpass.export import to_onnx, write
from redpass.export.onnx import build
from redpass.program import Program
from redpass.runtime import OnnxModel
from redpass.verify.inputs import random_inputs
from tests.export.conftest import program_of


@pytest.fixture(scope="module")
def llama_file(llama: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    to_onnx(llama, path)
    return path


def operators(program: Program, opset: int = 23) -> Counter[str]:
    return Counter(node.op_type for node in build(program, opset).graph)


def test_names_and_sizes_are_those_of_the_signature(llama: Program, llama_file: Path) -> None:
    graph = onnx.load(llama_file).graph
    for ports, values in (
        (llama.signature.inputs, graph.input),
        (llama.signature.outputs, graph.output),
    ):
        assert [value.name for value in values] == [port.name for port in ports]
        for port, value in zip(ports, values, strict=True):
            sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert tuple(sizes) == port.shape


def test_every_name_of_a_cache_keeps_its_dots(llama_file: Path) -> None:
    model = OnnxModel(llama_file)
    assert "past_key_values.1.value" in [item.name for item in model.inputs]
    assert "present.1.key" in model.outputs


@pytest.mark.parametrize("sizes", [(1, 1, 0), (3, 7, 0), (2, 1, 9), (1, 13, 4)])
def test_a_causal_model_runs_at_any_batch_sequence_and_past(
    llama: Program, llama_file: Path, sizes: tuple[int, int, int]
) -> None:
    values = random_inputs(llama, dict(zip(("batch", "seq", "past"), sizes, strict=True)))
    found, wanted = OnnxModel(llama_file)(values), llama(**values)
    for port, value in zip(llama.signature.outputs, wanted, strict=True):
        torch.testing.assert_close(found[port.name], value, rtol=1e-4, atol=1e-5)


def test_large_weights_go_to_one_file_beside_it(llama: Program, tmp_path: Path) -> None:
    to_onnx(llama, tmp_path / "model.onnx", external_above=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    loaded = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {
        entry.value
        for tensor in loaded.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx.data"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(moved / name)
    OnnxModel(moved / "model.onnx")(random_inputs(llama))


def test_tied_weights_are_stored_once(llama: Program, llama_file: Path) -> None:
    table = 61 * 32
    stored = [t for t in onnx.load(llama_file).graph.initializer if len(t.raw_data) == 4 * table]
    assert len(stored) == 1
    assert llama_file.stat().st_size < 4 * sum(t.numel() for t in llama.weights.values()) + 60_000


def test_attention_norms_and_rotary_embeddings_are_one_operator_each(llama: Program) -> None:
    found = operators(llama)
    assert found["Attention"] == 2
    assert found["RotaryEmbedding"] == 4
    assert not {"Softmax", "IsNaN", "Neg", "ReduceMean"} & set(found) - {"ReduceMean"}
    assert not found["Expand"]  # keys and values are not repeated


def test_before_opset_23_there_are_only_older_operators(llama: Program, tmp_path: Path) -> None:
    found = operators(llama, 20)
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & set(found)
    assert found["Softmax"] == 2
    report = to_onnx(llama, tmp_path / "model.onnx", opset=20)
    assert max(report.worst.values()) <= 1


def test_sums_before_post_norms_are_kept_out_of_the_slow_fused_kernel(encoder: Program) -> None:
    model = build(encoder)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert [node.inputs[0].producer().op_type for node in norms] == ["Sum", "Sum"]
    assert all(len(node.inputs[0].producer().inputs) == 3 for node in norms)


def test_a_merged_projection_is_taken_apart(tmp_path: Path) -> None:
    layer, plain = nn.Linear(8, 24), nn.Linear(8, 24, bias=False)

    def function(x: Tensor) -> dict[str, Tensor]:
        q, k, v = layer(x).split(8, -1)
        merged = plain(x)
        return {
            "y": torch.tanh(q) * k + v,
            "z": merged[..., :10] @ merged[..., 10:].mT[..., :10, :],
        }

    program = program_of(function, {"x": torch.randn(2, 3, 8)})
    model = build(program)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["MatMul"] == 3 + 2 + 1
    assert not counts["Split"]
    to_onnx(program, tmp_path / "model.onnx")


def test_a_merged_projection_that_is_read_whole_stays(tmp_path: Path) -> None:
    layer = nn.Linear(8, 24)

    def function(x: Tensor) -> dict[str, Tensor]:
        merged = layer(x)
        return {"first": merged[..., :8], "all": merged}

    program = program_of(function, {"x": torch.randn(2, 3, 8)})
    assert Counter(node.op_type for node in build(program).graph)["MatMul"] == 1


def test_a_row_that_a_mask_hides_whole_gives_what_the_program_gives(
    encoder: Program, tmp_path: Path
) -> None:
    to_onnx(encoder, tmp_path / "model.onnx")
    values = random_inputs(encoder, {"batch": 2, "seq": 6})
    values["attention_mask"][1] = 0
    found = OnnxModel(tmp_path / "model.onnx")(values)
    torch.testing.assert_close(found["output_0"], encoder(**values)[0], rtol=1e-4, atol=1e-5)


class Attentions(nn.Module):
    """Attention with every kind of mask."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        seq, attend = x.shape[2], nn.functional.scaled_dot_product_attention
        order = torch.arange(seq)
        causal = order[:, None] >= order[None, :]
        smallest = torch.finfo(torch.float32).min
        added = torch.where(causal, 0.0, smallest).expand(x.shape[0], x.shape[1], seq, seq)
        hidden = torch.full((x.shape[0], 1, seq, seq), smallest)
        one = x[:, :1].expand(-1, 2, -1, -1).reshape(x.shape[0], 2, seq, 8)
        return (
            attend(x, x, x),
            attend(x, y, y, scale=0.3),
            attend(x, x, x, is_causal=True),
            attend(x, x, x, causal),
            attend(x, x, x, causal & (order > 2)),
            attend(x, x, x, added),
            attend(x, x, x, hidden),
            attend(x, one, one),
            attend(x, x[:, :1], x[:, :1], enable_gqa=True),
            attend(x.double(), x.double(), x.double(), causal),
        )


def test_masks_of_all_kinds(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 2, 6, 8), "y": torch.randn(2, 2, 5, 8)}
    dims = {"x": ("batch", 2, "seq", 8), "y": ("batch", 2, "other", 8)}
    to_onnx(program_of(Attentions(), example, dims), tmp_path / "model.onnx")


def test_an_op_without_a_translation_goes_through_torchs_exporter(tmp_path: Path) -> None:
    program = program_of(
        lambda x: {"wide": nn.functional.interpolate(x, scale_factor=2.0)},
        {"x": torch.randn(2, 3, 4, 4)},
    )
    report = to_onnx(program, tmp_path / "model.onnx")
    assert max(report.worst.values()) <= 1
    (output,) = onnx.load(tmp_path / "model.onnx").graph.output
    assert output.name == "wide"


def test_an_op_nobody_can_write_is_named(tmp_path: Path) -> None:
    library = torch.library.Library("redpass_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    program = program_of(lambda x: torch.ops.redpass_test.twice(x), {"x": torch.randn(2, 3)})
    with pytest.raises(ExportError, match=r"no ONNX form: 'redpass_test::twice' at 'twice'"):
        to_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_written_as_float32_and_said_so(tmp_path: Path) -> None:
    layer = nn.Linear(16, 16).to(torch.bfloat16)
    example = {"x": torch.randn(2, 16, dtype=torch.bfloat16)}
    program = program_of(
        lambda x: {"y": nn.functional.linear(x, layer.weight, layer.bias)}, example
    )
    report = to_onnx(program, tmp_path / "model.onnx")
    assert report.notes[0].startswith("bfloat16 written as float32")
    assert OnnxModel(tmp_path / "model.onnx")(example)["y"].dtype == torch.float32


def test_an_output_that_is_an_input_or_a_weight_or_twice_the_same(tmp_path: Path) -> None:
    weight = torch.randn(3)

    def function(x: Tensor) -> dict[str, Tensor]:
        y = x + 1
        return {"first": y, "second": y, "same": x.view(x.shape), "weight": weight.view(3)}

    to_onnx(program_of(function, {"x": torch.randn(2, 3)}), tmp_path / "model.onnx")
    found = OnnxModel(tmp_path / "model.onnx")(x=torch.zeros(4, 3))
    assert list(found) == ["first", "second", "same", "weight"]
    assert torch.equal(found["second"], torch.ones(4, 3))
    assert torch.equal(found["weight"], weight)


def test_refusals_name_what_to_do(residual: Program, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"opset 27 cannot be written\n  choose one from 20 to 26"
    ):
        to_onnx(residual, tmp_path / "model.onnx", opset=27)
    fake = replace(residual, weights={k: v.to("meta") for k, v in residual.weights.items()})
    with pytest.raises(ExportError, match=r"carry no data\n  load the model without fake=True"):
        to_onnx(fake, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=r"unknown format 'onx'\n  did you mean 'onnx'"):
        write(residual, tmp_path, ("onx",))


def test_write_leaves_one_file_a_format(residual: Program, tmp_path: Path) -> None:
    reports = write(residual, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]
    assert {name: report.path.name for name, report in reports.items()} == {
        "pt2": "model.pt2", "onnx": "model.onnx",
    }  # fmt: skip
