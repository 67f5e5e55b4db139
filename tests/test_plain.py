"""What a model does besides its forward's tensors: outputs of other kinds, hooks."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import timm
import torch
from conftest import RELATIVE, images, shake
from test_rules import net
from torch import nn
from torch.nn.utils import prune, weight_norm

import timm_dd
from timm_dd import Domain, SplitError


@dataclass
class Output:
    logits: torch.Tensor


Pair = namedtuple("Pair", "logits double")


class ModelOutput(OrderedDict):
    pass


class Gives(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.net, self.give = net(), give

    def forward(self, x):
        return self.give(self.net(x))


GIVEN = {
    "a named tuple": lambda y: Pair(y, 2 * y),
    "None": lambda y: (y, None),
    "numbers": lambda y: {"logits": y, "classes": 5, "sizes": [y.shape[1]]},
    "a class of dict": lambda y: ModelOutput(logits=y, more=(2 * y, None)),
}


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize("name", GIVEN)
def test_outputs_of_several_kinds(name):
    x = images(2, 3, 9, 9)
    parts = shake(timm_dd.split(Gives(GIVEN[name]), 3, domain=Domain.full(3), example_input=x))
    merged = timm_dd.merge(parts).double().eval()
    assert parts.plan.exact
    whole, own = leaves(merged(x)), leaves(parts(x))
    assert len(whole) == len(own) > 1
    for w, terms in zip(whole, own):
        assert torch.allclose(w, terms.sum(0), rtol=RELATIVE) if isinstance(w, torch.Tensor) else w == terms


class Strict(dict):
    """Of entries by name alone."""

    def __init__(self, **entries):
        super().__init__(entries)


class Closed(dict):
    def __init__(self):
        super().__init__()


@dataclass
class Registered:
    logits: torch.Tensor
    more: tuple


torch.utils._pytree.register_dataclass(Registered)


@torch.no_grad()
@pytest.mark.parametrize("kind", [ModelOutput, Strict, OrderedDict, Registered])
def test_outputs_of_a_class_stay_of_that_class(kind, tmp_path):
    """Of parts, of all of them, packed, and of parts that were loaded; inside a list too."""
    x = images(2, 3, 9, 9)
    model = Gives(lambda y: [kind(logits=y, more=(2 * y, None))])
    parts = shake(timm_dd.split(model, 2, domain=Domain.full(2), example_input=x))
    parts.save(tmp_path)
    loaded = timm_dd.Parts.load(tmp_path, model)
    (whole,) = timm_dd.merge(parts).double().eval()(x)
    outputs = (parts(x), loaded.eval()(x), parts.packed()(torch.stack(parts.crops(x))))
    assert type(parts[0](x)[0]) is kind and parts.plan.exact
    for (found,) in outputs:
        assert type(found) is kind
        found, expected = (v if isinstance(v, dict) else vars(v) for v in (found, whole))
        assert torch.allclose(expected["logits"], found["logits"].sum(0), rtol=RELATIVE)
        assert found["more"][1] is None and torch.allclose(expected["more"][0], found["more"][0].sum(0), rtol=RELATIVE)


def test_a_class_that_is_not_made_of_its_entries_is_refused():
    def give(y):
        value = Closed()
        value["logits"] = y
        return value

    with pytest.raises(SplitError, match="gives a Closed, which cannot be made of its entries; return a dict"):
        timm_dd.split(Gives(give), 2, example_input=images(1, 3, 9, 9))


@pytest.mark.parametrize("give", [Output, lambda y: {"inside": [Output(logits=y)]}])
def test_outputs_of_unknown_classes_are_refused(give):
    with pytest.raises(SplitError, match=r"Gives puts tensors into a Output at .*expected a tensor, or a tuple"):
        timm_dd.split(Gives(give), 2, example_input=images(1, 3, 9, 9))


def hooked(register, *path):
    model = net(nn.Sequential(nn.Tanh()))
    for name in path:
        getattr(model.get_submodule(name), register)(lambda *a, **k: None)
    return model


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("path", ["", "0", "2", "2.0"])
def test_hooks_are_refused_by_module(register, path):
    with pytest.raises(SplitError, match=rf"^{path or 'Sequential'} has a hook, .*; remove the hook"):
        timm_dd.split(hooked(register, path), 2, example_input=images(1, 3, 9, 9))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_weights_that_hooks_compute_are_refused(change):
    model = net()
    change(model[0])
    with pytest.raises(SplitError, match="^0 has a hook, .*remove the hook"):
        timm_dd.split(model, 2, example_input=images(1, 3, 9, 9))


def test_no_proxies_are_left_in_the_users_model():
    model = timm.create_model("test_resnet", features_only=True, feature_cls="hook").eval()
    with pytest.raises(SplitError, match="has a hook, .*remove the hook"):
        timm_dd.split(model, 2, example_input=torch.zeros(1, 3, 32, 32))
    assert all(isinstance(y, torch.Tensor) for y in model(torch.zeros(1, 3, 32, 32)))
