"""Quality as users measure it: one interface for every metric, with errors that rows give.

    metric = find_metric("kl")
    metric.check(program, batches)                        # before any long work
    evaluate(metric, program, original, batches).value

A metric of the user's own is a function by dotted name, `package.module:function`, called as
`function(program, original, batches)`. It returns one number, or one number a row (then it has a
standard error), or an `Estimate`. Its attribute `better` is "higher" (the default) or "lower",
its attribute `least` the fewest rows it can be measured on (1 when it does not say).
`redpass.verify.sampled` makes such functions for programs that generate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from redpass.data import LABELS, Batch, Batches
from redpass.errors import DataError, RedpassError, UsageError, VerifyError, nearest
from redpass.program import Program
from redpass.verify import measures, user_metric
from redpass.verify.estimate import Estimate, Samples, Summary, exponential_mean, mean, tail
from redpass.verify.inputs import output_shape
from redpass.verify.originals import Originals, quality_port, run_port

__all__ = ["METRICS", "Estimate", "Metric", "Originals", "evaluate", "evaluate_all", "find_metric"]


@dataclass(frozen=True)
class Metric:
    """One way to measure quality.

    Attributes:
        name: what users type and reports print.
        better: `lower` or `higher`.
        unit: what the value is in: `nats a token`, `share of rows`, ...
        needs: inputs (or `labels`) that every batch must hold.
        measure: what one batch gives; None for a user's function.
        summarise: how the batches' samples become one figure.
        count: how many tokens or rows a batch gives, from the batch and the output's shape.
        least: the fewest of these that give a figure with an error.
        ranks: how many axes the output may have.
        function: the user's function, or None.
    """

    name: str
    better: str
    unit: str
    needs: tuple[str, ...] = ()
    measure: Callable[[measures.View], Samples] | None = field(default=None, repr=False)
    summarise: Summary = field(default=mean, repr=False)
    count: Callable[[Batch, tuple[int, ...]], int] = field(default=measures.rows, repr=False)
    least: int = 2
    ranks: tuple[int, ...] = (2, 3)
    function: user_metric.UserFunction | None = field(default=None, repr=False)

    def check(self, program: Program, batches: Batches, *, port: str | None = None) -> None:
        """Finds out on one batch whether the metric can be measured, before any long work.

        Raises:
            DataError: an input or output is missing, the data are too small, or the user's
                function raises or gives NaN; the message names the metric.
        """
        if self.function is not None:
            few = fewest(self, batches)
            user_metric.call(self.name, self.function, program, program, few)
            return
        _check_names(self, batches)
        _check_size(self, program, batches, port)
        _check_one(self, program, batches, port)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("perplexity", "lower", "per token", ("input_ids",), measures.losses,
                   exponential_mean, measures.targets, ranks=(3,)),
            Metric("loss", "lower", "nats a token", ("input_ids",), measures.losses,
                   mean, measures.targets, ranks=(3,)),
            Metric("kl", "lower", "nats a token", (), measures.divergences,
                   mean, measures.positions),
            Metric("kl_p99", "lower", "nats", (), measures.divergences,
                   tail(0.99), measures.positions, least=100),
            Metric("top1", "higher", "share of tokens", (), measures.agreements,
                   mean, measures.positions),
            Metric("accuracy", "higher", "share of labels", (LABELS,), measures.hits,
                   mean, measures.labelled),
            Metric("cosine", "higher", "cosine a row", (), measures.cosines, ranks=(2, 3, 4)),
            Metric("retrieval", "higher", "share of neighbours", (), measures.pairs,
                   measures.neighbour_agreement, least=3, ranks=(2, 3, 4)),
            Metric("relative_error", "lower", "share of the norm", (), measures.relative_errors,
                   ranks=(1, 2, 3, 4, 5)),
        )
    }
)  # fmt: skip
"""The metrics redpass has, by name."""


def find_metric(name: str) -> Metric:
    """Returns a metric by name, or the user's function by dotted name.

    Raises:
        UsageError: no such metric (it names the nearest), module or function.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name and "." not in name:
        hint = nearest(name, METRICS) + " A function of your own is package.module:function."
        raise UsageError(f"unknown metric '{name}'", hint=hint)
    function = user_metric.find(name)
    least = int(getattr(function, "least", 1))
    return Metric(name, user_metric.better(function), "", least=least, function=function)


def evaluate(
    metric: Metric,
    program: Program,
    original: Program,
    batches: Batches,
    *,
    port: str | None = None,
    originals: Originals | None = None,
) -> Estimate:
    """Measures `metric` on `program`, in pairs with `original`, one batch at a time.

    Args:
        port: the output to measure; None takes `logits` or the first floating-point output.
        originals: what `original` says about `batches`, kept from an earlier call.

    Raises:
        DataError: the data cannot give this metric, or the user's function failed.
        VerifyError: the program's output holds NaN.
    """
    return evaluate_all([metric], program, original, batches, port=port, originals=originals)[
        metric.name
    ]


