"""From skip connections to branches: their form, their own nodes, state and weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.records import Norm, StatePair
from redpass.analysis.stream import Skip, Term
from redpass.program import output_node


@dataclass(frozen=True, eq=False)
class Region:
    """One branch before it is named: a term of a skip connection and what belongs to it."""

    skip: Skip
    term: Term
    path: frozenset[fx.Node]
    own: frozenset[fx.Node]
    state: tuple[StatePair, ...]
    form: str
    after: fx.Node


class Regions:
    """Makes regions; knows the norms by node and the state pairs by value."""

    def __init__(self, flow: Flow, norms: Iterable[Norm]) -> None:
        nodes = flow.program.nodes
        self.flow = flow
        # A batch norm belongs to its convolution: it says nothing about where the stream is normed.
        own = [norm for norm in norms if norm.kind != "batch"]
        self.norm_of = {nodes[name]: norm for norm in own for name in norm.nodes}
        self.norm_at = {nodes[norm.output]: norm for norm in own}
        self.output = output_node(flow.program.graph)
        self.state = _state_values(flow)

    def of(self, skip: Skip) -> list[Region]:
        """Returns one region a term of the skip connection."""
        forms = [self._form(skip, i) for i in range(len(skip.terms))]
        result = []
        for term, path, form in zip(skip.terms, skip.paths, forms, strict=True):
            state = self._state_in(path)
            own = self._own(term, state)
            state = tuple(pair for pair in state if self._is_own_state(pair, own))
            own = self._own(term, state)
            after = self._norm_after(skip.root) if form == "post-norm" else None
            result.append(Region(skip, term, path, own, state, form, after or skip.root))
        return result

    def _form(self, skip: Skip, index: int) -> str:
        if len(skip.terms) > 1:
            return "parallel"
        before = self._reads_normed(skip.entry, skip.paths[index])
        behind = self._ends_normed(skip.terms[index].node, skip.paths[index])
        if behind:
            return "sandwich" if before else "output-norm"
        if before:
            return "pre-norm"
        # The last pre-norm branch is followed by a norm too: hence the order of the questions.
        return "plain" if self._norm_after(skip.root) is None else "post-norm"

    def _reads_normed(self, entry: fx.Node, path: frozenset[fx.Node]) -> bool:
        nodes = self.flow.program.nodes
        for reader in self.flow.readers(entry):
            if reader not in path:
                continue
            norm = self.norm_of.get(reader)
            if norm is None or self.flow.peel(nodes[norm.input]) is not self.flow.peel(entry):
                return False
        return True

    def _ends_normed(self, exit_: fx.Node, path: frozenset[fx.Node]) -> bool:
        """Whether the last op that is no scaling by a gate or layer scale is a norm."""
        node = self.flow.peel(exit_)
        while node in path and node not in self.norm_at and ops.is_call(node, "mul"):
            inside = [a for a in node.all_input_nodes if a in path]
            if len(inside) != 1:
                return False
            node = self.flow.peel(inside[0])
        return node in self.norm_at

    def _norm_after(self, root: fx.Node) -> fx.Node | None:
        """The norm that alone reads the stream after `root`, or None."""
        readers = list(self.flow.readers(root))
        norms = {self.norm_of[r].output for r in readers if r in self.norm_of}
        if len(norms) != 1 or not all(r in self.norm_of for r in readers):
            return None
        nodes = self.flow.program.nodes
        output = nodes[norms.pop()]
        start = self.flow.peel(nodes[self.norm_at[output].input])
        return output if start is self.flow.peel(root) else None

    def _state_in(self, path: frozenset[fx.Node]) -> tuple[StatePair, ...]:
        """State pairs that `path` reads or makes: the nearest values they are made of are in it."""
        return tuple(
            pair
            for pair, (source, value) in self.state.items()
            if any(user in path for user in _beyond_views(source))
            or value in path
            or (value in self.flow.live and self.flow.peel(value) in path)
        )

    def _own(self, term: Term, state: tuple[StatePair, ...]) -> frozenset[fx.Node]:
        """Nodes that nothing needs once `term` is not added and its state is not returned."""
        own: set[fx.Node] = set()
        returned = {self.state[pair][1] for pair in state}
        todo = [term.node, *returned]
        while todo:
            node = todo.pop()
            stays = node.op != "placeholder" and not ops.is_pure(node)
            if node in own or stays:
                continue
            users = (u for u in node.users if u not in own)
            if all(self._is_lost(node, user, term, returned) for user in users):
                own.add(node)
                todo.extend(node.all_input_nodes)
        sources = {self.state[pair][0] for pair in state}
        return frozenset(n for n in own if n.op != "placeholder" or n in sources)

    def _is_lost(self, node: fx.Node, user: fx.Node, term: Term, returned: set[fx.Node]) -> bool:
        if user is self.output:
            return node in returned
        return user is term.join and node is term.node and term.other is not node

    def _is_own_state(self, pair: StatePair, own: frozenset[fx.Node]) -> bool:
        source, value = self.state[pair]
        return value in own and all(u in own or ops.is_size(u) for u in source.users)


def _state_values(flow: Flow) -> dict[StatePair, tuple[fx.Node, fx.Node]]:
    program = flow.program
    return {
        pair: (program.input_node(pair[0]), program.output_value(pair[1]))
        for pair in program.signature.state
    }


def _beyond_views(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if ops.is_view(user):
            todo.extend(user.users)
        else:
            found.add(user)
    return found


def weights_on(flow: Flow, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Names of the weights that `nodes` read, directly or through constant expressions."""
    found: set[fx.Node] = set()
    todo = [a for node in nodes for a in node.all_input_nodes if a not in flow.live]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    names = (n for n in found if n.op == "get_attr")
    return tuple(str(n.target) for n in sorted(names, key=flow.order.__getitem__))
