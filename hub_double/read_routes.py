"""What a repository holds: its files at a revision, and the files themselves."""

import json
import re
from typing import Any
from urllib.parse import parse_qs, quote

from .hub_request import Answer, Problem, Reply, Request, Routes
from .hub_store import Blob, git_sha1

ROUTES = Routes()


@ROUTES.add("GET", "/api/models/{id}(/revision/{rev})?")
def model_info(request: Request, repo: str, rev: str = "main") -> Reply:
    """A repository at a revision."""
    found = request.readable(repo)
    commit = request.commit_of(found, rev)
    rows = [_sibling(path, blob, "blobs" in request.query) for path, blob in sorted(commit.files.items())]
    return {
        "id": found.id, "modelId": found.id, "sha": commit.oid, "author": found.id.split("/")[0],
        "private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
        "lastModified": commit.date, "createdAt": commit.date, "siblings": rows,
    }  # fmt: skip


def _sibling(path: str, blob: Blob, with_sizes: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if with_sizes:
        row |= {"size": blob.size, "blobId": blob.oid}
        if blob.sha256:
            row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return row


@ROUTES.add("GET", "/api/models/{id}/tree/{rev}(/(?P<path>.+))?")
def tree(request: Request, repo: str, rev: str, path: str = "") -> Reply:
    """Files and folders of a folder."""
    files = request.commit_of(request.readable(repo), rev).files
    prefix = path.rstrip("/") + "/" if path else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    rows: dict[str, dict[str, Any]] = {}
    for name, blob in files.items():
        if not name.startswith(prefix):
            continue
        inner = name[len(prefix) :].split("/")
        for depth in range(1, len(inner) if recursive else min(2, len(inner))):
            folder = prefix + "/".join(inner[:depth])
            rows[folder] = {"type": "directory", "oid": git_sha1(folder.encode(), "tree"), "path": folder, "size": 0}
        if recursive or len(inner) == 1:
            rows[name] = _file_row(request, name, blob)
    return in_pages(request, list(rows.values()))


def _file_row(request: Request, name: str, blob: Blob) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
    if blob.sha256:
        row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        if blob.sha256 not in request.store.large:
            row["xetHash"] = request.store.xet_hashes()[blob.sha256]
    return row


def in_pages(request: Request, rows: list[Any]) -> Answer:
    """The page of rows that was asked for, with a link to the next one."""
    start, count = int(request.query.get("cursor", 0)), request.server.page_rows
    headers = {}
    if start + count < len(rows):
        others = "&".join(f"{key}={quote(value)}" for key, value in request.query.items() if key != "cursor")
        following = request.link(f"{request.url.lstrip('/')}?{others}&cursor={start + count}")
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer(rows[start : start + count], headers=headers)


@ROUTES.add("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(request: Request, repo: str, rev: str) -> Reply:
    """Those of the named files that are there."""
    files = request.commit_of(request.readable(repo), rev).files
    form = request.body.decode()
    wanted = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form).get("paths", [])
    return [_file_row(request, path, files[path]) for path in wanted if path in files]


@ROUTES.add("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(request: Request, repo: str, rev: str, path: str) -> Reply:
    """A file, or for a large one where it is."""
    found = request.readable(repo)
    commit = request.commit_of(found, rev)
    headers: dict[str, Any] = {"X-Repo-Commit": commit.oid}
    blob = commit.files.get(path)
    if blob is None:
        raise Problem(404, "Entry not found", "EntryNotFound", headers)
    if blob.data is not None:
        return _ranged(request, blob.data, {**headers, "ETag": f'"{blob.oid}"'})
    sha256 = blob.sha256 or ""
    headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": blob.size}
    headers["Location"] = f"{request.server.files_origin}/files/{sha256}"
    if sha256 not in request.store.large:
        token = request.link(f"api/models/{found.id}/xet-read-token/{commit.oid}")
        headers |= {"X-Xet-Hash": request.store.xet_hashes()[sha256], "Link": f'<{token}>; rel="xet-auth"'}
    return Answer(status=302, headers=headers)


@ROUTES.add("GET", "/files/(?P<oid>[0-9a-f]{64})")
def large_file(request: Request, oid: str) -> Reply:
    """A large file that came through LFS."""
    if oid not in request.store.large:
        raise Problem(501, "This file came through Xet; this Hub gives it to Xet clients only")
    return _ranged(request, request.store.large[oid], {"ETag": f'"{oid}"'})


def _ranged(request: Request, data: bytes, headers: dict[str, Any]) -> Answer:
    headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return Answer(data, headers=headers)
    start, stop = int(match.group(1)), min(int(match.group(2) or len(data)), len(data) - 1)
    if start >= len(data):
        raise Problem(416, "The range begins after the end", headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
    return Answer(data[start : stop + 1], 206, headers)
