"""Restriction: a model and a plan become K narrow graphs, each with the global model's keys.

`split` is the public verb; `emit` carries out a plan for one part and knows no operation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils.data import default_collate

from . import files, models
from .domain import Domain, check_parts, default_domain, spatial
from .errors import MergeError, SplitError, headline
from .packed import Packed, pack
from .plan import Plan, TensorPlan
from .planner import make_plan
from .rules import has_rule
from .trace import copy_graph, graph_module, skeleton, trace


class Parts(nn.ModuleList):
    """K trainable `torch.fx.GraphModule`, the parts of one model, and the plan that made them.

    A list of modules: ``len(parts)``, ``parts[2]``, iteration, ``parts.to(device)``; each part's state dict has the
    global model's keys.

    Attributes:
        plan: how they were split.
        seed: of their fresh weights; None if not known.
        epoch: how many they were trained for, for their files; None if not known. Set it as you train.
    """

    def __init__(
        self, modules: Sequence[fx.GraphModule], plan: Plan, module: nn.Module | None = None, seed: int | None = None
    ):
        super().__init__(modules)
        self.plan, self.seed, self.epoch = plan, seed, None
        # The user's own module, from which merge makes a copy; in a tuple, so that it is no submodule.
        self._origin = (module,)

    @property
    def origin(self) -> nn.Module | None:
        """The module that was split, where it was not a timm name."""
        return self._origin[0]

    def crops(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K views of the batch ``x`` (B, C, *size), one for each box.

        Raises:
            SplitError: a batch of another image size.
        """
        if tuple(x.shape[1:]) != self.plan.input_size:
            raise SplitError(f"expected images of {self.plan.input_size}, got a batch of shape {tuple(x.shape)}")
        return tuple(box.crop(x) for box in self.plan.boxes())

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits of the parts, each on its own box: (K, B, classes); their sum over K is (2.16). Of several outputs,
        each is stacked; reconstructions of boxes of several sizes are a list."""
        own = [part(crop) for part, crop in zip(self, self.crops(x))]
        shapes = {y.shape for y in own if isinstance(y, torch.Tensor)}
        return default_collate(own) if len(shapes) <= 1 else own

    def packed(self) -> Packed:
        """All parts as one `torch.fx.GraphModule` on stacked crops, with copies of their weights:
        ``packed(torch.stack(parts.crops(x)))`` is (K, B, classes). ``load`` and ``unload`` copy weights from the parts
        and back.

        Raises:
            SplitError: the parts have different widths, or boxes of different sizes.
        """
        return pack(list(self))

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give every part its slices of a global model's `state` dict."""
        for k, part in enumerate(self):
            names = part.state_dict()
            part.load_state_dict({name: restrict(state[name], self.plan.tensors[name], k, self.plan) for name in names})

    def save(self, folder: str | Path) -> None:
        """Write ``part-0000k-of-0000K.safetensors`` and ``plan.json``.

        Raises:
            MergeError: the folder cannot be written.
        """
        files.save_parts(folder, self.plan, [part.state_dict() for part in self], self.seed, self.epoch)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None) -> Parts:
        """The parts that `save` wrote. `model` is the module that was split, where it was not a timm name.

        Raises:
            MergeError: a part is missing or damaged, or belongs to another split.
        """
        with files.PartsFolder(folder) as opened:
            plan, states = opened.plan, [opened.load(k) for k in range(opened.plan.parts)]
            seed, epoch = opened.history()
        try:
            source = plan_model(plan, model)
            graph = trace(skeleton(source), has_rule, plan.input_size)
            modules = [_loaded(graph, plan, k, source, state) for k, state in enumerate(states)]
        except (SplitError, KeyError, AttributeError, IndexError, TypeError, RuntimeError) as e:
            raise MergeError(
                f"{folder}: the plan does not fit its model ({headline(e)}); use the version of timm that split it"
            ) from e
        parts = cls(modules, plan, model, seed)
        parts.epoch = epoch
        return parts


def _loaded(graph: fx.GraphModule, plan: Plan, k: int, source: nn.Module, state: dict) -> fx.GraphModule:
    """Part k with the tensors of its file, and with the constants that no file has."""
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    for name, t in _slices(plan, k, source, graph, plan.constants).items():
        state[name] = t.to(dtype) if t.is_floating_point() else t
    return emit(graph, plan, k, state, source.training)


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


def plan_model(plan: Plan, model: nn.Module | None) -> nn.Module:
    """The global model's structure: timm's, without weights where it computes nothing, or the module that was split."""
    if plan.model is not None:
        models.check_known(plan.model, plan.model_args)
        create = models.create if plan.constants else models.create_empty
        return create(plan.model, **plan.model_args)
    if model is None:
        raise MergeError("these parts come from a module, not from a timm name; pass that module as `model`")
    return model


