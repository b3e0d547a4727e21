"""Writes the hot paths of a program as Python files that need torch and triton only.

One file a distinct path: the constants of this model, the reference in PyTorch, the kernel with
the pointwise tail as its epilogue, and `run`, which calls it. Layers that are equal but for their
weights share a file. Beside each file stands a test that compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from redpass import ops
from redpass.codegen import ops as kernels_of
from redpass.codegen.bundle import Bundle, bundle
from redpass.codegen.expression import UnprintableError
from redpass.codegen.lower import DECODE, PREFILL, find_sites, why_not
from redpass.codegen.ops.op import Op, compiling_for
from redpass.codegen.patterns import Site
from redpass.codegen.render import Operand, Source, render, render_test
from redpass.codegen.tail import Tail, find_tail, insert_epilogue
from redpass.codegen.tuning import Records, Shape
from redpass.facts import Facts
from redpass.plan import Ref, Skip, WeightRef
from redpass.program import Program

CAPABILITIES = (80, 90)
"""Compute capabilities, 90 for 9.0, from which on a table of options holds."""

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
"""Lengths at which an op is asked for its config, to see where it changes."""

CASES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "seq": 1, "past": 6},
    {"batch": 3, "seq": 5, "past": 0},
    {"batch": 2, "seq": 17, "past": 4},
)
"""Sizes that emitted tests run: decode, prefill, and odd ones."""


@dataclass(frozen=True)
class Emitted:
    """One hot path as files.

    Attributes:
        name: of the module, without suffix.
        op: the `redpass::` op it does.
        places: the nodes of the program it stands for, one label a place.
        source: text of the module.
        test: text of its test.
        tail: the ops printed into its epilogue, as PyTorch.
        operands: the tensors `run` takes: name, dtype, sizes.
        samples: arguments of `run` on the meta device, in decoding and in prefill.
    """

    name: str
    op: str
    places: tuple[str, ...]
    source: str
    test: str
    tail: tuple[str, ...]
    operands: tuple[Operand, ...]
    samples: Mapping[str, tuple[Any, ...]]


def emit(
    program: Program,
    *,
    origin: str = "redpass",
    facts: Facts | None = None,
    records: Records | None = None,
) -> tuple[tuple[Emitted, ...], tuple[Skip, ...]]:
    """Returns the files of all hot paths of `program`, and the places left out with the reason.

    Args:
        origin: what is named as the writer in each file.
        records: tuned configurations; defaults otherwise.
    """
    kernels_of.register()
    sites, skips = _sites(program, facts or Facts(program))
    groups: dict[Source, list[Site]] = {}
    for site in sites:
        source = _Reader(program, site, records or Records()).source()
        groups.setdefault(source, []).append(site)
    names = _names([source.op for source in groups])
    files = [
        _emitted(program, source, groups[source], name, origin)
        for source, name in zip(groups, names, strict=True)
    ]
    return tuple(files), tuple(skips)


def _sites(program: Program, facts: Facts) -> tuple[list[Site], list[Skip]]:
    sites, skips = list(present(program)), list[Skip]()
    for item in find_sites(program, facts):
        reason = "" if isinstance(item, Skip) else why_not(program, item)
        if isinstance(item, Skip):
            skips.append(item)
        elif reason:
            skips.append(Skip(f"lower.{item.op}", item.target, reason))
        else:
            sites.append(item)
    return sites, skips


def present(program: Program) -> Iterator[Site]:
    """Yields the `redpass::` ops that stand in the graph already."""
    for node in program.graph.nodes:
        name = ops.base_name(node)
        if ops.namespace(node) != "redpass" or name not in kernels_of.OPS:
            continue
        target: Any = node.target
        arguments = tuple(
            fx.node.map_aggregate(ops.argument(node, parameter.name), _as_ref)
            for parameter in target._schema.arguments
        )
        results = (node.name,) if len(target._schema.returns) == 1 else _parts(node)
        covers = frozenset({node.name, *results} - {""})
        yield Site(name, results, arguments, node.name, covers, "it stands in the graph")


def _as_ref(item: Any) -> Any:
    if not isinstance(item, fx.Node):
        return item
    return WeightRef(str(item.target)) if item.op == "get_attr" else Ref(item.name)


def _parts(node: fx.Node) -> tuple[str, ...]:
    found = {user.args[1]: user.name for user in node.users}
    return tuple(found.get(place, "") for place in range(len(node.meta["val"])))


@dataclass(frozen=True)
class _Reader:
    """Reads one site: what a file about it says."""

    program: Program
    site: Site
    records: Records

    def source(self) -> Source:
        op, site = kernels_of.OPS[self.site.op], self.site
        names = [argument.name for argument in schema_of(op).arguments]
        pairs = list(zip(names, site.arguments, strict=True))
        tail, parts = self._with_tail(op)
        operands = [
            self._operand(name, place) for place, (name, item) in enumerate(pairs) if _is_node(item)
        ]
        if tail is not None:
            extras = zip(tail.parameters, tail.extras, strict=True)
            operands += [_described(name, node.meta["val"], True) for name, node in extras]
        return Source(
            op=site.op,
            title=(op.reference.__doc__ or site.op).strip().split("\n")[0].rstrip("."),
            arguments=tuple(name if item is not None else "None" for name, item in pairs),
            operands=tuple(operands),
            constants=tuple(
                (name, repr(item))
                for name, item in pairs
                if item is not None and not _is_node(item)
            ),
            results=len(site.results),
            options=tuple(self._options(op)),
            reference=op.reference.__name__,
            bundle=parts,
            tail=tail.in_torch("last") if tail else (),
            dims=self._dims(operands),
        )

    def _operand(self, name: str, place: int) -> Operand:
        value = self.site.operand(self.program, place)
        if not isinstance(value, torch.Tensor):
            return Operand(name, "int", (str(ops.expression(value)),))
        return _described(name, value)

    def _with_tail(self, op: Op) -> tuple[Tail | None, Bundle]:
        """The tail that the kernel takes as its epilogue, and the kernel's source with it."""
        parts = bundle((op.reference.__module__, f"{op.launch.__module__}.kernel"))
        last = self.site.results[-1]
        for with_operands in (True, False) if last else ():
            tail = find_tail(self.program.nodes[last], with_operands=with_operands)
            try:
                if tail is not None:
                    return tail, _with_epilogue(parts, tail)
            except UnprintableError:
                continue
        return None, parts

    def _options(self, op: Op) -> Iterator[tuple[int, tuple[tuple[int | None, str], ...]]]:
        """Per compute capability: up to which size of the first operand each config runs."""
        seen = None
        for capability in CAPABILITIES:
            with compiling_for(capability):
                table = tuple(self._steps(op))
            if table != seen:
                yield capability, table
            seen = table

    def _steps(self, op: Op) -> Iterator[tuple[int | None, str]]:
        """Sizes where the config changes; equal neighbours are one step."""
        found: list[tuple[int, str]] = []
        for length in LENGTHS:
            sizes = {"batch": 1, "seq": length, "past": LENGTHS[-1]}
            values = self.site.values(self.program, sizes)
            tuned = self.records.config(Shape.of(op, values))
            options = (tuned or op.configs(*values)[0]).options()
            runs = op.pays(*values) and not op.refuses(*values)
            text = str(options) if runs else "None"
            if found and found[-1][1] == text:
                found.pop()
            found.append((values[0].numel(), text))
        yield from found[:-1]
        yield None, found[-1][1]

    def _dims(self, operands: Sequence[Operand]) -> tuple[str, ...]:
        symbols = {
            str(symbol)
            for operand in operands
            for size in operand.shape
            for symbol in sympy.sympify(size).free_symbols
        }
        return tuple(sorted(symbols))


