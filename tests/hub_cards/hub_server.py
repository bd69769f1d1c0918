"""A small Hub over HTTP, for tests: what huggingface_hub calls while pushing, checking and loading models.

API on http://127.0.0.1:port, large files on http://localhost:port, so that the client sees two origins as with the real
one; a large-file request that carries a token is refused, so a leaked token fails the test that leaks it. Uploads work
through LFS and through Xet, whose client stores into a folder (`local://`) by itself.

Faults: `server.fault = Fault(number=3, kind="cut_body", at=100)` hits the third request from now on; those in
`server.later` follow one after the other, each counted from the one before.

`python -m fusedvlm.tests.hub_cards.hub_server` runs it by itself (docs/publishing.md).
"""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from fusedvlm.tests.hub_cards.hub_store import Blob, Repo, Store, git_sha1, validate_card

PAGE = 7  # rows per page of paginated answers: small, so that clients must follow the links
PART = 50_000  # large files above this size arrive in several parts


class Problem(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message, **fields}


class Cut(Exception):
    """Close the connection without another byte."""


class Answered(Exception):
    """Somebody else has answered; the connection stays open."""


@dataclass
class Fault:
    """What goes wrong, and when.

    Args:
        number: which of the coming requests is hit, counted from 1; only those `matching` count.
        kind: "status" answers `at` without doing anything; "drop" closes the connection before reading the body;
            "cut_body" closes it after `at` bytes of the body; "lost_answer" does what was asked, then closes it;
            "cut_answer" closes it after `at` bytes of the answer; "stall" sends nothing for `at` milliseconds, then closes
            it; "kill_*" the same with SIGKILL to `victim`; "html" answers 200 with a page of HTML; "json" with `body`;
            "echo" answers `at` and repeats what `encode` makes of the token it was sent.
        times: how many matching requests in a row are hit.
    """

    number: int
    kind: str
    at: int = 0
    times: int = 1
    headers: dict | None = None
    matching: Callable[[str, str], bool] = lambda method, path: True
    victim: int | None = None
    hits: int = 0
    body: bytes = b"{}"
    encode: Callable[[str], str] = str


