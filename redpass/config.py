"""The environment variables redpass reads, all of them, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from redpass.errors import UsageError, nearest


@dataclass(frozen=True)
class Settings:
    """Switches of one run; each can also be given as an option.

    Attributes:
        debug: show tracebacks and keep temporary files (`REDPASS_DEBUG=1`).
        print_after: print the graph after the passes named, or `all` (`REDPASS_PRINT_AFTER`).
        dump: folder that receives the graph text after each pass (`REDPASS_DUMP`).
        limit: apply only the first N actions of the run (`REDPASS_LIMIT=N`).
        skip: action keys or pass names to leave out, comma-separated (`REDPASS_SKIP`).
        check: how much is checked after each pass: `rules`, `numbers` (default, includes the
            rules) or `paranoid` (also recomputes cached analyses) (`REDPASS_CHECK`).
        kernels: which kernels run `redpass::` ops: `auto`, `reference` or `triton`
            (`REDPASS_KERNELS`).
    """

    debug: bool = False
    print_after: tuple[str, ...] = ()
    dump: Path | None = None
    limit: int | None = None
    skip: tuple[str, ...] = ()
    check: str = "numbers"
    kernels: str = "auto"


CHOICES = {"check": ("rules", "numbers", "paranoid"), "kernels": ("auto", "reference", "triton")}


def from_environment(environ: dict[str, str] | None = None) -> Settings:
    """Reads `REDPASS_*`. Raises `UsageError` for a value or a variable that is not known."""
    env = dict(os.environ if environ is None else environ)
    found = {k[8:].lower(): v for k, v in env.items() if k.startswith("REDPASS_")}
    known = Settings.__dataclass_fields__
    for key in found:
        if key not in known:
            hint = nearest(key, known)
            raise UsageError(
                "unknown environment variable", place=f"REDPASS_{key.upper()}", hint=hint
            )
    for key, allowed in CHOICES.items():
        if found.get(key, allowed[0]) not in allowed:
            raise UsageError(
                f"'{found[key]}' is not one of {', '.join(allowed)}", place=f"REDPASS_{key.upper()}"
            )
    return Settings(
        debug=found.get("debug", "0") not in ("", "0"),
        print_after=_words(found.get("print_after", "")),
        dump=Path(found["dump"]) if found.get("dump") else None,
        limit=_limit(found.get("limit")),
        skip=_words(found.get("skip", "")),
        check=found.get("check", "numbers"),
        kernels=found.get("kernels", "auto"),
    )


def check_kernels(given: str | None) -> str:
    """Returns which kernels are meant: those given, else those of `REDPASS_KERNELS`.

    Raises:
        UsageError: none of `auto`, `reference` and `triton`.
    """
    chosen = from_environment().kernels if given is None else given
    if chosen not in CHOICES["kernels"]:
        hint = nearest(chosen, CHOICES["kernels"])
        raise UsageError(f"'{chosen}' are no kernels", place="--kernels", hint=hint)
    return chosen


def cache_home(environ: dict[str, str] | None = None) -> Path:
    """Returns the user's folder for what can be made again: `XDG_CACHE_HOME`, else `~/.cache`."""
    found = (os.environ if environ is None else environ).get("XDG_CACHE_HOME", "")
    # The XDG Base Directory specification says that a relative path is to be ignored.
    return Path(found) if os.path.isabs(found) else Path.home() / ".cache"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _limit(text: str | None) -> int | None:
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"'{text}' is not a whole number", place="REDPASS_LIMIT")
    return int(text)
