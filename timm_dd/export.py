"""A trained network for whoever has no timm_dd: as ONNX, or as an archive of torch.export. What is written is read back
and run beside the network itself, at two batch sizes."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import models
from .errors import FileError, MergeError, headline, looking_into
from .storage import composed, files
from .storage.atomic import replacing
from .two_level.network import TwoLevel

TOLERANCE = 1e-5  # of the largest score
LARGEST = 2 * 10**9  # bytes of weights, of which one file of ONNX has room for 2 GiB with all else
BATCHES = (1, 3)
Scores = Callable[[torch.Tensor], torch.Tensor]


def export(folder: str | Path, output: str | Path) -> float:
    """Write the network in a folder as ``.onnx`` or ``.pt2``, with a batch of any size; images are (B, C, *size).

    Args:
        folder: of a composed model, of a two-level network, or of a run, whose fine-tuned model it is then.

    Returns:
        The largest difference to the network's own scores, relative to the largest of these.

    Raises:
        MergeError: no network in the folder.
        FileError: it has no such form, or another result; nothing is written.
    """
    output = Path(output)
    if output.suffix not in FORMS:
        raise FileError(f"{output}: expected a file name that ends with {' or '.join(FORMS)}")
    with looking_into(folder, MergeError):
        model, size = _load(Path(folder))
    model.eval()
    with replacing(output) as temporary:
        try:
            scores = FORMS[output.suffix](model, torch.zeros(2, *size), temporary)
        except (OSError, FileError):
            raise
        except ImportError as e:
            raise FileError(f"{output}: {e}; pip install 'timm_dd[export]'") from e
        except Exception as e:  # torch's exporters fail in many ways
            raise FileError(f"{folder} has no form as {output.suffix} ({headline(e)}); try the other one") from e
        return _check(model, scores, size, output)


def _load(folder: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The network, and (C, *size) of its images."""
    if (folder / files.TWO_LEVEL).exists():
        two = TwoLevel.load(folder).float()  # as timm's models are, in whatever dtype they are stored
        return two, two.parts.plan.input_size
    place = models.of_run(folder)
    if not (place / files.CONFIG).exists():
        raise MergeError(f"no network in {folder}; expected a run's folder, a composed model, or a two-level network")
    size = composed.read_config(place)["pretrained_cfg"]["input_size"]
    return models.load(place), tuple(size)


def _onnx(model: nn.Module, x: torch.Tensor, path: Path) -> Scores:
    import onnxruntime  # type: ignore[import-untyped]

    needed = sum(t.nbytes for t in model.state_dict().values())
    if needed > LARGEST:  # more would go into a second file, which is lost when the first is sent
        raise FileError(f"{needed / 1e9:.1f} GB of weights, and a file of ONNX holds {LARGEST / 1e9:.0f}; write a .pt2")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its own progress, and advice to itself
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=_dynamic(), input_names=["images"], output_names=["scores"]
        )
    assert program is not None  # it is None where a path is given
    path.write_bytes(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _archive(model: nn.Module, x: torch.Tensor, path: Path) -> Scores:
    held = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=_dynamic()), held)
    path.write_bytes(held.getvalue())
    held.seek(0)
    return torch.export.load(held).module()


def _dynamic() -> tuple[dict, ...]:
    return ({0: torch.export.Dim("batch")},)


FORMS = {".onnx": _onnx, ".pt2": _archive}


def _check(model: nn.Module, scores: Scores, size: tuple[int, ...], output: Path) -> float:
    generator, worst = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        for n in BATCHES:
            x = torch.randn(n, *size, generator=generator)
            expected, found = model(x), scores(x)
            if not expected.isfinite().all():
                raise MergeError("the network's scores are not finite; export one from before it diverged")
            worst = max(worst, float(((found - expected).abs().max() / expected.abs().max()).nan_to_num(math.inf)))
    if not worst <= TOLERANCE:
        raise FileError(f"{output}: its scores differ from the network's by {worst:.1e} of the largest; not written")
    return worst
