"""Branches, tags, pull requests and the commits behind them."""

from .hub_request import Problem, Reply, Request, Routes
from .read_routes import in_pages

ROUTES = Routes()


@ROUTES.add("GET", "/api/models/{id}/refs")
def refs(request: Request, repo: str) -> Reply:
    """Branches and tags."""
    found = request.readable(repo)
    heads = {name: oid for name, oid in found.branches.items() if not name.startswith("refs/")}
    return {"branches": _rows("heads", heads), "tags": _rows("tags", found.tags), "converts": []}


def _rows(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in sorted(refs.items())]


@ROUTES.add("GET", "/api/models/{id}/discussions")
def discussions(request: Request, repo: str) -> Reply:
    """Pull requests."""
    found = request.readable(repo)
    rows = [
        {**row, "author": {"name": row["author"]}, "repo": {"name": found.id, "type": "model"}}
        for row in found.requests
        if row["status"] == request.query.get("status", row["status"])
        and row["author"] == request.query.get("author", row["author"])
    ]
    start = request.server.page_rows * int(request.query.get("p", 0))
    return {"discussions": rows[start : start + request.server.page_rows], "count": len(rows), "start": start}


@ROUTES.add("GET", "/api/models/{id}/commits/{rev}")
def commits(request: Request, repo: str, rev: str) -> Reply:
    """A commit and everything before it."""
    found = request.readable(repo)
    rows = [
        {"id": one.oid, "title": one.title, "message": one.message, "authors": [{"user": one.author}], "date": one.date}
        for one in found.ancestry(request.commit_of(found, rev).oid)
    ]
    return in_pages(request, rows)


@ROUTES.add("POST", "/api/models/{id}/branch/{rev}")
def create_branch(request: Request, repo: str, rev: str) -> Reply:
    """A new branch."""
    found = request.writable(repo)
    if rev in found.branches:
        raise Problem(409, f"Reference refs/heads/{rev} already exists")
    found.branches[rev] = request.commit_of(found, request.json().get("startingPoint") or "main").oid
    return {}


@ROUTES.add("DELETE", "/api/models/{id}/branch/{rev}")
def delete_branch(request: Request, repo: str, rev: str) -> Reply:
    """Remove a branch."""
    found = request.writable(repo)
    if rev == "main" or found.branches.pop(rev, None) is None:
        raise Problem(404, f"Reference refs/heads/{rev} does not exist", "RevisionNotFound")
    return {}


@ROUTES.add("POST", "/api/models/{id}/tag/{rev}")
def create_tag(request: Request, repo: str, rev: str) -> Reply:
    """A new tag; none is ever moved."""
    found, name = request.writable(repo), request.json()["tag"]
    if name in found.tags:
        raise Problem(409, f"Tag {name} already exists")
    found.tags[name] = request.commit_of(found, rev).oid
    found.history.append(("tag", found.private, found.tags[name]))
    return {}
