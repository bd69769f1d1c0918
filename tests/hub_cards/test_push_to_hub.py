"""push_to_hub as HF users call it, in a process whose Hub is the test's."""

import json

import pytest

from fusedvlm.hub_cards.card.card_links import link_problems
from fusedvlm.hub_cards.card.render_card import render_card
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.retry import RetryPolicy
from fusedvlm.tests.hub_cards.test_loading import push_llm, run_elsewhere

pytestmark = pytest.mark.usefixtures("online")

BEGIN = """
import json, sys
from pathlib import Path
from fusedvlm.tests import tiny
backbones, llm_commit, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
model = tiny.build_model(backbones)
processor = tiny.build_tiny_processor(model)
said = {}

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None
"""
MODELS = """
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
said["local"] = refused(lambda: model.push_to_hub("ada/local", private=True))
model.config.text_model_name_or_path, model.config.text_model_revision = "ada/tiny-llm", llm_commit
processor.push_to_hub("ada/tiny", private=True)
model.push_to_hub("ada/tiny", commit_message="First weights")
model.push_to_hub("ada/tiny")
processor.push_to_hub("ada/tiny")
model.save_pretrained(work / "saved", push_to_hub=True, repo_id="ada/saved", private=True)
model.push_to_hub("ada/edited")
card = "---\\nlicense: mit\\n---\\nMy own words.\\n"
operations = [CommitOperationAdd("README.md", card.encode())]
api.create_commit("ada/edited", operations, commit_message="words")
model.config.num_followup_visual_tokens = 2
model.push_to_hub("ada/edited")
model.push_to_hub("ada/branch", revision="next", private=True)
"""
TRAINERS = """
from fusedvlm.tests.trainers.test_trainers import DATA, arguments
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer, GenerationArguments, GenerationTrainer
model.config.text_model_name_or_path, model.config.text_model_revision = "ada/tiny-llm", llm_commit

def trainer(kind, options, model, name, **kwargs):
    args = arguments(
        options, work / name, max_steps=1, hub_model_id=f"ada/{name}", hub_private_repo=True, **kwargs
    )
    return kind(model=model, args=args, train_dataset=DATA, processing_class=processor)

second = trainer(GenerationTrainer, GenerationArguments, model, "second")
second.train()
second.push_to_hub(license="apache-2.0", language="en", dataset="pictures", tasks="vqa")
first = trainer(ContrastiveTrainer, ContrastiveArguments, tiny.build_contrastive_model(model), "first")
first.train()
first.push_to_hub(license="apache-2.0")
offline = trainer(GenerationTrainer, GenerationArguments, model, "offline")
offline.save_model()
offline.create_model_card(license="mit")
said["offline"] = (work / "offline" / "README.md").read_text()
tiny_variant = work / "variant"
model.save_pretrained(tiny_variant)
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
loaded = FusedVLMForConditionalGeneration.from_pretrained(tiny_variant)
lora = trainer(GenerationTrainer, GenerationArguments, loaded, "lora", lora=["fusion"])
said["lora"] = refused(lambda: lora.push_to_hub())
"""
END = """
(work / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture
def run(hub_server, user, transfer, backbones, tmp_path):
    """Run a script with the tiny model against the test Hub; returns what it said."""
    hub = Hub(hub_server.endpoint, user, RetryPolicy(attempts=2, first_wait=0.0))
    commit = push_llm(hub, backbones, "ada/tiny-llm", public=True)
    hub_server.mode = transfer

    def act(script: str) -> tuple[dict, str]:
        (tmp_path / "work").mkdir()
        arguments = backbones, commit, tmp_path / "work"
        done = run_elsewhere(hub_server, tmp_path / "home", *arguments, script=BEGIN + script + END, HF_TOKEN=user)
        assert done.returncode == 0, done.stderr[-4000:]
        assert user not in done.stdout + done.stderr
        return json.loads((tmp_path / "work" / "said.json").read_text()), done.stderr

    return act


def files_of(server, repo_id: str, branch: str = "main"):
    repo = server.store.repos[repo_id]
    return repo.commits[repo.branches[branch]].files


def facts_of(files) -> CardFacts:
    return CardFacts.from_json(files["facts.json"].data.decode())


@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)
def test_models_and_processors(run, hub_server, transfer):
    said, log = run(MODELS)
    assert "which nobody else has" in said["local"]
    assert "ada/local" not in hub_server.store.repos, "nothing is created for a model that cannot be loaded"

    files = files_of(hub_server, "ada/tiny")
    assert {"config.json", "model.safetensors", "processor_config.json", "query_tokenizer/tokenizer.json"} <= set(files)
    facts = facts_of(files)
    card = files["README.md"].data.decode()
    assert card == render_card(facts)
    sizes = {path: blob.size for path, blob in files.items()}
    assert list(link_problems(card.split("\n---\n", 1)[1], sizes)) == [], "a card links nothing that was not sent"
    assert "fusedvlm check" not in card, "nobody is asked to run a check that fails"
    assert "ada/edited: has no processor yet" in log
    assert facts.repo_id == "ada/tiny"
    assert 'revision = "ada/tiny", "main"' in card
    assert facts.stated.license is None
    assert "license:" not in card.partition("\n---\n")[0], "no license is invented"
    config = json.loads(files["config.json"].data)
    assert config["vision_model_name_or_path"] is None, "folders of the training machine stay at home"
    repo = hub_server.store.repos["ada/tiny"]
    assert repo.private
    titles = [commit.title for commit in repo.ancestry(repo.head.oid)]
    assert titles == ["First weights", "Upload processor", "initial commit"], "what is unchanged makes no commit"

    assert files_of(hub_server, "ada/saved")["README.md"].data.decode() == render_card(
        facts_of(files_of(hub_server, "ada/saved"))
    )
    edited = files_of(hub_server, "ada/edited")
    assert edited["README.md"].data.decode().endswith("My own words.\n")
    assert json.loads(edited["config.json"].data)["num_followup_visual_tokens"] == 2
    assert "ada/edited: the card on the Hub was written by hand" in log
    assert not hub_server.store.repos["ada/edited"].private, "as in transformers: public unless said otherwise"
    assert "README.md" in files_of(hub_server, "ada/branch", "next")
    assert "README.md" not in files_of(hub_server, "ada/branch")


@pytest.mark.parametrize("transfer", ["lfs"], indirect=True)
def test_trainers(run, hub_server, transfer):
    said, log = run(TRAINERS)
    files = files_of(hub_server, "ada/second")
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md", "facts.json"} <= set(files)
    facts = facts_of(files)
    assert files["README.md"].data.decode() == render_card(facts)
    assert facts.stated.license == "apache-2.0"
    assert facts.stated.languages == ("en",)
    assert [dataset.name for dataset in facts.stated.datasets] == ["pictures"]
    assert "The card takes tasks from the model's own files" in log
    assert hub_server.store.repos["ada/second"].private

    card = files_of(hub_server, "ada/first")["README.md"].data.decode()
    assert "license: apache-2.0" in card
    assert "Weights of stage 1" in card
    assert "ContrastiveTrainer" in card
    assert hub_server.store.repos["ada/first"].private

    assert "license: mit" in said["offline"]
    assert "ada/offline" in said["offline"]
    assert "ada/offline" not in hub_server.store.repos
    assert "--adapters" in said["lora"]
