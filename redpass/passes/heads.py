"""What the passes over attention heads share: which attentions, their rungs, their actions.

Not a pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from redpass.analysis.heads.costs import saved
from redpass.analysis.heads.fits import HeadFits, check_batches
from redpass.analysis.heads.ladders import Offers, Rung, named, rungs
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.rungs import check_rungs
from redpass.facts import Facts
from redpass.plan import Action, Plan, Skip

NO_HEADS = "no attention with several heads was found"


def ladders(
    rule: str, facts: Facts, shares: Sequence[float], only: Sequence[str], *, refit: bool,
    offer: Callable[[HeadSite, tuple[int, ...], HeadFits], Offers],
) -> Plan:  # fmt: skip
    """Returns the plan with one action for each rung of each attention, the least loss first.

    Args:
        only: labels or targets the user named; of the others nothing is planned.
        offer: (attention, counts named, what measures cuts) -> the cuts it is offered.

    Raises:
        UsageError: shares, labels or counts that are none.
        DataError: no calibration data, or too little to fit on and hold back.
    """
    place = rule.partition(".")[0]
    check_rungs(place, shares, some=False)
    sites = facts.get(head_sites)
    wanted = named(only, sites, place)
    skips = () if only else tuple(Skip(rule, *item) for item in sites.reasons.items())
    if not sites.found:
        return Plan(skips=skips or (Skip(rule, "graph", NO_HEADS),))
    data = facts.data()
    if refit:
        check_batches(data)
    fits = HeadFits(facts.program, data)
    found = Plan.of(
        item
        for label, site in sites.found.items()
        if not only or label in wanted
        for item in _items(rule, facts, site, offer(site, wanted.get(label, ()), fits), fits, refit)
    )
    actions = sorted(found.actions, key=lambda action: action.loss or 0.0)
    return Plan(tuple(actions), skips + found.skips)


def _items(
    rule: str, facts: Facts, site: HeadSite, offers: Offers, fits: HeadFits, refit: bool
) -> Iterator[Action | Skip]:
    made = rungs(site, offers, fits, refit=refit, what="heads")
    reasons = {count: rung for count, rung in made.items() if isinstance(rung, str)}
    for count, rung in made.items():
        if isinstance(rung, Rung):
            yield _action(rule, facts, rung)
        elif len(set(reasons.values())) > 1 or len(reasons) < len(made):
            yield Skip(rule, f"{site.label}@{count}", rung)
    if len(reasons) == len(made):
        for reason in dict.fromkeys(reasons.values()):
            yield Skip(rule, site.label, reason)
    if not made:
        yield Skip(rule, site.label, "no number of heads is left to offer")


def _action(rule: str, facts: Facts, rung: Rung) -> Action:
    return Action(
        rule,
        rung.target,
        rung.edits,
        rung.words,
        rung.evidence,
        saved(rung.site, rung.fit.cut, rung.edits, facts),
        rung.fit.loss,
        f"{rung.site.label}/heads",
    )
