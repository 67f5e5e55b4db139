"""Networks of timm, one or two of each file, and ways to ask for them. The whole zoo: benchmarks/zoo.py."""

import pytest
import timm
import torch
import torchvision
from conftest import NARROW, check_split

import timm_dd
from timm_dd import Domain, SplitError
from timm_dd.planning.plan import Plan

pytestmark = pytest.mark.slow

EXACT = """
    resnet10t resnet26d resnext26ts seresnet33ts test_resnet resnetblur50 dla34 dpn48b
    efficientnet_cc_b0_4e tf_efficientnet_lite0 mixnet_s ese_vovnet19b_dw ese_vovnet39b_evos fasternet_t0 fastvit_t8
    ghostnet_050 ghostnetv2_100 hardcorenas_a hgnet_tiny hrnet_w18_small inception_v3 lcnetv2_small
    mobilenetv3_small_050 mobilenetv4_conv_small_035 nf_regnet_b0 nf_resnet26 test_nfnet cspdarknet53
    cs3darknet_focus_s cspnext_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1
    res2next50 resnest14d resnet50_clip resnetv2_50x1_bit resnetv2_50d_frn rexnet_100 selecsls42 skresnet18
    starnet_s1 legacy_seresnet18 tresnet_m xception41 convmixer_768_32
""".split()  # fmt: skip
APPROXIMATE = {
    "bat_resnext26ts": "not linear on a sum",
    "convnext_atto": "normalises over channels",
    "convnextv2_atto": "normalises over channels",
    "convnext_zepto_rms": "normalises over channels",
    "eca_resnet33ts": "along channels",
    "efficientnet_b0_gn": "groups do not divide",
    "focalnet_tiny_srf": "normalises over channels",
    "gcresnext26ts": "not linear on a sum",
    "hgnetv2_b0": "each part trains its own copy",
    "inception_next_atto": "normalises over channels",
    "mambaout_femto": "normalises over channels",
    "mobilenetv4_hybrid_medium_075": "multiplies a sum",
    "poolformer_s12": "groups do not divide",
    "rdnet_tiny": "normalises over channels",
    "test_efficientnet_evos": "groups do not divide",
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    check_split(timm_dd.split(name, 4, domain=Domain.full(4)))


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate(name):
    check_split(timm_dd.split(name, 4, domain=Domain.full(4)), APPROXIMATE[name])


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("name", ["resnest14d", "regnetx_002", "cspnext_tiny", "dpn48b", "nf_resnet26"])
def test_other_numbers_of_parts(name, parts):
    check_split(timm_dd.split(name, parts, domain=Domain.full(parts)))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("resnet18", {"in_chans": 1}),
        ("resnet26", {"output_stride": 16}),
        ("resnet18", {"drop_path_rate": 0.2}),
        ("resnet18", {"global_pool": "catavgmax"}),
        ("resnet18", {"num_classes": 0}),
        ("resnet18", {"num_classes": 0, "global_pool": ""}),
        ("resnet18", {"features_only": True}),
        ("efficientnet_b0", {"features_only": True, "out_indices": (1, 3)}),
        ("resnet26", {"block_args": {"attn_layer": "se"}}),
        ("inception_v3", {"aux_logits": True}),
        ("densenet121", {"memory_efficient": True}),
    ],
)
def test_variants(name, kwargs):
    check_split(timm_dd.split(name, 3, domain=Domain.full(3), **kwargs))


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("alexnet", 64, None),
        ("mnasnet0_5", 64, None),
        ("shufflenet_v2_x0_5", 64, "cuts through channels that belong together"),
        ("squeezenet1_1", 64, "not linear on a sum"),
        ("video/r3d_18", (4, 32, 32), None),
        ("segmentation/lraspp_mobilenet_v3_large", 64, None),
    ],
)
def test_torchvision(name, size, reason):
    module, _, name = name.rpartition("/")
    weights = {"weights": None, "weights_backbone": None} if module == "segmentation" else {"weights": None}
    size = (size, size) if isinstance(size, int) else size
    model = torchvision.models.get_model(name, **weights)
    check_split(timm_dd.split(model, 4, domain=Domain.full(4), example_input=torch.empty(1, 3, *size)), reason)


def test_a_model_that_does_not_run_is_an_error():
    with pytest.raises(SplitError, match="does not run on images of 3×64×64: stages_2_0_attn_ba: AssertionError; "):
        timm_dd.split("bat_resnext26ts", 3, img_size=64, domain=Domain.full(3))


def test_features_have_the_places_of_the_model():
    parts = timm_dd.split("resnet18", 3, num_classes=0, domain=Domain.full(3))
    features = torch.stack([part.eval()(torch.randn(1, 3, 64, 64))[0] != 0 for part in parts])
    assert features.shape == (3, 512)
    assert (features.sum(0) <= 1).all()


def test_parts_stack_every_output():
    parts = timm_dd.split("resnet18", 4, features_only=True, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    stacked = parts(x)
    assert [tuple(t.shape[:3]) for t in stacked] == [(4, 2, c) for c in (64, 64, 128, 256, 512)]
    assert torch.equal(stacked[2][1], parts[1](parts.crops(x)[1])[2])


def test_narrow_widths_are_replicated_or_an_error():
    with pytest.warns(UserWarning, match=r"whole in every part: Conv2d blocks.1.0.se.conv_reduce \(.*\) of 2;") as said:
        parts = timm_dd.split("tinynet_e", 4, domain=Domain.full(4))
    assert [w.filename for w in said] == [__file__]
    assert parts.plan.narrow == (("Conv2d blocks.1.0.se.conv_reduce (node blocks_1_0_se_conv_reduce)", 2),)
    assert Plan.from_json(parts.plan.to_json()) == parts.plan
    assert {path for _, path, _ in parts.plan.approximations} == {"blocks.1.0.se.act1"}
    check_split(parts, "not linear on a sum")
    with pytest.raises(SplitError, match=r"blocks.1.0.se.conv_reduce .* has 2 channels .* largest K .* 2$"):
        timm_dd.split("tinynet_e", 4, domain=Domain.full(4), narrow="refuse")
    with pytest.raises(SplitError, match="'refuse', got 'copy'"):
        timm_dd.split("tinynet_e", 4, narrow="copy")


def test_a_filter_of_one_input_cannot_be_standardised():
    with pytest.raises(SplitError, match="needs two in each of 8 parts"):
        timm_dd.split("test_nfnet", 8, domain=Domain.full(8), narrow="refuse")
    with pytest.warns(UserWarning, match=NARROW):
        parts = timm_dd.split("test_nfnet", 8, domain=Domain.full(8))
    check_split(parts, "standardises each filter over the input channels")


def test_the_largest_models_are_split_without_weights():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_l2")
    x = torch.empty(1, 3, 800, 800, device="meta")
    parts = timm_dd.split(model, 4, domain=Domain.full(4), example_input=x)
    assert parts.plan.exact
    assert all(part(x).shape == (1, 1000) for part in parts)
    for name, t in parts[3].state_dict().items():
        assert t.is_meta and tuple(t.shape) == parts.plan.tensors[name].part_shape(3, 4)
