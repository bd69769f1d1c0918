"""One collection for a family: an item per repository in the order of m, each with a note."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import AGAIN, PushError

LONGEST_TITLE, LONGEST_NOTE = 60, 500
DESCRIPTION = "One model with a dial: each repository answers with its own number m of visual tokens per image."


def check_title(title: str) -> None:
    """Refuse a title that the Hub would refuse, before anything is sent.

    Raises:
        ValueError: with its length.
    """
    if not title.strip() or len(title) > LONGEST_TITLE:
        raise ValueError(f"The collection's title has {len(title)} characters; it must have 1 to {LONGEST_TITLE}.")


def collect(hub: Hub, title: str, namespace: str, notes: Mapping[str, str], *, private: bool = True) -> str:
    """Create or complete a collection; returns its address.

    Items of other repositories stay where they are behind these.

    Args:
        title: at most 60 characters; the collection of this title is found again.
        notes: {repository: note} in the order that the collection should show.
        private: of a new collection; an existing one is made public when this is False, never private.

    Raises:
        PushError: in one line.
    """
    check_title(title)
    about = f"collection {namespace}/{title!r}"
    api = hub.api
    create: dict[str, Any] = {"namespace": namespace, "description": DESCRIPTION, "private": private, "exists_ok": True}
    collection = hub.ask(about, lambda: api.create_collection(title, **create))
    slug = collection.slug
    if collection.private and not private:
        hub.ask(about, lambda: api.update_collection_metadata(slug, private=False))
    present = {item.item_id for item in collection.items}
    for repo_id, note in notes.items():
        if repo_id not in present:
            add_item(hub, about, slug, repo_id, note[:LONGEST_NOTE])
    wanted = [(repo_id, note[:LONGEST_NOTE]) for repo_id, note in notes.items()]
    collection = hub.ask(about, lambda: api.get_collection(slug))
    arrange(hub, about, slug, collection.items, dict(wanted))
    verify(hub, about, slug, wanted)
    return f"{api.endpoint}/collections/{slug}"


def add_item(hub: Hub, about: str, slug: str, repo_id: str, note: str) -> None:
    """Add one repository; being there already is fine."""
    hub.ask(about, lambda: hub.api.add_collection_item(slug, repo_id, "model", note=note, exists_ok=True))


def arrange(hub: Hub, about: str, slug: str, items: Sequence, notes: Mapping[str, str]) -> None:
    """Correct positions and notes that differ, first to last."""
    order = [item.item_id for item in items]
    by_id = {item.item_id: item for item in items}
    for position, (repo_id, note) in enumerate(notes.items()):
        item = by_id[repo_id]
        change: dict[str, Any] = {}
        if order[position] != repo_id:
            order.remove(repo_id)
            order.insert(position, repo_id)
            change["position"] = position
        if (item.note or "") != note:
            change["note"] = note
        if change:
            hub.ask(about, partial(hub.api.update_collection_item, slug, item.item_object_id, **change))


def verify(hub: Hub, about: str, slug: str, wanted: list[tuple[str, str]]) -> None:
    """Look at the collection again.

    Raises:
        PushError: when items, order or notes are not as wanted, as when a gateway answered in the Hub's place.
    """
    items = hub.ask(about, lambda: hub.api.get_collection(slug)).items
    found = [(item.item_id, item.note or "") for item in items]
    if found[: len(wanted)] != wanted:
        names = ", ".join(repo_id for repo_id, _ in found)
        raise PushError(f"{about}: holds {names}, not yet in the order or with the notes wanted; {AGAIN}")
