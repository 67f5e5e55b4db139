"""The K parts as one network on stacked crops: one launch does the work of K."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from .errors import SplitError
from .trace import Graph, copy_graph, graph_module

BATCH_NORM = inspect.signature(F.batch_norm)
NUMBERS = (int, float, str, bool, tuple, type(None))


class Packed(Graph):
    """A part's graph, and all parts' tensors, stacked: (K, B, C, *box) -> (K, B, classes).

    State dict keys are the global model's, shapes (K, *a part's). The graph runs once, under `torch.func.vmap`, which
    makes convolutions grouped ones with K times the groups, linear layers batched products, and norms those of K times
    the channels. Dropout draws for each part.
    """

    def __call__(self, x: torch.Tensor) -> Any:
        # functional_call changes the tensors of a module and calls it, as this one is called; so of one around it.
        state = {f"packed.{name}": t for name, t in _tensors(self)}
        norms = nullcontext() if torch.compiler.is_compiling() else _Norms()  # a compiler fuses the passes itself
        with warnings.catch_warnings(), norms:
            warnings.filterwarnings("ignore", "There is a performance drop")  # operations that vmap does in a loop
            return vmap(lambda s, crop: functional_call(_Part(self), s, (crop,)), randomness="different")(state, x)

    def load(self, parts: Iterable[nn.Module]) -> None:
        """Copy the parts' weights and statistics in."""
        for own, t in self._slices(parts):
            own.copy_(t.detach())

    def unload(self, parts: Iterable[nn.Module]) -> None:
        """Copy weights and statistics out, into the parts."""
        for own, t in self._slices(parts):
            t.detach().copy_(own)

    def lend(self, parts: Iterable[nn.Module]) -> None:
        """From now on the parts' tensors are views of these: what trains one trains the other."""
        for own, t in self._slices(parts):
            t.data = own

    def hand_out_gradients(self, parts: Iterable[nn.Module]) -> None:
        """Give each part's parameters their gradients, views of those here."""
        for k, part in enumerate(parts):
            for own, p in zip(self.parameters(), part.parameters()):
                p.grad = None if own.grad is None else own.grad[k]

    def _slices(self, parts: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(part k's slice here, part k's tensor), of all of them."""
        parts, mine = list(parts), [t.detach() for _, t in _tensors(self)]
        if any(len(t) != len(parts) for t in mine):
            raise SplitError(f"expected the {len(mine[0])} parts that are packed, got {len(parts)}")
        for k, part in enumerate(parts):
            yield from ((own[k], t) for own, (_, t) in zip(mine, _tensors(part)))


class _Part(nn.Module):
    """A packed network while its tensors are those of one part."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.packed = packed

    def forward(self, x: torch.Tensor) -> Any:
        return nn.Module.__call__(self.packed, x)


class _Norms(TorchFunctionMode):
    """BatchNorm of all parts is one of K times the channels; vmap's own rule takes several passes over the maps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return _BatchNorm.apply(*BATCH_NORM.bind(*args, **kwargs or {}).args)
        return func(*args, **kwargs or {})


class _BatchNorm(torch.autograd.Function):
    """`F.batch_norm` with a rule for vmap, whose own arithmetic autograd differentiates."""

    @staticmethod
    def forward(*args):
        return F.batch_norm(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x, mean, var, weight, bias, *numbers):
        """(B, C, *) and vectors (C,), each of all parts or of none, as (B, K·C, *) and (K·C,)."""
        vectors = zip((mean, var, weight, bias), in_dims[1:])
        merged = [v if v is None else _all(v, dim, 0, info.batch_size).reshape(-1) for v, dim in vectors]
        y = F.batch_norm(_all(x, in_dims[0], 1, info.batch_size).flatten(1, 2), *merged, *numbers)
        return y.unflatten(1, (info.batch_size, -1)), 1


def _all(t: torch.Tensor, dim: int | None, at: int, K: int) -> torch.Tensor:
    """All parts' tensors along the dim `at`, where they were along `dim`, or were one for all."""
    return t.movedim(dim, at) if dim is not None else t.unsqueeze(at).expand(*t.shape[:at], K, *t.shape[at:])


def pack(parts: Sequence[fx.GraphModule]) -> Packed:
    """The `parts` as one network, with copies of their tensors.

    Raises:
        SplitError: they have different shapes or numbers.
    """
    check_alike(parts)
    rows = zip(*(_tensors(part) for part in parts))
    stacked = {id(row[0][1]): _stack([t for _, t in row]) for row in rows}
    root, graph = copy_graph(parts[0])
    for module in root.modules():
        for own in (module._parameters, module._buffers):
            own.update((leaf, stacked[id(t)]) for leaf, t in own.items() if t is not None)
        if getattr(module, "inplace", False):  # in place on a view of all parts' costs copies of them all
            module.inplace = False
    return graph_module(root, graph, f"Packed{type(parts[0]).__name__}", Packed).train(parts[0].training)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(K, *shape), in the memory format of the K."""
    own = [t.detach() for t in tensors]
    new = torch.cat(own).unflatten(0, (len(own), -1)) if own[0].ndim else torch.stack(own)
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


def _numbers(part: fx.GraphModule) -> Iterator[tuple[str, Any]]:
    """All that may differ between parts of one network: shapes, attributes of modules, arguments of nodes."""
    for name, t in _tensors(part):
        yield name, tuple(t.shape)
    for path, module in part.named_modules():
        yield from ((f"{path}.{name}", v) for name, v in vars(module).items() if isinstance(v, NUMBERS))
    for node in part.graph.nodes:
        yield f"node {node.name}", (str(node.args), str(node.kwargs))
