"""What the leaderboard writes: a table, a plot, and JSON with the curves of a run's report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.recipes import CONTROLS
from redpass.record import Curve, CurvePoint
from redpass.verify.metrics import METRICS


@dataclass(frozen=True)
class Line:
    """One recipe at one share: figures over seeds.

    Attributes:
        share: share of the layers' cost that was to be saved, in whole layers.
        costs: share of each cost of the whole model that is left, mean over seeds.
        values: metric -> (mean, standard deviation over seeds).
        stderr: metric -> error of one run from the spread over rows, mean over seeds.
        seconds: to make one result, all targets of a search counted together; mean over seeds.
    """

    recipe: str
    share: float
    costs: dict[str, float]
    values: dict[str, tuple[float, float]]
    stderr: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Board:
    """All lines of one model.

    Attributes:
        metrics: what it is judged by, the metric of the plot first.
        what: the cost that was saved.
        original: the untouched model's figures.
        data: rows and seeds, in words.
    """

    name: str
    metrics: tuple[str, ...]
    what: str
    original: Mapping[str, float]
    data: str
    lines: Sequence[Line]

    def curves(self) -> list[Curve]:
        """A curve for each recipe, for the first metric, in the form of a run's report."""
        return [self._curve(name) for name in dict.fromkeys(line.recipe for line in self.lines)]

    def _curve(self, name: str) -> Curve:
        metric = self.metrics[0]
        points = [CurvePoint(0.0, self.original[metric], 0.0)]
        for line in self.lines:
            if line.recipe == name:
                mean, spread = line.values[metric]
                removed = 1 - line.costs[self.what]
                points.append(CurvePoint(removed, mean, spread, f"{line.share:.0%}"))
        return Curve(name, metric, METRICS[metric].better, points, self.what)

    def titles(self) -> list[str]:
        """The columns' titles."""
        left = [f"{what} left, %" for what in self.lines[0].costs]
        figures = [f"{name} ({METRICS[name].better} is better)" for name in self.metrics]
        return ["layers off", "recipe", *left, *figures, "s a result"]

    def rows(self) -> list[list[str]]:
        """All rows, the original first."""
        whole = ["100.0" for _ in self.lines[0].costs]
        figures = [f"{self.original[name]:.4g}" for name in self.metrics]
        return [["0%", "original", *whole, *figures, ""], *map(self._cells, self.lines)]

    def _cells(self, line: Line) -> list[str]:
        left = [f"{100 * share:.1f}" for share in line.costs.values()]
        pairs = [line.values[metric] for metric in self.metrics]
        figures = [f"{mean:.4g} ± {spread:.2g}" for mean, spread in pairs]
        return [f"{line.share:.0%}", line.recipe, *left, *figures, f"{line.seconds:.1f}"]

    def markdown(self) -> str:
        """The table in Markdown, with what it was measured on above it."""
        table = [self.titles(), ["---"] * len(self.titles()), *self.rows()]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        title = f"# {self.name}: quality at equal {self.what}"
        return "\n".join([title, "", self.data, "", *lines, ""])

    def record(self) -> dict[str, object]:
        """Everything, to be written as JSON."""
        return {
            "original": dict(self.original),
            "cost": self.what,
            "data": self.data,
            "lines": [asdict(line) for line in self.lines],
            "curves": [asdict(curve) for curve in self.curves()],
        }


def show(board: Board) -> None:
    """Prints the table."""
    table = Table(*board.titles(), title=f"{board.name}: quality at equal {board.what}")
    for row in board.rows():
        table.add_row(*row)
    # In a file there is no window to fit in, and a table that is cut says nothing.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def plot(board: Board, path: Path) -> None:
    """Draws the first metric over what is left of the cost, one curve a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    colours = pyplot.get_cmap("tab20")
    for number, curve in enumerate(board.curves()):
        left = [100 * (1 - point.removed) for point in curve.points]
        means = [point.quality for point in curve.points]
        spread = [point.stderr for point in curve.points]
        style = "--" if curve.method in CONTROLS else "-"
        axes.errorbar(
            left, means, spread, label=curve.method, linestyle=style, marker="o", capsize=3,
            color=colours(number % 20),
        )  # fmt: skip
    metric = board.metrics[0]
    axes.set(xlabel=f"{board.what} left, %", ylabel=metric, title=board.name)
    axes.invert_xaxis()
    axes.set_yscale("log" if metric == "perplexity" else "linear")
    for part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        part(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(*_window(board))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _window(board: Board) -> tuple[float, float]:
    """The range of what is no control: controls may be a hundred times worse, and run out of it."""
    curves = [curve for curve in board.curves() if curve.method not in CONTROLS]
    values = [point.quality for curve in curves or board.curves() for point in curve.points]
    low, high = min(values), max(values)
    edge = 0.1 * (high - low) or 0.1
    return low - edge, high + edge


def write(board: Board, folder: Path) -> None:
    """Prints the table and writes `leaderboard-MODEL.{md,json,png}`."""
    show(board)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"leaderboard-{board.name}"
    stem.with_suffix(".md").write_text(board.markdown())
    stem.with_suffix(".json").write_text(json.dumps(board.record(), indent=1))
    plot(board, stem.with_suffix(".png"))
