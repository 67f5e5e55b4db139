"""Folders of parts and composed models, as safetensors and JSON.

A folder of parts holds ``plan.json`` and ``part-0000k-of-0000K.safetensors``, sealed, whose metadata say what they are.
A composed model is timm's form: ``model.safetensors``, ``config.json``. docs/format.md describes the format.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import FileError, MergeError, headline, shown
from ..planning.plan import FORMAT, Plan
from ..text import json_text
from ..version import __version__
from .atomic import as_path, output_folder, replacing
from .tensorfile import READ_ERRORS, Entry, TensorFile, is_finite, write_state

PLAN, MODEL, CONFIG = "plan.json", "model.safetensors", "config.json"
TWO_LEVEL = "two_level.json"  # of the parts' common decision, which `predict` and the like take before a model
ANY_PART = "*part-*.safetensors"  # in a repository, whose folders are no borders to a pattern
CORRECTION = "correction"  # what the metadata of a model say of how it was merged
LARGEST_PLAN = 100 << 20  # bytes, as the header of a safetensors file


def part_name(k: int, parts: int) -> str:
    return f"part-{k:05d}-of-{parts:05d}.safetensors"


# ---- writing


def save_parts(
    folder: str | Path,
    plan: Plan,
    states: Sequence[Mapping[str, torch.Tensor]],
    seed: int | None = None,
    epoch: int | None = None,
) -> None:
    """Write the plan and its K parts: all of them, or none.

    Raises:
        FileError: the folder cannot be written, or a file has no form for a dtype or an argument of the model.
    """
    with output_folder(folder) as aside:
        write_parts(aside, plan, states, seed, epoch)


def write_parts(
    aside: Callable[[str], Path],
    plan: Plan,
    states: Iterable[Mapping[str, torch.Tensor]],
    seed: int | None,
    epoch: int | None,
) -> dict[str, Path]:
    """As `save_parts`, into a folder that is being written; the parts' files, and where they are until then."""
    digest, written = plan.digest(), {}
    for k, state in enumerate(states):
        name = part_name(k, plan.parts)
        written[name] = aside(name)
        if (other := written[name].parent / str(k) / name).exists():  # as a training run leaves it
            raise FileError(f"{other} is part {k} already; choose another folder, or remove it")
        write_part(written[name], plan, digest, k, state, seed, epoch)
    aside(PLAN).write_text(json_text(plan.to_json()), encoding="utf-8")
    return written


def save_part(folder: Path, plan: Plan, k: int, state: Mapping[str, torch.Tensor], seed: int, epoch: int) -> None:
    with replacing(folder / part_name(k, plan.parts)) as temporary:
        write_part(temporary, plan, plan.digest(), k, state, seed, epoch)


def write_part(
    path: Path,
    plan: Plan,
    digest: str,
    k: int,
    state: Mapping[str, torch.Tensor],
    seed: int | None,
    epoch: int | None,
) -> None:
    """Write part k; `state` is its state dict, `digest` the plan's. The same tensors give the same bytes.

    Args:
        seed: of the fresh weights; None if not known.
        epoch: how many it was trained for; None if not known.

    Raises:
        MergeError: these are not the part's tensors.
    """
    check_tensors(plan, k, state)
    about = {"model_args": plan.model_args, "domain": plan.domain.to_json(), "seed": seed, "epoch": epoch}
    made = {"timm_dd": __version__, "timm": version("timm")}
    metadata = {
        **_identity(plan, k, digest),
        **{name: json.dumps(value) for name, value in about.items()},
        **made,
    }
    _write(path, state, metadata, sealed=True)


def _identity(plan: Plan, k: int, digest: str) -> dict[str, str]:
    """The metadata by which a part is known to be the plan's."""
    numbers = {"timm_dd.format": FORMAT, "part": k, "parts": plan.parts}
    return {**{name: str(n) for name, n in numbers.items()}, "model": plan.model or "", "plan": digest}


