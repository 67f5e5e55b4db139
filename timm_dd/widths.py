"""The algebra of widths: what a channel axis is made of, and which of its indices part k owns.

A channel axis is a sum of products (DESIGN: ``Axis = Term + Term + ...``)::

    Axis = (Term, ...)      concatenation
    Term = (atom, ...)      row-major product, outermost first; the index runs fastest in the last atom

An atom is an ``int`` (a factor that every part has whole), a `Width` (an unknown of known size, cut
into K parts once the whole graph was read) or a `Window` (a spatial extent of which part k sees its box).

While the graph is read, rules **unify** axes. A `Width` lives in a union-find: it is bound to another
Width, **refined** into a sum (128 becomes 64 + 64), **factored** into a product (256 becomes 32 · 8), or
made **whole** (bound to an int). When all is read, `freeze` turns an axis into plain data, `FrozenAxis`,
that knows K and gives the indices of every part.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import WidthError, shown


class Width:
    """An unknown number of channels of known total `size`.

    `active` widths are channels that a layer produces: they are cut. Passive ones (an axis of a
    parameter that has met nothing yet) stay whole unless they are unified with an active one.
    `mixed` ones are read all together by some operation (a softmax, a sum): where there is a choice, another is cut.
    `origin` names the place that made it, for messages.
    """

    __slots__ = ("size", "active", "mixed", "origin", "bound")

    def __init__(self, size: int, origin: str = "", active: bool = True, mixed: bool = False):
        self.size, self.origin, self.active, self.mixed = size, origin, active, mixed
        self.bound: Axis | None = None

    def piece(self, size: int) -> Atom:
        """A new Width of `size` of its channels; a single one cannot be cut."""
        return Width(size, self.origin, self.active, self.mixed) if size > 1 else 1

    def __repr__(self) -> str:
        return f"w({self.size})"


@dataclass(frozen=True)
class Window:
    """A spatial extent of `size` positions; part k sees ``[start[k], start[k] + extent[k])`` of them."""

    size: int
    start: tuple[int, ...]
    extent: tuple[int, ...]

    def __repr__(self) -> str:
        return f"window({self.size})"


Atom = int | Width | Window
Term = tuple  # of Atom


def atom_size(atom: Atom) -> int:
    return atom if isinstance(atom, int) else atom.size


def term_size(term: Term) -> int:
    return math.prod(map(atom_size, term))


class Axis:
    """A sum of products of atoms; immutable, but its Widths may be bound later (see `resolve`)."""

    __slots__ = ("terms",)

    def __init__(self, *terms: Term):
        self.terms = terms

    @classmethod
    def of(cls, *atoms: Atom) -> Axis:
        """The axis of one term, the product of `atoms`."""
        return cls(atoms)

    @property
    def size(self) -> int:
        return sum(map(term_size, self.terms))

    def __repr__(self) -> str:
        return " + ".join("·".join(map(repr, t)) for t in self.terms)

    def __eq__(self, other) -> bool:
        return isinstance(other, Axis) and self.terms == other.terms

    __hash__ = None

    def __add__(self, other: Axis) -> Axis:
        return Axis(*self.terms, *other.terms)

    def times(self, *inner: Atom) -> Axis:
        """Every channel repeated over `inner`, as flatten does with the positions of a channel."""
        return Axis(*(t + inner for t in self.terms))

    def resolve(self) -> Axis:
        """The axis in normal form: bound Widths replaced, ones dropped, neighbouring ints joined."""
        terms: list[Term] = []
        for term in self.terms:
            for t in _expand(term):
                t = _normal(t)
                if terms and _is_int(t) and _is_int(terms[-1]):
                    t = (terms.pop()[0] + t[0],)
                terms.append(t)
        self.terms = tuple(terms)
        return self

    def widths(self) -> Iterator[Width]:
        """The unbound Widths of the axis."""
        for term in self.resolve().terms:
            yield from (a for a in term if isinstance(a, Width))

    def is_whole(self) -> bool:
        """Whether no atom of the axis can differ between parts."""
        return all(_is_int(t) for t in self.resolve().terms)


def _is_int(term: Term) -> bool:
    return len(term) == 1 and isinstance(term[0], int)


def _normal(term: Term) -> Term:
    out: list[Atom] = []
    for a in term:
        if isinstance(a, int):
            if a == 1:
                continue
            if out and isinstance(out[-1], int):
                out[-1] *= a
                continue
        out.append(a)
    return tuple(out) or (1,)


def _expand(term: Term) -> list[Term]:
    """`term` with its first bound Width replaced by what it is bound to, until none is left."""
    for i, a in enumerate(term):
        if isinstance(a, Width) and a.bound is not None:
            outer, inner = term[:i], term[i + 1 :]
            inside = a.bound.resolve().terms
            if len(inside) > 1:  # outer · (a + b): written out, as a product holds no sum
                if any(isinstance(o, Window) for o in outer):
                    raise WidthError("a concatenation inside a product with a spatial extent")
                outer_size = term_size(outer)
                return [t for _ in range(outer_size) for s in inside for t in _expand(s + inner)]
            return _expand(outer + inside[0] + inner)
    return [term]


def make_whole(axis: Axis) -> None:
    """Bind every Width of `axis` to its size: every part has all of it."""
    for w in list(axis.widths()):
        if w.bound is None:
            w.bound = Axis((w.size,))


def _bind(w: Width, axis: Axis) -> None:
    for other in axis.widths():
        other.active |= w.active
        other.mixed |= w.mixed
        other.origin = other.origin or w.origin
    w.bound = axis


def unify(a: Axis, b: Axis) -> Axis:
    """Make two axes equal, index by index, and return the result.

    Raises:
        WidthError: their sizes differ, or no sum of products covers both.
    """
    a, b = a.resolve(), b.resolve()
    if a.size != b.size:
        raise WidthError(f"axes of {a.size} and {b.size} channels meet")
    if a == b:
        return a
    for x, y in ((a, b), (b, a)):
        if len(x.terms) == 1 and len(x.terms[0]) == 1 and isinstance(x.terms[0][0], Width):
            _bind(x.terms[0][0], y)
            return y
    if len(a.terms) == len(b.terms) == 1:
        _unify_products(a.terms[0], b.terms[0])
    else:
        head_a, tail_a, head_b, tail_b = *_pop(a), *_pop(b)
        if head_a.size > head_b.size:
            head_a, rest = split_axis(head_a, head_b.size)
            tail_a = rest if tail_a is None else rest + tail_a
        elif head_a.size < head_b.size:
            head_b, rest = split_axis(head_b, head_a.size)
            tail_b = rest if tail_b is None else rest + tail_b
        unify(head_a, head_b)
        if tail_a is not None:
            unify(tail_a, tail_b)
    return a.resolve()


def _pop(axis: Axis) -> tuple[Axis, Axis | None]:
    head, *tail = axis.terms
    return Axis(head), Axis(*tail) if tail else None


def split_axis(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """Cut `axis` in two at index `at` (0 < at < size), refining Widths where needed.

    Raises:
        WidthError: `at` falls inside a product in a way that no sum of products expresses.
    """
    terms, seen = axis.resolve().terms, 0
    for i, term in enumerate(terms):
        size = term_size(term)
        if at == seen + size:
            return Axis(*terms[: i + 1]), Axis(*terms[i + 1 :])
        if at < seen + size:
            head, tail = _split_term(term, at - seen)
            return Axis(*terms[:i], *head.terms), Axis(*tail.terms, *terms[i + 1 :])
        seen += size
    raise WidthError(f"cannot cut an axis of {seen} channels at {at}")


def _split_term(term: Term, at: int) -> tuple[Axis, Axis]:
    first, rest = term[0], term[1:]
    inner = term_size(rest)
    if isinstance(first, int):
        whole, left = divmod(at, inner)
        before, after = Axis.of(whole, *rest), Axis.of(first - whole, *rest)
        if not left:
            return before.resolve(), after.resolve()
        head, tail = _split_term(rest, left)
        head = before + head if whole else head
        tail = tail + Axis.of(first - whole - 1, *rest) if first - whole - 1 else tail
        return head.resolve(), tail.resolve()
    if isinstance(first, Width) and at % inner == 0:
        n = at // inner
        a, b = first.piece(n), first.piece(first.size - n)
        first.bound = Axis((a,), (b,))
        return Axis.of(a, *rest), Axis.of(b, *rest)
    raise WidthError(f"cannot cut {Axis(term)} at {at}")


def _unify_products(s: Term, t: Term) -> None:
    """Align two products of one size from the innermost atom outwards, factoring where sizes differ."""
    s, t = list(s), list(t)
    while s and t:
        x, y = s.pop(), t.pop()
        m, n = atom_size(x), atom_size(y)
        if m == n:
            _unify_atoms(x, y)
            continue
        common = math.gcd(m, n)
        if common == 1:
            raise WidthError(f"products {x} and {y} share no factor")
        (inner_x, outer_x), (inner_y, outer_y) = _factor(x, y, common), _factor(y, x, common)
        _unify_atoms(inner_x, inner_y)
        s += [outer_x] if atom_size(outer_x) > 1 else []
        t += [outer_y] if atom_size(outer_y) > 1 else []
    for left in s + t:  # what is left over has size 1
        make_whole(Axis.of(left))


def _factor(atom: Atom, other: Atom, inner: int) -> tuple[Atom, Atom]:
    """`atom` as (its inner factor of size `inner`, its outer factor). `other` says which one is channels."""
    size = atom_size(atom)
    if size == inner:
        return atom, 1
    if isinstance(atom, int):
        return inner, size // inner
    if isinstance(atom, Window):
        raise WidthError(f"cannot factor the spatial extent {atom}")
    if isinstance(other, Width) and other.size == inner:
        factors = (size // inner, atom.piece(inner))
    else:
        factors = (atom.piece(size // inner), inner)
    atom.bound = Axis(factors)
    return factors[1], factors[0]


def _unify_atoms(x: Atom, y: Atom) -> None:
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Width) and a.bound is None and a is not b:
            _bind(a, Axis.of(b))
            return
    if x != y:
        raise WidthError(f"{x} and {y} differ between parts")


def cut_sizes(size: int, parts: int) -> tuple[int, ...]:
    """`size` channels over `parts`, as even as can be: the first ``size % parts`` get one more."""
    return tuple(size // parts + (k < size % parts) for k in range(parts))


class Cut(NamedTuple):
    """A Width after cutting: `size` channels, part k owns the k-th run of `cut_sizes`."""

    size: int


class FrozenAxis(NamedTuple):  # a tuple, as it is looked up for every tensor, and a tuple is hashed fast
    """An axis as plain data: terms of ints, `Cut` and `Window`; part k's indices follow from K alone."""

    terms: tuple[tuple[int | Cut | Window, ...], ...]

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
            runs = zip(atom.start, atom.extent, strict=True) if isinstance(atom, Window) else ()
            inside = [start >= 0 and n > 0 and start + n <= atom.size for start, n in runs]
            if atom_size(atom) < 1 or not all(inside) or (isinstance(atom, Window) and len(inside) != parts):
                raise ValueError(f"unexpected {shown(atom)} in an axis")

    def part_size(self, k: int, divisor: int) -> int:
        return _part_size(self, k, divisor)

    def index(self, k: int, divisor: int) -> torch.Tensor:
        """Part k's indices into the axis, ascending within each term: int64 of shape (part_size,)."""
        return _index(self, k, divisor)

    def dealt(self, divisor: int) -> torch.Tensor:
        """An order of all indices in which part k's run of every Width holds the k-th, the (k+K)-th … channel of it:
        one order for Widths of one size, so that axes which were unified stay so."""
        return _indices(self, lambda atom: _deal(atom, divisor))

    def to_json(self) -> list:
        return [[_atom_to_json(a) for a in t] for t in self.terms]

    @classmethod
    def from_json(cls, terms: list) -> FrozenAxis:
        return cls(tuple(tuple(_atom_from_json(a) for a in t) for t in terms))


