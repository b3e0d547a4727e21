"""Runs readers on damaged files in forked children: no crash, no hang, no untyped exception.

A case is made from the format's name, a seed and its number alone, so any of them can be made
again. Children work through many cases each, import nothing anew, and say after each how it
went; what kills one is put down to the case it was at.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from redpass.errors import RedpassError

Mutation = Callable[[bytes, random.Random], bytes]

SECONDS = 10
"""Processor time after which a case counts as a hang."""

PATIENCE = 300
"""Seconds after which it does, however little it worked."""

MEMORY = 4 << 30
"""Address space a child may take beyond what it starts with."""


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        samples: good files or folders, and in folders the file to damage.
        mutations: how it is damaged, in equal shares.
        read: reads the file or folder; raises `RedpassError` to refuse it.
    """

    name: str
    samples: Sequence[tuple[Path, str]]
    mutations: Sequence[Mutation]
    read: Callable[[Path], object]


@dataclass
class Outcome:
    """How many cases went how; `bad` says of each bad case its number and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, how: str) -> None:
        kind = how.partition(":")[0]
        self.counts[kind] += 1
        if kind not in ("read", "refused"):
            self.bad.append((number, how))


def make(form: Format, seed: int, number: int, folder: Path) -> Path:
    """Writes case `number` to `folder` and returns the path to read."""
    chance = random.Random(f"{form.name} {seed} {number}")
    sample, inner = chance.choice(form.samples)
    mutation = chance.choice(form.mutations)
    source = sample / inner if inner else sample
    target = folder / ("case" + sample.suffix)
    if inner:
        target.mkdir(exist_ok=True)
        for path in sample.iterdir():
            (target / path.name).unlink(missing_ok=True)
            if path.name != inner:
                os.link(path, target / path.name)
    data = mutation(source.read_bytes(), chance)
    (target / inner if inner else target).write_bytes(data)
    return target


def fuzz(form: Format, numbers: Sequence[int], folder: Path, seed: int = 0) -> Outcome:
    """Runs the cases `numbers`, one child after another."""
    outcome = Outcome()
    todo = list(numbers)
    while todo:
        for number, how in _child(form, todo, folder, seed):
            outcome.add(number, how)
            todo.remove(number)
    return outcome


def _child(form: Format, todo: list[int], folder: Path, seed: int) -> Iterator[tuple[int, str]]:
    """Yields what a child says of the cases it gets through, the last of which may end it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            _work(form, todo, folder, seed, writer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:  # else select does not see all
        while todo:
            ready, _, _ = select.select([pipe], [], [], PATIENCE)
            line = pipe.readline() if ready else b""
            if not line:
                break
            yield todo[0], json.loads(line)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    number = os.WTERMSIG(status)
    if todo:
        hang = number in (signal.SIGPROF, signal.SIGKILL)
        yield todo[0], "hang: " + str(number) if hang else f"signal: {number}"


def _work(form: Format, todo: list[int], folder: Path, seed: int, writer: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faulthandler.disable()
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    for number in list(todo):
        path = make(form, seed, number, folder)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        how = attempt(form, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(writer, json.dumps(how).encode() + b"\n")
    time.sleep(PATIENCE)  # the parent has what it needs, and ends this


def attempt(form: Format, path: Path) -> str:
    """Reads one case in this process and says how it went."""
    try:
        form.read(path)
    except RedpassError as error:
        text = str(error)
        if not text.isprintable() and not text.replace("\n  ", "").replace("\n", "").isprintable():
            return f"unprintable: {text!r}"
        return "refused: " + text[:200]
    except BaseException as error:
        return f"untyped: {type(error).__name__}: {str(error)[:300]} {_where(error)}"
    return "read"


def _where(error: BaseException) -> str:
    """The innermost line of redpass that an exception came through."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if f"{os.sep}redpass{os.sep}" in file:
            found = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Python's warning about forks beside threads away: the children use none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    sys.stdout.flush()
