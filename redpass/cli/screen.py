"""What a command prints: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from redpass.cli.options import RunOptions
from redpass.errors import clean
from redpass.progress import Listener, Silent
from redpass.report.figures import whole_seconds
from redpass.report.files import to_json

PIPED_WIDTH = 140
"""Columns of a table that no terminal limits."""


@dataclass(frozen=True)
class Screen:
    """The two streams of one command, and how much may go to them."""

    run: RunOptions

    @property
    def out(self) -> Console:
        """The console on stdout."""
        console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = PIPED_WIDTH
        return console

    @property
    def err(self) -> Console:
        """The console on stderr."""
        return Console(file=sys.stderr, stderr=True, highlight=False, markup=False, emoji=False)

    @property
    def has_color(self) -> bool:
        """Whether colours reach the reader: not when piped, nor under NO_COLOR."""
        return self.out.color_system is not None and not self.out.no_color

    @property
    def is_lively(self) -> bool:
        """Whether somebody is watching: progress is drawn for a terminal only."""
        watched = sys.stderr.isatty() and (sys.stdout.isatty() or self.run.json)
        return watched and not self.run.quiet

    def show(self, *parts: RenderableType) -> None:
        """Prints parts of a result, unless JSON or silence was asked for."""
        if not self.run.json and not self.run.quiet:
            for part in parts:
                self.out.print(part, soft_wrap=isinstance(part, str | Text))

    def emit(self, data: Any) -> None:
        """Prints the one JSON document of this command, when it was asked for."""
        if self.run.json:
            sys.stdout.write(to_json(data))

    def wrote(self, paths: list[Path]) -> None:
        """Prints the paths that a command wrote, one a line."""
        self.show("", *(Text.assemble(("wrote ", "dim"), str(path)) for path in paths))

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """Yields what long work reports to, drawn as bars with the time left."""
        with _own_warnings(self):
            if not self.is_lively:
                yield Silent()
                return
            with _bars(self.err) as progress:
                yield Bars(progress)


class Bars:
    """Draws progress; see `redpass.progress.Listener`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def start(self, stage: str, total: int | None = None) -> None:
        """Adds a bar, a pulsing one when `total` is not known."""
        self._tasks[stage] = self._progress.add_task(clean(stage, 60), total=total)

    def advance(self, stage: str, note: str = "") -> None:
        """Moves a bar by one."""
        if stage in self._tasks:
            shown = clean(f"{stage}  {note}" if note else stage, 60)
            self._progress.update(self._tasks[stage], advance=1, description=shown)

    def finish(self, stage: str) -> None:
        """Takes a bar away."""
        task = self._tasks.pop(stage, None)
        if task is not None:
            self._progress.remove_task(task)

    def message(self, text: str) -> None:
        """Prints lines above the bars."""
        for line in text.splitlines():
            self._progress.console.print(clean(line, 400), style="dim")


class _Remaining(ProgressColumn):
    """How many of how many, and the time left; nothing for work of unknown length."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        done = f"{task.completed:.0f}/{task.total:.0f}"
        if task.time_remaining is None:
            return Text(done, "green")
        left = whole_seconds(task.time_remaining)
        return Text.assemble((done, "green"), (f"  {left} left", "cyan"))


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        _Remaining(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


@contextlib.contextmanager
def _own_warnings(screen: Screen) -> Iterator[None]:
    """Shows redpass's own warnings as one line each, and those of libraries only with --debug."""
    with warnings.catch_warnings():
        if not screen.run.debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"redpass(\.|$)")
            warnings.showwarning = lambda message, *_, **__: _warn(screen, str(message))
        yield


def _warn(screen: Screen, text: str) -> None:
    if not screen.run.quiet:
        line = Text.assemble(("warning", "bold yellow"), ": ", clean(text, 400))
        screen.err.print(line, soft_wrap=True)
