"""The algebra of widths on random axes: what succeeds keeps every index, what fails leaves nothing behind.

The oracle counts part k's indices one by one from the axes as they were made, and from what Widths are bound to.
"""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dd.algebra.axes import Window
from timm_dd.algebra.journal import Journaled, transaction
from timm_dd.algebra.widths import Axis, Width, freeze, make_whole, split_axis, unify
from timm_dd.errors import WidthError

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100, database=None)


class Injected(Exception):
    """A failure in the middle of an operation."""


# ---- random axes and operations


@st.composite
def windows(draw, size, parts):
    extents = [draw(st.integers(1, size)) for _ in range(parts)]
    return Window(size, tuple(draw(st.integers(0, size - n)) for n in extents), tuple(extents))


@st.composite
def products(draw, size, parts, widths):
    """The atoms of a product of `size`: mostly known Widths, so that one stands at many places."""
    atoms = []
    while size > 1:
        known = [w for w in widths if size % w.size == 0]
        n = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        shared = st.sampled_from(known or [n])
        atom = draw(st.one_of(shared, shared, st.just(n), windows(n, parts)))
        atoms.append(atom)
        size //= atom if isinstance(atom, int) else atom.size
    return tuple(atoms)


@st.composite
def worlds(draw):
    """K, a few Widths, and axes of few sizes that are made of them."""
    parts = draw(st.integers(2, 4))
    widths = [
        Width(draw(st.sampled_from([2, 3, 4, 6])), "here", active=draw(st.booleans()), reduced_over=draw(st.booleans()))
        for _ in range(draw(st.integers(2, 3)))
    ]
    axes = [Axis.of(w) for w in widths]
    for _ in range(draw(st.integers(1, 2))):
        size = math.prod(draw(st.sampled_from(widths)).size for _ in range(2))
        for _ in range(draw(st.integers(2, 3))):
            at = draw(st.sampled_from([0, 0, *(w.size for w in widths if w.size < size)]))
            axes.append(Axis(*(draw(products(n, parts, widths)) for n in (at, size - at) if n)))
    return World(parts, axes)


STEPS = st.tuples(  # an operation, an axis, another of its size, a place: enough for each of the three
    st.sampled_from(["unify", "unify", "split", "whole"]), *[st.integers(0, 9)] * 2, st.integers(1, 35)
)


class World:
    """Axes, and what has to hold of them after what was done."""

    def __init__(self, parts, axes):
        self.parts, self.axes, self.made = parts, list(axes), [a.terms for a in axes]
        self.equal, self.cuts, self.whole = [], [], []

    def run(self, step):
        """One operation; a WidthError leaves as it came."""
        name, i, j, at = step
        i = i % len(self.axes)
        if name == "unify":
            peers = [p for p, axis in enumerate(self.axes) if axis.size == self.axes[i].size]
            j = peers[j % len(peers)]
            unify(self.axes[i], self.axes[j])
            self.equal.append((i, j))
        elif name == "split":
            pair = split_axis(self.axes[i], 1 + at % self.axes[i].size)
            self.cuts.append((i, len(self.axes), len(self.axes) + 1))
            self.axes += pair
            self.made += [a.terms for a in pair]
        else:
            make_whole(self.axes[i])
            self.whole.append(i)

    def attempt(self, step):
        """Like `run`; where the algebra refuses, all is as it was."""
        before = self.state()
        try:
            self.run(step)
        except WidthError:
            assert self.state() == before

    def state(self):
        """Every attribute of every Width and Axis that can be reached, as it is stored."""
        found, left = {}, [*self.axes, *(a for terms in self.made for t in terms for a in t)]
        while left:
            x = left.pop()
            if id(x) in found or not isinstance(x, (Axis, Width)):
                continue
            names = type(x).__slots__
            found[id(x)] = (x if isinstance(x, Width) else None, *(_kept(getattr(x, name)) for name in names))
            left += [x.bound] if isinstance(x, Width) else [a for t in x.terms for a in t]
        return found

    def check(self):
        """Sizes, equal indices, and the normal form, by the oracle."""
        sizes = [sum(map(_size, terms)) for terms in self.made]
        expressible = [_resolves(a) for a in self.axes]
        for axis, size in zip(self.axes, sizes):
            assert axis.size == size
        for i in self.whole:
            assert list(self.axes[i].widths()) == []
        for k in range(self.parts):
            indices = [part_indices(terms, k, self.parts) for terms in self.made]
            for i, j in self.equal:
                assert indices[i] == indices[j]
            for i, head, tail in self.cuts:
                assert indices[i] == indices[head] + [sizes[head] + n for n in indices[tail]]
            for axis, expected, works in zip(self.axes, indices, expressible):
                assert not works or freeze(axis).index(k, self.parts).tolist() == expected


