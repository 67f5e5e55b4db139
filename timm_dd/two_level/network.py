"""Two levels as one network: the K parts, each on its view, and what makes one decision of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from ..compat import tree_map_only
from ..errors import MergeError, SplitError
from ..surgery.parts import Parts
from . import files
from .aggregate import (
    GIVE_PROBABILITIES,
    WIDTHS,
    WITHOUT_WEIGHTS,
    CoarseNet,
    check_coarse,
    check_how,
    check_names,
    probabilities,
    side_by_side,
)


class TwoLevel(nn.Module):
    """K parts that decide together: whole images (B, C, *size) -> scores of the classes (B, classes).

    The scores are probabilities for ``mean`` and ``vote``, logits for ``sum`` and ``dnn``. One class alone tells two
    apart: the second is meant from 0.5 on, or from a logit of 0 on. A regression has the mean of the parts' outputs,
    however many heads they have (2.22).

    Args:
        parts: from `split` or `Parts.load`, of any K, domain and width divisor. They stay the parts that they are:
            what trains them here trains them there.
        how: ``mean`` of probabilities; ``vote``, the majority, where the sum of probabilities decides ties; ``sum`` of
            logits, which is the composed network where (2.16) holds; ``dnn``, a dense network on the K·C probabilities.
        widths: of the hidden layers of ``dnn``.
        dropout: after each of them.
        regression: the outputs are values and no logits.

    Attributes:
        classes: C; 0 for a regression.
        coarse: the dense network; None for the other three.
        class_names: for its files; None if not known.

    Raises:
        MergeError: parts without logits, or settings that do not go with them.

    Source: klawonn2023 section 3.2.
    """

    def __init__(
        self,
        parts: Parts,
        how: str,
        *,
        widths: Sequence[int] = WIDTHS,
        dropout: float = 0.0,
        regression: bool = False,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        _check_parts(parts)
        check_how(how, regression)
        self.parts, self.how, self.regression = parts, how, regression
        self.classes = 0 if regression else _classes(parts)
        self.class_names = check_names(class_names, self.classes)
        self.coarse = self._coarse_net(widths, dropout) if how == "dnn" else None
        self._packed: tuple[fx.GraphModule | None, ...] = ()  # no submodule: a graph without weights of its own

    def _coarse_net(self, widths: Sequence[int], dropout: float) -> CoarseNet:
        here, parts = len(self.parts), self.parts.plan.parts
        if here < parts:
            raise MergeError(
                f"dnn weighs {parts} parts and {here} are here; load all of them, or use mean, vote or sum"
            )
        check_coarse(len(self.parts), self.classes, widths, dropout)
        return CoarseNet(len(self.parts), self.classes, widths, dropout)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers of `coarse`; none if there is no such network."""
        return tuple(m.out_features for m in list(self.coarse or ())[:-1] if isinstance(m, nn.Linear))

    @property
    def dropout(self) -> float:
        """After each hidden layer of `coarse`."""
        return next((m.p for m in self.coarse or () if isinstance(m, nn.Dropout)), 0.0)

    def forward(self, x: torch.Tensor) -> Any:
        """Scores of the classes, (B, classes); of a regression, the outputs' means."""
        outputs = self.outputs(x)
        if self.regression:
            return tree_map_only(torch.Tensor, lambda y: y.mean(0), outputs)
        return self.decide(outputs)

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Of the classes, (B, classes), however the parts decide."""
        scores = self(x)
        return scores if self.how in GIVE_PROBABILITIES else probabilities(scores)

    def outputs(self, x: torch.Tensor) -> Any:
        """Of the parts, each on its view, stacked: (K, B, classes)."""
        if x.device.type == "cpu" or not self._can_be_packed():
            return self.parts(x)  # on a CPU twice as fast as packed: grouped convolutions are slow there
        return self._of_packed(x)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        """One decision from the parts' logits, (K, B, classes) -> (B, classes)."""
        if self.coarse is None:
            return WITHOUT_WEIGHTS[self.how](outputs)
        return self.coarse(side_by_side(outputs).to(next(self.coarse.parameters()).dtype))

    def _can_be_packed(self) -> bool:
        if not self._packed:
            try:
                self._packed = (self.parts.packed().to("meta"),)
            except SplitError:  # widths or boxes differ
                self._packed = (None,)
        return self._packed[0] is not None

    def _of_packed(self, x: torch.Tensor) -> Any:
        """As `outputs`, in one launch for all parts. What a training step changes in the buffers goes to the parts."""
        (packed,) = self._packed
        assert packed is not None
        modules = dict(self.parts[0].named_modules())
        for path, module in modules.items():
            packed.get_submodule(path).train(module.training)
        states = [{**dict(part.named_parameters()), **dict(part.named_buffers())} for part in self.parts]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        outputs = functional_call(packed, stacked, (torch.stack(self.parts.crops(x)),))
        if any(module.training for module in modules.values()):
            self._take_buffers(stacked)
        return outputs

    @torch.no_grad()
    def _take_buffers(self, stacked: dict[str, torch.Tensor]) -> None:
        for k, part in enumerate(self.parts):
            for name, buffer in part.named_buffers():
                buffer.copy_(stacked[name][k])

    def extra_repr(self) -> str:
        """How they decide, and how many there are."""
        votes, parts = len(self.parts), self.parts.plan.parts
        return f"how={self.how!r}, {votes} of {parts} parts" + (", regression" if self.regression else "")

    def save(self, folder: str | Path) -> None:
        """Write ``two_level.json``, the coarse net's ``coarse.safetensors``, and the parts as `Parts.save` does.

        Raises:
            FileError: the folder cannot be written.
            MergeError: some parts were dropped when they were loaded.
        """
        files.save(folder, self.parts, self.description(), self.coarse)

    def description(self) -> files.Description:
        """What its files say of it."""
        return files.Description(self.how, self.regression, self.classes, self.widths, self.dropout, self.class_names)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None, *, missing: str = "refuse") -> TwoLevel:
        """What `save` wrote.

        Args:
            folder: on this machine, or ``hf-hub:USER/REPO[@revision]``.
            model: the module that was split, where it was not a timm name.
            missing: ``drop`` lets the parts that are there decide, by mean, vote or sum; otherwise a missing part is an
                error.

        Raises:
            MergeError: a file is missing, damaged, or of another network.
        """
        about, place = files.describe(folder)
        parts = Parts.load(place.parts, model, missing=missing)
        files.check_parts(place, parts.members)
        two = cls(
            parts,
            about.how,
            widths=about.widths,
            dropout=about.dropout,
            regression=about.regression,
            class_names=about.class_names,
        )
        if two.classes != about.classes:
            raise MergeError(f"{place.about} has {about.classes} classes, its parts have {two.classes}; copy it again")
        if two.coarse is not None:
            two.coarse.load_state_dict(files.load_coarse(place, two.coarse))
        return two


def _check_parts(parts: Parts) -> None:
    if not isinstance(parts, Parts):
        raise MergeError(f"parts: expected timm_dd.Parts, of split or Parts.load, got {type(parts).__name__}")
    if parts.plan.inputs is not None:
        raise MergeError("the parts take several inputs; a decision is made of images alone, merge them instead")
    if parts.plan.output != "logits":
        raise MergeError(
            f"the parts give {parts.plan.output}, each its own; a decision needs logits, split a classifier"
        )


def _classes(parts: Parts) -> int:
    """C, from the whole network's output; every part gives all classes."""
    with torch.no_grad():
        output = parts.graph(torch.empty(2, *parts.plan.input_size, device="meta"))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise MergeError(
            f"a decision is made of logits (B, classes), got {found}; for a regression say regression=True"
        )
    return output.shape[1]
