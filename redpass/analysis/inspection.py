"""`inspection`: what `redpass inspect` shows, as data: a row a branch, totals, ports, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redpass.analysis.cost import Cost, cost, storages
from redpass.analysis.records import Branch, Structure
from redpass.analysis.structure import structure
from redpass.facts import Facts
from redpass.program import Program

DEFAULT_SIZES: Mapping[str, int] = {"batch": 1, "seq": 128, "past": 0}


@dataclass(frozen=True)
class Row:
    """One branch.

    Attributes:
        layer: index of its layer; `equal_to` is the first layer with the same graph.
        form: where the norms are; see `Branch`.
        attention: grouping (`GQA`), or "".
        details: what else is known of it, in words: `rotary`, `causal`, `top 2 of 8`...
        heads: query heads, 0 where there are none.
        width: inner width of the feed-forward or of one expert, 0 where there is none.
        bytes: bytes of its weights.
    """

    label: str
    layer: int
    equal_to: int
    kind: str
    form: str
    attention: str
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    activation: str
    details: tuple[str, ...]
    parameters: int
    bytes: int
    flops: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Inspection:
    """A program at a glance.

    Attributes:
        sizes: the dimension sizes that `flops` were counted at.
        dims: dimension name -> (smallest, largest or None).
        rest: cost of what is in no branch: embeddings, heads, final norms.
        notes: what the analysis or the frontend could not tell, or had to assume.
    """

    source: str
    task: str
    nodes: int
    layers: int
    rows: tuple[Row, ...]
    parameters: int
    buffers: int
    bytes: int
    flops: int
    kv_bytes_per_token: int
    rest: Mapping[str, int]
    sizes: Mapping[str, int]
    dims: Mapping[str, tuple[int, int | None]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: tuple[tuple[str, str], ...]
    coupling_groups: Mapping[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain dictionaries, lists, strings and numbers."""
        plain = asdict(self)
        plain["dims"] = {name: list(bounds) for name, bounds in self.dims.items()}
        return {key: _plain(value) for key, value in plain.items()}


def inspection(
    program: Program, sizes: Mapping[str, int] | None = None, facts: Facts | None = None
) -> Inspection:
    """Looks at `program` without running it.

    Args:
        sizes: dimension name -> size to count FLOPs at; `DEFAULT_SIZES` for what is not given,
            the smallest allowed size for dimensions that are in neither.
    """
    facts = facts or Facts(program)
    found, counted = facts.get(structure), facts.get(cost)
    signature = program.signature
    used = {
        name: (sizes or {}).get(name, max(low, DEFAULT_SIZES.get(name, low)))
        for name, (low, _) in signature.dims.items()
    }
    rows = tuple(
        _row(branch, found, counted.by_branch[branch.label], used) for branch in found.branches
    )
    return Inspection(
        source=program.origin.path,
        task=program.origin.task,
        nodes=len(program.graph.nodes),
        layers=len(found.layers),
        rows=rows,
        parameters=counted.parameters,
        buffers=counted.buffers,
        bytes=counted.bytes,
        flops=counted.flops(used),
        kv_bytes_per_token=counted.kv_bytes_per_token,
        rest=_rest(program, found, counted, used),
        sizes=used,
        dims=dict(signature.dims),
        inputs=tuple(map(str, signature.inputs)),
        outputs=tuple(map(str, signature.outputs)),
        state=signature.state,
        coupling_groups=_group_counts(found),
        notes=(*program.origin.notes, *found.notes),
    )


def _row(branch: Branch, found: Structure, share: Cost, sizes: Mapping[str, int]) -> Row:
    attention, inner, experts = branch.attention, branch.feed_forward, branch.experts
    width = experts.width if experts else inner.width if inner else 0
    activation = experts.activation if experts else inner.activation if inner else ""
    return Row(
        label=branch.label,
        layer=branch.layer,
        equal_to=found.layers[branch.layer].equal_to,
        kind=branch.kind,
        form=branch.form,
        attention=attention.grouping if attention else "",
        heads=attention.heads if attention else 0,
        kv_heads=attention.kv_heads if attention else 0,
        head_dim=attention.head_dim if attention else 0,
        width=width,
        activation=activation,
        details=tuple(_details(branch)),
        parameters=share.parameters,
        bytes=share.bytes,
        flops=share.flops(sizes),
        kv_bytes_per_token=share.kv_bytes_per_token,
    )


def _details(branch: Branch) -> list[str]:
    words = []
    attention, inner, experts = branch.attention, branch.feed_forward, branch.experts
    if attention is not None:
        words += ["rotary"] * (attention.rotary is not None)
        words += ["causal"] * bool(attention.causal)
        words += ["cross"] * attention.is_cross
        words += ["q/k norm"] * (attention.query_norm is not None)
        words += ["softcap"] * (attention.softcap is not None)
    if inner is not None:
        words += ["gated"] * (inner.gate is not None)
    if experts is not None:
        words.append(f"top {experts.top_k} of {experts.count}")
        words += ["shared experts"] * bool(experts.shared)
    return words


def _rest(
    program: Program, found: Structure, counted: Cost, sizes: Mapping[str, int]
) -> Mapping[str, int]:
    """Parameters and FLOPs outside of all branches; shared weights are subtracted once."""
    inside = {name for branch in found.branches for name in branch.weights}
    names = [str(node.target) for node in program.weight_nodes if str(node.target) not in inside]
    parameters = sum(tensor.numel() for tensor, trained in storages(program, names) if trained)
    shares = sum(share.flops(sizes) for share in counted.by_branch.values())
    return {"parameters": parameters, "flops": counted.flops(sizes) - shares}


def _group_counts(found: Structure) -> Mapping[str, int]:
    kinds = [group.kind for group in found.coupling_groups]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
