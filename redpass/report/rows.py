"""What a report shows, as plain rows: the page and the terminal draw the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from redpass.errors import clean
from redpass.record import ActionRecord, LatencyRecord, QualityRecord, RunRecord, SkipRecord
from redpass.report import figures

VERDICTS = {
    "met": ("budget met", "good"),
    "missed": ("budget missed", "bad"),
    "no budget": ("exact passes only", "plain"),
    "dry run": ("dry run", "plain"),
}
"""Verdict of a record -> its words and its tone."""

TONES = {"applied": "good", "planned": "plain", "rolled back": "bad"}
"""Outcome of an action -> tone; all others are warnings."""


@dataclass(frozen=True)
class Row:
    """One line of the before/after table.

    Attributes:
        note: what the figures depend on: sizes, number of rows, or why there are none.
        detail: how sure the figures are, where there is room for it.
        tone: `good`, `bad` or `plain`.
    """

    name: str
    before: str
    after: str
    change: str
    tone: str = "plain"
    note: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Group:
    """Actions of one rule that had the same outcome, or places skipped for one reason."""

    title: str
    pass_name: str
    outcome: str
    tone: str
    actions: list[ActionRecord] = field(default_factory=list)
    skips: list[SkipRecord] = field(default_factory=list)

    @property
    def saving(self) -> str:
        """The summed predicted saving in words, or an empty text."""
        total: dict[str, float] = {}
        for action in self.actions:
            for name, value in action.saving.items():
                total[name] = total.get(name, 0.0) + value
        return ", ".join(saving(name, value) for name, value in total.items() if value)


def before_after(record: RunRecord) -> list[Row]:
    """Returns the rows of the before/after table: costs, latency, quality."""
    before, after = record.before, record.after
    sizes = ", ".join(f"{name} {value}" for name, value in before.sizes.items())
    rows = [
        _cost("Parameters", before.parameters, after.parameters, figures.count),
        _cost("FLOPs", before.flops, after.flops, figures.count, sizes),
        _cost("Weights", before.bytes, after.bytes, figures.size),
        _cost("Files", before.file_bytes, after.file_bytes, figures.size),
        _cost(
            "KV cache per token", before.kv_bytes_per_token, after.kv_bytes_per_token, figures.size
        ),
        _cost("Graph nodes", before.nodes, after.nodes, figures.count),
    ]
    rows = [row for row in rows if row.before != figures.size(0) and row.before != "0"]
    return rows + [_latency(item) for item in record.latency] + quality(record)


def quality(record: RunRecord) -> list[Row]:
    """Returns one row a metric: on the reporting data where measured, else on the choosing data."""
    chosen: dict[str, QualityRecord] = {}
    for item in record.quality:
        if item.metric not in chosen or item.split == "reporting":
            chosen[item.metric] = item
    return [_quality(item) for item in chosen.values()]


def headline(record: RunRecord) -> list[Row]:
    """Returns the rows that are worth a large figure: what changed, each thing once."""
    told = {"Graph nodes", "Weights" if record.after.file_bytes else "Files"}
    silent = {"0%", figures.NONE, "not measured"}
    rows = [row for row in before_after(record) if row.name not in told]
    return [row for row in rows if row.change not in silent or row.tone in ("good", "bad")][:8]


def verdict(record: RunRecord) -> tuple[str, str]:
    """Returns the verdict in words, and its tone."""
    return VERDICTS[record.verdict] if record.passes else ("measured, nothing changed", "plain")


def name(record: RunRecord) -> str:
    """Returns the model's name: the last two parts of its path."""
    parts = [part for part in record.model.split("/") if part]
    return clean("/".join(parts[-2:]) or record.model, 80)


def summary(record: RunRecord) -> str:
    """Returns the run in one sentence."""
    if not record.passes:
        size = figures.count(record.before.parameters)
        return f"{size} parameters, {figures.count(record.before.flops)} FLOPs."
    applied = sum(action.outcome == "applied" for action in record.actions)
    if record.verdict == "dry run":
        planned = sum(action.outcome == "planned" for action in record.actions)
        return f"{planned} actions are possible; nothing was changed."
    parts = [f"{applied} action{'s' * (applied != 1)} applied"]
    for name in ("flops", "parameters"):
        text = figures.change(getattr(record.before, name), getattr(record.after, name))
        parts.append(f"{text} {'FLOPs' if name == 'flops' else name}")
    return ", ".join([*parts, *_speeds(record.latency)]) + "."


