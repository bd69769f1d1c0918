"""What a push does, call by call, against the test Hub."""

import json
import logging
import traceback

import pytest
from huggingface_hub import CommitOperationAdd

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import Conflict, PushError
from fusedvlm.hub_cards.push.push_repository import plan, push
from fusedvlm.hub_double.hub_store import Blob
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.hub_cards.faulty_hub import Fault
from fusedvlm.tests.hub_cards.synthetic import broken_promises, complete, family, release, tree, wanted

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture
def hub(hub_server, user):
    return Hub(hub_server.endpoint, user, RetryPolicy(first_wait=0.0, timeout=5.0))


@pytest.fixture
def api(hub):
    return hub.api


def commits_of(server, repo_id) -> list:
    return list(server.store.repos[repo_id].commits)


def test_a_family_arrives_whole_and_private(hub, hub_server, user, transfer, tmp_path):
    releases = family(tmp_path, counts=(1, 4, 16))
    done = push(releases, hub)
    assert all(complete(hub_server, release) for release in releases)
    assert broken_promises(hub_server, releases, [user]) == []
    assert [row.private for row in done] == [True] * 3
    for row, expected in zip(done, releases, strict=True):
        repo = hub_server.store.repos[expected.repo_id]
        assert row.commit == repo.tags["v1.0"] == repo.head.oid
        assert row.url == f"{hub_server.endpoint}/{expected.repo_id}"
        assert set(row.difference.add) == set(expected.files)
        assert row.sent_bytes == sum(row.sizes.values()) > 3_000


def test_an_unchanged_family_costs_no_commit_and_no_upload(hub, hub_server, tmp_path, transfer):
    releases = family(tmp_path, counts=(1, 4))
    first = push(releases, hub)
    hub_server.calls.clear()
    again = push(releases, hub)
    assert not any(row.difference for row in again)
    assert [row.commit for row in again] == [row.commit for row in first]
    assert {method for method, _, _ in hub_server.calls} == {"GET"}
    assert len(commits_of(hub_server, "ada/tiny-m1")) == 2


def test_public_comes_last_and_for_all(hub, hub_server, user, tmp_path):
    releases = family(tmp_path, counts=(1, 4, 16))
    when = []
    hub_server.on_change = lambda repo: repo.private or when.append([complete(hub_server, r) for r in releases])
    done = push(releases, hub, public=True)
    assert [row.private for row in done] == [False] * 3
    assert when == [[True] * 3] * 3
    assert broken_promises(hub_server, releases, [user]) == []
    push(releases, hub)
    assert not hub_server.store.repos["ada/tiny-m1"].private, "a public repository stays public"


def test_a_new_release_replaces_deletes_and_keeps(hub, hub_server, api, tmp_path):
    old = release(4, tmp_path, old_txt=b"was written by the first push")
    push([old], hub)
    api.create_commit(old.repo_id, [CommitOperationAdd("theirs.txt", b"x")], commit_message="mine")
    new = release(4, tmp_path, seed=1, tag="v1.1", new_txt=b"new")
    (done,) = push([new], hub)
    repo = hub_server.store.repos[new.repo_id]
    assert tree(repo, repo.head.oid).keys() == {*new.files, "theirs.txt"}
    assert done.difference.delete == ("old.txt",)
    assert done.difference.add == ("new.txt",)
    assert set(done.difference.keep) == {"query_tokenizer/vocab.json"}
    assert tree(repo, repo.tags["v1.0"]) == wanted(old), "the old release stays as it was"
    assert repo.tags["v1.1"] == done.commit
    assert tree(repo, done.commit) == tree(repo, repo.head.oid)
    assert set(repo.branches) == {"main"}, "the branch it was staged on is gone"