def _kept(value):
    return id(value) if isinstance(value, Axis) else value


def _size(term):
    return math.prod(a if isinstance(a, int) else a.size for a in term)


def _resolves(axis):
    """A concatenation behind a spatial extent is no sum of products; who reads the axis is told so."""
    try:
        axis.resolve()
    except WidthError as e:
        assert "spatial extent" in str(e)
        return False
    return True


def part_indices(terms, k, parts):
    """Part k's indices into a sum of products, by counting in mixed radix."""
    indices, offset = [], 0
    for term in terms:
        digits = [(_digits(a, k, parts), a if isinstance(a, int) else a.size) for a in term]
        for chosen in itertools.product(*(d for d, _ in digits)):
            index = 0
            for digit, (_, size) in zip(chosen, digits):
                index = index * size + digit
            indices.append(offset + index)
        offset += _size(term)
    return indices


def _digits(atom, k, parts):
    if isinstance(atom, int):
        return range(atom)
    if isinstance(atom, Window):
        return range(atom.start[k], atom.start[k] + atom.extent[k])
    if atom.bound is not None:
        return part_indices(atom.bound.terms, k, parts)
    if not atom.active:
        return range(atom.size)
    owners = sorted(i % parts for i in range(atom.size))  # as even as can be, the first ones longer
    return [i for i, owner in enumerate(owners) if owner == k]


# ---- properties


@PROPERTY
@given(worlds(), st.lists(STEPS, min_size=1, max_size=8))
def test_operations_keep_every_index(world, operations):
    for step in operations:
        world.attempt(step)
    world.check()


@PROPERTY
@given(worlds(), st.lists(STEPS, max_size=4), STEPS)
def test_a_failure_anywhere_leaves_nothing_behind(world, before, step):
    """At the first write, at the second, …, until the operation comes to its end."""
    for earlier in before:
        world.attempt(earlier)
    state = world.state()
    for writes in itertools.count():
        try:
            with failing_after(writes):
                world.run(step)
            break
        except Injected:
            assert world.state() == state
        except WidthError:
            assert world.state() == state
            break
    world.check()


@PROPERTY
@given(worlds(), st.lists(STEPS, max_size=3), st.lists(STEPS, min_size=1, max_size=6))
def test_a_failed_transaction_undoes_all_its_operations(world, before, inside):
    """Also those after one that was refused, which is undone alone."""
    for step in before:
        world.attempt(step)
    state, axes = world.state(), len(world.axes)
    with pytest.raises(Injected), transaction():
        for step in inside:
            world.attempt(step)
        raise Injected
    del world.axes[axes:], world.made[axes:]
    assert world.state() == state


class failing_after:
    """Inside, the write after so many to Widths and Axes fails."""

    def __init__(self, writes):
        self.left, self.write = writes, Journaled.__setattr__

    def __enter__(self):
        def write(target, name, value):
            self.left -= 1
            if self.left < 0:
                raise Injected
            self.write(target, name, value)

        Journaled.__setattr__ = write

    def __exit__(self, *_):
        Journaled.__setattr__ = self.write
