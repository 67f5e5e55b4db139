"""Composed models, folders of parts and two-level networks on the Hugging Face Hub: safetensors, JSON and a model card,
nothing else.

`push` uploads what a repository is to hold, `write_repository` writes it into a folder. Stock timm loads a composed
model as ``hf-hub:USER/REPO``; `merge` and `TwoLevel.load` read the others as ``hf-hub:USER/REPO-parts``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import models
from ..errors import FileError, MergeError, PushError, headline, looking_into, public
from ..storage import files
from ..storage.atomic import output_folder
from ..two_level import files as two_level
from ..version import __version__
from . import card

CARD = "README.md"
# What a network is read from: of another one nothing stays, which would be taken for this one's.
NETWORK = (files.MODEL, files.CONFIG, files.PLAN, files.ANY_PART, *two_level.FILES)
_logger = logging.getLogger(__name__)


@public
def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    tag: str | None = None,
) -> str:
    """Upload a composed model, a folder of parts or a two-level network, and its model card. After a broken connection
    what has arrived is not uploaded again. Files of another network there are removed, a card
    that was edited there stays as it is.

    Args:
        folder: from `merge_files`, a training run, `Parts.save` or `TwoLevel.save`, with or without a ``README.md``; of
            a run's own folder, its model after the best epoch.
        repo: ``USER/REPO``; made if it is not there.
        private: make it private.
        message: of the commit.
        tag: for the commit, such as ``v1.0``.

    Returns:
        The address of the commit.

    Raises:
        MergeError: the folder holds none of them, or is damaged.
        PushError: the Hub refuses, or cannot be reached.
    """
    _check_name(repo)
    found, made = _look(folder, repo)
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in found.items():
            os.symlink(path.resolve(), Path(temporary) / name)
        for name, content in made.items():
            (Path(temporary) / name).write_bytes(content)
        with _talking_to_the_hub(repo):
            return _upload(Path(temporary), repo, private, message or f"{repo} by timm_dd {__version__}", tag)


@public
def write_repository(folder: str | Path, repo: str, target: str | Path) -> None:
    """Write the folder that `push` would upload to `repo`, without a connection; edit its ``README.md`` and push it.

    Raises:
        MergeError: `folder` holds no composed model, parts or two-level network, or is damaged.
        FileError: `target` is not empty, or cannot be written.
    """
    _check_name(repo)
    target = Path(target)
    with looking_into(target, FileError):
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken:
        raise FileError(f"{target} is not empty; remove it, or choose another folder")
    found, made = _look(folder, repo)
    with output_folder(target, sync=False) as aside:
        for name, path in found.items():
            shutil.copyfile(path, aside(name))
        for name, content in made.items():
            aside(name).write_bytes(content)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError("it has no user")
    except ValueError as e:
        raise PushError(f"{repo!r} is not the name of a repository, USER/REPO ({headline(e)})") from e


def _look(folder: str | Path, repo: str) -> tuple[dict[str, Path], dict[str, bytes]]:
    with looking_into(folder, MergeError):
        return _gather(models.of_run(Path(folder)), repo)


def _gather(folder: Path, repo: str) -> tuple[dict[str, Path], dict[str, bytes]]:
    """The files of a repository by their names in it, and what others hold: its card is the folder's ``README.md``,
    with the images beside it, or one of ours."""
    made: dict[str, bytes] = {}
    if (folder / files.TWO_LEVEL).exists():
        about, found = two_level.gather(folder)
        made[files.TWO_LEVEL] = about.encode()
        own = card.of_two_level(repo, folder)
    elif (folder / files.PLAN).exists():
        with files.PartsFolder(folder) as parts:
            paths = [parts.open(k).path for k in range(parts.plan.parts)]
            for k in range(parts.plan.parts):
                parts.check(k)
            own = card.of_parts(repo, parts)
        found = {path.name: path for path in (folder / files.PLAN, *paths)}
    else:
        own = card.of_model(repo, folder)
        found = {name: folder / name for name in (files.MODEL, files.CONFIG)}
    if (given := folder / CARD).is_file():
        shown = {path.name: path for path in folder.glob("*.png")}
        return {**found, **shown}, {**made, **own.images, CARD: _read_card(given, shown.values())}
    return found, {**made, **own.images, CARD: _sign(own.text).encode()}


def _read_card(path: Path, images: Iterable[Path]) -> bytes:
    """A user's card; MergeError unless the Hub can show it and the `images` beside it."""
    if odd := [image for image in images if not image.is_file()]:
        raise MergeError(f"{odd[0]}, beside {CARD}, is no file; mend or remove it")
    with files.reading(path, "write it again in UTF-8"):
        text = path.read_bytes()
        text.decode()
        return text


def _upload(staged: Path, repo: str, private: bool, message: str, tag: str | None) -> str:
    api = HfApi(library_name="timm_dd", library_version=__version__)
    _check_state(api, repo, private, tag)
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    others = [*NETWORK]
    with contextlib.suppress(EntryNotFoundError):
        there = Path(api.hf_hub_download(repo, CARD)).read_bytes()
        if _is_signed(there.decode(errors="replace")):
            others += card.PICTURES
        else:  # which may show them
            _logger.warning("%s: the card there was edited and stays as it is", repo)
            (staged / CARD).write_bytes(there)
    commit = api.upload_folder(repo_id=repo, folder_path=staged, commit_message=message, delete_patterns=others)
    if tag is not None:
        api.create_tag(repo, tag=tag, revision=commit.oid)
    return commit.commit_url


def _check_state(api: HfApi, repo: str, private: bool, tag: str | None) -> None:
    """Refuse what would fail, or publish what shall be private, before anything is uploaded."""
    try:
        public = not api.repo_info(repo).private
    except RepositoryNotFoundError:
        return
    if private and public:
        raise PushError(f"{repo} is public; make it private in its settings first, or choose another name")
    if tag is not None and tag in (ref.name for ref in api.list_repo_refs(repo).tags):
        raise PushError(f"{repo} has a tag {tag} already; choose another")


@contextlib.contextmanager
def _talking_to_the_hub(repo: str) -> Iterator[None]:
    try:
        yield
    except PushError:
        raise
    except Exception as e:  # of huggingface_hub, of whichever HTTP library it uses, and of sockets
        raise PushError(
            f"{repo} was not pushed ({headline(e)}); log in with `hf auth login`, check the name and the connection, "
            "and push again: what has arrived is not uploaded twice"
        ) from e


# A card that nobody has edited since it was written ends with a hash of its text.
_SIGNED = "\n<!-- timm_dd writes this card anew unless it is edited: {} -->\n"


def _sign(text: str) -> str:
    return text + _SIGNED.format(hashlib.sha256(text.encode()).hexdigest())


def _is_signed(text: str) -> bool:
    return _sign(text[: -len(_sign(""))]) == text
