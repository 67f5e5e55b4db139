"""What fx's symbols answer otherwise than tensors: the graph does what the module does, by value, or is refused."""

import functools
import operator

import pytest
import torch
from conftest import RELATIVE, images, shake, sum_error
from test_rules import fn, net
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

import timm_dd
from timm_dd import Domain, SplitError


def seen(change, read=torch.tanh):
    """Something in place, then what is read under the old name."""
    return lambda x: (change(x), read(x))[1]


def twice(x):
    both = [x] * 2
    both[0] += 1
    return both[1] * both[0].sigmoid()


def filled(x):
    """A tensor of zeros, of which a view is written."""
    new = x.new_zeros(x.shape)
    view = new.flatten(2)
    view += x.flatten(2)
    return new.exp()


def number(x):
    n = m = x.shape[1]
    n //= 2
    m += n
    return x * m


IN_PLACE = {
    "+=": seen(lambda x: operator.iadd(x, 0.5)),
    "-=": seen(lambda x: operator.isub(x, x.sigmoid())),
    "*=": seen(lambda x: operator.imul(x, x.shape[1])),
    "/=": seen(lambda x: operator.itruediv(x, 3)),
    "**=": seen(lambda x: operator.ipow(x, 2)),
    "//=": seen(lambda x: operator.ifloordiv(x, 0.3)),
    "%=": seen(lambda x: operator.imod(x, 0.3)),
    "channels": seen(lambda x: operator.iadd(x[:, 4:], 1)),
    "rows": seen(lambda x: operator.imul(x[:, :, 1], x[:, :, 0])),
    "transposed": seen(lambda x: operator.isub(x.transpose(2, 3), 0.5)),
    "by a method": seen(lambda x: x.flatten(2).mul_(0.5)),
    "detached": seen(lambda x: operator.iadd(x.detach(), 1)),
    "a list": twice,
    "zeros": filled,
    "an index": seen(lambda x: operator.setitem(x, (..., 0), 0.0)),
    "out of place": seen(lambda x: operator.iadd(x * 1, 5)),
    "a number": number,
    "a mask": seen(lambda x: operator.iand(x > 0, x < 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_changed_in_place_is_changed_for_all(name):
    x, model = images(2, 3, 9, 9), net(fn(IN_PLACE[name])).double()
    parts = shake(timm_dd.split(model, 2, domain=Domain.full(2), example_input=x))
    merged = timm_dd.merge(parts).eval()
    assert parts.plan.exact and sum_error(parts, merged, x) <= RELATIVE
    found, own = parts.packed()(torch.stack([x] * 2)), torch.stack([part(x) for part in parts])
    assert float((found - own).norm() / own.norm()) <= RELATIVE
    (alone,) = timm_dd.split(merged, 1, example_input=x)
    assert torch.equal(alone.eval()(x), merged(x))


@pytest.mark.parametrize("name", ["+=", "*=", "channels"])
def test_gradients_go_through_what_is_changed_in_place(name):
    x = images(2, 3, 9, 9)
    model = net(fn(lambda x: IN_PLACE[name](x * 2))).double().train()
    (part,) = timm_dd.split(model, 1, example_input=x)
    for network in (model, part.train()):
        network(x).square().sum().backward()
    for (key, p), (other, q) in zip(model.named_parameters(), part.named_parameters(), strict=True):
        assert key == other and torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def singled(x):
    return x.relu() if str(x.dtype) == "torch.float64" and f"{x.shape[1]}" == str(x.shape[1]) == "12" else x


ANSWERED = {
    "a text": singled,
    "a device": lambda x: x.relu() if x.device.type == "cpu" and x.is_cpu and not (x.is_meta or x.is_cuda) else x,
    "a device by name": lambda x: x.relu() if x.to("cpu").cpu().device == torch.device("cpu") else x,
    "where it is made": lambda x: (x + torch.zeros(1, device=x.device)).relu() if x.get_device() == -1 else x,
    "the type of its numbers": lambda x: x.relu() if x.type() == "torch.DoubleTensor" else x,
}


@pytest.mark.parametrize("name", ANSWERED)
def test_symbols_answer_as_their_values(name):
    x, answered = images(2, 3, 9, 9), ANSWERED[name]
    parts = shake(
        timm_dd.split(net(fn(lambda x: answered(x) - 0.5)).double(), 3, domain=Domain.full(3), example_input=x)
    )
    assert parts.plan.exact and sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
    assert "relu" in {node.target for node in parts[0].graph.nodes}


def of_autocast(x):
    with torch.autocast(device_type=x.device.type, enabled=False):
        return x.relu()


def test_a_block_of_autocast_may_ask_where_it_is():
    x = images(2, 3, 9, 9)
    assert timm_dd.split(net(fn(of_autocast)).double(), 3, domain=Domain.full(3), example_input=x).plan.exact


def put(x):
    y = x * 2
    y.data = x
    return y


UNSEEN = {
    "an identity": lambda x: x.relu() if x.dtype is torch.float64 else x,
    "an identity of a layout": lambda x: x.relu() if x.layout is torch.strided else x,
    "an address": lambda x: x.relu() if id(x.dtype) == id(torch.float64) else x,
    "its text": lambda x: x.relu() if repr(x.shape[1]) == "12" else x,
    "a key": lambda x: x.relu() if {12: True}.get(x.shape[1]) else x,
    "a key of a size": lambda x: x.relu() if {(9, 9): True}.get(tuple(x.shape[2:])) else x,
    "a member": lambda x: x.relu() if x.shape[1] in {12, 13} else x,
    "tracing": lambda x: x.relu() if is_fx_symbolic_tracing() else x,
    "an attribute": put,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_module_does_otherwise_is_refused(name):
    with pytest.raises(SplitError, match=r"does at .*test_witness.py:\d+ .*what its traced graph does not; .*`=="):
        timm_dd.split(net(fn(UNSEEN[name])).double(), 3, example_input=images(2, 3, 9, 9))


@functools.cache
def table(height, width, device):
    return torch.arange(float(height * width), dtype=torch.float64, device=device).view(int(height), int(width))


@functools.cache
def scale(channels):
    return channels**-0.5


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_caches_that_outlive_a_trace_hold_what_they_would(called):
    """Filled before the split, or by it."""
    x = images(2, 3, 9, 9)
    for cached in (table, scale):
        cached.cache_clear()
    model = net(fn(lambda x: x * table(x.shape[2], x.shape[3], x.device) * scale(x.shape[1]))).double()
    if called:
        model(x)
    for _ in range(2):
        parts = shake(timm_dd.split(model, 3, domain=Domain.full(3), example_input=x))
        assert parts.plan.exact and sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
    assert model(x).isfinite().all()


def test_what_both_do_is_no_matter_how_it_is_asked():
    """`is` of what symbols are not either."""
    kept = fn(lambda x: x if x.dtype is torch.half or x is None else x.relu())
    assert timm_dd.split(net(kept).double(), 3, domain=Domain.full(3), example_input=images(2, 3, 9, 9)).plan.exact


class Returns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)

    def forward(self, x):
        a, b = self.a(x).mean((2, 3)), self.b(x).mean((2, 3))
        return (a, b) if a.dtype is torch.float64 else (b, a)


def test_an_order_of_outputs_that_is_another_one_is_refused():
    with pytest.raises(SplitError, match="Returns does in what it returns what its traced graph does not"):
        timm_dd.split(Returns().double(), 3, example_input=images(2, 3, 9, 9))


def test_what_does_not_run_without_values_bears_no_witness():
    """It is split all the same."""
    x = images(2, 3, 9, 9)
    model = net(fn(lambda x: x.relu() * torch.tensor([1.0, 2.0]).tolist()[1]))
    parts = shake(timm_dd.split(model, 3, domain=Domain.full(3), example_input=x))
    assert parts.plan.exact and sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE


class Remembers(nn.Module):
    """Something from call to call."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.head = how, nn.Conv2d(3, 12, 1), nn.Linear(12, 5)
        self.register_buffer("mean", torch.rand(12))
        self.calls, self.seen, self.first = 0, [], None

    def forward(self, x):
        x = self.conv(x)
        return self.head(self.how(self, x, x.detach().mean((0, 2, 3))).mean((2, 3)))


def counted(self, x, mean):
    self.calls += 1
    return x * self.calls


def listed(self, x, mean):
    self.seen.append(0)
    return x * len(self.seen)


def once(self, x, mean):
    if self.first is None:
        self.first = mean
    return x - self.first[:, None, None]


def replaced(self, x, mean):
    self.mean = 0.9 * self.mean + 0.1 * mean
    return x - self.mean[:, None, None]


def moved(self, x, mean):
    self.mean *= 0.9
    self.mean.add_(0.1 * mean)
    return x - self.mean[:, None, None]


@pytest.mark.parametrize("how", [counted, listed, once, replaced])
def test_what_is_remembered_out_of_buffers_is_refused(how):
    with pytest.raises(SplitError, match="does at .*test_witness.py.* something else when it is called again"):
        timm_dd.split(Remembers(how), 3, example_input=images(2, 3, 9, 9).float())


@torch.no_grad()
def test_buffers_that_are_changed_in_place_are_those_of_the_parts():
    x = images(2, 3, 9, 9)
    parts = shake(timm_dd.split(Remembers(moved).double(), 3, domain=Domain.full(3), example_input=x))
    merged = timm_dd.merge(parts).eval()
    for _ in range(3):
        assert parts.plan.exact and sum_error(parts, merged, x) <= RELATIVE
