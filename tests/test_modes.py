"""What a network does only while it trains: a part does it too, or the network is refused with the line."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d
from torch import nn
from torchvision.ops import DropBlock2d as TorchvisionDropBlock

import timm_dd
from timm_dd import Domain, SplitError

IMAGE = torch.empty(1, 3, 12, 12)


class Net(nn.Module):
    def __init__(self, middle=None):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.middle = middle or nn.Identity()

    def features(self, x):
        return self.middle(self.bn(self.conv(x)))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Stochastic(nn.Module):
    """The drop path that people copy."""

    def forward(self, x):
        if not self.training:
            return x
        mask = 0.5 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(0.5) * mask.floor_()


class Doubles(nn.Module):
    """By a branch on a number of Python's, or of torch's."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return 2 * x if self.training and self.draw() < 0.5 else x


class Functions(Net):
    def features(self, x):
        x = F.dropout(super().features(x), 0.3, self.training)
        return F.alpha_dropout(F.dropout2d(x, training=self.training), 0.2 if self.training else 0.0, True)


class Never(Net):
    def features(self, x):
        return F.dropout(super().features(x), 0.3, training=False)


class Attends(Net):
    def features(self, x):
        x = super().features(x)
        y = x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 4, 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=0.4 if self.training else 0.0)
        return y.transpose(2, 3).flatten(1, 2).reshape(x.shape)


def drop_connect(x, p, training):
    """As in efficientnet_pytorch."""
    if not training:
        return x
    mask = 1 - p
    mask += torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / (1 - p) * torch.floor(mask)


class Residual(nn.Module):
    """Twice, and where the branch is made before what follows."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = drop_connect(self.conv(x), 0.4, self.training)
        return drop_connect(self.other(x) + y, 0.3, self.training) + x


class Noise(Net):
    def features(self, x):
        x = super().features(x)
        if self.training:
            x = x + torch.randn_like(x)
        return x


KEPT = {
    "functions of a block": lambda: Net(nn.Sequential(Residual(), nn.ReLU(), Residual())),
    "noise": Noise,
    "drop path": lambda: Net(nn.Sequential(Stochastic(), nn.ReLU(), Stochastic())),
    "timm's drop block": lambda: Net(DropBlock2d(0.3, 3)),
    "torchvision's": lambda: Net(TorchvisionDropBlock(0.3, 3)),
    "Python's numbers": lambda: Net(nn.Sequential(*[Doubles(random.random) for _ in range(9)])),
    "torch's numbers": lambda: Net(nn.Sequential(*[Doubles(lambda: torch.rand(1)) for _ in range(9)])),
    "functions": Functions,
    "a function that never drops": Never,
    "attention": Attends,
}


def run(network, x, seed=3):
    torch.manual_seed(seed)
    random.seed(seed)
    return network(x)


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_part_does_in_training_what_the_model_does(make):
    """One part is the model, with the same random numbers, in both modes; of two each draws, and they run."""
    model, x = make(), torch.randn(4, 3, 12, 12)
    (part,) = timm_dd.split(model, 1, example_input=IMAGE)
    halves = timm_dd.split(model, 2, example_input=IMAGE, domain=Domain.full(2))
    other = copy.deepcopy(part)
    for mode in (True, False):
        for network in (model, part, other, *halves):
            network.train(mode)
        expected = run(model, x)
        for network in (part, other):
            torch.testing.assert_close(run(network, x), expected)
        for half in halves:
            dropped = make is not Never and mode
            assert (len({run(half, x, seed).sum().item() for seed in range(4)}) > 1) == dropped
    torch.testing.assert_close(sum(halves.eval()(x)), timm_dd.merge(halves).eval()(x))


def test_steps_of_training_alone_are_packed():
    """Each part draws."""
    parts = timm_dd.split(KEPT["functions of a block"](), 2, example_input=IMAGE, domain=Domain.full(2))
    packed, x = parts.packed(), torch.stack([torch.randn(4, 3, 12, 12)] * 2)
    torch.testing.assert_close(packed.eval()(x), torch.stack([part(x[0]) for part in parts.eval()]))
    packed.train()
    assert not torch.equal(run(packed, x, 1), run(packed, x, 2))


class Several(Net):
    def features(self, x):
        x = super().features(x)
        y = x.relu()
        return x + y * torch.rand_like(x) if self.training else x + y  # of two


class Sizes(Net):
    def features(self, x):
        x = super().features(x)
        size = x.shape[2] * 2 if self.training else x.shape[2]  # a size
        return F.interpolate(x, size=(size, size))


class Auxiliary(Net):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(8, 10)

    def forward(self, x):
        y = self.features(x).mean((2, 3))
        if self.training:
            return self.fc(y), self.auxiliary(y)  # a second head
        return self.fc(y)


class Probabilities(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else y.sigmoid()  # in eval mode alone


class Branches(Net):
    def features(self, x):
        x = super().features(x)
        return x.relu() if self.training and x.mean() > 0 else x  # by a value


class Draws(Net):
    def features(self, x):
        return super().features(x) * (2.0 if self.training and random.random() < 0.5 else 1.0)


class Constant(Net):
    def features(self, x):
        return super().features(x) * torch.tensor(2.0 if self.training else 1.0)  # a constant


class OfTheWhole(nn.Module):
    def forward(self, x):
        return x + torch.randn(1, 8, 1, 1) if self.training else x


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(0.1)

    def forward(self, x):
        return x + self.scale * torch.randn_like(x) if self.training else x  # held


@pytest.mark.parametrize(
    "make, message",
    [
        (Several, r"test_modes.py:\d+ \(.*# of two\)"),
        (Sizes, r"test_modes.py:\d+ \(.*# a size\)"),
        (Auxiliary, r"auxiliary in .*test_modes.py:\d+ \(.*# a second head\)"),
        (Probabilities, r"\(.*# in eval mode alone\)"),
        (Branches, r"in training mode.*\(.*# by a value\)"),
        (Draws, "Draws draws random numbers in training"),
        (Constant, r"\(.*# a constant\)"),
        (lambda: Net(OfTheWhole()), "OfTheWhole middle .* only the whole network's channels"),
        (lambda: Net(Holds()), r"middle in .*\(.*# held\)"),
    ],
)  # fmt: skip
def test_what_a_part_cannot_do_is_refused(make, message):
    before = random.getstate(), torch.get_rng_state()
    model = make()
    random.setstate(before[0])
    torch.set_rng_state(before[1])
    with pytest.raises(SplitError, match=message) as e:
        timm_dd.split(model, 2, example_input=IMAGE)
    assert "\n" not in str(e.value)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1]), "nothing was drawn"


class Frozen(Net):
    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


def test_modules_stay_in_eval_mode():
    """As the model has them; after ``train()``, as the model's own leaves them. In copies and packed too."""
    by_hand, own = Net(), Frozen()
    by_hand.bn.eval()
    for model, stays in ((by_hand, False), (own.train(), True)):
        parts = timm_dd.split(model, 2, example_input=IMAGE, domain=Domain.full(2))
        networks = [*parts, *copy.deepcopy(parts), parts.packed(), copy.deepcopy(parts.packed())]
        for network in networks:
            assert (network.training, network.conv.training, network.bn.training) == (True, True, False)
        x = torch.randn(4, 3, 12, 12)
        packed, own_results = networks[-2](torch.stack(parts.crops(x))), parts(x)
        torch.testing.assert_close(packed, own_results)
        assert parts[0].bn.num_batches_tracked == 0 == networks[-2].bn.num_batches_tracked[0]
        for network in networks:
            network.eval()
            network.train()
            assert (network.training, network.conv.training, network.bn.training) == (True, True, not stays)


