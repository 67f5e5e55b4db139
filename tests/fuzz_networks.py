"""Random networks by the thousand: each is split, run packed and merged, and what its plan claims is compared by value.

    python tests/fuzz_networks.py --count 20000                  # every one of them
    python tests/fuzz_networks.py --first 20000 --count 5000     # others

A network is plain data, `Recipe`: steps, each a name and two numbers that choose among what fits the channels there.
So network i is the same on every machine, a failure prints its recipe, and `shrunk` leaves out what it does not need.
New ways of a step go to the end of its list, so that recipes keep their meaning.
`ROWS` keeps what failed once; `test_fuzz_networks.py` runs those and the first 200.

In float64, every part seeing the whole image: an exact plan means F(x) = sum_k F_k(x) to 1e-9, one that is approximate
that this fails; packed parts give what the parts give; splitting the merged network gives the parts' own tensors back
bit for bit; parts run on their boxes. Whatever is refused is a SplitError.
"""

import argparse
import functools
import operator
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import timm.layers as tl
import torch
import torch.nn.functional as F
from conftest import NARROW, RELATIVE, images, outputs, shake
from torch import nn
from tqdm import tqdm

import timm_dd
from timm_dd import Domain, SplitError

SIZE = 8  # pixels, and the width of images


@dataclass(frozen=True)
class Recipe:
    """Channels of the stem, steps (name, a, b), the head, what it takes, and K."""

    stem: int
    steps: tuple[tuple[str, int, int], ...]
    head: str = "classes"
    takes: str = "x"
    parts: int = 2


@dataclass
class Here:
    """Where a network is being built: the channels, and the size of the map; what earlier steps gave."""

    channels: int
    size: int = SIZE
    before: tuple[tuple[int, int], ...] = ()


class Step(nn.Module):
    """A function of the map, of what came before and of modules, through which fx traces."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x, before):
        return self.function(x, before, *self.inner)


class Scaled(nn.Module):
    """A parameter that meets the map."""

    def __init__(self, op, *shape):
        super().__init__()
        self.op, self.p = op, nn.Parameter(torch.rand(*shape) + 0.5)

    def forward(self, x, before):
        return self.op(x, self.p)


STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def pick(options, number):
    options = list(options)
    return options[number % len(options)]


def of(module):
    """A step of one module."""
    return Step(lambda x, before, m: m(x), module)


# ---- layers with weights: each takes where it is and two numbers, changes where it is, and gives a step


@step
def conv(at, a, b):
    out = pick((4, 6, 8, 9, 12, 16), a)
    groups = pick((g for g in divisors(at.channels) if out % g == 0), b)
    kernel = pick((1, 3), a // 7)
    made = nn.Conv2d(at.channels, out, kernel, padding=kernel // 2, groups=groups, bias=bool(b % 2))
    at.channels = out
    return of(made)


@step
def depthwise(at, a, b):
    made = nn.Conv2d(at.channels, at.channels * pick((1, 2), a), 3, padding=1, groups=at.channels)
    at.channels = made.out_channels
    return of(made)


@step
def transposed(at, a, b):
    out = pick((4, 6, 8, 12), a)
    made = nn.ConvTranspose2d(
        at.channels, out, 3, padding=1, groups=pick((g for g in divisors(at.channels) if out % g == 0), b)
    )
    at.channels = out
    return of(made)


@step
def standardised(at, a, b):
    out = pick((4, 8, 12), a)
    made = tl.ScaledStdConv2d(at.channels, out, 3, padding=1)
    at.channels = out
    return of(made)


@step
def norm(at, a, b):
    c = at.channels
    kinds = (
        nn.BatchNorm2d(c), nn.GroupNorm(pick(divisors(c), b), c), nn.InstanceNorm2d(c, affine=True), tl.LayerNorm2d(c),
        nn.BatchNorm2d(c), tl.BatchNormAct2d(c), nn.LocalResponseNorm(3),
    )  # fmt: skip
    return of(pick(kinds, a))


@step
def layer_norm(at, a, b):
    made = nn.LayerNorm(at.channels) if a % 2 else nn.LayerNorm((at.size, at.size))
    if a % 2:
        return Step(lambda x, before, m: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), made)
    return of(made)


@step
def activation(at, a, b):
    kinds = (
        nn.ReLU,
        nn.Tanh,
        nn.SiLU,
        lambda: nn.ReLU(inplace=True),
        nn.Hardswish,
        lambda: nn.PReLU(at.channels),
        nn.GELU,
    )
    return of(pick(kinds, a)())


@step
def squeeze(at, a, b):
    """Squeeze and excitation, with a gate of its own."""
    c, gates = at.channels, (torch.sigmoid, F.hardsigmoid, lambda t: torch.softmax(t, 1), lambda t: t.exp())
    gate = pick(gates, b)
    return Step(
        lambda x, before, m: x * gate(m(x.mean((2, 3), keepdim=True))),
        nn.Sequential(nn.Conv2d(c, pick((4, 5, 8), a), 1), nn.ReLU(), nn.Conv2d(pick((4, 5, 8), a), c, 1)),
    )


@step
def positions(at, a, b):
    """A fully connected layer on each position's channels."""
    out = pick((4, 8, 12), a)
    made = nn.Linear(at.channels, out)
    at.channels = out
    return Step(lambda x, before, m: m(x.movedim(1, -1) if b % 2 else x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), made)


