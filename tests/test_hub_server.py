"""The tests' own Hub, asked by the real huggingface_hub."""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_session, lfs
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

# huggingface_hub gives httpx the file of an LFS upload as data=, which httpx calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "user/model"
README = """---
library_name: timm
tags: [image-classification]
model-index:
- name: model
  results:
  - task: {type: image-classification}
    dataset: {type: imagenet-1k, name: ImageNet}
    metrics:
    - {type: accuracy, value: 76.1}
---
# A model
"""


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    (folder / "logs" / "summary.csv").write_text("epoch,loss\n0,1.0\n")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(1_500_000))
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_upload_then_download(hub, api, folder, tmp_path):
    assert not api.repo_exists(REPO)
    assert api.create_repo(REPO).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.repo_exists(REPO) and not api.file_exists(REPO, "config.json")

    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Add a model")
    files = contents(folder)
    assert api.file_exists(REPO, "config.json")
    assert sorted(api.list_repo_files(REPO)) == sorted([".gitattributes", *files])
    top = {entry.path: entry for entry in api.list_repo_tree(REPO)}
    assert set(top) == {".gitattributes", "README.md", "config.json", "logs", "model.safetensors"}
    assert [e.path for e in api.list_repo_tree(REPO, "logs")] == ["logs/summary.csv"]
    assert top["model.safetensors"].lfs.size == 1_500_000 and top["config.json"].lfs is None
    assert uploads(hub) == [f"/lfs/{top['model.safetensors'].lfs.sha256}"]
    assert {e.path for e in api.get_paths_info(REPO, ["logs", "README.md", "none"])} == {"logs", "README.md"}

    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.library_name) == (commit.oid, False, "timm")
    assert info.card_data.eval_results[0].metric_value == 76.1
    assert {s.rfilename: s.size for s in info.siblings if s.lfs} == {"model.safetensors": 1_500_000}

    for path, content in files.items():
        with open(api.hf_hub_download(REPO, path, cache_dir=tmp_path / "cache"), "rb") as file:
            assert file.read() == content
    snapshot = api.snapshot_download(REPO, cache_dir=tmp_path / "cache", ignore_patterns=".gitattributes")
    assert contents(Path(snapshot)) == files

    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == commit.oid and len(hub.repos[REPO].commits) == 2 and len(uploads(hub)) == 1


def test_revisions(hub, api, tmp_path):
    def read(revision):
        with open(api.hf_hub_download(REPO, "a b/ä.txt", revision=revision, cache_dir=tmp_path / "cache")) as file:
            return file.read()

    def add(text, **kwargs):
        return api.create_commit(REPO, [CommitOperationAdd("a b/ä.txt", text)], commit_message="Change", **kwargs)

    api.create_repo(REPO)
    first = add(b"1")
    api.create_tag(REPO, tag="v/1", tag_message="First")
    second = add(b"2", parent_commit=first.oid)
    api.create_tag(REPO, tag="v2", revision=second.oid)
    assert [read(r) for r in ("v/1", first.oid, "v2", second.oid, "main")] == ["1", "1", "2", "2", "2"]
    refs = api.list_repo_refs(REPO)
    assert {r.name: r.target_commit for r in refs.branches + refs.tags} == {
        "main": second.oid,
        "v/1": first.oid,
        "v2": second.oid,
    }
    assert api.repo_info(REPO, revision="v/1").sha == first.oid
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v2")
    api.create_tag(REPO, tag="v2", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="412"):
        add(b"3", parent_commit=first.oid)

    api.create_commit(REPO, [CommitOperationDelete("a b/")], commit_message="Delete")
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert "a b/ä.txt" in api.list_repo_files(REPO, revision="v2")
    with pytest.raises(EntryNotFoundError):
        read("main")
    with pytest.raises(RevisionNotFoundError):
        read("v3")


