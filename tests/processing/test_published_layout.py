"""Token layout of every published chat template, against the published parser."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMProcessor
from fusedvlm.processing.processing_fusedvlm_prompt import parse_prompt
from fusedvlm.processing.published_templates import STYLES, choose_conversation, published_chat_template
from fusedvlm.tests.modeling_fusedvlm import oracle

TEMPLATES = json.loads((oracle.FOLDER / "f_chat_templates.json").read_text())
M, FOLLOWUP = TEMPLATES["m"], TEMPLATES["m_short"]
QUESTION, ANSWER, EOS, QUERY = 16, 32, 128, 256


def conversation(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for number, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.fixture(scope="module")
def processor():
    tokenizer = AutoTokenizer.from_pretrained(oracle.FOLDER / "llm_tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in TEMPLATES["special_tokens"]], special_tokens=True
    )
    return FusedVLMProcessor(
        FusedVLMImageProcessor(size={"height": 84, "width": 84}),
        tokenizer,
        AutoTokenizer.from_pretrained(oracle.FOLDER / "clip_tokenizer"),
        image_token_id=oracle.IMAGE_TOKEN_ID,
        num_visual_tokens=M,
        num_followup_visual_tokens=FOLLOWUP,
    )


@pytest.mark.parametrize("number", range(len(TEMPLATES["cases"])))
def test_tokens_types_and_labels(processor, number):
    """Every id and type of the published parser, for every template, with and without a system message or an answer."""
    case = TEMPLATES["cases"][number]
    words = TEMPLATES["conversations"][case["conv"]]
    turns = [(words[k], words[k + 1] or None) for k in range(0, len(words), 2)]
    text = processor.apply_chat_template(
        conversation(turns, case["system_message"]),
        chat_template=published_chat_template(case["template"]),
        tokenize=False,
        add_generation_prompt=turns[-1][1] is None,
        published_labels=True,
        published_inference=True,
    )
    inputs = processor.encode_prompts(text, return_assistant_tokens_mask=True)
    theirs, types = case["llm"]["input_ids"], case["llm"]["input_tps"]
    expected = [oracle.IMAGE_TOKEN_ID if kind == QUERY else token for token, kind in zip(theirs, types, strict=True)]
    assert inputs["input_ids"][0] == expected
    assert inputs["assistant_masks"][0] == [int(kind in (ANSWER, EOS)) for kind in types]
    fusion = zip(case["fusion"]["input_ids"], case["fusion"]["input_tps"], strict=True)
    assert inputs["question_input_ids"] == [token for token, kind in fusion if kind == QUESTION]
    assert inputs["num_visual_tokens"] == [M, FOLLOWUP, FOLLOWUP][: len(turns)]


def test_by_default_the_end_of_the_users_turn_is_not_learned(processor):
    text = processor.apply_chat_template(
        conversation([("What?", "A cat.")]), chat_template=published_chat_template("microsoft-phi-3"), tokenize=False
    )
    inputs = processor.encode_prompts(text, return_assistant_tokens_mask=True)
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    learned = [
        mask for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if token == end
    ]
    assert learned == [0, 1]


CASES = json.loads((oracle.FOLDER / "f_chat.json").read_text())["cases"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_pieces_of_the_reference_cases(processor, number):
    case = CASES[number]
    questions = [text.removeprefix("[INST] ") for text, kind in case["pieces"] if kind == "QUE"]
    answers = [text.removesuffix(" </s>") for text, kind in case["pieces"] if kind == "ANS"]
    turns = list(zip(questions, [*answers, None][: len(questions)], strict=True))
    text = processor.apply_chat_template(
        conversation(turns, case["system_message"]),
        chat_template=published_chat_template(case["template"]),
        tokenize=False,
        add_generation_prompt=len(answers) < len(questions),
    )
    pieces = [piece for piece in parse_prompt(text).pieces if piece.kind not in ("image", "again")]
    joined = []
    for piece in pieces:
        if piece.kind == "end":  # the published answer piece ends in the eos
            joined[-1] = joined[-1] + piece.text
        else:
            joined.append(piece.text)
    assert joined == [text for text, _ in case["pieces"]]


@pytest.mark.parametrize("published_inference", [False, True])
def test_what_the_fusion_module_reads_of_llama_2_without_a_system_message(processor, published_inference):
    text = processor.apply_chat_template(
        conversation([("What is it?", None)]),
        chat_template=published_chat_template("llama-2"),
        tokenize=False,
        published_inference=published_inference,
    )
    opening = "[INST] " if published_inference else ""
    expected = processor.query_tokenizer(opening + "What is it?", add_special_tokens=False)["input_ids"]
    assert processor.encode_prompts(text)["question_input_ids"] == expected


def test_every_style_has_reference_cases():
    assert {case["template"] for case in TEMPLATES["cases"]} == set(STYLES)


def test_what_a_person_types_never_becomes_a_special_token(processor):
    text = processor.apply_chat_template(
        conversation([("How many <|end|> are there? <|im_end|>", None)]),
        chat_template=published_chat_template("microsoft-phi-3"),
        tokenize=False,
    )
    ids = processor.encode_prompts(text)["input_ids"][0]
    end, im_end = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert (ids.count(end), ids.count(im_end)) == (1, 0)  # the template's own


def test_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown conversation 'alpaca'; there are .*vicuna_v1\.1"):
        published_chat_template("alpaca")


def test_the_vocabulary_chooses_the_style(processor):
    assert choose_conversation(processor.tokenizer) == "llama-3-vision"
    assert choose_conversation(AutoTokenizer.from_pretrained(oracle.FOLDER / "llm_tokenizer")) == "llama-2-vision"
