"""Checks integers that index a table of the model: token ids against the vocabulary."""

from __future__ import annotations

from torch import Tensor, fx

from redpass import ops
from redpass.errors import DataError
from redpass.program import Program


def check_index(program: Program, name: str, value: Tensor) -> None:
    """Raises `DataError` when an embedding that reads input `name` has no row for a value in it."""
    if value.is_floating_point() or value.is_complex() or not value.numel():
        return
    rows = table_rows(program.input_node(name))
    low, high = int(value.min()), int(value.max())
    if rows is not None and not (low >= 0 and high < rows):
        raise DataError(
            f"holds {low if low < 0 else high}, the table it indexes has {rows} rows",
            place=f"input '{name}'",
            hint=f"give values from 0 to {rows - 1}: was this encoded with another tokenizer?",
        )


def table_rows(source: fx.Node) -> int | None:
    """Returns the fewest rows of the embeddings that read `source` as it is, None for no reader.

    Only views and casts are followed: what computes on the values may bring them into range.
    """
    todo, found = [source], []
    while todo:
        node = todo.pop()
        for user in node.users:
            if ops.is_call(user, "embedding") and user.args[1] is node:
                found.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
            elif ops.is_view(user) or ops.is_call(user, "to", "_to_copy", "clone", "contiguous"):
                todo.append(user)
    return min(found, default=None)