def test_range(hub, api):
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_in_repo="digits.bin", path_or_fileobj=b"0123456789")
    url = huggingface_hub.hf_hub_url(REPO, "digits.bin", endpoint=hub.url)
    assert get_session().get(url).content == b"0123456789"
    for asked, status, content in [
        ("bytes=7-", 206, b"789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=5-99", 206, b"56789"),
    ]:
        answer = get_session().get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (status, content)
        assert answer.headers["Content-Range"].endswith("/10")
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_private_repo_and_token(hub, api, tmp_path):
    hub.token = "hf_test"
    api.create_repo(REPO, private=True)
    api.create_repo("user/public")
    anonymous, wrong = HfApi(endpoint=hub.url, token=False), HfApi(endpoint=hub.url, token="hf_wrong")
    assert api.model_info(REPO).private and not anonymous.model_info("user/public").private
    assert api.whoami()["name"] == "user"
    assert api.repo_exists(REPO) and not anonymous.repo_exists(REPO) and not api.repo_exists("user/none")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        anonymous.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.hf_hub_download("user/none", ".gitattributes", cache_dir=tmp_path)
    for call in (
        lambda: wrong.whoami(),
        lambda: wrong.model_info("user/public"),
        lambda: anonymous.create_repo("user/other"),
        lambda: anonymous.create_tag("user/public", tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == 401


def test_broken_upload(hub, api, folder, monkeypatch):
    """Without the library's own retries, which wait for seconds."""
    monkeypatch.setattr(lfs, "http_backoff", functools.partial(lfs.http_backoff, max_retries=0))
    api.create_repo(REPO)
    hub.fail_uploads = 2
    for failed in (1, 2):
        with pytest.raises(RuntimeError, match="model.safetensors"):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert len(uploads(hub)) == failed and not hub.lfs
        assert api.list_repo_files(REPO) == [".gitattributes"]  # the commit comes last
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(uploads(hub)) == 3 and "model.safetensors" in api.list_repo_files(REPO)
    assert list(hub.lfs.values()) == [(folder / "model.safetensors").read_bytes()]

    api.create_repo("user/other")  # an object that is there is not sent again
    api.upload_folder(repo_id="user/other", folder_path=folder)
    assert len(uploads(hub)) == 3 and "model.safetensors" in api.list_repo_files("user/other")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("name: model", "title: model", '"model-index[0].name" is required'),
        ("results:", "results: {}\n  other:", '"model-index[0].results" must be an array'),
        (
            "{type: imagenet-1k, name: ImageNet}",
            "ImageNet",
            '"model-index[0].results[0].dataset" must be of type object',
        ),
        ("name: ImageNet", "name: 1", '"model-index[0].results[0].dataset.name" must be a string'),
        ("value: 76.1", "top1: 76.1", '"model-index[0].results[0].metrics[0].value" is required'),
        ("tags: [", "tags: {", "Invalid YAML"),
    ],
)
def test_wrong_model_card(hub, api, old, new, message):
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="Invalid metadata in README.md") as error:
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=README.replace(old, new).encode())
    assert message in str(error.value)
    assert api.list_repo_files(REPO) == [".gitattributes"]


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."), reason="it asks https://huggingface.co, whatever the endpoint"
)
def test_validate_model_card(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    card = ModelCard(README)
    card.validate()
    card.data.eval_results[0].dataset_name = 1
    with pytest.raises(ValueError, match="must be a string"):
        card.validate()
    assert hub.requests == [("POST", "/api/validate-yaml")] * 2


def test_model_card_without_metadata(hub, api):
    api.create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"# A model")


def test_another_process(hub, folder, tmp_path):
    """It needs no more than the environment, a proxy or not."""
    script = """
import sys
from huggingface_hub import create_repo, snapshot_download, upload_folder

create_repo("model", private=True)
upload_folder(repo_id="user/model", folder_path=sys.argv[1])
print(snapshot_download("user/model"))
"""
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script, folder]
    run = subprocess.run(command, env=os.environ | proxy | hub.env(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    downloaded = Path(run.stdout.strip())
    assert downloaded.is_relative_to(tmp_path / "hub")
    assert (downloaded / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert hub.repos[REPO].private
