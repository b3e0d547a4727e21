"""Options that say what the rungs of a ladder are: shares of what is left, and their multiple."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from redpass.errors import UsageError, nearest


def check_rungs(
    place: str,
    shares: Sequence[float],
    multiple: int = 1,
    *,
    whole: bool = False,
    some: bool = True,
) -> None:
    """Refuses shares and multiples that no ladder can have.

    Args:
        place: the pass.
        shares: what is left, a rung each.
        multiple: what counts, widths and ranks are rounded to.
        whole: whether a share of 1 is a rung, too.
        some: whether there must be a share; False where there are other rungs.

    Raises:
        UsageError: no shares, one that is not between 0 and 1, a multiple below 1.
    """
    if some and not shares:
        hint = "shares are what is left: (0.75, 0.5) tries three quarters and a half"
        raise UsageError("no share is given", place=place, hint=hint)
    for share in shares:
        if not (0 < share < 1 or (whole and share == 1)):
            most = "at most 1" if whole else "below 1"
            hint = f"shares are what is left, above 0 and {most}: 0.75 leaves three quarters"
            raise UsageError(f"a share of {share} cannot be left", place=place, hint=hint)
    if multiple < 1:
        text = f"nothing can be a multiple of {multiple}"
        raise UsageError(text, place=place, hint="give 1 for any size")


def check_word(place: str, option: str, found: str, known: Collection[str]) -> None:
    """Raises `UsageError` when the word given for an option is none of `known`."""
    if found not in known:
        text = f"no {option} is called '{found}'"
        raise UsageError(text, place=place, hint=nearest(found, known))


def read_target(place: str, target: str, known: Collection[str], what: str) -> tuple[str, int]:
    """Reads `label@count`, the name of a rung.

    Args:
        known: the labels there are.
        what: what has a label: `width`.

    Raises:
        UsageError: an unknown label, or no count. What counts a label can have is not looked at.
    """
    label, at, text = target.rpartition("@")
    label = label if at else text
    if label not in known:
        hint = nearest(label, known) if known else f"this model has no {what} that can be named"
        raise UsageError(f"no {what} is called '{label}'", place=place, hint=hint)
    if not at or not text.isdecimal():
        found = f"'{target}' does not say how much is left"
        raise UsageError(found, place=place, hint=f"write e.g. '{label}@8'")
    return label, int(text)
