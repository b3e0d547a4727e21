"""Keeps, beside a rewritten program, the one it came from with the approximate actions alone.

Exact rewrites change no result, so a form that cannot hold a rewritten graph (a Hugging Face
folder has one layout of weights for each architecture) is written without them.
"""

from __future__ import annotations

from collections.abc import Sequence

from redpass import rewrite
from redpass.errors import PassError
from redpass.plan import Action
from redpass.program import Lineage, Program


def extend(before: Program, source: Program, actions: Sequence[Action]) -> Lineage:
    """Returns the lineage of `before` with `actions` applied.

    Args:
        before: the program the actions were planned on.
        source: the program as it was loaded, for a `before` that has no lineage yet.
        actions: approximate ones; their edits are repeated by node names, which rewrites keep.
    """
    known = before.lineage or Lineage(source, source)
    if known.plain is None:
        return known
    try:
        return Lineage(known.source, rewrite.apply(known.plain, actions))
    except PassError as error:
        return Lineage(known.source, None, str(error))