def test_pushing_an_old_release_again_does_not_turn_the_branch_back(hub, hub_server, tmp_path):
    old, new = release(4, tmp_path), release(4, tmp_path, seed=1, tag="v1.1")
    push([old], hub)
    push([new], hub)
    (done,) = push([old], hub)
    repo = hub_server.store.repos[new.repo_id]
    assert not done.difference
    assert done.commit == repo.tags["v1.0"]
    assert tree(repo, repo.head.oid) == wanted(new)


def test_a_tag_is_never_moved(hub, hub_server, tmp_path):
    push([release(4, tmp_path)], hub)
    repo = hub_server.store.repos["ada/tiny-m4"]
    tagged = repo.tags["v1.0"]
    with pytest.raises(Conflict, match=rf"^ada/tiny-m4: tag v1.0 is at commit {tagged}.*--tag v1.1") as error:
        push([release(4, tmp_path, seed=1)], hub)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)
    assert repo.tags == {"v1.0": tagged}
    assert repo.head.oid == tagged


def test_a_tag_that_somebody_sets_meanwhile_names_both_commits(hub, hub_server, tmp_path):
    hub_server.on_change = lambda repo: len(repo.commits) == 2 and repo.tags.update({"v1.0": next(iter(repo.commits))})
    with pytest.raises(Conflict, match="never moved") as error:
        push([release(4, tmp_path)], hub)
    repo = hub_server.store.repos["ada/tiny-m4"]
    assert all(oid in str(error.value) for oid in repo.commits)
    assert repo.private


def test_what_somebody_else_wrote_is_not_overwritten(hub, hub_server, api, tmp_path):
    api.create_repo("ada/tiny-m4")
    api.create_commit("ada/tiny-m4", [CommitOperationAdd("config.json", b"{}")], commit_message="another model")
    wish = release(4, tmp_path)
    with pytest.raises(Conflict, match=r"^ada/tiny-m4: config.json .*--overwrite"):
        push([wish], hub)
    assert len(commits_of(hub_server, "ada/tiny-m4")) == 2
    push([wish], hub, overwrite=True)
    assert complete(hub_server, wish)


def test_an_edited_card_is_noticed(hub, hub_server, api, tmp_path):
    push([release(4, tmp_path)], hub)
    card = b"---\nlicense: mit\n---\nbetter words\n"
    api.create_commit("ada/tiny-m4", [CommitOperationAdd("README.md", card)], commit_message="better")
    new = release(4, tmp_path, seed=1, tag="v1.1")
    with pytest.raises(Conflict, match=r"README.md at commit .* somebody else"):
        push([new], hub)
    assert hub_server.store.repos["ada/tiny-m4"].head.files["README.md"].data == card


def test_a_commit_in_between_is_kept(hub, hub_server, api, tmp_path):
    """Somebody commits after the repository was read: the Hub refuses (412), the push looks again."""
    push([release(4, tmp_path)], hub)
    new = release(4, tmp_path, seed=1, tag="v1.1")
    repo = hub_server.store.repos[new.repo_id]

    def meddle(method, path):
        if "/commit/main" in path and repo.head.title != "meanwhile":
            repo.commit("main", "meanwhile", "", "bob", {**repo.head.files, "x.txt": repo.head.files["config.json"]})
        return False

    hub_server.fault = Fault(number=1, kind="drop", matching=meddle)
    push([new], hub)
    hub_server.fault = None
    assert (412) in [status for _, path, status in hub_server.calls if "/commit/" in path]
    assert [commit.title for commit in repo.ancestry(repo.head.oid)][:2] == ["fusedvlm push: v1.1, m = 4", "meanwhile"]
    assert tree(repo, repo.head.oid).keys() == {*new.files, "x.txt"}


def test_two_releases_of_one_repository_are_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="two variants"):
        push([release(4, tmp_path), release(4, tmp_path, seed=1)], hub)