def block(shape: Sequence[int], axes: Sequence[FrozenAxis | None], k: int, divisor: int) -> tuple:
    """Part k's elements of a tensor of `shape`, as an open index like that of ``numpy.ix_``; it has all along a dim
    whose axis is None."""
    index = [torch.arange(n) if a is None else a.index(k, divisor) for n, a in zip(shape, axes)]
    return torch.meshgrid(*index, indexing="ij") if len(index) > 1 else tuple(index) or (...,)


@functools.lru_cache(maxsize=4096)
def _part_size(axis: FrozenAxis, k: int, divisor: int) -> int:
    return sum(math.prod(_run(a, k, divisor)[1] for a in t) for t in axis.terms)


@functools.lru_cache(maxsize=64)  # layers in a row share axes
def _index(axis: FrozenAxis, k: int, divisor: int) -> torch.Tensor:
    def run(atom: int | Cut | Window) -> torch.Tensor:
        start, length = _run(atom, k, divisor)
        return torch.arange(start, start + length)

    return _indices(axis, run)


def _indices(axis: FrozenAxis, chosen: Callable[[int | Cut | Window], torch.Tensor]) -> torch.Tensor:
    """The indices into an axis of those that are `chosen` of each of its atoms."""
    pieces, offset = [], 0
    for term in axis.terms:
        ix = torch.zeros(1, dtype=torch.long)
        for atom in term:
            ix = (ix[:, None] * atom_size(atom) + chosen(atom)).flatten()
        pieces.append(ix + offset)
        offset += term_size(term)
    return torch.cat(pieces)


