"""The K parts of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import fx, nn
from torch.utils.data import default_collate

from ..errors import MergeError, SplitError, headline
from ..planning.graphs import skeleton
from ..planning.plan import Plan
from ..planning.rules import has_rule
from ..planning.trace import trace
from ..storage import files
from .emit import _slices, emit, plan_model, restrict
from .packed import PackedGraph, pack


class Parts(nn.ModuleList):
    """K trainable `torch.fx.GraphModule`, the parts of one model, and the plan that made them.

    A list of modules: ``len(parts)``, ``parts[2]``, iteration, ``parts.to(device)``; each part's state dict has the
    global model's keys.

    Attributes:
        plan: how they were split.
        seed: of their fresh weights; None if not known.
        epoch: how many they were trained for, for their files; None if not known. Set it as you train.
    """

    def __init__(
        self, modules: Sequence[fx.GraphModule], plan: Plan, module: nn.Module | None = None, seed: int | None = None
    ):
        super().__init__(modules)
        self.plan, self.seed, self.epoch = plan, seed, None
        # The user's own module, from which merge makes a copy; in a tuple, so that it is no submodule.
        self._origin = (module,)

    @property
    def origin(self) -> nn.Module | None:
        """The module that was split, where it was not a timm name."""
        return self._origin[0]

    def crops(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K views of the batch ``x`` (B, C, *size), one for each box.

        Raises:
            SplitError: a batch of another image size.
        """
        if tuple(x.shape[1:]) != self.plan.input_size:
            raise SplitError(f"expected images of {self.plan.input_size}, got a batch of shape {tuple(x.shape)}")
        return tuple(box.crop(x) for box in self.plan.boxes())

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits of the parts, each on its own box: (K, B, classes); their sum over K is (2.16). Of several outputs,
        each is stacked; reconstructions of boxes of several sizes are a list."""
        own = [part(crop) for part, crop in zip(self, self.crops(x))]
        shapes = {y.shape for y in own if isinstance(y, torch.Tensor)}
        return default_collate(own) if len(shapes) <= 1 else own

    def packed(self) -> PackedGraph:
        """All parts as one `torch.fx.GraphModule` on stacked crops, with copies of their weights:
        ``packed(torch.stack(parts.crops(x)))`` is (K, B, classes). ``load`` and ``unload`` copy weights from the parts
        and back.

        Raises:
            SplitError: the parts have different widths, or boxes of different sizes.
        """
        return pack(list(self))

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give every part its slices of a global model's `state` dict."""
        for k, part in enumerate(self):
            names = part.state_dict()
            part.load_state_dict({name: restrict(state[name], self.plan.tensors[name], k, self.plan) for name in names})

    def save(self, folder: str | Path) -> None:
        """Write ``part-0000k-of-0000K.safetensors`` and ``plan.json``.

        Raises:
            MergeError: the folder cannot be written.
        """
        files.save_parts(folder, self.plan, [part.state_dict() for part in self], self.seed, self.epoch)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None) -> Parts:
        """The parts that `save` wrote. `model` is the module that was split, where it was not a timm name.

        Raises:
            MergeError: a part is missing or damaged, or belongs to another split.
        """
        with files.PartsFolder(folder) as opened:
            plan, states = opened.plan, [opened.load(k) for k in range(opened.plan.parts)]
            seed, epoch = opened.history()
        try:
            source = plan_model(plan, model)
            graph = trace(skeleton(source), has_rule, plan.input_size)
            modules = [_loaded(graph, plan, k, source, state) for k, state in enumerate(states)]
        except (SplitError, KeyError, AttributeError, IndexError, TypeError, RuntimeError) as e:
            raise MergeError(
                f"{folder}: the plan does not fit its model ({headline(e)}); use the version of timm that split it"
            ) from e
        parts = cls(modules, plan, model, seed)
        parts.epoch = epoch
        return parts


def _loaded(graph: fx.GraphModule, plan: Plan, k: int, source: nn.Module, state: dict) -> fx.GraphModule:
    """Part k with the tensors of its file, and with the constants that no file has."""
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    for name, t in _slices(plan, k, source, graph, plan.constants).items():
        state[name] = t.to(dtype) if t.is_floating_point() else t
    return emit(graph, plan, k, state, source.training)
