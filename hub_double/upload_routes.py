"""Uploads: which way a file goes, large files through LFS or Xet, and the commit that names them."""

import base64
import hashlib
import json
import time
from typing import Any

from .card_validation import validate_card
from .hub_request import Answer, Problem, Reply, Request, Routes
from .hub_store import Blob, Repo

ROUTES = Routes()


@ROUTES.add("POST", "/api/models/{id}/preupload/{rev}")
def preupload(request: Request, repo: str, rev: str) -> Reply:
    """Which way each file goes, and what is there already."""
    found = request.writable(repo, rev)
    present = request.commit_of(found, rev).files
    rows = []
    for file in request.json()["files"]:
        path = file["path"]
        row = {"path": path, "uploadMode": "lfs" if found.is_large(path, file["size"]) else "regular"}
        row["shouldIgnore"] = False
        if path in present:
            row["oid"] = present[path].etag
        rows.append(row)
    return {"files": rows}


@ROUTES.add("GET", "/api/models/{id}/xet-(?P<kind>write|read)-token/{rev}")
def xet_token(request: Request, repo: str, rev: str, kind: str) -> Reply:
    """The folder into which a Xet client puts large files by itself, and from which it takes them."""
    if kind == "write":
        request.writable(repo, rev)
    else:
        request.readable(repo)
    expires, address = int(time.time()) + 3600, f"local://{request.store.xet_folder}"
    headers = {"X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": expires, "X-Xet-Cas-Url": address}
    return Answer({"accessToken": "x", "exp": expires, "casUrl": address}, headers=headers)


@ROUTES.add("POST", "/{id}.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo: str) -> Reply:
    """Where each large file goes, of those that are not here."""
    request.readable(repo)
    request.may_write(request.account()["name"])
    rows = []
    for entry in request.json()["objects"]:
        oid, size = entry["oid"], entry["size"]
        row = {"oid": oid, "size": size, "authenticated": True}
        if not request.store.has_large(oid):
            row["actions"] = {
                "upload": _upload_action(request, oid, size),
                "verify": {"href": request.link("api/lfs/verify")},
            }
        rows.append(row)
    return {"transfer": "basic", "objects": rows}


def _upload_action(request: Request, oid: str, size: int) -> dict[str, Any]:
    place, part_bytes = f"{request.server.files_origin}/lfs/{oid}", request.server.part_bytes
    if size <= part_bytes:
        return {"href": place, "header": {}}
    upload = request.store.new_upload()  # several clients may send the same file at once
    count = -(-size // part_bytes)
    parts = {f"{number:05d}": f"{place}?upload={upload}&part={number}" for number in range(1, count + 1)}
    complete = request.link(f"api/lfs/complete/{oid}?upload={upload}")
    return {"href": complete, "header": {"chunk_size": str(part_bytes), **parts}}


@ROUTES.add("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(request: Request, oid: str) -> Reply:
    """A large file, or a part of one."""
    if "part" in request.query:
        parts = request.store.parts.get(request.query.get("upload", ""))
        if parts is None:
            raise Problem(404, "There is no such upload, or it is complete")
        parts[int(request.query["part"])] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
    return _keep(request, oid, request.body)


def _keep(request: Request, oid: str, data: bytes) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Problem(400, "The content does not have the promised hash")
    request.store.large[oid] = data
    return Answer(headers={"ETag": f'"{oid}"'})


@ROUTES.add("POST", "/api/lfs/complete/(?P<oid>[0-9a-f]{64})")
def lfs_complete(request: Request, oid: str) -> Reply:
    """Put the parts of a large file together; again, when the answer was lost, changes nothing."""
    upload = request.query.get("upload", "")
    parts = request.store.parts.get(upload)
    if parts is None:
        if oid in request.store.large:
            return Answer(headers={"ETag": f'"{oid}"'})
        raise Problem(404, "There is no such upload")
    for entry in request.json()["parts"]:
        part = parts.get(entry["partNumber"])
        if part is None or hashlib.md5(part).hexdigest() != entry["etag"].strip('"'):
            raise Problem(400, f"Part {entry['partNumber']} is missing or damaged")
    kept = _keep(request, oid, b"".join(parts[number] for number in sorted(parts)))
    del request.store.parts[upload]
    return kept


@ROUTES.add("POST", "/api/lfs/verify")
def lfs_verify(request: Request) -> Reply:
    """Whether a large file has arrived whole."""
    data = request.json()
    stored = request.store.large.get(data["oid"])
    if stored is None or len(stored) != data["size"]:
        raise Problem(404, "The object is not there")
    return {}


@ROUTES.add("POST", "/api/models/{id}/commit/{rev}")
def commit(request: Request, repo: str, rev: str) -> Reply:
    """A commit, whole or not at all, on a branch or as a pull request."""
    found = request.writable(repo, rev)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    files = _changed_files(request, _files_before(found, rev, header), lines)
    user, answer = request.account()["name"], {"success": True, "hookOutput": ""}
    if "create_pr" in request.query:
        number = found.propose(header["summary"], user, found.branches[rev])
        rev = f"refs/pr/{number}"
        answer["pullRequestUrl"] = request.link(f"{found.id}/discussions/{number}")
    made = found.commit(rev, header["summary"], header.get("description", ""), user, files)
    request.server.on_change(found)
    return {**answer, "commitOid": made.oid, "commitUrl": request.link(f"{found.id}/commit/{made.oid}")}


def _files_before(found: Repo, rev: str, header: dict[str, Any]) -> dict[str, Blob]:
    """Files of the branch. Raises `Problem` where it is not what the client has seen."""
    if rev not in found.branches:
        raise Problem(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    head = found.branches[rev]
    if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
        raise Problem(412, "The branch was updated since you opened this page. Please refresh and try again.")
    return found.commits[head].files


def _changed_files(request: Request, before: dict[str, Blob], lines: list[dict[str, Any]]) -> dict[str, Blob]:
    """Files after the commit. Raises `Problem` for a card that the Hub does not take."""
    files = dict(before)
    for line in lines:
        _apply(request, files, line["key"], line["value"])
    card = files.get("README.md")
    if card is not None and card.data is not None and (errors := validate_card(card.data.decode())):
        raise Problem(400, "; ".join(errors))
    return files


def _apply(request: Request, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    if key == "file":
        files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if not request.store.has_large(value["oid"]):
            raise Problem(400, f"LFS object {value['oid']} was not uploaded")
        files[value["path"]] = Blob.large(value["oid"], value["size"])
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Problem(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]
