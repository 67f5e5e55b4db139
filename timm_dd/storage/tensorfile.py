"""Safetensors files that are written as their tensors come and read in pieces: no model is ever whole in memory.

Pieces are read rather than mapped: mapped pages count as memory of the process, and a file that shrinks under a map
kills it. A *sealed* file has among its metadata the XXH3 checksum of all its bytes, with zeros for its 32 digits.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from ..errors import FileError, shown

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NAMES = {name: dtype for dtype, name in DTYPES.items()}


# Unsigned integers of their sizes: how numpy, which knows no bfloat16, carries elements of any dtype.
RAW = {dtype: np.dtype(f"u{dtype.itemsize}") for dtype in DTYPES}
PIECE = 1 << 20  # bytes that are read or written at a time: they stay in the processor's cache
ENTRY = ("dtype", "shape", "data_offsets")  # of a tensor in the header; the library takes others too
SEAL = "xxh3_128"  # where the checksum stands in the metadata
UNSEALED = "0" * 32


class Entry(NamedTuple):
    """Where a tensor lies in its file: the bytes from `start` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def to_raw(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a tensor on the CPU, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().view(RAW[tensor.dtype]).reshape(tensor.shape)


def from_raw(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of which these are the elements; they stay its memory."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).reshape(array.shape)


def write(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    pieces: Iterable[np.ndarray],
    metadata: Mapping[str, str],
    sealed: bool = False,
) -> None:
    """Write a file of tensors of these shapes and dtypes; `pieces` are their elements, in the same order.

    Raises:
        FileError: a dtype that is not among `DTYPES`.
    """
    seal = {SEAL: UNSEALED} if sealed else {}
    header: dict = {"__metadata__": {**seal, "format": "pt", **metadata}}
    end = 0
    for name, (shape, dtype) in specs.items():
        if dtype not in DTYPES:
            raise FileError(f"{name} is {dtype}, expected one of {', '.join(map(str, DTYPES))}; convert it")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128(text)
    with open(path, "wb", buffering=PIECE // 16) as f:  # what is larger is written without a copy
        f.write(text)
        for piece in pieces:
            data = piece.reshape(-1).view(np.uint8).data
            f.write(data)
            if sealed:
                digest.update(data)
        assert f.tell() == len(text) + end
        if sealed:
            f.seek(text.index(UNSEALED.encode()))
            f.write(digest.hexdigest().encode())


def write_state(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], sealed: bool = False
) -> None:
    """`write` the tensors of a state dict, in its order; FileError for those without values."""
    if empty := [name for name, t in state.items() if t.is_meta]:
        raise FileError(f"{empty[0]} is on the meta device, without values; give it some, as by to_empty")
    specs = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    write(path, specs, map(to_raw, state.values()), metadata, sealed)


class TensorFile:
    """A safetensors file, open for reading.

    Attributes:
        path: where it is.
        metadata: of the header.
        tensors: by name, in the order of the file.

    Raises:
        SafetensorError, OSError, ValueError: what is there is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        self._file = open(path, "rb")  # first: the library does not tell why it cannot
        try:
            with safe_open(path, "pt"):  # it judges the header, and does not tell where a tensor begins
                pass
            self._begin = 8 + struct.unpack("<Q", self._bytes(0, 8))[0]
            header = json.loads(self._bytes(8, self._begin))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.tensors = {name: self._entry(**{key: entry[key] for key in ENTRY}) for name, entry in header.items()}
            self.tensors = dict(sorted(self.tensors.items(), key=lambda item: item[1].start))
        except BaseException:
            self.close()
            raise

    def _entry(self, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
        if dtype not in NAMES:
            raise ValueError(f"dtype {shown(dtype)}, expected one of {', '.join(NAMES)}")
        start, end = (self._begin + offset for offset in data_offsets)
        if end - start != math.prod(shape) * NAMES[dtype].itemsize:
            raise ValueError(f"{end - start} bytes for a tensor of shape {shown(shape)}")
        return Entry(NAMES[dtype], tuple(shape), start, end)

    def _bytes(self, start: int, stop: int) -> bytes:
        """A few bytes; other threads may read too."""
        found = os.pread(self._file.fileno(), stop - start, start)
        if len(found) < stop - start:
            raise OSError(f"it ends at byte {start + len(found)}")
        return found

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor along its first dim, as integers (see `RAW`); a scalar has one row."""
        entry = self.tensors[name]
        shape = entry.shape or (1,)
        array = np.empty((last - first, *shape[1:]), RAW[entry.dtype])
        start = entry.start + first * math.prod(shape[1:]) * entry.dtype.itemsize
        self._file.seek(start)
        if (found := self._file.readinto(array.data)) < array.nbytes:
            raise OSError(f"it ends at byte {start + found}")
        return array

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors, by name, in memory that is their own."""
        rows = {name: self.rows(name, 0, entry.shape[0] if entry.shape else 1) for name, entry in self.tensors.items()}
        return {name: from_raw(rows[name], e.dtype).reshape(e.shape) for name, e in self.tensors.items()}

    def scan(self, bounds: Container[str] = ()) -> tuple[bool, str | None]:
        """Read everything once: whether its bytes are those that were sealed, and the first tensor that is not
        finite; `bounds` may be infinite."""
        seal = self.metadata.get(SEAL, "").encode() or b"-"
        digest = xxhash.xxh3_128(self._bytes(0, self._begin).replace(seal, UNSEALED.encode(), 1))
        infinite = None
        for dtype, start, stop in self._stretches():
            for at in range(start, stop, PIECE):
                piece = self._bytes(at, min(at + PIECE, stop))
                digest.update(piece)
                if infinite is None and not is_finite(np.frombuffer(piece, RAW[dtype]), dtype):
                    infinite = self._infinite(at, piece, dtype, bounds)
        return digest.hexdigest().encode() == seal, infinite

    def _stretches(self) -> Iterator[tuple[torch.dtype, int, int]]:
        """(dtype, first byte, last byte) of neighbours of one dtype, from the first tensor to the last."""
        dtype, start, stop = torch.uint8, self._begin, self._begin
        for entry in self.tensors.values():
            if entry.dtype != dtype:
                yield dtype, start, stop
                dtype, start = entry.dtype, entry.start
            stop = entry.end
        yield dtype, start, stop

    def _infinite(self, at: int, piece: bytes, dtype: torch.dtype, bounds: Container[str]) -> str | None:
        """The first tensor of which a piece that begins at byte `at` is not finite."""
        for name, entry in self.tensors.items():
            inside = piece[max(entry.start - at, 0) : max(entry.end - at, 0)]
            if not is_finite(np.frombuffer(inside, RAW[dtype]), dtype, name in bounds):
                return name
        return None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_finite(elements: np.ndarray, dtype: torch.dtype, bounds: bool = False) -> bool:
    """Whether none, as integers (see `RAW`), is NaN or infinity; `bounds` may be infinite."""
    if dtype == torch.bfloat16:  # which numpy does not know: they have an exponent of ones, NaN other bits too
        size, infinity = elements & np.uint16(0x7FFF), np.uint16(0xFF << 7)
        return bool(((size <= infinity) if bounds else (size < infinity)).all())
    if not dtype.is_floating_point:
        return True
    numbers = elements.view(f"f{dtype.itemsize}")
    return not np.isnan(numbers).any() if bounds else bool(np.isfinite(numbers).all())


READ_ERRORS = (SafetensorError, OSError, ValueError, RecursionError)
