"""What a graph costs: parameters, multiply-adds, FLOPs and activations of one image.

The graph runs on the meta device, without weights and without arithmetic, and `Meter` sees every aten operation of it.
An operation that it can neither count nor knows to be free is listed and never taken as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import flop_registry

from ..compat import OpOverload, TorchDispatchMode, storage_key, tree_leaves
from .graphs import MAKERS, Graph, argument, float_type, module_path
from .meta import AsOnCPU

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


def cost(graph: fx.GraphModule, size: tuple[int, ...], whole: Graph | None = None) -> Cost:
    """The `Cost` of a graph on one image of `size`, (C, *size); of a part with what its `whole` network takes. It goes
    to the meta device and to eval mode."""
    graph.to("meta").eval()
    kept = set(graph.state_dict(keep_vars=True).values())
    trained = {t for t in kept if isinstance(t, nn.Parameter)}
    statistics = {t for t in kept - trained if t.is_floating_point()}
    of, meter, dtype = whole or graph, Meter(), float_type(graph)
    given = [torch.empty(1, *size, device="meta", dtype=dtype)]
    if isinstance(of, Graph):
        given = [argument(of, node.target, 1, size, dtype) for node in graph.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), meter, AsOnCPU():
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