@step
def parameter(at, a, b):
    shape = pick([(at.channels, 1, 1), (1, at.channels, 1, 1), (1,), (at.size, at.size)], a)
    return Scaled(pick((lambda x, p: x * p, lambda x, p: x + p, lambda x, p: p - x), b), *shape)


@step
def twice(at, a, b):
    """One layer, called on what it gave."""
    made = nn.Conv2d(at.channels, at.channels, 3, padding=1, groups=pick(divisors(at.channels), a))
    return Step(lambda x, before, m: m(m(x).tanh()), made)


@step
def attention(at, a, b):
    """Between positions, with heads, in the spellings of its queries."""
    c = at.channels
    heads = pick((h for h in divisors(c) if h <= 6), a)

    def fused(x, before, qkv):
        n, _, h, w = x.shape
        q, k, v = qkv(x).reshape(n, 3, heads, c // heads, h * w).transpose(-2, -1).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -1).reshape(n, c, h, w)

    def written(x, before, qkv):
        n, _, h, w = x.shape
        q, k, v = qkv(x).flatten(2).chunk(3, dim=1)
        q, k, v = (t.view(n, heads, -1, h * w) for t in (q, k, v))
        weights = (q.transpose(-2, -1) @ k * (c // heads) ** -0.5).softmax(-1)
        return (v @ weights.transpose(-2, -1)).flatten(1, 2).unflatten(-1, (h, w))

    return Step(pick((fused, written), b), nn.Conv2d(c, 3 * c, 1))


@step
def multihead(at, a, b):
    c = at.channels
    made = nn.MultiheadAttention(c, pick((h for h in divisors(c) if h <= 6), a), batch_first=True)

    def network(x, before, m):
        t = x.flatten(2).transpose(1, 2)
        return m(t, t, t, need_weights=bool(b % 2))[0].transpose(1, 2).reshape(x.shape)

    return Step(network, made)


# ---- attention blocks: of tokens (n, positions, channels), queries (n, heads, positions, channels of a head)


def softmaxed(q, k, v, bias=0.0):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


class Biased(nn.Module):
    """A table of relative positions, with a column for each head."""

    def __init__(self, heads, size, channels):
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + size - 1
        self.register_buffer("index", apart[0] * (2 * size - 1) + apart[1])

    def forward(self, q, k, v):
        n = self.index.shape[0]
        return softmaxed(q, k, v, self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1))


class Rotary(nn.Module):
    """Queries and keys turned by angles that go with their positions."""

    def __init__(self, heads, size, channels):
        super().__init__()
        angles = torch.arange(size**2)[:, None] * torch.rand(channels)
        self.register_buffer("sin", angles.sin())
        self.register_buffer("cos", angles.cos())

    def turned(self, x):
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, q, k, v):
        return softmaxed(self.turned(q), self.turned(k), v)


class Channels(nn.Module):
    """Between the channels of a head, at a temperature of its own (XCiT)."""

    def __init__(self, heads, size, channels):
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, q, k, v):
        q, k = (F.normalize(t.transpose(-2, -1), dim=-1) for t in (q, k))
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


