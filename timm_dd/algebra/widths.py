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

import math
from collections.abc import Iterator

from ..errors import WidthError
from .axes import Cut, FrozenAxis, Term, Window, atom_size, term_size


class Width:
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
        other.reduced_over |= w.reduced_over
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


def freeze(axis: Axis) -> FrozenAxis:
    """`axis` as plain data; Widths that are still free are cut if active and whole if not."""
    terms = []
    for term in axis.resolve().terms:
        atoms = (a if not isinstance(a, Width) else Cut(a.size) if a.active else a.size for a in term)
        terms.append(_normal(tuple(atoms)))
    return FrozenAxis(tuple(terms))
