"""A plan's claim by value: what it calls exact is compared in float64, with random weights on random inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from ..algebra.domain import Domain
from ..compat import tree_leaves, tree_map_only
from ..errors import SplitError
from ..planning.inputs import bind
from ..planning.planner import make_plan
from .emit import emit, slices
from .merge import merge
from .parts import Parts

EXACT = 1e-9  # relative
LARGE = 10**8  # parameters, of which copies in float64 take seconds to make
ROUNDINGS, ONE_ROUNDING = 10, 1 + 4e-16  # a network that amplifies rounding is held to what that does to itself


def check_claim(parts: Parts, seconds: float = math.inf) -> float | None:
    """The difference between the merged network's outputs and the sums of its parts', every part seeing the whole
    image, relative to the norm; None where the plan claims nothing, or comparing would take longer than `seconds`.

    Raises:
        SplitError: the plan says exact, and the difference is more than rounding.
    """
    begun = time.perf_counter()
    if not parts.plan.exact or (math.isfinite(seconds) and parts.plan.params() > LARGE):
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        whole = _on_whole_images(parts)
        args, given = _arguments(parts)
        made = time.perf_counter()
        first, *others = whole
        sums = _outputs(first(*given))
        part = time.perf_counter() - made
        work = part * (len(parts) + len(parts) ** 2)  # the products of the merged network are those of K² parts
        if not whole.plan.exact or made - begun + work > seconds:
            return None
        for other in others:
            sums = [a + b for a, b in zip(sums, _outputs(other(*given)))]
        merged = merge(whole).eval()
        outputs = _outputs(merged(*args.args, **args.kwargs))
        error = _distance(outputs, sums)
        if not error <= EXACT:
            moved = tree_map_only(torch.Tensor, _moved, (args.args, args.kwargs))
            rounding = _distance(outputs, _outputs(merged(*moved[0], **moved[1])))
            _refuse(error, rounding)
        return error


def _refuse(error: float, rounding: float) -> None:
    if not error <= ROUNDINGS * rounding:
        raise SplitError(
            f"the plan says exact, but the merged network is off by {error:.1e} from the sum of its parts (random "
            "weights and inputs, float64); do not use this split, and report it with the network's code"
        )


def _on_whole_images(parts: Parts) -> Parts:
    """Parts of the same network that see the whole image, in float64, with random weights and statistics: no zero and
    no unit variance hides a mistake."""
    plan, graph, model = parts.plan, parts.graph, merge(parts)
    full = make_plan(graph, plan.divisor, Domain.full(plan.parts), plan.input_size, output=plan.output)
    names = [*full.tensors, *full.constants]
    members = [emit(graph, full, k, slices(full, k, model, graph, names), model) for k in range(plan.parts)]
    whole = Parts(members, full, graph, model).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    for part in whole:
        for p in part.parameters():
            p.add_(0.1 * noise(p) * (p.abs() + p.abs().mean().clamp(min=0.1)))
        for name, b in part.named_buffers():
            if name.endswith("running_var"):
                b.copy_(1 + 0.3 * noise(b).abs())
            elif name.endswith("running_mean"):
                b.copy_(0.1 * noise(b))
    return whole


def _arguments(parts: Parts) -> tuple[Any, list]:
    """Random arguments: those of a call of the whole network, and what a part takes of them."""
    inputs, signature, generator = parts.graph.inputs, parts.graph.signature, torch.Generator().manual_seed(0)
    trees = inputs.taken(signature)
    given = {name: inputs.random(tree, parts.graph.batch, generator) for name, tree in trees.items()}
    call = bind(signature, inputs.args, inputs.kwargs, given.get)  # a constant stays what it is
    return call, list(given.values())


def _moved(t: torch.Tensor) -> torch.Tensor:
    return t * ONE_ROUNDING if t.is_floating_point() else t


def _outputs(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def _distance(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> float:
    return max(float((x - y).norm() / x.norm().clamp(min=1e-30)) for x, y in zip(a, b))
