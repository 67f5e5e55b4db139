"""What a network takes: images, of which a part sees its view, and other tensors, which every part has whole.

An example gives the arguments of one call of the network: a tensor, a tuple by position, a dict by name; tensors may
stand in tuples, lists and dicts. What counts are shapes, and the dtypes of what is no image. The first tensor with the
most dims is the image that the domain cuts; another one with as many dims and of the same size is cut with it. What is
no tensor (a flag, a number, None) is what it was in the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..algebra.domain import spatial
from ..errors import SplitError, shown

CONSTANTS = (NoneType, bool, int, float, str)
FORMS = "a tensor (B, C, *size), or a tuple or dict of the network's arguments"


@dataclass(frozen=True)
class Like:
    """A tensor of the example: its shape, in which None is the batch, and its dtype."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"({', '.join('B' if n is None else str(n) for n in self.shape)})"

    @property
    def is_batched(self) -> bool:
        return self.shape[:1] == (None,)


@dataclass(frozen=True)
class Inputs:
    """The arguments of a network's forward: trees of tuples, lists and dicts, of `Like`s and constants."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def image(cls, size: Sequence[int]) -> Inputs:
        """One batch of images, (C, *size)."""
        return cls((Like((None, *size)),))

    @classmethod
    def of(cls, example: Any, signature: inspect.Signature) -> tuple[Inputs, int]:
        """Those of an example, and its batch.

        Raises:
            SplitError: it has no image, or is no call of the network.
        """
        args, kwargs = ((), {}) if example is None else as_call(example, signature)
        images = [t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim > 1 and 0 not in t.shape]
        if not images:
            raise SplitError(f"a module needs example_input, {FORMS}, to know the image's size")
        batch = max(images, key=lambda t: (t.is_floating_point(), t.ndim)).shape[0]

        def like(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                first = [None if n == batch else n for n in value.shape[:1]]
                return Like((*first, *value.shape[1:]), value.dtype)
            if not isinstance(value, CONSTANTS):
                raise SplitError(f"example_input: expected tensors, numbers and None, got {type(value).__name__}")
            return value

        inputs = cls(mapped(like, args), mapped(like, kwargs))
        try:
            inputs.named(signature)
        except TypeError as e:
            raise SplitError(f"example_input is no call of the network's forward: {e}; expected {FORMS}") from e
        return inputs, batch

    @cached_property
    def size(self) -> tuple[int, ...]:
        """(C, *size) of the image."""
        images = [t for t in leaves((self.args, self.kwargs)) if isinstance(t, Like) and len(t.shape) > 1]
        image = max(images, key=lambda t: (t.dtype.is_floating_point, len(t.shape)))
        return tuple(n or 0 for n in image.shape[1:])

    @property
    def is_one_image(self) -> bool:
        """Whether a batch of images is the only argument."""
        return not self.kwargs and len(self.args) == 1 and isinstance(self.args[0], Like)

    def is_image(self, like: Any) -> bool:
        """Whether a part sees its view of this tensor alone."""
        if not isinstance(like, Like) or not like.is_batched or len(like.shape) != len(self.size) + 1:
            return False
        return spatial(like.shape[1:]) == spatial(self.size)  # type: ignore[arg-type]

    def named(self, signature: inspect.Signature) -> dict[str, Any]:
        """The arguments by name, see `bind`."""
        found: dict[str, Any] = {}
        bind(signature, self.args, self.kwargs, lambda name, value: found.setdefault(name, value))
        return found

    def taken(self, signature: inspect.Signature) -> dict[str, Any]:
        """Those of `named` that hold tensors: what the graph takes, in its order."""
        return {n: tree for n, tree in self.named(signature).items() if any(isinstance(t, Like) for t in leaves(tree))}

    def empty(self, tree: Any, batch: int, size: Sequence[int], dtype: torch.dtype) -> Any:
        """An argument on the meta device, for a batch of images of `size`, (C, *size); numbers are of `dtype`."""

        def make(like: Any) -> Any:
            if not isinstance(like, Like):
                return like
            shape = [batch if n is None else n for n in like.shape]
            if self.is_image(like):
                space = spatial(size)
                shape[len(shape) - len(space) :] = space
            floating = like.dtype.is_floating_point or self.is_one_image
            return torch.empty(shape, dtype=dtype if floating else like.dtype, device="meta")

        return mapped(make, tree)

    def random(self, tree: Any, batch: int, generator: torch.Generator) -> Any:
        """An argument of normal numbers in float64; whole numbers are 0 or 1."""

        def make(like: Any) -> Any:
            if not isinstance(like, Like):
                return like
            shape = [batch if n is None else n for n in like.shape]
            if like.dtype.is_floating_point or like.dtype.is_complex:
                kind = torch.complex128 if like.dtype.is_complex else torch.float64
                return torch.randn(shape, generator=generator, dtype=kind)
            return torch.randint(2, shape, generator=generator).to(like.dtype)

        return mapped(make, tree)

    def checked(self, signature: inspect.Signature, args: Sequence, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call that hold tensors, by name.

        Raises:
            SplitError: they are not as those of the example.
        """
        given: dict[str, Any] = {}
        try:
            bind(signature, args, kwargs, lambda name, value: given.setdefault(name, value))
        except TypeError as e:
            raise SplitError(f"expected the arguments that the network was split with: {e}") from e
        expected = self.named(signature)
        for name in expected | given:
            zipped(_check, expected.get(name), given.get(name), "" if self.is_one_image else name)
        return {name: given[name] for name in self.taken(signature)}

    def on_images(self, change: Callable[[torch.Tensor], torch.Tensor], tree: Any, given: Any) -> Any:
        """The argument `given`, which is as `tree`, with its images changed."""
        return zipped(lambda like, value, _: change(value) if self.is_image(like) else value, tree, given)

    def to_json(self) -> dict:
        return {"args": [_to_json(v) for v in self.args], "kwargs": {k: _to_json(v) for k, v in self.kwargs.items()}}

    @classmethod
    def from_json(cls, d: dict) -> Inputs:
        """The inputs that `to_json` described; ValueError, KeyError or TypeError if none were."""
        inputs = cls(tuple(map(_from_json, d["args"])), {name: _from_json(v) for name, v in d["kwargs"].items()})
        if not any(isinstance(t, Like) and len(t.shape) > 1 for t in leaves((inputs.args, inputs.kwargs))):
            raise ValueError("inputs without an image")
        return inputs