class Talking(nn.Module):
    """Heads whose weights are mixed (CaiT)."""

    def __init__(self, heads, size, channels):
        super().__init__()
        self.mixed = nn.Linear(heads, heads)

    def forward(self, q, k, v):
        weights = self.mixed((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights.softmax(-1) @ v


class Normed(nn.Module):
    """Queries and keys normalised within their heads."""

    def __init__(self, heads, size, channels):
        super().__init__()
        self.q, self.k = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(self.q(q), self.k(k), v)


class Plain(nn.Module):
    def __init__(self, way, *_):
        super().__init__()
        self.way = way

    def forward(self, q, k, v):
        return self.way(q, k, v)


def linear(q, k, v):
    """Without a softmax: no weight of one position with another is made."""
    q, k = q.relu() + 0.1, k.relu() + 0.1
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))


def registered(q, k, v):
    """With a key and a value of zeros that every query sees."""
    return softmaxed(q, *(F.pad(t, (0, 0, 1, 0)) for t in (k, v)))


class Block(nn.Module):
    """Attention and a network of two layers, each added to what it reads, as in timm's vision transformers."""

    def __init__(self, channels, size, heads, attend, norm, window, shared):
        super().__init__()
        self.heads, self.window, self.shared = heads, window, shared
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels // shared)
        self.attend = attend(heads, window or size, channels // heads)
        self.proj, self.scale = nn.Linear(channels, channels), nn.Parameter(torch.rand(channels))
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def attended(self, t):
        b, n, c = t.shape
        q = self.q(t).view(b, n, self.heads, -1).transpose(1, 2)
        kv = self.kv(t).reshape(b, n, 2, self.heads // self.shared, -1).permute(2, 0, 3, 1, 4)
        k, v = (x.repeat_interleave(self.shared, 1) if self.shared > 1 else x for x in kv.unbind(0))
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, c))

    def windows(self, t):
        """Attention within squares of positions."""
        (b, n, c), w = t.shape, self.window
        side = int(n**0.5)
        t = t.view(b, side // w, w, side // w, w, c).transpose(2, 3).reshape(-1, w * w, c)
        t = self.attended(t).view(b, side // w, side // w, w, w, c)
        return t.transpose(2, 3).reshape(b, n, c)

    def forward(self, x):
        t = x.flatten(2).transpose(1, 2)
        t = t + self.scale * (self.windows if self.window else self.attended)(self.norm1(t))
        t = t + self.mlp(self.norm2(t))
        return t.transpose(1, 2).unflatten(2, x.shape[2:])


@step
def block(at, a, b):
    c = at.channels
    if c % 2:
        return None
    heads = pick((h for h in divisors(c) if h <= 6 and (c // h) % 2 == 0), a)
    kinds = (
        Biased, Rotary, Channels, Talking, Normed, functools.partial(Plain, linear),
        functools.partial(Plain, registered), functools.partial(Plain, F.scaled_dot_product_attention),
    )  # fmt: skip
    window = pick([0, 0] + [w for w in (2, 4) if at.size % w == 0], b // 7)
    shared = pick([1, 1] + [g for g in (2, 3) if heads % g == 0], a // 5)
    norm = pick((nn.Identity, nn.Identity, nn.LayerNorm), b // 3)
    return of(Block(c, at.size, heads, pick(kinds, b), norm, window, shared))


# ---- shapes


@step
def shuffle(at, a, b):
    c = at.channels
    g = pick(divisors(c), a)

    def sizes(x, before):
        n, c, h, w = x.shape
        return x.view(n, g, c // g, h, w).transpose(1, 2).flatten(1, 2)

    def starred(x, before):
        return x.reshape(x.shape[0], -1, g, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    def constants(x, before):
        return x.unflatten(1, (g, c // g)).permute(0, 2, 1, 3, 4).flatten(1, 2)

    return Step(pick((sizes, starred, constants, lambda x, before: F.channel_shuffle(x, g)), b))


@step
def halves(at, a, b):
    """Two pieces, and what becomes of them."""
    c = at.channels
    if c % 2:
        return None
    ways = (
        lambda p, q: torch.cat([q, p], 1), lambda p, q: torch.cat([p.tanh(), q], 1), lambda p, q: p * q.sigmoid(),
        lambda p, q: p + q, lambda p, q: torch.cat([p + q, p - q], 1), lambda p, q: torch.maximum(p, q),
        lambda p, q: torch.stack([p, q], 2).flatten(1, 2),
    )  # fmt: skip
    way = pick(ways, a)
    cut = pick(
        (
            lambda x: x.chunk(2, 1), lambda x: x.split(c // 2, 1), lambda x: (x[:, ::2], x[:, 1::2]),
            lambda x: (x[:, : c // 2], x[:, c // 2 :]), lambda x: x.unflatten(1, (2, c // 2)).unbind(1),
            lambda x: x.unflatten(1, (c // 2, 2)).unbind(2),
        ),
        b,
    )  # fmt: skip
    at.channels = c // 2 if a % len(ways) in (2, 3, 5) else c
    return Step(lambda x, before: way(*cut(x)))


@step
def slices(at, a, b):
    c = at.channels
    if c < 4:
        return None
    first, last = a % (c // 2), c // 2 + 1 + b % (c // 2)
    ways = (
        (lambda x: x[:, first:last], last - first), (lambda x: x[:, first:], c - first), (lambda x: x[:, [0, 2, 1]], 3),
        (lambda x: x[:, ::2], (c + 1) // 2), (lambda x: x[:, first : first + 2], 2),
        (lambda x: torch.cat([x[:, last - 1 :], x[:, : last - 1]], 1), c), (lambda x: x.flip(1), c),
        (lambda x: x.roll(first, 1), c),
    )  # fmt: skip
    way, at.channels = pick(ways, a + 3 * b)
    return Step(lambda x, before: way(x))


@step
def repeated(at, a, b):
    c = at.channels
    if c > 16:
        return None
    ways = (
        (lambda x: torch.cat([x, x], 1), 2 * c), (lambda x: x.repeat(1, 2, 1, 1), 2 * c),
        (lambda x: x.repeat_interleave(2, 1), 2 * c), (lambda x: torch.cat([x, -x], 1), 2 * c),
        (lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2), 2 * c),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), c + 2),
    )  # fmt: skip
    way, at.channels = pick(ways, a)
    return Step(lambda x, before: way(x))


@step
def folded(at, a, b):
    """Between channels and positions."""
    if a % 2 and at.channels % 4 == 0 and at.size <= SIZE:
        at.channels, at.size = at.channels // 4, at.size * 2
        return of(nn.PixelShuffle(2))
    if at.size % 2 or at.channels > 12:
        return None
    at.channels, at.size = at.channels * 4, at.size // 2
    return of(nn.PixelUnshuffle(2))


@step
def pooled(at, a, b):
    if at.size < 4 or at.size % 2:
        return None
    kinds = (
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
        nn.Conv2d(at.channels, at.channels, 2, 2, groups=pick(divisors(at.channels), b)),
    )
    at.size //= 2
    return of(pick(kinds, a))


@step
def numbers(at, a, b):
    """What shapes say, in many spellings."""
    ways = (
        lambda x: x * x.shape[1] ** -0.5, lambda x: x / x[0].numel(), lambda x: x * len(x.shape[1:]),
        lambda x: x * (1 / float(x.size(dim=1))), lambda x: x + 0.1 * x.size()[1], lambda x: x / x.shape[1:].numel(),
        lambda x: x.sum(1, keepdim=True) / x.shape[1] * x,
        lambda x: x.reshape(*x.shape[:2], -1).softmax(-1).view(x.shape) * x.shape[1],
        lambda x: x * torch.ones(x.shape[1], 1, 1).to(x), lambda x: x.view(x.shape[0], x.shape[1], -1).view(*x.shape),
    )  # fmt: skip
    way = pick(ways, a)
    return Step(lambda x, before: way(x))


@step
def across(at, a, b):
    """Over the channels."""
    ways = (
        lambda x: x * x.mean(1, keepdim=True).sigmoid(), lambda x: x + x.amax(1, keepdim=True), lambda x: x.softmax(1),
        lambda x: F.normalize(x, dim=1), lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
        lambda x: x - x.mean(1, keepdim=True), lambda x: x.cumsum(1),
        lambda x: x * torch.einsum("nchw,nchw->nhw", x, x).unsqueeze(1).tanh(),
        lambda x: torch.einsum("nchw,ndhw->ncd", x, x).softmax(-1).mean(-1)[:, :, None, None] * x,
    )  # fmt: skip
    way = pick(ways, a)
    return Step(lambda x, before: way(x))


def unfolded(x):
    """The sum of each window, by way of columns."""
    return F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)).sum(2).unflatten(2, (x.shape[2], x.shape[3]))


@step
def within(at, a, b):
    """Of each channel, or of each number."""
    ways = (
        lambda x: x.flatten(2).softmax(-1).unflatten(2, x.shape[2:]),
        lambda x: x - x.mean((2, 3), keepdim=True), lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x / (1 + x.abs()), lambda x: unfolded(x),
        lambda x: torch.clamp(x, -1, 1), lambda x: x / x.std((2, 3), keepdim=True), lambda x: x.roll(1, 2).flip(3),
        lambda x: sum([x, x.tanh()]), lambda x: torch.lerp(x, x.tanh(), 0.3),
    )  # fmt: skip
    way = pick(ways, a)
    return Step(lambda x, before: way(x))


@step
def computed(at, a, b):
    """A layer whose weight is a tensor of the graph, as it is or after a function."""
    changes = (
        lambda p: p, lambda p: p.tanh(), lambda p: p.exp(), lambda p: p - 0.2, lambda p: p * p.abs(),
        lambda p: torch.where(p > 1, p, 0.0 * p), lambda p: p.sigmoid(), lambda p: p / (1 + p.square()),
        lambda p: p @ p.mT @ p, lambda p: p.clamp(min=0.7), lambda p: 2 * p - p.round(),
        lambda p: p.unsqueeze(0).flatten(0, 1),
    )  # fmt: skip
    change, out = pick(changes, a), pick((4, 8, 12), b)
    layers = (
        lambda x, p: F.conv2d(x, change(p)[..., None, None]),
        lambda x, p: torch.einsum("nchw,dc->ndhw", x, change(p)),
        lambda x, p: (x.movedim(1, -1) @ change(p).T).movedim(-1, 1),
        lambda x, p: F.linear(x.permute(0, 2, 3, 1), change(p)).permute(0, 3, 1, 2),
        lambda x, p: torch.tensordot(x, change(p), dims=([1], [1])).permute(0, 3, 1, 2),
        lambda x, p: (change(p) @ x.flatten(2)).unflatten(2, x.shape[2:]),
    )
    made = Scaled(pick(layers, b // 3), out, at.channels)
    at.channels = out
    return made


def overwritten(x, way, i):
    y = x * 1
    way(y, x, i)
    return y


def assign(index, value):
    def way(y, x, i):
        y[index(i, x)] = value(x)

    return way


@step
def written(at, a, b):
    """A map of which something is overwritten."""
    c = at.channels
    ways = (
        assign(lambda i, x: (slice(None), slice(None), 0), lambda x: 0.0),
        assign(lambda i, x: (..., slice(1, None)), lambda x: x[..., :-1]),
        assign(lambda i, x: (slice(None), slice(i, None)), lambda x: 0.5),
        assign(lambda i, x: (slice(None), 0), lambda x: x.sum(1)),
        assign(lambda i, x: x > 0.5, lambda x: 0.25),
        lambda y, x, i: y[:, :, 1].zero_(), lambda y, x, i: y.clamp_(-1, 1),
        lambda y, x, i: y[:, i:].copy_(x[:, i:].tanh()),
        lambda y, x, i: y.masked_fill_(x < 0.013, 0.1),  # at 0 rounding decides, where sums cancel
        lambda y, x, i: y.flatten(2).sigmoid_(),
    )  # fmt: skip
    way, i = pick(ways, a), 1 + b % max(1, c - 1)
    return Step(lambda x, before: overwritten(x, way, i))


@step
def augmented(at, a, b):
    """In place, itself or through a view, then read under the old name; earlier maps are changed with it."""
    ways = (
        lambda x, i: operator.iadd(x, 0.5), lambda x, i: operator.imul(x[:, i:], 2),
        lambda x, i: operator.isub(x.flatten(2), 0.3), lambda x, i: operator.ipow(x, 2),
        lambda x, i: operator.itruediv(x.transpose(2, 3), 2), lambda x, i: operator.imul(x, x.sigmoid()),
        lambda x, i: operator.iadd(x[:, :1], x[:, -1:]), lambda x, i: x.mul_(x.shape[1]),
        lambda x, i: operator.isub(x[:, :, i % 2 :: 2], operator.ifloordiv(x.shape[1], 2)),
    )  # fmt: skip
    way, i = pick(ways, a), b % at.channels
    read = pick((torch.tanh, lambda x: x, lambda x: torch.zeros_like(x).add_(x)), b)
    return Step(lambda x, before: (way(x, i), read(x))[1])


@step
def made_of_sizes(at, a, b):
    """With a tensor that the forward makes."""
    ways = (
        lambda x: x + torch.ones(x.shape[0], x.shape[1], 1, 1).to(x), lambda x: x * torch.full(x.shape, 0.5).to(x),
        lambda x: torch.maximum(x, x.new_zeros(x.shape)), lambda x: x + x.new_full((1, *x.shape[1:]), 0.3),
        lambda x: x * torch.linspace(0, 1, x.shape[3]).to(x), lambda x: x - x.max(3, keepdim=True).values,
        lambda x: torch.cat([x[:, 1:], x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1),
        lambda x: x / x.flatten(2).median(-1).values.abs().add(1)[..., None, None],
    )  # fmt: skip
    way = pick(ways, a)
    return Step(lambda x, before: way(x))


@functools.singledispatch
def halved(_):
    return 0.25


halved.register(torch.Tensor)(lambda x: x / 2)
halved.register(int)(lambda n: n / 2)


@step
def asked(at, a, b):
    """What depends on what a tensor or a number is, or on which number it is."""
    ways = (
        lambda x: x.tanh() if isinstance(x, torch.Tensor) else x.exp(),
        lambda x: x.tanh() if torch.is_tensor(x) and x.is_floating_point() else -x,
        lambda x: x.sigmoid() if type(x) is torch.Tensor else x,
        lambda x: -x if hasattr(x, "tensors") else x * 2,
        lambda x: x.relu() if getattr(x, "mask", None) is None else x * x.mask,
        lambda x: x * (2 if isinstance(x.shape, tuple) and isinstance(x.shape[1], int) else 3),
        lambda x: x * (2 if type(x.shape[1]) is int else 3) + (1 if callable(x) else 0),
        lambda x: x - (x.shape[2] // 2 if isinstance(x.shape[2] / 2, (int, float)) else 1),
        lambda x: halved(x) * halved(x.shape[1]) + halved(None),
        lambda x: x * {SIZE: 2, SIZE // 2: 3}.get(x.shape[2], 4),
        lambda x: x.tanh() if x.shape[1] in (4, 6, 8) else x,
        lambda x: x * {at.channels: 2}.get(x.shape[1], 3),
        lambda x: x.sigmoid() if x.ndim == 4 and x.dtype == torch.float64 and x.device.type == "cpu" else x,
        lambda x: x.relu() if x.__class__ is torch.Tensor and not x.is_complex() else -x,
        lambda x: sum((t / 2 for t in (x, [x]) if not isinstance(t, list)), start=x),
        lambda x: x + len([n for n in x.shape if n > 4]),
    )  # fmt: skip
    way = pick(ways, a)
    return Step(lambda x, before: way(x))


class Ramp(torch.autograd.Function):
    """The identity in the backward pass."""

    @staticmethod
    def forward(ctx, x, slope=1.0):
        return (slope * x).clamp(-1, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def dropped(x, training):
    if not training:
        return x
    mask = 0.5 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / 0.5 * torch.floor(mask)


@step
def handwritten(at, a, b):
    """Autograd functions, modules that the forward makes, what only training does, NumPy's numbers."""
    ways = (
        lambda x, m: Ramp.apply(x),
        lambda x, m: Ramp.apply(x, np.float64(2)),
        lambda x, m: nn.Softsign()(nn.AvgPool2d(3, 1, 1)(x)),
        lambda x, m: m[1:](x),
        lambda x, m: dropped(x, m.training),
        lambda x, m: x + dropped(x.tanh(), m.training) * 2,
        lambda x, m: x * (torch.rand_like(x) + 0.5) if m.training else x,
        lambda x, m: x / np.sqrt(x.shape[1]) * np.prod(x.shape[2:]),
        lambda x, m: x.view(*x.shape[:2], np.prod(x.shape[2:])).tanh().view(x.shape),
    )
    way = pick(ways, a)
    return Step(lambda x, before, m: way(x, m), nn.Sequential(nn.Tanh(), nn.ReLU()))


# ---- what came before


@step
def residual(at, a, b):
    """The sum with an earlier map of the same shape."""
    alike = [i for i, kind in enumerate(at.before) if kind == (at.channels, at.size)]
    if not alike:
        return None
    i, way = (
        pick(alike, a),
        pick((lambda x, y: x + y, lambda x, y: x * y.sigmoid(), lambda x, y: y.add(x, alpha=0.5)), b),
    )
    return Step(lambda x, before: way(x, before[i]))


@step
def joined(at, a, b):
    """The concatenation with an earlier map of its size."""
    alike = [i for i, (c, size) in enumerate(at.before) if size == at.size and c + at.channels <= 40]
    if not alike:
        return None
    i = pick(alike, a)
    at.channels += at.before[i][0]
    return Step(lambda x, before: torch.cat([before[i], x] if b % 2 else [x, before[i]], 1))


# ---- whole networks


class Network(nn.Module):
    """What a recipe says; steps that do not fit are left out."""

    def __init__(self, recipe):
        super().__init__()
        self.stem, self.takes = nn.Conv2d(3, recipe.stem, 3, padding=1), recipe.takes
        at = Here(recipe.stem, before=((recipe.stem, SIZE),))
        if recipe.takes == "x, y":
            self.second = nn.Conv2d(1, recipe.stem, 1)
        elif recipe.takes == "x, meta":
            self.gate = nn.Linear(5, recipe.stem)
        steps = []
        for name, a, b in recipe.steps:
            made = STEPS[name](at, a, b)
            if made is not None:
                steps.append(made)
                at.before += ((at.channels, at.size),)
        self.steps, self.head = nn.ModuleList(steps), HEADS[recipe.head](at)

    def forward(self, x, other=None):
        x = self.stem(x)
        if self.takes == "x, y":
            x = torch.cat([x, self.second(other)], 1)[:, : self.stem.out_channels] + x
        elif self.takes == "x, meta":
            x = x * self.gate(other).sigmoid()[:, :, None, None]
        before = [x]
        for made in self.steps:
            x = made(x, before)
            before.append(x)
        return self.head(x, before)


HEADS = {
    "classes": lambda at: Step(lambda x, before, fc: fc(x.mean((2, 3))), nn.Linear(at.channels, 5)),
    "pooled": lambda at: Step(
        lambda x, before, fc: fc(F.adaptive_avg_pool2d(x.relu(), 1).flatten(1)), nn.Linear(at.channels, 5)
    ),
    "flat": lambda at: Step(lambda x, before, fc: fc(x.flatten(1)), nn.Linear(at.channels * at.size**2, 5)),
    "map": lambda at: of(nn.Conv2d(at.channels, 3, 1)),
    "two": lambda at: Step(
        lambda x, before, a, b: {"a": a(x.mean((2, 3))), "b": [b(x)]},
        nn.Linear(at.channels, 5),
        nn.Conv2d(at.channels, 2, 1),
    ),
    "scores": lambda at: Step(lambda x, before: x.mean((2, 3))),
}


def drawn(i):
    """Network i."""
    r = random.Random(f"network {i}")
    names = sorted(STEPS)
    steps = tuple((r.choice(names), r.randrange(1000), r.randrange(1000)) for _ in range(r.randint(1, 7)))
    takes, head = r.choice(("x", "x", "x", "x, y", "x, meta")), r.choice(sorted(HEADS))
    return Recipe(r.choice((6, 8, 9, 12, 16)), steps, head, takes, r.choice((2, 2, 3, 4)))


def example(recipe, batch=2):
    others = {"x": (), "x, y": (images(batch, 1, SIZE, SIZE, seed=1),), "x, meta": (images(batch, 5, seed=2),)}
    return (images(batch, 3, SIZE, SIZE), *others[recipe.takes])


# ---- what has to hold


class Failure(Exception):
    pass


def judge(recipe):
    """``exact``, ``approximate``, ``needless`` (approximate, but exact in fact) or ``refused: why``.

    Raises:
        Failure: something that may not be.
    """
    torch.manual_seed(0)
    model, given = Network(recipe).double(), example(recipe)
    try:
        parts = timm_dd.split(model, recipe.parts, example_input=given, domain=Domain.full(recipe.parts))
    except SplitError as e:
        return f"refused: {str(e).split(': ', 1)[-1][:60]}"
    with torch.no_grad():
        shake(parts)
        merged = timm_dd.merge(parts).eval()
        whole, own = outputs(merged(*given)), [outputs(part(*given)) for part in parts]
        error = max(distance(w, sum(terms)) for w, *terms in zip(whole, *own))
        check_packed(parts, given, own)
    check_trip(parts, merged, given)
    check_boxes(model, recipe, given)
    if not all(t.isfinite().all() for t in whole):
        return "not finite"
    if parts.plan.exact:
        if error > RELATIVE and error > 10 * rounding(merged, given, whole):
            raise Failure(f"exact, but off by {error:.1e}")
        return "exact"
    return "approximate" if error > RELATIVE else "needless: " + parts.plan.approximations[0][2][:60]


def distance(a, b):
    return float((a - b).norm() / a.norm().clamp(min=1e-3))


@torch.no_grad()
def rounding(network, given, own):
    """How far its own outputs move by rounding alone."""
    others = (outputs(network(given[0] * (1 + by), *given[1:])) for by in (4e-16, -4e-16, 1e-15, -1e-15))
    return max(distance(y, other) for moved in others for y, other in zip(own, moved))


def check_packed(parts, given, own):
    try:
        packed = parts.packed()
    except SplitError:
        return
    found = outputs(packed(*(torch.stack([t] * len(parts)) for t in given)))
    off = max(distance(torch.stack(terms), t) for t, terms in zip(found, zip(*own)))
    if off > RELATIVE and off > 10 * max(rounding(part, given, y) for part, y in zip(parts, own)):
        raise Failure(f"packed is off by {off:.1e}")


def check_trip(parts, merged, given):
    again = timm_dd.split(merged, len(parts), example_input=given, domain=parts.plan.domain)
    for part, back in zip((p.state_dict() for p in parts), (p.state_dict() for p in again)):
        for key, t in part.items():
            if t.shape != parts.plan.tensors[key].shape and not torch.equal(t, back[key]):
                raise Failure(f"the round trip changes {key}")


def check_boxes(model, recipe, given):
    """Parts run on boxes, or are refused."""
    try:
        parts = timm_dd.split(model, 2, example_input=given, domain=Domain.grid(1, 2, overlap=4))
    except SplitError:
        return
    parts(*given)


def failure(recipe):
    """Why a recipe fails; None if it does not."""
    try:
        judge(recipe)
    except Exception as e:  # whatever it is, it is a failure
        return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return None


def shrunk(recipe):
    """The recipe with all steps left out without which it still fails alike."""
    kind = failure(recipe).split(":")[0]

    def fails(smaller):
        why = failure(smaller)
        return why is not None and why.split(":")[0] == kind

    smaller = True
    while smaller:
        smaller = False
        for i in range(len(recipe.steps)):
            less = replace(recipe, steps=recipe.steps[:i] + recipe.steps[i + 1 :])
            if fails(less):
                recipe, smaller = less, True
                break
    plainer = (replace(recipe, **change) for change in ({"head": "classes"}, {"takes": "x"}, {"parts": 2}))
    for less in plainer:
        less = replace(recipe, **{k: v for k, v in vars(less).items() if v != getattr(recipe, k)})
        recipe = less if fails(less) else recipe
    return recipe


def fuzz(first, count, progress=False):
    """Counts of verdicts, and the failures, (i, why)."""
    counts, failures = Counter(), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NARROW)
        for i in tqdm(range(first, first + count), disable=not progress, mininterval=5):
            try:
                counts[judge(drawn(i))] += 1
            except Exception as e:
                failures.append((i, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"))
                if progress:
                    tqdm.write(f"network {i}: {failures[-1][1]}\n    {shrunk(drawn(i))}")
                    sys.stdout.flush()
    return counts, failures


# What failed once, and what it is found to be now.
ROWS = {
    "packed: the sizes of a shape": (Recipe(12, (("numbers", 5, 0),)), "exact"),
    "packed: attention without weights": (Recipe(6, (("multihead", 2, 0),)), "exact"),
    "a layer of whose channels some are whole in every part": (
        Recipe(6, (("conv", 685, 232), ("slices", 772, 354), ("conv", 876, 105))),
        "approximate",
    ),
    "unshuffled maps that carry no channels": (
        Recipe(12, (("conv", 456, 723), ("folded", 761, 192), ("shuffle", 267, 374), ("folded", 338, 477))),
        "approximate",
    ),
    "packed: a division by nearly nothing, which rounding decides": (
        Recipe(8, (("multihead", 529, 886), ("attention", 126, 666), ("within", 616, 890))),
        "approximate",
    ),
    "packed: a sum that cancels, of which a sign is asked": (
        Recipe(6, (("repeated", 693, 239), ("across", 114, 429), ("written", 558, 243))),
        "approximate",
    ),
}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--count", type=int, default=20_000)
    p.add_argument("--first", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    begun = time.time()
    counts, failures = fuzz(args.first, args.count, progress=True)
    for verdict, n in sorted(counts.items(), key=lambda item: (item[0].split(":")[0], -item[1])):
        print(f"{n:7} {verdict}")
    print(f"{args.count} networks from {args.first} on in {time.time() - begun:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
