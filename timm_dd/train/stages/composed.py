"""The composed model before it is fine-tuned: the scale of its logits, and the weights between its blocks, which merge
leaves zero; and before it is split again: which channels go to which part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...errors import TrainError
from ...planning.plan import Plan, TensorPlan
from ...two_level.aggregate import fit_scale

RIDGE = 0.1  # of the features' mean variance
IMAGES = 1024  # to take statistics from, for which a thousand are enough (Wu and Johnson 2021), and a temperature


def some(loader, images: int = IMAGES) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first batches, of so many `images` in all.

    Raises:
        TrainError: there are none, and statistics of nothing would wipe those of the network.
    """
    seen = 0
    for x, y in loader:
        yield x, y
        seen += len(y)
        if seen >= images:
            return
    if not seen:
        raise TrainError("no batch to take statistics from; use a smaller --batch-size, or fewer ranks")


@torch.no_grad()
def refit_head(model: nn.Module, plan: Plan, loader, device: torch.device) -> None:
    """Give the classifier the weights of a ridge regression of the classes on the composed model's features of training
    images, in closed form, at the scale of the smallest cross entropy: the parts' classifiers know features of what
    they saw, and not each other.

    Raises:
        TrainError: the logits come from no fully connected layer.
    """
    head = _classifier(model, plan)
    sums = _moments(model, head, loader, device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    n, features = sums[-1, -1], head.in_features
    gram, mixed = sums[:features, :features], sums[:features, features:-1]
    mean, target = sums[:features, -1] / n, sums[features:-1, -1] / n
    gram, mixed = gram - n * torch.outer(mean, mean), mixed - n * torch.outer(mean, target)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, mixed).T
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(target - weight @ mean)
    factor = _temperature(model, loader, device)
    for p in head.parameters():
        p.mul_(factor)


def _classifier(model: nn.Module, plan: Plan) -> nn.Linear:
    """The layer that gives the logits."""
    for name in plan.head:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            return module
    raise TrainError("--refit-head: the logits of this model come from no fully connected layer; use --no-refit-head")


def _moments(model: nn.Module, head: nn.Linear, loader, device: torch.device) -> torch.Tensor:
    """Sums of the products of (features, classes one-hot, 1) with each other, over training images; in float64."""
    size = head.in_features + head.out_features + 1
    sums, seen = torch.zeros(size, size, dtype=torch.float64, device=device), []
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.eval()
    for x, y in some(loader, max(4 * IMAGES, 10 * head.in_features)):
        model(x.to(device))
        rows = seen.pop().double()
        ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=device)
        rows = torch.cat([rows, F.one_hot(y.to(device), head.out_features), ones], 1)
        sums += rows.T @ rows
    handle.remove()
    return sums


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
def rate_between(weights: Sequence[tuple[torch.Tensor, torch.Tensor]], factor: float) -> Iterator[None]:
    """Around an optimizer's step: the weights between the blocks change by `factor` times what it says."""
    before = [p.detach().clone() for p, _ in weights]
    yield
    with torch.no_grad():
        for (p, outside), old in zip(weights, before):
            p.lerp_(old, outside.to(p.dtype) * (1 - factor))


def reordered(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same model with its channels in another order, in which each part gets some of every part's."""
    for dim, axis in enumerate(plan.tensors[name].axes):
        if axis is not None:
            tensor = tensor.index_select(dim, axis.round_robin(plan.parts))
    return tensor.contiguous()
