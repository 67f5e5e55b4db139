"""The network to be split, and what becomes of it: its graph, its plan, its parts.

`split`, `plan` and `profile` make a `Network` once, from a timm name or from your own nn.Module; loading makes it from
a plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import fx, nn

from .. import models
from ..algebra.domain import Domain, default_domain, spatial
from ..errors import MergeError, SplitError, shown
from ..planning.graphs import Graph, skeleton
from ..planning.inputs import Inputs, signature_of
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.rules import has_rule
from ..planning.trace import trace
from ..storage.tensorfile import DTYPES
from .emit import emit, slices
from .trial import check_parts_run

NARROW = ("replicate", "refuse")  # what becomes of widths below K
OF_A_NAME = ("img_size", "pretrained", "seed")  # options that are no arguments of `timm.create_model`


@dataclass(frozen=True, eq=False)
class Network:
    """A network to be split.

    Attributes:
        module: with the weights to be sliced, or without any where a plan is enough.
        inputs: what it takes; their image is (C, *size), or (F,).
        output: ``logits``, ``features`` or ``boxes``, see `planner.analyse`.
        name, args: by which any timm makes it; None and {} for your own nn.Module.
        fresh: its weights are random, and are re-scaled in the parts.
        batch: of the example, where the network takes no two images: one that folds 4 frames into one takes 4.
    """

    module: nn.Module
    inputs: Inputs
    output: str
    name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    batch: int = 2

    @classmethod
    def of(
        cls,
        model: str | nn.Module,
        example_input: Any = None,
        *,
        reconstruct: bool = False,
        with_weights: bool = True,
        **options: Any,
    ) -> Network:
        """From the arguments of `split`; unless `with_weights`, none are in memory.

        Raises:
            SplitError: arguments that do not go with `model`.
        """
        _check_type("model", model, (str, nn.Module), "a timm name or a torch module")
        if isinstance(model, torch.jit.ScriptModule):
            raise SplitError(f"{type(model).__name__} has no Python code to trace; split the module that it is made of")
        if isinstance(model, str):
            return cls._of_name(model, reconstruct, with_weights, **options)
        given = [name for name, value in options.items() if value or name not in OF_A_NAME]
        if given:
            raise SplitError(f"{', '.join(given)}: only for a timm name; a module is split as it is")
        _check_tensors(model)
        inputs, batch = Inputs.of(example_input, signature_of(model))
        module = model if with_weights else skeleton(model)
        return cls(module, inputs, _output(model, reconstruct), batch=max(batch, 2))

    @classmethod
    def _of_name(
        cls,
        name: str,
        reconstruct: bool,
        with_weights: bool,
        /,  # so that `kwargs` may have any names
        img_size: int | tuple[int, ...] | None = None,
        pretrained: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Network:
        _check_type("seed", seed, (int, NoneType), "a whole number")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise SplitError(f"seed: expected a whole number that 64 bits hold, got {shown(seed)}")
        args = models.arguments(name, img_size=img_size, **kwargs)
        create = models.create if with_weights else models.create_empty
        module = create(name, pretrained=pretrained, seed=seed, **args)
        size = models.input_size(module, img_size, kwargs.get("in_chans"))
        registered = models.registered(name, module, args)
        module = module if with_weights else skeleton(module)
        fresh = not (pretrained or kwargs.get("checkpoint_path"))
        return cls(module, Inputs.image(size), _output(module, reconstruct), *registered, fresh=fresh)

    @classmethod
    def of_plan(cls, plan: Plan, model: nn.Module | None) -> Network:
        """The network that was split by `plan`; `model` where it was your own nn.Module. Errors of `plan_model`."""
        module, inputs = plan_model(plan, model), plan.inputs or Inputs.image(plan.input_size)
        return cls(module, inputs, plan.output, plan.model, plan.model_args, batch=plan.batch)

    @property
    def input_size(self) -> tuple[int, ...]:
        """(C, *size) of the whole image, or (F,)."""
        return self.inputs.size

    @property
    def origin(self) -> nn.Module | None:
        """The user's module, where it was no timm name."""
        return self.module if self.name is None else None

    def trace(self, batch: int | None = None) -> Graph:
        """Its graph on the meta device, of a `batch` of images, by default the network's own."""
        size, batch = self.input_size, self.batch if batch is None else batch
        return trace(skeleton(self.module), has_rule, size, batch, self.inputs)

    def plan(
        self, parts: int, domain: Domain | None = None, narrow: str = "replicate", width_divisor: int | None = None
    ) -> tuple[Graph, Plan]:
        """Its graph, and its plan for K parts; arguments and errors as in `split`."""
        if domain is None:
            domain = default_domain(parts, len(spatial(self.input_size)))
        if narrow not in NARROW:
            raise SplitError(f"narrow is 'replicate' or 'refuse', got {shown(narrow)}")
        _check_type("domain", domain, (Domain,), "a timm_dd.Domain")
        if domain.parts != parts:
            raise SplitError(
                f"expected {parts} boxes, one for each part, but {domain} has {domain.parts}; "
                "use as many boxes as parts"
            )
        divisor = parts if width_divisor is None else width_divisor
        if not isinstance(divisor, int) or divisor < 1:
            raise SplitError(f"width_divisor is a whole number from 1 up, got {divisor!r}")
        replicate = narrow == "replicate"
        try:
            return self._plan(2, divisor, domain, replicate)
        except SplitError:
            if self.batch == 2:
                raise
            return self._plan(self.batch, divisor, domain, replicate)

    def _plan(self, batch: int, divisor: int, domain: Domain, replicate: bool) -> tuple[Graph, Plan]:
        graph, size, named = self.trace(batch), self.input_size, (self.name, dict(self.args))
        plan = make_plan(graph, divisor, domain, size, *named, output=self.output, replicate=replicate)
        check_parts_run(graph, plan)
        _warn_of_narrow(plan)
        return graph, replace(plan, config=models.config(self.module, {"input_size": size}))

    def part(self, graph: fx.GraphModule, plan: Plan, k: int) -> fx.GraphModule:
        """Part k with its slices of the network's weights; `graph` and `plan` are from `plan`."""
        tensors = slices(plan, k, self.module, graph, [*plan.tensors, *plan.constants], self.fresh)
        return emit(graph, plan, k, tensors, self.module)