@pytest.mark.parametrize("repo_id", ["ada/a--b", "ada/x.git", "tiny", "ada/ü", "a/b/c", "ada/" + "x" * 97])
def test_bad_names_are_refused_without_the_network(hub, hub_server, tmp_path, repo_id):
    wish = release(4, tmp_path)
    wish.repo_id = repo_id
    with pytest.raises(ValueError, match=repo_id[:8]):
        push([wish], hub)
    assert hub_server.calls == []


def test_a_file_that_vanished_is_named(hub, hub_server, tmp_path):
    wish = release(4, tmp_path)
    wish.files["model.safetensors"].unlink()
    with pytest.raises(ValueError, match="safetensors cannot be read"):
        push([wish], hub)
    assert hub_server.calls == []


def test_a_file_that_changes_while_it_is_sent_is_noticed(hub, hub_server, tmp_path):
    wish = release(4, tmp_path)
    path = tmp_path / "notes.txt"
    path.write_bytes(b"before")
    wish.files["notes.txt"] = path
    hub_server.on_change = lambda repo: path.write_bytes(b"beyond")
    with pytest.raises(PushError, match=r"notes.txt is not what was read"):
        push([wish], hub, public=True)
    repo = hub_server.store.repos["ada/tiny-m4"]
    assert repo.private
    assert repo.tags == {}


# -- accounts -------------------------------------------------------------------------------------------------------------


def test_another_namespace_is_refused_before_anything_is_created(hub, hub_server, tmp_path):
    with pytest.raises(ValueError, match=r"^bob/tiny-m4: the token belongs to ada, who may write to ada, lab"):
        push([release(4, tmp_path, user="bob")], hub)
    assert hub_server.store.repos == {}


def test_an_organization_is_a_namespace(hub, hub_server, tmp_path):
    wish = release(4, tmp_path, user="lab")
    push([wish], hub)
    assert complete(hub_server, wish)


def test_whoami_is_asked_once(hub, hub_server, tmp_path):
    push(family(tmp_path, counts=(1, 4, 16)), hub)
    assert sum("whoami" in path for _, path, _ in hub_server.calls) == 1


def test_a_read_token_is_refused(hub_server, tmp_path):
    token = hub_server.add_user("ada", role="read")
    with pytest.raises(PushError, match="ada/tiny-m4: the token of ada may only read"):
        push([release(4, tmp_path)], Hub(hub_server.endpoint, token))
    assert hub_server.store.repos == {}


def test_an_expired_token_is_one_line(hub_server, tmp_path):
    with pytest.raises(PushError, match=r"^account: the Hub does not accept the token") as error:
        push([release(4, tmp_path)], Hub(hub_server.endpoint, "hf_expiredexpiredexpired"))
    assert "hf_expired" not in str(error.value)


def test_no_token_is_one_line(hub_server, tmp_path, monkeypatch):
    monkeypatch.setattr("fusedvlm.hub_cards.hub_client.get_token", lambda: None)
    with pytest.raises(PushError, match="no token; run `hf auth login`"):
        push([release(4, tmp_path)], Hub(hub_server.endpoint))


@pytest.mark.parametrize("token", ["hf_secret\nsecret", "hf_sécret", "hf_secret secret"])
def test_a_damaged_token_is_refused_without_showing_it(hub_server, tmp_path, token):
    with pytest.raises(ValueError, match="characters that no token has") as error:
        push([release(4, tmp_path)], Hub(hub_server.endpoint, token))
    assert "cret" not in str(error.value)


