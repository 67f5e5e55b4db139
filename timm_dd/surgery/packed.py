"""The K parts as one network on stacked crops: one launch does the work of K.

The packed graph is a part's graph in which each operation is that of all parts: `torch.vmap` over the part makes
convolutions grouped ones with K times the groups, linear layers batched products; a BatchNorm of K parts is one of K
times the channels; what vmap has no rule for goes part by part. Tensors pass from node to node with the parts as their
first dim. So a packed network is an ordinary GraphModule, a function of its parameters, its buffers and x, which
``torch.compile(fullgraph=True)`` takes as one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from ..compat import Convolution
from ..errors import SplitError
from ..planning.functions import ElementwiseFunction
from ..planning.graphs import BATCH_NORMS, CONTENTS, STAYS_IN_EVAL, Graph, copy_graph, graph_module
from ..planning.memory import IN_PLACE, read_after
from ..planning.modes import is_training_only
from .convolutions import Geometry, Way, grouped, is_plain
from .vectorized import WAYS, as_images, autocast, one_by_one, over_parts

LINEAR_MAPS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
NUMBERS = (int, float, str, bool, tuple, type(None))


class PackedGraph(Graph):
    """A part's graph, and all parts' tensors, stacked: (K, B, C, *box) -> (K, B, classes).

    State dict keys are the global model's, shapes (K, *a part's). Dropout draws for each part.
    """

    def load(self, parts: Iterable[nn.Module]) -> None:
        """Copy the parts' weights and statistics in."""
        for mine, t in self._slices(parts):
            mine.copy_(t.detach())

    def unload(self, parts: Iterable[nn.Module]) -> None:
        """Copy weights and statistics out, into the parts."""
        for mine, t in self._slices(parts):
            t.detach().copy_(mine)

    def share_storage(self, parts: Iterable[nn.Module]) -> None:
        """From now on the parts' tensors are views of these: what trains one trains the other."""
        for mine, t in self._slices(parts):
            t.data = mine

    def scatter_gradients(self, parts: Iterable[nn.Module]) -> None:
        """Give each part's parameters their gradients, views of those here."""
        for stacked, *own in zip(self.parameters(), *(part.parameters() for part in parts)):
            for p, gradient in zip(own, repeat(None) if stacked.grad is None else stacked.grad.unbind()):
                p.grad = gradient

    def choose_convolutions(self, choose: Callable[..., Way]) -> None:
        """By what `choose` says of (x, w, b, geometry), see `convolutions`."""
        for module in self.modules():
            if isinstance(module, PackedConvolution):
                module.choose = choose

    def _slices(self, parts: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(part k's slice here, part k's tensor), of all of them."""
        parts, stacked = list(parts), [t.detach() for _, t in _tensors(self)]
        if any(len(t) != len(parts) for t in stacked):
            raise SplitError(f"expected the {len(stacked[0])} parts that are packed, got {len(parts)}")
        for k, part in enumerate(parts):
            yield from ((mine[k], t) for mine, (_, t) in zip(stacked, _tensors(part)))


class PackedModule(nn.Module):
    """A module of all parts, with the tensors and modules of `module`, (K, *a part's), under their names."""

    def __init__(self, module: nn.Module, parts: int):
        super().__init__()
        for contents in CONTENTS:
            self.__dict__[contents] = module.__dict__[contents]
        # In a tuple, so that it is no submodule: what it holds are this module's dicts.
        self._of_part, self._parts = (module,), parts
        self.training = module.training

    def train(self, mode: bool = True) -> PackedModule:
        mode = mode and not vars(self._of_part[0]).get(STAYS_IN_EVAL, False)
        self._of_part[0].training = mode
        return super().train(mode)

    def _call(self, state: dict[str, torch.Tensor], args: tuple, kwargs: dict | None = None) -> Any:
        """The module with other tensors, each in all of its places, which `functional_call` would not put back."""
        return functional_call(self._of_part[0], state, args, kwargs, tie_weights=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return over_parts(self._call, self._parts, _state(self), args, kwargs)


class PackedLinearMap(PackedModule):
    """A convolution or a fully connected layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return over_parts(self._call, self._parts, *autocast((_state(self), args, kwargs)))


class PackedConvolution(PackedLinearMap):
    """One that is padded with zeros.

    Attributes:
        choose: the way to compute it, see `convolutions`; None: grouped.
    """

    def __init__(self, module: Convolution, parts: int):
        super().__init__(module, parts)
        self.choose: Callable[..., Way] | None = None
        self._geometry = Geometry.of(module)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        state, x = autocast((_state(self), input))
        given = x, state["weight"], state.get("bias"), self._geometry
        if x.ndim != state["weight"].ndim:  # one image
            return super().forward(input)
        way = grouped if self.choose is None else self.choose(*given)
        return way(*given)


class OneByOne(PackedModule):
    """A module that vmap has no rule for, or whose code may branch on values."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return one_by_one(self._call, self._parts, _state(self), args, kwargs)


class PackedBatchNorm(PackedModule):
    """(K, B, C, *): one of K times the channels. torch's rule for vmap passes over the maps several times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = {name: t.flatten() for name, t in _tensors(self)}
        y = self._call(state, (x.movedim(0, 1).flatten(1, 2),))
        return y.unflatten(1, (self._parts, -1)).movedim(1, 0)


class PackedPool(PackedModule):
    """Average pooling to a size."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return as_images(self._of_part[0], self._parts, input)


def pack(parts: Sequence[fx.GraphModule]) -> PackedGraph:
    """The `parts` as one network, with copies of their tensors.

    Raises:
        SplitError: they have different shapes or numbers.
    """
    check_alike(parts)
    rows = zip(*(_tensors(part) for part in parts))
    stacked = {id(row[0][1]): _stack([t for _, t in row]) for row in rows}
    root, graph = copy_graph(parts[0])
    for module in root.modules():
        for tensors in (vars(module)["_parameters"], vars(module)["_buffers"]):
            tensors.update((leaf, stacked[id(t)]) for leaf, t in tensors.items() if t is not None)
    _out_of_place(root, graph)
    _pack_modules(root, graph, len(parts))
    _pack_functions(graph, len(parts))
    packed = graph_module(root, graph, f"Packed{type(parts[0]).__name__}", PackedGraph)
    assert isinstance(packed, PackedGraph)
    return packed


def _out_of_place(root: nn.Module, graph: fx.Graph) -> None:
    """What works in place on a view of all parts' costs copies of them all; so it does where it has to alone."""
    seen = read_after(graph, root)
    needed = {root.get_submodule(str(node.target)) for node in seen if node.op == "call_module"}
    for module in root.modules():
        if vars(module).get("inplace") and module not in needed:
            vars(module)["inplace"] = False
    for node in graph.nodes:
        if node.target in IN_PLACE and node not in seen:
            node.target = _beside(IN_PLACE[node.target])


def _beside(function: Callable) -> Callable:
    """Of two numbers or tensors, in a tensor of the first one's dtype."""

    def call(x: torch.Tensor, other: Any) -> torch.Tensor:
        return function(x, other).to(x.dtype)

    return call


def _pack_modules(root: nn.Module, graph: fx.Graph, parts: int) -> None:
    """Put packed modules in the places of those that the graph calls."""
    new: dict[int, PackedModule] = {}
    for path in dict.fromkeys(node.target for node in graph.nodes if node.op == "call_module"):
        owner, _, leaf = path.rpartition(".")
        module = root.get_submodule(path)
        if id(module) not in new:
            new[id(module)] = _kind(module)(module, parts)
        root.get_submodule(owner)._modules[leaf] = new[id(module)]


def _kind(module: nn.Module) -> type[PackedModule]:
    counts = isinstance(module, BATCH_NORMS) and module.momentum is None  # a mean, by the value of its count
    if counts or isinstance(module, (nn.RNNBase, nn.RReLU, ElementwiseFunction)) or is_training_only(module):
        return OneByOne
    if isinstance(module, (nn.Linear, Convolution)):
        return PackedConvolution if is_plain(module) else PackedLinearMap
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return PackedPool
    plain = isinstance(module, BATCH_NORMS) and {name for name, _ in _tensors(module)} <= OF_BATCH_NORM
    return PackedBatchNorm if plain else PackedModule


def _pack_functions(graph: fx.Graph, parts: int) -> None:
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _packed(node.target, node.name, parts)
        elif node.op == "call_method":
            node.op = "call_function"
            node.target = _packed(functools.partial(_method, node.target), node.name, parts)


def _method(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(x, name)(*args, **kwargs)


def _packed(function: Callable, name: str, parts: int) -> Callable:
    """A node's function, of all parts, with the node's name."""

    over = WAYS.get(function, over_parts)

    def packed(*args: Any, **kwargs: Any) -> Any:
        if function in LINEAR_MAPS:
            args, kwargs = autocast((args, kwargs))
        return over(function, parts, *args, **kwargs)

    packed.__name__ = packed.__qualname__ = name
    return packed


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors by name; one that has several places under each of its names, a module under its first."""
    names = ((f"{path}." if path else "", m) for path, m in module.named_modules())
    slots = ((path + leaf, t) for path, m in names for leaf, t in chain(m._parameters.items(), m._buffers.items()))
    return {name: t for name, t in slots if t is not None}


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(K, *shape), in the memory format of the K."""
    detached = [t.detach() for t in tensors]
    new = torch.cat(detached).unflatten(0, (len(detached), -1)) if detached[0].ndim else torch.stack(detached)
    return nn.Parameter(new, tensors[0].requires_grad) if isinstance(tensors[0], nn.Parameter) else new


def check_alike(parts: Sequence[fx.GraphModule]) -> None:
    """Raise SplitError unless `parts` can be packed."""
    for k, part in enumerate(parts):
        for (name, a), (_, b) in zip(_numbers(parts[0]), _numbers(part)):
            if a != b:
                raise SplitError(
                    f"parts that are packed have the same numbers, but {name} is {a} in part 0 and {b} in part {k}; "
                    "choose K that divides all widths and boxes of one size, or train the parts one after another"
                )


def alike(parts: Sequence[fx.GraphModule]) -> list[int]:
    """For each of `parts` the first that it can be packed with."""
    numbers = [list(_numbers(part)) for part in parts]
    return [numbers.index(own) for own in numbers]


def _numbers(part: fx.GraphModule) -> Iterator[tuple[str, Any]]:
    """All that may differ between parts of one network: shapes, attributes of modules, arguments of nodes."""
    for name, t in _tensors(part):
        yield name, tuple(t.shape)
    for path, module in part.named_modules():
        yield from ((f"{path}.{name}", v) for name, v in vars(module).items() if isinstance(v, NUMBERS))
    for node in part.graph.nodes:
        yield f"node {node.name}", (str(node.args), str(node.kwargs))
