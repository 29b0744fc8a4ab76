"""A model hub on loopback, which answers what `huggingface_hub` asks of one to push and to pull, and fails on demand.

    hub.fail("create", 503, 2)       the next two requests to create a repository answer 503
    hub.repositories["models/me/student"].files

It knows two tokens: one may do everything, the other may only read.  It does not speak Xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from attrs import define, field

WRITER, READER = "hf_" + "writer", "hf_" + "reader"
_LICENSES = ("apache-2.0", "mit", "other")
#: Larger files, and these, go by LFS.
_LARGE, _BINARY = 20_000, (".safetensors", ".parquet")


@define
class Repository:
    """One repository: whether it is private, and its files after each commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.head if revision == "main" else revision
        return sha, self.commits[sha]


@define
class Hub:
    """The state of the hub.

    Args:
        url: where it is.
        repositories: by kind and name, for example "models/me/student".
        requests: method and path of each, in their order.
        bodies: what was sent to it.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(factory=dict)
    requests: list[str] = field(factory=list)
    bodies: list[bytes] = field(factory=list)
    large: dict[str, bytes] = field(factory=dict)
    faults: dict[str, list[int]] = field(factory=dict)

    def fail(self, what: str, status: int, times: int = 1) -> None:
        self.faults.setdefault(what, []).extend([status] * times)

    def add(self, name: str, *, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit({".gitattributes": b"", **(files or {})})
        return repository


class Refused(Exception):  # noqa: N818
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", body: Any = None) -> None:
        super().__init__(status)
        self.status, self.code, self.body = status, code, body


#: What is asked, by method and path; the name is that of a method of the handler, and of a fault.
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)"),
    ("commit", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)"),
    ("batch", "POST", r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("verify", "POST", r"/lfs/verify"),
    ("put", "PUT", r"/lfs/(\w+)"),
    ("tree", "GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("auth", "GET", r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check/write"),
    ("info", "GET", r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?"),
    ("resolve", "HEAD|GET", r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.bodies.append(body)
        try:
            data, headers = self._answer(path, body)
            self._reply(200, data, headers)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._reply(refused.status, json.dumps(refused.body or {"error": str(refused.status)}).encode(), headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        for name, method, pattern in ROUTES:
            if re.fullmatch(method, self.command) and (found := re.fullmatch(pattern, path)):
                if self.hub.faults.get(name):
                    raise Refused(self.hub.faults[name].pop(0), body={"error": f"planned, {self.headers.get('Authorization')}"})
                made = getattr(self, f"_{name}")(body, *found.groups())
                return made if isinstance(made, tuple) else (json.dumps(made).encode(), {"Content-Type": "application/json"})
        raise Refused(404)

    def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _writes(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != WRITER:
            raise Refused(403 if token == READER else 401)

    def _repository(self, kind: str | None, name: str) -> Repository:
        found = self.hub.repositories.get(f"{kind or 'models'}/{name}")
        known = self.headers.get("Authorization", "").removeprefix("Bearer ") in (WRITER, READER)
        if found is None or (found.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound")
        return found

    def _create(self, body: bytes) -> Any:
        self._writes()
        asked = json.loads(body)
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        url, key = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}", f"{kind}s/{name}"
        if key in self.hub.repositories:
            raise Refused(409, body={"error": "You already created this repo", "url": url})
        # the newer clients say the first, the older ones the second
        self.hub.add(key, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": url}

    def _validate(self, body: bytes) -> Any:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(head[1]) if head else None
        if not isinstance(data, dict) or data.get("license", "mit") not in _LICENSES:
            raise Refused(400, body={"errors": [{"message": '"license" must be one of [apache-2.0, ...]'}]})
        return {"errors": [], "warnings": []}

    def _preupload(self, body: bytes, kind: str, name: str, _revision: str) -> Any:
        self._writes()
        there, answer = self._repository(kind, name).files, []
        for asked in json.loads(body)["files"]:
            path, content = asked["path"], there.get(asked["path"])
            large = asked["size"] > _LARGE or path.endswith(_BINARY)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_hash(content)
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def _batch(self, body: bytes, _kind: str | None, _name: str) -> Any:
        self._writes()
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.url}/lfs/{one['oid']}"}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        return {}

    def _verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        assert len(self.hub.large[asked["oid"]]) == asked["size"]
        return {}

    def _commit(self, body: bytes, kind: str, name: str, _revision: str) -> Any:
        self._writes()
        repository = self._repository(kind, name)
        head, *lines = map(json.loads, body.splitlines())
        if head["value"].get("parentCommit", repository.head) != repository.head:
            raise Refused(412, body={"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            files[value["path"]] = self.hub.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        sha = repository.commit(files)
        if self.hub.faults.get("lost"):  # the commit is made, and the answer is lost
            raise Refused(self.hub.faults["lost"].pop(0))
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}

    def _whoami(self, _body: bytes) -> Any:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refused(401)
        return {"name": "me", "auth": {"type": "access_token", "accessToken": {"role": "read" if token == READER else "write"}}}

    def _auth(self, _body: bytes, kind: str, name: str) -> Any:
        self._repository(kind, name)
        self._writes()
        return {}

    def _info(self, _body: bytes, kind: str, name: str, revision: str | None) -> Any:
        repository = self._repository(kind, name)
        sha, files = repository.at(revision or "main")
        return {"id": name, "sha": sha, "private": repository.private, "siblings": [{"rfilename": path} for path in files], "tags": []}

    def _tree(self, _body: bytes, kind: str, name: str, revision: str) -> Any:
        _, files = self._repository(kind, name).at(revision)
        return [{"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)} for path, data in files.items()]

    def _resolve(self, _body: bytes, kind: str | None, name: str, revision: str, path: str) -> Any:
        repository = self._repository(kind, name)
        if revision != "main" and revision not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        sha, files = repository.at(revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        etag = f'"{_git_hash(files[path])}"'
        return files[path], {"ETag": etag, "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub for as long as the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a hub, the only one that `huggingface_hub` knows, with a token that may write; retries do not wait."""
    with serving() as hub:
        settings = {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr("time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


if __name__ == "__main__":  # to push and pull by hand: docs/howto/share.md
    with serving() as started, suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={started.url} HF_TOKEN={WRITER} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
