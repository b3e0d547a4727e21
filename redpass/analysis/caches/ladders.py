"""What the passes over caches share: options, rungs, names, savings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.sites import CacheSide, CacheSites
from redpass.analysis.rungs import check_rungs, read_target
from redpass.errors import UsageError
from redpass.plan import Edit, Insert, Once, Ref, Replace, SetArgument, SetWeight

PLURAL = {"key": "keys", "value": "values"}


@dataclass(frozen=True)
class Ladder:
    """What caches may be cut to: options of a pass.

    Attributes:
        place: the pass.
        shares: what is left, a rung each.
        ranks: numbers a token and group in place of `shares`.
        multiple: what rungs are rounded to.
        size: heads of a group.
        only: targets.
    """

    place: str
    shares: tuple[float, ...]
    ranks: tuple[int, ...]
    multiple: int
    size: int
    only: tuple[str, ...]


def label_of(label: str, kind: str) -> str:
    """Returns the name of a cache: `layers.3.attention/keys`."""
    return f"{label}/{PLURAL[kind]}"


def wanted_ranks(
    ladder: Ladder, sites: CacheSites, kinds: Sequence[str]
) -> Mapping[str, tuple[int, ...]]:
    """Returns the ranks that `only` names, by cache, falling; all it names can be had.

    Args:
        kinds: the sides that the pass cuts: `key`, `value`.

    Raises:
        UsageError: shares outside of 0 to 1, ranks below one or above the full one, groups that
            the heads do not divide into, an unknown target.
    """
    check_rungs(ladder.place, ladder.shares, ladder.multiple, whole=True)
    if ladder.size < 1:
        raise UsageError(f"group_size={ladder.size}", place=ladder.place, hint="give at least 1")
    sides = {label_of(*key): side for key, side in sites.found.items() if key[1] in kinds}
    for label, side in sides.items():
        if isinstance(side, CacheSide):
            _check_cache(ladder, label, side)
    found: dict[str, tuple[int, ...]] = {}
    for target in ladder.only:
        label, rank = read_target(ladder.place, target, sides, "cache")
        side = sides[label]
        if isinstance(side, str):
            raise UsageError(f"'{label}' cannot be cut: {side}", place=ladder.place)
        _check_rank(rank, label, side.width * ladder.size)
        found[label] = tuple(sorted({rank, *found.get(label, ())}, reverse=True))
    return found


def _check_cache(ladder: Ladder, label: str, side: CacheSide) -> None:
    if side.heads % ladder.size:
        divisors = [n for n in range(1, side.heads + 1) if side.heads % n == 0]
        hint = f"give a group size of {', '.join(map(str, divisors))}"
        text = f"{side.heads} heads cannot be put in groups of {ladder.size}"
        raise UsageError(text, place=label, hint=hint)
    full = side.width * ladder.size
    for rank in ladder.ranks:
        _check_rank(rank, label, full)


def _check_rank(rank: int, label: str, full: int) -> None:
    if not 1 <= rank <= full:
        text = f"rank {rank} of a group that has {full} numbers a token"
        raise UsageError(text, place=label, hint=f"give ranks from 1 to {full}")


def ranks_of(ladder: Ladder, side: CacheSide) -> tuple[int, ...]:
    """Returns the rungs, falling. All of it is one only where it was asked for."""
    full = side.width * ladder.size
    if ladder.ranks:
        return tuple(sorted(set(ladder.ranks), reverse=True))
    step = min(ladder.multiple, full)
    asked = {share: max(step, round(share * full / step) * step) for share in ladder.shares}
    found = {min(rank, full) for share, rank in asked.items() if rank < full or share == 1}
    return tuple(sorted(found, reverse=True))


def saving(cache: CacheSide, factors: Factors, edits: Sequence[Edit]) -> dict[str, float]:
    """Returns what the cache no longer takes, and what the weights around it do.

    Weights that nothing reads any more are those of linears whose results the edits replace.
    """
    edits = [each for e in edits for each in (e.first if isinstance(e, Once) else (e,))]
    program = cache.site.program
    element = cache.new.meta["val"].element_size()
    lost = cache.heads * cache.width - factors.groups * factors.rank
    gone = _unread(cache, edits)
    added = sum(e.value.numel() for e in edits if isinstance(e, SetWeight))
    removed = sum(program.weights[name].numel() for name in gone)
    return {
        "parameters": removed - added,
        "bytes": (removed - added) * element,
        "kv_bytes_per_token": lost * element,
    }


def _unread(cache: CacheSide, edits: Sequence[Edit]) -> set[str]:
    """Weights that only nodes read whose values nobody needs once the edits are done."""
    program = cache.site.program
    moved = {e.old for e in edits if isinstance(e, Replace)}
    reads = {(e.node, e.old) for e in edits if isinstance(e, SetArgument)}
    kept = _read_by_inserts(edits)
    dead: set[str] = set()
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and node.name not in kept:
            readers = [u for u in node.users if u.name not in dead]
            if node.name in moved or all((u.name, node.name) in reads for u in readers):
                dead.add(node.name)
    unread = (n for n in program.weight_nodes if n.users and n.name not in kept)
    return {str(n.target) for n in unread if all(user.name in dead for user in n.users)}


def _read_by_inserts(edits: Sequence[Edit]) -> set[str]:
    found: set[str] = set()

    def note(item: object) -> object:
        if isinstance(item, Ref):
            found.add(item.name)
        return item

    for edit in edits:
        if isinstance(edit, Insert):
            fx.node.map_aggregate((edit.args, dict(edit.kwargs)), note)  # type: ignore[arg-type]
    return found
