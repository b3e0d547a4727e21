"""`.pt2`: checked as data, tried in a process that may fail, then given to PyTorch here.

`redpass.checks.pt2` reads the archive without running anything and copies what passed to memory.
What is left to fear is PyTorch's own reader: a crash, a loop or endless memory on JSON that is
well-formed and hostile. So the same bytes are first read in a child with limits on memory and
processor time (`redpass.trial`). All that comes back is whether it ended well and, if
not, a line of text: no object of the child is ever unpickled. When it ended well, this process
reads the very bytes it had sent, which nobody else can reach, to get the `ExportedProgram`.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from redpass import trial
from redpass.checks import pt2 as checks
from redpass.stored import Stored, from_text


def load_exported(path: Path, *, trust: bool = False) -> ExportedProgram:
    """Reads a `.pt2` without running anything in it.

    Sample inputs are dropped unread, guards and most metadata too: a program needs none of them.

    Args:
        trust: give the file to PyTorch as it is, which may run code from it.

    Raises:
        LoadError: damaged, or with a member, operator, expression or object that is not on the
            lists of `redpass.checks`; or refused by `torch.export.load`, or too much for it.
    """
    source = io.BytesIO(path.read_bytes()) if trust else checks.rebuild(path)
    trial.register_ops(source.getbuffer())
    if not trust:
        trial.check(source.getbuffer(), path)
    try:
        return torch.export.load(source)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise trial.refused(f"{type(error).__name__}: {first}", path) from error


def read_stored(path: Path) -> Stored | None:
    """Returns what redpass wrote beside the graph, None for a file that something else wrote.

    Raises:
        LoadError: no whole archive, or a signature that is damaged.
    """
    text = checks.extra(path)
    return None if text is None else from_text(text, path)
