"""Which heads one program of the kernel works on: head maps turned into tables.

A group has a key head, the clusters that read it, value heads, and for each cluster and value head
the head of the result, -1 where there is none. All groups of a table have the same sizes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

Slot = tuple[int, dict[int, int]]
"""A value head, and for each cluster that has it so the head of the result."""


def tables(
    clusters: Sequence[int], keys: Sequence[int], values: Sequence[int], packed: bool, most: int
) -> dict[tuple[int, int], list[list[int]]]:
    """Returns {(clusters, value heads): rows of one group each}.

    Args:
        clusters: the cluster of each head of the result.
        keys: the key head of each cluster.
        values: the value head of each head of the result.
        packed: put all clusters that read a key head into one group (few queries, where the
            time is that of reading keys and values); otherwise one cluster each.
        most: value heads of a group at most, a power of two.
    """
    readers: defaultdict[int, list[int]] = defaultdict(list)
    for cluster in sorted(set(clusters)):
        readers[keys[cluster] if packed else cluster].append(cluster)
    found: defaultdict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for members in readers.values():
        for slots in _pieces(_slots(members, clusters, values), packed, most):
            row = [keys[members[0]], *members, *(value for value, _ in slots)]
            for member in members:
                row += [heads.get(member, -1) for _, heads in slots]
            found[len(members), len(slots)].append(row)
    return dict(found)


def _slots(members: list[int], clusters: Sequence[int], values: Sequence[int]) -> list[Slot]:
    """All value heads of some clusters; one twice where a cluster has two heads with it."""
    slots: dict[tuple[int, int], dict[int, int]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for head, cluster in enumerate(clusters):
        if cluster in members:
            value = values[head]
            seen[cluster, value] += 1
            slots.setdefault((value, seen[cluster, value]), {})[cluster] = head
    return [(value, heads) for (value, _), heads in sorted(slots.items())]


def _pieces(slots: list[Slot], packed: bool, most: int) -> Iterator[list[Slot]]:
    """Cuts slots into powers of two: padded up where products are free, else cut down."""
    while slots:
        size = min(most, 1 << (len(slots).bit_length() - 1))
        if packed and size < min(most, len(slots)):
            size *= 2
        yield slots[:size] + [(-1, {})] * (size - len(slots))
        slots = slots[size:]
