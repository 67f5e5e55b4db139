"""What a forward asks of the symbols that it is traced with, and what it hands them to: C code that takes a tensor for
granted, autograd functions, lists of the model's own tensors."""

import contextlib
import copy
import functools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import check_split
from torch import nn

import timm_dd
from timm_dd import Domain, SplitError


class Net(nn.Module):
    """A function of the maps between two convolutions and the classifier."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.more, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1), nn.Linear(12, 5)
        self.register_buffer("scale", torch.ones(1))
        self.body = body
        self.by_name, self.methods, self.bound = {"more": self.more}, [self.doubled], partial(self.scaled, by=2)

    def doubled(self, x):
        return 2 * self.more(x)

    def scaled(self, x, by):
        return by * self.more(x)

    def forward(self, x):
        return self.fc(self.more(self.body(self, self.conv(x)).relu()).mean((2, 3)))


def split(body):
    return timm_dd.split(Net(body), 2, domain=Domain.full(2), example_input=torch.empty(1, 3, 8, 8))


def double(x):
    return x * 2


C_CODE = [
    lambda net, x: torch.where(x > 0, x, 0.0),
    lambda net, x: torch.isin(x, 1.0) * x,
    lambda net, x: x.to(torch.result_type(x, 1.0)),
    lambda net, x: torch.as_tensor(x),
    lambda net, x: torch.asarray(x),
    lambda net, x: torch.Tensor([x.mean()]) * x,
    lambda net, x: torch.zeros(1).set_(x),
    lambda net, x: torch.jit.script(double)(x),
    lambda net, x: torch.Tensor._make_subclass(torch.Tensor, x),
    lambda net, x: torch.autograd.Variable(x),
    lambda net, x: torch.utils.dlpack.to_dlpack(x),
]


def hand_symbols_to_c_code():
    for number, body in enumerate(C_CODE):
        with contextlib.suppress(SplitError):
            split(body)
        print(number, flush=True)


def test_symbols_crash_no_c_code():
    """Each is split or refused; in a process of its own, which torch could kill."""
    code = "from test_symbols import hand_symbols_to_c_code as hand; hand()"
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split() == [str(n) for n in range(len(C_CODE))], done.stderr


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: torch.where(x > 0, x, 0.0),
        lambda net, x: x if isinstance(x, torch.autograd.Variable) else None,
        lambda net, x: (lambda a, b: a + b)(*torch.stack([x, x.relu()])),
        lambda net, x: sum(row for row in x.transpose(0, 2)).transpose(0, 1).unsqueeze(2),
        lambda net, x: torch.einsum("bchw,hw->bchw", (x, torch.ones(6, 6))),
        lambda net, x: x + torch.arange(x.shape[3], device=next(net.parameters()).device),
        lambda net, x: x * torch.ones(1, device=next(net.buffers()).device),
        lambda net, x: x + next(net.parameters()).new_zeros(x.shape[0], 1, 1, 1),
        lambda net, x: nn.functional.conv2d(x, dict(net.more.named_parameters())["weight"]),
        lambda net, x: x * torch.tensor([1.0, 2.0, 3.0] * 4).view(-1, 1, 1).to(next(net.parameters()).device),
        lambda net, x: net.more(x) if next(net.parameters()).device.type == "cpu" else x,
        lambda net, x: x.type(x.relu().type()),
        lambda net, x: torch.as_tensor(x) + torch.asarray(x, dtype=torch.float64).to(x.dtype),
        lambda net, x: x if torch.jit.isinstance(x, torch.Tensor) else None,
        lambda net, x: net.by_name["more"](x),
        lambda net, x: net.methods[0](x),
        lambda net, x: net.bound(x),
        lambda net, x: x if all(hasattr(x, name) for name in ("shape", "device")) else None,
    ],
)
def test_what_is_asked_and_listed_is_as_of_the_model(body):
    check_split(split(body))


class Swish(torch.autograd.Function):
    """Keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        s = ctx.saved_tensors[0].sigmoid()
        return gradient * s * (1 + ctx.saved_tensors[0] * (1 - s))


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, steps, x, by):
        return (x * steps).round() / steps * by

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient, None


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Clipped(Reversed):
    """Of other channels in the backward pass alone."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.norm()


class Centred(Reversed):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(1, keepdim=True)


class Written(Reversed):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x, by=2.0):
        return x * by

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.by = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.by, None


def without_gradients(net, x):
    with torch.no_grad():
        y = Swish.apply(x)
    return y + Swish.apply(x)


swish = Swish.apply
FUNCTIONS = {
    "without gradients": without_gradients,
    "held before": lambda net, x: swish(x),
    "with a context of its own": lambda net, x: Scaled.apply(x) + Scaled.apply(x, 3.0),
    "keeps its input": lambda net, x: Swish.apply(Swish.apply(x)),
    "straight through": lambda net, x: Rounded.apply(4, x, 0.5),
    "reversed": lambda net, x: Reversed.apply(x),
    "of a constant": lambda net, x: x * Swish.apply(torch.ones(1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_functions_of_each_element_keep_their_backward_pass(name):
    """The parts' gradients are the merged model's inside the blocks, packed too."""
    parts = split(FUNCTIONS[name])
    check_split(parts)
    x, merged = torch.randn(2, 3, 8, 8).double(), timm_dd.merge(parts).train()
    merged(x).sum().backward()
    packed = parts.train().packed()
    packed(torch.stack([x, x])).sum().backward()
    for k, part in enumerate(parts):
        part(x).sum().backward()
        own, block = part.conv.weight.grad, merged.conv.weight.grad[6 * k : 6 * (k + 1)]
        torch.testing.assert_close(own, block)
        torch.testing.assert_close(packed.get_parameter("conv.weight").grad[k], block)


def test_a_reversed_gradient_of_logits():
    """Linear in the forward pass: the sum of logits stays one."""
    model = nn.Sequential(Net(lambda net, x: x), Calls(Reversed))
    check_split(timm_dd.split(model, 2, domain=Domain.full(2), example_input=torch.empty(1, 3, 8, 8)))


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("function", [Clipped, Centred, Written])
def test_other_autograd_functions_are_refused(function):
    with pytest.raises(
        SplitError, match=rf"{function.__name__} at .*test_symbols.py:\d+ .* a backward pass of its own"
    ):
        split(lambda net, x: function.apply(x))


def test_the_device_on_which_a_model_is_traced_is_refused():
    with pytest.raises(SplitError, match=r"test_symbols.py:\d+ .*the device of a tensor of the model"):
        split(lambda net, x: x + torch.ones(1, device=net.state_dict()["fc.bias"].device))


CACHE = {}
LAST = None


class Helper:
    table = None

    def __call__(self, x):
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.linspace(0, 1, x.shape[-1]).to(x)
        return self.table


def in_a_dict(key):
    def grid(net, x):
        return CACHE[key(x)] if key(x) in CACHE else CACHE.setdefault(key(x), torch.arange(x.shape[-1]).to(x))

    return grid


def in_a_global(net, x):
    global LAST
    if LAST is None or len(LAST) != 1:
        LAST = (torch.arange(x.shape[-1]).type_as(x),)
    return LAST[0]


@functools.lru_cache
def table(size, like):
    return x.new_ones(size) if (x := like()) is not None else None


class Like:
    """What is alike, as a key, of any tensors."""

    def __init__(self, x):
        self.x = x

    def __call__(self):
        return self.x

    def __eq__(self, other):
        return isinstance(other, Like)

    def __hash__(self):
        return 0


OUTLIVING = {
    "a size": in_a_dict(lambda x: tuple(x.shape[2:])),
    "a number": in_a_dict(lambda x: int(x.shape[2])),
    "a text": in_a_dict(lambda x: f"{x.shape[2]}x{x.shape[3]}"),
    "a name of the module": in_a_global,
    "a helper": lambda net, x: net.helper(x),
    "functools": lambda net, x: table(int(x.shape[-1]), Like(x)),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", OUTLIVING)
def test_what_a_forward_keeps_elsewhere_is_its_own_after_a_split(name, called):
    CACHE.clear(), table.cache_clear(), globals().update(LAST=None)
    model, x = Net(lambda net, x: x * OUTLIVING[name](net, x)), torch.ones(2, 3, 8, 8)
    model.helper = Helper()
    expected = copy.deepcopy(model)(x)
    if not called:
        CACHE.clear(), table.cache_clear(), globals().update(LAST=None)
    with contextlib.suppress(SplitError):
        timm_dd.split(model, 2, domain=Domain.full(2), example_input=x)
    assert torch.equal(model(x), expected)
