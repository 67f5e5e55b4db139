"""The papers' own networks: their parameters against the papers' tables, their splits, timm's interface."""

import pytest
import timm
import torch
from conftest import check_split, images

import timm_dd
from timm_dd import Domain, SplitError

YALE = dict(in_chans=1, num_classes=38)
LOCAL_VGG9 = dict(widths=(16, 32, 64, 128, 256), hidden=(64,), last_pool=False)
# As the papers count, with BatchNorm's running means and variances; the papers' own numbers in the last column.
COUNTS = [
    # gu2022 Tables 3.1 and 3.4; Keras' ResNets have biases in their convolutions
    ("dd_resnet32", {}, 7_437_770, 7.44),
    ("dd_resnet56", {}, 13_645_258, 13.65),
    ("dd_resnet110", {}, 27_612_106, 27.62),
    ("dd_resnet50_fc1024", {}, 25_762_853, 25.79),
    ("dd_resnet101_fc1024", {}, 44_807_205, 44.86),
    # klawonn2023 Table 2: CIFAR-10, TF-Flowers, Extended Yale B, chest CT; local networks have half the widths
    ("dd_vgg3", {}, 550_570, 0.5506),
    ("dd_vgg3", dict(widths=(16, 32, 64), hidden=(64,), img_size=16), 89_178, 0.0892),
    ("dd_vgg9", {}, 4_786_794, 4.7868),
    ("dd_vgg9", dict(LOCAL_VGG9, img_size=16), 1_195_866, 1.1959),
    ("dd_resnet20_16", {}, 271_786, 0.2718),
    ("dd_resnet20_16", dict(widths=(8, 16, 32)), 69_082, 0.0691),
    ("dd_vgg3", dict(img_size=180, num_classes=5), 8_217_637, 8.2178),
    ("dd_vgg3", dict(widths=(16, 32, 64), hidden=(64,), img_size=60, num_classes=5), 273_173, 0.2732),
    ("dd_vgg9", dict(img_size=180, num_classes=5), 6_359_333, 6.3593),
    ("dd_vgg9", dict(LOCAL_VGG9, img_size=60, num_classes=5), 1_326_613, 1.3266),
    ("dd_resnet20_16", dict(num_classes=5), 271_461, 0.2715),
    ("dd_resnet20_16", dict(widths=(8, 16, 32), num_classes=5), 68_917, 0.0689),
    ("dd_vgg3", dict(YALE, img_size=(192, 168)), 8_548_998, 8.5499),
    ("dd_vgg3", dict(YALE, img_size=(48, 42), widths=(16, 32, 64), hidden=(64,)), 197_206, 0.1972),
    ("dd_vgg3d", {}, 1_352_897, 1.3529),
    ("dd_vgg3d", dict(widths=(32, 32, 64, 128), hidden=256), 339_553, 0.3396),
    # in no table
    ("dd_resnet20", {}, 4_334_026, None),
    ("dd_resnet32_16", {}, 467_562, None),
    ("dd_resnet56_16", {}, 859_114, None),
    ("dd_resnet110_16", {}, 1_740_106, None),
    ("dd_cnn11", {}, 9_414_850, None),
]
DIFFER = {27.62: 3e-4, 8.2178: 3e-5, 8.5499: 2e-4, 25.79: 2e-3, 44.86: 2e-3}  # relative; all others to the last digit