def plan_model(plan: Plan, model: nn.Module | None) -> nn.Module:
    """The global model's structure: timm's, without weights where it computes nothing, or the module that was split.

    Raises:
        MergeError: there is no such timm model, or no `model` is given where the plan is of one.
    """
    if plan.model is not None:
        models.check_known(plan.model, plan.model_args)
        create = models.create if plan.constants else models.create_empty
        return create(plan.model, **plan.model_args)
    if model is None:
        raise MergeError("these parts come from a module, not from a timm name; pass that module as `model`")
    return model


def _warn_of_narrow(plan: Plan) -> None:
    if plan.narrow:
        places = ", ".join(f"{where} of {n}" for where, n in plan.narrow)
        warnings.warn(
            f"too few channels for {plan.divisor} parts, so that these stay whole in every part: {places}; "
            "narrow='refuse' makes that an error",
            stacklevel=6,  # the caller of `split`, `plan` or `profile`
        )


def _check_tensors(model: nn.Module) -> None:
    """Raise SplitError unless parts can hold all that `model` saves, and it can be copied."""
    for name, t in model.state_dict(keep_vars=True).items():
        if isinstance(t, torch.Tensor) and t.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            kept = "as real ones, for torch.view_as_complex" if t.dtype.is_complex else "as one of these"
            raise SplitError(f"{name} is {str(t.dtype).removeprefix('torch.')}; parts hold {known}: keep it {kept}")
        if isinstance(t, torch.Tensor) and not t.is_leaf:
            raise SplitError(
                f"{name} is computed from other weights, of which torch makes no copy; detach() it, or compute it in "
                "forward or by a parametrization"
            )


def _output(model: nn.Module, reconstruct: bool) -> str:
    return "boxes" if reconstruct else "features" if models.gives_features(model) else "logits"


def _check_type(name: str, value: Any, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise SplitError(f"{name}: expected {expected}, got {type(value).__name__}")
