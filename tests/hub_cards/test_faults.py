"""Ten variants against a Hub that fails, and against the death of the pushing process: nothing is lost or broken.

Faults are drawn from a seed. A fault counts only when it struck. What must hold at every moment is in
`synthetic.broken_promises`; it is asked after every change on the Hub and after every run.
"""

import os
import pickle
import random
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.hub_errors import PushError
from fusedvlm.hub_cards.push.collection import collect
from fusedvlm.hub_cards.push.push_repository import push
from fusedvlm.hub_double.hub_store import Store
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests import fork_server
from fusedvlm.tests.hub_cards.faulty_hub import Fault, FaultyHub
from fusedvlm.tests.hub_cards.killable import TITLE
from fusedvlm.tests.hub_cards.synthetic import broken_promises, complete, content_of, family

REQUESTS = 150  # about as many as a run without faults makes
RUNS = 60  # at most, until everything is done
FAULTS_PER_MODE = 120
KILLS_PER_MODE = 60


class Watch:
    """Collects every broken promise of a server."""

    def __init__(self, server: FaultyHub, releases: list, token: str):
        self.server, self.releases, self.token = server, releases, token
        self.problems: list[str] = []
        server.on_change = lambda repo: self.look()

    def look(self) -> None:
        self.problems += broken_promises(self.server, self.releases, [self.token])

    def finish(self) -> None:
        """Everything is there, public, collected in the order of m, byte for byte, each in one commit."""
        self.look()
        assert self.problems == []
        assert [complete(self.server, release) for release in self.releases] == [True] * len(self.releases)
        for repo in self.server.store.repos.values():
            assert not repo.private
            assert [commit.title for commit in repo.ancestry(repo.head.oid)][1:] == ["initial commit"]
        (collection,) = self.server.store.collections.values()
        assert [item["id"] for item in collection["items"]] == [release.repo_id for release in self.releases]
        assert not collection["private"]
        for seen in self.server.headers_seen:
            assert "Host: localhost" not in seen or self.token not in seen


