"""Fixtures for all tests: no network, one thread, a tiny model built once per session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


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
def variant(model, processor, tmp_path_factory):
    """Folder of the tiny variant as saved: trained parts, LLM by reference."""
    folder = tmp_path_factory.mktemp("variant")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
