"""The composed model before it is fine-tuned: the scale of its logits, and the weights between its blocks, which merge
leaves zero; and before it is split again: which channels go to which part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..errors import TrainError
from ..planning.plan import Plan, TensorPlan

IMAGES = 1024  # to take statistics from, for which a thousand are enough (Wu and Johnson 2021), and a temperature


def some(loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first batches, of `IMAGES` images in all."""
    seen = 0
    for x, y in loader:
        yield x, y
        seen += len(y)
        if seen >= IMAGES:
            return


def calibrate(model: nn.Module, plan: Plan, how: str, loader, device: torch.device) -> float:
    """Fold a factor into the head; returns it. The merged head sums the parts' logits, (2.16): ``mean`` divides them by
    K, ``temperature`` takes the factor of the smallest cross entropy on training images (Guo et al. 2017).

    Raises:
        TrainError: the logits come from no layer whose weights could be scaled.
    """
    if how == "sum":
        return 1.0
    if not plan.head:
        raise TrainError(f"--calibrate {how}: the logits of this model have no weights of their own; use sum")
    factor = 1 / plan.parts if how == "mean" else _temperature(model, loader, device)
    state = model.state_dict()
    for weight in {state[name].data_ptr(): state[name] for name in plan.head}.values():  # what is tied is scaled once
        weight.mul_(factor)
    return factor


@torch.no_grad()
def _temperature(model: nn.Module, loader, device: torch.device) -> float:
    """The factor by which the logits are best scaled, the same on every rank."""
    model.eval()
    batches = [(model(x.to(device)), y) for x, y in some(loader)]
    logits, targets = (torch.cat(tensors) for tensors in zip(*batches))
    factor = torch.tensor(fit_scale(logits.double(), targets), device=device)
    if dist.is_initialized():
        dist.all_reduce(factor)
        factor /= dist.get_world_size()
    return float(factor)


def fit_scale(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The s that makes the cross entropy of s · logits smallest."""
    log = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * log.exp(), targets)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return float(log.detach().exp())


def between(plan: Plan, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, where it belongs to no part), of those that have such places."""
    for name, p in model.named_parameters():
        t = plan.tensors.get(name)
        if t is not None and sum(axis is not None for axis in t.axes) > 1:
            yield p, _outside(t, plan.parts).to(p.device)


def _outside(t: TensorPlan, parts: int) -> torch.Tensor:
    outside = torch.ones(t.shape, dtype=torch.bool)
    for k in range(parts):
        outside[t.block(k, parts)] = False
    return outside


@torch.no_grad()
def add_noise(weights: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float, seed: int) -> None:
    """Normal noise between the blocks, of `scale` times the standard deviation inside them."""
    generator = torch.Generator().manual_seed(seed)
    for p, outside in weights:
        noise = torch.randn(p.shape, generator=generator).to(p) * (scale * p[~outside].std())
        p.add_(noise * outside)


@contextmanager
def rates(
    model: nn.Module, weights: Sequence[tuple[torch.Tensor, torch.Tensor]], between: float, inside: float
) -> Iterator[None]:
    """Around an optimizer's step: the weights between the blocks change by `between` times what it says, all others by
    `inside` times."""
    masks = {id(p): outside for p, outside in weights}
    changed = [p for p in model.parameters() if inside != 1 or id(p) in masks]
    before = [p.detach().clone() for p in changed]
    yield
    with torch.no_grad():
        for p, old in zip(changed, before):
            outside = masks[id(p)].to(p.dtype) if id(p) in masks else torch.zeros_like(p)
            p.lerp_(old, 1 - (outside * between + (1 - outside) * inside))


def reassign(state: Mapping[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """The same model with its channels in another order, in which each part gets some of every part's."""
    return {name: _reordered(t, plan.tensors[name], plan.parts) for name, t in state.items()}


def _reordered(tensor: torch.Tensor, t: TensorPlan, parts: int) -> torch.Tensor:
    for dim, axis in enumerate(t.axes):
        if axis is not None:
            tensor = tensor.index_select(dim, axis.round_robin(parts))
    return tensor.contiguous()
