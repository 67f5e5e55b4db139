"""The algebra of widths: what a channel axis is made of, and what operations make equal.

A channel axis is a sum of products::

    Axis = (Term, ...)      concatenation
    Term = (atom, ...)      row-major product, outermost first; the index runs fastest in the last atom

An atom is an ``int`` (a factor that every part has whole), a `Width` (an unknown of known size, cut
into K parts once the whole graph was read) or a `Window` (a spatial extent of which part k sees its box).

While the graph is read, rules **unify** axes. A `Width` lives in a union-find: it is bound to another
Width, **refined** into a sum (128 becomes 64 + 64), **factored** into a product (256 becomes 32 · 8), or
made **whole** (bound to an int). When all is read, `freeze` turns an axis into plain data, `FrozenAxis`,
that gives the indices of every part once K is known.

Each function here succeeds whole, or every Width and Axis is as it was; `transaction` does the same for several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

from ..errors import WidthError
from .axes import Cut, FrozenAtom, FrozenAxis, Window, atom_size, term_size
from .journal import Journaled, transaction


class Width(Journaled):
    """An unknown number of channels of known total `size`.

    `active` widths are channels that a layer produces: they are cut. Passive ones (an axis of a
    parameter that has met nothing yet) stay whole unless they are unified with an active one.
    `reduced_over` ones are read all together by some operation (a softmax, a sum): where there is a choice,
    another is cut.
    `origin` names the place that made it, for messages.
    """

    __slots__ = ("size", "active", "reduced_over", "origin", "bound")

    def __init__(self, size: int, origin: str = "", active: bool = True, reduced_over: bool = False):
        self.size, self.origin, self.active, self.reduced_over = size, origin, active, reduced_over
        self.bound: Axis | None = None

    def piece(self, size: int) -> Atom:
        """A new Width of `size` of its channels; a single one cannot be cut."""
        return Width(size, self.origin, self.active, self.reduced_over) if size > 1 else 1

    def __repr__(self) -> str:
        return f"w({self.size})"


Atom = int | Width | Window
Term = tuple[Atom, ...]
_Atom = TypeVar("_Atom", Atom, FrozenAtom)


class Axis(Journaled):
    """A sum of products of atoms; immutable, but its Widths may be bound later (see `resolve`)."""

    __slots__ = ("terms",)

    def __init__(self, *terms: Term):
        self.terms: tuple[Term, ...] = terms

    @classmethod
    def of(cls, *atoms: Atom) -> Axis:
        """The axis of one term, the product of `atoms`."""
        return cls(atoms)

    @property
    def size(self) -> int:
        return sum(map(term_size, self.terms))

    def __repr__(self) -> str:
        return " + ".join("·".join(map(repr, t)) for t in self.terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and self.terms == other.terms

    def __add__(self, other: Axis) -> Axis:
        return Axis(*self.terms, *other.terms)

    def times(self, *inner: Atom) -> Axis:
        """Every channel repeated over `inner`, as flatten does with the positions of a channel."""
        return Axis(*(t + inner for t in self.terms))

    @transaction()
    def resolve(self) -> Axis:
        """The axis in normal form: bound Widths replaced, ones dropped, neighbouring ints joined."""
        terms = _normal_form(self.terms)
        while any(isinstance(a, Width) and a.bound is not None for t in terms for a in t):
            terms = _normal_form(terms)  # a later term made a Width of an earlier one whole
        if terms != self.terms:
            self.terms = terms
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


def _normal_form(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    out: list[Term] = []
    for term in (_normal(e) for t in terms for e in _expand(t)):
        if out and _is_int(out[-1]) and _is_int(term):
            term = (term_size(out.pop()) + term_size(term),)
        out.append(term)
    return tuple(out)


def _normal(term: tuple[_Atom, ...]) -> tuple[_Atom, ...]:
    out: list[_Atom] = []
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
    """`term` with every bound Width replaced by what it is bound to."""
    for i, a in enumerate(term):
        if isinstance(a, Width) and a.bound is not None:
            outer, inner = term[:i], term[i + 1 :]
            inside = a.bound.resolve().terms
            if len(inside) == 1:
                return _expand(outer + inside[0] + inner)
            if any(isinstance(o, Window) for o in outer):
                raise WidthError("a concatenation inside a product with a spatial extent")
            make_whole(Axis(outer))  # outer · (a + b) is written out, as a product holds no sum: no copy can be cut off
            return [t for _ in range(term_size(outer)) for s in inside for t in _expand(s + inner)]
    return [term]


@transaction()
def make_whole(axis: Axis) -> None:
    """Bind every Width of `axis` to its size: every part has all of it."""
    for w in list(axis.widths()):
        if w.bound is None:
            w.bound = Axis((w.size,))


def _bind(w: Width, axis: Axis) -> None:
    for other in axis.widths():
        other.active |= w.active
        other.reduced_over |= w.reduced_over
        other.origin = other.origin or w.origin
    w.bound = axis


@transaction()
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
        at = min(term_size(a.terms[0]), term_size(b.terms[0]))
        (head_a, tail_a), (head_b, tail_b) = split_axis(a, at), split_axis(b, at)
        unify(head_a, head_b)
        unify(tail_a, tail_b)
    return a.resolve()


@transaction()
def split_axis(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """Cut `axis` in two at index `at` (0 < at < size), refining Widths where needed.

    Raises:
        WidthError: `at` falls inside a product in a way that no sum of products expresses.
    """
    terms, i, left = axis.resolve().terms, 0, at
    if not 0 < at < axis.size:
        raise WidthError(f"cannot cut an axis of {axis.size} channels at {at}")
    while left >= term_size(terms[i]):
        left -= term_size(terms[i])
        i += 1
    if not left:
        return Axis(*terms[:i]), Axis(*terms[i:])
    head, tail = _split_term(terms[i], left)
    return Axis(*terms[:i], *head.terms), Axis(*tail.terms, *terms[i + 1 :])


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
    while s != t:
        for a, b in ((s, t), (t, s)):
            if len(a) == 1 and isinstance(a[0], Width):  # all that is left: it takes the other's factors
                return _bind(a[0], Axis(b))
        x, y = s[-1], t[-1]
        common = math.gcd(atom_size(x), atom_size(y))
        if common == 1 and atom_size(x) != atom_size(y):
            raise WidthError(f"products {x} and {y} share no factor")
        (outer_x, inner_x), (outer_y, inner_y) = _factor(x, y, common), _factor(y, x, common)
        _unify_atoms(inner_x, inner_y)
        # In normal form again, as a Width may stand in both products, or twice in one.
        (s,), (t,) = Axis((*s[:-1], outer_x)).resolve().terms, Axis((*t[:-1], outer_y)).resolve().terms


def _factor(atom: Atom, other: Atom, inner: int) -> tuple[Atom, Atom]:
    """`atom` as an outer factor and one of size `inner`. `other` says which of them is channels."""
    outer = atom_size(atom) // inner
    if outer == 1:
        return 1, atom
    if isinstance(atom, int):
        return outer, inner
    if isinstance(atom, Window):
        raise WidthError(f"cannot factor the spatial extent {atom}")
    inside = isinstance(other, Width) and other.size == inner
    factors = (outer, atom.piece(inner)) if inside else (atom.piece(outer), inner)
    atom.bound = Axis(factors)
    return factors


def _unify_atoms(x: Atom, y: Atom) -> None:
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Width) and a is not b:
            _bind(a, Axis.of(b))
            return
    if x != y:
        raise WidthError(f"{x} and {y} differ between parts")


def freeze(axis: Axis) -> FrozenAxis:
    """`axis` as plain data; Widths that are still free are cut if active and whole if not."""
    return FrozenAxis(tuple(_frozen(term) for term in axis.resolve().terms))


def _frozen(term: Term) -> tuple[FrozenAtom, ...]:
    return _normal(tuple(a if not isinstance(a, Width) else Cut(a.size) if a.active else a.size for a in term))
