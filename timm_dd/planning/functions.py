"""Autograd functions of a model's own: where each element is by itself, forward and backward, a module of the graph
calls them, so that parts have their backward pass.

Memory-efficient activations, straight-through estimators and gradient reversal are such, which is found by value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.autograd import Function

from ..errors import SplitError
from .modes import line_here

SIZES = (3, 4, 5, 6, 7)  # of the random tensor on which it is tried: no two alike
NAME = "_function_"  # and a number: of the modules in the graph
SAME = 1e-9  # in float64, how near results are: loops for long rows round otherwise than those for short ones


class ElementwiseFunction(nn.Module):
    """A function of one tensor.

    Args:
        function: its class.
        before, after: the other arguments, around the tensor.
    """

    def __init__(self, function: type[Function], before: tuple, after: tuple):
        super().__init__()
        self.function, self.before, self.after = function, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(*self.before, x, *self.after)

    def extra_repr(self) -> str:
        return self.function.__name__

    def is_elementwise(self, dims: int) -> bool:
        """Whether, of tensors of so many dims, each slice by itself has the result and the gradient that it has in the
        whole."""
        x, grad = (_random(dims, seed) for seed in (0, 1))
        try:
            whole = self._results(x, grad)
            slices = ((dim, i) for dim in range(dims) for i in range(x.shape[dim]))
            return all(
                _near(t.narrow(dim, i, 1), alone)
                for dim, i in slices
                for t, alone in zip(whole, self._results(x.narrow(dim, i, 1), grad.narrow(dim, i, 1)))
            )
        except Exception:  # any function may refuse these sizes, or double precision, in its own way
            return False

    def is_linear(self, dims: int) -> bool:
        """Whether it gives the sum of its results for the sum of tensors."""
        a, b = (_random(dims, seed) for seed in (2, 3))
        return _near(self(a) + self(b), self(a + b))

    def _results(self, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        """What it gives, and the gradient with respect to x; it may not write into x."""
        given = x.clone().requires_grad_()
        with torch.enable_grad():
            y = self.forward(given)  # not as a module, which is traced
        if y.shape != x.shape or not torch.equal(given, x):
            raise ValueError
        return [y.detach(), *torch.autograd.grad(y, given, grad)] if y.requires_grad else [y]


def _random(dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return 3 * torch.randn(SIZES[:dims], dtype=torch.float64, device="cpu", generator=generator)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=SAME, atol=SAME, equal_nan=True)


def called(tracer: Any, function: type[Function], args: tuple, kwargs: dict) -> fx.Proxy:
    """The symbol of what a function gives: a module of the `Tracer`'s graph calls it.

    Raises:
        SplitError: it is none of each element of one tensor.
    """
    symbols = [i for i, a in enumerate(args) if issubclass(type(a), fx.Proxy)]
    if len(symbols) == 1 and not kwargs:
        x, module = args[symbols[0]], ElementwiseFunction(function, args[: symbols[0]], args[symbols[0] + 1 :])
        if module.is_elementwise(tracer.ask(x.node, torch.Tensor.dim, 0)):
            count = sum(n.target.startswith(NAME) for n in tracer.graph.find_nodes(op="call_module"))
            vars(tracer.root)[f"{NAME}{count}"] = module  # none of its modules, which a forward may go through
            return tracer.create_proxy("call_module", f"{NAME}{count}", (x,), {})
    raise SplitError(
        f"{function.__name__} at {line_here()} has a backward pass of its own, not of each element alone, so nothing "
        "is known of its channels; call it in a module that has a rule (docs/adding-a-rule.md), or write it in torch's "
        "operations"
    )
