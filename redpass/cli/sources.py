"""From what the user typed to a program and its data. Cheap checks come before torch does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from redpass.checks import memory, source
from redpass.cli.options import DataOptions, ModelOptions, RunOptions
from redpass.errors import DataError, UsageError, nearest
from redpass.manifest import NAME as MANIFEST
from redpass.progress import Listener, Silent

if TYPE_CHECKING:
    from redpass.data import Batches
    from redpass.program import Program

FORMATS = ("pt2", "onnx", "hf", "kernels")
USUAL_FORMATS = ("pt2", "onnx")


def check_model(path: Path, options: ModelOptions | None = None) -> Path:
    """Returns the file or folder to load, as `resolve` does, once it was checked.

    Raises:
        LoadError: see `redpass.checks.source.check`; told before PyTorch is imported.
        ResourceError: there is no room for it.
    """
    options = options or ModelOptions()
    path = resolve(path)
    source.check(path, allow=options.allow, trust=options.trust_file)
    memory.check(path)
    return path


def resolve(path: Path) -> Path:
    """Returns `path`; for a folder that redpass wrote, its `model.pt2`. Raises `LoadError`."""
    inner = source.existing(path) / "model.pt2"
    return inner if (path / MANIFEST).exists() and inner.exists() else path


def check_data(path: Path) -> Path:
    """Returns `path`. Raises `DataError` when it is missing, empty or a folder."""
    try:
        if path.is_dir():
            raise DataError("is a folder", file=path, hint="name a file")
        if not path.stat().st_size:
            raise DataError("is empty", file=path, hint="give at least one row of data")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        text = "no such file" if missing else f"cannot be read: {error.strerror}"
        raise DataError(text, file=path, hint="check the path given to --data") from error
    return path


def check_formats(text: str | None) -> tuple[str, ...]:
    """Returns the formats named, or the usual ones. Raises `UsageError` for an unknown one."""
    if text is None:
        return USUAL_FORMATS
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in FORMATS:
            hint = nearest(name, FORMATS)
            raise UsageError(f"unknown format '{name}'", place="--format", hint=hint)
    if not names:
        raise UsageError("names no format", place="--format", hint=nearest("", FORMATS))
    return names


def prepare(run: RunOptions) -> None:
    """Sets threads and seed. The first thing that imports torch."""
    import torch

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)


def load(
    model: Path,
    options: ModelOptions,
    *,
    data: Path | None = None,
    tokenizer: Path | None = None,
    listener: Listener | None = None,
    kept: Path | None = None,
    resume: bool = False,
) -> Program:
    """Loads and traces a model, or reads what an interrupted run kept of that.

    A pickled module does not say what its inputs look like; the first rows of `data` do, unless
    the user gave an example or a spec.

    Args:
        kept: where the traced program is kept for a run that goes on with this one.
        resume: whether what lies there may be used.

    Raises:
        LoadError, TraceError, UsageError, DataError: see `redpass.load`.
    """
    listener = listener or Silent()
    stage = f"loading {model.name or model}"
    is_pickle = model.suffix in (".pt", ".pth")
    rows = options.example or (data if is_pickle and not options.input else None)
    # Code of the user's own may change and no digest would tell.
    has_code = options.module or options.allow or options.trust_file or (rows and tokenizer)

    def fresh() -> Program:
        return _load(resolve(model), options, rows, tokenizer)

    listener.start(stage)
    try:
        if kept is None or has_code:
            return fresh()
        from redpass.frontend.kept import key_of, load_kept

        key = key_of(resolve(model), rows, options.input, options.task)
        return load_kept(kept, key, fresh, resume=resume)
    finally:
        listener.finish(stage)


def _load(model: Path, options: ModelOptions, data: Path | None, tokenizer: Path | None) -> Program:
    from redpass import frontend

    return frontend.load(
        model,
        inputs=options.input,
        data=data,
        tokenizer=tokenizer,
        task=options.task,
        module=options.module,
        allow=options.allow,
        trust_file=options.trust_file,
    )


def read(path: Path, program: Program, options: DataOptions) -> Batches:
    """Reads a data file for a program. Raises `DataError`."""
    from redpass import frontend

    return frontend.read_batches(
        check_data(path),
        program,
        batch_size=options.batch_size,
        tokenizer=options.tokenizer,
        length=options.length,
        limit=options.rows,
    )
