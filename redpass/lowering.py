"""`lower`: a program with `redpass::` ops where their kernels win, checked against itself before.

Done last, and on the machine that runs the program: what wins depends on the device. Files are
written without the ops (see `redpass.codegen.decompose`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from redpass import config
from redpass.codegen import ops as kernels_of
from redpass.codegen import tuning
from redpass.codegen.lower import LowerHotPaths
from redpass.codegen.tune import chooser
from redpass.config import check_kernels
from redpass.engine import Engine
from redpass.facts import Facts
from redpass.program import Program, copy_graph
from redpass.progress import Listener, Silent
from redpass.record import ActionRecord, PassRecord, RunRecord, SkipRecord


@dataclass(frozen=True)
class Lowered:
    """The lowered program, and what was done or left, place by place."""

    program: Program
    passes: list[PassRecord]
    actions: list[ActionRecord]
    skips: list[SkipRecord]


def lower(
    program: Program,
    kernels: str | None = None,
    *,
    cache: Path | None = None,
    listener: Listener | None = None,
    seed: int = 0,
) -> Lowered:
    """Puts `redpass::` ops where they pay, and checks that the result computes the same.

    Args:
        kernels: `auto` lowers what was measured to win on this GPU, `triton` all places that a
            kernel takes, `reference` none. `REDPASS_KERNELS` by default.
        cache: folder of the timings; the user's cache folder by default.
        seed: seeds the inputs that before and after are compared on.

    Raises:
        UsageError: `kernels` is none of the three.
    """
    settings, chosen = config.from_environment(), check_kernels(kernels)
    records = tuning.read(tuning.cache_folder(cache), tuning.this_device())
    kernels_of.use_configs_of(chooser(records) if records.timings else None)
    # A limit or a skip list is about the passes of the run before.
    engine = Engine(program, replace(settings, limit=None), listener or Silent(), seed)
    engine.run_exact(LowerHotPaths(chosen, records))
    return Lowered(engine.program, engine.passes, engine.actions, engine.skips)


def with_kernels(record: RunRecord, program: Program, kernels: str | None = None) -> RunRecord:
    """Adds to the record of a run where kernels would take over, and where not and why.

    Nothing is lowered: files hold standard ops, and what pays depends on where they run.
    """
    chosen = check_kernels(kernels)
    records = tuning.read(tuning.cache_folder(), tuning.this_device())
    plan = LowerHotPaths(chosen, records).plan(program, Facts(program))
    name, why = LowerHotPaths.name, "done where the program runs, by redpass.lower"
    actions = [
        ActionRecord(0, item.key, name, item.target, item.reason, "planned", why, {}, {}, None)
        for item in plan.actions
    ]
    skips = [SkipRecord(name, item.rule, item.target, item.reason) for item in plan.skips]
    return replace(record, actions=[*record.actions, *actions], skips=[*record.skips, *skips])


def on_device(program: Program, device: str | torch.device) -> Program:
    """Returns `program` with its weights on `device`, to be run on inputs that are there too.

    Devices that the graph names, where it makes tensors, become that one. Lower and check first:
    checks run where the weights were loaded.
    """
    target = torch.device(device)

    def moved(item: Any) -> Any:
        return target if isinstance(item, torch.device) else item

    graph, _ = copy_graph(program.graph)
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    weights = {name: tensor.to(target) for name, tensor in program.weights.items()}
    return replace(program, graph=graph, weights=weights)
