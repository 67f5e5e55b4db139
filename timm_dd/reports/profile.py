"""What training costs: parameters, multiply-adds, FLOPs and activations of the global network against a part's.

Both are counted on their traced graphs, without weights; see `planning.costs`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..algebra.domain import Domain, check_parts
from ..errors import public
from ..planning.costs import Cost, cost
from ..surgery.source import Network
from ..text import number, table

GIGA, MEGA, MEBI = 10**9, 10**6, 2**20
CONVENTIONS = {
    "multiply_adds": "MACs of convolutions, fully connected layers and matrix products",
    "flops": "their multiplications plus additions, 2 MACs - outputs, without biases: (2.10) of gu2022",
    "activation_bytes": "results of all operations of one forward pass, but for views and what is done in place",
}


@dataclass(frozen=True)
class Profile:
    """A global network's `Cost` against a part's.

    Attributes:
        model: timm's name; None for your own nn.Module.
        input_size, part_input_size: (C, *size) of the whole image and of the part's.
        k: the part with most parameters, which is the one shown.
    """

    model: str | None
    parts: int
    domain: Domain
    input_size: tuple[int, ...]
    part_input_size: tuple[int, ...]
    k: int
    whole: Cost
    part: Cost

    def to_json(self) -> dict:
        """The figures of `text`, for machines."""
        return {
            "model": self.model,
            "parts": self.parts,
            "domain": self.domain.to_json(),
            "k": self.k,
            "batch_size": 1,
            "input_size": list(self.input_size),
            "part_input_size": list(self.part_input_size),
            "conventions": CONVENTIONS,
            "global": _cost_to_json(self.whole),
            "part": _cost_to_json(self.part),
        }

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """A table of both costs and their ratios, then what could not be counted."""
        box, size = ("×".join(map(str, s)) for s in (self.part_input_size, self.input_size))
        head = f"{self.model or 'module'} in {self.parts} parts; {self.domain}: {box} of {size}; one image, eval mode"
        rows = [
            ("", "global", f"part {self.k}", "ratio"),
            self._row("parameters", "parameters", MEGA, "M"),
            self._row("statistics", "statistics", MEGA, "M"),
            self._row("multiply-adds (MACs)", "multiply_adds", GIGA, "G"),
            self._row("FLOPs (2 MACs - outputs)", "flops", GIGA, "G"),
            self._row("activations", "activation_bytes", MEBI, "MiB"),
        ]
        return "\n".join([head, "", table(rows), *self._uncounted()])

    def _row(self, title: str, name: str, unit: int, symbol: str) -> tuple[str, ...]:
        whole, part = getattr(self.whole, name), getattr(self.part, name)
        ratio = f"{whole / part:.1f}" if part else ""
        return title, f"{number(whole / unit)} {symbol}", f"{number(part / unit)} {symbol}", ratio

    def _uncounted(self) -> list[str]:
        places = dict.fromkeys(self.whole.uncounted + self.part.uncounted)
        if not places:
            return []
        rows = [(f"  {path or 'the model itself'}", f"node {node}", operation) for path, node, operation in places]
        return ["", "not in the multiply-adds and FLOPs:", table(rows)]


def _cost_to_json(cost: Cost) -> dict:
    return {**asdict(cost), "uncounted": [list(place) for place in cost.uncounted]}


@public
def profile(
    model: str | nn.Module,
    parts: int,
    *,
    domain: Domain | None = None,
    narrow: str = "replicate",
    img_size: int | tuple[int, int] | None = None,
    width_divisor: int | None = None,
    example_input: Any = None,
    **kwargs: Any,
) -> Profile:
    """The cost of a network against that of its part with most parameters, without any weights in memory; arguments and
    errors as in `split`."""
    check_parts(parts)
    network = Network.of(model, example_input, with_weights=False, img_size=img_size, **kwargs)
    graph, plan = network.plan(parts, domain, narrow, width_divisor)
    k = max(range(parts), key=plan.params)
    part, size, part_size = network.part(graph, plan, k), plan.input_size, plan.part_input_size(k)
    name = model if isinstance(model, str) else None
    of_part = cost(part, part_size, graph)
    return Profile(name, parts, plan.domain, size, part_size, k, cost(graph, size), of_part)
