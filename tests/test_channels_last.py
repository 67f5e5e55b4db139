"""--channels-last, except where a CPU's kernel would overrun its memory."""

import copy

import pytest
import torch
from torch import nn

import timm_dd
from timm_dd.train.settings import options
from timm_dd.train.updates.layout import layout

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


class Mixed(nn.Module):
    """Full, depthwise and 1x1 convolutions, in 2D and 3D."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise, self.volume = nn.Conv2d(8, 8, 1), nn.Conv3d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        y = self.pointwise(self.depthwise(self.stem(x)))
        return self.fc(self.volume(y.unsqueeze(2)).mean((2, 3, 4)))


def strides(module):
    return {name: t.stride() for name, t in module.state_dict().items()}


def held(module, last):
    """`module` with its kernels in channels-last or contiguous memory."""
    for p in module.parameters():
        kinds = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
        p.data = p.data.to(memory_format=kinds.get(p.ndim, torch.contiguous_format))
    return module


@pytest.mark.parametrize("last", [True, False])
def test_the_layout_survives_surgery(last):
    """Parts and merged are held as the model is, to the stride; as the parts are, where these were converted."""
    model = held(Mixed(), last)
    parts = timm_dd.split(model, 4, example_input=torch.empty(1, 3, 8, 8), domain=timm_dd.Domain.full(4))
    for part in parts:
        assert strides(part) == strides(held(copy.deepcopy(part), last))
    for merged in (timm_dd.merge(parts), timm_dd.merge(parts, onto=model)):
        assert strides(merged) == strides(model)
    plain = held(copy.deepcopy(model), False)
    parts = timm_dd.split(plain, 4, example_input=torch.empty(1, 3, 8, 8), domain=timm_dd.Domain.full(4))
    for part in parts:
        held(part, last)
    assert strides(timm_dd.merge(parts)) == strides(model)


def test_the_layout_of_a_base_survives():
    """Of a timm model, which merge creates anew."""
    parts = timm_dd.split("resnet10t", 2, img_size=64, num_classes=10, domain=timm_dd.Domain.full(2))
    base = timm_dd.merge(parts).to(memory_format=torch.channels_last)
    assert strides(timm_dd.merge(parts, onto=base)) == strides(base) != strides(timm_dd.merge(parts))
