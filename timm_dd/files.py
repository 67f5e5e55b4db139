"""Parts and composed models on disk: safetensors and JSON, each file written aside, synced, then renamed.

A folder of parts holds ``plan.json`` and ``part-0000k-of-0000K.safetensors``; each part's metadata names the format,
its index, K, the model and the plan's digest. A composed model is timm's form: ``model.safetensors``, ``config.json``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models._hub import save_config_for_hf
from torch import nn

from .errors import MergeError, headline
from .plan import FORMAT, Plan

PLAN = "plan.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def part_name(k: int, parts: int) -> str:
    return f"part-{k:05d}-of-{parts:05d}.safetensors"


# ---- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the place of `path`, synced to disk, if the block succeeds."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, before: float) -> None:
    """Remove what `replacing` left in `folder` and below when a process was killed, if older than the time `before`."""
    for path in folder.rglob(".*.*"):
        if path.is_file() and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value) -> None:
    try:
        text = json.dumps(value, indent=1) + "\n"
    except TypeError as e:
        raise MergeError(
            f"{path.name} takes numbers, texts and lists alone ({e}); give the model other arguments"
        ) from e
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def output_folder(folder: str | Path) -> Iterator[Path]:
    """`folder`, made if need be and removed again if the block fails; errors of the disk as MergeError."""
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException as e:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError):
            raise MergeError(f"cannot write to {folder}: {e.strerror or e}; choose another output folder") from e
        raise


def save_parts(folder: str | Path, plan: Plan, states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Write the plan and its K parts."""
    with output_folder(folder) as out:
        save_plan(out, plan)
        for k, state in enumerate(states):
            save_part(out, plan, k, state)


def save_plan(folder: Path, plan: Plan) -> None:
    write_json(folder / PLAN, plan.to_json())


def save_part(folder: Path, plan: Plan, k: int, state: Mapping[str, torch.Tensor]) -> None:
    """Write part k; `state` is its state dict. The same tensors give the same bytes."""
    with replacing(folder / part_name(k, plan.parts)) as temporary:
        write_safetensors(temporary, _specs(state), _on_cpu(state), _metadata(plan, k))


def _specs(state: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


def _on_cpu(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, t.detach().cpu()) for name, t in state.items())


def _metadata(plan: Plan, k: int) -> dict[str, str]:
    return {
        "timm_dd": str(FORMAT),
        "model": plan.model or "",
        "part": str(k),
        "parts": str(plan.parts),
        "plan": plan.digest(),
    }


def save_model(folder: str | Path, model: nn.Module, data: Mapping | None = None) -> None:
    """Write a model in timm's form; `data` is the configuration of its images."""
    state = model.state_dict()
    save_composed(folder, model, _specs(state), _on_cpu(state), data)


def save_composed(
    folder: str | Path, model: nn.Module, specs: Mapping, tensors: Iterable, data: Mapping | None = None
) -> None:
    """Write `tensors` (name, value), whose `specs` (shape, dtype) are known beforehand, and, for a timm model, its
    config with what `data` says of its images (input_size, mean, std, interpolation, crop_pct). timm has no config for
    models that give features of several layers."""
    with output_folder(folder) as out, contextlib.ExitStack() as stack:
        write_safetensors(stack.enter_context(replacing(out / "model.safetensors")), specs, tensors)
        if hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes"):
            config = stack.enter_context(replacing(out / "config.json"))
            known = ("input_size", "mean", "std", "interpolation", "crop_pct")
            _write_config(config, model, {k: v for k, v in (data or {}).items() if k in known})


def _write_config(path: Path, model: nn.Module, data: dict) -> None:
    save_config_for_hf(model, path, model_config={"pretrained_cfg": data})
    size = data.get("input_size", model.pretrained_cfg["input_size"])
    if len(size) != 3:  # timm's function writes the last two axes alone
        config = json.loads(path.read_text(encoding="utf-8"))
        config["pretrained_cfg"]["input_size"] = list(size)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file written as its tensors come, in the order of `specs`; the library's own writer wants all of
    them in memory at once, and orders metadata at random."""
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            shape, dtype = specs[name]
            assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype, name
            f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---- reading


def load_composed(folder: str | Path, model: nn.Module) -> None:
    """Give `model` the weights of a composed model in `folder`, each in its own dtype.

    Raises:
        MergeError: no such file, damaged, or of another model.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise MergeError(f"no model.safetensors in {folder}; expected a folder written by merge_files or timm-dd merge")
    with _reading(path):
        state = load_file(path)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise MergeError(f"{path} is of another model ({headline(e)}); use the one composed of these parts") from e