def _write(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], sealed: bool = False) -> None:
    """Write a state dict, the largest elements first: so all are aligned, and tensors of one dtype are together."""
    write_state(path, dict(sorted(state.items(), key=lambda item: -item[1].dtype.itemsize)), metadata, sealed)


def save_model(folder: str | Path, model: nn.Module, config: dict | None, about: Mapping[str, str]) -> None:
    """Write a model in timm's form; `about` it goes into the metadata."""
    save_state(folder, model.state_dict(), config, about)


def save_state(
    folder: str | Path, state: Mapping[str, torch.Tensor], config: dict | None, about: Mapping[str, str]
) -> None:
    """As `save_model`, from its state dict."""
    with output_folder(folder) as aside:
        _write(aside(MODEL), state, about)
        write_config(aside, config)


def write_config(aside: Callable[[str], Path], config: dict | None) -> None:
    """Write timm's ``config.json``; that of another model does not stay where there is none."""
    path = aside(CONFIG)
    if config is not None:
        path.write_text(json_text(config), encoding="utf-8")


def summary(plan: Plan, digest: str, head: str = "sum") -> dict[str, str]:
    """What a composed model's metadata say of how it was made; `digest` is the plan's."""
    reasons = dict.fromkeys(reason for *_, reason in plan.approximations)
    about = {"parts": str(plan.parts), "domain": str(plan.domain), "approximate": "; ".join(reasons), "head": head}
    return {"timm_dd": __version__, "timm": version("timm"), "plan": digest, **about}


# ---- reading


def load_composed(folder: str | Path, model: nn.Module) -> None:
    """Give `model` the weights of a composed model in `folder`, in the dtypes of the file.

    Raises:
        MergeError: no such file, damaged, or of another model.
    """
    path, state = _model_path(Path(folder)), load_state(folder)
    try:
        for name, t in model.state_dict(keep_vars=True).items():
            t.data = t.data.to(state[name].dtype if name in state else t.dtype)
        model.load_state_dict(state)
    except RuntimeError as e:
        raise MergeError(f"{path} is of another model ({headline(e)}); use the one composed of these parts") from e


def load_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a composed model in `folder`; MergeError if there is none, or it is damaged."""
    path = _model_path(Path(folder))
    with reading(path, "compose the parts again"), TensorFile(path) as file:
        return file.state()


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there, and as long as its header says."""
    try:
        with TensorFile(path):
            return True
    except READ_ERRORS:
        return False


def is_correction(folder: str | Path) -> bool:
    """Whether a composed model was merged onto another one; errors as of `load_composed`."""
    path = _model_path(Path(folder))
    with reading(path, "compose the parts again"), TensorFile(path) as file:
        return file.metadata.get("merge") == CORRECTION


def _model_path(folder: Path) -> Path:
    if not is_file(folder / MODEL):
        raise MergeError(f"no {MODEL} in {folder}; expected a folder written by merge_files or timm-dd merge")
    return folder / MODEL


