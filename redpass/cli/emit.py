"""`redpass emit`: the hot paths of a model as Triton files that stand alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

import redpass
from redpass.cli import sources
from redpass.cli.options import (
    RESULT,
    DataFile,
    DataOptions,
    Model,
    ModelOptions,
    PathOption,
    RunOptions,
)
from redpass.cli.screen import Screen
from redpass.errors import UsageError

if TYPE_CHECKING:
    from redpass.codegen.tuning import Records
    from redpass.program import Program

Out = Annotated[
    Path | None, PathOption(metavar="DIR", help="Where the files go.", rich_help_panel=RESULT)
]
Targets = Annotated[
    str,
    Option(
        metavar="NAMES",
        help="Compile ahead of time, e.g. 'sm_80,sm_90'; no GPU is needed.",
        rich_help_panel=RESULT,
    ),
]
Force = Annotated[bool, Option("--force", help="Replace an older result.", rich_help_panel=RESULT)]
Tune = Annotated[
    bool,
    Option(
        "--tune", help="Time the kernels' configurations on this GPU first.", rich_help_panel=RESULT
    ),
]
Cache = Annotated[
    Path | None,
    PathOption(
        metavar="DIR",
        help="Where timings are kept; the user's cache folder by default.",
        rich_help_panel=RESULT,
    ),
]


def emit(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    out: Out = None,
    aot: Targets = "",
    tune: Tune = False,
    cache: Cache = None,
    force: Force = False,
    data: DataFile = None,
) -> None:
    """Write the hot paths of MODEL as Triton kernels, each with its reference and a test.

    MODEL is best a folder that `redpass optimize` wrote. A model without hot paths gives an empty
    index, which says why; that is no error.
    """
    from redpass.artifact import staged

    sources.check_model(model, source)
    if out is None:
        raise UsageError("no place for the result", place="--out", hint="name a folder")
    screen = Screen(run)
    with staged(out, source=model, force=force) as folder, screen.listening() as listener:
        from redpass.codegen.aot import check_targets
        from redpass.codegen.emit import emit as emit_files
        from redpass.codegen.folder import write_kernels
        from redpass.report.kernels import emitted

        targets = check_targets(aot)
        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        listener.start("writing")
        origin = f"redpass {redpass.__version__} from {model.name}"
        files, skips = emit_files(program, origin=origin, records=_records(program, cache, tune))
        built = write_kernels(
            folder,
            files,
            skips,
            targets=targets,
            model=program.origin.path,
            model_digest=program.origin.digest,
        )
        listener.finish("writing")
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    screen.emit(
        {
            "kernels": [{"file": f"{f.name}.py", "op": f.op, "places": f.places} for f in files],
            "aot": [item.as_row() for item in built],
            "skips": [asdict(skip) for skip in skips],
            "written": [str(path) for path in paths],
        }
    )
    screen.show(*emitted(files, built, skips))
    screen.wrote(paths)


def _records(program: Program, cache: Path | None, tune: bool) -> Records:
    from redpass.codegen import tuning

    folder = tuning.cache_folder(cache)
    device = tuning.this_device()
    if tune:
        if device is None:
            raise UsageError(
                "kernels are tuned on a GPU, and there is none", place="--tune", hint="leave it out"
            )
        from redpass.codegen.tune import tune_program

        tuning.write(folder, device, tune_program(program))
    return tuning.read(folder, device)
