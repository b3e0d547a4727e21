"""Options that say what the rungs of a ladder are: shares of what is left, and their multiple."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from redpass.errors import UsageError, nearest


def check_rungs(
    place: str, shares: Sequence[float], multiple: int = 1, *, whole: bool = False
) -> None:
    """Refuses shares and multiples that no ladder can have.

    Args:
        place: the pass.
        shares: what is left, a rung each.
        multiple: what counts, widths and ranks are rounded to.
        whole: whether a share of 1 is a rung, too.

    Raises:
        UsageError: a share that is not between 0 and 1, a multiple below 1.
    """
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
