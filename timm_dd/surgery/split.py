"""Restriction: a model and a plan become K narrow graphs, each with the global model's keys.

`split` is the public verb; `emit` carries out a plan for one part and knows no operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .. import models
from ..algebra.domain import Domain, check_parts, default_domain, spatial
from ..errors import SplitError
from ..planning.graphs import skeleton
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.rules import has_rule
from ..planning.trace import trace
from .emit import _slices, emit
from .parts import Parts


def split(
    model: str | nn.Module,
    parts: int,
    *,
    domain: Domain | None = None,
    narrow: str | None = None,
    width_divisor: int | None = None,
    reconstruct: bool = False,
    example_input: torch.Tensor | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Parts:
    """Cut a network's width into K parts and its input into K boxes.

    Args:
        model: a timm name, or a module of one's own, whose weights are sliced as they are.
        parts: K, from 1 up; need not divide the widths.
        domain: K boxes; by default the most square grid without overlap.
        narrow: ``replicate`` keeps Widths smaller than K whole in every part; otherwise they are an error.
        width_divisor: by which every width is divided, K unless given; only K parts of a K-th can be merged.
        reconstruct: the output has the shape of the input, and each part gives that of its box (an auto-encoder).
        example_input: (B, C, *size), or (B, F) for features, for a module of one's own; only its shape counts.
        img_size: pixels, for a timm name; by default the model's own.
        pretrained: slice timm's pretrained weights; otherwise fresh weights, re-scaled to their smaller fans.
        seed: of the fresh weights; by default torch's global generator decides.
        **kwargs: for `timm.create_model`.

    Raises:
        SplitError: what came cannot be split, with the node, the size and what to do.

    Source: gu2022 section 2.1.2; 2.4 for features, sequences and auto-encoders.
    """
    check_parts(parts)
    _check_type("model", model, (str, nn.Module), "a timm name or a torch module")
    if isinstance(model, str):
        args = models.arguments(model, img_size=img_size, **kwargs)
        source = models.create(model, pretrained=pretrained, seed=seed, **args)
        size, origin = models.input_size(source, img_size, kwargs.get("in_chans")), None
        named = models.registered(model, source, args)
    else:
        given = [
            *kwargs,
            *(name for name, value in (("pretrained", pretrained), ("img_size", img_size), ("seed", seed)) if value),
        ]
        if given:
            raise SplitError(f"{', '.join(given)}: only for a timm name; a module is split as it is")
        if not isinstance(example_input, torch.Tensor) or example_input.ndim < 2:
            raise SplitError("a module needs example_input, a tensor (B, C, *size), to know the image's size")
        source, size, named, origin = model, tuple(example_input.shape[1:]), (None, {}), model
    graph, plan = _plan(skeleton(source), size, named, parts, domain, narrow, width_divisor, reconstruct)
    names, fresh = [*plan.tensors, *plan.constants], origin is None and not pretrained
    slices = (_slices(plan, k, source, graph, names, fresh) for k in range(parts))
    modules = [emit(graph, plan, k, tensors, source.training) for k, tensors in enumerate(slices)]
    return Parts(modules, plan, origin, seed)


def plan(
    model: str,
    parts: int,
    *,
    domain: Domain | None = None,
    narrow: str | None = None,
    width_divisor: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan of `split` for a timm name, without any weights in memory; arguments and errors as there."""
    check_parts(parts)
    args = models.arguments(model, img_size=img_size, **kwargs)
    empty = models.create_empty(model, **args)
    size = models.input_size(empty, img_size, kwargs.get("in_chans"))
    named = models.registered(model, empty, args)
    return _plan(skeleton(empty), size, named, parts, domain, narrow, width_divisor)[1]


def _check_type(name: str, value: Any, types: tuple, expected: str) -> None:
    if not isinstance(value, types):
        raise SplitError(f"{name}: expected {expected}, got {type(value).__name__}")


def _plan(
    blank: nn.Module,
    size: tuple[int, ...],
    named: tuple[str | None, dict],
    parts: int,
    domain: Domain | None,
    narrow: str | None,
    width_divisor: int | None,
    reconstruct: bool = False,
) -> tuple[fx.GraphModule, Plan]:
    if domain is None:
        domain = default_domain(parts, len(spatial(size)))
    if narrow not in (None, "replicate"):
        raise SplitError(f"narrow is None or 'replicate', got {narrow!r}")
    _check_type("domain", domain, (Domain,), "a timm_dd.Domain")
    if domain.parts != parts:
        raise SplitError(
            f"expected {parts} boxes, one for each part, but {domain} has {domain.parts}; use as many boxes as parts"
        )
    divisor = parts if width_divisor is None else width_divisor
    if not isinstance(divisor, int) or divisor < 1:
        raise SplitError(f"width_divisor is a whole number from 1 up, got {divisor!r}")
    graph = trace(blank, has_rule, size)
    output = "boxes" if reconstruct else "features" if models.gives_features(blank) else "logits"
    plan = make_plan(graph, divisor, domain, size, *named, output=output, replicate=narrow is not None)
    return graph, replace(plan, config=models.config(blank, {"input_size": size}))
