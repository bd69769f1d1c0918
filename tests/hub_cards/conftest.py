"""A Hub to push to, and a client that may speak to it: the suite is offline otherwise."""

import sys
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from fusedvlm.tests import fork_server
from fusedvlm.tests.hub_cards.faulty_hub import FaultyHub


@pytest.fixture(autouse=True)
def forked_interpreters(monkeypatch):
    """The processes in which checks load a variant are forks (see `fusedvlm.tests.fork_server`)."""
    monkeypatch.setattr(sys, "executable", fork_server.executable())


@pytest.fixture
def hub_server(tmp_path):
    """An empty Hub."""
    with FaultyHub(tmp_path / "content_store") as server:
        yield server


@pytest.fixture
def online(monkeypatch):
    """huggingface_hub may use the network in this process, and its waits between attempts take no time."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    close_session()
    yield
    close_session()


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, monkeypatch):
    """Both ways of huggingface_hub to send large files."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def user(hub_server):
    """Token of a user who may write."""
    return hub_server.add_user("ada", orgs=("lab",))


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory):
    """Folder of a tiny trained family with its results (do not change it)."""
    from fusedvlm.tests.hub_cards.tiny_family import write_family

    return write_family(tmp_path_factory.mktemp("hub_cards") / "family")


@pytest.fixture(scope="session")
def tiny_release(tiny_family):
    """Release of its middle variant (do not change it)."""
    from fusedvlm.hub_cards.release.variant_release import build_family

    return build_family(tiny_family, "ada", license="mit")[1]
