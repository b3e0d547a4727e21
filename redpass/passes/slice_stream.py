"""Turns the residual stream to its principal components and leaves out the last ones.

x = embedding(ids, E)                        [512]     ->    y = embedding(ids, E R)         [448]
h = linear(rms_norm(x, g), W)                                h = linear(rms_norm(y, 1), W g T)
x1 = x + linear(h, D)                                        y1 = y + linear(h, Rᵀ D)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.linears import linears
from redpass.analysis.rotations.ladders import Cutter, Rung, check_options, counts, named
from redpass.analysis.rotations.records import Stream
from redpass.analysis.rotations.sites import streams
from redpass.analysis.rotations.statistics import why_not_measured
from redpass.errors import PassError
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "slice_stream.principal"


@dataclass(frozen=True)
class SliceStream:
    """Makes the residual stream narrower, in all layers at once.

    What: one rotation for the whole stream, from second moments of its normed values; everything
    that writes to it (tables, positions, patches, projections, biases) and that reads it is turned
    and cut, gains move into the readers, and readers behind each norm are fitted anew. Nothing is
    added to the skips.
    When: never by itself. The stream has one ladder of widths; the predicted loss is the share of
    the squared normed stream that readers no longer get, mean over norms, on batches held back.
    Not tried: norms inside the sum (post-norm), streams that no layer or RMS norm reads. What is no
    linear map gets a product at the border. Each stream is turned at full width first and compared.
    Costs: one calibration run, two where its moments exceed 2 GiB; time with the cube of the width
    and memory with its square for each norm and rung. Replaying a recipe needs the same data.
    Source: see `redpass.analysis.rotations.bases`.

    Attributes:
        shares: what is left of the width, one candidate each; 1.0 turns and cuts nothing.
        multiple: what the widths left are a multiple of.
        refit: whether readers are fitted anew.
        tied: a table of words that is the output's matrix, too: `mixed` cuts it once and mixes what
            the output reads, `apart` makes two tables, `whole` leaves it and adds two products.
        basis: `principal` components, or `channels` of largest energy, a control.
        only: candidates by name (`stream@448`), of any width.
    """

    name: ClassVar[str] = "slice_stream"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, linears, streams)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.9, 0.8, 0.7)
    multiple: int = 8
    refit: bool = True
    tied: str = "mixed"
    basis: str = "principal"
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans a ladder of actions for each stream, widest first."""
        check_options(self.name, self.shares, self.multiple, self.tied, self.basis)
        if program.is_fake:
            return Plan(skips=(Skip(RULE, "graph", "the weights carry no data"),))
        found = facts.get(streams)
        if not found:
            return Plan(skips=(Skip(RULE, "graph", "there is no residual stream"),))
        wanted = named(self.name, self.only, found, self.multiple) if self.only else None
        return Plan.of(item for stream in found for item in self._of(stream, facts, wanted))

    def _of(
        self, stream: Stream, facts: Facts, wanted: dict[str, list[int]] | None
    ) -> Iterator[Action | Skip]:
        if wanted is not None and stream.label not in wanted:
            return
        if why := stream.obstacle or why_not_measured(facts.program, stream):
            yield Skip(RULE, stream.label, why)
            return
        widths = wanted[stream.label] if wanted else counts(stream, self.shares, self.multiple)
        if not widths:
            reason = f"no smaller width of {stream.width} is a multiple of {self.multiple}"
            yield Skip(RULE, stream.label, reason)
            return
        cutter = Cutter(facts, stream, facts.data(), tied=self.tied)
        if fault := cutter.fault():
            yield Skip(RULE, stream.label, fault)
            return
        try:
            for rung in cutter.rungs(cutter.bases(widths, self.basis), refit=self.refit):
                yield self._judge(stream, rung, cutter.moments.tokens)
        except PassError as error:
            yield Skip(RULE, stream.label, f"the graph does not take it: {error}")

    def _judge(self, stream: Stream, rung: Rung, tokens: int) -> Action | Skip:
        target = f"{stream.label}@{rung.width}"
        saved = max(rung.saving["parameters"], rung.saving["flops"])
        if saved <= 0 and rung.width < stream.width:
            count = len(stream.crossings)
            reason = f"{count} products at its borders cost more than the width saves"
            return Skip(RULE, target, reason)
        few = f"; only {tokens} tokens for {stream.width} features" * (tokens < stream.width)
        return Action(
            RULE,
            target,
            rung.edits,
            f"{rung.width} of {stream.width} features are left: readers miss "
            f"{100 * rung.error:.3g}% of the stream, {100 * rung.unrepaired:.3g}% without a "
            f"fit{few}",
            {
                "error": rung.error,
                "unrepaired": rung.unrepaired,
                "tokens": float(tokens),
                "share": rung.width / stream.width,
            },
            rung.saving,
            rung.error,
            f"{stream.label}/width",
        )
