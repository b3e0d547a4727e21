"""How a failed command ends: one form for every error, one exit code by kind."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from redpass.checks import memory
from redpass.cli.signals import Stopped
from redpass.errors import RedpassError, clean

USAGE, FAULT, INTERRUPTED, PIPE = 2, 70, 130, 141

# What the parser raises for a wrong option; typer brings its own copy of click in some versions.
_ParserError = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def show(error: BaseException, *, debug: bool = False) -> int:
    """Prints an error to stderr and returns the exit code it stands for."""
    if debug and not isinstance(error, Stopped):
        traceback.print_exception(error)
    if isinstance(error, Stopped | KeyboardInterrupt):
        _print("stopped", "nothing was written", _notes(error))
        return getattr(error, "exit_code", INTERRUPTED)
    if isinstance(error, RedpassError):
        text = ": ".join(part for part in (error.file, error.place, error.found) if part)
        _print(f"error[{error.code}]", text, _notes(error, error.hint))
        return error.exit_code
    if isinstance(error, _ParserError):
        return _show_parser_error(error)
    told = memory.told(error)
    if told is not None:
        return show(told)
    found = f"{type(error).__name__}: {clean(error)}"
    hint = f"this is a fault of redpass; the traceback is in {_keep_traceback(error)}"
    _print("error[internal]", found, hint)
    return FAULT


def _notes(error: BaseException, hint: str | None = None) -> str | None:
    """Returns the hint and the notes that were added on the error's way up, a line each."""
    lines = [*([hint] if hint else []), *getattr(error, "__notes__", ())]
    return "\n".join(lines) or None


def _show_parser_error(error: BaseException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "redpass"
    message = str(error.format_message())  # type: ignore[attr-defined]  # every ClickException has it
    if not message:  # typer raises one with no text after it has shown the help
        return USAGE
    _print("error[usage]", message.rstrip("."), f"see `{path} --help`")
    return USAGE


def _print(head: str, text: str, hint: str | None = None) -> None:
    """Writes `head: text` with the hint on its own line; only the terminal wraps."""
    line = Text.assemble((head, "bold red"), ": ", text)
    if hint:
        line.append("\n  " + "\n  ".join(clean(part, 2000) for part in hint.splitlines()))
    Console(stderr=True, highlight=False, soft_wrap=True, file=sys.stderr).print(line)


def _keep_traceback(error: BaseException) -> Path:
    number, name = tempfile.mkstemp(prefix="redpass-traceback-", suffix=".txt")
    with os.fdopen(number, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(name)
