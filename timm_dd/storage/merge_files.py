"""Prolongation of one tensor: the parts' blocks in their places, (2.11)–(2.14), their sum, or their mean.

Elements are carried as unsigned integers of their size, `RAW`, so that numpy places them whatever their dtype, and rows
of a tensor are made without the others: a model need not be in memory to be merged.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..algebra.axes import FrozenAxis
from ..errors import MergeError
from ..planning.plan import Plan, TensorPlan
from . import tensorfile
from .atomic import output_folder
from .files import MODEL, PartsFolder, common_dtypes, summary, write_config
from .tensorfile import PIECE, RAW, from_raw, to_raw

HEADS = ("sum", "mean")
Rows = Callable[[int, str, int, int], np.ndarray]  # (k, name, first, last): rows of part k's tensor, as `RAW` ones


def check_mergeable(plan: Plan, head: str) -> None:
    """Raise MergeError unless K parts of a K-th of the width are to be merged, with a head that they have."""
    if plan.divisor != plan.parts:
        raise MergeError(
            f"{plan.parts} parts of a network whose width was divided by {plan.divisor} do not fill it; "
            f"only parts split with width_divisor={plan.parts}, the default, can be merged"
        )
    if head not in HEADS:
        raise MergeError(f"head is 'sum' (classification) or 'mean' (regression), got {head!r}")
    if head == "mean" and not plan.head:
        raise MergeError("the outputs of this model have no weights of their own to divide by K; use head='sum'")


def count_rows(t: TensorPlan) -> int:
    return t.shape[0] if t.shape else 1


def row_blocks(plan: Plan, name: str, dtype: torch.dtype, rows: Rows, head: str) -> Iterator[np.ndarray]:
    """A global tensor, some of its rows at a time."""
    t = plan.tensors[name]
    step = max(1, PIECE // max(1, math.prod(t.shape[1:]) * dtype.itemsize))
    for first in range(0, count_rows(t), step):
        yield merge_rows(plan, name, dtype, rows, first, min(first + step, count_rows(t)), head)


def merge_rows(
    plan: Plan, name: str, dtype: torch.dtype, rows: Rows, first: int, last: int, head: str = "sum"
) -> np.ndarray:
    """Rows [first, last) of one global tensor, as integers: the blocks in their places, or their sum, or the mean of
    those that have an element."""
    t = plan.tensors[name]
    merged = (_placed if t.reduce == "place" else _reduced)(t, plan.parts, name, dtype, rows, first, last)
    if head == "mean" and plan.parts > 1 and name in plan.head:
        merged = to_raw(from_raw(merged, dtype) / plan.parts)
    return merged


def _placed(t: TensorPlan, parts: int, name: str, dtype: torch.dtype, rows: Rows, first: int, last: int) -> np.ndarray:
    out = np.zeros((last - first, *t.shape[1:]), RAW[dtype])
    for k in range(parts):
        at, part_rows = _place(t, k, parts, first, last)
        if part_rows.start < part_rows.stop:
            block = rows(k, name, part_rows.start, part_rows.stop)
            if t.outside == "mean":
                mean = from_raw(block, dtype).double().mean(tuple(range(1, block.ndim)), keepdim=True)
                out[at[0]] = to_raw(mean.to(dtype))
            out[_open(at)] = block
    return out


def _reduced(t: TensorPlan, parts: int, name: str, dtype: torch.dtype, rows: Rows, first: int, last: int) -> np.ndarray:
    wide = np.dtype("f8" if dtype.is_floating_point else str(dtype).removeprefix("torch."))
    out = np.zeros((last - first, *t.shape[1:]), wide)
    owners = np.zeros(out.shape, np.int64)
    for k in range(parts):
        at, part_rows = _place(t, k, parts, first, last)
        at, block = _open(at), rows(k, name, part_rows.start, part_rows.stop)
        owners[at] += 1
        if not dtype.is_floating_point:  # a count of batches
            block = block.view(wide)
            out[at] = np.where(owners[at] > 1, np.maximum(out[at], block), block)
        elif t.reduce == "sum":
            out[at] += from_raw(block, dtype).double().numpy()
        else:
            out[at] += (from_raw(block, dtype).double().numpy() - out[at]) / owners[at]  # equal ones stay as they are
    return to_raw(torch.from_numpy(out).to(dtype)) if dtype.is_floating_point else out.view(RAW[dtype])


def _place(t: TensorPlan, k: int, parts: int, first: int, last: int) -> tuple[tuple[slice | np.ndarray, ...], slice]:
    """Where part k's elements lie in rows [first, last) of a tensor, dim by dim, and which of its rows they are."""
    dims = [*_dims(t.shape, t.axes, k, parts)]
    row = dims[0]
    if isinstance(row, slice):
        start = max(row.start, first)
        stop = max(start, min(row.stop, last))
        dims[0], part_rows = slice(start - first, stop - first), slice(start - row.start, stop - row.start)
    else:
        start, stop = np.searchsorted(row, (first, last)).tolist()
        dims[0], part_rows = row[start:stop] - first, slice(start, stop)
    return tuple(dims), part_rows


