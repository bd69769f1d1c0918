"""Who somebody is, and repositories as a whole: made, shown, hidden, deleted."""

from typing import Any

from .card_validation import validate_card
from .hub_request import Answer, Problem, Reply, Request, Routes

ROUTES = Routes()


@ROUTES.add("GET", "/api/whoami-v2")
def whoami(request: Request) -> Reply:
    """The user."""
    user = request.account()
    return {
        "type": "user",
        "name": user["name"],
        "orgs": [{"name": name} for name in user["orgs"]],
        "auth": {"type": "access_token", "accessToken": {"role": user["role"], "displayName": "hub-double"}},
    }


def _is_private(data: dict[str, Any]) -> bool:
    return data.get("visibility") == "private" or bool(data.get("private"))


@ROUTES.add("POST", "/api/repos/create")
def create_repo(request: Request) -> Reply:
    """A new repository."""
    data, user = request.json(), request.account()
    namespace = data.get("organization") or user["name"]
    repo_id = f"{namespace}/{data['name']}"
    request.may_write(namespace)
    if data.get("type", "model") != "model":
        raise Problem(400, f"This Hub keeps models alone, no {data['type']}s")
    if repo_id.lower() in (key.lower() for key in request.store.repos):
        raise Problem(409, "You already created this model repo", url=request.link(repo_id))
    request.server.on_change(request.store.create(repo_id, _is_private(data), user["name"]))
    return {"url": request.link(repo_id), "id": repo_id}


@ROUTES.add("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Reply:
    """Remove a repository."""
    data, user = request.json(), request.account()
    found = request.writable(f"{data.get('organization') or user['name']}/{data['name']}")
    del request.store.repos[found.id]
    return {}


@ROUTES.add("PUT", "/api/models/{id}/settings")
def settings(request: Request, repo: str) -> Reply:
    """Show a repository to everybody, or hide it."""
    found, data = request.writable(repo), request.json()
    if "visibility" in data or "private" in data:
        found.private = _is_private(data)
        found.history.append(("visibility", found.private, found.head.oid))
        request.server.on_change(found)
    return {"private": found.private}


@ROUTES.add("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Reply:
    """What is wrong with a card."""
    errors = validate_card(request.json()["content"])
    return Answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)
