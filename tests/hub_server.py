"""A local server that speaks those endpoints of the Hugging Face Hub that the client uses to push and pull models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # the tokens it knows
PAGE = 3  # files a page of a listing, so that every listing has several
INLINE_BYTES = 1000  # larger files, and all safetensors, go to large-file storage


@dataclass
class Repository:
    """One repository: every commit's files, and what its names point to."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files; returns its id."""
        oid = hashlib.sha1(f"commit {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def head(self, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.refs[branch]]


class HubServer:
    """The server: `with HubServer() as hub: … hub.url`; tests look at, and change, `repositories`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.on_upload: Callable[[bytes], bytes] = lambda data: data
        self.on_download: Callable[[str, bytes], bytes] = lambda path, data: data
        self.before_commit: Callable[[], None] = lambda: None
        self.failures: dict[str, tuple[int, str]] = {}  # "METHOD pattern" of a path -> status and error code
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = True) -> str:
        """A repository with one commit; returns the commit's id."""
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].large = {p for p, data in files.items() if _is_large(p, len(data))}
        return self.repositories[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})


def _is_large(path: str, size: int) -> bool:
    return size > INLINE_BYTES and path.endswith((".safetensors", "tokenizer.json"))


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" not in self.headers.get("Transfer-Encoding", "")
            else self._chunked()
        )
        self.query = parse_qs(url.query)
        path = url.path
        self.server_state.requests.append(f"{self.command} {path}")
        for what, (status, code) in self.server_state.failures.items():
            method, pattern = what.split(" ", 1)
            if method == self.command and re.search(pattern, path):
                return self._error(status, code)
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return handler(self, *(unquote(group) if group else group for group in match.groups()))
        return self._error(404, "NoSuchEndpoint")

    def _chunked(self) -> bytes:
        parts = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return parts

    def _send(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        found = self.server_state.repositories.get(repo_id)
        token = self._token()
        if found is None or (found.private and token not in (WRITER, READER)):
            # the Hub tells a stranger nothing: 401 without a token, 404 with one
            self._error(404 if token else 401, "RepoNotFound")
            return None
        if write and token != WRITER:
            self._error(403, "Forbidden: write access needed")
            return None
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            self._error(404, "RevisionNotFound")
            return None
        return oid

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if self._token() != WRITER:
            return self._error(401 if self._token() is None else 403, "Forbidden: cannot create here")
        if repo_id in self.server_state.repositories:
            return self._send(409, {"error": "exists", "url": f"{self.server_state.url}/{repo_id}"})
        self.server_state.add(repo_id, {}, private=asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.server_state.url}/{repo_id}"})

    def info(self, repo_id: str, revision: str | None) -> None:
        if (repository := self._repository(repo_id)) and (oid := self._commit_of(repository, revision or "main")):
            files = [{"rfilename": path} for path in repository.commits[oid]]
            facts = {"_id": "0", "id": repo_id, "sha": oid, "private": repository.private, "siblings": files}
            self._send(200, {**facts, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        if not (repository := self._repository(repo_id)) or not (oid := self._commit_of(repository, revision)):
            return
        entries = []
        for path, data in sorted(repository.commits[oid].items()):
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
            if path in repository.large:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            link = f"{self.server_state.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{link}>; rel="next"'
        self._send(200, entries[start : start + PAGE], headers)

    def refs(self, repo_id: str) -> None:
        if repository := self._repository(repo_id):
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in repository.refs.items()]
            self._send(200, {"branches": branches, "tags": [], "converts": []})

    def validate_yaml(self) -> None:
        import yaml

        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            assert match and isinstance(yaml.safe_load(match[1]), dict)
        except (AssertionError, yaml.YAMLError) as error:
            return self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        if self._repository(repo_id, write=True):
            asked = json.loads(self.body)["files"]
            modes = [("lfs" if _is_large(f["path"], f["size"]) else "regular") for f in asked]
            self._send(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                        for f, mode in zip(asked, modes, strict=True)
                    ]
                },
            )

    def batch(self, repo_id: str) -> None:
        if self._repository(repo_id, write=True):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server_state.storage:
                    upload = {"href": f"{self.server_state.url}/storage/{wanted['oid']}"}
                    verify = {"href": f"{self.server_state.url}/storage/verify"}
                    answer["actions"] = {"upload": upload, "verify": verify}
                objects.append(answer)
            self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.server_state.storage[oid] = self.server_state.on_upload(self.body)
        self._send(200, {})

    def verify(self) -> None:
        asked = json.loads(self.body)  # sizes alone, as the Hub's client asks
        found = self.server_state.storage.get(asked["oid"], b"")
        self._send(200 if len(found) == asked["size"] else 422, {})

    def commit(self, repo_id: str, branch: str) -> None:
        if not (repository := self._repository(repo_id, write=True)):
            return
        self.server_state.before_commit()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.refs[branch]):
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.head(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                repository.large.discard(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server_state.storage[value["oid"]]
                repository.large.add(value["path"])
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        oid = repository.commit(files, branch)
        return self._send(200, {"commitUrl": f"{self.server_state.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not (repository := self._repository(repo_id)) or not (oid := self._commit_of(repository, revision)):
            return
        data = repository.commits[oid].get(path)
        if data is None:
            return self._error(404, "EntryNotFound")
        digest = hashlib.sha256(data).hexdigest()
        etag = digest if path in repository.large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
        headers["X-Linked-Size"] = str(len(data))
        if path in repository.large:
            self.server_state.storage.setdefault(digest, data)
            # another host than the Hub's own, as its large files have: the client asks it without the token
            host = self.server_state.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{host}/cdn/{digest}/{path}"
            return self._send(302, b"", headers)
        return self._send(200, self.server_state.on_download(path, data), headers)

    def cdn(self, digest: str, path: str) -> None:
        self._send(200, self.server_state.on_download(path, self.server_state.storage[digest]))


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_REPO}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/([0-9a-f]{64})", _Handler.upload),
    ("POST", "/storage/verify", _Handler.verify),
    ("GET HEAD", r"/cdn/([0-9a-f]{64})/(.+)", _Handler.cdn),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