class PartsFolder:
    """A folder of parts, open for reading.

    Args:
        folder: on this machine, or ``hf-hub:USER/REPO[@revision]``.

    Attributes:
        plan: of all of them.
        digest: of the plan as it is written there: a later version may describe the same plan in other words.

    Raises:
        MergeError: no such folder, no plan, or not a plan of this format.
    """

    def __init__(self, folder: str | Path):
        if not isinstance(folder, (str, Path)):
            raise MergeError(
                f"expected the Parts that split or Parts.load gave, or their folder, got {type(folder).__name__}"
            )
        self.path = local(folder, PLAN, ANY_PART)
        described, self.digest = _read_plan(self.path / PLAN)
        try:
            self.plan = Plan.from_json(described)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as e:
            raise MergeError(
                f"{self.path / PLAN} is not a whole plan ({type(e).__name__}: {headline(e)}); it is damaged, "
                "write the parts again"
            ) from e
        self._files = contextlib.ExitStack()
        self._opened: dict[int, TensorFile] = {}

    def open(self, k: int) -> TensorFile:
        """Part k's file, its header checked against the plan.

        Raises:
            MergeError: missing, there twice, truncated, of another K, model or plan, or with a tensor of a wrong shape.
        """
        path = self._part_path(k)
        with reading(path):
            file = self._files.enter_context(TensorFile(path))
        self._opened[k] = file
        _check_metadata(path, _identity(self.plan, k, self.digest), file.metadata)
        _check_names(self.plan, set(file.tensors), str(path))
        for name, entry in file.tensors.items():
            _check_shape(self.plan, k, name, entry.shape, str(path))
        return file

    def check(self, k: int) -> None:
        """Read all of part k, which is open.

        Raises:
            MergeError: its bytes are not those that were written, or a tensor is not finite.
        """
        path = self._opened[k].path
        with reading(path):
            sealed, infinite = self._opened[k].scan(_bounds(self.plan))
        if not sealed:
            raise MergeError(
                f"{path} is damaged or was changed: its bytes do not have the checksum in its metadata; "
                "copy or write this part again"
            )
        if infinite is not None:
            raise MergeError(f"{path}: {shown(infinite)} is not finite; {_TRAIN_AGAIN}")

    def rows(self, k: int, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor of part k, which is open, as integers."""
        return _rows(self._opened[k], name, first, last)

    def load(self, k: int) -> dict[str, torch.Tensor]:
        """Part k's state dict.

        Raises:
            MergeError: as `open` and `check`.
        """
        file = self.open(k)
        self.check(k)
        with reading(file.path):
            return file.state()

    def present(self) -> list[int]:
        """The parts that have a file.

        Raises:
            MergeError: none has.
        """
        found = [k for k in range(self.plan.parts) if self.has(k)]
        if not found:
            self._part_path(0)  # which says so
        return found

    def has(self, k: int) -> bool:
        """Whether part k has a file."""
        return any(map(is_file, self._places(k)))

    def history(self, k: int | None = None) -> tuple[int | None, int | None]:
        """Seed and epoch of part k, which is open; of the first one that is."""
        metadata = self._opened[next(iter(self._opened)) if k is None else k].metadata
        return _count(metadata.get("seed")), _count(metadata.get("epoch"))

    def _part_path(self, k: int) -> Path:
        """Part k's file, in the folder itself or, as a training run leaves it, in a folder of that part."""
        name = part_name(k, self.plan.parts)
        found = [p for p in self._places(k) if is_file(p)]
        if len(found) == 1:
            return found[0]
        if found:
            raise MergeError(f"{self.path} has part {k} twice, {found[0]} and {found[1]}; remove one")
        others = [p for pattern in ("part-*.safetensors", "*/part-*.safetensors") for p in self.path.glob(pattern)]
        raise MergeError(
            f"{name} is missing in {self.path}, which has {len(others)} of {self.plan.parts} parts; train or copy it"
        )

    def _places(self, k: int) -> tuple[Path, Path]:
        name = part_name(k, self.plan.parts)
        return self.path / name, self.path / str(k) / name

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> PartsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ModelFile:
    """A global model's ``model.safetensors``, open for reading.

    Args:
        folder: on this machine, or ``hf-hub:USER/REPO[@revision]``.

    Raises:
        MergeError: no such file, truncated or damaged.
    """

    def __init__(self, folder: str | Path):
        self._path = _model_path(local(folder, MODEL))
        with reading(self._path, _COPY_AGAIN):
            self._file = TensorFile(self._path)
        self._bounds: set[str] = set()

    def check(self, plan: Plan, dtypes: Mapping[str, torch.dtype]) -> None:
        """Raise MergeError unless its tensors are those of the global model, in the `dtypes` of the parts."""
        _check_global(plan, dtypes, self._file.tensors, str(self._path))
        self._bounds = _bounds(plan)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor, as integers; MergeError unless they can be read and are finite."""
        rows = _rows(self._file, name, first, last, _COPY_AGAIN)
        if not is_finite(rows, self._file.tensors[name].dtype, name in self._bounds):
            raise MergeError(f"{self._path}: {shown(name)} is not finite; {_OTHER_WEIGHTS}")
        return rows

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(file: TensorFile, name: str, first: int, last: int, remedy: str = "write this part again") -> np.ndarray:
    try:
        return file.rows(name, first, last)
    except READ_ERRORS as e:
        raise _unreadable(file.path, e, remedy) from e


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def local(folder: str | Path, *names: str) -> Path:
    """The folder itself; of one on the Hub, the files with these `names`."""
    if not str(folder).startswith("hf-hub:"):
        return as_path(folder, MergeError)
    from huggingface_hub import snapshot_download

    repo, _, revision = str(folder).removeprefix("hf-hub:").partition("@")
    try:
        found = snapshot_download(repo, revision=revision or None, allow_patterns=[*names])
    except Exception as e:  # of huggingface_hub, and of whichever HTTP library it uses
        raise MergeError(f"{folder} cannot be downloaded ({headline(e)}); check its name and your login") from e
    return Path(found)


def _read_plan(path: Path) -> tuple[dict, str]:
    """A plan in JSON, and its digest."""
    try:
        if not path.is_file():  # a pipe, for one, would be waited for
            raise FileNotFoundError(errno.ENOENT, "no such file")
        if path.stat().st_size > LARGEST_PLAN:
            raise MergeError(f"{path} has more than {LARGEST_PLAN:,} bytes; this is no plan")
        text = path.read_bytes()
        d = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise MergeError(
            f"no {PLAN} in {path.parent} ({e.strerror}); expected a folder written by Parts.save or timm-dd split"
        ) from e
    except OSError as e:
        raise _unreadable(path, e) from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, MergeError):
            raise
        raise MergeError(f"{path} is not JSON ({headline(e)}); it is damaged, write the parts again") from e
    if not isinstance(d, dict) or d.get("format") != FORMAT:
        found = d.get("format") if isinstance(d, dict) else type(d).__name__
        raise MergeError(f"{path} has format {shown(found)}, {_OTHER_VERSION}")
    return d, sha256(text).hexdigest()


_OTHER_VERSION = f"timm_dd {__version__} reads format {FORMAT}; use the version that wrote it, or a newer one"
_TRAIN_AGAIN = "train this part again with a smaller learning rate"
_OTHER_PARTS = f"it is a part of another model, use the parts that go with {PLAN}"
_CHANGED = "wrap parts (torch.compile, DataParallel) outside of Parts, and undo what was changed in them (pruning)"
_COPY_AGAIN = "copy or write this model again"
_OTHER_WEIGHTS = "take weights from before they diverged"


@contextlib.contextmanager
def reading(path: Path, remedy: str = "write this part again") -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as e:
        raise _unreadable(path, e, remedy) from e


def is_file(path: Path) -> bool:
    """Whether there is a file; MergeError if nobody can say."""
    with reading(path):
        return path.is_file()


def _unreadable(path: Path, error: Exception, remedy: str = "write this part again") -> MergeError:
    if isinstance(error, OSError) and error.errno:  # what the system says, not the file
        return MergeError(f"{error.filename or path} cannot be read ({error.strerror}); make it readable")
    return MergeError(f"{path} cannot be read ({headline(error)}); it is truncated or damaged, {remedy}")


def _check_metadata(path: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    if "timm_dd.format" not in found:
        raise MergeError(f"{path} was not written by timm_dd; use the parts that go with {PLAN}")
    if found["timm_dd.format"] != expected["timm_dd.format"]:
        raise MergeError(f"{path} has format {shown(found['timm_dd.format'])}, {_OTHER_VERSION}")
    for key, value in expected.items():
        if found.get(key) != value:
            raise MergeError(
                f"{path} belongs to another split: its {key} is {shown(found.get(key))}, expected {shown(value)}; "
                f"use the parts that go with {PLAN}"
            )


def check_state(plan: Plan, k: int, state: Mapping[str, torch.Tensor]) -> None:
    """Raise MergeError unless `state` has part k's tensors, of the plan's shapes and finite."""
    check_tensors(plan, k, state)
    _check_finite(plan, state, f"part {k}", _TRAIN_AGAIN)


def check_tensors(plan: Plan, k: int, state: Mapping[str, torch.Tensor]) -> None:
    """Raise MergeError unless `state` has part k's tensors, of the plan's shapes."""
    _check_names(plan, set(state), f"part {k}", _CHANGED)
    for name, tensor in state.items():
        _check_shape(plan, k, name, tuple(tensor.shape), f"part {k}", _CHANGED)


def check_onto(
    plan: Plan, dtypes: Mapping[str, torch.dtype], model: Mapping[str, torch.Tensor], where: str = "onto"
) -> None:
    """Raise MergeError unless the tensors of the state dict `model` are those of the global one, in the `dtypes` of
    the parts, and finite."""
    _check_global(plan, dtypes, model, where)
    _check_finite(plan, model, where, _OTHER_WEIGHTS)


def _check_global(
    plan: Plan, dtypes: Mapping[str, torch.dtype], found: Mapping[str, torch.Tensor | Entry], where: str
) -> None:
    other = f"it is of another architecture, use {plan.model or 'the module'} as it was split"
    _check_names(plan, set(found), where, other)
    for name, t in found.items():
        expected = plan.tensors[name].shape
        if tuple(t.shape) != expected:
            shapes = f"has shape {shown(tuple(t.shape))}, expected {shown(expected)}"
            raise MergeError(f"{where}: {shown(name)} {shapes}; {other}")
        if t.dtype != dtypes[name]:
            both = f"is {t.dtype}, in the parts it is {dtypes[name]}"
            raise MergeError(f"{where}: {shown(name)} {both}; convert the model or the parts")


def _bounds(plan: Plan) -> set[str]:
    """The buffers that every part has whole, which may be infinite, if in all parts: numbers are clamped by them."""
    return {name for name, t in plan.tensors.items() if not t.trained and not any(t.axes)}


def _check_finite(plan: Plan, state: Mapping[str, torch.Tensor], where: str, remedy: str) -> None:
    bounds = _bounds(plan)
    for name, tensor in state.items():
        wrong = torch.isnan(tensor) if name in bounds else ~torch.isfinite(tensor)
        if bool(wrong.any()):
            raise MergeError(f"{where}: {name} is not finite; {remedy}")


def common_dtypes(parts: Sequence[Mapping[str, torch.dtype]]) -> Mapping[str, torch.dtype]:
    """The dtype of every tensor; MergeError unless it is the same in all parts."""
    for k, dtypes in enumerate(parts):
        for name, dtype in dtypes.items():
            if dtype != parts[0][name]:
                raise MergeError(
                    f"part {k}: {name} is {dtype}, in part 0 it is {parts[0][name]}; convert the parts to one dtype"
                )
    return parts[0]


def _check_names(plan: Plan, names: set[str], where: str, remedy: str = _OTHER_PARTS) -> None:
    unknown, missing = names - plan.tensors.keys(), plan.tensors.keys() - names
    if unknown or missing:
        what = f"lacks {shown(min(missing))}" if missing else f"has {shown(min(unknown))}, which the plan does not know"
        raise MergeError(f"{where} {what}; {remedy}")


def _check_shape(
    plan: Plan, k: int, name: str, shape: tuple[int, ...], where: str, remedy: str = "it is a part of another split"
) -> None:
    expected = plan.tensors[name].part_shape(k, plan.divisor)
    if shape != expected:
        raise MergeError(f"{where}: {shown(name)} has shape {shown(shape)}, expected {shown(expected)}; {remedy}")
