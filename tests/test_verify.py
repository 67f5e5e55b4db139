"""`verify` finds what is wrong, and nothing where all is right."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, images, shake
from test_theorem import ALIGNED, FEATURES, Sequence, Valid, mlp, split
from torch import nn

import timm_dd
from timm_dd import Box, Domain, MergeError, SplitError
from timm_dd.reports.verify import verify


def checked(name, parts, domain=None, **kwargs):
    split = shake(timm_dd.split(name, parts, domain=domain, **kwargs))
    return verify(timm_dd.merge(split), split)


@pytest.mark.parametrize("size, domain", ALIGNED, ids=lambda v: str(v))
def test_valid_padding_is_claimed_and_holds_on_boxes(size, domain):
    parts, merged = split(Valid(len(size), size), domain, images(1, 2, *size))
    report = verify(merged, parts)
    assert report.exact and report.box_exact and report.failures == []
    assert report.box <= 1e-12 and all(row.field == 1 and row.box <= 1e-12 for row in report.layers)


@pytest.mark.parametrize("domain", FEATURES, ids=str)
def test_features_are_claimed_and_hold_on_boxes(domain):
    for model, shape, options in (
        (mlp([21, 24, 17, 5]), (21,), {}),
        (mlp([21, 24, 21]), (21,), {"reconstruct": True}),
        (Sequence(nn.LSTM, 21), (5, 21), {}),
    ):
        parts, merged = split(model, domain, images(1, *shape), **options)
        report = verify(merged, parts)
        assert report.box_exact and report.box <= 1e-12 and report.failures == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts, domain, size",
    [
        ("resnet10t", 4, Domain.grid(2, 2), 64),
        ("resnet10t", 4, Domain.grid(2, 2, overlap=7), 65),
        ("resnet10t", 8, Domain.centered8(overlap=3), 64),
        ("resnet10t", 5, Domain.type_b(2), 64),
        ("vgg11", 4, Domain.grid(2, 2), 224),
        ("hrnet_w18_small", 2, Domain.grid(1, 2), 64),
        ("convnext_atto", 4, Domain.grid(2, 2), 64),
        ("tinynet_e", 4, None, 64),
        ("dd_vgg3", 4, Domain.grid(2, 2), 32),
        ("densenet121", 2, Domain.grid(2, 1, overlap=5), 64),
        ("tf_mobilenetv3_small_minimal_100", 4, Domain.grid(2, 2), 65),  # padding that depends on the size
        ("tf_mobilenetv3_small_minimal_100", 4, Domain.grid(2, 2), 64),
    ],
)
@pytest.mark.filterwarnings(f"ignore:{NARROW}")
def test_no_false_alarm(name, parts, domain, size):
    """Padding, misaligned boxes, pooling and approximations: claims are made only where they hold."""
    report = checked(name, parts, domain, img_size=size)
    assert report.failures == []
    assert not report.box_exact  # padding


def test_the_activation_field_of_padded_convolutions():
    """A 3×3 convolution with padding loses one position on each side that lies inside the image."""
    convs = [nn.Conv2d(a, 8, 3, padding=1) for a in (2, 8)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    parts = shake(timm_dd.split(net, 4, example_input=torch.empty(1, 2, 16, 16), domain=Domain.grid(2, 2)))
    rows = verify(timm_dd.merge(parts), parts).layers
    assert [row.field for row in rows] == [(7 / 8) ** 2, (6 / 8) ** 2, 0]
    assert rows[0].box <= 1e-12 and rows[1].box <= 1e-12 and rows[2].box is None


def test_positions_that_no_pixel_moves_are_not_compared():
    """Adaptive pooling to 2×2 means other pixels in a part."""
    pooled = (nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(8), nn.Flatten(), nn.BatchNorm1d(32))
    net = nn.Sequential(nn.Conv2d(2, 8, 1), *pooled, nn.Linear(32, 3))
    parts = shake(timm_dd.split(net, 4, example_input=torch.empty(1, 2, 16, 16), domain=Domain.grid(2, 2)))
    report = verify(timm_dd.merge(parts), parts)
    assert report.failures == []
    assert report.layers[0].box <= 1e-12 and [row.box for row in report.layers[1:]] == [None] * 3


def test_a_resampling_that_aligns_corners_is_not_compared():
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), up, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    parts = shake(timm_dd.split(net, 4, example_input=torch.empty(1, 2, 16, 16), domain=Domain.grid(2, 2)))
    report = verify(timm_dd.merge(parts), parts)
    assert report.failures == [] and [row.box is None for row in report.layers] == [False, True, True]


@pytest.mark.parametrize("first", [0, 1])
def test_one_part_may_see_the_whole_image(first):
    """Beside another that sees a box."""
    own = [Box((0, 0), (16, 16)), Box((0, 8), (16, 8))]
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    domain = Domain.custom(own[first:] + own[:first])
    parts = shake(timm_dd.split(net, 2, example_input=torch.empty(1, 2, 16, 16), domain=domain))
    report = verify(timm_dd.merge(parts), parts)
    assert report.failures == [] and report.layers[0].box <= 1e-12
    assert report.layers[0].field == (16 * 16 + 16 * 7) / (16 * 16 + 16 * 8)


def test_a_sum_at_positions_that_one_part_sees_is_not_compared():
    """A convolutional classifier: at a position of box k the composed network adds the channels of all parts."""
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = shake(timm_dd.split(net, 4, example_input=torch.empty(1, 2, 16, 16), domain=Domain.grid(2, 2)))
    report = verify(timm_dd.merge(parts), parts)
    assert report.failures == [] and report.layers[1].whole <= 1e-12 and report.layers[1].box is None


def test_a_model_that_was_trained_further_fails():
    parts = shake(timm_dd.split("resnet10t", 4, img_size=64, num_classes=5))
    merged = timm_dd.merge(parts)
    with torch.no_grad():
        merged.layer1[0].conv1.weight.add_(1e-6)  # blocks and zeros alike
    failures = verify(merged, parts).failures
    assert any("layer1.0.conv1, whole image" in f for f in failures)
    assert any("layer1.0.conv1, own box" in f for f in failures)
    assert any("sum of the parts' outputs, whole image" in f for f in failures)
    assert not any(f.startswith("conv1.") for f in failures)


def test_a_block_in_the_wrong_place_fails():
    parts, merged = split(Valid(2, (16, 24)), Domain.grid(2, 2), images(1, 2, 16, 24))
    merged.fc1.weight.data = merged.fc1.weight.data.roll(1, 1)
    report = verify(merged, parts)
    assert any("fc1, own box" in f for f in report.failures)
    assert "FAILED sum of the parts' outputs, own box" in report.text()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_what_merge_sums_is_rounded(dtype, most):
    """A summed bias is rounded as it is stored; blocks that are placed keep all digits."""
    parts = shake(timm_dd.split("resnet10t", 4, img_size=64)).to(dtype)
    report = verify(timm_dd.merge(parts), parts)
    assert report.failures == [] and 1e-9 < report.tolerance <= most
    assert all(row.whole <= 1e-12 for row in report.layers[:-1])
    bare = shake(timm_dd.split("resnet10t", 4, img_size=64, num_classes=0)).to(dtype)
    assert verify(timm_dd.merge(bare), bare).tolerance == 1e-9


def test_weights_that_are_not_finite_fail():
    for domain in (Domain.full(4), Domain.grid(2, 2)):
        parts = shake(timm_dd.split("resnet10t", 4, img_size=64, domain=domain))
        merged = timm_dd.merge(parts)
        merged.layer1[0].conv1.weight.data[0] = torch.nan
        assert any("layer1.0.conv1, whole image" in f for f in verify(merged, parts).failures)


def test_a_mean_head():
    parts, _ = split(mlp([21, 24, 17, 5]), Domain.grid(4), images(1, 21))
    report = verify(timm_dd.merge(parts, head="mean"), parts, head="mean")
    assert report.failures == [] and report.box <= 1e-12
    assert verify(timm_dd.merge(parts, head="mean"), parts).failures != []


def test_parts_that_cannot_be_merged_are_refused():
    parts = timm_dd.split("resnet10t", 4, width_divisor=2)
    with pytest.raises(MergeError, match="divided by 2"):
        verify(timm_dd.models.create("resnet10t"), parts)


def test_it_takes_the_graph_from_the_parts(counts, tmp_path):
    """Parts that were split or loaded have been traced; what a plan claims of each layer is analysed once."""
    parts = shake(timm_dd.split("resnet10t", 2, img_size=64, num_classes=5))
    model = timm_dd.merge(parts)
    counts.clear()
    assert verify(model, parts).failures == []
    assert counts == {"plan": 1}
    parts.save(tmp_path)
    counts.clear()
    assert verify(model, timm_dd.Parts.load(tmp_path)).failures == []
    assert counts == {"trace": 1, "plan": 1}


def test_constants_that_no_state_dict_has():
    report = checked("resnetblur18", 2, img_size=64, num_classes=2)
    assert report.failures == [] and report.exact


@pytest.mark.parametrize("options", [{"num_classes": 4}, {"stem_width": 16}])
def test_another_model_is_refused(options):
    parts = timm_dd.split("resnet10t", 2, img_size=64, num_classes=5)
    with pytest.raises(SplitError, match="this ResNet is not the network that was split: .* expected"):
        verify(timm_dd.models.create("resnet10t", **options), parts)


# ---- theorem 2.2


def labelled(parts, n=40):
    """Random images whose labels many parts agree on, in batches."""
    x = images(n, *parts.plan.input_size, seed=3)
    with torch.no_grad():
        y = parts(x).sum(0).argmax(1)
    y[::4] = (y[::4] + 1) % 5
    return list(zip(x.split(16), y.split(16)))


def test_labelled_images_are_as_fine_as_the_parts():
    """A loader gives float32, whatever the parts have."""
    parts, merged = split(Valid(2, (16, 16)), Domain.grid(1, 2), images(1, 2, 16, 16))
    batches = labelled(parts)
    coarse = [(x.float(), y) for x, y in batches]
    expected, found = (verify(merged, parts, batches=given).labelled for given in (batches, coarse))
    assert (*found.losses, found.loss) == pytest.approx((*expected.losses, expected.loss), rel=1e-4)


@torch.no_grad()
def test_losses_and_bound():
    """(2.19) image by image, in plain Python."""
    parts, merged = split(Valid(2, (16, 16)), Domain.grid(1, 2), images(1, 2, 16, 16))
    batches = labelled(parts)
    d = verify(merged, parts, batches=batches).labelled
    bound, common, kept, total, own = 0.0, 0, 0, 0.0, [0.0, 0.0]
    for x, y in ((x[None], y[None]) for batch in batches for x, y in zip(*batch)):
        z = [part(crop) for part, crop in zip(parts, parts.crops(x))]
        losses = [float(F.cross_entropy(logits, y)) for logits in z]
        own = [total + r for total, r in zip(own, losses)]
        known = [int(logits.argmax()) == int(y) for logits in z]
        bound += min((r for r, ok in zip(losses, known) if ok), default=0) + sum(
            r for r, ok in zip(losses, known) if not ok
        )
        total += float(F.cross_entropy(merged(x), y))
        common += all(known)
        kept += all(known) and int(merged(x).argmax()) == int(y)
    assert d.images == 40 and 0 < d.common == common == d.kept == kept
    assert d.bound == pytest.approx(bound / 40) and d.loss == pytest.approx(total / 40) and d.loss <= d.bound
    assert d.losses == pytest.approx([r / 40 for r in own])


def test_a_loss_above_its_bound_fails():
    parts, merged = split(Valid(2, (16, 16)), Domain.grid(1, 2), images(1, 2, 16, 16))
    batches = labelled(parts)
    merged.fc2.weight.data.mul_(-100)
    failures = verify(merged, parts, batches=batches).failures
    assert any("above its bound" in f for f in failures) and any("are lost" in f for f in failures)


def test_labels_of_other_classes_are_refused():
    parts, merged = split(Valid(2, (16, 16)), Domain.grid(1, 2), images(1, 2, 16, 16))
    with pytest.raises(SplitError, match="a label is 7, but the model has 5 classes"):
        verify(merged, parts, batches=[(images(1, 2, 16, 16), torch.tensor([7]))])


def test_the_report_is_a_table():
    text = checked("resnet10t", 4, img_size=64).text()
    assert re.search(r"layer +operation +whole image +own box +field +claim", text)
    assert re.search(r"fc +Linear +\d\.\de-1\d +- +0% +exact", text)
    assert text.endswith("every claim holds to 1e-09")
