"""Prolongation of one tensor: the parts' blocks in their places, (2.11)–(2.14), their sum, or their mean.

What lies outside the blocks is zero, or for a correction the weights of the model that it is onto.
Elements are carried as unsigned integers of their size, `RAW`, so that numpy places them whatever their dtype, and rows
of a tensor are made without the others: a model need not be in memory to be merged.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..algebra.axes import FrozenAxis
from ..errors import FileError, MergeError, public, shown
from ..planning.plan import Plan, TensorPlan
from . import tensorfile
from .atomic import as_path, output_folder
from .files import CORRECTION, MODEL, TWO_LEVEL, ModelFile, PartsFolder, common_dtypes, summary, write_config
from .tensorfile import PIECE, RAW, from_raw, is_finite, to_raw

HEADS = ("sum", "mean")
Rows = Callable[[int, str, int, int], np.ndarray]  # (k, name, first, last): rows of part k's tensor, as `RAW` ones
Base = Callable[[str, int, int], np.ndarray]  # (name, first, last): rows of the global tensor before the parts; a copy
Blocks = Iterable[tuple[tuple[slice | np.ndarray, ...], np.ndarray]]  # (where, elements), of one part after another


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


def zeros(plan: Plan, dtypes: Mapping[str, torch.dtype]) -> Base:
    """Of the model whose tensors are all zero."""

    def rows(name: str, first: int, last: int) -> np.ndarray:
        return np.zeros((last - first, *plan.tensors[name].shape[1:]), RAW[dtypes[name]])

    return rows


def row_blocks(plan: Plan, name: str, dtype: torch.dtype, rows: Rows, base: Base, head: str) -> Iterator[np.ndarray]:
    """A global tensor, some of its rows at a time."""
    t = plan.tensors[name]
    step = max(1, PIECE // max(1, math.prod(t.shape[1:]) * dtype.itemsize))
    for first in range(0, count_rows(t), step):
        yield merge_rows(plan, name, dtype, rows, base, first, min(first + step, count_rows(t)), head)


def merge_rows(
    plan: Plan, name: str, dtype: torch.dtype, rows: Rows, base: Base, first: int, last: int, head: str = "sum"
) -> np.ndarray:
    """Rows [first, last) of one global tensor, as integers: those of `base`, with the blocks in their places, or their
    sum, or the mean of those that have an element."""
    t, out = plan.tensors[name], base(name, first, last)
    divisor = plan.parts if head == "mean" and name in plan.head else 1
    blocks = functools.partial(_blocks, t, plan.parts, name, rows, first, last)
    (_place_blocks if t.reduce == "place" else _reduce_blocks)(out, t, blocks(), dtype, divisor)
    if (t.reduce != "place" or t.outside == "mean") and not is_finite(out, dtype):
        _check_bounds(name, t, out, blocks(), dtype)
    return out


def _check_bounds(name: str, t: TensorPlan, out: np.ndarray, blocks: Blocks, dtype: torch.dtype) -> None:
    """Raise MergeError unless what is not finite is so in every part, and was not made here."""
    infinite = ~from_raw(out, dtype).isfinite().numpy()
    alike = ((block == out[_open(at)])[infinite[_open(at)]].all() for at, block in blocks)
    if t.reduce == "place" or not all(alike):
        raise MergeError(
            f"{shown(name)}: what the parts give together is not finite in {dtype}, or is infinite in some of them "
            "alone; convert the parts to torch.float32, or train them again with a smaller learning rate"
        )


def _place_blocks(out: np.ndarray, t: TensorPlan, blocks: Blocks, dtype: torch.dtype, divisor: int) -> None:
    for at, block in blocks:
        inside = _open(at)
        if t.outside == "mean":  # standardised rows: their mean moves as that of the block
            shift = _row_means(block, dtype) - _row_means(out[inside], dtype)
            from_raw(out, dtype)[at[0]] += shift.to(dtype)
        out[inside] = _divided(block, dtype, divisor)


def _row_means(block: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return from_raw(block, dtype).double().mean(tuple(range(1, block.ndim)), keepdim=True)


@np.errstate(over="ignore", invalid="ignore")  # what is then not finite is found
def _reduce_blocks(out: np.ndarray, t: TensorPlan, blocks: Blocks, dtype: torch.dtype, divisor: int) -> None:
    wide = np.dtype("f8" if dtype.is_floating_point else str(dtype).removeprefix("torch."))
    total, owners = np.zeros(out.shape, wide), np.zeros(out.shape, np.int64)
    for at, block in blocks:
        at = _open(at)
        owners[at] += 1
        so_far, n = total[at], owners[at]
        values = from_raw(block, dtype).double().numpy() if dtype.is_floating_point else block.view(wide)
        if not dtype.is_floating_point:  # a count of batches
            more = np.maximum(so_far, values)
        elif t.reduce == "sum":
            more = so_far + values
        else:
            more = np.where(values == so_far, so_far, so_far + (values - so_far) / n)  # equal ones stay
        total[at] = np.where(n > 1, more, values)  # the first as it is: -0 too
    merged = to_raw(torch.from_numpy(total).to(dtype)) if dtype.is_floating_point else total.view(RAW[dtype])
    np.copyto(out, _divided(merged, dtype, divisor), where=owners > 0)


def _divided(block: np.ndarray, dtype: torch.dtype, divisor: int) -> np.ndarray:
    return block if divisor == 1 else to_raw(from_raw(block, dtype) / divisor)


def _blocks(t: TensorPlan, parts: int, name: str, rows: Rows, first: int, last: int) -> Blocks:
    for k in range(parts):
        at, part_rows = _place(t, k, parts, first, last)
        if part_rows.start < part_rows.stop:
            yield at, rows(k, name, part_rows.start, part_rows.stop)


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


@public
def merge_files(folder: str | Path, output: str | Path, *, head: str = "sum", onto: str | Path | None = None) -> None:
    """Merge parts on disk into ``model.safetensors`` and timm's ``config.json``, a piece in memory at a time.

    Args:
        folder: of parts, or ``hf-hub:USER/REPO``.
        head, onto: as for `merge`; `onto` is a folder with ``model.safetensors``, or ``hf-hub:USER/REPO``. It may be
            the output folder. A ``config.json`` there is removed if the network is none of timm's.

    Raises:
        MergeError: as `merge`; the output folder is left as it was.
        FileError: that folder cannot be written, or holds a two-level network.
    """
    write_merged(folder, output, head, {}, onto)


def write_merged(
    folder: str | Path, output: str | Path, head: str, about: Mapping[str, str], onto: str | Path | None = None
) -> None:
    """As `merge_files`, with what else is said `about` the model in its metadata."""
    if (as_path(output, FileError) / TWO_LEVEL).exists():
        raise FileError(f"{output} holds a two-level network, {TWO_LEVEL}; choose another output folder, or remove it")
    with PartsFolder(folder) as parts, contextlib.ExitStack() as stack:
        plan = parts.plan
        check_mergeable(plan, head)
        opened = [parts.open(k) for k in range(plan.parts)]
        dtypes = common_dtypes([{name: e.dtype for name, e in part.tensors.items()} for part in opened])
        base, about = zeros(plan, dtypes), {**summary(plan, parts.digest, head), **about}
        if onto is not None:
            model = stack.enter_context(ModelFile(onto))
            model.check(plan, dtypes)
            base, about = model.rows, {**about, "merge": CORRECTION}
        specs = {name: (plan.tensors[name].shape, dtypes[name]) for name in opened[0].tensors}
        merged = (p for name, (_, d) in specs.items() for p in row_blocks(plan, name, d, parts.rows, base, head))
        with output_folder(output, sync=False) as aside, ThreadPoolExecutor(os.cpu_count()) as pool:
            checks = [pool.submit(parts.check, k) for k in range(plan.parts)]
            try:
                tensorfile.write(aside(MODEL), specs, merged, about)
                write_config(aside, plan.config)
            finally:  # what is wrong with a part says more than what came of it
                for check in checks:
                    check.result()
