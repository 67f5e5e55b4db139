"""Which rank trains which parts: so that the ranks have about as much to do, by the parts' multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from ...planning.costs import Cost, cost
from ...surgery.parts import Parts


def costs(parts: Parts) -> list[Cost]:
    """Of each part on its view; those of equal shapes are counted once."""
    counted: dict[tuple, Cost] = {}
    found = []
    for k, part in enumerate(parts):
        size = parts.plan.part_input_size(k)
        kind = (size, *(t.shape for t in part.state_dict().values()))
        if kind not in counted:
            counted[kind] = cost(copy.deepcopy(part), size, parts.graph)
        found.append(counted[kind])
    return found


def deal(weights: Sequence[int], parts: Iterable[int], world: int) -> list[list[int]]:
    """The `parts` of each of so many ranks: the heaviest first, each to the rank that has least to do, then to the one
    with fewest parts, then to the first. Everybody who deals finds the same."""
    found: list[list[int]] = [[] for _ in range(world)]
    for k in sorted(parts, key=lambda k: (-weights[k], k)):
        min(found, key=lambda mine: (sum(weights[i] for i in mine), len(mine))).append(k)
    return [sorted(mine) for mine in found]


def parts_of(rank: int, world: int, parts: Parts, wanted: Sequence[int]) -> list[int]:
    """Those of the `wanted` parts that a rank trains."""
    weights = [0] * len(parts) if world == 1 else [c.multiply_adds for c in costs(parts)]
    return deal(weights, wanted, world)[rank]