def signature_of(model: nn.Module) -> inspect.Signature:
    """Of its forward, without annotations, which need not be there where it is unpickled."""
    signature = inspect.signature(model.forward)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=signature.empty)


def as_call(given: Any, signature: inspect.Signature) -> tuple[tuple, dict[str, Any]]:
    """Arguments and keyword arguments of a call: of a tensor, of a tuple, of a dict by the forward's names; a dict of
    other names is itself the only argument."""
    if isinstance(given, torch.Tensor):
        return (given,), {}
    if isinstance(given, tuple) and not hasattr(given, "_fields"):
        return given, {}
    if not isinstance(given, Mapping):
        raise SplitError(f"expected {FORMS}, got {type(given).__name__}")
    kinds = {p.kind for p in signature.parameters.values()}
    named = given.keys() <= signature.parameters.keys() or inspect.Parameter.VAR_KEYWORD in kinds
    return ((), dict(given)) if named else ((dict(given),), {})


def bind(
    signature: inspect.Signature, args: Sequence, kwargs: Mapping[str, Any], change: Callable[[str, Any], Any]
) -> inspect.BoundArguments:
    """The arguments of a call, defaults among them, each changed by its name; those of ``*xs`` are xs_0, xs_1, ….

    Raises:
        TypeError: they do not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(change(f"{name}_{i}", v) for i, v in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: change(key, v) for key, v in value.items()}
        else:
            bound.arguments[name] = change(name, value)
    return bound


def leaves(tree: Any) -> list:
    """Of nested tuples, lists and dicts."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [leaf for inner in tree for leaf in leaves(inner)] if isinstance(tree, (tuple, list)) else [tree]


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """A tree with its leaves changed."""
    return zipped(lambda leaf, *_: change(leaf), tree, tree)


def zipped(join: Callable[[Any, Any, str], Any], tree: Any, other: Any, name: str = "") -> Any:
    """`join` of the leaves of two trees and their places; the second has to have the form of the first."""
    if isinstance(tree, Mapping):
        if not isinstance(other, Mapping) or other.keys() != tree.keys():
            found = ", ".join(map(str, other)) if isinstance(other, Mapping) else type(other).__name__
            raise SplitError(f"{name}: expected a dict of {', '.join(map(str, tree))}, got {found}")
        return {key: zipped(join, inner, other[key], f"{name}[{key!r}]") for key, inner in tree.items()}
    if isinstance(tree, (tuple, list)):
        if not isinstance(other, (tuple, list)) or len(other) != len(tree):
            found = f"{len(other)}" if isinstance(other, (tuple, list)) else type(other).__name__
            raise SplitError(f"{name}: expected {len(tree)} entries, got {found}")
        kind = list if isinstance(tree, list) else tuple
        return kind(zipped(join, a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(tree, other)))
    return join(tree, other, name)


def _check(like: Any, value: Any, name: str) -> None:
    """Raise SplitError unless `value` is as in the example."""
    if not isinstance(like, Like):
        same = value is like or (not isinstance(value, torch.Tensor) and value == like)
        expected = f"{shown(like)}, as it was split with; give another one in example_input"
    else:
        fits = isinstance(value, torch.Tensor) and len(value.shape) == len(like.shape)
        same = fits and all(n is None or n == m for n, m in zip(like.shape, value.shape))
        expected = f"a tensor {like}" if name else f"images of {like.shape[1:]}"
    if not same:
        tensor = "a tensor" if name else "a batch"
        other = type(value).__name__ if isinstance(like, Like) else shown(value)
        found = f"{tensor} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else other
        raise SplitError(f"{name}{': ' if name else ''}expected {expected}, got {found}")


def _to_json(tree: Any) -> Any:
    if isinstance(tree, Like):
        return {"shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {"dict": {key: _to_json(v) for key, v in tree.items()}}
    if isinstance(tree, (tuple, list)):
        return {type(tree).__name__: [_to_json(v) for v in tree]}
    return tree


def _from_json(d: Any) -> Any:
    if not isinstance(d, dict):
        if not isinstance(d, CONSTANTS):
            raise ValueError(f"unexpected input {shown(d)}")
        return d
    if "shape" in d:
        return _like(d["shape"], d["dtype"])
    ((kind, inner),) = d.items()
    if kind == "dict":
        return {key: _from_json(v) for key, v in inner.items()}
    return {"tuple": tuple, "list": list}[kind](map(_from_json, inner))


def _like(shape: Sequence, dtype: str) -> Like:
    first, *rest = [*shape, *([] if shape else [None])]
    found = getattr(torch, dtype)
    counts = [*rest, *([] if first is None else [first])]
    if not all(type(n) is int and 0 < n < 2**63 for n in counts) or not isinstance(found, torch.dtype):
        raise ValueError(f"unexpected input of {shown(shape)}, {shown(dtype)}")
    return Like(tuple(shape), found)