@functools.lru_cache(maxsize=256)  # layers in a row are alike
def _dims(shape: tuple, axes: tuple[FrozenAxis | None, ...], k: int, parts: int) -> tuple[slice | np.ndarray, ...]:
    """Part k's indices along every dim, ascending; a scalar has one. Slices where they have no gaps."""
    return tuple(slice(0, n) if a is None else _indices(a, k, parts) for n, a in zip(shape, axes)) or (slice(0, 1),)


def _indices(axis: FrozenAxis, k: int, parts: int) -> slice | np.ndarray:
    index = axis.index(k, parts).numpy()
    if index.size and index[-1] - index[0] + 1 != index.size:
        return index
    start = int(index[0]) if index.size else 0
    return slice(start, start + index.size)


def _open(index: Sequence[slice | np.ndarray]) -> tuple[slice | np.ndarray, ...]:
    """An index like that of ``numpy.ix_``; slices, which are faster, stay slices where they mean the same."""
    if [type(i) for i in index].count(np.ndarray) < 2:
        return tuple(index)
    return np.ix_(*(np.arange(i.start, i.stop) if isinstance(i, slice) else i for i in index))


def merge_files(folder: str | Path, output: str | Path, *, head: str = "sum") -> None:
    """Merge parts on disk into ``model.safetensors`` and timm's ``config.json``, a piece in memory at a time.

    Args:
        folder: of parts, or ``hf-hub:USER/REPO``.
        head: as for `merge`.

    Raises:
        MergeError: as `merge`; the output folder is left as it was.
    """
    write_merged(folder, output, head, {})


def write_merged(folder: str | Path, output: str | Path, head: str, about: Mapping[str, str]) -> None:
    """As `merge_files`, with what else is said `about` the model in its metadata."""
    with PartsFolder(folder) as parts:
        plan = parts.plan
        check_mergeable(plan, head)
        opened = [parts.open(k) for k in range(plan.parts)]
        dtypes = common_dtypes([{name: e.dtype for name, e in part.tensors.items()} for part in opened])
        specs = {name: (plan.tensors[name].shape, dtypes[name]) for name in opened[0].tensors}
        merged = (p for name, (_, dtype) in specs.items() for p in row_blocks(plan, name, dtype, parts.rows, head))
        with output_folder(output, sync=False) as aside, ThreadPoolExecutor(os.cpu_count()) as pool:
            checks = [pool.submit(parts.check, k) for k in range(plan.parts)]
            tensorfile.write(aside(MODEL), specs, merged, {**summary(plan, parts.digest, head), **about})
            write_config(aside, plan.config)
            for check in checks:
                check.result()
