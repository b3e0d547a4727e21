"""The original program's outputs on a list of batches, computed once for many comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from redpass import kept_tensors
from redpass.data import Batches
from redpass.errors import DataError, nearest
from redpass.journal import Journal
from redpass.partial import Part
from redpass.program import Port, Program
from redpass.verify.inputs import complete

LIMIT = 1 << 30


def quality_port(program: Program, name: str | None = None) -> Port:
    """Returns the output that quality is measured on.

    Args:
        name: the port wanted; None takes `logits`, or the first floating-point output that is no
            state.

    Raises:
        DataError: no such output.
    """
    ports = {port.name: port for port in program.signature.outputs}
    if name is not None:
        if name not in ports:
            raise DataError(f"there is no output '{name}'", hint=nearest(name, ports))
        return ports[name]
    state = {output for _, output in program.signature.state}
    usable = [p for p in ports.values() if p.dtype.is_floating_point and p.name not in state]
    if not usable:
        raise DataError("no output holds floating-point values", hint="name one with port=")
    return ports["logits"] if ports.get("logits") in usable else usable[0]


class Originals:
    """Keeps what the original program says about each batch, for search over many programs.

    Outputs are kept as long as they fit in `limit` bytes and computed again beyond that; figures
    derived from them (a loss a token) are small and always kept.

    Args:
        program: the original.
        batches: the data; `evaluate` takes this cache for the same data only.
        port: the output to keep; None as in `quality_port`.
        limit: bytes of outputs to keep.
        journal: remembers what programs measured on these data, for a run that is resumed.

    Attributes:
        quicker: gives the program's output on a batch for who keeps much of it; None runs it.
    """

    def __init__(
        self,
        program: Program,
        batches: Batches,
        *,
        port: str | None = None,
        limit: int = LIMIT,
        journal: Journal | None = None,
    ) -> None:
        self.program, self.batches, self.limit = program, batches, limit
        self.journal = journal or Journal(None)
        self.port = quality_port(program, port).name
        self.quicker: Callable[[int], Tensor] | None = None
        self._outputs: dict[int, Tensor] = {}
        self._kept: dict[Any, Any] = {}

    def output(self, number: int) -> Tensor:
        """Returns the original's output on batch `number`."""
        if number in self._outputs:
            return self._outputs[number]
        value = self._recalled(number)
        if self.bytes + value.nbytes <= self.limit:
            self._outputs[number] = value
        return value

    def _recalled(self, number: int) -> Tensor:
        """The output that a killed run kept, or a new one."""
        blocks = self.journal.blocks
        if blocks.path is None:
            return self._compute(number)
        name = f"{self.port} of batch {self.batches[number : number + 1].digest()}"
        if kept := kept_tensors.find(blocks, name):
            return kept[0]
        value = self._compute(number)
        kept_tensors.keep(blocks, name, value)
        return value

    def _compute(self, number: int) -> Tensor:
        if self.quicker:
            return self.quicker(number)
        return run_port(self.program, self.batches[number], self.port)

    @property
    def bytes(self) -> int:
        """How many bytes of outputs are kept."""
        return sum(value.nbytes for value in self._outputs.values())

    def first(self, count: int) -> Originals:
        """Returns the same for the first `count` batches alone; their outputs are kept once."""
        if count >= len(self.batches):
            return self
        few = Originals(
            self.program,
            self.batches[:count],
            port=self.port,
            limit=self.limit,
            journal=self.journal,
        )
        few._outputs = self._outputs
        return few

    def keep(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Returns what `compute` gave at the first call with `key`."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def __str__(self) -> str:
        held = f"{len(self._outputs)} of {len(self.batches)} batches"
        return f"outputs of {held} held in {self.bytes / 2**20:.1f} MiB"


def run_port(program: Program, batch: Any, port: str) -> Tensor:
    """Runs `program` on one batch and returns one output."""
    values = program.bind((), complete(program, batch))
    name = program.output_value(port).name
    given = {node.name: value for node, value in zip(program.inputs, values, strict=True)}
    found: Tensor = Part(program, (name,), ()).run(given)[name]
    return found
