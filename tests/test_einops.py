"""Networks that use einops, which is traced through to torch's own operations; no dependency of ours."""

import pytest
import torch
from conftest import RELATIVE, images, shake, sum_error
from torch import nn

import timm_dd
from timm_dd import Domain

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")
rearrange, reduce, repeat = einops.rearrange, einops.reduce, einops.repeat


class Network(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)
        self.stem, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.function(self.stem(x).tanh(), *self.inner).mean((2, 3)))


def heads(x, qkv):
    q, k, v = rearrange(qkv(x), "b (t n d) h w -> t b n (h w) d", t=3, n=4)
    return rearrange((q @ k.transpose(-2, -1)).softmax(-1) @ v, "b n (h w) d -> b (n d) h w", h=x.shape[2])


def tokens(x, layer):
    return rearrange(layer(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=x.shape[2])


def packed(x):
    (y,) = einops.unpack(*einops.pack([x], "b * h w"), "b * h w")
    return y


EXACT = {
    "shuffle": (lambda x: rearrange(x, "b (g c) h w -> b (c g) h w", g=3).tanh(),),
    "tokens": (tokens, nn.Linear(12, 12)),
    "heads": (heads, nn.Conv2d(12, 36, 1)),
    "gate": (lambda x: x * reduce(x, "b c h w -> b c 1 1", "mean"),),
    "repeat": (lambda x: reduce(repeat(x, "b c h w -> b (c r) h w", r=2), "b (c r) h w -> b c h w", "sum", r=2),),
    "pack": (packed,),
    "Rearrange": (lambda x, m: m(x), layers.Rearrange("b (g c) h w -> b (c g) h w", g=3)),
    "Reduce": (lambda x, m: m(x), layers.Reduce("b c (h i) (w j) -> b c h w", "max", i=2, j=2)),
}


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_the_sum_of_the_parts(name, parts):
    x = images(2, 3, 8, 8)
    split = shake(timm_dd.split(Network(*EXACT[name]), parts, domain=Domain.full(parts), example_input=x))
    assert split.plan.exact, split.plan.approximations
    assert sum_error(split, timm_dd.merge(split), x) <= RELATIVE


def test_over_channels_is_approximate():
    x = images(2, 3, 8, 8)
    network = Network(lambda x: x * reduce(x, "b c h w -> b 1 h w", "max"))
    parts = shake(timm_dd.split(network, 2, domain=Domain.full(2), example_input=x))
    assert not parts.plan.exact and sum_error(parts, timm_dd.merge(parts), x) > RELATIVE


def test_numbers_stay_what_einops_takes():
    timm_dd.split(Network(*EXACT["shuffle"]), 2, example_input=images(2, 3, 8, 8))
    assert rearrange(torch.zeros(2, 3), "a b -> b a").shape == (3, 2)
