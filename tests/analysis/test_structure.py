"""The exact facts that structure must find, architecture by architecture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from zoo import BUILDERS, load

from redpass.analysis.records import Branch, Structure
from redpass.analysis.structure import structure
from redpass.program import Program, copy_graph


@dataclass(frozen=True)
class Expected:
    """What holds for every layer of a model; all models here are 32 wide with heads of 8."""

    form: str = "pre-norm"
    kinds: tuple[str, str] = ("attention", "feed-forward")
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    grouping: str = "MHA"
    rotary: int = 0
    normed: bool = False
    scale: float = 8**-0.5
    causal: bool = False
    cached: bool = False
    maps: int = 3
    gated: bool = False
    width: int = 64
    activation: str = "gelu"
    norm: str = "layer"
    norms: int = 5
    offset: float = 0.0
    bias: bool = True
    equal: tuple[int, ...] = (0, 0)
    experts: tuple[int, int] = field(default=(0, 0))


LM = Expected(causal=True, cached=True)
GQA = replace(
    LM, kv_heads=2, grouping="GQA", rotary=8, gated=True, activation="silu", norm="rms", bias=False
)
PARALLEL = replace(LM, form="parallel", rotary=8)
FALCON = replace(PARALLEL, maps=1, width=128, bias=False)

EXPECTED = {
    "llama": GQA,
    "qwen3": replace(GQA, normed=True, norms=9),
    "gemma3": replace(
        GQA, form="sandwich", kv_heads=1, grouping="MQA", normed=True, scale=256**-0.5,
        activation="gelu_tanh", norms=13, offset=1.0,
    ),
    "gpt2": replace(LM, maps=1, width=128, activation="gelu_tanh"),
    "opt": replace(LM, activation="relu"),
    "gpt_neox": replace(PARALLEL, rotary=2, maps=1),
    "phi": replace(PARALLEL, rotary=4, activation="gelu_tanh", norms=3),
    "falcon": replace(FALCON, kv_heads=1, grouping="MQA", norms=3),
    "falcon_new": replace(FALCON, kv_heads=2, grouping="GQA"),
    "falcon_rw": replace(FALCON, form="pre-norm", rotary=0, bias=True),
    "bloom": replace(LM, maps=1, width=128, activation="gelu_tanh", norms=6),
    "mixtral": replace(GQA, kinds=("attention", "experts"), experts=(4, 2)),
    "bert": Expected(form="post-norm"),
    "mpnet": Expected(form="post-norm"),
    "modernbert": Expected(
        layers=3, rotary=8, maps=1, gated=True, norms=7, bias=False, equal=(0, 1, 1)
    ),
    "vit": Expected(),
    "dinov2": Expected(),
    "whisper_encoder": Expected(),
    "dit": Expected(width=128, activation="gelu_tanh"),
}  # fmt: skip


def test_every_architecture_has_expected_facts() -> None:
    assert set(EXPECTED) == set(BUILDERS)


@pytest.mark.parametrize("name", EXPECTED)
def test_facts(name: str) -> None:
    want, program = EXPECTED[name], load(name)
    found = structure(program)
    assert found.notes == ()
    assert tuple(layer.equal_to for layer in found.layers) == want.equal
    assert len(found.layers) == want.layers
    assert tuple(b.kind for b in found.branches) == want.kinds * want.layers
    assert tuple(b.layer for b in found.branches) == tuple(i // 2 for i in range(2 * want.layers))
    assert len(found.norms) == want.norms
    assert {norm.kind for norm in found.norms} == {want.norm}
    assert {norm.offset for norm in found.norms} == {want.offset}
    assert all(norm.eps in (1e-5, 1e-6, 1e-12) for norm in found.norms)
    for branch in found.branches:
        check_branch(program, branch, want)
    check_stream(program, found)


def check_branch(program: Program, branch: Branch, want: Expected) -> None:
    # ModernBERT's first attention reads what the embedding's norm gave, without a norm of its own.
    first = branch.layer == 0 and want.equal == (0, 1, 1) and branch.kind == "attention"
    assert branch.form == ("plain" if first else want.form)
    assert branch.label == f"layers.{branch.layer}.{branch.kind}"
    join = program.nodes[branch.join]
    assert {program.nodes[branch.exit], program.nodes[branch.other]} == set(join.args[:2])
    assert branch.exit in branch.path
    assert branch.entry not in branch.path
    if branch.kind == "attention":
        check_attention(branch, want)
    elif branch.kind == "feed-forward":
        check_feed_forward(branch, want)
    else:
        check_experts(branch, want)


def check_attention(branch: Branch, want: Expected) -> None:
    attention = branch.attention
    assert attention is not None
    assert (attention.heads, attention.kv_heads, attention.grouping) == (
        want.heads, want.kv_heads, want.grouping,
    )  # fmt: skip
    assert (attention.head_dim, attention.value_dim) == (8, 8)
    assert (attention.rotary.dims if attention.rotary else 0) == want.rotary
    assert (attention.query_norm is not None) == want.normed == (attention.key_norm is not None)
    assert attention.scale == pytest.approx(want.scale)
    assert attention.causal is want.causal
    assert not attention.is_cross
    group = want.heads // want.kv_heads
    assert attention.key_of_head == tuple(head // group for head in range(want.heads))
    cache = tuple(
        (f"past_key_values.{branch.layer}.{part}", f"present.{branch.layer}.{part}")
        for part in ("key", "value")
    )
    assert (attention.key_cache, attention.value_cache) == (cache if want.cached else (None, None))
    assert set(branch.state) == (set(cache) if want.cached else set())
    check_projections(branch, want)


def check_projections(branch: Branch, want: Expected) -> None:
    attention = branch.attention
    assert attention is not None
    maps = [attention.query, attention.key, attention.value]
    assert all(projection is not None for projection in (*maps, attention.output))
    assert len({projection.weight for projection in maps if projection}) == want.maps
    counts = [want.heads, want.kv_heads, want.kv_heads]
    for projection, count in zip(maps, counts, strict=True):
        assert projection is not None
        assert [len(row) for row in projection.rows] == [8] * count
    taken = [
        (projection.weight, i) for projection in maps if projection
        for row in projection.rows for i in row
    ]  # fmt: skip
    assert len(taken) == len(set(taken)), "a row belongs to one head of one kind only"
    assert attention.output is not None
    columns = [i for row in attention.output.rows for i in row]
    assert columns == list(range(32))


def check_feed_forward(branch: Branch, want: Expected) -> None:
    inner = branch.feed_forward
    assert inner is not None
    assert (inner.gate is not None) == want.gated
    assert (inner.width, inner.activation) == (want.width, want.activation)
    assert (inner.up.bias is not None) == want.bias
    assert [len(row) for row in inner.down.rows] == [want.width]


def check_experts(branch: Branch, want: Expected) -> None:
    experts = branch.experts
    assert experts is not None
    assert (experts.count, experts.top_k) == want.experts
    assert experts.router_weight.endswith("gate.weight")
    assert (experts.width, experts.activation) == (want.width, want.activation)
    assert len(experts.weights) >= 2
    assert experts.shared == ()


def check_stream(program: Program, found: Structure) -> None:
    order = {name: place for place, name in enumerate(program.nodes)}
    places = [order[name] for name in found.stream]
    assert places == sorted(places)
    assert found.stream[0] == found.branches[0].entry
    assert found.stream[-1] == found.branches[-1].after
    assert found.streams == (found.stream,)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "modernbert", "mixtral", "dit"])
def test_names_carry_no_structure(name: str) -> None:
    program = load(name)
    graph, mapping = copy_graph(program.graph)
    for place, node in enumerate(graph.nodes):
        node.meta = {"val": node.meta.get("val")}
        node.name = f"n{place}"
    renamed = {old.name: new.name for old, new in mapping.items()}
    assert shape_of(structure(replace(program, graph=graph))) == shape_of(
        structure(program), renamed
    )


def shape_of(found: Structure, names: dict[str, str] | None = None) -> list[object]:
    """What is found, without labels, in the names given."""
    known = names or {}

    def new(name: str) -> str:
        return known.get(name, name)

    rows: list[object] = [
        (
            b.kind, b.form, b.layer, new(b.entry), new(b.exit), new(b.join), new(b.other),
            new(b.after), {new(n) for n in b.nodes}, b.state, set(b.weights),
            b.attention and (b.attention.heads, b.attention.query, b.attention.causal)[:1],
            b.feed_forward and (b.feed_forward.width, b.feed_forward.activation), b.experts
            and (b.experts.count, b.experts.weights),
        )
        for b in found.branches
    ]  # fmt: skip
    return [*rows, [new(n) for n in found.stream], [layer.equal_to for layer in found.layers]]
