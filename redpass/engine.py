"""The engine: runs one pass at a time on the current program, checks it, rolls back what fails.

It holds the only mutable state of a run: the current program, the action counter, the records.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from torch import Tensor

from redpass import rewrite
from redpass.config import Settings
from redpass.data import Batches
from redpass.errors import PassError, RedpassError, VerifyError
from redpass.facts import Facts
from redpass.journal import Journal
from redpass.lineage import extend
from redpass.passes.spec import format_pass, format_passes
from redpass.plan import Action, Exactness, Pass, Plan
from redpass.program import Program, Step
from redpass.progress import Listener
from redpass.record import ActionRecord, PassRecord, SkipRecord
from redpass.reproducer import write_reproducer
from redpass.verify.inputs import check_inputs
from redpass.verify.numbers import compare, reference
from redpass.verify.rules import check_rules

MOST_ROLLBACKS = 8
"""After this many guilty actions in one plan the rest of the plan is given up."""


@dataclass(frozen=True)
class Check:
    """How a trial went: `state` as in `PassRecord`, the reason in words."""

    state: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the trial may become the current program."""
        return self.state != "failed"


@dataclass
class Engine:
    """Runs passes.

    Attributes:
        program: the current program.
        calibration: data for analyses, or None.
        applied: actions applied so far, over all passes; what the limit counts.
        recipe: per pass its spec and the keys of the actions applied.
        journal: keeps what was measured, for a run that is resumed.
    """

    program: Program
    settings: Settings
    listener: Listener
    seed: int = 0
    calibration: Batches | None = None
    applied: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    actions: list[ActionRecord] = field(default_factory=list)
    skips: list[SkipRecord] = field(default_factory=list)
    recipe: list[tuple[str, list[str]]] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self) -> None:
        check_rules(self.program)
        self.facts = Facts(self.program, self.calibration, self.journal)
        self.baseline = self.source = self.program

    @cached_property
    def inputs(self) -> Sequence[Mapping[str, Tensor]]:
        """The inputs that before and after are compared on."""
        return [] if self.program.is_fake else check_inputs(self.program, seed=self.seed)

    def references(self) -> Sequence[tuple[Tensor, ...]]:
        """The float64 results of the baseline on `inputs`, computed once a baseline."""
        if "_references" not in self.__dict__:
            self._references = [reference(self.baseline, values) for values in self.inputs]
        return self._references

    def plan(self, pass_: Pass) -> Plan:
        """Asks a pass for its plan; any failure inside it leaves a reproducer.

        Raises:
            PassError: the pass failed; the message says where the reproducer is.
        """
        try:
            return pass_.plan(self.program, self.facts.restrict(tuple(pass_.needs)))
        except RedpassError:
            raise
        except Exception as error:
            folder = write_reproducer(
                self.program, format_pass(pass_), self.settings, self.seed, error
            )
            raise PassError(
                f"{type(error).__name__}: {error}", place=pass_.name, hint=f"reproducer: {folder}"
            ) from error

    def run_exact(self, pass_: Pass) -> bool:
        """Runs an exact pass once. Returns whether the program changed."""
        started = time.perf_counter()
        plan = self.plan(pass_)
        todo = self.permitted(pass_, plan.actions)
        before = len(self.program.graph.nodes)
        kept, check = self._apply_checked(pass_, todo)
        if not kept and not todo and self._seen(pass_):
            return False
        self.note_skips(pass_, plan)
        self.note_pass(pass_, len(kept), len(plan.skips), check, before, started)
        return bool(kept)

    def adopt(
        self, program: Program, passes: Sequence[Pass], actions: Sequence[Action], check: Check
    ) -> None:
        """Makes `program` the current one, with a step in its history.

        Args:
            passes: those that planned the actions, of one exactness.
        """
        is_lossy = passes[0].exactness is Exactness.APPROXIMATE
        keys = tuple(action.key for action in actions)
        if is_lossy:
            program = replace(program, lineage=extend(self.program, self.source, actions))
        self.program = program.with_steps(Step(format_passes(passes), keys, check.reason))
        self.facts = Facts(self.program, self.calibration, self.journal)
        if is_lossy:
            self.baseline = self.program
            self.__dict__.pop("_references", None)
            self.__dict__.pop("inputs", None)

    def trial(self, pass_: Pass, actions: Sequence[Action]) -> tuple[Program, Check]:
        """Applies `actions` to the current program and checks the result, adopting nothing."""
        try:
            after = rewrite.apply(self.program, actions)
            check_rules(after)
        except (PassError, VerifyError) as error:
            return self.program, Check("failed", str(error))
        if pass_.exactness is Exactness.APPROXIMATE or self.settings.check == "rules":
            return after, Check("not checked", "the graph's rules hold; numbers were not compared")
        keys = hashlib.sha256("\n".join(action.key for action in actions).encode())
        name = f"check of {pass_.name}, {len(actions)} actions, {keys.hexdigest()[:16]}"
        found = self.journal.recall(name, lambda: asdict(self._compare(pass_.exactness, after)))
        return after, Check(**found)

    def _compare(self, exactness: Exactness, after: Program) -> Check:
        same_bits = exactness is Exactness.SAME_BITS
        before = self.program if same_bits else self.baseline
        references = None if same_bits else self.references()
        verdict = compare(before, after, self.inputs, exactness=exactness, references=references)
        return Check(verdict.state, verdict.reason)

    def permitted(self, pass_: Pass, actions: Sequence[Action]) -> list[Action]:
        """Returns the actions that neither `REDPASS_SKIP` nor `REDPASS_LIMIT` leaves out."""
        limit, kept = self.settings.limit, list[Action]()
        for action in actions:
            if {action.key, pass_.name} & set(self.settings.skip):
                self.note(pass_, action, "skipped by user", "named in REDPASS_SKIP")
            elif limit is not None and self.applied + len(kept) >= limit:
                self.note(pass_, action, "beyond limit", f"REDPASS_LIMIT={limit}")
            else:
                kept.append(action)
        return kept

    def _apply_checked(self, pass_: Pass, todo: list[Action]) -> tuple[list[Action], Check]:
        """Applies what passes its check; guilty actions are found, rolled back and named."""
        kept, check = list(todo), Check("nothing to do", "nothing was planned")
        for _ in range(MOST_ROLLBACKS):
            if not kept:
                return [], check
            after, check = self.trial(pass_, kept)
            if check.passed:
                self._accept(pass_, kept, after, check)
                return kept, check
            guilty, reason = self._guilty(pass_, kept, check)
            kept.remove(guilty)
            self.note(pass_, guilty, "rolled back", reason)
            self.listener.message(f"rolled back {guilty.key}: {reason}")
        for action in kept:
            self.note(pass_, action, "rolled back", "too many actions of this pass failed")
        return [], check

    def _accept(self, pass_: Pass, kept: list[Action], after: Program, check: Check) -> None:
        self.adopt(after, [pass_], kept, check)
        for action in kept:
            self.applied += 1
            self.note(pass_, action, "applied", check.reason)
        self.recipe.append((format_pass(pass_), [action.key for action in kept]))

    def _guilty(self, pass_: Pass, actions: list[Action], whole: Check) -> tuple[Action, str]:
        """Returns the last action of the shortest prefix that fails, and how it fails."""
        reasons = {len(actions): whole.reason}

        def is_bad(count: int) -> bool:
            _, check = self.trial(pass_, actions[:count])
            reasons[count] = check.reason
            return not check.passed

        count = first_bad(len(actions), is_bad)
        return actions[count - 1], reasons[count]

    def note(self, pass_: Pass, action: Action, outcome: str, why: str) -> None:
        """Records what became of an action; one that is judged again keeps its last outcome."""
        self.actions = [
            old for old in self.actions if old.key != action.key or old.outcome == "applied"
        ]
        number = self.applied if outcome == "applied" else 0
        self.actions.append(
            ActionRecord(
                number,
                action.key,
                pass_.name,
                action.target,
                action.reason,
                outcome,
                why,
                dict(action.evidence),
                dict(action.saving),
                action.loss,
            )
        )

    def withdraw(self, pass_: Pass, action: Action, why: str) -> None:
        """Records that an action applied before gave way to another one."""
        self.applied -= 1
        self.actions = [old for old in self.actions if old.key != action.key]
        self.note(pass_, action, "refused", why)

    def note_skips(self, pass_: Pass, plan: Plan) -> None:
        """Records the places a pass left alone; a place seen again keeps its last reason."""
        seen = {(s.rule, s.target): i for i, s in enumerate(self.skips)}
        for skip in plan.skips:
            record = SkipRecord(pass_.name, skip.rule, skip.target, skip.reason)
            if (skip.rule, skip.target) in seen:
                self.skips[seen[skip.rule, skip.target]] = record
            else:
                self.skips.append(record)

    def note_pass(
        self, pass_: Pass, applied: int, skipped: int, check: Check, before: int, started: float
    ) -> None:
        """Records one pass."""
        self.passes.append(
            PassRecord(
                pass_.name,
                format_pass(pass_),
                pass_.exactness.value,
                applied,
                skipped,
                check.state,
                check.reason,
                (before, len(self.program.graph.nodes)),
                time.perf_counter() - started,
            )
        )

    def _seen(self, pass_: Pass) -> bool:
        return any(record.spec == format_pass(pass_) for record in self.passes)


def first_bad(total: int, is_bad: Callable[[int], bool]) -> int:
    """Returns the smallest count in 1..total that is bad, given that `total` is.

    Binary search: right when badness stays once it is there, else one of the turning points.
    """
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if is_bad(middle) else (middle, bad)
    return bad
