"""A server on 127.0.0.1 that speaks the Hugging Face Hub's HTTP API, for tests with the real huggingface_hub.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token="hf_test").create_repo("user/model")  # in this process
        subprocess.run(command, env=os.environ | hub.env(tmp_path))  # or in another one

Model repositories in memory: the branch main, tags and commits. Large files go by the LFS protocol, in one part. Xet is
not spoken, and huggingface_hub takes it without asking the server: HF_HUB_DISABLE_XET=1, which `env` sets, keeps it
out, or huggingface_hub.constants.HF_HUB_DISABLE_XET = True in this process.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".h5", ".npy", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
REGULAR_LIMIT = 10 * 2**20  # bytes: what is larger goes to LFS whatever its name
YAML_BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
RESULT = {  # of a model card: what has to be there, and with a question mark what may be
    "task": {"type": str, "name?": str},
    "dataset": {"type": str, "name": str, "config?": str, "split?": str, "revision?": str},
    "metrics": [{"type": str, "value": object, "name?": str, "config?": str}],
    "source?": {"url": str, "name?": str},
}
MODEL_INDEX = [{"name": str, "results": [RESULT]}]

routes = []  # (methods, pattern of the path, function, whether it asks for a token)
PLACEHOLDERS = {"repo": "[^/]+/[^/]+?", "revision": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}


def route(methods, path, write=False):
    """Register the method of HubServer that answers a path. Only writing asks for a token, or what is private."""
    for name, pattern in PLACEHOLDERS.items():
        path = path.replace(f"{{{name}}}", f"(?P<{name}>{pattern})")

    def register(function):
        routes.append((methods.split(), re.compile(path), function, write))
        return function

    return register


@dataclass
class Response:
    body: object  # bytes, or what becomes JSON
    status: int = 200
    headers: dict = field(default_factory=dict)


class HubError(Exception):
    """An answer with an error status. huggingface_hub picks its exception by the code before the status."""

    def __init__(self, status, message, code="", **headers):
        headers |= {"X-Error-Message": ascii(message)[1:-1]}  # a header takes no other letters
        headers |= {"X-Error-Code": code} if code else {}
        self.response = Response({"error": message}, status, headers)


class Blob:
    """A file's content. In git an LFS file is a pointer, a small text that names the content by its sha256."""

    def __init__(self, content, lfs=False):
        self.content, self.lfs = content, lfs
        sha256 = hashlib.sha256(content).hexdigest()
        size = len(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        in_git = pointer if lfs else content
        self.oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
        self.etag = sha256 if lfs else self.oid
        self.info = {"size": size, "oid": self.oid, "blobId": self.oid}  # blobId and sha256: of model_info
        if lfs:
            self.info["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}


@dataclass
class Commit:
    oid: str
    title: str
    tree: dict  # path -> Blob

    def entries(self):
        """The files and the folders, by path."""
        entries = {}
        for path, blob in sorted(self.tree.items()):
            for folder in map(str, list(PurePosixPath(path).parents)[-2::-1]):  # without "."
                oid = hashlib.sha1(f"{self.oid}/{folder}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            entries[path] = {"type": "file", "path": path, **blob.info}
        return entries


class Repo:
    """Commits, the last one of them main; as on the Hub the first one has a .gitattributes."""

    def __init__(self, name, private):
        self.name, self.private, self.commits, self.tags = name, private, [], {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("initial commit", {".gitattributes": Blob(attributes.encode())})

    def commit(self, title, tree):
        files = sorted((path, blob.oid) for path, blob in tree.items())
        state = (self.name, len(self.commits), title, files)
        self.commits.append(Commit(hashlib.sha1(repr(state).encode()).hexdigest(), title, tree))

    @property
    def main(self):
        return self.commits[-1]

    def at(self, revision):
        known = {commit.oid: commit for commit in self.commits} | self.tags | {"main": self.main}
        if revision not in known:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]


def card_metadata(readme):
    """The YAML on top of a model card; None without."""
    block = YAML_BLOCK.match(readme)
    return yaml.safe_load(block[1]) if block else None


def schema_errors(value, schema, where):
    """What is missing or of a wrong type, in the words of the Hub."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f'"{where}" must be an array']
        return [error for i, item in enumerate(value) for error in schema_errors(item, schema[0], f"{where}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f'"{where}" must be of type object']
        errors = [f'"{where}.{key}" is required' for key in schema if not key.endswith("?") and key not in value]
        known = [(key.rstrip("?"), inner) for key, inner in schema.items() if key.rstrip("?") in value]
        return errors + [error for key, inner in known for error in schema_errors(value[key], inner, f"{where}.{key}")]
    return [] if isinstance(value, schema) else [f'"{where}" must be a string']


class HubServer:
    """The Hub on a free port, in a thread of its own.

    `requests` lists what was asked, as (method, path). With `token` set no other one is valid, else any is. The next
    `fail_uploads` uploads of LFS objects lose their connection halfway. `lfs` has the objects that arrived, by their
    sha256: what is there need not be uploaded again.
    """

    def __init__(self, token=None):
        self.token, self.fail_uploads = token, 0
        self.requests, self.repos, self.lfs = [], {}, {}
        self.lock = threading.Lock()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def env(self, home):
        """The variables with which another process talks to this server, and to no cache or proxy of its user."""
        names = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token or "hf_test", "HF_HOME": home}
        names |= {"HF_HUB_CACHE": Path(home) / "hub", "HF_HUB_OFFLINE": 0, "HF_HUB_DISABLE_XET": 1}
        names |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {name: str(value) for name, value in names.items()}

    def answer(self, request):
        authorization = request.headers.get("Authorization")
        if authorization and self.token and authorization != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        for methods, pattern, function, write in routes:
            match = pattern.fullmatch(request.url.path)
            if match and request.command in methods:
                arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                if "repo" in arguments:
                    arguments["repo"] = self.find(arguments["repo"], authorization)
                if write and not authorization:
                    raise HubError(401, "Invalid username or password.")
                answer = function(self, request, **arguments)
                return answer if isinstance(answer, Response) else Response(answer)
        raise HubError(404, f"No such endpoint: {request.command} {request.url.path}")

    def find(self, name, authorization):
        repo = self.repos.get(name)
        if authorization and repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if not authorization and (repo is None or repo.private):
            # The same for both, as on the Hub. Of an https:// address huggingface_hub would know without the code
            # that this 401 means a repository.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return repo

    @route("GET", "/api/whoami-v2", write=True)
    def whoami(self, request):
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": "0", "name": "user", "fullname": "User", "orgs": [], "auth": auth}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        errors, warnings = [], []
        try:
            metadata = card_metadata(json.loads(request.body)["content"])
            if not metadata:
                warnings.append({"message": "empty or missing yaml metadata in repo card"})
            elif not isinstance(metadata, dict):
                errors.append({"message": "The metadata must be of type object"})
            elif "model-index" in metadata:
                errors += [{"message": e} for e in schema_errors(metadata["model-index"], MODEL_INDEX, "model-index")]
        except yaml.YAMLError as error:
            errors.append({"message": f"Invalid YAML: {error}"})
        return Response({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("POST", "/api/repos/create", write=True)
    def create_repo(self, request):
        asked = json.loads(request.body)
        if asked.get("type", "model") != "model":
            raise HubError(400, "This server has models only")
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.repos:
            return Response({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.repos[name] = Repo(name, asked.get("private") or asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}", "name": name}

    @route("GET", "/api/models/{repo}(?:/revision/{revision})?")
    def model_info(self, request, repo, revision):
        tree, blobs = repo.at(revision or "main").tree, "blobs" in request.query
        card = (card_metadata(tree["README.md"].content.decode()) if "README.md" in tree else None) or {}
        info = {"id": repo.name, "sha": repo.at(revision or "main").oid, "private": repo.private, "cardData": card}
        info |= {name: card[name] for name in ("tags", "library_name", "pipeline_tag") if name in card}
        siblings = [{"rfilename": path} | (blob.info if blobs else {}) for path, blob in sorted(tree.items())]
        return info | {"siblings": siblings}

    @route("GET", "/api/models/{repo}/refs")
    def list_refs(self, request, repo):
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main.oid}
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": to.oid} for tag, to in repo.tags.items()]
        return {"branches": [main], "tags": tags, "converts": [], "pullRequests": []}

    @route("POST", "/api/models/{repo}/tag/{revision}", write=True)
    def create_tag(self, request, repo, revision):
        tag = json.loads(request.body)["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Tag {tag} already exists")
        repo.tags[tag] = repo.at(revision)
        return {}

    @route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
    def list_tree(self, request, repo, revision, path):
        entries = repo.at(revision).entries()
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        depth = None if request.query.get("recursive") == ["true"] else 1  # a path's first parent is its own folder
        folder = PurePosixPath(path or ".")
        return [e for name, e in entries.items() if folder in list(PurePosixPath(name).parents)[:depth]]

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, request, repo, revision):
        entries = repo.at(revision).entries()
        return [entries[path] for path in parse_qs(request.body.decode())["paths"] if path in entries]

    @route("POST", "/api/models/{repo}/preupload/{revision}", write=True)
    def preupload(self, request, repo, revision):
        tree, files = repo.at(revision).tree, []
        for file in json.loads(request.body)["files"]:
            path, lfs = file["path"], file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT
            oid = tree[path].etag if path in tree else None  # with it the client sees what has not changed
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, request, repo):
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(request.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.lfs:
                href = f"{self.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{oid}")  # without a token: on the Hub this is a signed address at its storage
    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the sha256 that was announced")
        self.lfs[oid] = request.body
        return b""

    @route("POST", "/lfs/{oid}/verify", write=True)
    def lfs_verify(self, request, oid):
        if oid not in self.lfs or len(self.lfs[oid]) != json.loads(request.body)["size"]:
            raise HubError(404, "The object is not there, or of another size")
        return {}

    @route("POST", "/api/models/{repo}/commit/{revision}", write=True)
    def create_commit(self, request, repo, revision):
        if revision != "main" or "create_pr" in request.query:
            raise HubError(400, "This server takes commits to main only")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repo.main.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.main.tree)
        for kind, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if kind == "file":
                tree[path] = Blob(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, f"An LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = Blob(self.lfs[value["oid"]], lfs=True)
            else:  # deletedFile or deletedFolder
                left = {p: b for p, b in tree.items() if p != path and not p.startswith(path.rstrip("/") + "/")}
                if len(left) == len(tree):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                tree = left
        repo.commit(header["value"]["summary"], tree)
        return {"commitOid": repo.main.oid, "commitUrl": f"{self.url}/{repo.name}/commit/{repo.main.oid}"}

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request, repo, revision, path):
        commit = repo.at(revision)
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        blob = commit.tree[path]
        size = len(blob.content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not asked:
            return Response(blob.content, 200, headers)
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start > end:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Response(blob.content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, the default: one request a connection, so that none stays open from one test to the next."""

    def handle_request(self):
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        size = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, self.url.path))
            fail = self.command == "PUT" and self.hub.fail_uploads > 0
            self.hub.fail_uploads -= fail
        if fail:
            self.rfile.read(size // 2)
            self.connection.close()  # with bytes unread and not shut down first: the client sees a reset
            return
        self.body = self.rfile.read(size)  # before any answer: a client that still sends would miss it
        try:
            with self.hub.lock:
                response = self.hub.answer(self)
        except HubError as error:
            response = error.response
        body = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        self.send_response(response.status)
        for name, value in {"Content-Length": len(body), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *args):
        """Not on stderr: `requests` has it."""