def test_dropout_of_a_frozen_module():
    """By the mode of the module that calls the function."""
    model = nn.Sequential(Functions(), nn.Identity())
    model[0].eval()
    (part,) = timm_dd.split(model, 1, example_input=IMAGE)
    x = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(part(x), model(x))
    assert torch.equal(run(part, x, 1), run(part, x, 2)) and not torch.equal(run(part.train(), x, 1), run(part, x, 2))


class WithoutGradient(Net):
    def features(self, x):
        x = super().features(x)
        with torch.no_grad():
            gate, channels = x.sigmoid(), x.shape[1]
            a, b = gate.chunk(2, 1)
            highest = x.max(2, keepdim=True)
        return x * torch.cat([b, a], 1) * channels + highest[0]


def test_blocks_without_gradients():
    model, x = WithoutGradient(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():  # around the split it means nothing
        (part,) = timm_dd.split(model, 1, example_input=IMAGE)
    for network in (model, part):
        network(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), part.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    halves = timm_dd.split(model, 2, example_input=IMAGE, domain=Domain.full(2)).eval()
    torch.testing.assert_close(sum(halves(x)), timm_dd.merge(halves).eval()(x))


def test_a_timm_model_drops():
    """By its arguments: paths, blocks, the classifier's input."""
    x = torch.randn(4, 3, 32, 32)
    for given in ({"drop_path_rate": 0.5}, {"drop_block_rate": 0.5}, {"drop_rate": 0.5}):
        parts = timm_dd.split("resnet10t", 2, img_size=32, domain=Domain.full(2), zero_init_last=False, **given)
        assert not torch.equal(run(parts, x, 1), run(parts, x, 2))
        parts.eval()
        assert torch.equal(run(parts, x, 1), run(parts, x, 2))
