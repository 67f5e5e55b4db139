"""Where fine-tuning begins: what published merging practice does to a composed network without training it.

Each of these changes the composed network, or its optimizer's state, before the first update of the second stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ..errors import TrainError
from ..planning.graphs import BATCH_NORMS
from ..planning.plan import Plan
from ..storage.merge_files import count_rows, merge_rows
from ..storage.tensorfile import from_raw, to_raw
from . import optimizers
from .checkpoints import found
from .composed import fit_scale, some
from .folder import PartsStage
from .learner import Learner

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def classifier(model: nn.Module, plan: Plan) -> nn.Linear:
    """The layer that gives the logits."""
    for name in plan.head:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            return module
    raise TrainError("the logits of this model come from no fully connected layer")


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What `module` is given meanwhile."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def refit_head(model: nn.Module, plan: Plan, loader, ridge: float, device: torch.device) -> None:
    """Give the classifier the weights of least squares with a ridge, to the targets -1 and 1 as of a support vector
    machine, on features of training images, then the scale of the smallest cross entropy.

    Args:
        ridge: of the features' mean variance.
    """
    head, targets = classifier(model, plan), []
    model.eval()
    with inputs_of(head) as features:
        for x, y in loader:
            model(x.to(device))
            targets.append(y)
    a, y = torch.cat(features).double(), torch.cat(targets)
    b = F.one_hot(y, head.out_features).double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    gram = a.T @ a
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, a.T @ b).T
    scale = fit_scale((a @ weight.T) + mean_b, y)
    head.weight.copy_(scale * weight)
    if head.bias is not None:
        head.bias.copy_(scale * (mean_b - weight @ mean_a))


@torch.no_grad()
def repair(model: nn.Module, plan: Plan, parts: Sequence[nn.Module], views, loader, device: torch.device) -> None:
    """Give every channel before a nonlinearity the mean and the variance that it had in its part (REPAIR, Jordan et al.
    2023), in networks without BatchNorm, whose statistics do the same. Layer by layer, from the first."""
    if any(isinstance(m, BATCH_NORMS) for m in model.modules()):
        raise TrainError("--repair is for networks without BatchNorm")
    batches = [x.to(device) for x, _ in some(loader)]
    names = [n for n, m in model.named_modules() if isinstance(m, LINEAR) and m.bias is not None][:-1]
    theirs = [_statistics(part, names, [view(x) for x in batches]) for part, view in zip(parts, views)]
    for name in names:
        module, t = model.get_submodule(name), plan.tensors[f"{name}.bias"]
        (mean, std) = _statistics(model, [name], batches)[name]
        goal_mean, goal_std = mean.clone(), std.clone()
        for k, of_part in enumerate(theirs):
            goal_mean[t.block(k, plan.parts)], goal_std[t.block(k, plan.parts)] = of_part[name]
        factor = goal_std / std.clamp_min(1e-6)
        module.weight.mul_(factor.reshape(-1, *[1] * (module.weight.ndim - 1)))
        module.bias.sub_(mean).mul_(factor).add_(goal_mean)


def _statistics(model: nn.Module, names: Sequence[str], batches) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(mean, standard deviation) of each output channel of modules."""
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: sums[name].append(out.detach().double().transpose(0, 1).flatten(1))
        )
        for name in names
    ]
    model.eval()
    for x in batches:
        model(x)
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(rows, 1) for name, rows in sums.items()}
    return {name: (rows.mean(1).float(), rows.std(1).float()) for name, rows in joined.items()}


def along_the_gradient(
    model: nn.Module, weights: Sequence[tuple[torch.Tensor, torch.Tensor]], loader, device: torch.device
) -> float:
    """Start the weights between the blocks along their negative gradient, each tensor's as large as a tenth, a fifth …
    of the weights inside, whichever has the smallest loss on training images: the largest gradient (GradMax, Evci et
    al. 2022) where weights alone are new and no neurons."""
    batches = [(x.to(device), y) for x, y in some(loader)]
    model.eval().zero_grad()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    steps = []
    for p, outside in weights:
        g = p.grad * outside
        inside = p.detach()[~outside].std() / g[outside].std().clamp_min(1e-20)
        steps.append(-g * inside)
    model.zero_grad()
    best = min((0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), key=lambda s: _loss_at(model, weights, steps, s, batches))
    with torch.no_grad():
        for (p, _), step in zip(weights, steps):
            p.add_(step, alpha=best)
    return best


@torch.no_grad()
def _loss_at(model: nn.Module, weights, steps, size: float, batches) -> float:
    for (p, _), step in zip(weights, steps):
        p.add_(step, alpha=size)
    loss = sum(float(F.cross_entropy(model(x), y)) for x, y in batches)
    for (p, _), step in zip(weights, steps):
        p.sub_(step, alpha=size)
    return loss


def carry_momenta(learner: Learner, plan: Plan, stage: PartsStage, part: nn.Module) -> None:
    """Give the composed network's optimizer the parts' states, in their blocks as the weights are. Between them there
    is no momentum yet, and for a second moment the mean of those inside: from zero, Adam's first steps would be three
    times the learning rate, whatever the gradient."""
    held = [load_file(found(stage.part(k))[0]) for k in range(plan.parts)]
    named = {id(p): name for name, p in part.named_parameters()}
    groups = optimizers.create(part, learner.args, 0.0).param_groups
    order = [named[id(p)] for group in groups for p in group["params"]]
    kinds = {key.split(".", 2)[2] for key in held[0] if key.startswith("state.")}
    for i, name in enumerate(order):
        p, values = learner.net.get_parameter(name), {}
        for kind in kinds:
            tensors = [h[f"state.{i}.{kind}"] for h in held]
            values[kind] = tensors[0].clone() if tensors[0].ndim == 0 else _merged(plan, name, tensors, p)
            if kind.endswith("_sq"):
                values[kind][values[kind] == 0] = torch.cat([t.flatten() for t in tensors]).mean()
        learner.optimizer.state[p] = values


def _merged(plan: Plan, name: str, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    pieces = [to_raw(t) for t in tensors]
    rows = merge_rows(
        plan, name, tensors[0].dtype, lambda k, _, a, b: pieces[k][a:b], 0, count_rows(plan.tensors[name])
    )
    return torch.empty_like(like, dtype=tensors[0].dtype).copy_(from_raw(rows, tensors[0].dtype).reshape(like.shape))


def rates_from_fans(optimizer: torch.optim.Optimizer, model: nn.Module, fans: Mapping[str, float]) -> None:
    """Learning rates of matrices in proportion to 1 / fan-in, as maximal update parametrisation has them for Adam (Yang
    et al. 2022): the rate given is the whole network's, and a part's layers with a smaller fan-in learn faster.

    Args:
        fans: the global network's fan-in over this one's, by a parameter's name; 1 where there is none.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups[:]
    optimizer.param_groups.clear()
    for group in groups:
        factors: dict[float, list] = {}
        for p in group["params"]:
            factors.setdefault(fans.get(named[id(p)], 1.0), []).append(p)
        for factor, ps in factors.items():
            lr = group["lr"] * factor
            optimizer.param_groups.append({**group, "params": ps, "lr": lr, "initial_lr": lr})


def fans_of(plan: Plan, k: int) -> dict[str, float]:
    """The global network's fan-in over part k's, of every parameter with one."""
    whole = {name: t for name, t in plan.tensors.items() if t.trained and len(t.shape) > 1}
    return {
        name: torch.Size(t.shape[1:]).numel() / torch.Size(t.part_shape(k, plan.divisor)[1:]).numel()
        for name, t in whole.items()
    }
