"""--channels-last, except where a CPU's kernel would overrun its memory."""

import copy

import pytest
import torch
from torch import nn

import timm_dd
from timm_dd.train import options
from timm_dd.train.layout import layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASKED = options.parse(["--dataset", "digits", "--channels-last"])
NARROW = "strided 1x1 convolution of fewer than 16 channels"


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(16, 8, 1, 2), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, 2), nn.Conv2d(32, 32, 1, 2, groups=2)],
    ids=["16 channels", "no stride", "3x3", "16 a group"],
)
def test_channels_last_if_asked(layer):
    model = nn.Sequential(layer)
    assert layout(model, ASKED, CPU) is torch.channels_last
    assert layout(model, options.parse(["--dataset", "digits"]), CPU) is torch.contiguous_format


@pytest.mark.parametrize("layer", [nn.Conv2d(15, 8, 1, 2), nn.Conv2d(32, 32, 1, (1, 2), groups=4)])
def test_not_where_cpus_overrun(layer):
    model = nn.Sequential(nn.Identity(), layer)
    with pytest.warns(UserWarning, match=f"have 1 on a CPU; .*{NARROW}"):
        assert layout(model, ASKED, CPU) is torch.contiguous_format
    assert layout(model, ASKED, CUDA) is torch.channels_last
    assert layout(model.requires_grad_(False), ASKED, CPU) is torch.channels_last


def test_gradients_of_narrow_parts():
    """By value, in float64; in channels-last they are wrong, or the process ends."""
    part = timm_dd.split("dd_resnet20", 4, img_size=32, widths=(16, 32, 64), num_classes=10)[0]
    exact = copy.deepcopy(part).double()
    with pytest.warns(UserWarning, match=NARROW):
        held_in = layout(part, ASKED, CPU)
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    part.to(memory_format=held_in)(x.contiguous(memory_format=held_in)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    for (name, p), q in zip(part.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=name)
