"""LayerNorms of the composed network: the parts' own statistics, folded into weight and bias.

A part normalises over its own channels, the composed network over all, which is what makes such a split approximate:
part k has w (x - μ_k) / σ_k + b where the composed network has w (x - μ) / σ + b. Weight and bias of each channel
become those of the least squares between the two over training images, so that the composed layers give nearly what
the parts gave, and the model stays the stock one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...planning.plan import Plan
from .composed import some


@torch.no_grad()
def fold_statistics(model: nn.Module, plan: Plan, loader, device: torch.device) -> int:
    """Fold the parts' statistics into the LayerNorms of a composed network whose channels are cut; how many there are.

    While the images pass, each layer gives what the parts' layers give, so that the next ones see the parts' features.
    """
    found = list(_cut_norms(model, plan))
    if not found:
        return 0
    model.eval()
    with ExitStack() as hooks:
        for fold in found:
            handle = fold.norm.register_forward_hook(fold.look)
            hooks.callback(handle.remove)
        for x, _ in some(loader):
            model(x.to(device))
    for fold in found:
        fold.settle()
    return len(found)


def _cut_norms(model: nn.Module, plan: Plan) -> Iterator[Fold]:
    for name, norm in model.named_modules():
        t = plan.tensors.get(f"{name}.weight")
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None and t is not None and t.reduce == "place":
            yield Fold(norm, [t.block(k, plan.parts)[0] for k in range(plan.parts)])


class Fold:
    """One LayerNorm: what its channels are after the composed network's normalisation, z, and after the parts', y."""

    def __init__(self, norm: nn.LayerNorm, blocks: list):
        self.norm, self.blocks = norm, blocks
        self.sums = torch.zeros(5, *norm.weight.shape, dtype=torch.float64, device=norm.weight.device)

    def look(self, _: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """A forward hook: takes the moments, and gives what the parts would."""
        norm, x = self.norm, given[0]
        dim = _dim(norm, x, out)
        x = x.movedim(dim, -1)
        z = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        y = torch.empty_like(z)
        for at in self.blocks:
            block = x[..., at]
            y[..., at] = F.layer_norm(block, block.shape[-1:], norm.weight[at], norm.bias[at], norm.eps)
        pairs = (torch.ones_like(z), z, y, z * z, z * y)
        self.sums += torch.stack([t.flatten(0, -2).double().sum(0) for t in pairs])
        return y.movedim(-1, dim)

    def settle(self) -> None:
        """Take the weight and the bias with the smallest squared distance from z to y."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        n, z, y, zz, zy = self.sums
        weight = (zy - z * y / n) / (zz - z * z / n).clamp_min(1e-12 * n)
        self.norm.weight.copy_(weight)
        self.norm.bias.copy_((y - weight * z) / n)


def _dim(norm: nn.LayerNorm, x: torch.Tensor, out: torch.Tensor) -> int:
    """The dim of the channels: the last, or the first after the batch, as in timm's LayerNorm2d."""
    if x.shape[-1] != norm.normalized_shape[0]:
        return 1
    return -1 if torch.allclose(out, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)) else 1