def load_plan(folder: str | Path) -> Plan:
    """The plan of a folder of parts.

    Raises:
        MergeError: no such folder, no plan, or not a plan of this format.
    """
    path = Path(folder) / PLAN
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise MergeError(
            f"no {PLAN} in {folder} ({e.strerror}); expected a folder written by Parts.save or timm-dd split"
        ) from e
    except (ValueError, RecursionError) as e:
        raise MergeError(f"{path} is not JSON ({e}); it is damaged, write the parts again") from e
    if not isinstance(d, dict) or d.get("format") != FORMAT:
        found = d.get("format") if isinstance(d, dict) else type(d).__name__
        raise MergeError(
            f"{path} has format {found!r}, this version reads format {FORMAT}; use the version that wrote it"
        )
    try:
        return Plan.from_json(d)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise MergeError(
            f"{path} is not a whole plan ({type(e).__name__}: {e}); it is damaged, write the parts again"
        ) from e


def load_part(folder: str | Path, plan: Plan, k: int) -> dict[str, torch.Tensor]:
    """Part k's state dict, checked against the plan.

    Raises:
        MergeError: missing, truncated, of another K, model or plan, of a wrong shape, or not finite.
    """
    path = _part_path(folder, plan, k)
    with _reading(path):
        with safe_open(path, "pt") as f:
            _check_metadata(path, plan, k, f.metadata() or {})
        state = load_file(path)
    check_state(plan, k, state, str(path))
    return state


@contextlib.contextmanager
def open_parts(folder: str | Path, plan: Plan) -> Iterator[Callable[[int, str], torch.Tensor]]:
    """A function (k, name) that reads one tensor of one part from disk, checked as it is read."""
    with contextlib.ExitStack() as stack:
        handles, dtypes = [], {}
        for k in range(plan.parts):
            path = _part_path(folder, plan, k)
            with _reading(path):
                handles.append(stack.enter_context(safe_open(path, "pt")))
                _check_metadata(path, plan, k, handles[-1].metadata() or {})
                _check_names(plan, set(handles[-1].keys()), str(path))

        def read(k: int, name: str) -> torch.Tensor:
            path = _part_path(folder, plan, k)
            with _reading(path):
                tensor = handles[k].get_tensor(name)
            _check_tensor(plan, k, name, tensor, str(path))
            _check_dtype(name, dtypes.setdefault(name, tensor.dtype), tensor.dtype, str(path))
            return tensor

        yield read


def _part_path(folder: str | Path, plan: Plan, k: int) -> Path:
    """Part k's file, in the folder itself or, as a training run leaves it, in a folder of its own."""
    name = part_name(k, plan.parts)
    path = next((p for p in (Path(folder) / name, Path(folder) / str(k) / name) if p.is_file()), None)
    if path is None:
        found = [p for pattern in ("part-*.safetensors", "*/part-*.safetensors") for p in Path(folder).glob(pattern)]
        raise MergeError(
            f"{name} is missing in {folder}, which has {len(found)} of {plan.parts} parts; train or copy it"
        )
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as e:
        if isinstance(e, MergeError):
            raise
        raise MergeError(f"{path} cannot be read ({e}); it is truncated or damaged, write this part again") from e


def _check_metadata(path: Path, plan: Plan, k: int, found: Mapping[str, str]) -> None:
    for key, expected in _metadata(plan, k).items():
        if found.get(key) != expected:
            raise MergeError(
                f"{path} belongs to another split: its {key} is {found.get(key)!r}, expected {expected!r}; "
                f"use the parts that go with {PLAN}"
            )


def check_dtypes(states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise MergeError unless every tensor has one dtype in all parts."""
    for k, state in enumerate(states):
        for name, tensor in state.items():
            _check_dtype(name, states[0][name].dtype, tensor.dtype, f"part {k}")


def check_state(plan: Plan, k: int, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise MergeError unless `state` has part k's tensors, of the plan's shapes and finite."""
    _check_names(plan, set(state), where)
    for name, tensor in state.items():
        _check_tensor(plan, k, name, tensor, where)


def _check_names(plan: Plan, names: set[str], where: str) -> None:
    unknown, missing = names - plan.tensors.keys(), plan.tensors.keys() - names
    if unknown or missing:
        what = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which the plan does not know"
        raise MergeError(f"{where} {what}; it is a part of another model, use the parts that go with {PLAN}")


def _check_tensor(plan: Plan, k: int, name: str, tensor: torch.Tensor, where: str) -> None:
    expected = plan.tensors[name].part_shape(k, plan.divisor)
    if tuple(tensor.shape) != expected:
        raise MergeError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected}; it is a part of another split"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise MergeError(f"{where}: {name} is not finite; train this part again with a smaller learning rate")


def _check_dtype(name: str, expected: torch.dtype, found: torch.dtype, where: str) -> None:
    if found != expected:
        raise MergeError(f"{where}: {name} is {found}, in part 0 it is {expected}; convert the parts to one dtype")
