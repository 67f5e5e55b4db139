"""The networks of the papers that timm does not have, registered with timm under names that begin with ``dd_``.

gu2022: ``dd_resnet20``, 32, 56 and 110 (3.1.1), ``dd_resnet50_fc1024`` and 101 (3.1.2), ``dd_cnn11`` (3.1.3).
klawonn2023: ``dd_vgg3``, ``dd_vgg9``, ``dd_resnet20_16``, 32, 56 and 110 (4.1 to 4.3), ``dd_vgg3d`` (4.4).

The papers count BatchNorm's running means and variances among the parameters, as Keras does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

_CIFAR = dict(
    url="", num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), classifier="fc", license="apache-2.0",
)  # fmt: skip
_IMAGENET = dict(
    url="", input_size=(3, 224, 224), crop_pct=1.0, interpolation="bilinear", mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD, classifier="fc", license="apache-2.0",
)  # fmt: skip
_RESNET = dict(_CIFAR, first_conv="conv1", pool_size=(8, 8))
_VGG = dict(_CIFAR, first_conv="features.0.0", fixed_input_size=True)
_FC = dict(_IMAGENET, num_classes=101, first_conv="conv1", pool_size=(7, 7))
_CHEST = dict(  # no first_conv: timm takes only 2D kernels to other channels
    url="", num_classes=1, input_size=(1, 128, 128, 64), crop_pct=1.0, mean=(0.0,), std=(1.0,), first_conv=None,
    classifier="fc", license="apache-2.0",
)  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        **{f"dd_resnet{depth}{width}.untrained": _RESNET for depth in (20, 32, 56, 110) for width in ("", "_16")},
        **{f"dd_vgg{stacks}.untrained": _VGG for stacks in (3, 9)},
        **{f"dd_resnet{depth}_fc1024.untrained": _FC for depth in (50, 101)},
        "dd_cnn11.untrained": dict(_IMAGENET, num_classes=2, first_conv="features.0.0", pool_size=(7, 7)),
        "dd_vgg3d.untrained": _CHEST,
    }
)


class Network(nn.Module):
    """timm's interface to a network of `features`, a `head` without classes and the classifier `fc`.

    Attributes:
        num_features: channels of the features.
        head_hidden_size: what the classifier takes.
    """

    features: nn.Module
    head: nn.Module

    def __init__(self, num_classes: int, in_chans: int, num_features: int, head_hidden_size: int):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features, self.head_hidden_size = num_features, head_hidden_size

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = _classifier(self.head_hidden_size, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _classifier(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _initialise(model: nn.Module, mode: str = "fan_in") -> None:
    """He's normal weights and no biases in all convolutions."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ---- residual networks for CIFAR


class CifarResNet(Network):
    """Stem, three stages of n basic blocks at strides 1, 2, 2, global average pooling, classifier: 6n + 2 layers.

    Args:
        shortcut: where width or stride changes, ``conv``, a 1×1 convolution with BatchNorm, or ``pad``, `PadShortcut`.
        bias: whether the convolutions have biases.

    Source: gu2022 section 3.1.1. With ``conv`` dd_resnet32 has the 7.44 M parameters of Table 3.1.
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (64, 128, 256),
        shortcut: str = "conv",
        bias: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, widths[-1], widths[-1])
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        stages, width = [], widths[0]
        for stage, out in enumerate(widths):
            blocks = []
            for i in range((depth - 2) // 6):
                stride = 2 if stage and not i else 1
                blocks.append(BasicBlock(width, out, stride, _shortcut(shortcut, width, out, stride)))
                width = out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate))
        self.fc = _classifier(width, num_classes)
        if bias:  # timm's block has none
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    m.bias = nn.Parameter(torch.zeros(m.out_channels))
        _initialise(self, "fan_out")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _shortcut(kind: str, width: int, out: int, stride: int) -> nn.Module | None:
    if kind not in ("conv", "pad"):
        raise ValueError(f"shortcut is 'conv' or 'pad', got {kind!r}")
    if stride == 1 and width == out:
        return None
    if kind == "pad":
        return PadShortcut(out - width, stride)
    return nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class PadShortcut(nn.Module):
    """Every `stride`-th position, and `more` channels of zeros: option A of He et al., 2016, section 4.2."""

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def _cifar_resnet(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, depth=depth, **kwargs)


def _cifar_resnet_16(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    """Widths 16-32-64, biases, shortcuts without parameters: so ResNet20 has what Table 2 of klawonn2023 counts."""
    kwargs = {"widths": (16, 32, 64), "shortcut": "pad", "bias": True, **kwargs}
    return _cifar_resnet(variant, depth, pretrained, **kwargs)


@register_model
def dd_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet20 in the widths of gu2022 section 3.1.1, which begins at ResNet32."""
    return _cifar_resnet("dd_resnet20", 20, pretrained, **kwargs)


