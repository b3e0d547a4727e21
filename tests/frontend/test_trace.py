"""Tracing plain modules: names, symbols, weights, and what is refused."""

import pytest
import torch
from torch import nn

from redpass import ops
from redpass.errors import TraceError, UsageError
from redpass.frontend import NaNWeightsWarning, load, random_inputs
from redpass.frontend.trace import trace
from redpass.program import Origin
from redpass.verify.rules import check_rules

ORIGIN = Origin("module", "test")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.randn(100, 16), persistent=False)

    def forward(self, ids, mask, unused=None):
        x = self.embed(ids)
        with torch.no_grad():
            x = x + self.table[: ids.shape[1]]
        x = x + self.drop(self.mix(x)) * mask[..., None].float()
        return {"logits": self.head(x), "hidden": (x, x + torch.tensor(1.0)), "nothing": None}


def ids_and_mask(batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (batch, seq), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "mask": torch.ones(batch, seq, dtype=torch.int64)}


@pytest.fixture(scope="module")
def tied():
    module = Tied().train()
    dims = {"ids": ("batch", "seq"), "mask": ("batch", "seq")}
    return module, trace(module, ids_and_mask(2, 5), dims=dims, origin=ORIGIN)


def test_symbols_and_ports_are_called_as_the_dimensions_are(tied):
    _, program = tied
    assert [str(p) for p in program.signature.inputs] == [
        "ids:int64[batch,seq]",
        "mask:int64[batch,seq]",
    ]
    assert [p.name for p in program.signature.outputs] == ["logits", "hidden.0", "hidden.1"]
    assert str(program.input_node("ids").meta["val"].shape) == "torch.Size([batch, seq])"
    # The table of positions has 100 rows.
    assert program.signature.dims == {"batch": (1, None), "seq": (1, 100)}


def test_tied_weights_buffers_and_constants_are_weights(tied):
    module, program = tied
    assert set(program.weights) == {
        "embed.weight",
        "mix.weight",
        "mix.bias",
        "table",
        "lifted_tensor_0",
    }
    assert program.weights["mix.weight"].data_ptr() == module.mix.weight.data_ptr()
    assert len(program.origin.digest) == 64


def test_a_program_is_shown_in_one_line_with_tied_weights_once(tied):
    module, program = tied
    count = sum(parameter.numel() for parameter in module.parameters()) + module.table.numel() + 1
    nodes = len(program.nodes)
    assert repr(program) == f"Program(module, test, {nodes} nodes, {count:,} parameters)"


def test_gradient_regions_are_inlined_and_labels_kept(tied):
    _, program = tied
    linear = next(n for n in program.graph.nodes if n.name == "linear")
    assert [path for path, _ in linear.meta["nn_module_stack"].values()] == ["mix"]
    assert "in forward" in linear.meta["stack_trace"]
    assert "wrap_with" not in program.text


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 7), (2, 100)])
def test_same_bits_as_the_module_at_other_sizes(tied, batch, seq):
    module, program = tied
    inputs = ids_and_mask(batch, seq)
    module.eval()
    expected = module(**inputs)
    module.train()
    found = program(**inputs)
    assert torch.equal(found[0], expected["logits"])
    assert torch.equal(found[2], expected["hidden"][1])


def test_the_module_keeps_its_training_flags(tied):
    module, _ = tied
    module.drop.eval()
    load(module, example=ids_and_mask(2, 5))
    assert module.training
    assert module.mix.training
    assert not module.drop.training


def test_an_unused_input_keeps_its_place():
    class Ignores(nn.Module):
        def forward(self, x, extra):
            return x * 2

    program = load(Ignores(), example=(torch.randn(2, 3), torch.randn(2, 4)))
    assert [p.name for p in program.signature.inputs] == ["x", "extra"]
    assert not program.input_node("extra").users


def test_in_place_writes_to_temporaries_become_functional():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            y += 1
            y[:, 0] = 0
            return y

    module, x = Writes(), torch.randn(3, 4)
    program = load(module, example={"x": torch.randn(2, 4)})
    assert "_(" not in program.text
    assert torch.equal(program(x)[0], module(x))


def test_a_write_to_a_buffer_is_refused_by_name():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x + self.count

    with pytest.raises(TraceError, match=r"count: the forward writes to this buffer"):
        load(Counts(), example={"x": torch.randn(2, 4)})


