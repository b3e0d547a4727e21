import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import Masked, Merged, Reordered, adopting, text
from torch import Tensor

from redpass.plan import Exactness
from redpass.program import Program
from redpass.verify.inputs import check_inputs
from redpass.verify.numbers import SLACK, Verdict, compare, reference

SAME, CLOSE = Exactness.SAME_BITS, Exactness.WITHIN_TOLERANCE


def verdict(before: Program, after: Program, exactness: Exactness = CLOSE) -> Verdict:
    return compare(before, after, check_inputs(before), exactness=exactness)


def with_weights(program: Program, **changes: Tensor) -> Program:
    return replace(program, weights={**program.weights, **changes})


def test_the_same_program_is_proved_without_running(masked: Program) -> None:
    assert verdict(masked, masked).state == "proved"
    again = replace(masked, graph=masked.module.graph)
    found = compare(masked, again, [], exactness=SAME)
    assert (found.state, found.passed) == ("proved", True)


def test_weights_that_changed_places_are_not_the_same(masked: Program) -> None:
    left, right = masked.weights["left.weight"], masked.weights["right.weight"]
    swapped = with_weights(masked, **{"left.weight": right, "right.weight": left})
    assert swapped.digest == masked.digest
    for exactness in (SAME, CLOSE):
        assert verdict(masked, swapped, exactness).state == "failed"


def test_merged_linears_pass_in_every_dtype(narrow_module: Masked, narrow: Program) -> None:
    merged = adopting(text(Merged(copy.deepcopy(narrow_module))), narrow)
    found = verdict(narrow, merged)
    assert (found.state, found.passed) == ("checked", True), found.reason
    assert 0 <= max(found.worst.values()) <= 1
    assert "largest share of the tolerance" in found.reason


def test_reordering_alone_passes_in_every_dtype(narrow_module: Masked, narrow: Program) -> None:
    reordered = adopting(text(Reordered(copy.deepcopy(narrow_module))), narrow)
    assert verdict(narrow, reordered).state == "checked"


@pytest.mark.parametrize("wrong", ["no bias", "late mask", "scaled"])
def test_a_wrong_graph_fails_in_every_dtype(
    narrow_module: Masked, narrow: Program, wrong: str
) -> None:
    after = adopting(text(Reordered(copy.deepcopy(narrow_module), wrong)), narrow)
    found = verdict(narrow, after)
    assert (found.state, found.passed) == ("failed", False)
    (port,) = narrow.signature.outputs
    assert f"output '{port.name}'" in found.reason
    assert max(found.worst.values()) > 1


def test_a_tiny_dropped_bias_fails_in_every_dtype(narrow_module: Masked) -> None:
    module = copy.deepcopy(narrow_module)
    with torch.no_grad():
        module.down.bias.mul_(1e-2)
    before = text(module)
    after = adopting(text(Reordered(copy.deepcopy(module), "no bias")), before)
    found = verdict(before, after)
    assert found.state == "failed"
    assert "float64" in found.reason


def test_a_scaled_weight_fails(narrow: Program) -> None:
    # A factor within a few eps cannot be told from the rounding of a weight that was folded.
    eps = torch.finfo(narrow.signature.outputs[0].dtype).eps
    factor = 1 + max(1e-3, 16 * eps)
    changed = with_weights(narrow, **{"left.weight": narrow.weights["left.weight"] * factor})
    found = verdict(narrow, changed)
    assert found.state == "failed", found.reason


def test_a_weight_scaled_by_a_thousandth_fails_in_float32(masked: Program) -> None:
    changed = with_weights(masked, **{"left.weight": masked.weights["left.weight"] * (1 + 1e-3)})
    assert verdict(masked, changed).state == "failed"


def test_references_are_used(masked: Program, masked_module: Masked) -> None:
    inputs = check_inputs(masked)
    references = [reference(masked, values) for values in inputs]
    after = adopting(text(Reordered(copy.deepcopy(masked_module))), masked)
    with_them = compare(masked, after, inputs, exactness=CLOSE, references=references)
    without = compare(masked, after, inputs, exactness=CLOSE)
    assert with_them == without
    moved = [tuple(value * 1.01 for value in values) for values in references]
    assert compare(masked, after, inputs, exactness=CLOSE, references=moved) != without


def test_same_bits(masked: Program, masked_module: Masked) -> None:
    clone = with_weights(masked, **{k: v.clone() for k, v in masked.weights.items()})
    found = verdict(masked, clone, SAME)
    assert (found.state, found.reason) == ("checked", "bit for bit the same, on 4 sets of inputs")
    moved = with_weights(masked, **{"down.bias": masked.weights["down.bias"] * (1 + 1e-6)})
    found = verdict(masked, moved, SAME)
    assert found.state == "failed"
    assert "elements differ, on inputs input_ids[3, 5]" in found.reason


@pytest.mark.parametrize(
    ("old", "new", "state"),
    [
        (0.0, -0.0, "failed"),
        (float("nan"), float("nan"), "checked"),
        (float("inf"), -float("inf"), "failed"),
        (1.0, 1.0 + 2**-23, "failed"),
    ],
)
def test_same_bits_tell_zeros_apart_and_not_nans(old: float, new: float, state: str) -> None:
    before, after = constant(old), constant(new)
    assert compare(before, after, [ONE], exactness=SAME).state == state


