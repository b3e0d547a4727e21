"""Options that go together, as frozen dataclasses, and the way a command takes them.

A command lists a dataclass among its parameters; `grouped` turns its fields into options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from redpass.checks.input_specs import parse_all

# Whether a file can be read is told by the loaders, in the one form of all errors.
PathOption = functools.partial(Option, readable=False)
PathArgument = functools.partial(Argument, readable=False)

MODEL, DATA, RESULT, RUN = "Model", "Data", "Result", "Run"

Model = Annotated[
    Path, PathArgument(metavar="MODEL", help="A Hugging Face folder, a .pt2, a .pt, or a result.")
]
DataFile = Annotated[
    Path | None,
    PathOption(
        "--data",
        metavar="FILE",
        help='.npz, .safetensors, .pt, .jsonl with "text", or lines of text.',
        rich_help_panel=DATA,
    ),
]
Budget = Annotated[
    str,
    Option(
        metavar="SPEC",
        help="What may be lost: 'cosine>=0.98', 'perplexity<=+1%', 'kl<=0.05,flops<=-20%'.",
    ),
]


Passes = Annotated[
    str | None,
    Option(
        metavar="NAMES",
        help="Passes in order, e.g. 'drop_noops,drop_branches(min_similarity=0.9)'. Default: the "
        "exact ones, and with a --budget the approximate ones too.",
    ),
]
Reduce = Annotated[
    str | None,
    Option(
        metavar="PASSES",
        help="Approximate passes in place of the default ones (drop_branches, prune_channels, "
        "refit_projections); the exact passes run around them.",
    ),
]
Kernels = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="What is said about kernels: auto (where measured to win on this GPU), triton (all "
        "places that a kernel takes) or reference (none).",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """How to read a model file that does not say everything itself."""

    input: Annotated[
        list[str],
        Option(
            metavar="SPEC",
            # The backslash keeps the help from taking the brackets for markup.
            help=r"An input as 'name:int64\[batch,seq]'; named sizes may vary. Repeatable.",
            rich_help_panel=MODEL,
        ),
    ] = field(default_factory=list)
    example: Annotated[
        Path | None,
        PathOption(
            metavar="FILE", help="Example inputs: .npz, .safetensors, .pt.", rich_help_panel=MODEL
        ),
    ] = None
    task: Annotated[
        str | None,
        Option(
            metavar="TASK",
            help="causal-lm, encoder, classifier or denoiser, when the file does not say.",
            rich_help_panel=MODEL,
        ),
    ] = None
    module: Annotated[
        str | None,
        Option(
            metavar="PKG:FACTORY",
            help="Your own function that builds the module for a bare state dict.",
            rich_help_panel=MODEL,
        ),
    ] = None
    allow: Annotated[
        list[str],
        Option(
            metavar="PKG.CLASS",
            help="A class that a .pt may name besides PyTorch's own. Repeatable.",
            rich_help_panel=MODEL,
        ),
    ] = field(default_factory=list)
    trust_file: Annotated[
        bool,
        Option(
            "--trust-file",
            help="Read a .pt or .pt2 without checks: it may then run any code it holds. Only for "
            "files you made yourself.",
            rich_help_panel=MODEL,
        ),
    ] = False

    def __post_init__(self) -> None:
        """Raises `UsageError` for an input spec that is none, before anything slow is imported."""
        parse_all(self.input)


@dataclass(frozen=True)
class DataOptions:
    """How to read a data file."""

    tokenizer: Annotated[
        Path | None,
        PathOption(
            metavar="DIR",
            help="Tokenizer for text; the model's own folder by default.",
            rich_help_panel=DATA,
        ),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Rows a batch.", rich_help_panel=DATA)] = 8
    length: Annotated[int, Option(min=1, help="Tokens a row of text.", rich_help_panel=DATA)] = 128
    rows: Annotated[
        int | None, Option(min=1, help="Read at most so many rows.", rich_help_panel=DATA)
    ] = None


@dataclass(frozen=True)
class ResultOptions:
    """Where a result goes, and in which forms."""

    out: Annotated[
        Path | None,
        PathOption(metavar="DIR", help="Where the result goes.", rich_help_panel=RESULT),
    ] = None
    format: Annotated[
        str | None,
        Option(
            metavar="NAMES",
            help="Forms to write: pt2, onnx, hf. Default: pt2,onnx, and optimize adds hf where a "
            "Hugging Face folder can hold the result. When hf is named, optimize does only what "
            "one can hold.",
            rich_help_panel=RESULT,
        ),
    ] = None
    force: Annotated[
        bool, Option("--force", help="Replace an older result.", rich_help_panel=RESULT)
    ] = False


@dataclass(frozen=True)
class RunOptions:
    """How a command runs and what it prints."""

    json: Annotated[
        bool, Option("--json", help="Print one JSON document.", rich_help_panel=RUN)
    ] = False
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print errors only.", rich_help_panel=RUN)
    ] = False
    threads: Annotated[
        int | None, Option(min=1, help="Processor threads to use.", rich_help_panel=RUN)
    ] = None
    seed: Annotated[int, Option(min=0, help="Seed of random inputs.", rich_help_panel=RUN)] = 0
    debug: Annotated[
        bool, Option("--debug", help="Show tracebacks and warnings.", rich_help_panel=RUN)
    ] = False


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `command` with each parameter that is a dataclass replaced by its fields."""
    plain: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]  # type: ignore[assignment]  # a class, not an instance
            plain += _parameters(groups[name])
        else:
            plain.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, kind in groups.items():
            given[name] = kind(**{option.name: given.pop(option.name) for option in fields(kind)})
        return command(**given)

    run.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in plain}
    return run


def _parameters(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(option),
            annotation=hints[option.name],
        )
        for option in fields(kind)
    ]


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default
