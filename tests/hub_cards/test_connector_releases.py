"""A variant of every connector is released, pushed and checked like any other, its loading in a locked process too."""

import pytest

from fusedvlm.hub_cards.check.isolated_loading import Loaded
from fusedvlm.hub_cards.check.repository_check import check_files, check_folder
from fusedvlm.hub_cards.facts import StatedFacts
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.push.push_repository import plan, push
from fusedvlm.hub_cards.release.variant_release import build_release
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests import tiny
from fusedvlm.tests.modeling_fusedvlm.test_connectors import CASES, build

STATED = StatedFacts(license="mit", llm_license="apache-2.0")


def released(case, backbones, folder):
    model = build(backbones, case)
    tiny.build_tiny_processor(model).save_pretrained(folder)
    model.config.text_model_name_or_path, model.config.text_model_revision = None, None
    model.save_pretrained(folder, merged=True)
    return build_release(folder, f"ada/{folder.name}", stated=STATED)


@pytest.mark.parametrize("case", ["dense", "pool", "resampler", "anchored", "quecc"])
def test_a_connector_is_released_and_checked(case, backbones, tmp_path, monkeypatch):
    if case != "quecc":  # loading takes seconds; that every connector loads elsewhere is tested with the models
        monkeypatch.setattr("fusedvlm.hub_cards.check.repository_check.load_isolated", lambda folder: Loaded(None))
    release = released(case, backbones, tmp_path / "variant")
    connector, _, counts = CASES[case]
    assert release.facts.counted.connector == connector
    assert check_files(release.files, release.repo_id) == []
    release.write(tmp_path / "repository")
    assert check_folder(tmp_path / "repository") == []
    card = (tmp_path / "repository" / "README.md").read_text()
    assert f"| Connector | {connector} |" in card
    assert f"| Trained with m | {', '.join(map(str, sorted(counts)))} |" in card


@pytest.mark.usefixtures("online")
def test_a_connector_is_planned_and_pushed(hub_server, user, backbones, tmp_path):
    hub = Hub(hub_server.endpoint, user, RetryPolicy(first_wait=0.0, timeout=5.0))
    release = released("pool", backbones, tmp_path / "variant")
    (row,), _ = plan([release], hub)
    assert set(row.difference.add) == set(release.files)
    (done,) = push([release], hub)
    assert set(done.difference.add) == set(release.files)
    assert hub_server.store.repos[release.repo_id].tags["v1.0"] == done.commit
