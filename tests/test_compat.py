"""Each private API that the package uses does what the package needs of it."""

from torch import fx, nn

from timm_dd.compat import ASSERT_IS_NONE


def test_fx_asserts_that_an_argument_fixed_to_none_is_none():
    class Masked(nn.Module):
        def forward(self, x, mask=None):
            return x if mask is None else x * mask

    graph = fx.Tracer().trace(Masked(), concrete_args={"mask": None})
    (call,) = (node for node in graph.nodes if node.op == "call_function")
    assert call.target is ASSERT_IS_NONE
    assert call.args[0].op == "placeholder"