def test_a_write_to_an_input_is_refused():
    class Clobbers(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x * 2

    with pytest.raises(TraceError, match="writes to its input"):
        load(Clobbers(), example={"x": torch.randn(2, 4)})


def test_a_fixed_dimension_is_noted_with_the_line():
    class Loops(nn.Module):
        def forward(self, x):
            for _ in range(int(x.shape[1])):
                x = x + 1
            return x

    program = load(Loops(), inputs=["x:float32[batch,steps]"])
    steps = program.signature.inputs[0].shape[1]
    assert isinstance(steps, int)
    assert program.signature.dims == {"batch": (1, None)}
    assert any(f"'steps' is fixed to {steps} at {__file__}" in n for n in program.origin.notes)


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_inputs_of_a_dtype_that_traces_and_does_not_run(dtype):
    with pytest.raises(TraceError, match=rf"forward fails .*input:{dtype}\[.*same dtype") as caught:
        load(nn.Linear(4, 4).eval(), inputs=[f"input:{dtype}[batch,4]"])
    assert caught.value.hint


def test_what_fails_while_tracing_is_not_logged_at_length(capfd):
    with pytest.raises(TraceError, match="forward fails"):
        load(nn.Linear(4, 4).eval(), inputs=["input:float32[batch,5]"])
    assert capfd.readouterr().err == ""


def test_a_forward_that_fails_gives_the_models_own_message():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("needs a square input")

    with pytest.raises(TraceError) as caught:
        load(Fails(), example={"x": torch.randn(2, 3)})
    assert "ValueError: needs a square input" in str(caught.value)
    assert "x:float32[2, 3]" in str(caught.value)
    assert "test_trace.py" in str(caught.value)


def test_a_branch_on_data_is_refused_with_the_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(TraceError, match="cannot be traced"):
        load(Branches(), example={"x": torch.randn(2, 3)})


def test_random_ops_are_noted():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    program = load(Noisy(), example={"x": torch.randn(2, 3)})
    assert any("draws random numbers" in note for note in program.origin.notes)


def test_nan_in_a_weight_warns_with_its_name():
    module = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        module[0].bias[1] = float("nan")
    with pytest.warns(NaNWeightsWarning, match=r"weight '0\.bias' holds NaN"):
        load(module, inputs=["input:float32[batch,4]"])


def test_a_module_without_inputs_shows_the_form():
    with pytest.raises(UsageError, match="needs example inputs") as caught:
        load(nn.Linear(4, 4))
    assert "float32[batch,16]" in str(caught.value)


def test_fake_weights_hold_no_data():
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    program = load(module, example={"input": torch.randn(2, 4, device="meta")}, fake=True)
    assert program.is_fake
    assert program.origin.digest == ""
    assert str(program.signature.outputs[0]) == "output_0:float32[batch,4]"


def test_random_inputs_fit_the_program(tied):
    _, program = tied
    inputs = random_inputs(program, {"batch": 4, "seq": 9}, seed=3)
    assert inputs["ids"].shape == (4, 9)
    assert int(inputs["ids"].max()) < 50
    assert bool((inputs["mask"] == 1).all())
    assert torch.equal(inputs["ids"], random_inputs(program, {"batch": 4, "seq": 9}, seed=3)["ids"])
    program(**inputs)


@pytest.mark.parametrize("name", ["users", "zone", "E", "Max", "s0", "x"])
def test_a_dimension_has_one_name_everywhere(name):
    program = trace(
        nn.Linear(4, 4),
        {"input": torch.randn(3, 4)},
        dims={"input": (name, 4)},
        origin=ORIGIN,
        ranges={name: (2, 9)},
    )
    check_rules(program)
    known = f"n_{name}" if name[0] in "uz" else name
    assert program.signature.inputs[0].shape == program.signature.outputs[0].shape == (known, 4)
    assert dict(program.signature.dims) == {known: (2, 9)}


def test_a_word_of_python_names_no_dimension():
    with pytest.raises(UsageError, match="'lambda' is no dimension name"):
        load(nn.Linear(4, 4), inputs=["input:float32[lambda,4]"])


def test_batched_products_trace_without_a_word_from_torch(capfd):
    class Module(nn.Module):
        def forward(self, x, y):
            return torch.baddbmm(torch.zeros(1, 1, 1), x, y)

    values = {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 4, 5)}
    program = trace(Module(), values, dims={"x": ("b", "n", 4), "y": ("b", 4, "m")}, origin=ORIGIN)
    assert program.signature.outputs[0].shape == ("b", "n", "m")
    assert "baddbmm" not in capfd.readouterr().err


@pytest.mark.parametrize(("alias", "name"), sorted(ops.ALIASES.items()))
def test_an_op_with_two_names_has_one_in_the_graph(alias: str, name: str) -> None:
    packet = getattr(torch.ops.aten, alias)
    for overload in set(packet.overloads()) - {"out", "out_mode", "Tensor_out", "Scalar_out"}:
        held = ops.one_name(getattr(packet, overload))._schema
        assert held.name == f"aten::{name.partition('.')[0]}"
        given = getattr(packet, overload)._schema
        assert [str(a.type) for a in held.arguments] == [str(a.type) for a in given.arguments]


def test_aliases_are_traced_under_one_name() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.multiply(torch.concat([x, x], -1), 2.0).swapaxes(0, 1)

    program = load(Twice(), example={"x": torch.randn(2, 3)})
    assert {ops.base_name(n) for n in program.graph.nodes} >= {"mul", "cat", "transpose"}
