"""A family that people read gets a new release: whatever is refused, lost or killed, no card pins a tag that is not
there, and the same command finishes it."""

import random
import re
import signal

import pytest

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.push_repository import plan, push
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.hub_cards.faulty_hub import Fault
from fusedvlm.tests.hub_cards.synthetic import complete, family, release, tree, wanted
from fusedvlm.tests.hub_cards.test_faults import Pusher, draw_fault, environment

COUNTS = (1, 4, 16)


@pytest.fixture
def hub(hub_server, user):
    return Hub(hub_server.endpoint, user, RetryPolicy(attempts=4, first_wait=0.0, timeout=5.0))


def broken(server, old, new) -> list[str]:
    """What must hold at any moment while `new` takes the place of `old`, which is public."""
    problems = []
    for before, after in zip(old, new, strict=True):
        repo = server.store.repos[after.repo_id]
        card = repo.head.files["README.md"].data.decode()
        pinned = re.search(r" (v[\d.]+)\n", card).group(1)
        if pinned not in repo.tags:
            problems.append(f"{repo.id}: a public card pins {pinned}, which does not exist")
        allowed = [wanted(before), wanted(after)]
        problems += [
            f"{repo.id}: a commit of something else" for oid in repo.commits if tree(repo, oid) not in [{}, *allowed]
        ]
        problems += [
            f"{repo.id}: the tag {tag} moved"
            for tag, oid in repo.tags.items()
            if tree(repo, oid) != allowed[tag == after.tag]
        ]
        if tree(repo, repo.head.oid) == wanted(after) and any(
            other.tag not in server.store.repos[other.repo_id].tags for other in new
        ):
            problems.append(f"{repo.id}: moved before the whole family was tagged")
        titles = [commit.title for commit in repo.ancestry(repo.head.oid)]
        if titles.count(f"fusedvlm push: {after.tag}, m = {after.num_visual_tokens}") > 1:
            problems.append(f"{repo.id}: two commits of one release on the main branch")
    return problems


@pytest.fixture
def families(hub_server, user, tmp_path, online):
    """A public family of v1.0 and its v1.1."""
    old, new = family(tmp_path / "old", counts=COUNTS), family(tmp_path / "new", counts=COUNTS, seed=1, tag="v1.1")
    push(old, Hub(hub_server.endpoint, user, RetryPolicy(first_wait=0.0)), public=True)
    return old, new


def finished(server, new) -> bool:
    repos = [server.store.repos[release.repo_id] for release in new]
    return all(set(repo.branches) == {"main"} and not repo.private for repo in repos) and all(
        tree(repo, repo.head.oid) == tree(repo, repo.tags[release.tag]) == wanted(release)
        for repo, release in zip(repos, new, strict=True)
    )


@pytest.mark.parametrize("call", ["/tag/", "/branch/", "/commit/fusedvlm", "/commit/main", "/preupload/", "/refs"])
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_on_the_second_repository_breaks_no_card(hub, hub_server, families, call, status):
    old, new = families
    hub_server.fault = Fault(1, "status", status, times=999, matching=lambda m, path: call in path and "m4/" in path)
    with pytest.raises(PushError, match=r"^ada/tiny-m4: "):
        push(new, hub, public=True)
    assert broken(hub_server, old, new) == []
    if call != "/commit/main":
        heads = [hub_server.store.repos[release.repo_id].head for release in old]
        assert [head.title for head in heads] == [f"fusedvlm push: v1.0, m = {m}" for m in COUNTS], "nothing has moved"
    hub_server.fault = None
    push(new, hub, public=True)
    assert finished(hub_server, new)
    hub_server.calls.clear()
    push(new, hub, public=True)
    assert {method for method, _, _ in hub_server.calls} == {"GET"}, "a third run has nothing to do"


def test_a_repository_that_is_deleted_during_a_push_is_one_line(hub, families, monkeypatch):
    _, new = families
    monkeypatch.setattr("fusedvlm.hub_cards.push.staging.look", lambda *args: None)
    with pytest.raises(PushError, match=r"^ada/tiny-m1: not found any more"):
        push(new, hub, public=True)


