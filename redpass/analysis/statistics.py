"""Statistics of a program's values from one streaming run: sums that add up, bounded memory.

    from redpass.analysis.observers import CrossGram
    from redpass.analysis.statistics import collect

    wanted = [CrossGram("add_3", "add_3"), CrossGram("add_3", "add_9")]
    found = collect(program, wanted, facts.data(), labels={"add_3": "layers.1"})
    x, xy = found.moments("add_3", "add_3"), found.moments("add_3", "add_9")
    m = torch.linalg.solve(x.gram + strength * eye, xy.gram + strength * eye)  # ridge towards I

All sums are float64. Tokens that are padding are left out. A sum over two parts of the data is
the sum of the two: `collect(a) + collect(b)`. A value is dropped as soon as every observer that
waits for it has all it needs, so a Gram matrix of each layer's hidden activations holds one
layer's values at a time.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.observers import STRETCH, CrossGram, Observer
from redpass.analysis.tokens import Tokens
from redpass.checks import memory
from redpass.data import Batch, Batches
from redpass.errors import DataError, UsageError
from redpass.program import Program, interpret
from redpass.progress import Listener, Silent, track
from redpass.verify.inputs import complete

LIMIT = 4 << 30
"""Bytes that all sums of one run may take together."""

PORTION = 1 << 30
"""Bytes of the sums that one run makes where several runs can share the work."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of two values, summed over tokens; float64.

    Attributes:
        gram: `Xᵀ Y`, `[left, right]`.
        left_sum: sum of the rows of X, `[left]`.
        right_sum: sum of the rows of Y, `[right]`.
        tokens: how many rows.
    """

    gram: Tensor
    left_sum: Tensor
    right_sum: Tensor
    tokens: int

    @property
    def centred(self) -> Tensor:
        """`(X - mean X)ᵀ (Y - mean Y)`, `[left, right]`."""
        return self.gram - torch.outer(self.left_sum, self.right_sum) / max(self.tokens, 1)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums of one run, or of several added up.

    Attributes:
        totals: observer -> its sum, float64.
        tokens: observer -> how many tokens it saw.
    """

    totals: Mapping[Observer, Tensor]
    tokens: Mapping[Observer, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "totals", MappingProxyType(dict(self.totals)))
        object.__setattr__(self, "tokens", MappingProxyType(dict(self.tokens)))

    def __add__(self, other: Statistics) -> Statistics:
        """Returns the statistics of both parts of the data. Raises UsageError when they differ."""
        if self.totals.keys() != other.totals.keys():
            raise UsageError("statistics of different observers cannot be added")
        totals = {key: total + other.totals[key] for key, total in self.totals.items()}
        return Statistics(totals, {key: n + other.tokens[key] for key, n in self.tokens.items()})

    @property
    def bytes(self) -> int:
        """What the sums take in memory."""
        return sum(total.numel() * total.element_size() for total in self.totals.values())

    def mean(self, observer: Observer) -> Tensor:
        """Returns an observer's sum over its tokens. Raises KeyError."""
        return self.totals[observer] / self.tokens[observer]

    def moments(self, left: str, right: str) -> Moments:
        """Returns what `CrossGram(left, right)` summed up. Raises KeyError."""
        whole = self.totals[CrossGram(left, right)]
        tokens = self.tokens[CrossGram(left, right)]
        return Moments(whole[:-1, :-1], whole[:-1, -1], whole[-1, :-1], tokens)

    def to_json(self) -> dict[str, Any]:
        """Returns the sums as text that holds every bit, for a journal."""
        return {
            repr(observer): [
                list(total.shape),
                base64.b64encode(total.contiguous().numpy().tobytes()).decode(),
                self.tokens[observer],
            ]
            for observer, total in self.totals.items()
        }

    @staticmethod
    def from_json(observers: Iterable[Observer], data: Mapping[str, Any]) -> Statistics:
        """Reads back what `to_json` gave for these observers. Raises KeyError, ValueError."""
        totals, tokens = {}, {}
        for observer in observers:
            shape, text, tokens[observer] = data[repr(observer)]
            raw = bytearray(base64.b64decode(text, validate=True))
            totals[observer] = torch.frombuffer(raw, dtype=torch.float64).reshape(shape)
        return Statistics(totals, tokens)


def footprint(program: Program, observers: Iterable[Observer]) -> int:
    """Returns how many bytes the sums of these observers take, without running anything."""
    tokens = Tokens(program)
    return sum(8 * math.prod(shape_of(o, tokens)) for o in dict.fromkeys(observers))


