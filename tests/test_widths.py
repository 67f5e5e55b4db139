"""The algebra of widths, and what K parts own of an axis."""

import pytest
import torch

from timm_dd.algebra.axes import Cut, FrozenAxis, Window
from timm_dd.algebra.journal import transaction
from timm_dd.algebra.widths import Axis, Width, freeze, make_whole, split_axis, unify
from timm_dd.errors import WidthError


def cut_sizes(size, parts):
    return tuple(FrozenAxis(((Cut(size),),)).part_size(k, parts) for k in range(parts))


def test_cut_sizes_are_even_and_sum_up():
    assert cut_sizes(10, 4) == (3, 3, 2, 2)
    for size in range(1, 40):
        for parts in range(1, size + 1):
            sizes = cut_sizes(size, parts)
            assert sum(sizes) == size and max(sizes) - min(sizes) <= 1


def test_unified_widths_are_one():
    a, b, c = (Axis.of(Width(8)) for _ in range(3))
    unify(a, b)
    unify(b, c)
    assert a.resolve() == c.resolve()


def test_a_concatenation_met_by_an_add_refines():
    a, b, whole = Width(64), Width(32), Axis.of(Width(96))
    unify(whole, Axis.of(a) + Axis.of(b))
    assert freeze(whole).terms == ((Cut(64),), (Cut(32),))


def test_two_concatenations_are_cut_at_the_same_places():
    a = Axis.of(Width(3)) + Axis.of(Width(5))
    b = Axis.of(Width(6)) + Axis.of(Width(2))
    unify(a, b)
    assert freeze(a) == freeze(b)
    assert [t[0].size for t in freeze(a).terms] == [3, 3, 2]


def test_a_grouped_convolution_factors():
    x = Axis.of(Width(256))
    unify(x, Axis.of(Width(32), 8))
    unify(x, Axis.of(Width(16), 16))
    assert freeze(x).terms == ((Cut(16), 16),)


def test_a_width_inside_a_group_meets_one_between_groups():
    x = Axis.of(Width(24))
    unify(x, Axis.of(2, Width(12)))
    unify(x, Axis.of(2, Width(4), 3))
    assert freeze(x).terms == ((2, Cut(4), 3),)


def test_whole_wins():
    x, y = Axis.of(Width(6)), Axis.of(Width(6))
    unify(x, y)
    make_whole(y)
    assert x.is_whole() and freeze(x).terms == ((6,),)


def test_passive_widths_stay_whole_until_they_meet_channels():
    lone, met = Axis.of(Width(5, active=False)), Axis.of(Width(6, active=False))
    unify(met, Axis.of(Width(6)))
    assert not freeze(lone).is_cut and freeze(met).is_cut


@pytest.mark.parametrize(
    "a, b",
    [
        (Axis.of(Width(6)), Axis.of(Width(7))),
        (Axis.of(4, Width(6)), Axis.of(Width(3), 8)),
        (Axis.of(Width(2), Window(4, (0, 2), (2, 2))), Axis.of(Width(4), 2)),
    ],
)
def test_what_no_sum_of_products_covers_is_an_error(a, b):
    with pytest.raises(WidthError):
        unify(a, b)


def test_a_width_that_stands_twice_in_a_product():
    a, b = Width(4), Width(4)
    x, y = Axis.of(a, b), Axis.of(b, a)
    unify(x, y)
    assert freeze(x) == freeze(y) == FrozenAxis(((Cut(4), Cut(4)),))
    unify(x, Axis.of(8, 2))
    assert freeze(x) == freeze(Axis.of(a, b))


def test_a_width_in_front_of_a_concatenation_is_whole():
    """A product holds no sum, so outer · (a + b) is written out as copies, of which a part has all."""
    outer, inner = Width(2), Width(5)
    x = Axis((outer,), (outer, inner))
    split_axis(Axis.of(inner), 3)
    assert freeze(x).terms == ((2,), (Cut(3),), (Cut(2),), (Cut(3),), (Cut(2),))
    assert freeze(Axis.of(outer)).is_whole


@pytest.mark.parametrize("at", [-1, 0, 12, 13])
def test_a_cut_is_inside(at):
    with pytest.raises(WidthError, match=f"cannot cut an axis of 12 channels at {at}"):
        split_axis(Axis.of(Width(12)), at)


def test_what_fails_leaves_nothing_behind():
    """Fifteen channels times 3 beside twelve times 6, in three: the first cut works, the second does not."""
    x = Axis((Width(15), 3), (Width(12), 6))
    before = [w.bound for w in x.widths()], x.terms
    with pytest.raises(WidthError, match="cannot cut"), transaction():
        _, rest = split_axis(x, 39)
        assert len(x.resolve().terms) == 3
        split_axis(rest, 39)
    assert ([w.bound for w in x.widths()], x.terms) == before


def test_a_normal_form_that_does_not_exist_changes_nothing():
    """The first term makes `outer` whole, the second is a concatenation behind a spatial extent."""
    outer, inner = Width(2), Width(5)
    x = Axis((outer, inner), (Window(4, (0, 2), (2, 2)), inner))
    split_axis(Axis.of(inner), 3)
    with pytest.raises(WidthError, match="spatial extent"):
        x.resolve()
    assert outer.bound is None and x.terms[0] == (outer, inner)


def test_inside_a_transaction_a_refusal_is_undone_alone():
    a, b, head = Axis.of(Width(6)), Axis.of(Width(6)), Width(4)
    with transaction():
        unify(a, b)
        with pytest.raises(WidthError, match="share no factor"):  # the heads were equal
            unify(Axis((head,), (4, Width(6))), Axis((Width(4),), (Width(3), 8)))
        assert head.bound is None
    assert a.resolve() == b.resolve()


def test_split_axis_inside_repeated_copies():
    x = Axis.of(3, Width(4))
    head, tail = split_axis(x, 6)
    assert head.size == 6 and tail.size == 6
    frozen = freeze(x)  # the cut inside one copy refines the Width in all three
    assert [t[0].size for t in frozen.terms] == [2] * 6


AXES = [
    FrozenAxis(((Cut(10),),)),
    FrozenAxis(((Cut(8), 3),)),
    FrozenAxis(((2, Cut(7), 2),)),
    FrozenAxis(((Cut(5),), (Cut(6), 2), (2, Cut(4)))),
]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_index_has_one_owner(axis, parts):
    indices = [axis.index(k, parts) for k in range(parts)]
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(axis.size))
    assert [len(i) for i in indices] == [axis.part_size(k, parts) for k in range(parts)]


def test_index_counts_in_mixed_radix():
    """outer · width · inner by hand: part 1 of 2·w(4)·3 with K = 2 owns rows 2 and 3 of each outer half."""
    axis = FrozenAxis(((2, Cut(4), 3),))
    expected = [o * 12 + i * 3 + j for o in range(2) for i in (2, 3) for j in range(3)]
    assert axis.index(1, 2).tolist() == expected


def test_window_indices():
    axis = FrozenAxis(((Cut(2), Window(4, (0, 2), (3, 2))),))
    assert axis.index(0, 2).tolist() == [0, 1, 2]
    assert axis.index(1, 2).tolist() == [6, 7]


@pytest.mark.parametrize("axis", [*AXES, FrozenAxis(((3, Window(5, (0, 2), (3, 3))), (7,)))])
def test_json_round_trip(axis):
    assert FrozenAxis.from_json(axis.to_json()) == axis