def _speeds(latency: Iterable[LatencyRecord]) -> Iterator[str]:
    """How many times as fast, one part a runner; sizes that no speed can be told of are left out.

    A ratio whose quartiles lie on both sides of 1 says nothing worth a headline.
    """
    found: dict[str, list[float]] = {}
    for item in latency:
        if not item.failure and item.ratio and (item.spread[1] < 1 or item.spread[0] > 1):
            found.setdefault(item.runner, []).append(1 / item.ratio)
    for runner, times in found.items():
        ends = dict.fromkeys(f"{time:.2f}" for time in (min(times), max(times)))
        yield f"{' to '.join(ends)}x as fast in {runner}"


def action_groups(record: RunRecord) -> list[Group]:
    """Returns the actions by rule and outcome; approximate ones first, as they cost quality."""
    lossy = {item.name for item in record.passes if item.exactness == "approximate"}
    groups: dict[tuple[str, str], Group] = {}
    for action in record.actions:
        rule = action.key.partition(":")[0]
        key = (rule, action.outcome)
        tone = TONES.get(action.outcome, "warn")
        group = groups.setdefault(key, Group(rule, action.pass_name, action.outcome, tone))
        group.actions.append(action)
    return sorted(groups.values(), key=lambda group: group.pass_name not in lossy)


def skip_groups(record: RunRecord) -> list[Group]:
    """Returns the skipped places by rule and reason, the most frequent first.

    Figures inside a reason differ from place to place, so they do not part a group.
    """
    groups: dict[tuple[str, str], Group] = {}
    for skip in record.skips:
        key = (skip.rule, _pattern(skip.reason))
        title = key[1] if "…" in key[1] else skip.reason
        group = groups.setdefault(key, Group(title, skip.pass_name, "skipped", "plain"))
        group.skips.append(skip)
    return sorted(groups.values(), key=lambda group: -len(group.skips))


def evidence(action: ActionRecord) -> str:
    """Returns the figures behind an action in words."""
    parts = [f"{name.replace('_', ' ')} {figures.plain(v)}" for name, v in action.evidence.items()]
    if action.loss is not None:
        parts.append(f"predicted loss {figures.plain(action.loss)}")
    return ", ".join(parts)


def savings(action: ActionRecord) -> str:
    """Returns the predicted saving of one action in words."""
    return ", ".join(saving(name, value) for name, value in action.saving.items() if value)


def saving(name: str, value: float) -> str:
    """Returns one predicted saving in words: `1.18 M parameters`."""
    if name == "bytes":
        return figures.size(value)
    if name == "kv_bytes_per_token":
        return f"{figures.size(value)} of cache per token"
    return f"{figures.count(value)} {'FLOPs' if name == 'flops' else name.replace('_', ' ')}"


def removed(record: RunRecord) -> set[str]:
    """Returns the labels of the branches and layers that are not in the result any more."""
    branches = {branch.label for branch in record.branches if branch.outcome != "kept"}
    return branches | {layer.label for layer in record.layers if layer.outcome == "dropped"}


def shown(texts: Iterable[str], limit: int = 3) -> str:
    """Returns the first few of many names, and how many more there are."""
    names = [clean(text, 60) for text in texts]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _cost(name: str, before: float, after: float, form: object, note: str = "") -> Row:
    assert callable(form)
    tone = "good" if after < before else "bad" if after > before else "plain"
    return Row(name, form(before), form(after), figures.change(before, after), tone, note)


def _latency(item: LatencyRecord) -> Row:
    name = f"Latency, {item.runner}"
    if item.failure:
        return Row(name, figures.NONE, figures.NONE, "not measured", "warn", item.failure)
    low, high = item.spread
    # Quartiles on both sides of 1 mean the difference is not told from noise.
    tone = "good" if high < 1 else "bad" if low > 1 else "plain"
    before, after = figures.milliseconds(item.original_ms), figures.milliseconds(item.optimized_ms)
    detail = f"ratio {item.ratio:.3f}, quartiles {low:.3f} to {high:.3f}"
    change = f"{100 * (item.ratio - 1):+.1f}%"
    return Row(name, before, after, change, tone, item.sizes, detail)


def _quality(item: QualityRecord) -> Row:
    tone = "plain" if item.met is None else "good" if item.met else "bad"
    name = item.metric + (f" ({item.limit.removeprefix(item.metric)})" if item.limit else "")
    note = f"{item.count} on {item.split} data"
    difference = figures.plain(item.difference)
    if difference not in (figures.NONE, "0") and item.difference > 0:
        difference = f"+{difference}"
    after = figures.plain(item.value) + figures.error(item.stderr)
    return Row(name, figures.plain(item.original), after, difference, tone, note)


def _pattern(reason: str) -> str:
    words = reason.split(" ")
    return " ".join("…" if any(c.isdigit() for c in word) else word for word in words)
