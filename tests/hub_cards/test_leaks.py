"""Secrets are found by their form, whoever issued them; checksums and vocabularies are not taken for any."""

import json

import pytest

from fusedvlm.hub_cards.check.leaks import secrets_in

SECRETS = {
    "Hugging Face": "hf_" + "aB3d" * 8,
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitLab": "glpat-" + "a1B2" * 5,
    "AWS": "AKIA" + "A1B2C3D4E5F6G7H8",
    "Private Key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "Slack": "https://hooks.slack.com/services/T00000000/B00000000/" + "X" * 24,
    "JSON Web Token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "API key": "sk-" + "ab12" * 10,
}


@pytest.mark.parametrize("issuer", SECRETS)
def test_a_secret_is_named_and_never_repeated(tmp_path, issuer):
    path = tmp_path / "notes.md"
    path.write_text(f"call it with {SECRETS[issuer]} please")
    found = list(secrets_in(path))
    assert any(issuer in what for what in found)
    assert not any(SECRETS[issuer] in what for what in found)


def test_checksums_and_words_are_no_secrets(tmp_path):
    path = tmp_path / "checksums.json"
    path.write_text(json.dumps({"files": {f"APPLICATION{i}": f"{i:064x}" for i in range(500)}}))
    assert list(secrets_in(path)) == []
