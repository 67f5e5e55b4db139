"""Boxes: sizes of the paper, coverage, bad input; crops are views."""

import json

import pytest
import torch

import timm_dd
from timm_dd import Box, Domain, SplitError
from timm_dd.algebra.domain import default_domain


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
    seen = covered(domain, *size)
    assert int(seen.min()) == 1
    assert overlap or int(seen.max()) == 1  # (2.6): without overlap, exactly once


def covered(domain, *size):
    """How many boxes see each pixel."""
    seen = torch.zeros(size, dtype=torch.int)
    for box in domain.boxes(size):
        box.crop(seen[None, None]).add_(1)
    return seen


@pytest.mark.parametrize("size", [(32,), (33,), (32, 32), (31, 47), (16, 17, 18)])
@pytest.mark.parametrize("overlap", [0, 3])
def test_eight_boxes_share_the_centre(size, overlap):
    """gu2022 Fig. 3.4: as large as half the image, all reaching its centre, every pixel covered."""
    boxes = Domain.centered8(overlap).boxes(size)
    assert len(set(boxes)) == 8 and {b.extent for b in boxes} == {tuple(-(-n // 2) + overlap for n in size)}
    assert all(s <= n / 2 <= s + e for b in boxes for s, e, n in zip(b.start, b.extent, size))
    assert int(covered(Domain.centered8(overlap), *size).min()) >= 1


def test_eight_boxes_in_two_dimensions():
    starts = [b.start for b in Domain.centered8().boxes((32, 32))]
    assert starts == [(0, 0), (0, 8), (0, 16), (8, 0), (8, 16), (16, 0), (16, 8), (16, 16)]
    boxes = Domain.centered8(overlap=4, margin=24).boxes((224, 224))
    assert {b.extent for b in boxes} == {(92, 92)} and boxes[-1].start == (108, 108) and boxes[0].start == (24, 24)


def test_type_b():
    """klawonn2023 Fig. 3, right: 3×3 boxes of 180×180 without overlap, and 2×2 across the inner corners."""
    boxes = Domain.type_b(3).boxes((180, 180))
    assert boxes[:9] == Domain.grid(3, 3).boxes((180, 180))
    assert [b.start for b in boxes[9:]] == [(30, 30), (30, 90), (90, 30), (90, 90)]
    assert {b.extent for b in boxes} == {(60, 60)}
    assert [Domain.type_b(p, axes).parts for p, axes in ((1, 2), (3, 1), (2, 2), (2, 3))] == [1, 5, 5, 9]
    assert int(covered(Domain.type_b(3), 31, 47)[:5].max()) == 1


def test_custom_boxes():
    boxes = [Box((0, 0), (20, 32)), Box((10, 4), (22, 8))]
    assert Domain.custom(boxes).boxes((32, 32)) == tuple(boxes)
    parts = timm_dd.split("dd_resnet32", 2, domain=Domain.custom(boxes))
    assert [c.shape[2:] for c in parts.crops(torch.randn(1, 3, 32, 32))] == [(20, 32), (22, 8)]


@pytest.mark.parametrize(
    "domain",
    [
        Domain.full(3),
        Domain.grid(2, 3, overlap=1, margin=2),
        Domain.centered8(2, 1),
        Domain.type_b(2, axes=3),
        Domain.custom([Box((1,), (2,))]),
    ],
    ids=str,
)
def test_domains_are_json(domain):
    assert Domain.from_json(json.loads(json.dumps(domain.to_json()))) == domain


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
        (lambda: Domain.grid(2.0, 2), "at least one box"),
        (lambda: Domain.grid(2, 2, overlap=0.5), "whole numbers of pixels from 0 up, got 0.5 and 0"),
        (lambda: Domain.centered8(margin="4"), "whole numbers of pixels from 0 up, got 0 and '4'"),
        (lambda: Domain.type_b(2.5), "at least one box"),
        (lambda: Domain.custom([4]), "expected boxes of whole pixels"),
        (lambda: Domain.custom([Box((0.5, 0), (4, 4))]), "expected boxes of whole pixels"),
        (lambda: Domain.grid(2, 2, overlap=-1), "from 0 up"),
        (lambda: Domain.grid(2, 2, overlap=17).boxes((32, 32)), "largest overlap here is 16"),
        (lambda: Domain.grid(2, 2, margin=16).boxes((32, 32)), "do not fit"),
        (lambda: Domain.grid(2, 2).boxes((32,)), "has 2 axes"),
        (lambda: Domain.full(0), "whole number from 1 up"),
        (lambda: Domain.centered8(overlap=-1), "from 0 up"),
        (lambda: Domain.centered8(overlap=17).boxes((32, 32)), "largest overlap here is 16"),
        (lambda: Domain.centered8().boxes((4, 4, 4, 4)), "one, two or three axes"),
        (lambda: Domain.type_b(0), "at least one box"),
        (lambda: Domain.type_b(5).boxes((4, 32)), "5 boxes do not fit into 4 of the 4 pixels"),
        (lambda: Domain.type_b(3).boxes((32,)), "has 2 axes"),
        (lambda: Domain.custom([]), "as many starts and extents"),
        (lambda: Domain.custom([Box((0, 0), (4,))]), "as many starts and extents"),
        (lambda: Domain.custom([Box((0, -1), (4, 4))]), "starts at a pixel from 0 up"),
        (lambda: Domain.custom([Box((0, 0), (4, 0))]), "at least one along every axis"),
        (lambda: Domain.custom([Box((0, 30), (4, 4))]).boxes((32, 32)), "leaves the image of 32×32"),
    ],
)
def test_bad_domains(make, message):
    with pytest.raises(SplitError, match=message):
        make()


def test_the_largest_overlap_of_the_message_works():
    assert {b.extent for b in Domain.grid(2, 2, overlap=16).boxes((32, 32))} == {(32, 32)}
