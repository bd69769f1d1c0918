"""The family's collection: order, notes, growth, visibility."""

import pytest

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.collection import collect
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.hub_cards.faulty_hub import Fault

pytestmark = pytest.mark.usefixtures("online")
TITLE = "Tiny, every m"


@pytest.fixture
def hub(hub_server, user):
    hub = Hub(hub_server.endpoint, user, RetryPolicy(first_wait=0.0, timeout=5.0))
    for name in ("a", "b", "c", "other"):
        hub.api.create_repo(f"ada/{name}", private=True)
    return hub


def items(server) -> list[tuple[str, str | None]]:
    (collection,) = server.store.collections.values()
    return [(item["id"].partition("/")[2], (item.get("note") or {}).get("text")) for item in collection["items"]]


def notes(*names: str) -> dict[str, str]:
    return {f"ada/{name}": f"this is {name}" for name in names}


def test_items_come_in_the_given_order_with_their_notes(hub, hub_server):
    address = collect(hub, TITLE, "ada", notes("c", "a", "b"))
    assert items(hub_server) == [("c", "this is c"), ("a", "this is a"), ("b", "this is b")]
    (slug,) = hub_server.store.collections
    assert address == f"{hub_server.endpoint}/collections/{slug}"
    assert hub_server.store.collections[slug]["private"]


def test_again_changes_nothing(hub, hub_server):
    collect(hub, TITLE, "ada", notes("a", "b"))
    before = items(hub_server)
    hub_server.calls.clear()
    collect(hub, TITLE, "ada", notes("a", "b"))
    assert items(hub_server) == before
    assert [(method, status) for method, _, status in hub_server.calls if method != "GET"] == [("POST", 409)]


def test_a_grown_family_is_sorted_in_and_strangers_stay_behind(hub, hub_server):
    collect(hub, TITLE, "ada", notes("b"))
    (slug,) = hub_server.store.collections
    hub.api.add_collection_item(slug, "ada/other", "model", note="mine")
    collect(hub, TITLE, "ada", {**notes("a"), "ada/b": "better", **notes("c")})
    assert items(hub_server) == [("a", "this is a"), ("b", "better"), ("c", "this is c"), ("other", "mine")]


def test_it_becomes_public_but_never_private(hub, hub_server):
    collect(hub, TITLE, "ada", notes("a"))
    (collection,) = hub_server.store.collections.values()
    collect(hub, TITLE, "ada", notes("a"), private=False)
    assert not collection["private"]
    collect(hub, TITLE, "ada", notes("a"), private=True)
    assert not collection["private"]


def test_notes_are_cut_to_what_the_hub_takes(hub, hub_server):
    collect(hub, TITLE, "ada", {"ada/a": "x" * 700})
    assert items(hub_server) == [("a", "x" * 500)]


@pytest.mark.parametrize("title", ["", "  ", "x" * 61])
def test_bad_titles_are_refused_before_anything_is_sent(hub, hub_server, title):
    hub_server.calls.clear()
    with pytest.raises(ValueError, match=f"has {len(title)} characters; it must have 1 to 60"):
        collect(hub, title, "ada", notes("a"))
    assert hub_server.calls == []


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_refusals_name_the_collection(hub, hub_server, status):
    hub_server.fault = Fault(1, "status", status, times=99, matching=lambda method, path: "/items" in path)
    with pytest.raises(PushError, match=r"^collection ada/'Tiny, every m': ") as error:
        collect(hub, TITLE, "ada", notes("a"))
    assert error.value.status == status


@pytest.mark.parametrize("number", range(1, 9))
def test_lost_answers_add_nothing_twice(hub, hub_server, number):
    collect(hub, TITLE, "ada", notes("c", "b"))
    hub_server.fault = fault = Fault(number, "lost_answer", matching=lambda method, path: "collections" in path)
    collect(hub, TITLE, "ada", notes("a", "b", "c"), private=False)
    assert fault.hits == 1
    assert [name for name, _ in items(hub_server)] == ["a", "b", "c"]
