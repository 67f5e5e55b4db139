"""Theorems 2.1 and 2.2 in numbers: the composed network's feature maps against those of its parts.

In float64 and eval mode, layer by layer: on the channels of part k and on the activation field of its box the global
map is the part's, (2.15), and the logits are the sum of the parts' logits, (2.16). Which positions lie on the
activation field is seen by computing with NaN outside the box: what is still a number there has not looked outside.
Scaled views are on another grid than the whole image: of them (2.15) says nothing, and their parts are compared on
whole images alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..algebra.domain import Domain, spatial
from ..algebra.view import Box
from ..compat import tree_map_only
from ..errors import SplitError, public
from ..planning.inputs import as_call
from ..planning.plan import Plan
from ..planning.planner import analyse
from ..planning.rules.laws import Kind
from ..storage.merge_files import check_mergeable
from ..surgery.parts import Parts
from ..text import table
from .claims import Claim, claims
from .maps import Given, in_float64, pairs, windows

EXACT = 1e-9  # relative, for tensors stored in float64
SCALED = "(2.15) does not apply to scaled views, whose maps are on another grid than the composed network's."
ROUNDINGS, COARSEST = 100, 1e-2  # of tensors stored in fewer digits


@dataclass(frozen=True)
class LayerErrors:
    """The largest difference of a layer's maps, relative to the global map's largest number; None if not comparable.

    Attributes:
        whole: every part seeing the whole image.
        box: every part seeing its box, on the activation field of the box.
        field: the share of the parts' numbers that lie on it.
        claimed: whether the plan says that both differences are rounding.
    """

    path: str
    operation: str
    whole: float | None
    box: float | None
    field: float
    claimed: bool


@dataclass(frozen=True)
class Labelled:
    """Theorem 2.2 on labelled images: cross-entropy, mean over the images, and top-1 accuracy in percent.

    Attributes:
        losses, accuracies: of each part on its box.
        loss, accuracy: of the composed network.
        bound: of its loss, (2.19).
        common, kept: images that every part classifies correctly, and how many of them the composed network does.
    """

    images: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    loss: float
    accuracy: float
    bound: float
    common: int
    kept: int

    def text(self) -> str:
        rows = [("", "loss", "top-1 %")]
        rows += [(f"part {k}", f"{r:.4f}", f"{a:.2f}") for k, (r, a) in enumerate(zip(self.losses, self.accuracies))]
        rows += [("composed", f"{self.loss:.4f}", f"{self.accuracy:.2f}"), ("bound (2.19)", f"{self.bound:.4f}", "")]
        common = f"{self.kept} of the {self.common} that every part classifies correctly are kept"
        return f"{self.images} labelled images; {common}\n{table(rows)}"


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        whole, box: differences of the outputs, (2.16), as in `LayerErrors`.
        exact: whether the plan says that `whole` is rounding.
        box_exact: whether `box` has to be rounding too: the outputs depend on the boxes alone.
        tolerance: below which a difference is rounding.
        scaled: whether the parts' views are resampled, so that (2.15), which is of boxes, says nothing of them.
    """

    layers: tuple[LayerErrors, ...]
    whole: float | None
    box: float | None
    exact: bool
    box_exact: bool
    tolerance: float
    scaled: bool = False
    labelled: Labelled | None = None

    @property
    def failures(self) -> list[str]:
        """The claims that do not hold."""
        claimed = [(r.path or r.operation, r.whole, r.box) for r in self.layers if r.claimed]
        sums = ("sum of the parts' outputs", self.whole if self.exact else None, self.box if self.box_exact else None)
        bad = [
            f"{name}, {where}: {error:.1e}"
            for name, *errors in (*claimed, sums)
            for error, where in zip(errors, ("whole image", "own box"))
            if error is not None and not error <= self.tolerance
        ]
        d = self.labelled
        if d is not None and self.box_exact:
            bad += [f"{d.common - d.kept} images that every part knows are lost"] if d.kept < d.common else []
            bad += [f"the loss {d.loss:.4f} is above its bound"] if d.loss > d.bound * (1 + self.tolerance) else []
        return bad

    def text(self) -> str:
        """A table of the layers, then the claims, and the bound where images were given."""
        rows = [("layer", "operation", "whole image", "own box", "field", "claim")]
        rows += [
            (r.path, r.operation, _figure(r.whole), _figure(r.box), f"{r.field:.0%}", "exact" if r.claimed else "-")
            for r in self.layers
        ]
        outcome = [f"FAILED {f}" for f in self.failures] or [f"every claim holds to {self.tolerance:.0e}"]
        claim = f"({'exact' if self.exact else 'no claim'}), own boxes {_figure(self.box)}"
        return "\n".join(
            [
                table(rows),
                "",
                f"outputs against the sum of the parts': whole image {_figure(self.whole)} {claim} "
                f"({'exact' if self.box_exact else 'no claim'})",
                *([SCALED] if self.scaled else []),
                *(["", self.labelled.text()] if self.labelled is not None else []),
                "",
                *outcome,
            ]
        )


