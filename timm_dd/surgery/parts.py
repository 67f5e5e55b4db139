"""The K parts of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ..compat import tree_flatten, tree_unflatten
from ..errors import MergeError, headline, public, shown
from ..planning.graphs import Graph, first_float
from ..planning.plan import Plan
from ..storage import files
from .emit import emit, restrict, slices
from .packed import PackedGraph, pack
from .source import Network
from .trial import check_packed_runs, check_parts_run


class Parts(nn.ModuleList):
    """K trainable `torch.fx.GraphModule`, the parts of one model, and the plan that made them.

    A list of modules: ``len(parts)``, ``parts[2]``, iteration, ``parts.to(device)``; each part's state dict has the
    global model's keys.

    Attributes:
        plan: how they were split.
        seed: of their fresh weights; None if not known.
        epoch: how many they were trained for, for their files; None if not known. Set it as you train.
        members: which of the plan's K parts these are; all of them, but where `load` dropped the missing ones.
    """

    def __init__(
        self,
        modules: Sequence[fx.GraphModule],
        plan: Plan,
        graph: Graph,
        module: nn.Module | None = None,
        seed: int | None = None,
        members: Sequence[int] | None = None,
    ):
        super().__init__(modules)
        self.plan, self.seed = plan, seed
        self.members = tuple(range(plan.parts) if members is None else members)
        self.epoch: int | None = None
        self._whole = _Whole(graph, module)

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[fx.GraphModule]: ...

    @property
    def graph(self) -> Graph:
        """The whole network, traced, on the meta device; to be read, and copied where it is to be changed."""
        return self._whole.graph

    @property
    def origin(self) -> nn.Module | None:
        """The module that was split, where it was not a timm name."""
        return self._whole.module

    def crops(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the parts see of the batch ``x`` (B, C, *size): views of it at scale 1, see `View.crop`. Of several
        inputs, given as the network takes them, a tuple for each part, ``parts[k](*crops[k])``, or a dict where some
        are given by name, ``parts[k](**crops[k])``: its view of images, and the others as they are.

        Raises:
            SplitError: a batch of another image size, or other inputs than those that it was split with.
        """
        seen = self._seen(args, kwargs)
        if kwargs:
            return tuple(seen)
        values = (tuple(given.values()) for given in seen)
        return tuple(v for (v,) in values) if self.graph.inputs.is_one_image else tuple(values)

    def _seen(self, args: Sequence, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each part's arguments, by name and in their order."""
        inputs, signature, views = self.graph.inputs, self.graph.signature, self.plan.views()
        given, trees = inputs.checked(signature, args, kwargs), inputs.taken(signature)
        return [
            {name: inputs.on_images(views[k].crop, trees[name], tree) for name, tree in given.items()}
            for k in self.members
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits of the parts, each on its box: (K, B, classes); their sum over K is (2.16). Of several outputs,
        each is stacked; reconstructions of boxes of several sizes are a list."""
        outputs = [tree_flatten(part(*seen.values())) for part, seen in zip(self, self._seen(args, kwargs))]
        return tree_unflatten([_stacked(leaves) for leaves in zip(*(leaves for leaves, _ in outputs))], outputs[0][1])

    @public
    def packed(self) -> PackedGraph:
        """All parts as one `torch.fx.GraphModule` on stacked crops, with copies of their weights:
        ``packed(torch.stack(parts.crops(x)))`` is (K, B, classes); it takes each of several inputs stacked. ``load``
        and ``unload`` copy weights from the parts and back.

        Raises:
            SplitError: the parts have different widths, or boxes of different sizes; what torch.vmap cannot take.
        """
        packed = pack(list(self))
        check_packed_runs(pack, list(self), self.graph, self.plan)
        return packed

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give every part its slices of a global model's `state` dict."""
        for k, part in zip(self.members, self):
            names = part.state_dict()
            part.load_state_dict({name: restrict(state[name], self.plan.tensors[name], k, self.plan) for name in names})

    @public
    def save(self, folder: str | Path) -> None:
        """Write ``part-0000k-of-0000K.safetensors`` and ``plan.json``.

        Raises:
            FileError: the folder cannot be written, or a file has no form for a dtype or an argument of the model.
            MergeError: some were dropped when they were loaded, or one was wrapped or changed since the split.
        """
        self.check_complete()
        files.save_parts(folder, self.plan, [part.state_dict() for part in self], self.seed, self.epoch)

    def check_complete(self) -> None:
        """Raise MergeError unless all parts of the plan are here."""
        if len(self) < self.plan.parts:
            raise MergeError(
                f"these are {len(self)} of {self.plan.parts} parts, the others are missing; load all of them"
            )

    @classmethod
    @public
    def load(cls, folder: str | Path, model: nn.Module | None = None, *, missing: str = "refuse") -> Parts:
        """The parts that `save` wrote. `model` is the module that was split, where it was not a timm name.

        Args:
            missing: ``drop`` gives those that have a file; otherwise a missing one is an error.

        Raises:
            MergeError: a part is missing or damaged, or belongs to another split.
        """
        if missing not in ("refuse", "drop"):
            raise MergeError(f"missing: expected refuse or drop, got {shown(missing)}")
        with files.PartsFolder(folder) as opened:
            plan, members = opened.plan, opened.present() if missing == "drop" else range(opened.plan.parts)
            states = [opened.load(k) for k in members]
            seed, epoch = opened.history()
        try:
            network = Network.of_plan(plan, model)
            graph = network.trace()
            check_parts_run(graph, plan)
            modules = [_loaded(graph, plan, k, network.module, state) for k, state in zip(members, states)]
        except MergeError:
            raise
        except (ValueError, LookupError, AttributeError, TypeError, RuntimeError) as e:
            raise MergeError(
                f"{folder}: the plan does not fit its model ({headline(e)}); use the version of timm that split it"
            ) from e
        parts = cls(modules, plan, graph, network.origin, seed, members)
        parts.epoch = epoch
        return parts


def _stacked(leaves: Sequence[Any]) -> Any:
    """One output of the parts; what is no tensor is the same for all of them."""
    if not isinstance(leaves[0], torch.Tensor):
        return leaves[0]
    alike = all(t.shape == leaves[0].shape for t in leaves)  # perhaps symbolic shapes, which have no hash
    return torch.stack(list(leaves)) if alike else list(leaves)


class _Whole:
    """What the parts come from, without being part of them: no submodule, and the same in deep copies, since nobody
    changes it. `merge` copies the user's module."""

    def __init__(self, graph: Graph, module: nn.Module | None):
        self.graph, self.module = graph, module

    def __deepcopy__(self, memo: dict) -> _Whole:
        return self


def _loaded(graph: fx.GraphModule, plan: Plan, k: int, source: nn.Module, state: dict) -> fx.GraphModule:
    """Part k with the tensors of its file, and with the constants that no file has."""
    dtype = first_float(state.values())
    for name, t in slices(plan, k, source, graph, plan.constants).items():
        state[name] = t.to(dtype) if t.is_floating_point() else t
    return emit(graph, plan, k, state, source)