def emit(
    graph: fx.GraphModule, plan: Plan, k: int, tensors: Mapping[str, torch.Tensor], training: bool = True
) -> fx.GraphModule:
    """Part k: a copy of the traced `graph` with the plan's edits and `tensors`, part k's by name."""
    part, copied = copy_graph(graph)
    nodes = {n.name: n for n in copied.nodes}
    modules = dict(part.named_modules(remove_duplicate=False))
    for edit in plan.edits:
        if not edit.where:
            _fix(nodes[edit.node], edit.values[k])
        elif edit.where[-1] == "*":
            _scale(nodes[edit.node], edit.where, edit.values[k])
        elif edit.module is None:
            node, (side, *where) = nodes[edit.node], edit.where
            setattr(node, side, _replace(getattr(node, side), where, edit.values[k]))
        else:
            *path, attr = edit.where
            owner = modules[".".join((edit.module, *path))]
            value = edit.values[k]
            setattr(owner, attr, tuple(value) if isinstance(value, (list, tuple)) else value)
    for output in plan.outputs:
        _spread(part, nodes[output.node], output.dim, output.axis.size, output.axis.index(k, plan.divisor))
    new: dict[int, torch.Tensor] = {}  # by the identity of the old: what was tied stays tied
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        trained = leaf in modules[path]._parameters
        own = modules[path]._parameters if trained else modules[path]._buffers
        old = own[leaf]
        if id(old) not in new:
            new[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if trained else tensor
        setattr(modules[path], leaf, new[id(old)])
    return graph_module(part, copied, type(graph).__name__).train(training)


def _fix(node: fx.Node, value: Any) -> None:
    """Put a number in the place of a node."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)


def _scale(node: fx.Node, where: tuple, value: float) -> None:
    """Multiply an argument of a node by a number."""
    side, i, _ = where
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(operator.mul, (getattr(node, side)[i], value))
    setattr(node, side, _replace(getattr(node, side), (i,), scaled))


def _spread(part: nn.Module, node: fx.Node, dim: int, size: int, index: torch.Tensor) -> None:
    """Put what leaves the network at `node` in its place among zeros: prolongation of features."""
    graph, name = node.graph, f"_{node.name}_{dim}"
    part.register_buffer(name, index, persistent=False)
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        spread = graph.call_function(prolong, (node, dim, size, graph.get_attr(name)))
    output.args = fx.node.map_arg(output.args, lambda n: spread if n is node else n)


def prolong(x: torch.Tensor, dim: int, size: int, index: torch.Tensor) -> torch.Tensor:
    """`x` at the indices `index` of a dim of `size`, and zeros elsewhere."""
    shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
    return x.new_zeros(shape).index_copy(dim, index.to(x.device), x)


def _replace(argument: Any, where: Sequence, value: Any) -> Any:
    """`argument` with `value` at `where`, a path through tuples, lists, dicts and slices."""
    if not where:
        return list(value) if isinstance(value, tuple) else value
    step, *rest = where
    if isinstance(argument, slice):
        bounds = {"start": argument.start, "stop": argument.stop, "step": argument.step, step: value}
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    if isinstance(argument, Mapping):
        return {**argument, step: _replace(argument[step], rest, value)}
    return type(argument)(_replace(a, rest, value) if i == step else a for i, a in enumerate(argument))


def _slices(
    plan: Plan, k: int, model: nn.Module, graph: fx.GraphModule, names: Iterable[str], fresh: bool = False
) -> dict[str, torch.Tensor]:
    """Part k's slices of a model's tensors; those of a fresh model's weights re-scaled. A tensor that the model makes
    while it runs is in the graph alone."""
    slices = {}
    for name in names:
        t = plan.constants.get(name) or plan.tensors[name]
        tensor = _attribute(model, name)
        slices[name] = restrict((_attribute(graph, name) if tensor is None else tensor).detach(), t, k, plan)
        if fresh and t.scale:
            slices[name].mul_(t.scale[k])
    return slices


def _attribute(module: nn.Module, name: str) -> torch.Tensor | None:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def restrict(tensor: torch.Tensor, t: TensorPlan, k: int, plan: Plan) -> torch.Tensor:
    """Part k's block of a global tensor, a copy. A summed bias is shared out: b/K to each of its K owners, and to the
    last what is left. Shares are multiples of b's last digit, so that they add up to b without rounding."""
    block = tensor
    for dim, index in enumerate(t.index(k, plan.divisor)):
        if index is not None:
            block = block.index_select(dim, index.to(tensor.device))
    if t.reduce != "sum":
        return block.clone(memory_format=torch.contiguous_format) if block is tensor else block
    owners = torch.zeros(plan.parts + 1, *t.shape)  # of each element among the first 0, 1 … K parts
    for j in range(plan.parts):
        owners[j + 1 :][(slice(None), *t.block(j, plan.divisor))] += 1
    before, total = (owners[i][t.block(k, plan.divisor)].to(tensor) for i in (k, -1))
    share = (block + block / total) - block
    return torch.where(before + 1 < total, share, block - (total - 1) * share)