def _figure(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


@public
def verify(
    model: nn.Module,
    parts: Parts,
    x: Any = None,
    batches: Iterable | None = None,
    *,
    head: str = "sum",
) -> Report:
    """Hold the composed `model` and its `parts` to the plan's claims.

    Args:
        model: from `merge`, not trained since.
        x: images (B, C, *size) to compute with, or a tuple or dict of the network's inputs; by default two of random
            numbers.
        batches: (images, labels) for theorem 2.2, computed in the precision that the parts have.
        head: with which the model was merged.

    Raises:
        MergeError: parts that cannot be merged, or not with this head.
        SplitError: the model is not the one that was split, or has fewer classes than the labels.

    Source: gu2022 theorems 2.1 and 2.2.
    """
    if not isinstance(parts, Parts) or not isinstance(model, nn.Module):
        found = f"{type(model).__name__} and {type(parts).__name__}"
        raise SplitError(f"expected a merged model and the Parts that it came from, got {found}")
    plan, size = parts.plan, parts.plan.input_size
    check_mergeable(plan, head)
    labelled = None if batches is None else _labelled(model, parts, batches)
    rows, outputs = claims(analyse(parts.graph, plan.divisor, plan.domain, size, output=plan.output))
    nets, every = in_float64(model, parts, head), [*rows, *outputs]
    given = Given.random(parts.graph) if x is None else Given.of(parts.graph, x)
    full = Domain.full(plan.parts).boxes(spatial(size))
    scaled = any(view.scaled for view in plan.views())
    box = _Differences() if scaled else _compare(nets, plan, every, plan.boxes(), given)
    comparable = not windows(plan)
    as_box = plan.boxes() == full and not scaled
    whole = box if as_box else _compare(nets, plan, every, full, given) if comparable else _Differences()
    return Report(
        tuple(
            LayerErrors(c.path, c.operation, whole.error([c]), box.error([c]), box.field([c]), c.exact) for c in rows
        ),
        whole.error(outputs),
        box.error(outputs),
        plan.exact,
        plan.exact and box.field(outputs) == 1,
        _tolerance(plan, parts[0].state_dict()),
        scaled,
        labelled,
    )


def _tolerance(plan: Plan, state: Mapping[str, torch.Tensor]) -> float:
    """Blocks keep every digit where they are placed; what merge sums or averages is rounded as it is stored."""
    rounded = [state[name] for name, t in plan.tensors.items() if t.reduce != "place" or t.outside == "mean"]
    eps = max((torch.finfo(t.dtype).eps for t in rounded if t.is_floating_point()), default=0.0)
    return max(EXACT, min(ROUNDINGS * eps, COARSEST))


# ---- theorem 2.1


@dataclass
class _Differences:
    """By node: the largest difference and the largest number, and how many of how many numbers were compared."""

    largest: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, node: str, y: torch.Tensor, of_part: torch.Tensor, clean: torch.Tensor) -> None:
        worst, scale = self.largest.setdefault(node, [0.0, 0.0])
        if clean.any():
            worst = max(worst, float((y - of_part)[clean].abs().nan_to_num(torch.inf).max()))
        self.largest[node] = [worst, max(scale, float(y.abs().max()))]
        compared, total = self.counts.get(node, (0, 0))
        self.counts[node] = [compared + int(clean.sum()), total + clean.numel()]

    def error(self, of: Sequence[Claim]) -> float | None:
        """The largest relative difference; None where nothing could be compared."""
        known = [self.largest[c.node] for c in of if self.counts.get(c.node, (0,))[0]]
        return max((worst / (scale or 1.0) for worst, scale in known), default=None)

    def field(self, of: Sequence[Claim]) -> float:
        counts = [self.counts.get(c.node, (0, 1)) for c in of]
        return sum(n for n, _ in counts) / max(sum(total for _, total in counts), 1)


def _compare(
    nets: Sequence[fx.GraphModule], plan: Plan, wanted: Sequence[Claim], boxes: Sequence[Box], given: Given
) -> _Differences:
    """The maps of the composed network, nets[0], against those of the parts on their boxes."""
    result, sums = _Differences(), dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for pair in pairs(nets, plan, wanted, boxes, given):
        node, y, at = pair.claim.node, pair.whole, pair.at
        if pair.claim.kind is Kind.PARTIAL:
            _, total, clean = sums.setdefault(node, (y, torch.zeros_like(y), torch.ones_like(y).bool()))
            total[at] += pair.part
            clean[at] &= pair.field
        else:
            result.add(node, y[at], pair.part, pair.field)
    for node, compared in sums.items():
        result.add(node, *compared)
    return result


# ---- theorem 2.2


@torch.no_grad()
def _labelled(model: nn.Module, parts: Parts, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Labelled:
    """Losses and accuracies of the parts on their boxes and of the composed network, and what (2.19) says of them."""
    losses, right, dtype = [], [], next(model.parameters()).dtype
    for net in (model, *parts):
        net.eval()

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    for x, target in batches:
        args, kwargs = tree_map_only(torch.Tensor, cast, as_call(x, parts.graph.signature))
        logits = [model(*args, **kwargs), *parts(*args, **kwargs)]
        if int(target.max()) >= logits[0].shape[1]:
            raise SplitError(
                f"a label is {int(target.max())}, but the model has {logits[0].shape[1]} classes; use its data"
            )
        losses.append(torch.stack([F.cross_entropy(z.double(), target, reduction="none") for z in logits]))
        right.append(torch.stack([z.argmax(1) == target for z in logits]))
    (whole, single), (known, knows) = ((t[0], t[1:]) for t in (torch.cat(losses, 1), torch.cat(right, 1)))
    best = torch.where(knows, single, torch.inf).amin(0).nan_to_num(posinf=0.0)
    bound = best + torch.where(knows, 0.0, single).sum(0)
    common = knows.all(0)
    return Labelled(
        images=len(whole),
        losses=tuple(single.mean(1).tolist()),
        accuracies=tuple((100 * knows.double().mean(1)).tolist()),
        loss=float(whole.mean()),
        accuracy=float(100 * known.double().mean()),
        bound=float(bound.mean()),
        common=int(common.sum()),
        kept=int((common & known).sum()),
    )
