"""Plans: what a pass wants changed, as data. Nothing here touches a graph.

An `Action` is one indivisible change with the reason for it; a `Skip` is a place that was looked
at and left alone, with the reason for that. `rewrite.apply` turns actions into a new program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from redpass.state import AddState as AddState

if TYPE_CHECKING:
    from redpass.facts import Facts
    from redpass.program import Program


class Exactness(Enum):
    """What a pass promises about the result; decides how its actions are checked."""

    SAME_BITS = "same bits"
    WITHIN_TOLERANCE = "within tolerance"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Ref:
    """Stands for the value of the node called `name` in the arguments of an `Insert`."""

    name: str


@dataclass(frozen=True)
class WeightRef:
    """Stands for the weight called `name`: an existing one, or one that a `SetWeight` adds."""

    name: str


@dataclass(frozen=True)
class Literal:
    """Stands for a plain number in the arguments of the readers: a size that is constant."""

    value: int | float | bool


@dataclass(frozen=True)
class Insert:
    """Adds a node that calls `target`, just before the node called `before`.

    Arguments hold `Ref` and `WeightRef` where the graph would hold nodes. `name` is how other
    edits of the same plan refer to the new node; the graph may number it if it is taken.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    before: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Replace:
    """Lets every reader of the value `old` read `new` instead. `new` may be an inserted node."""

    old: str
    new: str | WeightRef | Literal


@dataclass(frozen=True)
class SetArgument:
    """Lets one node read another value: replaces `old` by `new` in the arguments of `node`."""

    node: str
    old: str
    new: str | WeightRef


@dataclass(frozen=True)
class SetCall:
    """Gives a node other arguments and keeps its operation and its readers.

    Arguments as in `Insert`; None leaves the positional ones, which other actions may change, as
    they are. Sizes may change: all fake values behind it are computed again after all edits.
    """

    node: str
    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShrinkSizes:
    """Takes `by` off the sizes that an argument of a call is, besides what other actions take."""

    node: str
    argument: int | str
    by: tuple[int, ...]


@dataclass(frozen=True)
class SetWeight:
    """Adds a weight under a name that is not taken. `source` says what it was made from."""

    name: str
    value: Tensor
    source: str = ""


@dataclass(frozen=True)
class Narrow:
    """Takes slices out of one axis of a weight, for all its readers; the weight keeps its name.

    Places are those in the weight of the program that the plan is about. What other actions took
    out of it plays no part, so cuts of several axes, and of several parts of one axis, compose.

    Attributes:
        gone: places along `axis` that go, rising; of two dimensions where each slice of the
            weight's first axis loses its own, and `kept` and `spread` have one more then, too.
        kept: places that stay and take over what the lost ones did, rising.
        spread: `[gone, kept]`, what of each lost slice is added to each kept one; None for nothing.
        bias: weight that the lost slices, weighted by `shift` `[gone]` and summed, are added to.
    """

    weight: str
    axis: int
    gone: Tensor
    kept: Tensor | None = None
    spread: Tensor | None = None
    bias: str = ""
    shift: Tensor | None = None


@dataclass(frozen=True)
class Multiply:
    """Multiplies one axis of a weight by a matrix, for all its readers; the weight keeps its name.

    Cuts of other axes by other actions compose with it, in any order.

    Attributes:
        weight: its name.
        axis: the axis, of `size` before and `new` after.
        matrix: `[size, new]`, float64.
        scale: `[size]`, what the slices are multiplied by first; None for nothing.
        bias: weight to which `weight` as it was, times `shift`, is added; "" for none.
        shift: `[size]`.
    """

    weight: str
    axis: int
    matrix: Tensor
    scale: Tensor | None = None
    bias: str = ""
    shift: Tensor | None = None


@dataclass(frozen=True)
class DropState:
    """Removes a state pair (a layer's cache entry) from the inputs and outputs."""

    input: str
    output: str


@dataclass(frozen=True)
class ResizeState:
    """Gives a state pair (a layer's cache entry) another constant size on one axis."""

    input: str
    output: str
    axis: int
    size: int


@dataclass(frozen=True)
class Once:
    """Edits that several actions share: the first one does `first`, each other one `later`."""

    name: str
    first: tuple[Edit, ...]
    later: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class DropTerm:
    """Lets the sum at the add `join` do without its operand `term`; the other one stands for it.

    Several terms of one sum can be dropped, by one action or by several, in any order.
    """

    join: str
    term: str


@dataclass(frozen=True)
class Bypass:
    """Lets whoever reads the value `after` read the earlier value `entry`.

    Unlike with `Replace`, parts that overlap go together: what one of them leaves out stays out.

    Attributes:
        inside: values between the two that another `Bypass` may end or begin at.
    """

    after: str
    entry: str
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Erase:
    """Removes a node that nobody reads. What only it read goes with it."""

    node: str


Calls = Insert | Replace | SetArgument | SetCall | ShrinkSizes | DropTerm | Bypass | Erase
Edit = Calls | SetWeight | Narrow | Multiply | DropState | ResizeState | AddState | Once


@dataclass(frozen=True)
class Action:
    """One indivisible change.

    Attributes:
        rule: dotted under its pass: `drop_branches.similar`.
        target: the place, a label that is stable from run to run: a node name or a branch label.
        edits: what is done, in order.
        reason: why, in words a user reads.
        evidence: figures behind the reason.
        saving: predicted change per cost name (`parameters`, `flops`, `bytes`,
            `kv_bytes_per_token`); positive is saved.
        loss: predicted loss of quality, comparable between actions of one run, None for exact.
        place: what actions with the same place are rivals about: rungs of one ladder, as the
            widths that a layer may be cut to. At most one of them is taken. "" for none.
    """

    rule: str
    target: str
    edits: tuple[Edit, ...]
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    saving: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    place: str = ""

    @property
    def key(self) -> str:
        """Names the action in recipes, limits and skips."""
        return f"{self.rule}:{self.target}"


@dataclass(frozen=True)
class Skip:
    """A place that a rule looked at and left alone, and the condition that failed."""

    rule: str
    target: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What one pass wants to do to one program."""

    actions: tuple[Action, ...] = ()
    skips: tuple[Skip, ...] = ()

    @staticmethod
    def of(items: Iterable[Action | Skip]) -> Plan:
        """Sorts a stream of actions and skips into a plan, keeping the order."""
        found = tuple(items)
        return Plan(
            tuple(item for item in found if isinstance(item, Action)),
            tuple(item for item in found if isinstance(item, Skip)),
        )


@runtime_checkable
class Pass(Protocol):
    """What a pass is: a frozen dataclass with its options as fields and one method.

    Attributes:
        name: a verb phrase; also what users type and reports print.
        needs: the analyses `plan` may ask `facts` for.
        exactness: what the result promises.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Callable[..., Any], ...]]
    exactness: ClassVar[Exactness]

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Returns what to change and what was left alone. Never edits, keeps no state."""
        ...
