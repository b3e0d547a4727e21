"""What a branch is: attention, feed-forward, experts, more than one of these, or none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from redpass.analysis.attention import Attentions
from redpass.analysis.branches import Region
from redpass.analysis.cores import Core
from redpass.analysis.experts import find_experts
from redpass.analysis.feed_forward import find_feed_forward
from redpass.analysis.flow import Flow
from redpass.analysis.maps import back_to_maps
from redpass.analysis.provenance import Tracer
from redpass.analysis.records import Attention, Experts, FeedForward, Norm
from redpass.analysis.stream import is_learned


@dataclass(frozen=True)
class Content:
    """A branch's kind and the records that go with it."""

    kind: str
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    experts: Experts | None = None


class Describer:
    """Describes the branches of one graph; collects notes on what it could not tell."""

    def __init__(self, flow: Flow, norms: Iterable[Norm], cores: tuple[Core, ...]) -> None:
        self.flow = flow
        self.cores = cores
        self.attentions = Attentions(flow, norms)
        self.tracer = Tracer(flow)
        self.notes: list[str] = []

    def content(self, region: Region) -> Content:
        """Tells what the branch holds."""
        maps = self._maps(region.path)
        cores = [core for core in self.cores if core.node in region.path]
        if cores:
            return self._attending(region, cores, maps)
        experts = find_experts(self.flow, region.path, maps)
        if experts is not None:
            return Content("experts", experts=experts)
        found = find_feed_forward(self.flow, self.tracer, maps)
        if found is None:
            self._note(region, "its maps make no attention, feed-forward or experts")
            return Content("other")
        record, used = found
        kind = "feed-forward" if used >= set(maps) else "mixed"
        return Content(kind, feed_forward=record)

    def _attending(self, region: Region, cores: list[Core], maps: list[fx.Node]) -> Content:
        attention = self.attentions.describe(cores[0], region.path)
        before = {m for core in cores for m in self._above(core, region.path)}
        output = None if attention.output is None else attention.output.node
        rest = [m for m in maps if m not in before and m.name != output]
        if len(cores) > 1:
            self._note(region, f"it holds {len(cores)} attentions; the first is described")
        if not rest:
            return Content("attention" if len(cores) == 1 else "mixed", attention)
        found = find_feed_forward(self.flow, self.tracer, maps)
        self._note(region, f"beside its attention it maps by {', '.join(m.name for m in rest)}")
        return Content("mixed", attention, None if found is None else found[0])

    def _maps(self, path: frozenset[fx.Node]) -> list[fx.Node]:
        found = [node for node in path if is_learned(self.flow, node)]
        return sorted(found, key=self.flow.order.__getitem__)

    def _above(self, core: Core, path: frozenset[fx.Node]) -> set[fx.Node]:
        """The maps that queries, keys and values are made by, also through further maps."""
        found: set[fx.Node] = set()
        todo = [core.query, core.key, core.value]
        while todo:
            _, maps = back_to_maps(self.flow, todo.pop())
            fresh = [m for m in maps if m in path and m not in found]
            found.update(fresh)
            todo += [arg for m in fresh for arg in m.all_input_nodes if arg in path]
        return found

    def _note(self, region: Region, text: str) -> None:
        self.notes.append(f"branch that ends in {region.term.node.name}: {text}")
