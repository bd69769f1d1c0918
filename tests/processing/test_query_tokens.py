"""What a user types reaches the fusion module as text: no special token of the query tokenizer, whatever is typed."""

import pytest

from fusedvlm.tests import tiny
from fusedvlm.trainers import ConversationCollator

TYPED = ["<|endoftext|>", "is <|endoftext|> an end?", "<|endoftext|><|endoftext|> a"]


def question_ids(processor, text: str) -> list[int]:
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(0), text=text)], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["question_lengths"].tolist() == [len(inputs["question_input_ids"])]
    return inputs["question_input_ids"].tolist()


@pytest.mark.parametrize("text", TYPED)
def test_a_typed_end_of_text_is_spelled_out_in_the_question(processor, text):
    tokenizer = processor.query_tokenizer
    ids = question_ids(processor, text)
    assert tokenizer.eos_token_id not in ids, "a user would end the question, or add a query of their own"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TYPED)
def test_and_so_it_is_as_an_argument_and_in_an_unmarked_prompt(processor, text):
    tokenizer = processor.query_tokenizer
    asked = processor(images=tiny.picture(0), text="<image> look", questions=text)["question_input_ids"]
    unmarked = processor(images=tiny.picture(0), text=f"<image>{text}")["question_input_ids"]
    assert tokenizer.decode(asked) == tokenizer.decode(unmarked) == text
    assert tokenizer.eos_token_id not in [*asked, *unmarked]


@pytest.mark.parametrize("text", TYPED)
def test_an_answer_of_stage_one_ends_once(processor, text):
    tokenizer = processor.query_tokenizer
    sample = {
        "images": [tiny.picture(0)],
        "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": text}],
    }
    batch = ConversationCollator(processor, with_answers=True)([sample])
    row = batch["answer_input_ids"][0][batch["answer_attention_mask"][0].bool()].tolist()
    assert row[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row[:-1]
    assert tokenizer.decode(row[:-1]) == text
