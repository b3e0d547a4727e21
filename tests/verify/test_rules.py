import operator
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from redpass.errors import VerifyError
from redpass.program import Port, Program, Signature, copy_graph, output_node
from redpass.verify.rules import check_rules

aten = torch.ops.aten


def edited(program: Program, edit: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> Program:
    """Returns a copy whose graph `edit` has broken."""
    graph, _ = copy_graph(program.graph)
    edit(graph, {node.name: node for node in graph.nodes})
    return replace(program, graph=graph)


def broken(program: Program, edit: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> str:
    with pytest.raises(VerifyError) as caught:
        check_rules(edited(program, edit))
    return str(caught.value)


def with_signature(program: Program, **changes: object) -> str:
    with pytest.raises(VerifyError) as caught:
        check_rules(replace(program, signature=replace(program.signature, **changes)))
    return str(caught.value)


def test_a_traced_program_keeps_all_rules(masked: Program) -> None:
    check_rules(masked)
    check_rules(masked, paranoid=True)


def test_the_message_shows_three_lines_either_side(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        del nodes["silu"].meta["val"]

    message = broken(masked, edit)
    assert message.startswith("silu: carries no value in meta['val']\n  expected a fake tensor")
    excerpt = message.split("\n")[2:]
    assert len(excerpt) == 7
    assert excerpt[3].startswith("  > %silu = silu(%linear)")
    assert all(line.startswith("    %") for at, line in enumerate(excerpt) if at != 3)


def test_mutating_op(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["add"].target = aten.add_.Tensor

    assert "add: calls 'aten.add_.Tensor', which changes its arguments" in broken(masked, edit)


def test_python_function_that_is_no_size_function(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["silu"].target = torch.relu

    assert "calls 'relu'\n  expected an ATen or redpass:: overload" in broken(masked, edit)


@pytest.mark.parametrize("op", ["call_module", "call_method"])
def test_nodes_that_core_form_has_not(masked: Program, op: str) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["silu"].op = op

    assert f"silu: is a '{op}' node" in broken(masked, edit)


def test_operand_used_before_it_is_defined(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["layer_norm"].prepend(nodes["silu"])

    assert "silu: reads 'linear', which is defined later" in broken(masked, edit)


def test_operand_of_another_graph(masked: Program) -> None:
    other = fx.Graph().placeholder("stray")

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["silu"].args = (other,)

    assert "silu: reads 'stray', which is in another graph" in broken(masked, edit)


def test_name_used_twice(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["mul"]._rename("mul_x")
        nodes["mul"].name = "silu"

    assert "silu: has the name of an earlier node" in broken(masked, edit)


def test_missing_and_unknown_arguments(masked: Program) -> None:
    def missing(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["linear"].args = nodes["linear"].args[:1]

    def unknown(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["linear"].kwargs = {"gain": 2.0}

    assert "missing ['weight']" in broken(masked, missing)
    message = broken(masked, unknown)
    assert "unknown ['gain']" in message
    assert "aten::linear(Tensor input" in message


def test_weight_that_does_not_exist(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["down_weight"].target = "elsewhere"

    assert "reads 'elsewhere', which is not a weight" in broken(masked, edit)


def test_weight_read_by_two_nodes(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["right_weight"].target = nodes["left_weight"].target

    assert "as 'left_weight' does\n  expected one get_attr node a weight" in broken(masked, edit)


def test_weight_that_nobody_reads(masked: Program) -> None:
    more = replace(masked, weights={**masked.weights, "extra": torch.zeros(1)})
    with pytest.raises(VerifyError, match=r"^extra: 1 weights are read by no node"):
        check_rules(more)


@pytest.mark.parametrize(
    "value", [torch.zeros(16, 25), torch.zeros(16, 24, dtype=torch.float16), torch.zeros(384)]
)
def test_weight_of_another_shape_or_dtype(masked: Program, value: Tensor) -> None:
    wrong = replace(masked, weights={**masked.weights, "down.weight": value})
    with pytest.raises(VerifyError) as caught:
        check_rules(wrong)
    assert "down_weight: carries the value float32[16, 24]" in str(caught.value)


def test_output_that_is_no_flat_tuple(masked: Program) -> None:
    def nested(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        out = output_node(graph)
        out.args = ((out.args[0],),)

    def constant(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        output_node(graph).args = ((1,),)

    for edit in (nested, constant):
        assert "output: does not return a flat tuple of nodes" in broken(masked, edit)


def test_no_output_and_a_node_behind_it(masked: Program) -> None:
    def none(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        graph.erase_node(output_node(graph))

    def behind(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        output_node(graph).append(nodes["mul_1"])

    assert "the graph has no output node" in broken(masked, none)
    with pytest.raises(VerifyError):
        check_rules(edited(masked, behind))


def test_ports_that_do_not_match_the_graph(masked: Program) -> None:
    ids, mask = masked.signature.inputs
    (out,) = masked.signature.outputs
    assert "the graph has 2 inputs, the signature 1" in with_signature(masked, inputs=(ids,))
    assert "the graph has 1 outputs, the signature 2" in with_signature(masked, outputs=(out, out))
    assert "two input ports have one name" in with_signature(masked, inputs=(ids, ids))
    narrow = replace(ids, dtype=torch.int32)
    assert "input_ids: gives int64[batch, seq]" in with_signature(masked, inputs=(narrow, mask))
    flat = replace(out, shape=("batch", "seq"))
    assert "mul_1: gives float32[batch, seq, 16]" in with_signature(masked, outputs=(flat,))
    wide = replace(out, shape=("batch", "seq", 17))
    assert "has size 16 on axis 2" in with_signature(masked, outputs=(wide,))
    longer = replace(out, shape=("batch", "seq + 1", 16))
    assert "has size seq on axis 1" in with_signature(masked, outputs=(longer,))
    fixed = replace(ids, shape=("batch", 5))
    assert "has size seq on axis 1" in with_signature(masked, inputs=(fixed, mask))


def test_ports_may_write_a_size_in_another_form(masked: Program) -> None:
    (out,) = masked.signature.outputs
    same = replace(out, shape=("2*batch - batch", "(seq + seq)//2", 16))
    check_rules(replace(masked, signature=replace(masked.signature, outputs=(same,))))


def test_a_size_is_never_evaluated_as_code(masked: Program) -> None:
    (out,) = masked.signature.outputs
    for text in ("__import__('os').getcwd()", "seq.bit_length", "[seq]", "lambda: 1", "seq +"):
        shape = ("batch", text, 16)
        message = with_signature(masked, outputs=(replace(out, shape=shape),))
        assert "is not a size" in message


def test_state_pairs(masked: Program) -> None:
    assert "names a port that does not exist" in with_signature(masked, state=(("past", "mul"),))
    name = masked.signature.outputs[0].name
    assert "a state pair's ports differ" in with_signature(masked, state=(("input_ids", name),))


def test_paranoid_finds_a_value_that_is_not_what_the_op_gives(
    masked: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["silu"].meta["val"] = nodes["layer_norm"].meta["val"]

    wrong = edited(masked, edit)
    check_rules(wrong)
    monkeypatch.setenv("REDPASS_CHECK", "paranoid")
    with pytest.raises(VerifyError) as caught:
        check_rules(wrong)
    assert "silu: carries the value float32[batch, seq, 16]" in str(caught.value)
    assert "expected float32[batch, seq, 24]" in str(caught.value)


def test_paranoid_names_the_node_that_cannot_be_computed(masked: Program) -> None:
    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["linear_2"].args = (nodes["embedding"], *nodes["linear_2"].args[1:])

    with pytest.raises(VerifyError, match=r"^linear_2: cannot be computed from its operands"):
        check_rules(edited(masked, edit), paranoid=True)


def chain(length: int) -> Program:
    """Builds `length` negations of one input."""
    mode = torch._subclasses.FakeTensorMode()
    graph = fx.Graph()
    node = graph.placeholder("x")
    with mode:
        node.meta["val"] = torch.empty(2)
    for _ in range(length):
        following = graph.call_function(aten.neg.default, (node,))
        following.meta["val"] = node.meta["val"]
        node = following
    size = graph.call_function(aten.sym_size.int, (node, 0))
    size.meta["val"] = 2
    total = graph.call_function(operator.add, (size, 1))
    total.meta["val"] = 3
    graph.output((node,))
    port = Port("x", torch.float32, (2,))
    from redpass.program import Origin

    return Program(graph, {}, Signature((port,), (replace(port, name="y"),)), Origin("module", "t"))


def test_time_is_linear_and_small() -> None:
    def seconds(program: Program) -> float:
        check_rules(program)
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            check_rules(program)
            best = min(best, time.process_time() - started)
        return best

    short, long = seconds(chain(2500)), seconds(chain(10000))
    assert short < 0.5
    assert long < 8 * short + 0.05
