"""What a trained network sees in images: the names of their classes, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

from . import models
from .errors import FileError, MergeError, headline, looking_into, shown
from .images import MODES, read
from .storage import composed, files
from .two_level.aggregate import probabilities
from .two_level.network import TwoLevel


@dataclass(frozen=True)
class Classifier:
    """A network with all that it takes to show it an image.

    Attributes:
        data: timm's description of its images: input_size, mean, std, interpolation, crop_pct.
        names: of the classes, in the order of their numbers; these, where nobody has named them.
    """

    network: nn.Module
    data: Mapping[str, Any]
    names: Sequence[str]

    @classmethod
    def load(cls, source: str) -> Classifier:
        """
        Args:
            source: the folder of a composed model, of a two-level network, or of a run, whose model after the best
                epoch it is then; or ``hf-hub:USER/REPO``.

        Raises:
            MergeError: no network there, or what is said of its images is damaged.
        """
        remote = source.startswith("hf-hub:")
        with looking_into(source, MergeError):
            place = source if remote else str(models.of_run(Path(source)))
            two_levels = (files.local(place, files.TWO_LEVEL) / files.TWO_LEVEL).exists()
        if two_levels:
            return cls._of_two_levels(place)
        try:
            network = timm.create_model(place if remote else f"local-dir:{place}", pretrained=True)
        except Exception as e:  # of timm, torch, safetensors and the Hub
            expected = "expected a run's folder, a composed model, a two-level network, or hf-hub:USER/REPO"
            raise MergeError(f"no network in {source} ({headline(e)}); {expected}") from e
        data = _prepared(network.pretrained_cfg, source)
        return cls(network, data, _names(network.pretrained_cfg.get("label_names"), network.num_classes, source))

    @classmethod
    def _of_two_levels(cls, place: str) -> Classifier:
        two = TwoLevel.load(place).float()  # as timm's models are, in whatever dtype they are stored
        plan = two.parts.plan
        given = {**(plan.config or {}).get("pretrained_cfg", {}), "input_size": plan.input_size}
        return cls(two, _prepared(given, place), _names(two.class_names, two.classes, place))

    @torch.no_grad()
    def predict(self, images: Sequence[str | Path], top: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Of each image the `top` classes and their probabilities, the most probable first.

        Raises:
            FileError: an image that cannot be read, with its path.
            MergeError: the network takes no images, or its scores are not finite.
        """
        channels, *size = self.data["input_size"]
        mode = MODES.get(channels)
        if mode is None or len(size) != 2:
            raise MergeError(f"the network takes {shown(self.data['input_size'])}; expected images of 1 to 4 channels")
        transform: Callable = timm.data.create_transform(**self.data)
        self.network.eval()
        for path in images:
            x = transform(_read(path, mode))[None]
            two_levels = isinstance(self.network, TwoLevel)
            p = (self.network.probabilities(x) if two_levels else probabilities(self.network(x)))[0]
            if not p.isfinite().all():
                raise MergeError(f"the network's scores of {path} are not finite; take one from before it diverged")
            found = p.topk(min(top, len(p)))
            yield [(self.names[i], p) for p, i in zip(found.values.tolist(), found.indices.tolist())]


def _prepared(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    composed.check_images(cfg, source)
    return timm.data.resolve_data_config(pretrained_cfg=cfg)


def _names(given: Any, classes: int, source: str) -> Sequence[str]:
    if not classes:
        raise MergeError(f"{source} gives numbers, features or a regression; expected a network that tells classes")
    return composed.check_names(given, classes, source)


def _read(path: str | Path, mode: str) -> Image.Image:
    try:
        return read(path, mode)
    except Exception as e:  # Pillow's plugins have many
        raise FileError(f"{path} is not an image that Pillow reads ({type(e).__name__}: {headline(e)})") from e
