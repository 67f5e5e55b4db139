"""A short run of the random networks, and what failed once; `python tests/fuzz_networks.py` is the long one."""

import warnings
from collections import Counter

import fuzz_networks
import pytest
from conftest import NARROW
from fuzz_networks import ROWS, STEPS, Failure, Recipe, drawn, fuzz, judge, shrunk
from torch import nn

from timm_dd.planning.rules import laws
from timm_dd.planning.rules.op import RULES

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of packed attention on CPUs


def test_random_networks():
    """No false claim, nothing but SplitError; few that are called approximate are exact in fact."""
    counts, failures = fuzz(0, 200)
    assert failures == []
    kinds = Counter(verdict.split(":")[0] for verdict in counts.elements())
    assert set(kinds) <= {"exact", "approximate", "needless", "refused", "not finite"}
    assert kinds["exact"] > 30 and kinds["approximate"] > 60
    assert kinds["refused"] < 40 and kinds["needless"] < kinds["approximate"] / 8


@pytest.mark.parametrize("name", ROWS)
def test_what_failed_once(name):
    recipe, verdict = ROWS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NARROW)
        assert judge(recipe).split(":")[0] == verdict


def test_a_network_is_the_same_again_and_every_step_is_drawn():
    assert drawn(7) == drawn(7) != drawn(8)
    assert {name for i in range(200) for name, *_ in drawn(i).steps} == set(STEPS)


def test_a_wrong_rule_is_found(monkeypatch):
    """And what has nothing to do with it is left out of the recipe."""
    recipe = Recipe(8, (("activation", 1, 0), ("layer_norm", 1, 0), ("halves", 0, 0)), "two", "x, y", 2)
    monkeypatch.setitem(RULES, nn.LayerNorm, wrong_norm)
    with pytest.raises(Failure, match="exact, but off by"):
        judge(recipe)
    assert shrunk(recipe) == Recipe(8, (("layer_norm", 1, 0),))
    assert fuzz_networks.failure(recipe).startswith("Failure: exact")


def wrong_norm(op, x):
    """LayerNorm over channels that are said to be each on its own."""
    axis = op.axis(x, -1)
    op.param("weight", axis)
    op.param("bias", axis)
    op.set("normalized_shape", lambda k: (op.part_size(axis, k),))
    return op.result(x.axes, laws.per_channel(axis, *op.names("weight", "bias")), x)
