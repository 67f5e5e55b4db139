"""What training costs: parameters, multiply-adds, FLOPs and activations of the global network against a part's.

`profile` runs the traced graphs on the meta device, without weights and without arithmetic, and `Meter` sees every aten
operation of them. An operation that it can neither count nor knows to be free is listed and never taken as 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils.flop_counter import flop_registry

from ..algebra.domain import Domain, check_parts
from ..compat import OpOverload, TorchDispatchMode, storage_key, tree_leaves
from ..errors import public
from ..planning.graphs import MAKERS, Graph, argument, float_type, module_path
from ..surgery.source import Network
from ..text import table

aten = torch.ops.aten


# Matrix products that torch's registry lacks, and which argument is the matrix: each of its elements is used once.
VECTOR_PRODUCTS = {aten.mv: 0, aten.addmv: 1, aten.dot: 0}


# Without multiply-adds by convention, beside views and what torch tags as pointwise; in place as well.
FREE = set(
    """
    _unsafe_view unsafe_split unsafe_split_with_sizes _to_copy
    glu hardswish log_sigmoid_forward _prelu_kernel rrelu_with_noise _softmax _log_softmax _safe_softmax
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update
    cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm
    avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
    mean sum prod amax amin aminmax max min argmax argmin any all var var_mean std std_mean median logsumexp
    linalg_vector_norm norm cumsum cumprod sort topk
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d
    index index_select index_put index_copy index_fill gather scatter select_scatter slice_scatter masked_select
    embedding repeat flip roll tril triu copy fill zero im2col pixel_shuffle pixel_unshuffle channel_shuffle
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    cat stack
    arange linspace empty empty_like empty_strided zeros zeros_like ones ones_like full full_like eye scalar_tensor
    new_empty new_empty_strided new_zeros new_ones new_full rand rand_like randn randn_like bernoulli normal uniform
    """.split()
)
GIGA, MEGA, MEBI = 10**9, 10**6, 2**20
CONVENTIONS = {
    "multiply_adds": "MACs of convolutions, fully connected layers and matrix products",
    "flops": "their multiplications plus additions, 2 MACs - outputs, without biases: (2.10) of gu2022",
    "activation_bytes": "results of all operations of one forward pass, but for views and what is done in place",
}


@dataclass(frozen=True)
class Cost:
    """What a network has, and what its forward pass of one image does, in eval mode.

    Attributes:
        parameters: numbers that are trained; shared ones once.
        statistics: numbers in the floating point buffers of the state dict, such as a BatchNorm's mean and variance.
        multiply_adds: MACs of convolutions, fully connected layers and matrix products, the zeros of padding included.
        flops: their multiplications plus additions: a sum of n products has n - 1 additions, and a bias is not
            counted, (2.10). So 2·MACs less the outputs.
        activation_bytes: of the storages that the operations make, whatever they hold (indices of a max pooling,
            standardised weights, what goes into the classifier): what a backward pass may need. A view and a result
            that is written in place make none; the image is not made.
        uncounted: (module path, node, operation) whose multiply-adds are not known and not in the numbers.
    """

    parameters: int
    statistics: int
    multiply_adds: int
    flops: int
    activation_bytes: int
    uncounted: tuple[tuple[str, str, str], ...] = ()


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
        return title, f"{_number(whole / unit)} {symbol}", f"{_number(part / unit)} {symbol}", ratio

    def _uncounted(self) -> list[str]:
        places = dict.fromkeys(self.whole.uncounted + self.part.uncounted)
        if not places:
            return []
        rows = [(f"  {path or 'the model itself'}", f"node {node}", operation) for path, node, operation in places]
        return ["", "not in the multiply-adds and FLOPs:", table(rows)]


def _number(value: float) -> str:
    """Two decimals; of a number below 1 three digits."""
    decimals = 2 - math.floor(math.log10(value)) if 0 < value < 1 else 2
    return f"{value:,.{decimals}f}"


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
    part, size = network.part(graph, plan, k), plan.input_size
    seen = plan.views()[k].size
    part_size = (*size[: len(size) - len(seen)], *seen)
    name = model if isinstance(model, str) else None
    of_part = cost(part, part_size, graph)
    return Profile(name, parts, plan.domain, size, part_size, k, cost(graph, size), of_part)


def cost(graph: fx.GraphModule, size: tuple[int, ...], whole: Graph | None = None) -> Cost:
    """The `Cost` of a traced graph on one image of `size`, (C, *size), or of a part of it, `whole`; it goes to the meta
    device and to eval mode."""
    graph.to("meta").eval()
    kept = set(graph.state_dict(keep_vars=True).values())
    trained = {t for t in kept if isinstance(t, nn.Parameter)}
    statistics = {t for t in kept - trained if t.is_floating_point()}
    of, meter, dtype = whole or cast("Graph", graph), Meter(), float_type(graph)
    given = [argument(of, node.target, 1, size, dtype) for node in graph.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), meter:
        Pass(graph, meter).run(*given)
    parameters, numbers = (sum(t.numel() for t in tensors) for tensors in (trained, statistics))
    return Cost(parameters, numbers, meter.multiply_adds, meter.flops, meter.activation_bytes, tuple(meter.uncounted))


class Pass(fx.Interpreter):
    """One forward pass on meta tensors, which tells the meter where it is."""

    def __init__(self, graph: fx.GraphModule, meter: Meter):
        super().__init__(graph)
        self.meter = meter

    def run_node(self, n: fx.Node) -> Any:
        self.meter.place = (module_path(n), n.name)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return super().call_function(target, args, {**kwargs, "device": "meta"} if target in MAKERS else kwargs)


class Meter(TorchDispatchMode):
    """Adds up what the aten operations cost that run while it is on. What PyTorch makes of a module or function (LSTM,
    attention, einsum) is seen as the products that it consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ("", "")
        self.multiply_adds = self.flops = self.activation_bytes = 0
        self.uncounted: dict[tuple[str, str, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        macs = multiply_adds(func, args, kwargs or {}, out)
        if macs is None:
            self.uncounted[(*self.place, str(func.overloadpacket))] = None
        elif macs:
            self.multiply_adds += macs
            self.flops += macs + max(0, macs - out.numel())  # a transposed convolution may leave outputs without any
        read = _storages((args, kwargs))
        self.activation_bytes += sum(size for storage, size in _storages(out).items() if storage not in read)
        return out


def multiply_adds(op: OpOverload, args: tuple, kwargs: dict, out: Any) -> int | None:
    """The MACs of an aten operation, 0 where it has none by convention, None where they are not known."""
    packet = op.overloadpacket
    if packet in VECTOR_PRODUCTS:
        return args[VECTOR_PRODUCTS[packet]].numel()
    if packet in flop_registry and isinstance(out, torch.Tensor):
        return flop_registry[packet](*args, **kwargs, out_val=out) // 2
    free = op.is_view or {torch.Tag.pointwise, torch.Tag.inplace_view} & set(op.tags)
    return 0 if free or op.namespace == "aten" and packet.__name__.removesuffix("_") in FREE else None


def _storages(values: Any) -> dict[int, int]:
    """The bytes of the storages of all tensors in `values`, by the storage's identity."""
    tensors = (t for t in tree_leaves(values) if isinstance(t, torch.Tensor))
    return {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