def draw_fault(generator: random.Random, number: int) -> Fault:
    """One fault of the kinds that networks, gateways and Hubs have."""
    kind = generator.choice(["status"] * 3 + ["drop", "cut_body", "lost_answer", "lost_answer", "cut_answer", "html"])
    if kind == "status":
        status = generator.choice([408, 412, 429, 500, 502, 503, 504, 401, 403, 409])
        headers = {"Retry-After": "2"} if status == 429 else None
        return Fault(number, kind, status, times=generator.choice([1, 1, 2, 7]), headers=headers)
    return Fault(number, kind, at=generator.choice([0, 1, 40, 700, 30_000]), times=generator.choice([1, 1, 2]))


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("seed", range(3))
def test_a_failing_hub_loses_nothing(hub_server, user, transfer, tmp_path, seed):
    generator = random.Random(f"{transfer}{seed}")
    releases = family(tmp_path / "family", seed=seed)
    watch = Watch(hub_server, releases, user)
    hub = Hub(hub_server.endpoint, user, RetryPolicy(attempts=4, first_wait=0.0, timeout=5.0))
    wanted = FAULTS_PER_MODE // 3
    faults = [draw_fault(generator, generator.randint(1, 2 * REQUESTS // wanted)) for _ in range(wanted)]
    hub_server.fault, *hub_server.later = faults
    complaints = []
    for _ in range(RUNS):
        try:
            push(releases, hub, public=True)
            notes = {release.repo_id: f"m = {release.num_visual_tokens}" for release in releases}
            collect(hub, TITLE, "ada", notes, private=False)
        except (PushError, ValueError) as error:
            complaints.append(str(error))
            watch.look()
        else:
            if not hub_server.later and hub_server.fault is None:
                break
    assert sum(fault.hits > 0 for fault in faults) == wanted
    assert all("\n" not in line and user not in line for line in complaints)
    assert all(line.startswith(("ada/tiny-m", "account: ", "collection ada/")) for line in complaints), complaints
    watch.finish()


def environment(server: FaultyHub, user: str, folder: Path, transfer: str) -> dict[str, str]:
    """Variables of a pushing process; huggingface_hub reads most of them while it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {
        **inherited,
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": user,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1" if transfer == "lfs" else "0",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms",
        "OMP_NUM_THREADS": "1",
    }


class Pusher:
    """The killable process and what it said."""

    def __init__(self, releases: list, folder: Path, variables: dict[str, str]):
        (folder / "releases.pickle").write_bytes(pickle.dumps(releases))
        self.log = (folder / "log.txt").open("w+")
        command = [fork_server.executable(), "-m", "fusedvlm.tests.hub_cards.killable", str(folder / "releases.pickle")]
        self.process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def tell(self, word: str) -> int:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> "Pusher":
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_a_killed_push_loses_nothing(hub_server, user, tmp_path, transfer):
    """SIGKILL at a request (before it is read, within its body, after the work, within the answer) or at any moment."""
    generator = random.Random(transfer)
    releases = family(tmp_path / "family")
    kinds = ["kill_drop", "kill_cut_body", "kill_lost_answer", "kill_cut_answer"]
    kills = rounds = 0
    with Pusher(releases, tmp_path, environment(hub_server, user, tmp_path, transfer)) as pusher:
        while kills < KILLS_PER_MODE:
            hub_server.store = Store(tmp_path / f"content_store_{rounds}")
            user = hub_server.add_user("ada")
            watch = Watch(hub_server, releases, user)
            for _ in range(RUNS):
                pid = pusher.tell("run")
                at = generator.choice([0, 1, 40, 700, 30_000])
                fault = Fault(generator.randint(1, REQUESTS), generator.choice(kinds), at=at, victim=pid)
                hub_server.fault = fault
                clock = threading.Timer(generator.uniform(0.0, 1.0), os.kill, (pid, signal.SIGKILL))
                by_clock = generator.random() < 0.2
                if by_clock:
                    hub_server.fault = None
                    clock.start()
                code = pusher.tell("go")
                clock.cancel()
                hub_server.fault = None
                watch.look()
                assert watch.problems == []
                assert code in (0, -9), Path(pusher.log.name).read_text()
                assert by_clock or (code == -9) == (fault.hits == 1)
                kills += code == -9
                if code == 0:
                    break
            watch.finish()
            rounds += 1
    assert kills >= KILLS_PER_MODE
    assert_no_token(user, tmp_path)


@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_two_pushes_at_once_make_one(hub_server, user, tmp_path, transfer):
    """As when a job was started twice: one of them commits, the other notices; neither fails."""
    releases = family(tmp_path / "family", counts=(1, 4, 16, 64))
    watch = Watch(hub_server, releases, user)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with (
        Pusher(releases, folders[0], environment(hub_server, user, folders[0], transfer)) as first,
        Pusher(releases, folders[1], environment(hub_server, user, folders[1], transfer)) as second,
        ThreadPoolExecutor() as threads,
    ):
        for pusher in (first, second):
            pusher.tell("run")
        codes = list(threads.map(lambda pusher: pusher.tell("go"), (first, second)))
        assert codes == [0, 0], [Path(pusher.log.name).read_text() for pusher in (first, second)]
    watch.finish()


def assert_no_token(token: str, folder: Path) -> None:
    """The token is in no file that the pushing process wrote: log, caches, the Hub's content."""
    found = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert found == []


@pytest.mark.usefixtures("online")
def test_what_arrives_is_what_was_sent(hub_server, user, transfer, tmp_path):
    releases = family(tmp_path / "family", counts=(1, 576))
    push(releases, Hub(hub_server.endpoint, user), public=True)
    for release in releases:
        folder = tmp_path / release.repo_id
        snapshot_download(release.repo_id, revision="v1.0", endpoint=hub_server.endpoint, local_dir=folder)
        for path, content in release.files.items():
            assert (folder / path).read_bytes() == content_of(content)
