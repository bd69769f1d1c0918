"""Collections: made, read, and their items put into an order."""

import hashlib
import re
from typing import Any

from .hub_request import Problem, Reply, Request, Routes
from .hub_store import now

ROUTES = Routes()
TITLE, DESCRIPTION = 60, 150  # characters at most


@ROUTES.add("POST", "/api/collections")
def create_collection(request: Request) -> Reply:
    """A new collection."""
    data = request.json()
    request.may_write(data["namespace"])
    if len(data["title"]) > TITLE or len(data.get("description") or "") > DESCRIPTION:
        raise Problem(400, "Title or description too long")
    slug = data["namespace"] + "/" + re.sub(r"[^a-z0-9]+", "-", data["title"].lower()).strip("-")
    slug += "-" + hashlib.sha256(slug.encode()).hexdigest()[:24]
    if slug in request.store.collections:
        raise Problem(409, "This collection already exists", slug=slug)
    request.store.collections[slug] = {
        "slug": slug, "title": data["title"], "description": data.get("description"), "private": data["private"],
        "owner": {"name": data["namespace"]}, "items": [], "lastUpdated": now(), "position": 0, "theme": "blue",
        "upvotes": 0,
    }  # fmt: skip
    return request.store.collections[slug]


def _found(request: Request, slug: str) -> dict[str, Any]:
    if slug not in request.store.collections:
        raise Problem(404, "Collection not found")
    return request.store.collections[slug]


def _own(request: Request, slug: str) -> dict[str, Any]:
    """The collection, if this user may change it."""
    found = _found(request, slug)
    request.may_write(found["owner"]["name"])
    return found


@ROUTES.add("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def collection(request: Request, slug: str) -> Reply:
    """A collection with its items."""
    return _found(request, slug)


@ROUTES.add("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items?")
def add_item(request: Request, slug: str) -> Reply:
    """A repository put at a collection's end."""
    found, data = _own(request, slug), request.json()
    item = data["item"]
    if any(present["id"] == item["id"] for present in found["items"]):
        raise Problem(409, "Item already in collection")
    number = len(found["items"])
    note = {"note": {"text": data["note"]}} if data.get("note") else {}
    found["items"].append({"_id": f"{number:024x}", **item, "position": number, **note})
    return found


@ROUTES.add("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<key>[0-9a-f]{24})")
def update_item(request: Request, slug: str, key: str) -> Reply:
    """Another note, or another place."""
    found, data = _own(request, slug), request.json()
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


@ROUTES.add("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def update_collection(request: Request, slug: str) -> Reply:
    """Another title or description; shown to everybody, or hidden."""
    found = _own(request, slug)
    found.update({key: value for key, value in request.json().items() if key in ("title", "description", "private")})
    return {"success": True, "data": found}