def test_a_refused_main_branch_says_how_far_it_came(hub, hub_server, families):
    _, new = families
    hub_server.fault = Fault(1, "status", 403, times=99, matching=lambda m, path: "tiny-m4/commit/main" in path)
    with pytest.raises(PushError, match=r"\(1 of 3 main branches show v1.1 so far\)"):
        push(new, hub)
    rows, _ = plan(new, hub)
    assert [bool(row.difference) for row in rows] == [False, True, True], "a plan shows what is left to do"


def test_an_old_release_that_stopped_half_way_does_not_turn_a_newer_one_back(hub, hub_server, families, tmp_path):
    _, new = families
    hub_server.fault = Fault(1, "status", 403, times=99, matching=lambda m, path: "/commit/main" in path)
    with pytest.raises(PushError):
        push(new, hub)
    hub_server.fault = None
    newer = family(tmp_path / "newer", counts=COUNTS, seed=2, tag="v1.2")
    push(newer, hub)
    push(new, hub)
    assert finished(hub_server, newer)


def test_a_new_member_of_a_public_family_is_seen_with_the_others(hub, hub_server, families, tmp_path):
    old, new = families
    more = [*new, release(64, tmp_path, seed=1, tag="v1.1")]
    hub_server.fault = Fault(1, "status", 403, times=99, matching=lambda m, path: "m64/tag/" in path)
    with pytest.raises(PushError, match="ada/tiny-m64"):
        push(more, hub, public=True)
    assert broken(hub_server, old, new) == []
    assert hub_server.store.repos["ada/tiny-m64"].private
    hub_server.fault = None
    push(more, hub, public=True)
    assert finished(hub_server, more)


def test_a_staging_branch_with_other_content_is_completed(hub, hub_server, families, tmp_path):
    assert len(families) == 2
    first = family(tmp_path / "first", counts=COUNTS, seed=3, tag="v1.1")
    second = family(tmp_path / "second", counts=COUNTS, seed=4, tag="v1.1")
    hub_server.fault = Fault(1, "status", 403, times=99, matching=lambda m, path: "/tag/" in path)
    with pytest.raises(PushError):
        push(first, hub)
    hub_server.fault = None
    push(second, hub)
    assert finished(hub_server, second)
    assert complete(hub_server, second[0])


def test_a_gateway_that_says_yes_to_the_branch_is_told(hub, hub_server, families):
    old, new = families
    hub_server.fault = Fault(1, "html", times=99, matching=lambda m, path: "/branch/" in path)
    with pytest.raises(PushError, match=r"accepts the branch fusedvlm-push-v1\.1 and does not show it"):
        push(new, hub)
    assert broken(hub_server, old, new) == []


@pytest.mark.parametrize("seed", range(2))
def test_a_failing_hub_breaks_no_card_of_an_update(hub_server, user, families, seed):
    old, new = families
    generator = random.Random(f"update {seed}")
    problems, complaints = [], []
    hub_server.on_change = lambda repo: problems.extend(broken(hub_server, old, new))
    hub = Hub(hub_server.endpoint, user, RetryPolicy(attempts=4, first_wait=0.0, timeout=5.0))
    hub_server.fault, *hub_server.later = [draw_fault(generator, generator.randint(1, 6)) for _ in range(30)]
    for _ in range(60):
        try:
            push(new, hub, public=True)
        except (PushError, ValueError) as error:
            complaints.append(str(error))
        else:
            if not hub_server.later and hub_server.fault is None:
                break
    assert problems == []
    assert not any("\n" in line for line in complaints)
    assert finished(hub_server, new)


def test_a_killed_update_breaks_no_card(hub_server, user, families, tmp_path):
    """SIGKILL at requests all along the way."""
    old, new = families
    problems, kills = [], 0
    hub_server.on_change = lambda repo: problems.extend(broken(hub_server, old, new))
    generator = random.Random("update")
    with Pusher(new, tmp_path, environment(hub_server, user, tmp_path, "lfs")) as pusher:
        for _ in range(14):
            pid = pusher.tell("run")
            kind = generator.choice(["kill_drop", "kill_cut_body", "kill_lost_answer"])
            hub_server.fault = Fault(generator.randint(4, 24), kind, at=40, victim=pid)
            kills += pusher.tell("go") == -signal.SIGKILL
            hub_server.fault = None
            assert broken(hub_server, old, new) == []
        pusher.tell("run")
        assert pusher.tell("go") == 0
    assert kills >= 3
    assert problems == []
    assert finished(hub_server, new)
