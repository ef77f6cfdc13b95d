"""A Hugging Face Hub on this machine: as much of its protocol as the real huggingface_hub client speaks with it when
it lists, downloads and uploads models. Repositories are dicts of files; every request is kept for tests to look at."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf", ".pth")


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)  # beside main

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or a commit."""
        for name, files in {"main": self.files, **self.branches}.items():
            if revision in (name, commit_of(files)):
                return files
        return None


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)  # -> "read" or "write"
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    cuts: dict[str, list[int]] = field(
        default_factory=dict
    )  # file -> bytes until the connection breaks, each time once
    stored: dict[str, bytes] = field(default_factory=dict)  # sha256 -> what was uploaded
    url: str = ""

    def add(self, name: str, folder: Path, **more) -> Repo:
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        self.repos[name] = Repo(files, **more)
        return self.repos[name]

    def fetched(self) -> list[str]:
        """The files whose contents were asked for, in order."""
        asked = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in asked]


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())).encode()).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.handle_one("HEAD")

    def do_GET(self):
        self.handle_one("GET")

    def do_POST(self):
        self.handle_one("POST")

    def do_PUT(self):
        self.handle_one("PUT")

    def handle_one(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path, self.headers.get("Range")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for pattern, function in ROUTES[method].items():
                if match := re.fullmatch(pattern, path):
                    function(self, *match.groups())
                    return
            raise Refused(404)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send(b"{}", refused.status, {name: value for name, value in headers.items() if value})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        # The client keeps connections for longer than a test: they would outlive this server
        for name, value in {"Content-Length": str(len(content)), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def who(self) -> None:
        if self.role() is None:
            raise Refused(401)
        self.send_json({"type": "user", "name": "me", "auth": {"accessToken": {"role": self.role()}}})

    def role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def writer(self) -> None:
        if self.role() is None:
            raise Refused(401, message="Invalid username or password.")
        if self.role() != "write":
            raise Refused(403, message="You don't have the rights to create a model under this namespace")

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.role() is None):
            raise Refused(401 if self.role() is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def files(self, name: str, revision: str) -> dict[str, bytes]:
        files = self.repo(name).at(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    # --- reading ---

    def info(self, name: str, revision: str | None) -> None:
        repo, files = self.repo(name), self.files(name, revision or "main")
        siblings = [{"rfilename": path, **entry(content)} for path, content in files.items()]
        self.send_json({"id": name, "sha": commit_of(files), "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        files = self.files(name, revision)
        self.send_json([{"type": "file", "path": path, "oid": oid(c), **entry(c)} for path, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo, files = self.repo(name), self.files(name, revision)
        if repo.gated and self.role() is None:
            raise Refused(403 if self.role() else 401, "GatedRepo", "Access to model is restricted.")
        if path not in files:
            raise Refused(404, "EntryNotFound")
        content = files[path]
        tag = hashlib.sha256(content).hexdigest() if path.endswith(LFS) else oid(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        cuts = self.hub.cuts.get(path)
        if self.command == "GET" and cuts:
            headers["Content-Length"] = str(len(rest))
            self.send(rest[: cuts.pop(0)], 206 if asked else 200, headers)
            self.wfile.flush()
            self.close_connection = True
            return
        self.send(rest, 206 if asked else 200, headers)

    # --- writing ---

    def create(self) -> None:
        self.writer()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        fresh = Repo({".gitattributes": b"*.bin filter=lfs\n"}, private=asked.get("visibility") == "private")
        self.hub.repos.setdefault(name, fresh)
        self.send(json.dumps({"url": f"{self.hub.url}/{name}", "name": name, "id": name}).encode(), status)

    def branch(self, name: str, branch: str) -> None:
        self.writer()
        repo = self.repo(name)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = dict(repo.files)
        self.send_json({})

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self.writer()
        files = json.loads(self.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"} for f in files]
        self.send_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, name: str) -> None:
        self.writer()
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, sha256: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == sha256
        self.hub.stored[sha256] = self.body
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        self.writer()
        repo, files = self.repo(name), self.files(name, revision)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        assert files is repo.at(revision)
        url = f"{self.hub.url}/{name}/commit/{commit_of(files)}"
        self.send_json({"success": True, "commitOid": commit_of(files), "commitUrl": url})


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(content: bytes) -> dict:
    return {"size": len(content), "blobId": oid(content)}


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "GET": {
        r"/api/whoami-v2": Handler.who,
        rf"/api/(?:models|datasets)/{REPO}(?:/revision/(.+))?": Handler.info,
        rf"/api/models/{REPO}/tree/(.+)": Handler.tree,
        rf"/api/datasets/{REPO}/tree/([^/]+)(?:/.+)?": Handler.tree,
        rf"(?:/datasets)?/{REPO}/resolve/([^/]+)/(.+)": Handler.resolve,
    },
    "HEAD": {rf"(?:/datasets)?/{REPO}/resolve/([^/]+)/(.+)": Handler.resolve},
    "POST": {
        r"/api/repos/create": Handler.create,
        r"/api/validate-yaml": Handler.validate,
        rf"/api/models/{REPO}/branch/(.+)": Handler.branch,
        rf"/api/models/{REPO}/preupload/(.+)": Handler.preupload,
        rf"/api/models/{REPO}/commit/(.+)": Handler.commit,
        rf"/{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    },
    "PUT": {r"/lfs/([0-9a-f]{64})": Handler.store},
}


@contextmanager
def running():
    """A Hub without repositories, on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