def test_the_token_is_never_shown(hub, hub_server, user, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    hub_server.fault = Fault(number=4, kind="status", at=503, times=3)
    push([release(4, tmp_path)], hub)
    said = "".join([*capfd.readouterr(), caplog.text, repr(hub), repr(hub.__dict__["retry_policy"])])
    assert "503" in said, "there is something to look through"
    assert user not in said


def test_offline_is_one_line(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        push([release(4, tmp_path)], hub)


def test_an_unreachable_hub_is_one_line(user, tmp_path):
    hub = Hub("http://127.0.0.1:9", user, RetryPolicy(attempts=2, first_wait=0.0))
    with pytest.raises(PushError, match="account: no connection to the Hub") as error:
        push([release(4, tmp_path)], hub)
    assert "\n" not in str(error.value)


# -- answers of the Hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, "ada/tiny-m4: the Hub does not accept the token"),
        (402, "ada/tiny-m4: the Hub asks for payment: Injected"),
        (403, "ada/tiny-m4: the token may not do this: Injected"),
        (404, "ada/tiny-m4: the Hub answers 404: Injected"),
        (409, "ada/tiny-m4: the Hub reports a conflict: Injected"),
        (412, "ada/tiny-m4: somebody else keeps committing"),
        (413, "ada/tiny-m4: the Hub answers 413: Injected"),
        (429, "ada/tiny-m4: rate limit"),
        (500, r"ada/tiny-m4: the Hub is in trouble \(status 500\)"),
        (503, r"ada/tiny-m4: the Hub is in trouble \(status 503\)"),
    ],
)
def test_a_refused_commit_is_one_line_that_names_the_repository(hub, hub_server, tmp_path, status, line):
    wish = release(4, tmp_path)
    hub_server.fault = Fault(1, "status", status, times=99, matching=lambda method, path: "/commit/" in path)
    with pytest.raises(PushError, match=r"^" + line) as error:
        push([wish], hub)
    assert "\n" not in str(error.value)
    assert error.value.status == status
    hub_server.fault = None
    push([wish], hub)
    assert complete(hub_server, wish)


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("call", ["/api/repos/create", "/tree/", "/preupload/", "/refs", "/tag/", "/settings"])
def test_every_call_is_told_in_one_line(hub, hub_server, tmp_path, call, status):
    wish = release(4, tmp_path)
    hub_server.fault = Fault(1, "status", status, times=999, matching=lambda method, path: call in path)
    with pytest.raises(PushError, match=r"^ada/tiny-m4: ") as error:
        push([wish], hub, public=True)
    assert "\n" not in str(error.value)
    assert error.value.status == status
    hub_server.fault = None
    push([wish], hub, public=True)
    assert complete(hub_server, wish)
    assert broken_promises(hub_server, [wish], []) == []


