"""Images that stay on the device: batches are cut out of them there, shifted and flipped in one indexing each.

A GPU takes small images faster than the processes of a loader can make them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from timm.data.loader import PrefetchLoader

from ..settings import options
from .decoded import Decoded

WITHOUT = ("cpu",)  # devices whose memory the images are in already
SHARE = 4  # a set may take one of so many parts of the device's free memory


class Resident:
    """As `loader`, in its order and with its normalization, of images that are on the device.

    Args:
        loader: timm's; its workers are not used.
        images: (N, C, H, W), uint8.
        targets: (N,).
        shift: pixels of random shifts, what comes in from the edge repeats it.
        flips: probabilities, horizontal and vertical.
    """

    def __init__(
        self,
        loader: PrefetchLoader,
        images: torch.Tensor,
        targets: torch.Tensor,
        shift: int = 0,
        flips: tuple[float, float] = (0.0, 0.0),
    ):
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.images, self.targets = images, targets
        self.shift, self.flips = shift, flips
        self._batch_size, self._batches = loader.loader.batch_size, len(loader)
        self._mean, self._std = loader.mean, loader.std

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.tensor(list(self.sampler))
        drawn = [t.to(self.images.device) for t in (order, *self._draw(len(order)))]
        for i in range(len(self)):
            chosen, *moved = (t[i * self._batch_size : (i + 1) * self._batch_size] for t in drawn)
            x = self._moved(chosen, *moved) if moved else self.images[chosen]
            yield x.float().sub_(self._mean).div_(self._std), self.targets[chosen]

    def _draw(self, n: int) -> list[torch.Tensor]:
        """(N, H) rows and (N, W) columns that `n` images show, by torch's generator for CPUs."""
        if not self.shift and not any(self.flips):
            return []
        shown = []
        for size, flip in zip(self.images.shape[2:], reversed(self.flips)):
            start = torch.randint(-self.shift, self.shift + 1, (n, 1))
            places = (torch.arange(size) + start).clamp(0, size - 1)
            shown.append(torch.where(torch.rand(n, 1) < flip, places.flip(1), places))
        return shown

    def _moved(self, chosen: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        channels = torch.arange(self.images.shape[1], device=self.images.device)
        return self.images[
            chosen[:, None, None, None],
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


def training(
    loader: PrefetchLoader, args: argparse.Namespace, config: dict, device: torch.device
) -> PrefetchLoader | Resident:
    """`loader` with its images on the device, if they fit there and it does no more than to shift and flip them."""
    more = args.aa or args.reprob or args.grayscale_prob or args.gaussian_blur_prob or options.mixes(args)
    plain = (args.shift or args.no_aug) and not more
    flips = (0.0, 0.0) if args.no_aug else (args.hflip, args.vflip)
    return _resident(loader, config, device, args.shift, flips) if plain else loader


def validation(loader: PrefetchLoader, config: dict, device: torch.device) -> PrefetchLoader | Resident:
    """`loader` with its images on the device, if they fit there and it shows them whole."""
    return _resident(loader, config, device) if config["crop_pct"] == 1 else loader


def _resident(loader: PrefetchLoader, config: dict, device: torch.device, *moves) -> PrefetchLoader | Resident:
    dataset = loader.dataset
    if device.type in WITHOUT or not isinstance(dataset, Decoded):
        return loader
    sizes = {tuple(s) for s in dataset.sizes.tolist()}
    if sizes != {tuple(config["input_size"][1:])} or dataset.pixels.nbytes * SHARE > _free(device):
        return loader
    pixels = torch.from_numpy(dataset.pixels).to(device).view(len(dataset), *sizes.pop(), 3)
    return Resident(loader, pixels.movedim(3, 1).contiguous(), torch.from_numpy(dataset.targets).to(device), *moves)


def _free(device: torch.device) -> int:
    """Bytes that the device has left; none where torch does not tell."""
    told = getattr(torch.get_device_module(device), "mem_get_info", None)
    return told(device)[0] if told is not None else 0
