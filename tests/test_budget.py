"""Budget specs: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from redpass.budget.spec import Budget, doubts, parse_budget, worst_case
from redpass.errors import UsageError
from redpass.record import CostRecord, QualityRecord


def quality(metric: str, value: float, original: float, stderr: float = 0.0) -> QualityRecord:
    return QualityRecord(metric, "choosing", "lower", original, value, value - original, stderr, 10)


def costs(flops: float) -> CostRecord:
    return CostRecord(100, 400, flops, {}, 0, 1)


@pytest.mark.parametrize(
    ("spec", "value", "original", "holds"),
    [
        ("perplexity<=+1%", 10.09, 10.0, True),
        ("perplexity<=+1%", 10.11, 10.0, False),
        ("perplexity<=12", 11.9, 10.0, True),
        ("accuracy>=-2%", 0.979, 1.0, False),
        ("accuracy>=-2%", 0.981, 1.0, True),
        ("cosine>=0.98", 0.97, 1.0, False),
    ],
)
def test_limits(spec, value, original, holds):
    budget = parse_budget(spec)
    metric = budget.limits[0].metric
    miss = worst_case({metric: quality(metric, value, original)}, budget, 0.0)
    assert (miss == "") is holds


def test_the_margin_asks_for_more_than_the_bare_value():
    budget = parse_budget("kl<=0.02")
    records = {"kl": quality("kl", 0.019, 0.0, stderr=0.001)}
    assert worst_case(records, budget, 0.0) == ""
    assert "kl 0.019" in worst_case(records, budget, 1.645)


def test_goals_are_relative_to_the_original():
    budget = parse_budget("kl<=0.1,flops<=-20%")
    assert not budget.reached(costs(100), costs(81))
    assert budget.reached(costs(100), costs(80))


@pytest.mark.parametrize("spec", ["cosine>=0.98", "perplexity<=+1%,flops<=-20%", "kl<=0.02"])
def test_a_spec_prints_back(spec):
    assert str(parse_budget(spec)) == spec
    assert isinstance(parse_budget(spec), Budget)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosine", "is not a bound"),
        ("cosin>=0.9", "did you mean 'cosine'"),
        ("cosine<=0.9", "bounded with >="),
        ("perplexity<=1%", "write the sign"),
        ("flops<=-20%", "needs a quality limit"),
        ("kl<=0.1,flops<=+20%", "a cost goal is"),
    ],
)
def test_bad_specs_say_what_to_write(spec, message):
    with pytest.raises(UsageError, match=message):
        parse_budget(spec)


def test_data_too_few_for_a_limit_are_told():
    budget = parse_budget("perplexity<=+3%")
    few = {"perplexity": quality("perplexity", 290.6, 283.2, stderr=17.7)}
    enough = {"perplexity": quality("perplexity", 290.6, 283.2, stderr=1.0)}
    assert doubts(enough, budget) == []
    assert "10 samples of choosing data are too few" in doubts(few, budget)[0]
