"""Observers and the run that sums them up: figures, merging, memory, invariances, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import redpass
from redpass.analysis.observers import (
    STRETCH,
    Alignment,
    CrossGram,
    KernelAlignment,
    Observer,
    Spread,
    Turn,
    all_pairs,
)
from redpass.analysis.statistics import Statistics, collect, footprint
from redpass.analysis.tokens import Tokens, feature_axis
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.program import Program, interpret
from redpass.verify.inputs import complete


class Values(torch.nn.Module):
    """A value, the same rotated, scaled and shifted, and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
        self.register_buffer("turn", turn.float())
        self.register_buffer("wide", torch.randn(6, 9, generator=generator))

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        turned = 7.0 * (x @ self.turn) + 3.0
        return x + 0.0, turned, torch.tanh(x @ self.wide), attention_mask + 1


@pytest.fixture(scope="module")
def program() -> Program:
    example = {"x": torch.randn(2, 5, 6), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    specs = ["x:float32[batch,seq,6]", "attention_mask:int64[batch,seq]"]
    return redpass.load(Values(), example=example, inputs=specs)


@pytest.fixture(scope="module")
def names(program: Program) -> tuple[str, str, str]:
    x, turned, wide, _ = (node.name for node in program.outputs)
    return x, turned, wide


@pytest.fixture(scope="module")
def data() -> Batches:
    """Batches of unequal size; the first is longer than a stretch, every third token padding."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for rows, length in ((3, 200), (2, 5), (1, 9)):
        mask = (torch.arange(length) % 3 > 0).long().expand(rows, length).contiguous()
        x = torch.randn(rows, length, 6, generator=generator)
        items.append({"x": x, "attention_mask": mask})
    return Batches(tuple(items))


def tokens(program: Program, data: Batches, name: str) -> Tensor:
    """All tokens of a value that are no padding, float64."""
    kept = []
    for batch in data:
        inputs = complete(program, batch)
        seen: dict[str, Tensor] = {}
        interpret(program, inputs.values(), lambda node, v, s=seen: s.setdefault(node.name, v))
        kept.append(seen[name][batch["attention_mask"].bool()])
    return torch.cat(kept).double()


def close(found: Tensor, want: Tensor) -> None:
    """Equal but for what two runs of a float32 program may differ in."""
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-5 * max(float(want.abs().max()), 1e-2)


def everything(names: tuple[str, str, str]) -> list[Observer]:
    x, turned, wide = names
    pairs = all_pairs(names)
    return [Alignment((x, turned)), Turn(turned, x), Spread(wide), KernelAlignment(names), *pairs]


def test_moments_are_those_of_all_tokens(program: Program, names: tuple[str, ...], data: Batches):
    x, _, wide = names
    left, right = tokens(program, data, x), tokens(program, data, wide)
    found = collect(program, [CrossGram(x, wide)], data).moments(x, wide)
    assert found.tokens == len(left) > STRETCH
    close(found.gram, left.T @ right)
    close(found.left_sum, left.sum(0))
    close(found.right_sum, right.sum(0))
    close(found.centred, (left - left.mean(0)).T @ (right - right.mean(0)))


def test_moments_give_the_ridge_solution(program: Program, names: tuple[str, ...], data: Batches):
    """`argmin |X M - Y|² + s |M - I|²` from Gram matrices, against its gradient on the tokens."""
    x, turned, _ = names
    found = collect(program, [CrossGram(x, x), CrossGram(x, turned)], data)
    eye, strength = torch.eye(6, dtype=torch.float64), 2.5
    gram, cross = found.moments(x, x).gram, found.moments(x, turned).gram
    solution = torch.linalg.solve(gram + strength * eye, cross + strength * eye)
    left, right = tokens(program, data, x), tokens(program, data, turned)
    gradient = left.T @ (left @ solution - right) + strength * (solution - eye)
    assert gradient.abs().max() < 1e-5 * cross.abs().max()


def test_spread_and_turn(program: Program, names: tuple[str, ...], data: Batches) -> None:
    x, turned, wide = names
    found = collect(program, [Spread(wide), Turn(turned, x)], data)
    values = tokens(program, data, wide)
    close(found.mean(Spread(wide))[0], values.mean(0))
    close(found.mean(Spread(wide))[1], values.square().mean(0))
    part, total = tokens(program, data, x), tokens(program, data, turned)
    cosine = torch.cosine_similarity(total - part, total, dim=-1).mean()
    ratio = (part.norm(dim=-1) / total.norm(dim=-1)).mean()
    close(found.mean(Turn(turned, x)), torch.stack([cosine, ratio]))


def test_alignment_is_symmetric_and_itself_on_the_diagonal(
    program: Program, names: tuple[str, ...], data: Batches
) -> None:
    pair = Alignment(names[:2])
    cosines, angles = collect(program, [pair], data).mean(pair)
    x, turned = (tokens(program, data, name) for name in names[:2])
    want = torch.cosine_similarity(x, turned, dim=-1)
    close(cosines[0, 1], want.mean())
    close(angles[0, 1], (want.arccos() / math.pi).mean())
    close(cosines, cosines.T)
    assert cosines.diagonal().tolist() == pytest.approx([1.0, 1.0])
    assert angles.diagonal().abs().max() < 1e-7


def naive_hsic(k: Tensor, other: Tensor) -> Tensor:
    """Unbiased HSIC, written out as published."""
    n = len(k)
    ones, off = torch.ones(n, dtype=torch.float64), 1 - torch.eye(n, dtype=torch.float64)
    k, other = k * off, other * off
    first = torch.trace(k @ other)
    second = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ other @ ones)
    return (first + second - third) / (n * (n - 3))


def test_kernel_alignment_is_unbiased_hsic(
    program: Program, names: tuple[str, ...], data: Batches
) -> None:
    found = collect(program, [KernelAlignment(names)], data[1:2]).mean(KernelAlignment(names))
    kernels = [x @ x.T for x in (tokens(program, data[1:2], name) for name in names)]
    want = torch.stack([torch.stack([naive_hsic(a, b) for b in kernels]) for a in kernels])
    close(found, want)


@pytest.mark.parametrize("exact", [True, False])
def test_cka_does_not_see_rotation_scale_and_shift(
    program: Program, names: tuple[str, ...], data: Batches, exact: bool
) -> None:
    observers = all_pairs(names) if exact else (KernelAlignment(names),)
    found = collect(program, observers, data)

    def cka(i: int, j: int) -> float:
        def share(a: int, b: int) -> Tensor:
            if exact:
                return found.moments(names[a], names[b]).centred.square().sum()
            return found.totals[KernelAlignment(names)][a, b]

        return float(share(i, j) / (share(i, i) * share(j, j)).sqrt())

    assert cka(0, 1) == pytest.approx(1.0, abs=1e-5)
    assert 0.1 < cka(0, 2) < 0.99


def test_parts_of_the_data_add_up_to_the_whole(
    program: Program, names: tuple[str, str, str], data: Batches
) -> None:
    observers = everything(names)
    whole = collect(program, observers, data)
    parts = collect(program, observers, data[:1]) + collect(program, observers, data[1:])
    assert parts.tokens == whole.tokens
    for observer in observers:
        close(parts.totals[observer], whole.totals[observer])
    assert whole.tokens[observers[0]] == sum(int(b["attention_mask"].sum()) for b in data)
    with pytest.raises(UsageError, match="different observers"):
        whole + collect(program, observers[:1], data)


def test_sums_survive_as_text_bit_by_bit(
    program: Program, names: tuple[str, str, str], data: Batches
) -> None:
    observers = everything(names)
    whole = collect(program, observers, data)
    again = Statistics.from_json(observers, json.loads(json.dumps(whole.to_json())))
    assert again.tokens == whole.tokens
    assert all(torch.equal(again.totals[o], whole.totals[o]) for o in observers)
    with pytest.raises(KeyError):
        Statistics.from_json([Spread("other")], whole.to_json())


def test_memory_is_known_beforehand_and_does_not_grow(
    program: Program, names: tuple[str, str, str], data: Batches
) -> None:
    observers = everything(names)
    stated = footprint(program, observers)
    for part in (data[1:2], data):
        assert collect(program, observers, part).bytes == stated
    # 2·2·2 + 2 + 2·9 + 3·3 numbers, and 7·7 (three times) + 7·10 (twice) + 10·10 of the moments.
    assert stated == 8 * (8 + 2 + 18 + 9 + 3 * 49 + 2 * 70 + 100)


def test_sums_that_do_not_fit_are_refused_before_anything_runs(
    program: Program, names: tuple[str, ...], data: Batches
) -> None:
    broken = Batches(({"nothing": torch.ones(1)},))
    with pytest.raises(UsageError, match=r"take .* GB, more than"):
        collect(program, [CrossGram(names[0], names[0])], broken, limit=8)


def test_unknown_value_is_named(program: Program, data: Batches) -> None:
    with pytest.raises(UsageError, match=r"add_99: an observer names a value"):
        collect(program, [Spread("add_99")], data)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 5, 6, 6)])
def test_facts_refuse_rows_that_the_program_does_not_take(
    program: Program, data: Batches, shape: tuple[int, ...]
) -> None:
    rows = Batches((data[1], {"x": torch.randn(shape)}), "rows.npz")
    facts = Facts(program, rows)
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.npz: input 'x': found .*, expected x:") as told:
            facts.data()
        assert told.value.hint
    assert Facts(program, data).data() is data


def test_values_of_unequal_tokens_do_not_go_together(program: Program, data: Batches) -> None:
    names = (program.outputs[0].name, program.weight_nodes[0].name)
    with pytest.raises(DataError, match="do not have the same tokens"):
        collect(program, [KernelAlignment(names)], data)


def test_value_that_is_no_number_is_named_and_padding_may_be_one(program: Program) -> None:
    name = program.outputs[2].name
    batch = {"x": torch.zeros(1, 3, 6), "attention_mask": torch.tensor([[1, 1, 0]])}
    batch["x"][0, 2, 0] = torch.finfo(torch.float32).max  # overflows in the product
    overflow = program.outputs[1].name
    assert collect(program, [Spread(overflow)], Batches((batch,))).tokens[Spread(overflow)] == 2
    batch["attention_mask"] = torch.tensor([[1, 1, 1]])
    with pytest.raises(DataError, match=r"layers\.0: its values .* NaN or infinite"):
        collect(program, [Spread(overflow)], Batches((batch,)), labels={overflow: "layers.0"})
    assert collect(program, [Spread(name)], Batches((batch,))).tokens[Spread(name)] == 3


def test_values_are_held_until_their_last_reader_only(
    program: Program, names: tuple[str, str, str], data: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redpass.analysis import statistics

    held: list[int] = []
    forget = statistics._Run._forget

    def watched(run, seen, waiting) -> None:
        forget(run, seen, waiting)
        held.append(len(seen))

    monkeypatch.setattr(statistics._Run, "_forget", watched)
    collect(program, [CrossGram(name, name) for name in names], data[:1])
    assert held == [0, 0, 0]


def test_padding_belongs_to_the_sequence_it_counts() -> None:
    class Two(torch.nn.Module):
        """Two sequences, each with a mask; and the first one flattened and pooled."""

        def forward(self, a, b, a_mask, b_mask):
            return a * 2, b * 2, a.flatten(0, 1) * 3, a.mean(1) * 4, a_mask + 1, b_mask + 1

    example = {"a": torch.randn(2, 5, 4), "b": torch.randn(2, 6, 4)}
    example |= {f"{name}_mask": torch.ones(x.shape[:2]).long() for name, x in example.items()}
    specs = ["a:float32[batch,s,4]", "b:float32[batch,t,4]"]
    specs += ["a_mask:int64[batch,s]", "b_mask:int64[batch,t]"]
    program = redpass.load(Two(), example=example, inputs=specs)
    rows = Tokens(program)
    inputs = {name: value.clone() for name, value in example.items()}
    inputs["b"] = inputs["b"][:, :5]  # equal lengths now: sizes alone do not tell them apart
    inputs["b_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    inputs["a_mask"] = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = program(**inputs)
    counts = [
        len(rows.rows(n.name, v, inputs)) for n, v in zip(program.outputs, found, strict=True)
    ]
    assert counts[:4] == [7, 6, 7, 2]
    assert torch.equal(rows.rows(program.outputs[0].name, found[0], inputs)[0], found[0][0, 1])


def test_features_of_images_are_channels() -> None:
    import zoo

    from redpass.analysis import structure

    program = zoo.load("resnet")
    for branch in structure(program).branches:
        for name in (branch.entry, branch.exit, branch.after):
            assert feature_axis(program.nodes[name]) == 1
