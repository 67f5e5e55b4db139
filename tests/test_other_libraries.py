"""Networks of other libraries, by value: torchvision's detectors (backbone and head), segmentation_models_pytorch with
timm's encoders, Hugging Face's image classifiers."""

import pytest
import torch
from conftest import check_split
from torch import nn
from torchvision.models import segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

import timm_dd
from timm_dd import Domain

pytestmark = pytest.mark.slow
LAYERS = "normalises over channels"


def split(model, reason=None, size=64, parts=3):
    given = torch.empty(1, 3, size, size)
    check_split(timm_dd.split(model, parts, domain=Domain.full(parts), example_input=given), reason)


class Detector(nn.Module):
    """The maps of a pyramid, and what the head makes of all of them."""

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = resnet_fpn_backbone(backbone_name="resnet18", weights=None), head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


@pytest.mark.parametrize("head", [RPNHead(256, 3), RetinaNetHead(256, 9, 5)], ids=["RPN", "RetinaNet"])
def test_detectors(head):
    split(Detector(head))


def test_segmentation():
    split(segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=True, num_classes=5))


@pytest.mark.parametrize("name", ["Unet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus"])
def test_decoders_on_encoders_of_timm(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    split(getattr(smp, name)("tu-resnet10t", encoder_weights=None, classes=3))


HUGGING_FACE = {
    "ResNet": (dict(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic"), None),
    "ConvNext": (dict(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], num_stages=3), LAYERS),
    "ConvNextV2": (dict(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], num_stages=3), LAYERS),
    "ViT": (
        dict(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=6,
            intermediate_size=32,
            image_size=64,
            patch_size=16,
        ),
        LAYERS,
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_classifiers_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    options, reason = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    torch.manual_seed(0)
    split(getattr(transformers, f"{name}ForImageClassification")(config), reason)
