"""What both passes found becomes a `Plan`: plain data, with the K values of all that differs between parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..algebra.widths import Axis
from .inputs import leaves
from .plan import EditPlan, Layer, OutputPlan, Plan, TensorPlan
from .reader import Reading
from .relations import Cuts, Relations
from .rules.laws import UNSCALABLE
from .rules.op import Edit, Op, Param, Value


def assemble(
    reading: Reading,
    relations: Relations,
    narrow: tuple[tuple[str, int], ...],
    model: str | None,
    model_args: dict,
) -> Plan:
    """The plan of a graph, with timm's name and arguments of its model."""
    stored, tensors = reading.gm.state_dict().keys(), reading.notes.tensors
    plans = {name: _tensor(reading, relations, name, t) for name, t in tensors.items()}
    return Plan(
        model=model,
        model_args=model_args,
        parts=reading.domain.parts,
        divisor=reading.divisor,
        input_size=reading.input_size,
        output=reading.output,
        domain=reading.domain,
        tensors={name: t for name, t in plans.items() if name in stored},
        constants={name: t for name, t in plans.items() if name not in stored},
        edits=tuple(_edit(e, relations.cuts, reading.domain.parts) for e in reading.notes.edits),
        outputs=tuple(dict.fromkeys(_outputs(reading, relations.cuts))),
        head=_head(reading, relations),
        approximations=tuple(relations.approximations),
        layers=tuple(_layers(reading, relations)),
        narrow=narrow,
        batch=reading.sizes.batch,
        inputs=None if reading.gm.inputs.is_one_image else reading.gm.inputs,
    )


def fresh_scale(fan_in: float, fan_out: float) -> float:
    """Factor on a slice of a fresh weight whose fans are `fan_in` and `fan_out` times smaller in the part.

    A layer whose fans both shrink K times keeps the variance of its outputs and of its gradients with weights of K
    times the variance. The first layer (2.11) and the last (2.14) have one fan of full size and cannot keep both:
    with s times the variance in each, features get s, the gradients of features s, the logits s²/K. s = K^(1/3)
    makes the largest of the three deviations smallest, K^(1/3): below 2 up to K = 7.
    """
    small, large = sorted((fan_in, fan_out))
    return math.sqrt(small ** (2 / 3) * large ** (1 / 3))


def rows(reading: Reading, relations: Relations) -> Iterator[tuple[Op, Value, tuple[str, ...]]]:
    """The operations with parameters, or with reasons why they are approximate; of several results the first."""
    reasons: dict[str, list[str]] = {}
    for node, _, reason in relations.approximations:
        reasons.setdefault(node, []).append(reason)
    paths = (name.split(".") for name in reading.notes.params)
    owners = {".".join(path[:i]) for path in paths for i in range(1, len(path))}
    for op, result in reading.operations:
        has_params, why = op.module is not None and op.node.target in owners, tuple(reasons.get(op.node.name, ()))
        value = next((v for v in leaves(result) if isinstance(v, Value)), None)
        if value is not None and (has_params or why):
            yield op, value, why


def _tensor(reading: Reading, relations: Relations, name: str, tensor: torch.Tensor) -> TensorPlan:
    shape, cuts = tuple(tensor.shape), relations.cuts
    first = reading.notes.alias[name]
    param = reading.notes.params.get(first, Param((None,) * len(shape)))
    frozen = (None if a is None else cuts.frozen(a) for a in param.axes)
    axes = tuple(None if a is None or a.is_whole else a for a in frozen)
    placed = reading.divisor == 1 or any(a is not None and a.is_owned for a in axes)
    reduce = "sum" if first in relations.summed else "place" if placed else "mean"
    scale = _scale(param, cuts, reading.domain.parts)
    owned_rows = bool(axes) and axes[0] is not None and axes[0].is_owned
    outside = param.outside if owned_rows else "zero"  # a row that every part has lies in blocks alone
    return TensorPlan(shape, axes, reduce, isinstance(tensor, torch.nn.Parameter), scale, outside)


def _scale(param: Param, cuts: Cuts, parts: int) -> tuple[float, ...]:
    if param.fans is None:
        return ()

    def ratio(fan: Sequence[Axis], k: int) -> float:
        return math.prod(a.size / cuts.part_size(a, k) for a in fan)

    scale = tuple(fresh_scale(*(ratio(fan, k) for fan in param.fans)) for k in range(parts))
    return () if set(scale) == {1.0} else scale


def _edit(edit: Edit, cuts: Cuts, parts: int) -> EditPlan:
    axis = edit.value
    value = (lambda k: cuts.part_size(axis, k)) if isinstance(axis, Axis) else axis
    return EditPlan(edit.node, edit.module, edit.where, tuple(map(value, range(parts))))


def _outputs(reading: Reading, cuts: Cuts) -> Iterator[OutputPlan]:
    for node, value in reading.outputs:
        for dim, axis in enumerate(value.axes):
            if axis is not None and cuts.is_cut(axis):
                yield OutputPlan(node, dim, cuts.frozen(axis))


def _head(reading: Reading, relations: Relations) -> tuple[str, ...]:
    if UNSCALABLE in relations.head or reading.outputs_tiled:
        return ()
    return tuple(name for name, first in reading.notes.alias.items() if first in relations.head)


def _layers(reading: Reading, relations: Relations) -> Iterator[Layer]:
    for op, value, why in rows(reading, relations):
        at = (value.at[i].shape for i in reading.sizes.of_part)
        shapes = tuple(relations.cuts.part_shape(value.axes, shape, k)[1:] for k, shape in enumerate(at))
        yield Layer(op.path, op.name, value.shape[1:], shapes, why)
