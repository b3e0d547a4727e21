"""Tokenizers of folders: read offline, without code of their own, and never trusted to work.

A fast tokenizer is compiled code that ends in a panic where Python would raise; a panic is no
`Exception`, so it is told apart by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from redpass.errors import DataError, UsageError

PANIC = "PanicException"
Found = TypeVar("Found")


def open_tokenizer(tokenizer: Any) -> Any:
    """Returns a tokenizer: the object given, or that of a folder, read offline.

    Raises:
        UsageError: none given, or a folder without one.
    """
    if tokenizer is None:
        raise UsageError("text needs a tokenizer", hint="pass --tokenizer FOLDER")
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(tokenizer)
    kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return _guarded(
            lambda: kind.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"no tokenizer: {first}", file=folder, hint="pass --tokenizer FOLDER"
        ) from error


def tokens(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    """Returns the token numbers of each text, at most `length`.

    Raises:
        DataError: the tokenizer fails on the texts.
    """
    try:
        found = _guarded(lambda: tokenizer(list(texts), truncation=True, max_length=length))
        return [[int(token) for token in row] for row in found["input_ids"]]
    except Exception as error:
        told, hint = f"the tokenizer fails on the text: {error}", "check the text, and --tokenizer"
        raise DataError(told, hint=hint) from error


def _guarded(work: Callable[[], Found]) -> Found:
    """Runs `work`; a panic of compiled code becomes a `RuntimeError`."""
    try:
        return work()
    except BaseException as error:
        if type(error).__name__ == PANIC:
            raise RuntimeError(f"it panicked: {error}") from error
        raise
