"""A false claim of exactness is found by value before anything is built on it; the mistakes are made in the rules."""

import warnings

import pytest
import torch
from conftest import RUN
from torch import nn

import timm_dd
from timm_dd import Domain, SplitError
from timm_dd.cli import main
from timm_dd.planning.rules import laws
from timm_dd.planning.rules.op import RULES
from timm_dd.surgery.claim import check_claim
from timm_dd.train import run

IMAGE = torch.empty(1, 3, 8, 8)


def net(*middle):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *middle, nn.Flatten(), nn.Linear(8 * 64, 5))


class Gated(nn.Module):
    """A branch that starts at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x, scale):
        x = self.a(x)
        return self.fc((x + nn.functional.softmax(x, 1) * self.b(x)).mean((2, 3)) * scale)


@pytest.fixture
def wrong_softmax(monkeypatch):
    """Softmax over channels is said to need each channel alone."""

    def softmax(op, x, *args, **kwargs):
        return op.result(x.axes, laws.pointwise, x)

    for target in (nn.Softmax, nn.functional.softmax):
        monkeypatch.setitem(RULES, target, softmax)


@pytest.fixture
def wrong_bias(monkeypatch):
    """The classifier's bias, of which each part has a copy, is said to be none of the sum."""
    contract = laws.contract
    linear = RULES[nn.Linear].__globals__
    monkeypatch.setitem(linear, "contract", lambda out, into, weight, bias: contract(out, into, weight, None))


@pytest.mark.parametrize("domain", [None, Domain.full(2), Domain.grid(1, 2, overlap=2)], ids=str)
@pytest.mark.parametrize("make", [lambda: (net(nn.Softmax(1)), IMAGE), lambda: (Gated(), (IMAGE, torch.ones(1, 1)))])
def test_a_false_claim_is_an_error(wrong_softmax, make, domain):
    model, example = make()
    assert timm_dd.split(model, 2, example_input=example, domain=domain).plan.exact
    with pytest.raises(SplitError, match="says exact, .* off by .*; do not use this split"):
        timm_dd.split(model, 2, example_input=example, domain=domain, check=True)


def test_what_holds_passes_and_leaves_everything_as_it_is():
    model, plain = Gated().train(), net()
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    parts = timm_dd.split(plain, 3, example_input=IMAGE, domain=Domain.grid(1, 3), check=True)
    assert check_claim(parts) < 1e-12 and check_claim(parts, seconds=0) is None
    with warnings.catch_warnings(action="error"):
        parts = timm_dd.split(model, 2, example_input=(IMAGE, torch.ones(2, 1)), check=True)
    assert parts.plan.approximations and check_claim(parts) is None
    assert model.training and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [
    lambda: timm_dd.split(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), 2,
                          example_input=torch.empty(1, 12), check=True),
    lambda: timm_dd.split("test_resnet", 4, features_only=True, check=True),
    lambda: timm_dd.split(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)), 2,
                          example_input=IMAGE, reconstruct=True, check=True),
    lambda: timm_dd.split("test_resnet", 4, width_divisor=2, check=True),
    lambda: timm_dd.split("test_resnet", 1, check=True),
])  # fmt: skip
def test_outputs_of_every_kind(make):
    assert len(make()) in (1, 2, 4)


def test_on_the_command_line(wrong_bias, capsys):
    assert main(["plan", "test_resnet", "4"]) == 0
    capsys.readouterr()
    assert main(["plan", "test_resnet", "4", "--check"]) == 1
    assert "the plan says exact" in capsys.readouterr().err


def test_a_plan_that_was_checked_says_so(capsys):
    assert main(["plan", "test_resnet", "4", "--check"]) == 0
    assert "checked: " in capsys.readouterr().out
    assert main(["plan", "test_resnet", "4", "--check", "--json"]) == 0
    assert "checked" not in capsys.readouterr().out


def test_training_checks_before_it_begins(wrong_bias, capsys, tmp_path):
    assert main(["train", *RUN, "--parts", "4", "--grid", "2x2", "--output", str(tmp_path), "--experiment", "x"]) == 1
    assert "the plan says exact" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_training_does_not_check_what_takes_long(wrong_bias, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(run, "check_claim", lambda parts, seconds: asked.append(check_claim(parts, 0)))
    assert main(["train", *RUN, "--parts", "4", "--grid", "2x2", "--output", str(tmp_path), "--experiment", "x"]) == 0
    assert asked == [None] and run.CHECK_SECONDS == 10