@register_model
def dd_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet32 of gu2022 Table 3.1: 7.44 M parameters at 10 classes."""
    return _cifar_resnet("dd_resnet32", 32, pretrained, **kwargs)


@register_model
def dd_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet56 of gu2022 Table 3.1: 13.65 M parameters."""
    return _cifar_resnet("dd_resnet56", 56, pretrained, **kwargs)


@register_model
def dd_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet110 of gu2022 Table 3.1: 27.61 M parameters, 27.62 M in the table."""
    return _cifar_resnet("dd_resnet110", 110, pretrained, **kwargs)


@register_model
def dd_resnet20_16(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet20 of klawonn2023 Table 2: 0.2718 M parameters at 10 classes, 0.2715 M at 5."""
    return _cifar_resnet_16("dd_resnet20_16", 20, pretrained, **kwargs)


@register_model
def dd_resnet32_16(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`dd_resnet20_16` with 32 layers."""
    return _cifar_resnet_16("dd_resnet32_16", 32, pretrained, **kwargs)


@register_model
def dd_resnet56_16(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`dd_resnet20_16` with 56 layers."""
    return _cifar_resnet_16("dd_resnet56_16", 56, pretrained, **kwargs)


@register_model
def dd_resnet110_16(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`dd_resnet20_16` with 110 layers."""
    return _cifar_resnet_16("dd_resnet110_16", 110, pretrained, **kwargs)


# ---- VGG for small images


class SmallVgg(Network):
    """Stacks of two 3×3 convolutions with ReLU, a 2×2 max pooling and dropout; fully connected layers with ReLU.

    Args:
        widths: of the convolutions, one for each stack.
        hidden: of the fully connected layers before the classifier.
        img_size: pixels, or (height, width): the flattened features are what is left of them.
        last_pool: whether the last stack is followed by a pooling too.
        drop_rate: after each stack.

    Source: klawonn2023 section 4.1.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 32,
        last_pool: bool = True,
        drop_rate: float = 0.2,
    ):
        pools = len(widths) if last_pool else len(widths) - 1
        height, width = (n // 2**pools for n in to_2tuple(img_size))
        if not height * width:
            raise ValueError(f"{pools} poolings leave nothing of img_size {img_size}; use {2**pools} pixels or more")
        super().__init__(num_classes, in_chans, widths[-1], hidden[-1])
        ins = (in_chans, *widths)
        stacks = [[*_vgg_convs(a, b), nn.MaxPool2d(2), nn.Dropout(drop_rate)] for a, b in zip(ins, widths)]
        if not last_pool:
            del stacks[-1][-2]
        self.features = nn.Sequential(*(nn.Sequential(*stack) for stack in stacks))
        ins = (widths[-1] * height * width, *hidden)
        layers = [layer for a, b in zip(ins, hidden) for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        self.head = nn.Sequential(nn.Flatten(), *layers)
        self.fc = _classifier(hidden[-1], num_classes)
        _initialise(self)


def _vgg_convs(width: int, out: int) -> list[nn.Module]:
    layers = ((nn.Conv2d(n, out, 3, padding=1), nn.ReLU(inplace=True)) for n in (width, out))
    return [layer for pair in layers for layer in pair]


def _small_vgg(variant: str, pretrained: bool, **kwargs: Any) -> SmallVgg:
    return build_model_with_cfg(SmallVgg, variant, pretrained, **kwargs)


@register_model
def dd_vgg3(pretrained: bool = False, **kwargs: Any) -> SmallVgg:
    """VGG3 of klawonn2023 section 4.1: three stacks, 0.5506 M parameters at 32×32 pixels and 10 classes (Table 2).

    With 180×180 pixels and 5 classes (TF-Flowers) it has 8.2176 M, with 192×168 pixels, 1 channel and 38 classes
    (Extended Yale B) 8.5490 M. Table 2 has 8.2178 M and 8.5499 M, as of 6 and 45 classes, but its local networks are
    those of 5 and 38.
    """
    return _small_vgg("dd_vgg3", pretrained, **{"widths": (32, 64, 128), "hidden": (128,), **kwargs})


@register_model
def dd_vgg9(pretrained: bool = False, **kwargs: Any) -> SmallVgg:
    """VGG9 of klawonn2023: two more stacks than VGG3, and a second fully connected layer.

    The paper does not say what its layers are: these are derived from the four counts of Table 2 (4.7868 M at 32×32
    pixels and 10 classes, 6.3593 M at 180×180 and 5, 1.1959 M and 1.3266 M in the local networks), and give its FLOPs
    too. The local networks have half the widths, one fully connected layer of 64 and no fifth pooling, which boxes of
    16×16 pixels do not survive: boxes of fewer than 32 pixels need ``last_pool=False`` here too.
    """
    widths = (32, 64, 128, 256, 512)
    return _small_vgg("dd_vgg9", pretrained, **{"widths": widths, "hidden": (128, 64), **kwargs})


# ---- networks for larger images


class FcResNet(ResNet):
    """timm's ResNet with a fully connected layer of `hidden` and ReLU between pooling and classifier.

    Source: gu2022 section 3.1.2.
    """

    def __init__(self, *args: Any, hidden: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        pooled = self.num_features * self.global_pool.feat_mult()
        self.pre_logits = nn.Sequential(nn.Linear(pooled, hidden), nn.ReLU(inplace=True))
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.head_hidden_size = self.pre_logits[0].out_features
        self.fc = _classifier(self.head_hidden_size, num_classes)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.global_pool.is_identity():  # timm's way to ask for the features themselves
            return x
        x = self.pre_logits(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)


def _fc_resnet(variant: str, layers: tuple[int, ...], pretrained: bool, **kwargs: Any) -> FcResNet:
    return build_model_with_cfg(FcResNet, variant, pretrained, block=Bottleneck, layers=layers, **kwargs)


@register_model
def dd_resnet50_fc1024(pretrained: bool = False, **kwargs: Any) -> FcResNet:
    """ResNet50 of gu2022 section 3.1.2, for Food-101. Table 3.4 has 25.79 M parameters: Keras' convolutions have
    biases, timm's do not, so that this one has 25.76 M."""
    return _fc_resnet("dd_resnet50_fc1024", (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def dd_resnet101_fc1024(pretrained: bool = False, **kwargs: Any) -> FcResNet:
    """ResNet101 of gu2022 section 3.1.2: 44.81 M parameters, and 44.86 M with Keras' biases in Table 3.4."""
    return _fc_resnet("dd_resnet101_fc1024", (3, 4, 23, 3), pretrained, **kwargs)


class Cnn11(Network):
    """Stacks of two 3×3 convolutions with BatchNorm and ReLU and a 2×2 max pooling; global average pooling, classifier.

    Args:
        widths: of the convolutions, one for each stack.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        num_classes: int = 2,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, widths[-1], widths[-1])
        ins = (in_chans, *widths)
        stacks = ((*_norm_conv(a, b), *_norm_conv(b, b), nn.MaxPool2d(2)) for a, b in zip(ins, widths))
        self.features = nn.Sequential(*(nn.Sequential(*stack) for stack in stacks))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate))
        self.fc = _classifier(widths[-1], num_classes)
        _initialise(self)


def _norm_conv(width: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)


@register_model
def dd_cnn11(pretrained: bool = False, **kwargs: Any) -> Cnn11:
    """The 11 layers of gu2022 section 3.1.3, for Dogs vs. Cats, each convolution with BatchNorm as in section 3.1.1.
    The paper does not say how wide they are; twice each of 64-128-256-512-512 is our choice."""
    return build_model_with_cfg(Cnn11, "dd_cnn11", pretrained, **kwargs)


# ---- volumes


class Vgg3d(Network):
    """Stacks of a 3×3×3 convolution, ReLU, 2×2×2 max pooling and BatchNorm; global average pooling, a fully connected
    layer with ReLU and dropout, classifier.

    Args:
        widths: of the convolutions, one for each stack.
        hidden: of the fully connected layer.
        drop_rate: before the classifier.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 128, 256),
        hidden: int = 512,
        num_classes: int = 1,
        in_chans: int = 1,
        drop_rate: float = 0.3,
    ):
        super().__init__(num_classes, in_chans, widths[-1], hidden)
        stacks = (
            (nn.Conv3d(a, b, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2), nn.BatchNorm3d(b))
            for a, b in zip((in_chans, *widths), widths)
        )
        self.features = nn.Sequential(*(nn.Sequential(*stack) for stack in stacks))
        fully = nn.Linear(widths[-1], hidden)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), fully, nn.ReLU(inplace=True), nn.Dropout(drop_rate)
        )
        self.fc = _classifier(hidden, num_classes)
        _initialise(self)


@register_model
def dd_vgg3d(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: dict | None = None, **kwargs: Any
) -> Vgg3d:
    """The 3D network of klawonn2023 section 4.4, for chest CT scans of 128×128×64 voxels; one logit.

    The text has a fully connected layer of 256, but the 1.3529 M parameters of Table 2, and the 0.3396 M of its local
    networks, are those of 512. Convolutions are padded: unpadded ones, as in Keras' example of this network, leave
    nothing of the paper's boxes of 32×32×64 voxels.
    """
    cfg = resolve_pretrained_cfg("dd_vgg3d", pretrained_cfg, pretrained_cfg_overlay)
    size = cfg.input_size
    # timm fills in_chans from an input_size of three numbers, and takes no other.
    cfg = dataclasses.replace(cfg, input_size=None)
    model = build_model_with_cfg(Vgg3d, "dd_vgg3d", pretrained, cfg, **{"in_chans": size[0], **kwargs})
    model.pretrained_cfg["input_size"] = tuple(size)
    return model
