"""The commands as one program, and the way every one of them ends: an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from redpass import __version__
from redpass.cli import (
    analyze,
    bench,
    emit,
    explain,
    export,
    failures,
    inspect,
    optimize,
    passes,
    replay,
)
from redpass.cli.options import grouped
from redpass.cli.signals import Stopped, stoppable

HELP = """Finds and removes the redundancy in trained neural networks.

redpass optimize MODEL --data FILE --budget 'cosine>=0.98' --out DIR

MODEL is a Hugging Face folder, a .pt2, a .pt, or a folder that redpass wrote.
"""

COMMANDS = (
    optimize.optimize,
    inspect.inspect,
    analyze.analyze,
    export.export,
    emit.emit,
    bench.bench,
    explain.explain,
    replay.replay,
    replay.bisect,
    passes.passes,
)
"""Every command, in the order the help lists them; each is called like its function."""

app = typer.Typer(
    name="redpass",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(grouped(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"redpass {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the program itself; `--version` has acted by the time this is called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; see docs/options.md for the codes.

    Args:
        arguments: the words after `redpass`; those of the process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            code = typer.main.get_command(app).main(
                words, prog_name="redpass", standalone_mode=False
            )
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away; nothing more may be written, not even by Python's own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failures.PIPE
    except (Exception, KeyboardInterrupt, Stopped) as error:
        return failures.show(error, debug="--debug" in words)
    if code == failures.INTERRUPTED:  # the parser has turned the exception into its code
        return failures.show(KeyboardInterrupt())
    return code if isinstance(code, int) else 0
