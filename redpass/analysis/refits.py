"""`refits`: projections fitted anew to what the loaded model's stream was, by ridge regression.

Behind the first branch that was dropped or cut the stream differs from the loaded model's. Each
projection `W` that writes to it is fitted anew, one after the other in the order of the graph: with
`h` what the projection reads in the rewritten model, `s` the stream it gives and `t` the loaded
model's stream where the next branch reads it,

    argmin over D of || h D - (t - s) ||^2 + strength * || D ||^2,    W + D in place of W

(a column of ones in `h` gives the bias' part). The sums are Gram matrices, so memory does not grow
with the data. The strength is the one that is best on calibration batches that were not fitted on
(`ridge`); a projection that gains nothing there stays as it is.

Source: least-squares reconstruction after pruning, as in Sparse GPT (Frantar and Alistarh 2023,
arXiv:2301.00774) and FLAP (An et al. 2024, arXiv:2312.11983), here of the stream and in sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass import kept_tensors, rewrite
from redpass.analysis.compared import Compared
from redpass.analysis.flow import Flow
from redpass.analysis.linears import Linear, linears, new_name
from redpass.analysis.ridge import RidgeFit, Sums, best_fit, is_held_back
from redpass.analysis.structure import Branch, structure
from redpass.analysis.tokens import Tokens
from redpass.blocks import Blocks
from redpass.data import Batches
from redpass.facts import Facts
from redpass.fingerprint import fingerprint
from redpass.partial import unchanged
from redpass.plan import Action, Edit, SetWeight
from redpass.program import Program


@dataclass(frozen=True)
class Refit:
    """One projection fitted anew.

    Attributes:
        branch: label of its branch.
        linear: the projection in the rewritten program.
        edits: what puts the new weights in its place.
        strength: the ridge strength chosen.
        before: share of the stream that was off on the batches held back, squared.
        after: the same with the new weights.
    """

    branch: str
    linear: Linear
    edits: tuple[Edit, ...]
    strength: float
    before: float
    after: float


@dataclass(frozen=True)
class Refits:
    """What was fitted, in order; and places left alone with the reason, by branch label."""

    found: tuple[Refit, ...] = ()
    skips: Mapping[str, str] | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Place:
    branch: Branch
    linear: Linear
    stream: str
    target: str


def refits(program: Program, facts: Facts) -> Refits:
    """Fits every projection behind the first branch that was dropped or cut, in order.

    Raises:
        DataError: no calibration data, a single batch, or values that are NaN or infinite.
    """
    if program.lineage is None:
        return Refits(reason="no branch was dropped or cut, so there is nothing to repair")
    original, data = program.lineage.source, facts.data()
    skips: dict[str, str] = {}
    fit, found = _Fit(program, original, data, facts.journal.blocks), list[Refit]()
    places = list(_places(program, original, facts, skips))
    for place in places:
        refit = fit.at(place)
        if refit is None:
            skips[place.branch.label] = "a fit gains nothing on the batches held back"
        else:
            found.append(refit)
    return Refits(tuple(found), skips)


def _places(
    program: Program, original: Program, facts: Facts, skips: dict[str, str]
) -> Iterator[_Place]:
    """The projections that write to the stream behind, or next before, what was changed."""
    old = structure(original).branches
    branches = facts.get(structure).branches
    matched = match_branches(branches, old)
    mapped = {branch.entry for branch in branches} - {branch.entry for branch, _ in matched}
    dropped = sorted(set(range(len(old))) - {place for _, place in matched})
    first = _first_change(program, old, dropped)
    known = facts.get(linears)
    for branch, place in matched:
        if place < first - 1:
            continue
        linear = _projection(program, branch, known.by_node)
        reason = _why_not(branch, linear, known.shared(linear.names) if linear else None)
        if branch.after in mapped:
            reason = "a map of the stream behind it is fitted already"
        target = _target(old, place, {*dropped})
        if reason or linear is None or target not in original.nodes:
            skips[branch.label] = reason or "the loaded model has no such value of the stream"
            continue
        stream = branch.join if branch.form == "post-norm" else branch.after
        if Tokens(program).width(stream) != Tokens(original).width(target):
            skips[branch.label] = "the stream is narrower than the loaded model's"
            continue
        yield _Place(branch, linear, stream, target)


def match_branches(
    branches: tuple[Branch, ...], old: tuple[Branch, ...]
) -> list[tuple[Branch, int]]:
    """Returns branches of a rewritten program with their places among those of the loaded one.

    A rewrite keeps the value that a branch adds, or at least the sum it is added to.
    """
    exits = {branch.exit: place for place, branch in enumerate(old)}
    joins = {branch.join: place for place, branch in enumerate(old) if branch.form != "parallel"}
    places = [exits.get(branch.exit, joins.get(branch.join)) for branch in branches]
    return [(b, place) for b, place in zip(branches, places, strict=True) if place is not None]


def _first_change(program: Program, old: tuple[Branch, ...], dropped: Sequence[int]) -> int:
    """The first branch of the loaded model that was dropped, or gives something else now."""
    lineage = program.lineage
    if lineage is None or lineage.plain is None:
        return dropped[0] if dropped else 0
    same = unchanged(lineage.source, lineage.plain)
    changed = (place for place, branch in enumerate(old) if branch.exit not in same)
    return min([*dropped[:1], *changed], default=len(old) + 1)


def _why_not(branch: Branch, linear: Linear | None, shared: str | None) -> str:
    if branch.form not in ("pre-norm", "plain", "post-norm"):
        return f"the projection of a {branch.form} branch is not what is added to the stream"
    if linear is None:
        return "no single linear layer writes to the stream"
    return f"its weight '{shared}' is shared with another layer" if shared else ""


def _target(old: tuple[Branch, ...], place: int, dropped: set[int]) -> str:
    """The loaded model's stream behind this branch and those that followed it and are gone.

    In a post-norm model the sum before the norm: a norm follows each branch, dropped or not.
    """
    if old[place].form == "post-norm":
        return old[place].join
    while place + 1 in dropped and old[place + 1].entry == old[place].after:
        place += 1
    return old[place].after


def _projection(program: Program, branch: Branch, known: Mapping[str, Linear]) -> Linear | None:
    """The linear whose result is added to the stream, up to reshapes and dropout."""
    node = Flow(program).peel(program.nodes[branch.exit])
    return known.get(node.name)


class _Fit:
    def __init__(self, program: Program, original: Program, data: Batches, blocks: Blocks) -> None:
        self.compared, self.blocks = Compared(program, original, data), blocks
        self.digest = data.digest()

    def at(self, place: _Place) -> Refit | None:
        """Fits one projection; the next ones see the model with it."""
        found = self._recalled(place)
        if not found.gains:
            return None
        program = self.compared.program
        edits = _edits(program, place.linear, found.change)
        self.compared.move(rewrite.apply(program, [Action("refit", "here", edits, "")]))
        label = place.branch.label
        return Refit(label, place.linear, edits, found.strength, found.before, found.after)

    def _recalled(self, place: _Place) -> RidgeFit:
        """The fit that a killed run kept, or a new one."""
        if self.blocks.path is None:
            return self._measured(place)
        program, linear = self.compared.program, place.linear
        where = f"{linear.node} towards {place.target} over {self.digest}"
        name = f"fit of {where}: {fingerprint(program)}"
        if kept := kept_tensors.find(self.blocks, name):
            return RidgeFit(kept[0], *kept[1])
        found = self._measured(place)
        about = [found.strength, found.before, found.after]
        kept_tensors.keep(self.blocks, name, found.change, about)
        return found

    def _measured(self, place: _Place) -> RidgeFit:
        linear, has_bias = place.linear, place.linear.bias is not None
        sums = [Sums(linear.ins + has_bias, linear.outs) for _ in range(2)]
        names, label = (linear.input, place.stream), place.branch.label
        for number, mine, target in self.compared.batches(names, place.target, label):
            features, stream = mine
            if has_bias:
                features = torch.nn.functional.pad(features, (0, 1), value=1.0)
            size = float(target.square().sum())
            sums[is_held_back(number)].add(features, target - stream, size)
        return best_fit(sums, has_bias=has_bias)


def _edits(program: Program, linear: Linear, change: Tensor) -> tuple[Edit, ...]:
    """New weights for the linear; a linear without a bias keeps having none."""
    matrix = linear.matrix(program)
    new = (matrix.double() + change[: linear.ins].T).to(matrix.dtype)
    name = new_name(program, linear.weight, "refit")
    edits: list[Edit] = [linear.store(name, new, f"{linear.weight}, fitted to the loaded stream")]
    edits += linear.swap(program, linear.weight, name)
    offset = linear.offset(program)
    if linear.bias is not None and offset is not None:
        bias = new_name(program, linear.bias, "refit")
        value = (offset.double() + change[-1]).to(offset.dtype)
        edits += [SetWeight(bias, value, f"{linear.bias}, fitted to the loaded stream")]
        edits += linear.swap(program, linear.bias, bias)
    return tuple(edits)
