"""Token layout of every published chat template, against a plain twin of the published piece parser."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMProcessor
from fusedvlm.processing.processing_fusedvlm_prompt import parse_prompt
from fusedvlm.processing.published_templates import STYLES, choose_conversation, published_chat_template
from fusedvlm.tests.modeling_fusedvlm import oracle

M, FOLLOWUP = 6, 3
QUESTIONS = ["Describe the given image in detail.", "What time is it?", "How many <|end|> are there?"]
ANSWERS = ["A busy street at night.", "Ten past two.", "There is one cat."]
SYSTEM = "You are a helpful assistant."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def llama_2(system, turns):
    pieces = [("<s>", "BOS")]
    for number, (question, answer) in enumerate(turns):
        if number == 0 and system:
            pieces += [(f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", "SYS"), (question, "QUE")]
        elif number == 0:
            pieces.append((f"[INST] {question}", "QUE"))
        else:
            pieces += [("<s>[INST]", "INST"), (question, "QUE")]
        pieces.append(("[/INST]", "INST"))
        if answer is not None:
            pieces.append((f"{answer} </s>", "ANS"))
    return pieces


def turn_by_turn(start, user, user_end, assistant, end, prompt, user_end_type="INST"):
    """Families that put the same words around every message."""

    def pieces_of(turns):
        pieces = list(start)
        for question, answer in turns:
            pieces += [(user, "INST"), (question, "QUE"), (user_end, user_end_type)]
            if answer is None:
                pieces.append((prompt, "INST"))
            else:
                pieces += [(assistant, "INST"), (answer, "ANS"), (end, "EOS")]
        return pieces

    return pieces_of


def published_pieces(name, system, turns):
    """The pieces and their types, family by family (reference section 4)."""
    if name.startswith("llama-2"):
        return llama_2(system or (VICUNA if name == "llama-2-vision" else None), turns)
    if name == "vicuna_v1.1":
        start = [("<s>", "BOS"), ((system or VICUNA) + " ", "SYS")]
        return turn_by_turn(start, "USER: ", " ", "ASSISTANT: ", "</s>", "ASSISTANT:")(turns)
    if name == "qwen-7b-chat":
        start = [(f"<|im_start|>system\n{system or SYSTEM}<|im_end|>\n", "SYS")]
        reply = "<|im_start|>assistant\n"
        return turn_by_turn(start, "<|im_start|>user\n", "<|im_end|>\n", reply, "<|im_end|>\n", reply)(turns)
    if name in ("microsoft-phi-3", "phi-3"):
        start = [(f"<|system|>\n{system}<|end|>\n", "SYS")] if system else []
        if name == "phi-3":
            start = [(system or SYSTEM, "SYS")]
        reply = "<|assistant|>\n"
        return turn_by_turn(start, "<|user|>\n", "<|end|>\n", reply, "<|end|>\n", reply, "EOS")(turns)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    system = system or (SYSTEM if name == "llama-3-vision" else None)
    start = [("<|begin_of_text|>", "BOS")]
    start += [(header.format("system") + system + "<|eot_id|>", "SYS")] if system else []
    reply = header.format("assistant")
    return turn_by_turn(start, header.format("user"), "<|eot_id|>", reply, "<|eot_id|>", reply)(turns)


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
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>"]
    special += ["<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in special], special_tokens=True)
    return FusedVLMProcessor(
        FusedVLMImageProcessor(size={"height": 84, "width": 84}),
        tokenizer,
        AutoTokenizer.from_pretrained(oracle.FOLDER / "clip_tokenizer"),
        image_token_id=oracle.IMAGE_TOKEN_ID,
        num_visual_tokens=M,
        num_followup_visual_tokens=FOLLOWUP,
    )


@pytest.mark.parametrize("prompt_only", [False, True], ids=["answered", "prompt"])
@pytest.mark.parametrize("system", [None, "Answer in one word."], ids=["default system", "own system"])
@pytest.mark.parametrize("name", sorted(STYLES))
def test_tokens_types_and_labels(processor, name, system, prompt_only):
    turns = list(zip(QUESTIONS, [*ANSWERS[:2], None] if prompt_only else ANSWERS, strict=True))
    text = processor.apply_chat_template(
        conversation(turns, system),
        chat_template=published_chat_template(name),
        tokenize=False,
        add_generation_prompt=prompt_only,
        published_labels=True,
    )
    inputs = processor.encode_prompts(text, return_assistant_tokens_mask=True)
    ids, labelled, group = [], [], M
    for piece, kind in published_pieces(name, system, turns):
        if kind == "QUE":
            ids += [oracle.IMAGE_TOKEN_ID] * group
            labelled += [0] * group
            group = FOLLOWUP
        # What a person typed stays text here; the published code would read it as special tokens.
        literal = {"split_special_tokens": True} if kind == "QUE" else {}
        tokens = processor.tokenizer(piece, add_special_tokens=False, **literal)["input_ids"]
        ids += tokens
        labelled += [int(kind in ("ANS", "EOS"))] * len(tokens)
    assert inputs["input_ids"][0] == ids
    assert inputs["assistant_masks"][0] == labelled
    asked = processor.query_tokenizer(QUESTIONS, add_special_tokens=False)["input_ids"]
    assert inputs["question_input_ids"] == [token for row in asked for token in row]
    assert inputs["num_visual_tokens"] == [M, FOLLOWUP, FOLLOWUP]


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


def test_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown conversation 'alpaca'; there are .*vicuna_v1\.1"):
        published_chat_template("alpaca")


def test_the_vocabulary_chooses_the_style(processor):
    assert choose_conversation(processor.tokenizer) == "llama-3-vision"
    assert choose_conversation(AutoTokenizer.from_pretrained(oracle.FOLDER / "llm_tokenizer")) == "llama-2-vision"
