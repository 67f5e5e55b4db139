"""Prolongation against its definition, element by element: (2.11)–(2.14), (2.16), (2.22)."""

import itertools

import pytest
import torch
from conftest import Plain, images, shake
from torch import nn

import timm_dd
from timm_dd import Domain, MergeError

IMAGE = torch.empty(1, 3, 16, 16)


def blocks(size, parts):
    """Runs of as even a size as can be, by the definition of numpy.array_split."""
    bounds, start = [], 0
    for k in range(parts):
        stop = start + size // parts + (k < size % parts)
        bounds.append(range(start, stop))
        start = stop
    return bounds


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_weights_stand_where_the_paper_puts_them(parts):
    width = 10
    split = shake(timm_dd.split(Plain(width=width, depth=3), parts, example_input=IMAGE, domain=Domain.full(parts)))
    merged = timm_dd.merge(split)
    own = blocks(width, parts)
    for name, outs, ins in [
        ("convs.0.weight", own, [range(3)] * parts),  # (2.11)
        ("convs.1.weight", own, own),  # (2.12)
        ("convs.2.weight", own, own),
        ("fc.weight", [range(10)] * parts, own),  # (2.14)
    ]:
        expected = torch.zeros_like(merged.state_dict()[name])
        for k in range(parts):
            weight = split[k].state_dict()[name]
            for (i, o), (j, c) in itertools.product(enumerate(outs[k]), enumerate(ins[k])):
                expected[o, c] = weight[i, j]
        assert torch.equal(merged.state_dict()[name], expected), name
    bias = sum(part.state_dict()["fc.bias"] for part in split)
    assert torch.allclose(merged.state_dict()["fc.bias"], bias, rtol=1e-15)


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_a_split_model_comes_back_inside_its_blocks(parts):
    """merge(split(model)) is the model on the blocks, zero elsewhere; its summed bias is the model's, bit for bit."""
    model = Plain(width=16, depth=3)
    nn.init.normal_(model.fc.bias)
    merged = timm_dd.merge(timm_dd.split(model, parts, example_input=IMAGE, domain=Domain.full(parts)))
    for name, tensor in merged.state_dict().items():
        original = model.state_dict()[name]
        inside = tensor != 0
        assert torch.equal(tensor[inside], original[inside]), name
    assert torch.equal(merged.fc.bias, model.fc.bias)
    assert torch.equal(merged.fc.weight, model.fc.weight)
    owned = sum(len(b) ** 2 for b in blocks(16, parts)) * 9
    assert int((merged.convs[1].weight != 0).sum()) == owned


def test_mean_head_is_the_mean_of_the_parts():
    """(2.22): weight and bias of the last layer divided by K."""
    x = images(3, 3, 16, 16)
    parts = shake(timm_dd.split(Plain(width=8), 4, example_input=x, domain=Domain.full(4)))
    merged = timm_dd.merge(parts, head="mean").double().eval()
    assert torch.allclose(merged(x), torch.stack([p(x) for p in parts]).mean(0), rtol=1e-9)
    assert torch.equal(merged.convs[0].weight, timm_dd.merge(parts).convs[0].weight)


def test_running_statistics_are_concatenated():
    parts = shake(timm_dd.split("dd_resnet32", 2, domain=Domain.full(2)))
    for part in parts:
        part.bn1.num_batches_tracked.fill_(7)
    state = timm_dd.merge(parts).state_dict()
    assert torch.equal(state["bn1.running_var"], torch.cat([p.bn1.running_var for p in parts]))
    assert int(state["bn1.num_batches_tracked"]) == 7


def test_a_parameter_without_channels_is_averaged():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 4, 1), nn.PReLU(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    parts = timm_dd.split(Scaled(), 2, example_input=IMAGE, domain=Domain.full(2))
    with torch.no_grad():
        parts[0].get_parameter("1.weight").fill_(1.0)
        parts[1].get_parameter("1.weight").fill_(2.0)
    assert timm_dd.merge(parts)[1].weight.tolist() == [1.5]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda parts: parts[1].fc.weight.data.fill_(float("nan")), "part 1: fc.weight is not finite"),
        (lambda parts: parts[1].half(), "convert the parts to one dtype"),
        (lambda parts: setattr(parts[0].fc, "weight", nn.Parameter(torch.zeros(3, 3))), "has shape"),
    ],
)
def test_bad_parts(spoil, message):
    parts = timm_dd.split("dd_plain", 2, width=8)
    spoil(parts)
    with pytest.raises(MergeError, match=message):
        timm_dd.merge(parts)


def test_bad_head():
    with pytest.raises(MergeError, match="'sum'"):
        timm_dd.merge(timm_dd.split("dd_plain", 2, width=8), head="max")
