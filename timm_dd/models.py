"""timm models by name, and the CIFAR networks of gu2022 section 3.1.1, registered with timm.

``dd_resnet32``, ``dd_resnet56`` and ``dd_resnet110``: a 3×3 stem, 6n + 2 layers, widths 64-128-256, for 32×32 images.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import nn

from .errors import SplitError, headline


def create(name: str, pretrained: bool = False, seed: int | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, its errors as SplitError, its weights from `seed` if one is given.

    Raises:
        SplitError: an unknown model (the nearest names are in the message), an argument that it does not take.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError, FileNotFoundError) as e:
            raise _explain(name, e) from e


def create_empty(name: str, **kwargs: Any) -> nn.Module:
    """The model without weights: on the meta device, or on the CPU if its constructor needs numbers."""
    try:
        with torch.device("meta"):
            return create(name, **kwargs)
    except (SplitError, NotImplementedError):
        return create(name, **kwargs)


def _explain(name: str, error: Exception) -> SplitError:
    if "Unknown model" not in str(error):
        return SplitError(f"timm cannot create {name!r}: {headline(error)}")
    known = timm.list_models()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
    return SplitError(f"timm has no model {name!r}; {hint}")


def arguments(name: str, img_size=None, **kwargs: Any) -> dict:
    """The keyword arguments for `timm.create_model`, with `img_size` where the model's constructor takes it."""
    if img_size is None or not timm.is_model(name):
        return kwargs
    cfg = timm.get_pretrained_cfg(name)
    return {**kwargs, "img_size": img_size} if cfg is not None and getattr(cfg, "fixed_input_size", False) else kwargs


def input_size(
    model: nn.Module, img_size: int | tuple[int, int] | None = None, in_chans: int | None = None
) -> tuple[int, ...]:
    """(C, H, W) of the images that a timm model takes, `img_size` pixels and `in_chans` channels if given."""
    channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
    channels = in_chans or getattr(model, "in_chans", channels)
    if isinstance(img_size, int):
        height, width = img_size, img_size
    elif isinstance(img_size, (tuple, list)) and len(img_size) == 2 and all(isinstance(n, int) for n in img_size):
        height, width = img_size
    elif img_size is not None:
        raise SplitError(f"img_size: expected pixels, or (height, width), got {img_size!r}")
    return channels, height, width


def gives_features(model: nn.Module) -> bool:
    """Whether the outputs are features: a model without classes, or one of timm's ``features_only``."""
    return getattr(model, "num_classes", 0 if hasattr(model, "feature_info") else None) == 0


class CifarResNet(nn.Module):
    """Stem, three stages of n basic blocks at strides 1, 2, 2, global average pooling, classifier: 6n + 2 layers.

    The shortcut where width or stride changes is a 1×1 convolution with BatchNorm: with it dd_resnet32 has the 7.44 M
    parameters of Table 3.1.
    """

    def __init__(
        self, depth: int, widths=(64, 128, 256), num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0
    ):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        blocks, width = [], widths[0]
        for stage, out in enumerate(widths):
            layers = []
            for i in range((depth - 2) // 6):
                stride = 2 if stage and not i else 1
                layers.append(BasicBlock(width, out, stride, _shortcut(width, out, stride)))
                width = out
            blocks.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = blocks
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _shortcut(width: int, out: int, stride: int) -> nn.Module | None:
    if stride == 1 and width == out:
        return None
    return nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))


_CFG = dict(
    url="", num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), first_conv="conv1", classifier="fc",
    license="apache-2.0",
)  # fmt: skip

default_cfgs = generate_default_cfgs({f"dd_resnet{depth}.untrained": _CFG for depth in (32, 56, 110)})


def _cifar_resnet(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, depth=depth, **kwargs)


@register_model
def dd_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet32 of Table 3.1: 7.44 M parameters at 10 classes."""
    return _cifar_resnet("dd_resnet32", 32, pretrained, **kwargs)


@register_model
def dd_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet56 of Table 3.1."""
    return _cifar_resnet("dd_resnet56", 56, pretrained, **kwargs)


@register_model
def dd_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet110 of Table 3.1."""
    return _cifar_resnet("dd_resnet110", 110, pretrained, **kwargs)
