"""Axes as plain data: what is left of an axis once its Widths are cut. Part k's indices follow from K alone."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..errors import shown


@dataclass(frozen=True)
class Window:
    """A spatial extent of `size` positions; part k sees ``[start[k], start[k] + extent[k])`` of them."""

    size: int
    start: tuple[int, ...]
    extent: tuple[int, ...]

    def __repr__(self) -> str:
        return f"window({self.size})"


class Cut(NamedTuple):
    """A Width after cutting: part k owns the k-th of K runs of its channels, the first ``size % K`` one longer."""

    size: int


FrozenAtom = int | Cut | Window
FrozenTerm = tuple[FrozenAtom, ...]


class Sized(Protocol):
    @property
    def size(self) -> int: ...


def atom_size(atom: int | Sized) -> int:
    return atom if isinstance(atom, int) else atom.size


def term_size(term: Iterable[int | Sized]) -> int:
    return math.prod(map(atom_size, term))


class FrozenAxis(NamedTuple):  # a tuple, as it is looked up for every tensor, and a tuple is hashed fast
    """An axis as plain data: terms of ints, `Cut` and `Window`; part k's indices follow from K alone."""

    terms: tuple[FrozenTerm, ...]

    @property
    def size(self) -> int:
        return sum(map(term_size, self.terms))

    @property
    def is_cut(self) -> bool:
        """Whether parts own different channels of it."""
        return any(isinstance(a, Cut) for t in self.terms for a in t)

    @property
    def is_owned(self) -> bool:
        """Whether every index belongs to one part alone."""
        return all(any(isinstance(a, Cut) for a in t) for t in self.terms)

    @property
    def is_whole(self) -> bool:
        """Whether every part has all of it, spatial windows included."""
        return all(isinstance(a, int) for t in self.terms for a in t)

    @property
    def is_windowed(self) -> bool:
        """Whether parts see different positions of it."""
        return any(isinstance(a, Window) for t in self.terms for a in t)

    def check(self, parts: int) -> None:
        """Raise ValueError or TypeError unless its atoms have a size and its windows are inside it."""
        for atom in (a for t in self.terms for a in t):
            size = atom_size(atom)
            runs = zip(atom.start, atom.extent, strict=True) if isinstance(atom, Window) else ()
            inside = [start >= 0 and n > 0 and start + n <= size for start, n in runs]
            if size < 1 or not all(inside) or (isinstance(atom, Window) and len(inside) != parts):
                raise ValueError(f"unexpected {shown(atom)} in an axis")

    def part_size(self, k: int, divisor: int) -> int:
        return _part_size(self, k, divisor)

    def index(self, k: int, divisor: int) -> torch.Tensor:  # type: ignore[override]  # of a tuple, which nobody asks
        """Part k's indices into the axis, ascending within each term: int64 of shape (part_size,)."""
        return _index(self, k, divisor)

    def round_robin(self, divisor: int) -> torch.Tensor:
        """An order of all indices in which part k's run of every Width holds the k-th, the (k+K)-th … channel of it:
        one order for Widths of one size, so that axes which were unified stay so."""
        return _indices(self, lambda atom: _round_robin(atom, divisor))

    def to_json(self) -> list:
        return [[_atom_to_json(a) for a in t] for t in self.terms]

    @classmethod
    def from_json(cls, terms: list) -> FrozenAxis:
        return cls(tuple(tuple(_atom_from_json(a) for a in t) for t in terms))


def block(shape: Sequence[int], axes: Sequence[FrozenAxis | None], k: int, divisor: int) -> tuple:
    """Part k's elements of a tensor of `shape`, as an open index like that of ``numpy.ix_``; it has all along a dim
    whose axis is None."""
    index = [torch.arange(n, device="cpu") if a is None else a.index(k, divisor) for n, a in zip(shape, axes)]
    return torch.meshgrid(*index, indexing="ij") if len(index) > 1 else tuple(index) or (...,)


@functools.lru_cache(maxsize=4096)
def _part_size(axis: FrozenAxis, k: int, divisor: int) -> int:
    return sum(math.prod(_run(a, k, divisor)[1] for a in t) for t in axis.terms)


@functools.lru_cache(maxsize=64)  # layers in a row share axes
def _index(axis: FrozenAxis, k: int, divisor: int) -> torch.Tensor:
    def run(atom: FrozenAtom) -> torch.Tensor:
        start, length = _run(atom, k, divisor)
        return torch.arange(start, start + length, device="cpu")  # whatever the default: it is kept

    return _indices(axis, run)


def _indices(axis: FrozenAxis, chosen: Callable[[FrozenAtom], torch.Tensor]) -> torch.Tensor:
    """The indices into an axis of those that are `chosen` of each of its atoms."""
    pieces, offset = [], 0
    for term in axis.terms:
        ix = torch.zeros(1, dtype=torch.long, device="cpu")
        for atom in term:
            ix = (ix[:, None] * atom_size(atom) + chosen(atom)).flatten()
        pieces.append(ix + offset)
        offset += term_size(term)
    return torch.cat(pieces)


def _round_robin(atom: FrozenAtom, divisor: int) -> torch.Tensor:
    if not isinstance(atom, Cut):
        return torch.arange(atom_size(atom), device="cpu")
    return torch.cat([torch.arange(k, atom.size, divisor, device="cpu") for k in range(divisor)])


def _run(atom: FrozenAtom, k: int, divisor: int) -> tuple[int, int]:
    """(start, length) of part k's run inside one atom."""
    if isinstance(atom, int):
        return 0, atom
    if isinstance(atom, Window):
        return atom.start[k], atom.extent[k]
    k %= divisor
    q, r = divmod(atom.size, divisor)
    return k * q + min(k, r), q + (k < r)


def _atom_to_json(atom: FrozenAtom) -> int | dict:
    if isinstance(atom, Cut):
        return {"width": atom.size}
    if isinstance(atom, Window):
        return {"window": atom.size, "start": list(atom.start), "extent": list(atom.extent)}
    return atom


def _atom_from_json(atom: int | dict) -> FrozenAtom:
    if isinstance(atom, int):
        return atom
    if "width" in atom:
        return Cut(operator.index(atom["width"]))
    return Window(operator.index(atom["window"]), *(tuple(map(operator.index, atom[k])) for k in ("start", "extent")))
