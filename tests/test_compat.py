"""Private interfaces of torch and timm: that they are there, and do what the package relies on."""

import ast
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import timm
import torch
from conftest import RELATIVE, images, shake, sum_error
from torch import nn

import timm_dd
from timm_dd import compat

PACKAGE = Path(compat.__file__).parent
Pair = namedtuple("Pair", "first second")


def test_a_storage_has_one_key_on_any_device():
    for device in ("cpu", "meta"):
        x = torch.empty(4, 6, device=device)
        views = [x, x.t(), x[1:, 2], x.view(24), x.detach()]
        assert len({compat.storage_key(v) for v in views}) == 1
        others = [x, x.clone(), torch.empty(4, 6, device=device)]
        assert len({compat.storage_key(v) for v in others}) == 3


def test_trees_of_what_a_forward_gives():
    """Tuples, lists, dicts and named tuples; None is no leaf's tensor."""
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = {"logits": a, "pair": Pair(b, [c, 7]), "none": None}
    leaves, spec = compat.tree_flatten(tree)
    assert [leaf for leaf in compat.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] == [a, b, c]
    assert compat.tree_unflatten(leaves, spec) == tree
    doubled = compat.tree_map_only(torch.Tensor, lambda t: 2 * t, tree)
    assert isinstance(doubled["pair"], Pair) and doubled["pair"].second[0].sum() == 6 and doubled["pair"].second[1] == 7


def test_a_mode_sees_every_operation():
    class Names(compat.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3, device="meta")
    with torch.no_grad(), Names() as names:
        torch.nn.functional.linear(x, x)
    assert names.seen == [torch.ops.aten.t, torch.ops.aten.mm]
    assert isinstance(torch.ops.aten.mm.default, compat.OpOverload) and torch.ops.aten.t.default.is_view
    x + x
    assert len(names.seen) == 2


class Named(nn.Module):
    """A module and a parameter have names that Python keeps for itself."""

    def __init__(self):
        super().__init__()
        layers = {"in": nn.Conv2d(3, 8, 3), 'a "b"\n': nn.Conv2d(8, 8, 3)}
        self.layers, self.head = nn.ModuleDict(layers), nn.Linear(8, 5)
        self.register_parameter("lambda", nn.Parameter(torch.rand(8, 1, 1)))

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x).relu()
        return self.head((x * getattr(self, "lambda")).mean((2, 3)))


def test_modules_have_any_name():
    x = images(2, 3, 9, 9)
    parts = shake(timm_dd.split(Named(), 2, domain=timm_dd.Domain.full(2), example_input=x.float()))
    assert parts.plan.exact and list(parts[0].state_dict()) == list(Named().state_dict())
    assert sum_error(parts, timm_dd.merge(parts), x) <= RELATIVE
    packed = parts.packed()(torch.stack((x, x)))
    for of_part, part, copied in zip(packed, parts, pickle.loads(pickle.dumps(list(parts)))):
        torch.testing.assert_close(of_part, part(x))
        assert torch.equal(copied(x), part(x))


@pytest.mark.parametrize("size", [[3, 64, 64], [3, 128, 96]])
def test_the_config_that_timm_writes(size):
    """It loads as timm's; neither the model's config nor the given one is changed."""
    model = timm.create_model("resnet10t", num_classes=7)
    before, given = dict(model.pretrained_cfg), {"input_size": size, "mean": [0.5] * 3}
    found = compat.timm_config(model, given)
    assert given == {"input_size": size, "mean": [0.5] * 3} and model.pretrained_cfg == before
    assert found["architecture"] == "resnet10t" and found["num_classes"] == 7
    assert found["pretrained_cfg"]["mean"] == [0.5] * 3


def test_private_names_are_imported_here_alone():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and path.name != "compat.py":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert {name for name in names if name.startswith("_")} <= {"__future__"}, (path, names)
