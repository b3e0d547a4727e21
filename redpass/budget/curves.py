"""The path of a search: quality after each accepted action, as a curve for reports."""

from __future__ import annotations

from redpass.record import CostRecord, Curve, CurvePoint, QualityRecord


class Path:
    """Collects points; the untouched model is the first.

    Args:
        metric: what quality is; `better` says which way.
        cost: whose removed share is the other axis.
    """

    def __init__(self, metric: str, better: str, cost: str = "parameters") -> None:
        self.metric, self.better, self.cost = metric, better, cost
        self.points: list[CurvePoint] = []

    def add(self, start: CostRecord, now: CostRecord, record: QualityRecord, label: str) -> None:
        """Adds what was measured once the action `label` was accepted."""
        if not self.points:
            self.points.append(CurvePoint(0.0, record.original, 0.0))
        removed = 1 - getattr(now, self.cost) / max(getattr(start, self.cost), 1)
        self.points.append(CurvePoint(removed, record.value, record.stderr, label))

    def curve(self, method: str) -> Curve:
        """Returns the curve under the name of the method."""
        return Curve(method, self.metric, self.better, list(self.points), self.cost)