ONE: Mapping[str, Tensor] = {"x": torch.ones(3)}


def constant(value: float, dtype: torch.dtype = torch.float32, size: int = 3) -> Program:
    """A program that returns `value` from a weight, whatever its input is."""
    from redpass.program import Origin, Port, Signature

    mode = torch._subclasses.FakeTensorMode()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    held = graph.create_node("get_attr", "held", name="held")
    with mode:
        x.meta["val"] = torch.empty(3)
        held.meta["val"] = torch.empty(size, dtype=dtype)
    graph.output((held,))
    ports = (Port("x", torch.float32, (3,)),), (Port("y", dtype, (size,)),)
    weights = {"held": torch.full((size,), value, dtype=dtype)}
    return Program(graph, weights, Signature(*ports), Origin("module", "constant"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_new_nan_and_infinity_fail(bad: float) -> None:
    found = compare(constant(1.0), constant(bad), [ONE], exactness=CLOSE)
    assert found.state == "failed"
    assert "output 'y': NaN or infinity differs from the reference in 3 elements" in found.reason
    found = compare(constant(1.0), constant(bad), [ONE], exactness=Exactness.APPROXIMATE)
    assert "3 of 3 elements became NaN or infinite" in found.reason


def test_nan_that_was_there_may_stay_and_may_not_go() -> None:
    nan = float("nan")
    assert compare(constant(nan), constant(nan), [ONE], exactness=CLOSE).state == "checked"
    assert compare(constant(nan), constant(1.0), [ONE], exactness=CLOSE).state == "failed"


def test_tolerance_is_a_few_units_in_the_last_place() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        near = compare(constant(1.0, dtype), constant(1 + eps, dtype), [ONE], exactness=CLOSE)
        far = compare(constant(1.0, dtype), constant(1 + 8 * eps, dtype), [ONE], exactness=CLOSE)
        assert (near.state, far.state) == ("checked", "failed"), dtype
        assert near.errors["y"] == pytest.approx(eps, rel=1e-6)
    assert SLACK * torch.finfo(torch.float64).eps < torch.finfo(torch.float32).eps


def test_dtype_and_shape_must_stay() -> None:
    other = constant(1.0, torch.float16)
    found = compare(constant(1.0), other, [ONE], exactness=Exactness.APPROXIMATE)
    assert "output 'y': is torch.float16 [3], was torch.float32 [3]" in found.reason
    longer = constant(1.0, size=4)
    found = compare(constant(1.0), longer, [ONE], exactness=CLOSE)
    assert "is torch.float32 [4], was torch.float32 [3]" in found.reason


def test_one_row_far_off_fails_though_the_whole_is_near() -> None:
    before, after = constant(1.0, size=3), constant(1.0, size=3)
    wide = torch.full((1000, 3), 1e4)
    wide[7] = 1.0
    moved = wide.clone()
    moved[7] = 1.0005
    found = compare(held(before, wide), held(after, moved), [ONE], exactness=CLOSE)
    assert found.state == "failed"
    assert "row error" in found.reason
    assert found.errors["y"] < 1e-7


def held(program: Program, value: Tensor) -> Program:
    """`constant` with another tensor in it."""
    graph = program.module.graph
    with torch._subclasses.FakeTensorMode():
        for node in graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = torch.empty(value.shape)
    port = replace(program.signature.outputs[0], shape=tuple(value.shape))
    signature = replace(program.signature, outputs=(port,))
    return replace(program, graph=graph, weights={"held": value}, signature=signature)


def test_weights_without_data_are_not_checked(masked: Program) -> None:
    fake = with_weights(masked, **{k: v.to("meta") for k, v in masked.weights.items()})
    found = compare(masked, fake, check_inputs(masked), exactness=CLOSE)
    assert (found.state, found.passed) == ("not checked", False)
    assert found.reason == "not checked: weights carry no data"
    clone = with_weights(masked, **{k: v.clone() for k, v in masked.weights.items()})
    found = compare(masked, clone, [], exactness=CLOSE)
    assert (found.state, found.reason) == ("not checked", "not checked: no inputs were given")


def test_ports_that_come_and_go(masked: Program) -> None:
    (port,) = masked.signature.outputs
    named = replace(
        masked, signature=replace(masked.signature, outputs=(replace(port, name="other"),))
    )
    found = compare(masked, named, check_inputs(masked), exactness=CLOSE)
    assert found.reason == "outputs were added: other"


def test_a_result_that_does_not_run_fails(masked: Program) -> None:
    short = with_weights(masked, **{"embed.weight": masked.weights["embed.weight"][:1]})
    found = verdict(masked, short)
    assert found.state == "failed"
    assert "the result does not run on input_ids[3, 5]" in found.reason


def test_a_result_with_a_fixed_size_fails(masked: Program) -> None:
    ids, mask = masked.signature.inputs
    fixed = replace(
        masked, signature=replace(masked.signature, inputs=(replace(ids, shape=(1, "seq")), mask))
    )
    found = verdict(masked, fixed)
    assert found.state == "failed"
    assert "does not run on input_ids[3, 5]" in found.reason


def test_empty_outputs_are_not_checked() -> None:
    empty, other = constant(1.0, size=0), constant(1.0, size=0)
    found = compare(empty, other, [ONE], exactness=CLOSE)
    assert (found.state, found.passed) == ("not checked", False)
    assert "no output holds a number" in found.reason