def room() -> int:
    """Returns bytes that the sums of one run may take: a quarter of what is free, 4 GiB at most."""
    there = memory.free()
    return LIMIT if there is None else min(LIMIT, there // 4)


def portions(
    program: Program, wanted: Mapping[str, Iterable[Observer]], limit: int = PORTION
) -> Iterator[list[str]]:
    """Splits places in groups whose sums fit in memory together, each for a run of its own.

    Args:
        wanted: place -> what is to be observed for it; neighbours may share observers.
        limit: bytes of a group's sums; a place that takes more is a group by itself.
    """
    group: list[str] = []
    for place in wanted:
        together = [observer for each in (*group, place) for observer in wanted[each]]
        if group and footprint(program, together) > limit:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def collect(
    program: Program,
    observers: Iterable[Observer],
    data: Batches,
    *,
    labels: Mapping[str, str] | None = None,
    limit: int = LIMIT,
    listener: Listener | None = None,
) -> Statistics:
    """Runs `data` through `program` once and sums up what the observers ask for.

    Beside the sums, memory holds one batch's run and those of its values that observers still
    wait for.

    Args:
        observers: each counted once, however often it is named.
        labels: node name -> what to call it in errors: `layers.3.attention`.
        limit: bytes that the sums may take together; compared before anything runs.

    Raises:
        UsageError: an observer names a node that does not exist, or the sums exceed `limit`.
        DataError: a value that is NaN or infinite (named), or values of one observer that do not
            have the same tokens, or data without a single token.
    """
    wanted = tuple(dict.fromkeys(observers))
    for name in {name for observer in wanted for name in observer.values}:
        if name not in program.nodes:
            raise UsageError("an observer names a value that the graph does not have", place=name)
    size = footprint(program, wanted)
    if size > limit:
        raise UsageError(
            f"the sums of this analysis take {size / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB",
            place="calibration",
            hint="ask for fewer places at once, or give more memory",
        )
    run = _Run(program, wanted, dict(labels or {}))
    for batch in track(data, listener or Silent(), "calibration", len(data)):
        run.add(batch)
    return run.result(data.source)


def shape_of(observer: Observer, tokens: Tokens) -> tuple[int, ...]:
    """Returns the shape of an observer's sum, without running anything."""
    return observer.shape({name: tokens.width(name) for name in observer.values})


@dataclass(eq=False)
class _Run:
    program: Program
    observers: tuple[Observer, ...]
    labels: dict[str, str]
    readers: dict[str, list[Observer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = Tokens(self.program)
        self.totals: dict[Observer, Tensor] = {}
        self.tokens = dict.fromkeys(self.observers, 0)
        for observer in self.observers:
            shape = shape_of(observer, self.rows)
            self.totals[observer] = torch.zeros(shape, dtype=torch.float64)
            for name in dict.fromkeys(observer.values):
                self.readers.setdefault(name, []).append(observer)

    def add(self, batch: Batch) -> None:
        """Runs one batch; observers are served as soon as they have all their values."""
        inputs = complete(self.program, batch)
        seen: dict[str, Tensor] = {}
        waiting = {observer: set(observer.values) for observer in self.observers}

        def watch(node: fx.Node, value: Any) -> Any:
            if node.name in self.readers:
                seen[node.name] = self._checked(node.name, value, inputs)
                for observer in self.readers[node.name]:
                    waiting[observer].discard(node.name)
                    if not waiting[observer]:
                        del waiting[observer]
                        self._sum(observer, seen)
                self._forget(seen, waiting)
            return value

        names = [port.name for port in self.program.signature.inputs]
        interpret(self.program, [inputs[name] for name in names], watch)

    def _checked(self, name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        rows = self.rows.rows(name, value, inputs)
        if not bool(torch.isfinite(rows).all()):
            place = self.labels.get(name, name)
            raise DataError("its values on the calibration data are NaN or infinite", place=place)
        return rows

    def _sum(self, observer: Observer, seen: Mapping[str, Tensor]) -> None:
        count = {len(seen[name]) for name in observer.values}
        if len(count) > 1:
            places = ", ".join(self.labels.get(name, name) for name in observer.values)
            raise DataError("these values do not have the same tokens", place=places)
        # Each stretch takes tokens from all over the batch: neighbours in a row are alike, and a
        # kernel alignment among neighbours would miss what differs between rows.
        step = -(-(total := count.pop()) // STRETCH)
        for start in range(step):
            part = {name: seen[name][start::step] for name in observer.values}
            self.totals[observer] += observer.measure(part)
        self.tokens[observer] += total

    def _forget(self, seen: dict[str, Tensor], waiting: Mapping[Observer, Any]) -> None:
        """Drops the values nobody waits for any more."""
        for name in [n for n in seen if not any(o in waiting for o in self.readers[n])]:
            del seen[name]

    def result(self, source: str) -> Statistics:
        """The sums. Raises DataError when there were no tokens at all."""
        if not all(self.tokens.values()):
            raise DataError("every token is padding", file=source, hint="give rows that hold text")
        return Statistics(self.totals, self.tokens)
