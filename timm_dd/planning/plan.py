"""The plan: what each part is, as plain data.

A `Plan` is frozen, printable, JSON, and holds no tensor. It says for every parameter which of its elements part k has
and how merge makes one of the K, which numbers of the graph differ in a part, and where the merged network is not
exactly the sum of its parts. The `planner` makes it; `split` and `merge` carry it out and know no operation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch

from ..algebra.axes import FrozenAxis, block
from ..algebra.domain import Domain, check_parts, spatial
from ..algebra.view import Box, View
from ..errors import shown
from ..text import json_text, table
from .inputs import Inputs

FORMAT = 1


@dataclass(frozen=True)
class TensorPlan:
    """One parameter or buffer.

    Attributes:
        shape: in the global model.
        axes: one for each dim; None for a dim that every part has whole.
        trained: a parameter; otherwise a buffer.
        reduce: how merge makes the parts' tensors one: ``place`` each into its block, (2.11)–(2.14), their ``sum``
            or their ``mean``.
        scale: factor of a freshly initialised slice in part k, see `fresh_scale`; 1 where empty.
        outside: what the global tensor has outside all blocks, ``zero``, or in each row of the first dim the ``mean``
            of its block, for weights that are standardised.
    """

    shape: tuple[int, ...]
    axes: tuple[FrozenAxis | None, ...]
    reduce: str
    trained: bool = True
    scale: tuple[float, ...] = ()
    outside: str = "zero"

    def check(self, parts: int, divisor: int) -> None:
        """Raise ValueError unless this is a tensor of `parts` parts, in whose blocks each element has one owner."""
        if not all(map(_is_count, self.shape)) or len(self.axes) != len(self.shape):
            raise ValueError(f"unexpected shape {shown(self.shape)}")
        for axis, n in zip(self.axes, self.shape):
            if axis is not None and (axis.check(parts) or axis.size != n):
                raise ValueError(f"unexpected axis of {axis.size} in shape {shown(self.shape)}")
        if self.reduce not in ("place", "sum", "mean"):
            raise ValueError(f"unexpected reduce {shown(self.reduce)}")
        if self.outside != "zero" and (self.outside != "mean" or not self.shape):
            raise ValueError(f"unexpected outside {shown(self.outside)}")
        if self.reduce == "place" and divisor > 1 and not any(a is not None and a.is_owned for a in self.axes):
            raise ValueError("blocks that overlap")
        if type(self.trained) is not bool:
            raise ValueError(f"unexpected trained {shown(self.trained)}")
        numbers = all(type(factor) in (int, float) and math.isfinite(factor) for factor in self.scale)
        if len(self.scale) not in (0, parts) or not numbers:
            raise ValueError(f"unexpected scale {shown(self.scale)}")

    def index(self, k: int, divisor: int) -> tuple[torch.Tensor | None, ...]:
        """Part k's indices along each dim, None where it has all of them."""
        return tuple(None if a is None else a.index(k, divisor) for a in self.axes)

    def block(self, k: int, divisor: int) -> tuple:
        """Part k's elements of the global tensor, as an open index."""
        return block(self.shape, self.axes, k, divisor)

    def part_shape(self, k: int, divisor: int) -> tuple[int, ...]:
        return tuple(n if a is None else a.part_size(k, divisor) for n, a in zip(self.shape, self.axes))


SHARE = "/"


@dataclass(frozen=True)
class EditPlan:
    """A number of the graph or of a module's attribute, with its K values; at a place that ends with `SHARE`, with the
    numerators and denominators of the parts' shares of what the graph computes there."""

    node: str
    module: str | None
    where: tuple
    values: tuple


@dataclass(frozen=True)
class OutputPlan:
    """Features that leave the network: a part's channels along `dim` of `node`, in their places among zeros."""

    node: str
    dim: int
    axis: FrozenAxis


