"""Restriction: a model and a plan become K narrow graphs, each with the global model's keys."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..algebra.domain import Domain, check_parts
from ..errors import public
from ..planning.plan import Plan
from .claim import check_claim
from .parts import Parts
from .source import Network


@public
def split(
    model: str | nn.Module,
    parts: int,
    *,
    domain: Domain | None = None,
    narrow: str = "replicate",
    width_divisor: int | None = None,
    reconstruct: bool = False,
    example_input: Any = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    seed: int | None = None,
    check: bool = False,
    **kwargs: Any,
) -> Parts:
    """Cut a network's width into K parts and its input into K boxes.

    Args:
        model: a timm name, or your own nn.Module, whose weights are sliced as they are.
        parts: K, from 1 up; need not divide the widths.
        domain: K boxes; by default the most square grid without overlap.
        narrow: layers with fewer channels than K stay whole in every part, with a warning that names them
            (``replicate``), or are an error (``refuse``).
        width_divisor: by which every width is divided, K unless given; only K parts of a K-th can be merged.
        reconstruct: the output has the shape of the input, and each part gives that of its box (an auto-encoder).
        example_input: (B, C, *size), or (B, F) for features, for your own nn.Module; only its shape counts. Of a
            network of several inputs a tuple of its arguments, or a dict by name, see `planning.inputs`: images of one
            size are cut by the domain, every part has the others whole.
        img_size: pixels, for a timm name; by default the model's own.
        pretrained: slice timm's pretrained weights; otherwise fresh weights, re-scaled to their smaller fans.
        seed: of the fresh weights; by default torch's global generator decides.
        check: compare by value what the plan calls exact, with random weights and inputs in float64; it takes about
            as long as five images through the network.
        **kwargs: for `timm.create_model`.

    Raises:
        SplitError: what came cannot be split, with the node, the size and what to do; a claim that is false.

    Source: gu2022 section 2.1.2; 2.4 for features, sequences and auto-encoders.
    """
    check_parts(parts)
    options = {"img_size": img_size, "pretrained": pretrained, "seed": seed, **kwargs}
    network = Network.of(model, example_input, reconstruct=reconstruct, **options)
    graph, plan = network.plan(parts, domain, narrow, width_divisor)
    made = Parts([network.part(graph, plan, k) for k in range(parts)], plan, graph, network.origin, seed)
    if check:
        check_claim(made)
    return made


@public
def plan(
    model: str | nn.Module,
    parts: int,
    *,
    domain: Domain | None = None,
    narrow: str = "replicate",
    width_divisor: int | None = None,
    reconstruct: bool = False,
    example_input: Any = None,
    img_size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan of `split`, without any weights in memory; arguments and errors as there."""
    check_parts(parts)
    options = {"img_size": img_size, **kwargs}
    network = Network.of(model, example_input, reconstruct=reconstruct, with_weights=False, **options)
    return network.plan(parts, domain, narrow, width_divisor)[1]
