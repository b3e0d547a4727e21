"""The rungs of heads: which counts each attention is offered, and the cut for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from redpass.analysis.heads.alignment import (
    TURNS,
    Moments,
    distances,
    divisors,
    equal_parts,
    merged,
)
from redpass.analysis.heads.clusters import Clusters, clusters, elbow, equal_count, errors
from redpass.analysis.heads.contributions import kept_heads, shapes
from redpass.analysis.heads.cuts import HeadCut, Unfit, edits
from redpass.analysis.heads.fits import Fit, HeadFits
from redpass.analysis.heads.layouts import pruned, shared_scores
from redpass.analysis.heads.sites import HeadSite, HeadSites
from redpass.errors import UsageError, nearest
from redpass.plan import Edit

SAME = 1e-9
"""A turn of heads that changes less of the stream changes nothing: float32 arithmetic does more."""

SILENT = 1e-13
"""Heads that add less, as a share of the stream, are taken to add nothing."""


@dataclass(frozen=True)
class Rung:
    """One candidate: an attention with fewer heads of some kind.

    Attributes:
        count: how many are left.
        fit: the cut, with its predicted loss.
        edits: what is done.
        words: what it is, for reports.
        evidence: figures behind it.
    """

    site: HeadSite
    count: int
    fit: Fit
    edits: tuple[Edit, ...]
    words: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """`layers.3.attention@9`."""
        return f"{self.site.label}@{self.count}"


def named(only: Sequence[str], sites: HeadSites, place: str) -> dict[str, tuple[int, ...]]:
    """Reads `layers.3.attention@9` (or without a count) of the option `only`.

    Raises:
        UsageError: a label that no attention has, one that cannot be cut, or a count that is no
            number of heads between one and all.
    """
    found: dict[str, tuple[int, ...]] = {}
    for target in only:
        label, mark, text = target.partition("@")
        if label in sites.reasons:
            raise UsageError(sites.reasons[label], place=label, hint="leave it out of `only`")
        if label not in sites.found:
            hint = nearest(label, sites.found)
            raise UsageError(f"no attention is called '{label}'", place=place, hint=hint)
        most = sites.found[label].heads - 1
        if mark and not (text.isdecimal() and 1 <= int(text) <= most):
            hint = f"write {label}@N with N from 1 to {most}"
            raise UsageError(f"'{text}' is no count of heads to leave", place=place, hint=hint)
        found[label] = (*found.get(label, ()), *((int(text),) if mark else ()))
    return found


def counts_of(heads: int, shares: Iterable[float], also: Iterable[int] = ()) -> list[int]:
    """Returns the counts of a ladder, most first: shares of all, and some more."""
    found = {max(1, round(share * heads)) for share in shares} | set(also)
    return sorted((count for count in found if 1 <= count < heads), reverse=True)


@dataclass(frozen=True)
class Offer:
    """A cut before it is fitted: what it is in words, and figures behind it."""

    cut: HeadCut
    words: str
    evidence: Mapping[str, float] = field(default_factory=dict)


Offers = Mapping[int, Offer | str]
"""Count -> offer, or why there is none."""


def rungs(
    site: HeadSite, offers: Offers, fits: HeadFits, *, refit: bool, what: str
) -> dict[int, Rung | str]:
    """Returns each offer of one attention as a rung, or why the graph cannot have it.

    Args:
        refit: whether the output projection is fitted anew.
        what: ends the names of new weights.

    Raises:
        DataError: values on the calibration data that are NaN or infinite.
    """
    cuts = {count: offer.cut for count, offer in offers.items() if isinstance(offer, Offer)}
    fitted = fits.fits(site, cuts, refit=refit)
    found: dict[int, Rung | str] = {}
    for count, offer in offers.items():
        fit = offer if isinstance(offer, str) else fitted[count]
        if isinstance(offer, str) or isinstance(fit, str):
            found[count] = str(fit)
            continue
        is_same = offer.cut.output is None and fit.loss == fit.unfitted
        fit = replace(fit, cut=offer.cut if is_same else fit.cut)
        shown = {"unfitted": fit.unfitted, "tokens": fit.tokens, **offer.evidence}
        made = edits(site, fit.cut, f"{what}{count}")
        found[count] = Rung(site, count, fit, made, offer.words, shown)
    return found


def cluster_offers(
    site: HeadSite, costs: Tensor, shares: Sequence[float], wanted: Sequence[int],
    layout: str,
) -> Offers:  # fmt: skip
    """Returns the clusters of each count: of the shares, at the elbow, and of equal heads alone.

    Args:
        costs: `[heads, heads]`, of letting the column's head stand for the row's.
        wanted: counts to offer instead.
    """
    also = () if wanted else (elbow(errors(costs)), equal_count(costs))
    counts = list(wanted) or counts_of(site.heads, shares, also)
    return {
        count: cluster_offer(site, clusters(costs, count, site.groups), layout) for count in counts
    }


def cluster_offer(site: HeadSite, found: Clusters, layout: str) -> Offer | str:
    """Returns the cut for some clusters, or why there is none."""
    try:
        cut = shared_scores(site, found, layout)
    except Unfit as reason:
        return str(reason)
    keys = site.sides["key"].heads if cut.key is None else len(cut.key.weight)
    shared = ", ".join("+".join(map(str, heads)) for heads in found.members if len(heads) > 1)
    words = f"{site.heads} heads look at tokens in {len(found.members)} ways: {shared} are alike"
    evidence = {"clusters": len(found.members), "key_heads": keys, "within": found.error}
    return Offer(cut, words, evidence)


def prune_offers(
    site: HeadSite, scores: Sequence[float], shares: Sequence[float], wanted: Sequence[int]
) -> Offers:
    """Returns the heads that stay for each count: of the shares, and of heads that add anything.

    A share stands for the nearest count in which every key head keeps equally many query heads.

    Args:
        scores: of each head; the lowest go.
        wanted: counts to offer instead.
    """
    known = shapes(site)
    if not known:
        return dict.fromkeys(wanted or (1,), "its key heads have different numbers of query heads")
    _check_counts(site, wanted, known, "share {} query heads")
    nearest_ones = _nearest_counts(known, site.heads, shares)
    silent = [n for n in known if _lost(site, known[n], scores)[0] <= SILENT]
    counts = list(wanted) or sorted(nearest_ones | set(silent[-1:]), reverse=True)
    return {count: _prune_offer(site, known[count], scores) for count in counts}


def _check_counts(site: HeadSite, wanted: Iterable[int], known: Iterable[int], what: str) -> None:
    """Raises `UsageError` for a count that the grouping of heads does not divide into."""
    possible = list(known)
    for count in wanted:
        if count not in possible:
            hint = f"possible are {', '.join(map(str, possible))}"
            text = f"{len(site.groups)} key heads cannot {what.format(count)} evenly"
            raise UsageError(text, place=site.label, hint=hint)


def _nearest_counts(known: Iterable[int], whole: int, shares: Iterable[float]) -> set[int]:
    """For each share of `whole` the nearest count there is, the larger one of two."""
    possible = list(known)
    return {min(possible, key=lambda n: (abs(n - share * whole), -n)) for share in shares}


def _lost(
    site: HeadSite, forms: Sequence[tuple[int, int]], scores: Sequence[float]
) -> tuple[float, int, tuple[int, ...]]:
    """What the best form loses, its key heads, and the heads it keeps; ties save the cache."""
    found = []
    for form in forms:
        kept = kept_heads(site, form, scores)
        lost = sum(score for head, score in enumerate(scores) if head not in kept)
        found.append((lost, form[0], kept))
    return min(found)


def _prune_offer(
    site: HeadSite, forms: Sequence[tuple[int, int]], scores: Sequence[float]
) -> Offer | str:
    lost, keys, kept = _lost(site, forms, scores)
    try:
        cut = pruned(site, kept)
    except Unfit as reason:
        return str(reason)
    gone = [head for head in range(site.heads) if head not in kept]
    words = f"heads {', '.join(map(str, gone))} of {site.heads} go"
    return Offer(cut, words, {"key_heads": keys, "contribution": lost})


def merge_offers(
    site: HeadSite, moments: Moments, shares: Sequence[float], wanted: Sequence[int],
    fits: HeadFits, align: bool,
) -> Offers:  # fmt: skip
    """Returns the merged key and value heads of each count that divides theirs.

    A share stands for the nearest such count.

    Args:
        wanted: counts to offer instead.
        align: False merges heads as they are: a control.
    """
    known = divisors(site)
    if not known:
        return dict.fromkeys(wanted or (1,), "it has no key heads that can be merged evenly")
    _check_counts(site, wanted, known, "be merged to {}")
    found = _nearest_counts(known, len(site.groups), shares)
    kind = _kind_of_turn(site, moments, fits) if align else "none"
    if kind is None:
        reason = "a turn of its key and value heads changes what it gives"
        return dict.fromkeys(wanted or sorted(found, reverse=True), reason)
    return {
        count: _merge_offer(site, moments, count, kind, align)
        for count in wanted or sorted(found, reverse=True)
    }


def _kind_of_turn(site: HeadSite, moments: Moments, fits: HeadFits) -> str | None:
    """Which channels of keys may be mixed: the first way that changes nothing when it is tried."""
    has_norm = site.attention.query_norm or site.attention.key_norm
    kinds = ("none",) if has_norm else TURNS[1:] if site.attention.rotary else TURNS[:1]
    all_in_one = [tuple(range(len(site.groups)))]
    cuts = {
        number: merged(site, moments, all_in_one, kind, mix=False)
        for number, kind in enumerate(kinds)
    }
    tried = fits.fits(site, cuts, refit=False)
    works = (n for n, fit in tried.items() if not isinstance(fit, str) and fit.loss < SAME)
    return next((kinds[number] for number in works), None)


def _merge_offer(site: HeadSite, moments: Moments, count: int, kind: str, align: bool) -> Offer:
    of_values = "any" if align else "none"
    far = distances(moments.key, kind) + distances(moments.value, of_values)
    members = equal_parts(far, count)
    cut = merged(site, moments, members, kind, of_values)
    merged_ones = ", ".join("+".join(map(str, heads)) for heads in members)
    how = {"any": "turned freely", "none": "as they are"}.get(kind, "turned in rotary planes")
    words = f"{len(site.groups)} key and value heads become {count} ({merged_ones}), keys {how}"
    within = sum(float(far[heads[0], list(heads)].sum()) for heads in members)
    return Offer(cut, words, {"key_heads": count, "within": within})