@dataclass(frozen=True)
class Layer:
    """A row of the printed plan: an operation with parameters, or one that is approximate, with the reasons."""

    path: str
    operation: str
    shape: tuple[int, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    reasons: tuple[str, ...] = ()

    def check(self, parts: int) -> None:
        """Raise ValueError unless this can be printed, for each of `parts` parts."""
        words = (self.path, self.operation, *self.reasons)
        counts = [n for shape in (self.shape, *self.part_shapes) for n in shape]
        if not _are_words(words) or not all(map(_is_count, counts)) or len(self.part_shapes) != parts:
            raise ValueError(f"unexpected layer {shown(self.path)}")


OUTPUTS = ("logits", "features", "boxes")


@dataclass(frozen=True)
class Plan:
    """How a model is split into `parts`; see the module.

    Attributes:
        model, model_args: timm's name and arguments; None and {} for your own nn.Module.
        divisor: of the widths; only K parts of a K-th of the width can be merged.
        input_size: (C, *size) of the whole image.
        output: ``logits``, ``features`` or ``boxes``, see `planner.analyse`.
        outputs: where the parts' outputs are different channels; empty for logits, of which every part gives all.
        constants: as `tensors`, for what the model computes and keeps out of its state dict (a fixed filter).
        head: parameters whose scaling scales the logits, for ``merge(head="mean")`` (2.22); empty if none do.
        config: timm's ``config.json`` of the merged model; None for what timm has no config for.
        narrow: what has fewer channels than there are parts, (operation, channels), and is whole in every part.
        batch: the number of images with which the model was traced, 2 wherever it takes two.
        inputs: what the network takes, where that is more than one batch of images.
        approximations: (node, module path, reason); empty means that with every part seeing the whole image
            F(x) = Σ F_k(x) to rounding, (2.16).
    """

    model: str | None
    model_args: dict
    parts: int
    divisor: int
    input_size: tuple[int, ...]
    output: str
    domain: Domain
    tensors: dict[str, TensorPlan]
    constants: dict[str, TensorPlan]
    edits: tuple[EditPlan, ...]
    outputs: tuple[OutputPlan, ...]
    head: tuple[str, ...]
    approximations: tuple[tuple[str, str, str], ...]
    layers: tuple[Layer, ...] = field(default=())
    config: dict | None = None
    narrow: tuple[tuple[str, int], ...] = ()
    batch: int = 2
    inputs: Inputs | None = None

    @property
    def exact(self) -> bool:
        """Whether the merged model is the sum of its parts, every part seeing the whole image, in eval mode."""
        return self.divisor == self.parts and not self.approximations

    def params(self, k: int | None = None) -> int:
        """The number of parameters of part `k`, or of the global model."""
        shapes = (t.shape if k is None else t.part_shape(k, self.divisor) for t in self.tensors.values() if t.trained)
        return sum(map(math.prod, shapes))

    def boxes(self) -> tuple[Box, ...]:
        """Of the parts, in the image of `input_size`."""
        return self.domain.boxes(spatial(self.input_size))

    def views(self) -> tuple[View, ...]:
        """What the parts see of the image of `input_size`: their boxes, at the domain's scale."""
        return self.domain.views(spatial(self.input_size))

    def part_input_size(self, k: int) -> tuple[int, ...]:
        """(C, *size) of what part `k` sees."""
        seen = self.views()[k].size
        return (*self.input_size[: len(self.input_size) - len(seen)], *seen)

    def to_json(self) -> dict:
        """What plan.json holds, as docs/format.md describes it."""
        d = {
            "format": FORMAT,
            "model": self.model,
            "model_args": self.model_args,
            "parts": self.parts,
            "width_divisor": self.divisor,
            "input_size": list(self.input_size),
            "output": self.output,
            "domain": self.domain.to_json(),
            "exact": self.exact,
            "approximations": [list(a) for a in self.approximations],
            "head": list(self.head),
            "tensors": {name: _tensor_to_json(t) for name, t in self.tensors.items()},
            "constants": {name: _tensor_to_json(t) for name, t in self.constants.items()},
            "edits": [[e.node, e.module, list(e.where), list(e.values)] for e in self.edits],
            "outputs": [[o.node, o.dim, o.axis.to_json()] for o in self.outputs],
            "layers": [_layer_to_json(r) for r in self.layers],
            "config": self.config,
            **({"batch": self.batch} if self.batch != 2 else {}),
            **({"inputs": self.inputs.to_json()} if self.inputs is not None else {}),
        }
        return {**d, "narrow": [list(n) for n in self.narrow]} if self.narrow else d

    @classmethod
    def from_json(cls, d: dict) -> Plan:
        """The plan that `to_json` described; ValueError, KeyError, TypeError or AttributeError if none was."""
        plan = cls(
            model=d["model"],
            model_args=dict(d["model_args"]),
            parts=d["parts"],
            divisor=d["width_divisor"],
            input_size=tuple(d["input_size"]),
            output=d["output"],
            domain=Domain.from_json(d["domain"]),
            tensors={name: _tensor_from_json(t) for name, t in d["tensors"].items()},
            constants={name: _tensor_from_json(t) for name, t in d["constants"].items()},
            edits=tuple(EditPlan(n, m, tuple(w), tuple(v)) for n, m, w, v in d["edits"]),
            outputs=tuple(OutputPlan(n, dim, FrozenAxis.from_json(a)) for n, dim, a in d["outputs"]),
            head=tuple(d["head"]),
            approximations=tuple((n, p, why) for n, p, why in d["approximations"]),
            layers=tuple(Layer(p, o, tuple(s), tuple(map(tuple, k)), tuple(why)) for p, o, s, k, why in d["layers"]),
            config=None if d["config"] is None else dict(d["config"]),
            narrow=tuple((where, n) for where, n in d.get("narrow", ())),
            batch=d.get("batch", 2),
            inputs=Inputs.from_json(d["inputs"]) if "inputs" in d else None,
        )
        plan._check()
        if d["exact"] is not plan.exact:
            raise ValueError(f"exact is {shown(d['exact'])}, which its widths and approximations contradict")
        return plan

    def _check(self) -> None:
        """Raise ValueError unless the numbers agree with each other: a file may say anything."""
        check_parts(self.parts)
        counts = (self.parts, self.divisor, self.batch, *self.input_size)
        if not all(_is_count(n) and n > 0 for n in counts) or self.domain.parts != self.parts:
            raise ValueError(f"unexpected counts {shown(counts)} with {self.domain.parts} boxes")
        self.views()  # SplitError, which is one, where they do not fit
        if self.output not in OUTPUTS:
            raise ValueError(f"unexpected output {shown(self.output)}")
        if self.inputs is not None and self.inputs.size != self.input_size:
            raise ValueError(f"inputs of {shown(self.inputs.size)}, not of {shown(self.input_size)}")
        if self.model is not None and not re.fullmatch(r"[\w.-]+", self.model):  # no path, no repository
            raise ValueError(f"unexpected model {shown(self.model)}")
        for name, t in {**self.tensors, **self.constants}.items():
            try:
                t.check(self.parts, self.divisor)
            except ValueError as e:
                raise ValueError(f"{shown(name)}: {e}") from e
        self._check_config()
        if not self.tensors.keys() >= set(self.head):
            raise ValueError(f"unexpected head {shown(self.head)}")
        if any(len(edit.values) != self.parts for edit in self.edits):
            raise ValueError(f"an edit without {self.parts} values")
        if not all(map(_are_words, self.approximations)):
            raise ValueError("an approximation that is not said in words")
        if not all(isinstance(where, str) and _is_count(n) for where, n in self.narrow):
            raise ValueError("a narrow width that is no place and count")
        for output in self.outputs:
            output.axis.check(self.parts)
        for layer in self.layers:
            layer.check(self.parts)

    def _check_config(self) -> None:
        if self.config is None:
            return
        name, classes = self.config.get("architecture"), self.config.get("num_classes")
        if not isinstance(name, str):
            raise ValueError("a config without architecture")
        if self.model and name != self.model.split(".")[0]:
            raise ValueError(f"a config of {shown(name)} for {shown(self.model)}")
        if self.model_args.get("num_classes") not in (None, classes):
            raise ValueError(f"a config of {shown(classes)} classes for {shown(self.model_args['num_classes'])}")
        size = self.config.get("pretrained_cfg", {}).get("input_size", [*self.input_size])
        if size != [*self.input_size]:
            raise ValueError(f"a config of images of {shown(size)}, not of {shown(self.input_size)}")

    def digest(self) -> str:
        """The SHA-256 of plan.json, by which the parts know theirs."""
        return sha256(json_text(self.to_json()).encode()).hexdigest()

    def __str__(self) -> str:
        return self.text()

    def text(self, colour: bool = False) -> str:
        """A table of the layers: path, operation, shapes in the model and in a part, exact or why not."""
        largest = max(range(self.parts), key=self.params)
        views = ", ".join(dict.fromkeys("×".join(map(str, v.size)) for v in self.views()))
        size = "×".join(map(str, spatial(self.input_size)))
        head = f"{self.model or 'module'} in {self.parts} parts; {self.domain}: {views} of {size} pixels"
        rows: list[tuple[str, ...]] = [("layer", "operation", "global", f"part {largest}", "")]
        rows += [_row(layer, largest, colour) for layer in self.layers]
        whole, part = self.params(), self.params(largest)
        total = f"{whole:,} parameters in the model, {part:,} in a part, {whole / max(part, 1):.1f} to 1"
        return "\n".join([head, "", table(rows), "", total, *self._narrow(), *self._verdict()])

    def _narrow(self) -> list[str]:
        places = [f"  {where}: {n}" for where, n in self.narrow]
        return [f"whole in every part, as their channels are too few for {self.divisor}:", *places] if places else []

    def _verdict(self) -> list[str]:
        if self.divisor != self.parts:
            return [f"not to be merged: {self.parts} parts of a {self.divisor}-th of the width"]
        if self.exact:
            return ["exact: the merged model is the sum of its parts"]
        counts = Counter(reason for *_, reason in self.approximations)
        return ["approximate:", *(f"  {n} × {reason}" for reason, n in counts.most_common())]


def _are_words(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_count(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**63


def _row(layer: Layer, k: int, colour: bool) -> tuple[str, ...]:
    shapes = ("×".join(map(str, s)) for s in (layer.shape, layer.part_shapes[k]))
    why = "; ".join(layer.reasons) or "exact"
    if colour:
        why = f"\033[{33 if layer.reasons else 32}m{why}\033[0m"
    return layer.path, layer.operation, *shapes, why


def _layer_to_json(layer: Layer) -> list:
    shapes = [list(s) for s in layer.part_shapes]
    return [layer.path, layer.operation, list(layer.shape), shapes, list(layer.reasons)]


def _tensor_to_json(t: TensorPlan) -> dict:
    d: dict[str, Any] = {
        "shape": list(t.shape),
        "axes": [a and a.to_json() for a in t.axes],
        "reduce": t.reduce,
        "trained": t.trained,
        "scale": list(t.scale),
        "outside": t.outside,
    }
    return {k: v for k, v in d.items() if v not in ([], "zero") or k in ("shape", "axes")}


def _tensor_from_json(d: dict) -> TensorPlan:
    axes = tuple(a and FrozenAxis.from_json(a) for a in d["axes"])
    scale, outside = tuple(d.get("scale", ())), d.get("outside", "zero")
    return TensorPlan(tuple(d["shape"]), axes, d["reduce"], d["trained"], scale, outside)