# Arguments that make each small.
SMALL = {
    "dd_resnet20": dict(img_size=16),
    "dd_resnet20_16": dict(img_size=16),
    "dd_resnet20_16 with a projection": dict(img_size=16, shortcut="conv"),
    "dd_vgg3": dict(img_size=(20, 24)),
    "dd_vgg9": {},
    "dd_vgg9 on small boxes": dict(last_pool=False, img_size=16),
    "dd_resnet50_fc1024": dict(img_size=64, channels=(16, 32, 64, 128)),
    "dd_cnn11": dict(img_size=32, widths=(16, 32, 64, 64, 64)),
    "dd_vgg3d": dict(img_size=(32, 16, 16)),
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name, kwargs, count, paper", COUNTS)
def test_parameters_are_those_of_the_tables(name, kwargs, count, paper):
    state = on_meta(name, **kwargs).state_dict()
    assert sum(t.numel() for key, t in state.items() if not key.endswith("num_batches_tracked")) == count
    if paper in DIFFER:
        assert count / 1e6 == pytest.approx(paper, rel=DIFFER[paper])
    elif paper is not None:
        assert round(count / 1e6, len(str(paper).partition(".")[2])) == paper


@pytest.mark.parametrize("key", SMALL)
def test_merged_networks_are_the_sum_of_their_parts(key):
    check_split(timm_dd.split(key.split()[0], 4, domain=Domain.full(4), **SMALL[key]))


@pytest.mark.parametrize("name, widths", [("dd_resnet110_16", (16, 32, 64)), ("dd_resnet101_fc1024", (64, 256, 2048))])
def test_deep_networks_are_planned_exactly(name, widths):
    plan = timm_dd.plan(name, 4, domain=Domain.full(4))
    assert plan.exact
    assert set(widths) <= {layer.shape[0] for layer in plan.layers}


def test_every_name_is_tested():
    assert {name for name, *_ in COUNTS} == set(timm.list_models(module="paper_networks"))


@pytest.mark.parametrize("name", sorted({name for name, *_ in COUNTS}))
def test_classes_channels_and_sizes_of_the_interface(name):
    """num_classes, in_chans, the head without its classifier, a new classifier; defaults as the config says."""
    config = timm.get_pretrained_cfg(name)
    assert on_meta(name).num_classes == config.num_classes
    channels, *size = config.input_size
    model = on_meta(name, num_classes=7, in_chans=channels + 1)
    assert model.get_classifier() is model.get_submodule(config.classifier)
    if config.first_conv:
        assert model.get_submodule(config.first_conv).in_channels == channels + 1
    x = torch.empty(2, channels + 1, *size, device="meta")
    features = model.forward_features(x)
    assert model(x).shape == (2, 7)
    assert features.shape[:2] == (2, model.num_features)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size) == (2, model.fc.in_features)
    model.to_empty(device="cpu").reset_classifier(3)
    assert (model.num_classes, model.get_classifier().weight.shape) == (3, (3, model.head_hidden_size))
    model.reset_classifier(0)
    assert model.to("meta")(x).shape == hidden.shape


def test_fc_resnet_gives_its_features_without_pooling():
    model = on_meta("dd_resnet50_fc1024", num_classes=0, global_pool="")
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 2048, 2, 2)


def test_padded_shortcuts_append_zeros():
    """Option A: every second position, zeros behind the channels that are there."""
    x = images(1, 16, 8, 8)
    y = timm.create_model("dd_resnet20_16").layer2[0].downsample(x)
    assert torch.equal(y[:, :16], x[..., ::2, ::2])
    assert y.shape == (1, 32, 4, 4) and not y[:, 16:].any()


def test_flattened_positions_of_a_box_have_their_place():
    """(2.13): of the 4×4 positions of VGG3 each part has the 2×2 of its box."""
    weight = timm_dd.plan("dd_vgg3", 4).tensors["head.1.weight"]
    assert weight.shape == (128, 128 * 16)
    assert weight.part_shape(3, 4) == (32, 32 * 4)
    assert weight.index(3, 4)[1][:4].tolist() == [16 * 96 + p for p in (10, 11, 14, 15)]


def test_volumes_are_split_in_boxes():
    plan = timm_dd.plan("dd_vgg3d", 4, domain=Domain.grid(2, 2, 1))
    assert plan.exact and plan.input_size == (1, 128, 128, 64)
    assert plan.layers[0].part_shapes[0] == (16, 64, 64, 64)
    assert timm_dd.plan("dd_vgg3d", 32, domain=Domain.grid(4, 4, 2)).exact


@pytest.mark.parametrize("name, size", [("dd_vgg3", (24, 16)), ("dd_vgg3d", (16, 16, 32))])
def test_composed_networks_load_in_timm(tmp_path, name, size):
    parts = timm_dd.split(name, 2, img_size=size, num_classes=3)
    parts.save(tmp_path / "parts")
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    model = timm.create_model(f"local-dir:{tmp_path / 'composed'}", pretrained=True)
    assert timm_dd.models.input_size(model, size) == parts.plan.input_size
    expected = timm_dd.merge(parts).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: timm_dd.plan("dd_vgg9", 4), "use larger boxes"),
        (lambda: timm_dd.plan("dd_vgg9", 4, img_size=16), "use 32 pixels or more"),
        (lambda: timm_dd.plan("dd_vgg3d", 4, img_size=(64, 64)), "expected pixels, or 3 numbers"),
        (lambda: timm_dd.plan("dd_cnn11", 4, img_size=(64, 64, 64)), r"expected pixels, or \(height, width\)"),
        (lambda: timm_dd.plan("dd_resnet20", 4, shortcut="none"), "shortcut is 'conv' or 'pad', got 'none'"),
    ],
)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(SplitError, match=message):
        call()