def _deal(atom: int | Cut | Window, divisor: int) -> torch.Tensor:
    if not isinstance(atom, Cut):
        return torch.arange(atom_size(atom))
    return torch.cat([torch.arange(k, atom.size, divisor) for k in range(divisor)])


def _run(atom: int | Cut | Window, k: int, divisor: int) -> tuple[int, int]:
    """(start, length) of part k's run inside one atom."""
    if isinstance(atom, int):
        return 0, atom
    if isinstance(atom, Window):
        return atom.start[k], atom.extent[k]
    k %= divisor
    q, r = divmod(atom.size, divisor)
    return k * q + min(k, r), q + (k < r)


def _atom_to_json(atom):
    if isinstance(atom, Cut):
        return {"width": atom.size}
    if isinstance(atom, Window):
        return {"window": atom.size, "start": list(atom.start), "extent": list(atom.extent)}
    return atom


def _atom_from_json(atom):
    if isinstance(atom, int):
        return atom
    if "width" in atom:
        return Cut(operator.index(atom["width"]))
    return Window(operator.index(atom["window"]), *(tuple(map(operator.index, atom[k])) for k in ("start", "extent")))


def freeze(axis: Axis) -> FrozenAxis:
    """`axis` as plain data; Widths that are still free are cut if active and whole if not."""
    terms = []
    for term in axis.resolve().terms:
        atoms = (a if not isinstance(a, Width) else Cut(a.size) if a.active else a.size for a in term)
        terms.append(_normal(tuple(atoms)))
    return FrozenAxis(tuple(terms))
