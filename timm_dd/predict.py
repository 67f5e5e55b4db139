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
from .errors import FileError, MergeError, headline, shown
from .images import MODES, read
from .two_level.aggregate import probabilities
from .two_level.files import ABOUT
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
            MergeError: no network there.
        """
        remote = source.startswith("hf-hub:")
        place = source if remote else str(models.of_run(Path(source)))
        if not remote and (Path(place) / ABOUT).exists():
            return cls._of_two_levels(place)
        try:
            network = timm.create_model(place if remote else f"local-dir:{place}", pretrained=True)
        except Exception as e:  # of timm, torch, safetensors and the Hub
            if remote:
                return cls._of_two_levels(place)
            expected = "expected a run's folder, a composed model, a two-level network, or hf-hub:USER/REPO"
            raise MergeError(f"no network in {source} ({headline(e)}); {expected}") from e
        named = network.pretrained_cfg.get("label_names")
        return cls(network, timm.data.resolve_model_data_config(network), _names(named, network.num_classes, source))

    @classmethod
    def _of_two_levels(cls, place: str) -> Classifier:
        two = TwoLevel.load(place)
        plan = two.parts.plan
        given = {**(plan.config or {}).get("pretrained_cfg", {}), "input_size": plan.input_size}
        data = timm.data.resolve_data_config(pretrained_cfg=given)
        return cls(two, data, _names(two.class_names, two.classes, place))

    @torch.no_grad()
    def predict(self, images: Sequence[str | Path], top: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Of each image the `top` classes and their probabilities, the most probable first.

        Raises:
            FileError: an image that cannot be read, with its path.
            MergeError: the network takes no images.
        """
        mode = MODES.get(self.data["input_size"][0])
        if mode is None:
            raise MergeError(f"the network takes {shown(self.data['input_size'])}; expected images of 1 to 4 channels")
        transform: Callable = timm.data.create_transform(**self.data)
        self.network.eval()
        for path in images:
            x = transform(_read(path, mode))[None]
            two_levels = isinstance(self.network, TwoLevel)
            p = (self.network.probabilities(x) if two_levels else probabilities(self.network(x)))[0]
            found = p.topk(min(top, len(p)))
            yield [(self.names[i], p) for p, i in zip(found.values.tolist(), found.indices.tolist())]


def _names(given: Any, classes: int, source: str) -> Sequence[str]:
    """From a list, or from a dict by number as some of timm's configs have."""
    if not classes:
        raise MergeError(f"{source} gives numbers, features or a regression; expected a network that tells classes")
    if isinstance(given, Mapping):
        given = [given.get(i, given.get(str(i), i)) for i in range(classes)]
    names = [str(name) for name in (given or range(classes))]
    if len(names) != classes:
        raise MergeError(f"{source} has {len(names)} label_names for {classes} classes; mend its config.json")
    return names


def _read(path: str | Path, mode: str) -> Image.Image:
    try:
        return read(path, mode)
    except Exception as e:  # Pillow's plugins have many
        raise FileError(f"{path} is not an image that Pillow reads ({type(e).__name__}: {headline(e)})") from e