def test_the_wait_is_the_one_the_hub_asks_for(hub, hub_server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    for headers in ({"Retry-After": "17"}, {"RateLimit": '"api";r=0;t=55'}):
        hub_server.fault = Fault(1, "status", 429, headers=headers, matching=lambda method, path: "whoami" in path)
        push([release(4, tmp_path)], hub)
    assert waits == [17.0, 55.0]


@pytest.mark.parametrize("call", ["whoami", "/preupload/"])
def test_an_absurd_wait_is_told_instead(hub, hub_server, tmp_path, monkeypatch, call):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub_server.fault = Fault(1, "status", 429, headers={"Retry-After": "7200"}, matching=lambda m, path: call in path)
    with pytest.raises(PushError, match="the Hub asks to wait 7200 s"):
        push([release(4, tmp_path)], hub)
    assert waits == []


def test_a_silent_connection_is_given_up(hub_server, user, tmp_path):
    hub = Hub(hub_server.endpoint, user, RetryPolicy(attempts=2, first_wait=0.0, timeout=0.05))
    hub_server.fault = Fault(1, "stall", 1_000, times=2, matching=lambda method, path: "/commit/" in path)
    with pytest.raises(PushError, match=r"^ada/tiny-m4: the Hub does not answer in time"):
        push([release(4, tmp_path)], hub)


def test_a_gateway_page_is_not_taken_for_a_bad_card(hub, hub_server, tmp_path):
    wish = release(4, tmp_path)
    hub_server.fault = Fault(1, "html", matching=lambda method, path: "validate-yaml" in path)
    push([wish], hub)
    assert complete(hub_server, wish)


@pytest.mark.parametrize(
    "call",
    [
        "whoami",
        "/api/models/ada/tiny-m4",
        "/tree/",
        "/refs",
        "/api/repos/create",
        "/preupload/",
        "/commit/",
        "/tag/",
        "/settings",
    ],
)
def test_a_gateway_that_says_yes_in_the_hubs_place_is_not_believed(hub, hub_server, tmp_path, call):
    wish = release(4, tmp_path)
    hub_server.fault = fault = Fault(1, "html", matching=lambda method, path: call in path)
    (done,) = push([wish], hub, public=True)
    assert fault.hits == 1
    assert complete(hub_server, wish)
    assert not done.private
    assert not hub_server.store.repos[wish.repo_id].private


@pytest.mark.parametrize(
    ("call", "line"), [("/tag/", "does not show it"), ("/settings", "make it public and does not")]
)
def test_a_gateway_that_always_says_yes_is_told(hub, hub_server, tmp_path, call, line):
    hub_server.fault = Fault(1, "html", times=99, matching=lambda method, path: call in path)
    with pytest.raises(PushError, match=f"^ada/tiny-m4: the Hub accepts .*{line}"):
        push([release(4, tmp_path)], hub, public=True)


def test_a_card_that_the_hub_refuses_is_the_users_error(hub, hub_server, tmp_path):
    wish = release(4, tmp_path, README_md=b"---\nlicense: nonsense\n---\n")
    with pytest.raises(ValueError, match=r'^ada/tiny-m4: the Hub refuses the card: .*"license" must be one of'):
        push([wish], hub)


def test_a_renamed_repository_is_noticed(hub, hub_server, tmp_path):
    wish = release(4, tmp_path)
    push([wish], hub)
    hub_server.store.repos[wish.repo_id].id = "ada/other"
    with pytest.raises(Conflict, match=r"^ada/tiny-m4: was renamed to ada/other"):
        push([wish], hub)


def test_a_repository_that_exists_and_hides_is_one_line(hub, hub_server, tmp_path):
    hidden = {"X-Error-Code": "RepoNotFound"}
    hub_server.store.create("ada/tiny-m4", True, "ada")
    hub_server.fault = Fault(
        1, "status", 404, times=99, headers=hidden, matching=lambda method, path: path == "/api/models/ada/tiny-m4"
    )
    with pytest.raises(PushError, match=r"^ada/tiny-m4: exists, but this token may not see it"):
        push([release(4, tmp_path)], hub)


def test_a_damaged_manifest_on_the_hub_deletes_nothing(hub, hub_server, api, tmp_path, capfd):
    push([release(4, tmp_path, old_txt=b"old")], hub)
    api.create_commit("ada/tiny-m4", [CommitOperationAdd("checksums.json", b"\xff{")], commit_message="oops")
    push([release(4, tmp_path, seed=1, tag="v1.1")], hub, overwrite=True)
    assert "old.txt" in hub_server.store.repos["ada/tiny-m4"].head.files
    assert "checksums.json there is damaged" in capfd.readouterr().err


# -- pull requests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(hub_server):
    return Hub(hub_server.endpoint, hub_server.add_user("bob"), RetryPolicy(first_wait=0.0))


def test_a_pull_request_is_opened_once(hub, reader, hub_server, transfer, tmp_path):
    hub.api.create_repo("ada/tiny-m4")
    wish = release(4, tmp_path)
    (first,) = push([wish], reader, create_pr=True)
    (second,) = push([wish], reader, create_pr=True)
    repo = hub_server.store.repos["ada/tiny-m4"]
    assert first.pull_request == second.pull_request == f"{hub_server.endpoint}/ada/tiny-m4/discussions/1"
    assert tree(repo, repo.branches["refs/pr/1"]) == wanted(wish)
    assert len(repo.commits) == 2
    assert repo.tags == {}
    assert repo.head.title == "initial commit"


def test_a_lost_answer_does_not_open_a_second_request(hub, reader, hub_server, tmp_path):
    hub.api.create_repo("ada/tiny-m4")
    hub_server.fault = Fault(1, "lost_answer", matching=lambda method, path: "/commit/" in path)
    (done,) = push([release(4, tmp_path)], reader, create_pr=True)
    repo = hub_server.store.repos["ada/tiny-m4"]
    assert len(repo.requests) == 1
    assert done.pull_request.endswith("/1")


def test_a_request_is_completed_with_new_content(hub, reader, hub_server, tmp_path):
    hub.api.create_repo("ada/tiny-m4")
    push([release(4, tmp_path)], reader, create_pr=True)
    new = release(4, tmp_path, seed=1)
    push([new], reader, create_pr=True)
    repo = hub_server.store.repos["ada/tiny-m4"]
    assert len(repo.requests) == 1
    assert tree(repo, repo.branches["refs/pr/1"]) == wanted(new)


def test_a_request_needs_a_repository(reader, tmp_path):
    with pytest.raises(PushError, match="ada/tiny-m4: not found; a pull request needs an existing repository"):
        push([release(4, tmp_path)], reader, create_pr=True)


def test_nothing_is_proposed_when_nothing_changes(hub, reader, hub_server, tmp_path):
    wish = release(4, tmp_path)
    push([wish], hub, public=True)
    (done,) = push([wish], reader, create_pr=True)
    assert done.pull_request is None
    assert hub_server.store.repos["ada/tiny-m4"].requests == []


@pytest.mark.parametrize("status", [401, 403, 429, 500])
@pytest.mark.parametrize("call", ["whoami", "/api/repos/create", "/preupload/", "/commit/"])
def test_the_token_is_in_no_traceback(hub, hub_server, user, tmp_path, call, status):
    hub_server.fault = Fault(1, "status", status, times=999, matching=lambda method, path: call in path)
    with pytest.raises(PushError) as error:
        push([release(4, tmp_path)], hub)
    told = "".join(traceback.format_exception(error.value))
    assert "Injected" in told
    assert user not in told


@pytest.mark.parametrize("left", [(), (".gitattributes",)], ids=["nothing", "the Hub's own file"])
@pytest.mark.parametrize("tag", ["v1.0", "v1.1"])
def test_a_repository_that_was_emptied_by_hand_can_be_pushed_to_again(hub, hub_server, tmp_path, left, tag):
    """On its own branch the release is there, tagged; readers find nothing."""
    push([release(4, tmp_path)], hub, public=True)
    repo = hub_server.store.repos["ada/tiny-m4"]
    repo.commit("main", "away with it", "", "ada", {name: repo.head.files[name] for name in left})
    (tmp_path / "again").mkdir()
    wish = release(4, tmp_path / "again", tag=tag)
    rows, reason = plan([wish], hub)
    assert reason is None
    assert rows[0].difference, "a plan says what is missing"
    push([wish], hub)
    assert tree(repo, repo.head.oid) == wanted(wish)
    assert tree(repo, repo.tags[tag]) == wanted(wish)
    hub_server.calls.clear()
    push([wish], hub)
    assert {method for method, _, _ in hub_server.calls} == {"GET"}


@pytest.mark.parametrize("listed", [None, [], "x", {"files": None}, {"files": ["README.md"]}, {"files": 3}])
def test_an_odd_list_of_checksums_on_the_hub_deletes_nothing(hub, hub_server, tmp_path, listed, capfd):
    push([release(4, tmp_path)], hub)
    repo = hub_server.store.repos["ada/tiny-m4"]
    odd = Blob.regular(json.dumps(listed).encode())
    repo.commit("main", "fusedvlm push: odd", "", "ada", {**repo.head.files, "checksums.json": odd, "more.md": odd})
    (tmp_path / "again").mkdir()
    wish = release(4, tmp_path / "again", seed=1, tag="v1.1")
    push([wish], hub)
    assert "checksums.json there is damaged" in capfd.readouterr().err
    assert "more.md" in repo.head.files
