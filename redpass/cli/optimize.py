"""`redpass optimize`: the main job, from a model to a checked, smaller one."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from redpass.artifact import journal_of
from redpass.budget.spec import Budget as Parsed
from redpass.budget.spec import check_method, parse_budget
from redpass.checks.requests import check_passes
from redpass.cli import sources
from redpass.cli.options import (
    Budget,
    DataFile,
    DataOptions,
    Kernels,
    Model,
    ModelOptions,
    Passes,
    Reduce,
    ResultOptions,
    RunOptions,
)
from redpass.cli.screen import Screen
from redpass.config import check_kernels
from redpass.errors import BudgetError, UsageError
from redpass.journal import cleared_when_done, traced_of
from redpass.progress import Listener

if TYPE_CHECKING:
    from redpass.config import Settings
    from redpass.pipeline import Result
    from redpass.program import Program
    from redpass.record import LatencyRecord, RunRecord


def optimize(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    result: ResultOptions,
    run: RunOptions,
    data: DataFile = None,
    budget: Budget = "",
    passes: Passes = None,
    kernels: Kernels = None,
    bench: Annotated[bool, Option(help="Measure latency before and after.")] = True,
    reduce: Reduce = None,
    dry: Annotated[
        bool, Option("--dry-run", help="Show what could be done; write nothing.")
    ] = False,
    search: Annotated[
        str,
        Option(
            metavar="greedy|allocated|one-shot",
            help="How candidates are chosen: each step measured, each place measured once, or "
            "in the order of the passes' own scores.",
        ),
    ] = "greedy",
    resume: Annotated[
        bool, Option("--resume", help="Go on where a run that was stopped or killed had come to.")
    ] = False,
) -> None:
    """Remove redundancy from MODEL, check the result, write it to --out."""
    formats = sources.check_formats(result.format)
    sources.check_model(model, source)
    if data is not None:
        sources.check_data(data)
    job = Job(model, source, rows, run, data, budget, passes)
    job.search, job.kernels, job.bench = search, kernels, bench
    job.reduce, job.formats = reduce, () if result.format is None else formats
    screen = Screen(run)
    if dry:
        _finish(screen, job.plan(screen), [])
        return
    if result.out is None:
        raise UsageError(
            "no place for the result", place="--out", hint="name a folder, or --dry-run"
        )
    job.journal, job.resume = journal_of(result.out), resume
    with cleared_when_done(job.journal), _staged(result, model) as folder:
        try:
            with screen.listening() as listener:
                found = job.run_pipeline(listener)
                usual = result.format is None
                record = job.write(found, folder, formats, listener, bench=bench, usual=usual)
        except BudgetError as error:
            _show_miss(screen, error)
            raise
    _finish(screen, record, _written(result.out))


class Job:
    """One run of the pipeline with everything the user said about it."""

    def __init__(
        self,
        model: Path,
        source: ModelOptions,
        rows: DataOptions,
        run: RunOptions,
        data: Path | None,
        budget: str,
        passes: str | None,
    ) -> None:
        self.model, self.source, self.rows, self.options = model, source, rows, run
        self.data, self.budget, self.passes = data, budget, passes
        self.journal: Path | None = None
        self.resume = False
        self.search, self.bench = "greedy", False
        self.reduce: str | None = None
        self.kernels: str | None = None
        self.formats: tuple[str, ...] = ()

    def run_pipeline(self, listener: Listener, limit: int | None = None) -> Result:
        """Loads the model and the data, and optimises.

        Args:
            limit: apply only the first actions; in place of `REDPASS_LIMIT`.
        """
        budget = self._checked_words()  # told before PyTorch is imported
        from redpass import data as data_module
        from redpass import pipeline
        from redpass.lowering import with_kernels
        from redpass.passes.spec import parse_passes

        sources.prepare(self.options)
        chosen = None if self.passes is None else parse_passes(self.passes)
        self.program = sources.load(
            self.model,
            self.source,
            data=self.data,
            tokenizer=self.rows.tokenizer,
            listener=listener,
            kept=None if self.journal is None else traced_of(self.journal),
            resume=self.resume,
        )
        batches = None if self.data is None else sources.read(self.data, self.program, self.rows)
        found = pipeline.optimize(
            self.program,
            chosen,
            budget=budget,
            data=None if batches is None else data_module.split(batches),
            settings=self._settings(limit),
            listener=listener,
            seed=self.options.seed,
            command=command_line(),
            journal=self.journal,
            resume=self.resume,
            search=self.search,
            only_faster=self.bench,
            reduce=self.reduce,
            holds=self._holds(),
        )
        return replace(found, record=with_kernels(found.record, found.program, self.kernels))

    def _holds(self) -> Callable[[Program], str] | None:
        """What says that a form which was asked for cannot hold a program; None when all can."""
        if "hf" not in self.formats:
            return None
        from redpass.export.huggingface import holder

        return holder(self.program)

    def _checked_words(self) -> Parsed:
        """Returns the budget. Raises `UsageError` for any word that is not known."""
        check_kernels(self.kernels)
        check_method(self.search)
        check_passes(self.passes or "")
        check_passes(self.reduce or "", "--reduce")
        return parse_budget(self.budget)

    def plan(self, screen: Screen) -> RunRecord:
        """Does everything but apply; the record holds what could be done as `planned`."""
        with screen.listening() as listener:
            record = self.run_pipeline(listener, limit=0).record
        actions = [
            replace(action, outcome="planned", why="")
            if action.outcome == "beyond limit"
            else action
            for action in record.actions
        ]
        return replace(record, verdict="dry run", actions=actions)

    def write(
        self,
        found: Result,
        folder: Path,
        formats: tuple[str, ...],
        listener: Listener,
        *,
        bench: bool,
        usual: bool = True,
    ) -> RunRecord:
        """Writes the result and its report; returns the record with files and latency in it.

        Args:
            usual: whether to add a Hugging Face folder where one can hold the result.
        """
        from redpass import export
        from redpass.report import write_report

        listener.start("writing")
        reports = export.write(found.program, folder, formats)
        notes = [f"{name}: {note}" for name, made in reports.items() for note in made.notes]
        if usual:
            notes += export.write_where_possible(found.program, folder)
        listener.finish("writing")
        record = replace(found.record, notes=[*found.record.notes, *notes])
        record = _with_file_bytes(record, self.model, folder, formats)
        if bench:
            listener.start("measuring latency")
            record = replace(record, latency=self._latency(found))
            listener.finish("measuring latency")
        write_report(record, folder)
        return record

    def _latency(self, found: Result) -> list[LatencyRecord]:
        from redpass import bench

        return bench.quick(self.program, found.program)

    def _settings(self, limit: int | None) -> Settings:
        from redpass.config import from_environment

        settings = from_environment()
        return settings if limit is None else replace(settings, limit=limit)


def command_line() -> str:
    """Returns the command as it can be pasted into a shell."""
    return shlex.join(["redpass", *sys.argv[1:]])


@contextlib.contextmanager
def _staged(result: ResultOptions, model: Path) -> Iterator[Path]:
    from redpass.artifact import staged

    assert result.out is not None  # the command saw to it
    with staged(result.out, source=model, force=result.force) as folder:
        yield folder


def _with_file_bytes(
    record: RunRecord, model: Path, folder: Path, formats: tuple[str, ...]
) -> RunRecord:
    """Fills in the bytes on disk: of the source's weights, and of the largest form written."""
    weights = model.glob("*.safetensors") if model.is_dir() else [model]
    forms = ["hf/*.safetensors" if name == "hf" else f"model.{name}*" for name in formats]
    sizes = [sum(map(_size, folder.glob(form))) for form in forms]
    return replace(
        record,
        before=replace(record.before, file_bytes=sum(map(_size, weights))),
        after=replace(record.after, file_bytes=max(sizes)),
    )


def _size(path: Path) -> int:
    return path.stat().st_size


def _written(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def _show_miss(screen: Screen, error: BudgetError) -> None:
    """Shows how far a run came that missed its budget; the error itself follows."""
    record = getattr(error, "record", None)
    if record is not None:
        from redpass.report.terminal import run_summary

        screen.show(run_summary(record))
        screen.emit(asdict(record))


def _finish(screen: Screen, record: RunRecord, paths: list[Path]) -> None:
    from redpass.report.terminal import run_summary

    screen.show(run_summary(record))
    screen.emit(asdict(record) | {"written": [str(path) for path in paths]})
    screen.wrote(paths)
