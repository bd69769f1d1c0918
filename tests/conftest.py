"""Fixtures for all tests: no network, one thread, a tiny model built once per session."""

import os
import pickle
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock

from fusedvlm.tests import fork_server

torch.set_num_threads(1)
SERVER = pytest.StashKey()


def pytest_configure(config):
    """One server of forked interpreters for all workers of a run."""
    if not hasattr(config, "workerinput") and sys.platform == "linux":
        config.stash[SERVER] = fork_server.Server()


def pytest_unconfigure(config):
    if SERVER in config.stash:
        config.stash[SERVER].stop()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folder with a tiny vision tower and a tiny LLM."""
    from fusedvlm.tests import tiny

    folder = tmp_path_factory.mktemp("backbones")
    tiny.save_backbones(folder)
    return folder


@pytest.fixture(scope="session")
def model(backbones):
    """A tiny variant (do not modify it)."""
    from fusedvlm.tests import tiny

    return tiny.build_model(backbones)


@pytest.fixture(scope="session")
def processor(model):
    """The tiny variant's processor (do not modify it)."""
    from fusedvlm.tests import tiny

    return tiny.build_tiny_processor(model)


@pytest.fixture(scope="session")
def quickstart_family(tmp_path_factory):
    """The quickstart at its smallest, run once for all workers of a test run (copy its folder before changing it)."""
    from fusedvlm.quickstart.run import run
    from fusedvlm.tests.quickstart.smallest import TINY

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    record = shared / "quickstart.pickle"
    with FileLock(shared / "quickstart.lock"):
        if not record.exists():
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(sys, "executable", fork_server.executable())  # its language model has a process
                family = run(TINY, shared / "quickstart", "fusedvlm quickstart")
            record.write_bytes(pickle.dumps(family))
    return pickle.loads(record.read_bytes())


@pytest.fixture(scope="session")
def variant(model, processor, tmp_path_factory):
    """Folder of the tiny variant as saved: trained parts, LLM by reference."""
    folder = tmp_path_factory.mktemp("variant")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
