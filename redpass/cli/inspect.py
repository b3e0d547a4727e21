"""`redpass inspect`: what is in a model, and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from redpass.cli import sources
from redpass.cli.options import DataFile, DataOptions, Model, ModelOptions, RunOptions
from redpass.cli.screen import Screen

if TYPE_CHECKING:
    from redpass.program import Program


def inspect(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    data: DataFile = None,
) -> None:
    """Show the parts of MODEL with parameters, FLOPs, bytes and cache per token."""
    sources.check_model(model)
    screen = Screen(run)
    with screen.listening() as listener:
        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        facts = _facts(program)
    screen.emit(facts)
    if not run.json:
        _show(screen, program, facts)


def _facts(program: Program) -> dict[str, Any]:
    from redpass.analysis import structure
    from redpass.budget.accounting import cost_record, usual_sizes
    from redpass.facts import Facts
    from redpass.summary import branch_records, dimension_range

    sizes = usual_sizes(program)
    origin, signature = program.origin, program.signature
    return {
        "model": origin.path,
        "kind": origin.kind,
        "task": origin.task,
        "digest": origin.digest,
        "inputs": [str(port) for port in signature.inputs],
        "outputs": [str(port) for port in signature.outputs],
        "state": [list(pair) for pair in signature.state],
        "dims": {name: dimension_range(*span) for name, span in signature.dims.items()},
        "cost": asdict(cost_record(program, sizes)),
        "branches": [asdict(record) for record in branch_records(program, sizes, None)],
        "notes": [*origin.notes, *map(str, Facts(program).get(structure).notes)],
    }


def _show(screen: Screen, program: Program, facts: dict[str, Any]) -> None:
    from rich.text import Text

    from redpass.errors import clean
    from redpass.record import BranchRecord, CostRecord, from_json
    from redpass.report import rows, terminal

    title = clean(facts["model"])
    screen.show(Text.assemble((title, "bold"), f"  {facts['kind']}, {facts['task']}"), "")
    screen.show(terminal.costs(from_json(CostRecord, facts["cost"])), "")
    state = {name for pair in program.signature.state for name in pair}
    for head, ports in (("in", program.signature.inputs), ("out", program.signature.outputs)):
        plain = [clean(port) for port in ports if port.name not in state]
        screen.show(Text(f"{head:4}{', '.join(plain)}"))
    if state:
        names = [f"{entry} → {exit_}" for entry, exit_ in program.signature.state]
        screen.show(Text(f"{'':4}and {len(names)} cache pairs: {rows.shown(names, 1)}"))
    spans = ", ".join(f"{clean(name)} {span}" for name, span in facts["dims"].items())
    if spans:
        screen.show(Text(f"    with {spans}", "dim"))
    if facts["branches"]:
        screen.show(terminal.branches([from_json(BranchRecord, b) for b in facts["branches"]]))
    for note in facts["notes"]:
        screen.show(Text.assemble(("note ", "yellow"), clean(note, 400)))
