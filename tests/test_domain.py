"""Boxes: sizes of the paper, coverage, bad input; crops are views."""

import pytest
import torch

import timm_dd
from timm_dd import Domain, SplitError
from timm_dd.domain import default_domain


def spans(domain, *size):
    return [tuple(zip(b.start, b.extent)) for b in domain.boxes(size)]


def test_cifar_boxes_are_20_by_20():
    """Section 3.1.1: 32×32 images, boxes of 16×16 and, with overlap, 20×20."""
    assert spans(Domain.grid(2, 2), 32, 32) == [
        ((0, 16), (0, 16)), ((0, 16), (16, 16)), ((16, 16), (0, 16)), ((16, 16), (16, 16)),
    ]  # fmt: skip
    assert spans(Domain.grid(2, 2, overlap=4), 32, 32)[3] == ((12, 20), (12, 20))


def test_food101_boxes():
    """Section 3.1.2: four boxes of 140×140 of 224; sixteen of 70×70 inside the central 176×176."""
    assert {b.extent for b in Domain.grid(2, 2, overlap=28).boxes((224, 224))} == {(140, 140)}
    boxes = Domain.grid(4, 4, overlap=26, margin=24).boxes((224, 224))
    assert {b.extent for b in boxes} == {(70, 70)}
    assert min(b.start[0] for b in boxes) == 24 and max(b.start[0] + 70 for b in boxes) == 200


@pytest.mark.parametrize("size", [(7, 11), (32, 32), (33, 47)])
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_every_pixel_is_covered(size, overlap):
    domain = Domain.grid(2, 3, overlap=overlap)
    seen = torch.zeros(size, dtype=torch.int)
    for box in domain.boxes(size):
        box.crop(seen[None, None]).add_(1)
    assert int(seen.min()) == 1
    assert overlap or int(seen.max()) == 1  # (2.6): without overlap, exactly once


def test_one_and_three_dimensions():
    assert spans(Domain.grid(3), 10) == [((0, 3),), ((3, 3),), ((6, 4),)]
    assert len(Domain.grid(2, 2, 2).boxes((8, 8, 8))) == 8


@pytest.mark.parametrize(
    "parts, shape", [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (5, (1, 5)), (6, (2, 3)), (8, (2, 4)), (12, (3, 4))]
)
def test_the_default_is_the_most_square_grid(parts, shape):
    assert default_domain(parts, 2).grid_shape == shape


def test_crops_are_views():
    parts = timm_dd.split("dd_resnet32", 4, domain=Domain.grid(2, 2, overlap=4))
    x = torch.randn(2, 3, 32, 32)
    crops = parts.crops(x)
    assert [c.shape for c in crops] == [(2, 3, 20, 20)] * 4
    assert all(c.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for c in crops)
    assert torch.equal(crops[2], x[:, :, 12:, :20])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Domain.grid(0, 2), "at least one box"),
        (lambda: Domain.grid(), "at least one box"),
        (lambda: Domain.grid(2, 2, overlap=-1), "from 0 up"),
        (lambda: Domain.grid(2, 2, overlap=17).boxes((32, 32)), "largest overlap here is 16"),
        (lambda: Domain.grid(2, 2, margin=16).boxes((32, 32)), "do not fit"),
        (lambda: Domain.grid(2, 2).boxes((32,)), "has 2 axes"),
    ],
)
def test_bad_domains(make, message):
    with pytest.raises(SplitError, match=message):
        make()


def test_the_largest_overlap_of_the_message_works():
    assert {b.extent for b in Domain.grid(2, 2, overlap=16).boxes((32, 32))} == {(32, 32)}
