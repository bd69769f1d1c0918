"""What a new user gets wrong: one clear line, at once and without a network, instead of an answer or a riddle."""

import time

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TrainingArguments

import fusedvlm
from fusedvlm import GenerationTrainer, VisualChat
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.processing import build_processor
from fusedvlm.serving import user_message
from fusedvlm.tests import tiny
from fusedvlm.tests.hub_cards.tiny_family import save_variant
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer, GenerationArguments


@pytest.fixture(scope="module")
def variant(backbones, tmp_path_factory):
    model = tiny.build_model(backbones)
    return save_variant(tmp_path_factory.mktemp("misuse") / "variant", model, tiny.build_tiny_processor(model), 7)


@pytest.fixture(scope="module")
def chat(variant):
    return VisualChat(variant)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    tiny.picture(1).save(path)
    return path


def from_backbones(vision, text, **changes):
    tokenizer = tiny.query_tokenizer()
    rows = {"query_vocab_size": tokenizer.vocab_size, "query_eos_token_id": tokenizer.eos_token_id}
    return FusedVLMForConditionalGeneration.from_backbones(vision, text, **rows, **changes)


def trainer(kind, arguments, model, processor, folder):
    return kind(
        model=model, args=arguments(output_dir=str(folder), use_cpu=True), train_dataset=[1], processing_class=processor
    )


def test_a_language_model_is_no_variant(backbones):
    with pytest.raises(ValueError, match="that of a 'llama' model, not of a FusedVLM variant"):
        FusedVLMForConditionalGeneration.from_pretrained(backbones / "llm")


def test_a_language_model_is_no_vision_tower(backbones):
    with pytest.raises(ValueError, match="is a LlamaModel, which reads input_ids, not pixel_values"):
        from_backbones(backbones / "llm", backbones / "llm")


@pytest.mark.parametrize(
    ("vision", "text", "said"), [(None, "llm", "vision must be"), ("vision", None, "text must be")]
)
def test_backbones_have_names(backbones, vision, text, said):
    with pytest.raises(ValueError, match=f"{said} a repo id or folder.*got NoneType"):
        from_backbones(vision and backbones / vision, text and backbones / text)


def test_a_misspelt_argument_of_a_new_model_is_refused(backbones):
    with pytest.raises(ValueError, match="no argument 'num_visual_token'; did you mean num_visual_tokens"):
        from_backbones(backbones / "vision", backbones / "llm", num_visual_token=4)


def test_one_image_needs_no_list(chat, picture):
    image = tiny.picture(1)
    expected = chat.ask([image], "what?", max_new_tokens=3)
    for shown in (str(picture), picture, image, np.asarray(image), picture.read_bytes()):
        assert chat.ask(shown, "what?", max_new_tokens=3) == expected
    assert chat.ask_batch([image, [picture]], ["what?", "what?"], max_new_tokens=3) == [expected] * 2


def test_entries_and_questions_are_as_many(chat):
    with pytest.raises(ValueError, match="2 entries of images and 1 questions"):
        chat.ask_batch([tiny.picture(1), tiny.picture(2)], ["what?"])
    with pytest.raises(ValueError, match="a list of images and a list of questions"):
        chat.ask_batch(tiny.picture(1), ["what?"])


class CountSteps(StoppingCriteria):
    steps = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        time.sleep(0.02)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_stream_that_is_closed_stops_generating(chat):
    counted = CountSteps()
    pieces = chat.stream(
        [user_message(tiny.picture(1), "what?")],
        max_new_tokens=500,
        min_new_tokens=500,
        stopping_criteria=StoppingCriteriaList([counted]),
    )
    next(pieces)
    pieces.close()
    after = counted.steps
    time.sleep(0.2)
    assert counted.steps == after < 100


def test_a_chat_is_placed_as_transformers_places_models(variant):
    chat = VisualChat(variant, attn_implementation="eager", device_map="cpu")
    assert chat.model.config._attn_implementation == "eager"
    assert "m=7 of 1..12" in repr(chat)
    with pytest.raises(ValueError, match="both place the model"):
        VisualChat(variant, device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match="'cuda:9' cannot be used here"):
        VisualChat(variant, device="cuda:9")


@pytest.mark.parametrize("path", ["runs/nope", "./nope", "a/b/c", "nope", ""])
def test_a_folder_that_is_not_there_is_said_to_be_missing_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        VisualChat(path)


def test_a_name_whose_first_part_is_a_folder_here_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "variants").mkdir()
    with pytest.raises(ValueError, match="model=variants/m8 does not exist"):
        VisualChat("variants/m8")
    with pytest.raises(ValueError, match="is a file"):
        VisualChat(__file__)


def test_trainers_take_what_belongs_to_their_stage(chat, tmp_path):
    model, processor = chat.model, chat.processor
    with pytest.raises(ValueError, match="processing_class must be the FusedVLMProcessor"):
        trainer(GenerationTrainer, GenerationArguments, model, processor.tokenizer, tmp_path)
    with pytest.raises(ValueError, match="takes args=GenerationArguments, not TrainingArguments"):
        trainer(GenerationTrainer, TrainingArguments, model, processor, tmp_path)
    with pytest.raises(ValueError, match="trains a FusedVLMForContrastiveLearning, not a FusedVLMForConditional"):
        trainer(ContrastiveTrainer, ContrastiveArguments, model, processor, tmp_path)


def test_a_processor_of_a_local_variant_needs_no_network(chat):
    processor = build_processor(chat.model.config, query_tokenizer=tiny.query_tokenizer())
    assert processor.image_processor.image_mean == chat.processor.image_processor.image_mean
    assert processor.tokenizer.get_vocab() == chat.processor.tokenizer.get_vocab()


@pytest.mark.parametrize("m", [3.5, "4", True])
def test_numbers_of_visual_tokens_are_whole_numbers(chat, m):
    with pytest.raises(ValueError, match="not a whole number of visual tokens"):
        chat.ask(tiny.picture(1), "what?", num_visual_tokens=m)


@pytest.mark.parametrize("kind", ["video", "img", "input_image"])
def test_unknown_parts_of_a_message_are_not_dropped(chat, kind):
    message = {"role": "user", "content": [{"type": kind, kind: tiny.picture(1)}, {"type": "text", "text": "hi"}]}
    with pytest.raises(ValueError, match=f"part 0 is of type '{kind}'"):
        chat.reply_batch([[message]])


def test_sub_packages_are_names_of_the_package():
    assert fusedvlm.scaling.__name__ == "fusedvlm.scaling"
    assert "trainers" in dir(fusedvlm)
