"""How K decisions become one: their mean, a majority, the sum of logits, or a dense network that weighs them.

Outputs of the parts are (K, B, C) logits. C = 1 tells two classes apart, by the sigmoid; from two classes on it is the
softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MergeError, shown
from ..machine import memory


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of the classes, of logits (…, C), in float32 or finer."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)


def fit_scale(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The s that makes the cross entropy of s · logits smallest, the inverse of a temperature (Guo et al. 2017)."""
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


def mean(logits: torch.Tensor) -> torch.Tensor:
    """The parts' mean probabilities, (K, B, C) -> (B, C)."""
    return probabilities(logits).mean(0)


def vote(logits: torch.Tensor) -> torch.Tensor:
    """Majority: the share of the votes for each class, (K, B, C) -> (B, C). The sum of probabilities counts for less
    than one vote, so that it decides ties."""
    p = probabilities(logits)
    parts, one = len(p), p.shape[-1] == 1
    p = torch.cat([1 - p, p], -1) if one else p
    votes = F.one_hot(p.argmax(-1), p.shape[-1]).sum(0) + p.sum(0) / (parts + 1)
    shares = votes * (parts + 1) / (parts * (parts + 2))
    return shares[..., 1:] if one else shares


def total(logits: torch.Tensor) -> torch.Tensor:
    """The sum of the logits, (K, B, C) -> (B, C): what the composed network says where (2.16) holds."""
    return logits.sum(0)


WITHOUT_WEIGHTS = {"mean": mean, "vote": vote, "sum": total}
GIVE_PROBABILITIES = ("mean", "vote")  # the others give logits
AGGREGATIONS = (*WITHOUT_WEIGHTS, "dnn")
TOGETHER = ("coherent", "transfer")  # parts and dense network as one, from a random start or from trained parts
WIDTHS = (128, 64, 32)  # of a coarse net, klawonn2023 section 5.1
TRAINED = 4  # a weight, its gradient, and two moments of Adam


class CoarseNet(nn.Sequential):
    """The global coarse net: fully connected layers on the K·C probabilities, ReLU and dropout after each but the last.

    (B, K·C) probabilities -> (B, C) logits.

    Source: klawonn2023 section 3.2 and Fig. 4; widths 128-64-32 in sections 5.1 and 5.2, with 20 % dropout in 5.3.
    """

    def __init__(self, parts: int, classes: int, widths: Sequence[int], dropout: float = 0.0):
        sizes = [parts * classes, *widths]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(sizes[-1], classes))


def side_by_side(logits: torch.Tensor) -> torch.Tensor:
    """What a `CoarseNet` reads: (K, B, C) logits -> (B, K·C) probabilities."""
    return probabilities(logits).movedim(0, 1).flatten(1)


# ---- what a user can ask for


def check_how(how: str, regression: bool) -> None:
    """Raise MergeError unless parts can decide in this way."""
    if how not in AGGREGATIONS or (regression and how != "mean"):
        expected = "mean" if regression else ", ".join(AGGREGATIONS)
        raise MergeError(f"how: expected {expected}{' for a regression' if regression else ''}, got {shown(how)}")


def check_names(names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    """As a tuple; MergeError unless each class has one, or none has."""
    if names is None:
        return None
    if len(names) != classes:
        raise MergeError(f"class_names: expected {classes} names, got {len(names)}")
    return tuple(map(str, names))


def check_coarse(parts: int, classes: int, widths: Sequence[int], dropout: float) -> None:
    """Raise MergeError unless a coarse net of these sizes can be trained on this machine."""
    if not all(type(n) is int and n > 0 for n in widths):
        raise MergeError(f"widths: expected whole numbers from 1 up, got {shown(tuple(widths))}")
    if not 0 <= dropout < 1:
        raise MergeError(f"dropout: expected a number from 0 to below 1, got {shown(dropout)}")
    sizes = [parts * classes, *widths, classes]
    needed = 4 * TRAINED * sum((a + 1) * b for a, b in zip(sizes, sizes[1:]))
    if needed > memory():
        raise MergeError(
            f"a coarse net on {parts} × {classes:,} probabilities takes {needed / 1e9:,.1f} GB to train, this machine "
            f"has {memory() / 1e9:,.1f}; use smaller widths, or mean, vote or sum"
        )
