"""Candidates taken in a given order, many at once: programs are made for the counts asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redpass.budget.candidates import Candidate
from redpass.budget.trials import Trials
from redpass.engine import first_bad
from redpass.program import Program


class Stack:
    """The first so many candidates of an order, on top of one program.

    Of rivals (`Action.place`) the last one counts. Candidates that do not go together with those
    before them leave the order; `Trials.out` says why.

    Attributes:
        order: the candidates that are left.
    """

    def __init__(self, trials: Trials, order: Sequence[Candidate]) -> None:
        self.trials, self.order = trials, list(order)
        self.made: dict[int, Program] = {}
        while self.order and not self._try(len(self.order)):
            self._drop_guilty()

    def chosen(self, count: int) -> list[Candidate]:
        """Returns the candidates in force after the first `count`."""
        found: dict[str, Candidate] = {}
        for candidate in self.order[:count]:
            found.pop(candidate.place, None)
            found[candidate.place] = candidate
        return list(found.values())

    def program(self, count: int) -> Program:
        """Returns the program with the first `count` candidates."""
        while not self._try(min(count, len(self.order))):
            self._drop_guilty(min(count, len(self.order)))
        return self.made[min(count, len(self.order))]

    def last_good(self, is_good: Callable[[int], bool], most: int) -> int:
        """Returns the largest count up to `most` that is good, by bisection; 0 when none is."""
        if not most or is_good(most):
            return most
        return first_bad(most, lambda count: not is_good(count)) - 1

    def take(self, count: int) -> None:
        """Accepts the first `count` candidates."""
        self.trials.take(self.chosen(count), self.program(count))

    def _try(self, count: int) -> bool:
        if count not in self.made:
            program, self.fault = self.trials.together(self.chosen(count))
            if program is not None:
                self.made[count] = program
        return count in self.made

    def _drop_guilty(self, count: int = 0) -> None:
        """Takes the last candidate of the shortest order that fails out, and all its rivals."""
        worst = first_bad(count or len(self.order), lambda n: not self._try(n))
        self._try(worst)
        guilty = self.order[worst - 1]
        gone = [c for c in self.order if c.place == guilty.place and c.pass_ is guilty.pass_]
        for candidate in gone:
            self.trials.reject(candidate, self.fault, is_conflict=worst > 1)
        self.order = [candidate for candidate in self.order if candidate not in gone]
        self.made = {n: program for n, program in self.made.items() if n < worst}
