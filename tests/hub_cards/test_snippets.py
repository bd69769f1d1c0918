"""The code in a card runs as pasted, against the very repository it is about, where this package is not installed."""

import json
import os
import subprocess

import pytest

from fusedvlm.hub_cards.card.lint_card import FENCE
from fusedvlm.tests import fork_server

# Runs the blocks of a card one after the other, as a reader would in a notebook, then prints what they found.
RUNNER = """
import json, sys
sys.modules["fusedvlm"] = None
import torch
torch.set_num_threads(1)
names = {}
for block in json.load(open(sys.argv[1])):
    exec(compile(block, "card", "exec"), names)
print(json.dumps({
    "answers": [names["answer"], names["shorter"], *names["answers"], names["second_answer"], names["piped"]],
    "m": names["model"].config.num_visual_tokens,
    "modules": sorted({type(names[n]).__module__.split(".")[0] for n in ("model", "processor")}),
    "loaded_from": names["model"].config._name_or_path,
}))
"""


@pytest.fixture(scope="module")
def ran(tiny_release, tmp_path_factory):
    """What the card's blocks found, run where `ada/tiny-m7` is the repository's folder."""
    place = tmp_path_factory.mktemp("elsewhere")
    tiny_release.write(place / tiny_release.repo_id)
    card = (place / tiny_release.repo_id / "README.md").read_text()
    blocks = [source for _, language, source in FENCE.findall(card) if language == "python"]
    (place / "blocks.json").write_text(json.dumps(blocks))
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [fork_server.executable(), "-c", RUNNER, "blocks.json"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return len(blocks), json.loads(run.stdout.strip().splitlines()[-1])


def test_every_block_runs_without_the_package(ran):
    count, found = ran
    assert count == 7
    assert found["loaded_from"] == "ada/tiny-m7"
    assert found["m"] == 7
    assert found["modules"] == ["transformers_modules"]
    assert all(isinstance(answer, str) for answer in found["answers"])


def test_the_blocks_ask_what_they_say(ran, model, processor):
    """The same questions through the package give the same answers."""
    from PIL import Image

    image = Image.linear_gradient("L").convert("RGB")

    def ask(messages, m):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"num_visual_tokens": m},
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def message(picture, text):
        shown = [{"type": "image", "image": picture}] if picture else []
        return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}

    question = "What is in the image?"
    answer, shorter, first, second, again, piped = ran[1]["answers"]
    assert answer == ask([message(image, question)], 7)
    assert shorter == first == ask([message(image, question)], 3)
    assert second == ask([message(image.rotate(90), "Which colors are there?")], 7)
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    assert again == ask([message(image, question), reply, message(None, "Is there anything else?")], 7)
    assert piped.strip() == answer.strip()
