"""Sets that fit into memory are decoded once, into a file of pixels in the run's folder.

Ranks and their loaders' workers map that file, so that it lies in memory once, however many they are.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from ...errors import FileError, headline
from ...machine import memory
from ...storage.atomic import locked, replacing
from .workers import each

SHARE = 8  # a set may take one of so many parts of the machine's memory
BATCH = 64
SET = "timm_dd.set"  # where a file says which set it holds


class Decoded(Dataset):
    """The images and targets of a file that `decoded` wrote; timm sets `transform` on it."""

    def __init__(self, path: Path):
        self.path, self.transform = path, None
        held = load_file(path)
        self.pixels, self.sizes, self.targets = (held[name].numpy() for name in ("pixels", "sizes", "targets"))
        self.ends = np.cumsum(3 * self.sizes.prod(axis=1))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int):
        height, width = self.sizes[i]
        end = self.ends[i]
        image = Image.fromarray(self.pixels[end - 3 * height * width : end].reshape(height, width, 3))
        return (self.transform(image) if self.transform else image), int(self.targets[i])

    def __reduce__(self) -> tuple:
        """Pickled as its path: whoever reads that maps the file too."""
        return Decoded, (self.path,), {"transform": self.transform}


def decoded(dataset: Dataset, path: Path, workers: int) -> Dataset:
    """`dataset` from the file `path`, which the first process to come here writes and the others wait for; `dataset`
    itself if it does not fit into memory or on the disk, or does not hold RGB images with a class each.

    Args:
        workers: processes that decode; 0: this one.
    """
    if isinstance(dataset, IterableDataset):  # a stream has no end to wait for
        return dataset
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        identity = _identity(dataset)
        if _held(path) != identity:  # of other images, from a run that was killed, or half a file
            images = _decode(dataset, workers)
            if images is None:
                return dataset
            pixels, sizes, targets = zip(*images)
            held = {"pixels": np.concatenate(pixels), "sizes": np.array(sizes), "targets": np.array(targets)}
            try:
                with replacing(path, sync=False) as temporary:
                    save_file({name: torch.from_numpy(a) for name, a in held.items()}, temporary, {SET: identity})
            except (FileError, SafetensorError) as e:
                tqdm.write(f"images are decoded every epoch: no place for {path} ({headline(e.__cause__ or e)})")
                return dataset
    return Decoded(path)


def _identity(dataset: Dataset) -> str:
    """Of a set, as far as that is seen without reading it: its files with their sizes and times, the numbers of its
    classes, and which of the images are taken."""
    digest = sha256()
    while isinstance(dataset, Subset):
        digest.update(np.asarray(dataset.indices).tobytes())
        dataset = dataset.dataset
    told = (getattr(dataset, name, None) for name in ("name", "mode", "classes", "class_map"))
    digest.update(repr((type(dataset).__name__, len(dataset), *told)).encode("utf-8", "backslashreplace"))
    for file in getattr(dataset, "files", list)():
        found = os.stat(file)
        digest.update(os.fsencode(file) + f" {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _held(path: Path) -> str | None:
    """The identity of the set in a file; None if there is no whole one."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get(SET)
    except (SafetensorError, OSError):
        return None


def _decode(dataset: Dataset, workers: int) -> list[tuple[np.ndarray, tuple[int, int], int]] | None:
    """(pixels, (height, width), class) of all images; None as soon as it is plain that they are not for `Decoded`."""
    dataset.transform = None
    images: list = []
    held, limit = 0, memory() // SHARE
    loader = each(dataset, BATCH, _pixels, workers)
    for batch in tqdm(loader, desc="decoding", leave=False, disable=None):  # for terminals
        if batch is None:
            return None
        images += batch
        held += sum(pixels.nbytes for pixels, *_ in batch)
        if held * len(dataset) > limit * len(images):
            return None
    return images


def _pixels(batch: list) -> list | None:
    """None if some are not RGB images with a class."""
    if not all(isinstance(x, Image.Image) and x.mode == "RGB" and isinstance(y, (int, np.integer)) for x, y in batch):
        return None
    return [(np.asarray(x).reshape(-1), (x.height, x.width), int(y)) for x, y in batch]