class HubServer(ThreadingHTTPServer):
    """Start with `with HubServer(folder) as server:`; `server.endpoint` is the HF_ENDPOINT."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store(folder)
        self.lock = threading.RLock()
        self.fault: Fault | None = None
        self.later: list[Fault] = []
        self.calls: list[tuple[str, str, int]] = []
        self.headers_seen: list[str] = []
        self.on_change: Callable[[Repo], None] = lambda repo: None
        port = self.server_address[1]
        self.endpoint, self.files_origin = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """Register a user; returns the token."""
        token = "hf_" + hashlib.sha256(f"{name}{role}".encode()).hexdigest()[:34]
        self.store.tokens[token] = {"name": name, "role": role, "orgs": list(orgs)}
        return token

    def handle_error(self, request, client_address) -> None:
        """Connections that clients or faults broke are part of the tests; anything else is a bug in the double."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, Cut, TimeoutError, ValueError)):
            super().handle_error(request, client_address)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request, if any."""
        with self.lock:
            fault = self.fault
            if fault is None or not fault.matching(method, path):
                return None
            fault.number -= 1
            if fault.number > 0:
                return None
            fault.hits += 1
            if fault.hits >= fault.times:
                self.fault = self.later.pop(0) if self.later else None
            return fault


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str):
    """Register a handler method for a path; `{id}` is namespace/name, `{rev}` one quoted segment."""
    expression = pattern.replace("{id}", r"(?P<repo>[^/]+/[^/]+?)").replace("{rev}", r"(?P<rev>[^/]+)")

    def register(function):
        ROUTES.append((method, re.compile(expression + r"/?"), function.__name__))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args) -> None:
        """Quiet."""

    def do(self) -> None:
        """Any request: authorise, let a fault strike, run the route, answer."""
        split = urlsplit(self.path)
        self.url, self.query = split.path, {k: v[-1] for k, v in parse_qs(split.query, keep_blank_values=True).items()}
        self.fault = self.server.next_fault(self.command, self.url)
        self.server.headers_seen.append(f"{self.command} {self.path}\n{self.headers}")
        self.body_read = False
        try:
            self.strike("before")
            self.body = self.read_body()
            authorization = self.headers.get("Authorization", "")
            self.user = self.server.store.user(authorization.removeprefix("Bearer "))
            if self.headers.get("Host", "").startswith("localhost") and authorization:
                raise Problem(400, "A token was sent to the file storage")
            if authorization and self.user is None:
                raise Problem(401, "Invalid credentials in Authorization header")
            with self.server.lock:
                self.dispatch()
        except Problem as problem:
            self.answer(problem.status, problem.body, problem.headers)
        except Answered:
            return
        except Cut:
            self.server.calls.append((self.command, self.path, 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do

    def strike(self, moment: str) -> None:
        """Let the fault happen if this is its moment."""
        fault = self.fault
        if fault is None:
            return
        if moment == "before" and fault.kind == "status":
            self.read_body()
            raise Problem(fault.at, "Injected", headers=fault.headers)
        if moment == "before" and fault.kind == "echo":
            self.read_body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            said = f"you sent {fault.encode(token)} to this gateway".encode("latin-1", "replace").decode("latin-1")
            raise Problem(
                fault.at, " ".join(said.split()), headers={"X-HF-Warning": f"proxy; {' '.join(said.split())}"}
            )
        if moment == "before" and fault.kind == "json":
            self.read_body()
            self.fault = None
            self.answer(200, fault.body)
            raise Answered
        if moment == "before" and fault.kind == "html":
            self.read_body()
            self.fault = None
            self.answer(200, b"<html>gateway</html>", {"Content-Type": "text/html"})
            raise Answered
        if moment == "before" and fault.kind == "stall":
            threading.Event().wait(fault.at / 1000)  # tests replace time.sleep
            raise Cut
        kind = {"before": "drop", "body": "cut_body", "after": "lost_answer", "answer": "cut_answer"}[moment]
        if fault.kind.removeprefix("kill_") == kind:
            if fault.kind.startswith("kill_"):
                os.kill(fault.victim, signal.SIGKILL)
            raise Cut

    def read_body(self) -> bytes:
        """The request's body, or its first bytes and then a fault."""
        if self.body_read:
            return b""
        cut = self.fault is not None and self.fault.kind.endswith("cut_body")
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.body_read = True
        if cut:
            self.rfile.read(min(self.fault.at, length)) if not chunked else None
            self.strike("body")
        if not chunked:
            return self.rfile.read(length)
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def dispatch(self) -> None:
        """Find and run the route."""
        for method, pattern, name in ROUTES:
            match = pattern.fullmatch(self.url)
            if match and (method == self.command or (method == "GET" and self.command == "HEAD")):
                try:
                    result = getattr(self, name)(
                        **{k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    )
                finally:
                    self.strike("after")  # a refusal can be lost on its way as well
                self.answer(*result) if isinstance(result, tuple) else self.answer(200, result)
                return
        raise Problem(404, f"No such page: {self.command} {self.url}")

    def answer(self, status: int, body=b"", headers: dict | None = None) -> None:
        """Send an answer: JSON unless it is bytes already."""
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.calls.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "X-Request-Id": "test", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            payload = b""
        if self.fault is not None and self.fault.kind.endswith("cut_answer"):
            self.wfile.write(payload[: self.fault.at])
            self.wfile.flush()
            self.strike("answer")
        self.wfile.write(payload)
        self.wfile.flush()

    # -- who may do what ---------------------------------------------------------------------------------------------

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def readable(self, repo_id: str) -> Repo:
        """The repository, if this user may see it; missing and hidden ones look the same."""
        key = next((key for key in self.server.store.repos if key.lower() == repo_id.lower()), None)
        repo = self.server.store.repos.get(key)
        if repo is None or not self.server.store.can_read(repo, self.user):
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise Problem(status, message, "RepoNotFound")
        return repo

    def may_write(self, namespace: str) -> None:
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        if self.user["role"] != "write" or not self.server.store.owns(self.user, namespace):
            raise Problem(403, "Forbidden: you must use a write token to upload to a repository.")

    def writable(self, repo_id: str, rev: str = "") -> Repo:
        """The repository, if this user may write to it; to propose something, reading it is enough."""
        repo = self.readable(repo_id)
        proposed = "create_pr" in self.query or rev.startswith("refs/pr/")
        owner = self.user["name"] if proposed and self.user else repo.id.split("/")[0]
        self.may_write(owner)
        return repo

    @staticmethod
    def commit_of(repo: Repo, rev: str):
        commit = repo.resolve(rev)
        if commit is None:
            raise Problem(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    # -- accounts and repositories ---------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        return {
            "type": "user",
            "name": self.user["name"],
            "orgs": [{"name": name} for name in self.user["orgs"]],
            "auth": {"type": "access_token", "accessToken": {"role": self.user["role"], "displayName": "test"}},
        }

    @route("POST", "/api/repos/create")
    def create_repo(self):
        data = self.json()
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        namespace = data.get("organization") or self.user["name"]
        repo_id = f"{namespace}/{data['name']}"
        url = f"{self.server.endpoint}/{repo_id}"
        self.may_write(namespace)
        if repo_id.lower() in (key.lower() for key in self.server.store.repos):
            raise Problem(409, "You already created this model repo", url=url)
        private = data.get("visibility") == "private" or bool(data.get("private"))
        self.server.on_change(self.server.store.create(repo_id, private, self.user["name"]))
        return {"url": url, "id": repo_id}

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        data = self.json()
        repo = self.writable(f"{data.get('organization') or self.user['name']}/{data['name']}")
        del self.server.store.repos[repo.id]
        return {}

    @route("PUT", "/api/models/{id}/settings")
    def settings(self, repo: str):
        found, data = self.writable(repo), self.json()
        if "visibility" in data or "private" in data:
            found.private = data.get("visibility") == "private" or bool(data.get("private"))
            found.history.append(("visibility", found.private, found.head.oid))
            self.server.on_change(found)
        return {"private": found.private}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        errors = validate_card(self.json()["content"])
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}

    # -- uploading -------------------------------------------------------------------------------------------------------

    @route("POST", "/api/models/{id}/preupload/{rev}")
    def preupload(self, repo: str, rev: str):
        found = self.writable(repo, rev)
        present = self.commit_of(found, rev).files
        rows = []
        for file in self.json()["files"]:
            path = file["path"]
            row = {"path": path, "uploadMode": "lfs" if found.is_large(path, file["size"]) else "regular"}
            row["shouldIgnore"] = False
            if path in present:
                row["oid"] = present[path].etag
            rows.append(row)
        return {"files": rows}

    @route("GET", "/api/models/{id}/xet-(?P<kind>write|read)-token/{rev}")
    def xet_token(self, repo: str, rev: str, kind: str):
        self.writable(repo, rev) if kind == "write" else self.readable(repo)
        expires, address = int(time.time()) + 3600, f"local://{self.server.store.xet_folder}"
        headers = {"X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": expires, "X-Xet-Cas-Url": address}
        return 200, {"accessToken": "x", "exp": expires, "casUrl": address}, headers

    @route("POST", "/{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str):
        self.readable(repo)
        self.may_write(self.user["name"] if self.user else "")
        rows = []
        for entry in self.json()["objects"]:
            oid, size = entry["oid"], entry["size"]
            row = {"oid": oid, "size": size, "authenticated": True}
            if not self.server.store.has_large(oid):
                verify = {"href": f"{self.server.endpoint}/api/lfs/verify"}
                row["actions"] = {"upload": self._upload_action(oid, size), "verify": verify}
            rows.append(row)
        return {"transfer": "basic", "objects": rows}

    def _upload_action(self, oid: str, size: int) -> dict:
        place = f"{self.server.files_origin}/lfs/{oid}"
        if size <= PART:
            return {"href": place, "header": {}}
        upload = self.server.store.new_upload()  # several clients may send the same file at once
        parts = {f"{n + 1:05d}": f"{place}?upload={upload}&part={n + 1}" for n in range(-(-size // PART))}
        complete = f"{self.server.endpoint}/api/lfs/complete/{oid}?upload={upload}"
        return {"href": complete, "header": {"chunk_size": str(PART), **parts}}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str):
        if "part" in self.query:
            self.server.store.parts[self.query["upload"]][int(self.query["part"])] = self.body
            return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}
        return self._keep(oid, self.body)

    def _keep(self, oid: str, data: bytes):
        if hashlib.sha256(data).hexdigest() != oid:
            raise Problem(400, "The content does not have the promised hash")
        self.server.store.large[oid] = data
        return 200, b"", {"ETag": f'"{oid}"'}

    @route("POST", "/api/lfs/complete/(?P<oid>[0-9a-f]{64})")
    def lfs_complete(self, oid: str):
        parts = self.server.store.parts[self.query["upload"]]
        for entry in self.json()["parts"]:
            part = parts.get(entry["partNumber"])
            if part is None or hashlib.md5(part).hexdigest() != entry["etag"].strip('"'):
                raise Problem(400, f"Part {entry['partNumber']} is missing or damaged")
        return self._keep(oid, b"".join(parts[number] for number in sorted(parts)))

    @route("POST", "/api/lfs/verify")
    def lfs_verify(self):
        data = self.json()
        stored = self.server.store.large.get(data["oid"])
        if stored is None or len(stored) != data["size"]:
            raise Problem(404, "The object is not there")
        return {}

    @route("POST", "/api/models/{id}/commit/{rev}")
    def commit(self, repo: str, rev: str):
        found = self.writable(repo, rev)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if rev not in found.branches:
            raise Problem(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head = found.branches[rev]
        if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
            message = "The branch was updated since you opened this page. Please refresh and try again."
            raise Problem(412, message)
        files = dict(found.commits[head].files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        card = files.get("README.md")
        if card is not None and (errors := validate_card(card.data.decode())):
            raise Problem(400, "; ".join(errors))
        answer = {"success": True, "hookOutput": ""}
        if "create_pr" in self.query:
            number = found.propose(header["summary"], self.user["name"], head)
            rev, answer["pullRequestUrl"] = (
                f"refs/pr/{number}",
                f"{self.server.endpoint}/{found.id}/discussions/{number}",
            )
        made = found.commit(rev, header["summary"], header.get("description", ""), self.user["name"], files)
        self.server.on_change(found)
        return {**answer, "commitOid": made.oid, "commitUrl": f"{self.server.endpoint}/{found.id}/commit/{made.oid}"}

    def _apply(self, files: dict[str, Blob], key: str, value: dict) -> None:
        if key == "file":
            files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.server.store.has_large(value["oid"]):
                raise Problem(400, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = Blob.large(value["oid"], value["size"])
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Problem(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    # -- reading ---------------------------------------------------------------------------------------------------------

    @route("GET", "/api/models/{id}(/revision/{rev})?")
    def model_info(self, repo: str, rev: str = "main"):
        found = self.readable(repo)
        commit = self.commit_of(found, rev)
        siblings = []
        for path, blob in sorted(commit.files.items()):
            row = {"rfilename": path}
            if "blobs" in self.query:
                row |= {"size": blob.size, "blobId": blob.oid}
                if blob.sha256:
                    row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
            siblings.append(row)
        return {
            "id": found.id, "modelId": found.id, "sha": commit.oid, "author": found.id.split("/")[0],
            "private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": commit.date, "createdAt": commit.date, "siblings": siblings,
        }  # fmt: skip

    @route("GET", "/api/models/{id}/tree/{rev}(/(?P<path>.+))?")
    def tree(self, repo: str, rev: str, path: str = ""):
        files = self.commit_of(self.readable(repo), rev).files
        prefix = path.rstrip("/") + "/" if path else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        rows = {}
        for name, blob in files.items():
            if not name.startswith(prefix):
                continue
            inner = name[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                folder = prefix + "/".join(inner[:depth])
                if recursive or depth == 1:
                    rows[folder] = {
                        "type": "directory",
                        "oid": git_sha1(folder.encode(), "tree"),
                        "path": folder,
                        "size": 0,
                    }
            if recursive or len(inner) == 1:
                rows[name] = self._file_row(name, blob)
        return self._page(list(rows.values()))

    def _file_row(self, name: str, blob: Blob) -> dict:
        row = {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
        if blob.sha256:
            row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
            if blob.sha256 not in self.server.store.large:
                row["xetHash"] = self.server.store.xet_hashes()[blob.sha256]
        return row

    def _page(self, rows: list):
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(rows):
            others = "&".join(f"{k}={quote(v)}" for k, v in self.query.items() if k != "cursor")
            headers["Link"] = f'<{self.server.endpoint}{self.url}?{others}&cursor={start + PAGE}>; rel="next"'
        return 200, rows[start : start + PAGE], headers

    @route("POST", "/api/models/{id}/paths-info/{rev}")
    def paths_info(self, repo: str, rev: str):
        files = self.commit_of(self.readable(repo), rev).files
        form = self.body.decode()
        wanted = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form).get("paths", [])
        return [self._file_row(path, files[path]) for path in wanted if path in files]

    @route("GET", "/api/models/{id}/refs")
    def refs(self, repo: str):
        found = self.readable(repo)

        def rows(kind: str, refs: dict) -> list:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in sorted(refs.items())]

        heads = {name: oid for name, oid in found.branches.items() if not name.startswith("refs/")}
        return {"branches": rows("heads", heads), "tags": rows("tags", found.tags), "converts": []}

    @route("GET", "/api/models/{id}/discussions")
    def discussions(self, repo: str):
        found = self.readable(repo)
        rows = [
            {**row, "author": {"name": row["author"]}, "repo": {"name": found.id, "type": "model"}}
            for row in found.requests
            if row["status"] == self.query.get("status", row["status"])
            and row["author"] == self.query.get("author", row["author"])
        ]
        start = PAGE * int(self.query.get("p", 0))
        return {"discussions": rows[start : start + PAGE], "count": len(rows), "start": start}

    @route("GET", "/api/models/{id}/commits/{rev}")
    def commits(self, repo: str, rev: str):
        found = self.readable(repo)
        return self._page(
            [
                {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
                for c in found.ancestry(self.commit_of(found, rev).oid)
            ]
        )

    @route("POST", "/api/models/{id}/branch/{rev}")
    def create_branch(self, repo: str, rev: str):
        found = self.writable(repo)
        if rev in found.branches:
            raise Problem(409, f"Reference refs/heads/{rev} already exists")
        found.branches[rev] = self.commit_of(found, self.json().get("startingPoint") or "main").oid
        return {}

    @route("DELETE", "/api/models/{id}/branch/{rev}")
    def delete_branch(self, repo: str, rev: str):
        found = self.writable(repo)
        if rev == "main" or found.branches.pop(rev, None) is None:
            raise Problem(404, f"Reference refs/heads/{rev} does not exist", "RevisionNotFound")
        return {}

    @route("POST", "/api/models/{id}/tag/{rev}")
    def create_tag(self, repo: str, rev: str):
        found, name = self.writable(repo), self.json()["tag"]
        if name in found.tags:
            raise Problem(409, f"Tag {name} already exists")
        found.tags[name] = self.commit_of(found, rev).oid
        found.history.append(("tag", found.private, found.tags[name]))
        return {}

    @route("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
    def resolve(self, repo: str, rev: str, path: str):
        found = self.readable(repo)
        commit = self.commit_of(found, rev)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise Problem(404, "Entry not found", "EntryNotFound", headers)
        if blob.sha256 is None:
            return self._ranged(blob.data, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": blob.size}
        headers["Location"] = f"{self.server.files_origin}/files/{blob.sha256}"
        if blob.sha256 not in self.server.store.large:
            token = f"{self.server.endpoint}/api/models/{found.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.server.store.xet_hashes()[blob.sha256], "Link": f'<{token}>; rel="xet-auth"'}
        return 302, b"", headers

    @route("GET", "/files/(?P<oid>[0-9a-f]{64})")
    def large_file(self, oid: str):
        if oid not in self.server.store.large:
            raise Problem(501, "This file came through Xet; this Hub gives it to Xet clients only")
        return self._ranged(self.server.store.large[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, data: bytes, headers: dict):
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, data, headers
        start, stop = int(match.group(1)), int(match.group(2) or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
        return 206, data[start : stop + 1], headers

    # -- collections -----------------------------------------------------------------------------------------------------

    @route("POST", "/api/collections")
    def create_collection(self):
        data = self.json()
        self.may_write(data["namespace"])
        if len(data["title"]) > 60 or len(data.get("description") or "") > 150:
            raise Problem(400, "Title or description too long")
        slug = data["namespace"] + "/" + re.sub(r"[^a-z0-9]+", "-", data["title"].lower()).strip("-")
        slug += "-" + hashlib.sha256(slug.encode()).hexdigest()[:24]
        if slug in self.server.store.collections:
            raise Problem(409, "This collection already exists", slug=slug)
        self.server.store.collections[slug] = {
            "slug": slug, "title": data["title"], "description": data.get("description"), "private": data["private"],
            "owner": {"name": data["namespace"]}, "items": [], "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0, "theme": "blue", "upvotes": 0,
        }  # fmt: skip
        return self.server.store.collections[slug]

    def _collection(self, slug: str) -> dict:
        if slug not in self.server.store.collections:
            raise Problem(404, "Collection not found")
        return self.server.store.collections[slug]

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def collection(self, slug: str):
        return self._collection(slug)

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items?")
    def add_item(self, slug: str):
        found, data = self._collection(slug), self.json()
        self.may_write(found["owner"]["name"])
        item = data["item"]
        if any(present["id"] == item["id"] for present in found["items"]):
            raise Problem(409, "Item already in collection")
        number = len(found["items"])
        note = {"note": {"text": data["note"]}} if data.get("note") else {}
        found["items"].append({"_id": f"{number:024x}", **item, "position": number, **note})
        return found

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<key>[0-9a-f]{24})")
    def update_item(self, slug: str, key: str):
        found, data = self._collection(slug), self.json()
        self.may_write(found["owner"]["name"])
        item = next((item for item in found["items"] if item["_id"] == key), None)
        if item is None:
            raise Problem(404, "Item not found")
        if "note" in data:
            item["note"] = {"text": data["note"]}
        if "position" in data:
            found["items"].remove(item)
            found["items"].insert(data["position"], item)
        for position, other in enumerate(found["items"]):
            other["position"] = position
        return {"success": True, "data": item}

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def update_collection(self, slug: str):
        found = self._collection(slug)
        self.may_write(found["owner"]["name"])
        found.update({k: v for k, v in self.json().items() if k in ("title", "description", "private")})
        return {"success": True, "data": found}

    do_PATCH = do


def main(arguments: list[str] | None = None) -> None:
    """Run the server until it is interrupted; what a client needs to know is written as shell variables."""
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description="A small Hub on this machine, for trying and testing. It forgets.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--user", default="ada", help="name of the user who may write")
    parser.add_argument("--env", type=Path, help="file for the variables; standard output by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder), options.port) as server:
        token = server.add_user(options.user)
        lines = f"export HF_ENDPOINT={server.endpoint}\nexport HF_TOKEN={token}\n"
        if options.env:
            partial = options.env.with_name(options.env.name + ".partial")
            partial.write_text(lines)
            partial.replace(options.env)
        else:
            print(lines, end="", flush=True)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # background jobs of scripts start with the latter ignored
            signal.signal(number, lambda *_: stop.set())
        stop.wait()


if __name__ == "__main__":
    main()