def evaluate_all(
    metrics: Sequence[Metric],
    program: Program,
    original: Program,
    batches: Batches,
    *,
    port: str | None = None,
    originals: Originals | None = None,
    outputs: Callable[[int], Tensor] | None = None,
) -> dict[str, Estimate]:
    """Measures several metrics with one run of the program; otherwise as `evaluate`.

    Args:
        outputs: gives the program's output on a batch by number, for who has a quicker way to it
            than a run of the whole program. A user's function runs the program all the same.

    Returns:
        Metric name -> estimate.
    """
    known = originals or Originals(original, batches, port=port)
    if known.program is not original or known.batches is not batches:
        raise UsageError("the originals are of another program or other data")
    built_in = [metric for metric in metrics if metric.measure is not None]
    samples: dict[str, list[Samples]] = {metric.name: [] for metric in built_in}
    for view in _views(program, known, outputs) if built_in else ():
        shared: dict[object, Samples] = {}
        for metric in built_in:
            samples[metric.name].append(_measure(metric, view, shared))
    found = {metric.name: metric.summarise(samples[metric.name]) for metric in built_in}
    users = {m.name: _user(m, program, original, batches, known) for m in metrics if m.function}
    return {metric.name: (found | users)[metric.name] for metric in metrics}


def _views(
    program: Program, originals: Originals, outputs: Callable[[int], Tensor] | None
) -> Iterator[measures.View]:
    for number, batch in enumerate(originals.batches):
        now = outputs(number) if outputs else run_port(program, batch, originals.port)
        yield measures.View(now, batch, number, originals)


def _measure(metric: Metric, view: measures.View, shared: dict[object, Samples]) -> Samples:
    assert metric.measure is not None
    if metric.measure not in shared:
        shared[metric.measure] = metric.measure(view)
    found = shared[metric.measure]
    if found.now.isnan().any():
        raise VerifyError(
            f"holds NaN, so '{metric.name}' has no value",
            place=f"output '{view.originals.port}', batch {view.number}",
        )
    return found


def _user(
    metric: Metric, program: Program, original: Program, batches: Batches, known: Originals
) -> Estimate:
    function = metric.function
    assert function is not None

    def run(judged: Program) -> user_metric.Outcome:
        return user_metric.call(metric.name, function, judged, original, batches)

    was = known.keep(("user", metric.name), lambda: run(original))
    return user_metric.estimate(run(program), was)


def fewest(metric: Metric, batches: Batches) -> Batches:
    """Returns the first batches that hold as many rows as the metric needs.

    Raises:
        DataError: all together do not.
    """
    rows = 0
    for number, batch in enumerate(batches, 1):
        rows += max((len(value) for value in batch.values() if value.dim()), default=0)
        if rows >= metric.least:
            few: Batches = batches[:number]
            return few
    raise _too_few(metric, batches, rows, "rows")


def _too_few(metric: Metric, batches: Batches, found: int, what: str) -> DataError:
    return DataError(
        f"{found} {what} are too few for metric '{metric.name}'",
        file=batches.source,
        hint=f"give data with at least {metric.least}",
    )


def _check_names(metric: Metric, batches: Batches) -> None:
    for number, batch in enumerate(batches):
        missing = [name for name in metric.needs if name not in batch]
        if missing:
            hint = f"metric '{metric.name}' needs it; the data hold {', '.join(batch)}"
            place = f"batch {number}"
            raise DataError(
                f"there is no '{missing[0]}'", file=batches.source, place=place, hint=hint
            )


def _check_size(metric: Metric, program: Program, batches: Batches, port: str | None) -> None:
    output = quality_port(program, port)
    if len(output.shape) not in metric.ranks:
        expected = " or ".join(map(str, metric.ranks))
        raise DataError(
            f"metric '{metric.name}' needs an output with {expected} axes, not {output}",
            place=f"output '{output.name}'",
        )
    shapes = (output_shape(program, batch, output.name) for batch in batches)
    found = sum(metric.count(batch, shape) for batch, shape in zip(batches, shapes, strict=True))
    if found < metric.least:
        raise _too_few(metric, batches, found, metric.count.__name__)


def _check_one(metric: Metric, program: Program, batches: Batches, port: str | None) -> None:
    few = {name: value[:2] if value.dim() else value for name, value in batches[0].items()}
    first = Batches((few,), batches.source)
    try:
        found = evaluate(metric, program, program, first, port=port)
    except RedpassError:
        raise
    except Exception as error:
        raise DataError(
            f"metric '{metric.name}' cannot be measured: {error}",
            file=batches.source,
            place="batch 0",
        ) from error
    if math.isnan(found.value) and found.count:
        raise VerifyError(f"metric '{metric.name}' is NaN for the original model")
