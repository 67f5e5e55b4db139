"""The shapes of every node at several input sizes: the image, each view of the domain, and probes.

A part's convolutions see smaller maps than the global network's. Where such a map reaches a parameter (the first
fully connected layer, (2.13)), the part has a `Window` of it: the positions of its box. How many follow from the
shapes at the box's size; where they begin, from the stride of the map, and that from a probe, a far larger image:
its extra pixels over the map's extra positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..algebra.axes import Window
from ..algebra.domain import spatial
from ..algebra.view import View
from ..compat import Convolution
from ..errors import SplitError, headline
from .graphs import Graph, argument, evaluate_node

PROBE = 3_548_160  # 2^10 · 3² · 5 · 7 · 11: divisible by every stride up to 12 and by 1024
UNKNOWN = object()
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}


class Sizes:
    """Meta tensors of the nodes visited so far, at each input size.

    Args:
        gm: a traced `skeleton`.
        shape: the input without its batch, (C, *size), or (F,).
        views: one for each part, their boxes in the coordinates of `size`.
    """

    def __init__(self, gm: Graph, shape: Sequence[int], views: Sequence[View]):
        size = spatial(shape)
        self.batch = gm.batch
        lead = (self.batch, *shape[: len(shape) - len(size)])  # and channels
        self.gm, self.views = gm, views
        self.scaled = any(v.scaled for v in views)
        seen = [s for s in dict.fromkeys(v.size for v in views) if s != size]
        self.boxed = len(seen)
        self.of_part = [1 + seen.index(v.size) if v.size in seen else 0 for v in views]
        probes = [[n + PROBE * (i == axis) for i, n in enumerate(size)] for axis in range(len(size))] if seen else []
        self.inputs = [(*lead, *s) for s in (size, *seen, *probes)]
        self.envs: list[dict[fx.Node, Any]] = [{} for _ in self.inputs]

    def first(self, node: fx.Node, dtype: torch.dtype) -> Any:
        """Visit `node` at the global size; the value of a placeholder is the argument of its name."""
        try:
            if node.op == "placeholder":
                for env, (batch, *size) in zip(self.envs, self.inputs):
                    env[node] = argument(self.gm, node.target, batch, size, dtype)
            else:
                self.envs[0][node] = evaluate_node(self.gm, node, self.envs[0])
        except Exception as e:  # as in `others`
            shape = "×".join(map(str, self.inputs[0][1:]))
            raise SplitError(
                f"the model does not run on images of {shape}: {node.name}: {headline(e)}; "
                "expected channels, height, width as it takes them"
            ) from e
        return self.envs[0][node]

    def others(self, node: fx.Node, resize: Callable | None, where: str) -> None:
        """Visit `node` at the other sizes; `resize` stands in for an operation that cannot run there with the
        global parameters."""
        for i, env in enumerate(self.envs[1:], start=1):
            if node in env:
                continue
            if any(env[n] is UNKNOWN for n in node.all_input_nodes):
                env[node] = UNKNOWN
                continue
            try:
                if resize is None:
                    env[node] = evaluate_node(self.gm, node, env)
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n, e=env: e[n])
                    env[node] = resize(*args, **kwargs)
                if self._convolves(node) and not env[node].numel() and self.envs[0][node].numel():
                    raise ValueError(
                        "the kernel is larger than the image"
                    )  # of which some versions of torch say nothing
            except Exception as e:  # any operation may refuse a size in its own way
                if i <= self.boxed:
                    raise self._too_small(self.views[self.of_part.index(i)], where, e) from e
                env[node] = UNKNOWN

    def _convolves(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.gm.get_submodule(node.target), Convolution)
        return node.target in CONVOLUTIONS

    def _too_small(self, view: View, where: str, error: Exception) -> SplitError:
        seen, larger = ("view", "a larger scale, ") if view.scaled else ("box", "")
        return SplitError(
            f"{where} does not work on a part's {seen} of {'×'.join(map(str, view.size))} pixels ({headline(error)}); "
            f"use {larger}larger boxes (fewer parts along an axis, more overlap) or larger images"
        )

    def at(self, node: fx.Node) -> list[Any]:
        return [env[node] for env in self.envs]

    def window(self, value, dim: int) -> int | Window:
        """The positions along a dim without channels: a number if all parts see as many, else a `Window`."""
        size = value.at[0].shape[dim]
        extent = tuple(value.at[i].shape[dim] for i in self.of_part)
        if set(extent) == {size}:
            return size
        axis, stride = self._stride(value, dim)
        start = (math.floor(v.box.start[axis] / stride + 0.5) for v in self.views)
        return Window(size, tuple(max(0, min(s, size - e)) for s, e in zip(start, extent)), extent)

    def _stride(self, value, dim: int) -> tuple[int, float]:
        """The input axis that a dim belongs to, and the pixels from one position to the next."""
        size, probes = value.at[0].shape[dim], value.at[1 + self.boxed :]
        grown = [a for a, probe in enumerate(probes) if probe is UNKNOWN or probe.shape[dim] != size]
        if len(grown) != 1 or probes[grown[0]] is UNKNOWN:
            raise SplitError(
                f"{value.op.where()}: cannot tell which pixels the {size} positions of dim {dim} belong to; "
                f"use {'scale 1' if self.scaled else f'Domain.full({len(self.views)})'}"
            )
        return grown[0], PROBE / (probes[grown[0]].shape[dim] - size)

    def moving(self, value) -> set[int]:
        """The input axes along which a larger image gives a map of another shape."""
        probes = value.at[1 + self.boxed :]
        return {axis for axis, t in enumerate(probes) if t is UNKNOWN or t.shape != value.at[0].shape}

    def aligned(self, value, dim: int) -> bool:
        """Whether every box starts at a position of `dim` and ends inside it."""
        (axis, stride), window = self._stride(value, dim), self.window(value, dim)
        starts = [v.box.start[axis] / stride for v in self.views]
        return all(s.is_integer() and s + e <= window.size for s, e in zip(starts, window.extent))

    def extent(self, value, dim: int) -> Callable[[int], int]:
        """The size of a dim without channels in part k."""
        return lambda k: value.at[self.of_part[k]].shape[dim]
