"""The Hub double does what the Hub does, as far as huggingface_hub can tell."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from fusedvlm.hub_cards.hub_errors import http
from fusedvlm.hub_double.hub_store import git_sha1
from fusedvlm.tests.hub_cards.faulty_hub import PART, Fault

pytestmark = pytest.mark.usefixtures("online")
WEIGHTS = bytes(range(256)) * (PART // 64)  # four parts
CARD = b"---\nlicense: mit\n---\n# Title\n"


@pytest.fixture
def api(hub_server, user):
    return HfApi(endpoint=hub_server.endpoint, token=user)


@pytest.fixture
def repo(api):
    api.create_repo("ada/model", private=True)
    return "ada/model"


def commit(api, repo, **files):
    names = {name.replace("_", "."): data for name, data in files.items()}
    return api.create_commit(repo, [CommitOperationAdd(n, d) for n, d in names.items()], commit_message="more")


def status_of(error) -> int:
    return error.value.response.status_code


def test_who_am_i(api, hub_server):
    account = api.whoami()
    assert account["name"] == "ada"
    assert [org["name"] for org in account["orgs"]] == ["lab"]
    assert account["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(endpoint=hub_server.endpoint, token="hf_unknown").whoami()
    assert status_of(error) == 401


def test_creating_private_and_public_repositories(api, hub_server):
    api.create_repo("ada/hidden", private=True)
    api.create_repo("lab/shown")
    stranger = HfApi(endpoint=hub_server.endpoint, token=hub_server.add_user("bob"))
    assert stranger.model_info("lab/shown").private is False
    for hidden in ("ada/hidden", "ada/missing"):
        with pytest.raises(RepositoryNotFoundError, match=f"api/models/{hidden}"):
            stranger.model_info(hidden)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("ada/Hidden")
    assert status_of(error) == 409
    assert api.create_repo("ada/hidden", exist_ok=True).repo_id == "ada/hidden"
    with pytest.raises(HfHubHTTPError) as error:
        stranger.create_repo("ada/other")
    assert status_of(error) == 403
    api.update_repo_settings("ada/hidden", private=False)
    assert stranger.model_info("ada/hidden").private is False
    api.delete_repo("ada/hidden")
    with pytest.raises(RepositoryNotFoundError, match="api/models/ada/hidden"):
        api.model_info("ada/hidden")


def test_a_commit_arrives_whole(api, repo, transfer, hub_server, tmp_path):
    made = commit(api, repo, README_md=CARD, model_safetensors=WEIGHTS, empty_txt=b"")
    info = api.model_info(repo, files_metadata=True)
    assert info.sha == made.oid
    rows = {row.rfilename: row for row in info.siblings}
    assert set(rows) == {".gitattributes", "README.md", "model.safetensors", "empty.txt"}
    assert rows["README.md"].blob_id == git_sha1(CARD)
    assert rows["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    for name, data in {"README.md": CARD, "model.safetensors": WEIGHTS, "empty.txt": b""}.items():
        path = hf_hub_download(repo, name, endpoint=hub_server.endpoint, token=api.token, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == data
    assert any("lfs/objects/batch" in path for _, path, _ in hub_server.calls) == (transfer == "lfs")


def test_what_is_there_is_not_sent_again(api, repo, transfer, hub_server):
    commit(api, repo, model_safetensors=WEIGHTS)
    api.create_repo("ada/second")
    hub_server.calls.clear()
    commit(api, "ada/second", model_safetensors=WEIGHTS)
    assert not any(method == "PUT" for method, _, _ in hub_server.calls)
    unchanged = commit(api, repo, model_safetensors=WEIGHTS)
    assert unchanged.oid == api.model_info(repo).sha
    assert len(api.list_repo_commits(repo)) == 2


@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)  # the Xet client checks its own content
def test_a_damaged_upload_is_refused(api, repo, monkeypatch, transfer):
    from huggingface_hub import lfs

    monkeypatch.setattr(lfs, "_upload_parts_iteratively", lambda **kwargs: [])
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'") as error:
        commit(api, repo, model_safetensors=WEIGHTS)
    assert "does not have the promised hash" in str(error.value.__cause__)
    assert len(api.list_repo_commits(repo)) == 1


def test_trees_come_in_pages_and_folders(api, repo):
    names = [f"plots/{number}.txt" for number in range(10)] + [f"{number}.txt" for number in range(10)]
    api.create_commit(repo, [CommitOperationAdd(name, name.encode()) for name in names], commit_message="many")
    every = list(api.list_repo_tree(repo, recursive=True))
    assert {row.path for row in every} == {*names, "plots", ".gitattributes"}
    assert {row.path for row in api.list_repo_tree(repo)} == {*names[10:], "plots", ".gitattributes"}
    assert {row.path for row in api.list_repo_tree(repo, "plots")} == set(names[:10])
    assert [row.path for row in api.get_paths_info(repo, ["3.txt", "none.txt"])] == ["3.txt"]


def test_deleting_files_and_folders(api, repo):
    commit(api, repo, a_txt=b"a", b_txt=b"b")
    api.create_commit(repo, [CommitOperationDelete("a.txt")], commit_message="less")
    assert {row.path for row in api.list_repo_tree(repo)} == {".gitattributes", "b.txt"}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(repo, [CommitOperationDelete("a.txt")], commit_message="less")


def test_a_commit_on_an_old_head_is_refused(api, repo):
    head = api.model_info(repo).sha
    commit(api, repo, a_txt=b"a")
    with pytest.raises(HfHubHTTPError, match="branch was updated") as error:
        api.create_commit(repo, [CommitOperationAdd("b.txt", b"b")], commit_message="late", parent_commit=head)
    assert status_of(error) == 412


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: apache", "license"),
        ("license: mit\nbase_model: /home/x", "base_model"),
        ("license: mit\ndatasets: [a/b/c]", "datasets"),
        ("license: mit\nmodel-index: [{name: x, results: [{}]}]", "model-index"),
        ("license: [", "YAML"),
    ],
)
def test_bad_cards_are_refused(api, repo, metadata, complaint):
    with pytest.raises(ValueError, match=complaint):
        commit(api, repo, README_md=f"---\n{metadata}\n---\n".encode())


def test_tags_and_branches(api, repo):
    made = commit(api, repo, a_txt=b"a")
    api.create_tag(repo, tag="v1.0", revision=made.oid)
    commit(api, repo, a_txt=b"b")
    assert api.model_info(repo, revision="v1.0").sha == made.oid
    assert {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags} == {"v1.0": made.oid}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(repo, tag="v1.0")
    assert status_of(error) == 409
    api.create_tag(repo, tag="v1.0", exist_ok=True)
    api.create_branch(repo, branch="next", revision=made.oid)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(repo, branch="next")
    assert status_of(error) == 409
    with pytest.raises(RevisionNotFoundError, match="v9"):
        api.model_info(repo, revision="v9")


def test_missing_files_say_so(api, repo, hub_server):
    with pytest.raises(EntryNotFoundError, match=r"none\.txt"):
        hf_hub_download(repo, "none.txt", endpoint=hub_server.endpoint, token=api.token)


def test_a_pull_request_from_a_reader(api, hub_server):
    api.create_repo("ada/shown")
    head = api.model_info("ada/shown").sha
    reader = HfApi(endpoint=hub_server.endpoint, token=hub_server.add_user("bob"))
    with pytest.raises(HfHubHTTPError) as error:
        commit(reader, "ada/shown", a_txt=b"a")
    assert status_of(error) == 403
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("w.safetensors", WEIGHTS)]
    made = reader.create_commit("ada/shown", operations, commit_message="please", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert api.model_info("ada/shown").sha == head
    (request,) = api.get_repo_discussions("ada/shown", author="bob", discussion_type="pull_request")
    assert (request.title, request.git_reference, request.status) == ("please", "refs/pr/1", "open")
    paths = {row.path for row in api.list_repo_tree("ada/shown", revision=request.git_reference)}
    assert paths == {".gitattributes", "a.txt", "w.safetensors"}


def test_collections(api, repo, hub_server):
    api.create_repo("ada/other")
    made = api.create_collection("Family", namespace="ada", description="all of it", private=True)
    assert api.create_collection("Family", namespace="ada", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, repo, "model", note="first")
    api.add_collection_item(made.slug, "ada/other", "model")
    api.add_collection_item(made.slug, repo, "model", exists_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(made.slug, repo, "model")
    assert status_of(error) == 409
    second = api.get_collection(made.slug).items[1]
    api.update_collection_item(made.slug, second.item_object_id, note="now first", position=0)
    items = api.get_collection(made.slug).items
    assert [(item.item_id, item.note, item.position) for item in items] == [
        ("ada/other", "now first", 0),
        (repo, "first", 1),
    ]
    assert api.update_collection_metadata(made.slug, private=False).private is False
    with pytest.raises(HfHubHTTPError) as error:
        api.create_collection("x" * 61, namespace="ada")
    assert status_of(error) == 400


def test_read_tokens_may_not_write(api, repo, hub_server):
    reader = HfApi(endpoint=hub_server.endpoint, token=hub_server.add_user("ada", role="read"))
    assert reader.model_info(repo).private
    with pytest.raises(HfHubHTTPError) as error:
        commit(reader, repo, a_txt=b"a")
    assert status_of(error) == 403


# {fault: what the client feels}
FELT = {
    "status": HfHubHTTPError,
    "drop": http.TransportError,
    "cut_body": http.TransportError,
    "lost_answer": http.TransportError,
    "cut_answer": http.TransportError,
    "html": ValueError,
    "stall": http.TransportError,
}


@pytest.mark.parametrize("kind", ["status", "drop", "cut_body", "lost_answer", "cut_answer", "html", "stall"])
def test_each_fault_strikes_the_request_it_is_meant_for(api, repo, hub_server, kind):
    hub_server.fault = Fault(number=2, kind=kind, at=503 if kind == "status" else 5)
    assert api.model_info(repo).private
    with pytest.raises(FELT[kind]):
        api.model_info(repo)
    assert hub_server.fault is None
    assert api.model_info(repo).private


def test_a_lost_answer_leaves_the_work_done(api, repo, hub_server):
    hub_server.fault = Fault(number=1, kind="lost_answer", matching=lambda method, path: "/commit/" in path)
    with pytest.raises(http.RemoteProtocolError):
        commit(api, repo, a_txt=b"a")
    assert [row.path for row in api.get_paths_info(repo, "a.txt")] == ["a.txt"]


def test_tokens_never_reach_the_file_storage(api, repo, hub_server, user, transfer, tmp_path):
    commit(api, repo, model_safetensors=WEIGHTS)
    hf_hub_download(repo, "model.safetensors", endpoint=hub_server.endpoint, token=user, cache_dir=tmp_path / "cache")
    storage = [seen for seen in hub_server.headers_seen if "Host: localhost" in seen]
    assert (len(storage) > 0) == (transfer == "lfs")
    assert not any(user in seen for seen in storage)
