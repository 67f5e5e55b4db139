"""Images that stay on the device: batches are cut out of them there, and changed at random as the loader would.

A GPU takes small images faster than the processes of a loader can make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from timm.data.loader import PrefetchLoader, fast_collate

from .batched import ResizedCrop, Step, erasing, steps
from .decoded import Decoded

WITHOUT = ("cpu",)  # devices whose memory the images are in already
SHARE = 4  # a set may take one of so many parts of the device's free memory


class Resident:
    """As `loader`, in its order and with its normalization, of images that are on the device.

    Args:
        loader: timm's; its workers are not used.
        images: (N, C, H, W), uint8.
        targets: (N,).
        changes: of images, in place of the loader's transform; `erasing`: of normalized ones.
    """

    def __init__(
        self,
        loader: PrefetchLoader,
        images: torch.Tensor,
        targets: torch.Tensor,
        changes: Sequence[Step] = (),
        erasing: Sequence[Step] = (),
    ):
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.images, self.targets = images, targets
        self.changes, self.erasing = changes, erasing
        self._batch_size, self._batches = loader.loader.batch_size, len(loader)
        self._mean, self._std = loader.mean, loader.std

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device, order = self.images.device, torch.tensor(list(self.sampler))
        before, after = (
            [(step, [t.to(device) for t in step.draw(len(order))]) for step in some]
            for some in (self.changes, self.erasing)
        )
        order = order.to(device)
        for i in range(len(self)):
            batch = slice(i * self._batch_size, (i + 1) * self._batch_size)
            x = _through(before, self.images[order[batch]], batch)
            x = x.float().sub_(self._mean).div_(self._std)
            yield _through(after, x, batch), self.targets[order[batch]]


def _through(drawn: Sequence[tuple[Step, list[torch.Tensor]]], x: torch.Tensor, batch: slice) -> torch.Tensor:
    """The images of a batch after steps, each with the numbers of an epoch."""
    for step, numbers in drawn:
        x = step(x, *(t[batch] for t in numbers))
    return x


def resident(loader: PrefetchLoader, device: torch.device) -> PrefetchLoader | Resident:
    """`loader` with its images on the device, if they fit there and are changed by nothing but what `batched` has."""
    dataset = loader.dataset
    if device.type in WITHOUT or not isinstance(dataset, Decoded) or loader.loader.collate_fn is not fast_collate:
        return loader
    size, *others = {tuple(s) for s in dataset.sizes.tolist()}
    changes = None if others else steps(dataset.transform, size)
    if changes is None or dataset.pixels.nbytes * SHARE > _free(device):
        return loader
    images = torch.from_numpy(dataset.pixels).to(device).view(len(dataset), *size, 3).movedim(3, 1).contiguous()
    targets = torch.from_numpy(dataset.targets).to(device)
    shown = next((step.out for step in changes if isinstance(step, ResizedCrop)), size)
    return Resident(loader, images, targets, changes, erasing(loader.random_erasing, shown))


def _free(device: torch.device) -> int:
    """Bytes that the device has left; none where torch does not tell."""
    told = getattr(torch.get_device_module(device), "mem_get_info", None)
    return told(device)[0] if told is not None else 0
