"""A function of one part as one of all parts, whose tensors are stacked: (K, *a part's)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import vmap

from ..compat import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


def over_parts(function: Callable, parts: int, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` of each part. Tensors among the arguments and results are all parts', stacked; what
    is no tensor is the same for all parts."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return _in_each(function(*args, **kwargs), lambda t: t.expand(parts, *t.shape).clone())  # may be written to
    made: list[Any] = []

    def of_part(*values: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, value in zip(tensors, values):
            filled[i] = value
        given, named = tree_unflatten(filled, spec)
        made.append(function(*given, **named))  # sizes, dtypes and None are nothing that vmap returns
        return tuple(leaf for leaf in tree_leaves(made[0]) if isinstance(leaf, torch.Tensor))

    stacked = iter(vmap(of_part, randomness="different")(*(leaves[i] for i in tensors)))
    return _in_each(made[0], lambda _: next(stacked))


def _in_each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """With its tensors changed; what has none, as a `torch.Size`, stays what it is."""
    has_any = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    return tree_map_only(torch.Tensor, change, value) if has_any else value


def autocast(tensors: Any) -> Any:
    """`tensors` as a convolution or a linear layer takes them under autocast, whose lists lack what vmap makes of
    these."""

    def lower(t: torch.Tensor) -> torch.Tensor:
        kind, single = t.device.type, t.is_floating_point() and t.dtype != torch.float64
        enabled = single and not t.is_meta and torch.is_autocast_enabled(kind)
        return t.to(torch.get_autocast_dtype(kind)) if enabled else t

    return tree_map_only(torch.Tensor, lower, tensors)


def one_by_one(function: Callable, parts: int, *args: Any, **kwargs: Any) -> Any:
    """As `over_parts`, part after part: as many launches."""
    leaves, spec = tree_flatten((args, kwargs))
    results = []
    for k in range(parts):
        given, named = tree_unflatten([leaf[k] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
        results.append(tree_flatten(function(*given, **named)))
    stacked = [
        torch.stack(row) if isinstance(row[0], torch.Tensor) else row[0] for row in zip(*(r for r, _ in results))
    ]
    return tree_unflatten(stacked, results[0][1])


def attention(
    function: Callable, parts: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """As `over_parts`, for scaled_dot_product_attention, which vmap has no rule for: parts are more of the batch."""
    given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args)), **kwargs}
    mask, batch = given.pop("attn_mask", None), q.shape[:2]
    if q.ndim < 4 or not batch == k.shape[:2] == v.shape[:2]:
        return over_parts(function, parts, q, k, v, mask, **given)
    if mask is not None:
        mask = mask.view(parts, *[1] * (q.ndim - mask.ndim), *mask.shape[1:])
        mask = mask.expand(*batch, *mask.shape[2:]).flatten(0, 1)
    y = function(*(t.flatten(0, 1) for t in (q, k, v)), mask, **given)
    return y.unflatten(0, batch)


def as_images(function: Callable, parts: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `over_parts`, where parts are more of the batch: of channels-last maps vmap's pooling warns."""
    return function(x.flatten(0, 1), *args, **kwargs).unflatten(0, x.shape[:2])


WAYS: dict[Callable, Callable] = {  # others: over_parts
    F.scaled_dot_product_attention: attention,
    **dict.fromkeys((F.rrelu, F.rrelu_), one_by_one),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), as_images),
}