def _with_epilogue(parts: Bundle, tail: Tail) -> Bundle:
    name, text = parts.parts[-1]
    helpers = tail.printed("y").sources
    text = "\n\n\n".join([*helpers, insert_epilogue(text, tail)])
    return Bundle(parts.imports, (*parts.parts[:-1], (name, text)))


def _is_node(item: Any) -> bool:
    return isinstance(item, Ref | WeightRef)


def _described(name: str, value: torch.Tensor, is_tail: bool = False) -> Operand:
    sizes = tuple(str(ops.expression(size)) for size in value.shape)
    return Operand(name, str(value.dtype), sizes, is_tail)


def schema_of(op: Op) -> Any:
    """Returns the parsed schema of an op."""
    return torch._C.parse_schema(f"redpass::{op.name}{op.schema}")


def _names(found: Sequence[str]) -> Iterator[str]:
    """Names the files by their op, numbered where one op has several."""
    total, seen = Counter(found), Counter[str]()
    for name in found:
        seen[name] += 1
        yield name if total[name] == 1 else f"{name}_{seen[name]}"


def _emitted(
    program: Program, source: Source, sites: Sequence[Site], name: str, origin: str
) -> Emitted:
    places = tuple(site.target for site in sites)
    cases = list(dict.fromkeys(tuple(_case(program, source, case).items()) for case in CASES))
    return Emitted(
        name=name,
        op=source.op,
        places=places,
        source=render(source, places, origin),
        test=render_test(source, name, map(dict, cases)),
        tail=source.tail,
        operands=source.operands,
        samples=dict(_samples(program, sites[0], source)),
    )


def _samples(program: Program, site: Site, source: Source) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What `run` is called with in decoding and in prefill, with the strides of the graph."""
    extras = [operand for operand in source.operands if operand.is_tail]
    for label, sizes in (("decode", DECODE), ("prefill", PREFILL)):
        values = zip(site.values(program, sizes), site.arguments, strict=True)
        found = [value for value, item in values if _is_node(item)]
        result = kernels_of.OPS[site.op].fake(*site.values(program, sizes))
        last = result if isinstance(result, torch.Tensor) else result[-1]
        yield label, (*found, *(torch.empty_like(last) for _ in extras))


def _case(program: Program, source: Source, wanted: Mapping[str, int]) -> dict[str, int]:
    case = {}
    for name in source.dims:
        low, high = program.signature.dims.get(name, (0, None))
        size = wanted.get(name, 3)
        case[name] = max(low, size if high is None else min(size, high))
    return case
