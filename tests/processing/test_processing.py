"""The processor: one layout from every way of asking, placeholders that agree with the model, clear refusals."""

import base64
import copy
import io

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from fusedvlm.processing import (
    FusedVLMImageProcessorPil,
    FusedVLMProcessor,
    build_processor,
    clip_query_tokenizer,
    default_chat_template,
)
from fusedvlm.tests import tiny

QUESTION = "what is in the image?"


def chat(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=kwargs,
    )


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_question_arrives_the_same_way_from_chat_marked_text_and_argument(processor):
    image = tiny.picture(0)
    from_chat = chat(processor, [tiny.user(image, text=QUESTION)])
    marked = processor.apply_chat_template([tiny.user(image, text=QUESTION)], add_generation_prompt=True)
    assert same(from_chat, processor(images=image, text=marked, return_tensors="pt"))
    other = marked.replace(QUESTION, "something else")
    explicit = processor(images=image, text=other, questions=QUESTION, return_tensors="pt")
    for name in ("question_input_ids", "question_lengths", "num_visual_tokens", "pixel_values"):
        assert torch.equal(from_chat[name], explicit[name])
    raw = processor(images=image, text=f"<image>\n{QUESTION}", return_tensors="pt")
    raw_explicit = processor(
        images=image, text="<image>\nanswer in one word", questions=[QUESTION], return_tensors="pt"
    )
    expected = processor.query_tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert raw["question_input_ids"].tolist() == raw_explicit["question_input_ids"].tolist() == expected


def test_every_kind_of_image_source(processor, tmp_path):
    image = tiny.picture(3)
    image.save(tmp_path / "picture.png")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    expected = chat(processor, [tiny.user(image, text=QUESTION)])
    parts = [
        {"type": "image", "path": str(tmp_path / "picture.png")},
        {"type": "image", "image": str(tmp_path / "picture.png")},
        {"type": "image", "base64": encoded},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ]
    for part in parts:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
        assert same(chat(processor, messages), expected), part["type"]


@pytest.mark.parametrize("typed", ["<image>", "</s>", "<s>", "<|image_again|>", "<|/question|> <image>", "[INST]"])
def test_markup_typed_by_a_user_stays_text(processor, typed):
    text = f"what does {typed} mean?"
    plain = chat(processor, [tiny.user(tiny.picture(0), text="what does it mean?")])
    inputs = chat(processor, [tiny.user(tiny.picture(0), text=text)])
    ids = inputs["input_ids"][0].tolist()
    for token_id in (processor.image_token_id, processor.tokenizer.eos_token_id, processor.tokenizer.bos_token_id):
        assert ids.count(token_id) == plain["input_ids"][0].tolist().count(token_id)
    assert typed in processor.tokenizer.decode(ids)
    assert processor.query_tokenizer.decode(inputs["question_input_ids"]) == text
    assert inputs["num_visual_tokens"].tolist() == [7]


def test_prompts_of_several_lengths_need_padding_to_be_one_tensor(processor):
    conversations = [[tiny.user(tiny.picture(0), text="what?")], [tiny.user(text="hello")]]
    with pytest.raises(ValueError, match=r"^The 2 prompts have \d+ to \d+ tokens.*padding=True") as caught:
        chat(processor, conversations)
    assert len(str(caught.value)) <= 300
    assert len(chat(processor, conversations, padding=True)["input_ids"]) == 2


def test_unknown_words_do_not_become_visual_tokens(model, tmp_path):
    """Where the vocabulary has nothing else to spare, its unknown token stands for visual tokens."""
    words = ["<unk>", "<s>", "</s>", "what", "is", "USER", "ASSISTANT", ":", "[", "]", "INST", "/"]
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.image_token_id = tokenizer.unk_token_id
    processor = build_processor(config, text=str(tmp_path), query_tokenizer=tiny.query_tokenizer())
    messages = [
        tiny.user(tiny.picture(0), text="what is a zebra?"),
        tiny.assistant("unheard of"),
        tiny.user(text="so?"),
    ]
    for system in ([], [{"role": "system", "content": "be terse"}]):
        inputs = chat(processor, [*system, *messages])
        assert inputs["input_ids"].eq(tokenizer.unk_token_id).sum() == inputs["num_visual_tokens"].sum() == 7 + 3


def test_history_and_system_text_are_literal_too(processor):
    messages = [
        {"role": "system", "content": "Ignore <image> and <|question|>."},
        tiny.user(tiny.picture(0), text="one?"),
        tiny.assistant("it says </s> <image>"),
        tiny.user(text="two?"),
    ]
    inputs = chat(processor, messages)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 7 + 3
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    assert inputs["num_visual_tokens"].tolist() == [7, 3]


def test_placeholders_agree_with_what_the_model_produces(model, processor):
    messages = [
        [
            tiny.user(tiny.picture(1), tiny.picture(2), text="a"),
            tiny.assistant("b"),
            tiny.user(tiny.picture(3), text="c"),
        ],
        [tiny.user(text="no image")],
        [tiny.user(tiny.picture(4, 30, 80), text="d")],
    ]
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "num_visual_tokens": [5, 7, 12], "num_followup_visual_tokens": [2, 3, 9]},
    )
    placeholders = (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()
    assert placeholders == [5 * 3 + 2 * 2, 0, 12]
    pixels = inputs.pop("pixel_values")
    image_side = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    features = model.get_image_features(pixel_values=pixels, return_dict=True, **image_side)
    assert features.visual_tokens_per_sample == placeholders
    assert [len(tokens) for tokens in features.pooler_output] == [5 * 3 + 2 * 2, 12]


def test_joining_two_batches_is_concatenation(processor):
    one = chat(processor, [tiny.user(tiny.picture(1), text="a b c")])
    other = chat(processor, [tiny.user(tiny.picture(2), tiny.picture(3), text="longer question")])
    both = processor.apply_chat_template(
        [
            [tiny.user(tiny.picture(1), text="a b c")],
            [tiny.user(tiny.picture(2), tiny.picture(3), text="longer question")],
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    for name in both:
        if name not in ("input_ids", "attention_mask"):
            assert torch.equal(both[name], torch.cat([one[name], other[name]])), name


def test_assistant_mask_covers_answers_and_their_eos(processor):
    messages = [
        tiny.user(tiny.picture(0), text="one?"),
        tiny.assistant("yes, a cat"),
        tiny.user(text="two?"),
        tiny.assistant("no"),
    ]
    inputs = processor.apply_chat_template(
        [messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": "max_length", "max_length": 260, "padding_side": "right"},
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()
    assert mask.shape == inputs["input_ids"].shape
    assert processor.tokenizer.decode(inputs["input_ids"][mask]) == "yes, a cat </s>no </s>"


def test_any_llms_own_chat_template_can_be_kept(processor):
    chatml = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = processor.apply_chat_template(
        [tiny.user(tiny.picture(0), text="hi <|im_end|>"), tiny.assistant("yes")],
        chat_template=default_chat_template(chatml),
    )
    assert text.startswith("<|im_start|>user\n<image><|question|>hi <")
    assert "<|answer|>yes<|/answer|><|im_end|>" in text
    assert text.count("<|im_end|>") == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "<image> a", "images": None}, r"\[1\] <image> markers but no images"),
        ({"text": "a", "images": [tiny.picture(0)]}, "0 <image> markers .* 1 images"),
        (
            {"text": ["<image> a", "<image> b"], "images": [[tiny.picture(0), tiny.picture(1)], []]},
            "Sample 0: 1 <image> markers in the text but 2 images",
        ),
        ({"text": "<image> a", "images": tiny.picture(0), "num_visual_tokens": 13}, "num_visual_tokens=13 .* 1 to 12"),
        ({"text": "<image> a", "images": tiny.picture(0), "num_visual_tokens": 0}, "num_visual_tokens=0 .* 1 to 12"),
        ({"text": ["<image> a"], "images": [tiny.picture(0)], "num_visual_tokens": [1, 2]}, "2 entries for 1 prompts"),
        ({"text": "<image> a", "images": tiny.picture(0), "questions": ["a", "b"]}, "2 .*questions"),
        ({"text": "<image> a", "images": tiny.picture(0), "questions": " "}, "question 0 is empty"),
        ({"text": None, "images": None}, "Give text, images or both"),
        ({"text": []}, "non-empty"),
        ({"text": "<image> a", "images": tiny.picture(0), "truncation": True, "max_length": 4}, "cut visual tokens"),
    ],
)
def test_refusals_say_what_is_wrong(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(**kwargs)


def test_empty_question_and_ten_thousand_words_are_refused(processor):
    with pytest.raises(ValueError, match="Sample 0: question 0 is empty"):
        chat(processor, [tiny.user(tiny.picture(0), text="  ")])
    with pytest.raises(ValueError, match=r"Sample 0: the prompt has \d+ tokens, 7 of them visual.* at most 1024"):
        chat(processor, [tiny.user(tiny.picture(0), text="word " * 10_000)])


def test_saved_processor_comes_back_whole(processor, variant):
    again = AutoProcessor.from_pretrained(variant)
    assert type(again).__name__ == "FusedVLMProcessor"
    messages = [tiny.user(tiny.picture(0), text=QUESTION)]
    assert same(chat(processor, messages), chat(again, messages))
    assert again.query_tokenizer.vocab_size == processor.query_tokenizer.vocab_size
    assert again.max_num_visual_tokens == 12
    assert again.tokenizer.padding_side == "left"


def test_missing_query_tokenizer_is_an_error_not_a_silent_swap(variant, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(variant, broken)
    shutil.rmtree(broken / "query_tokenizer")
    with pytest.raises((OSError, ValueError)):
        AutoProcessor.from_pretrained(broken)


def test_pil_backend_gives_the_same_batch(model, processor):
    twin = FusedVLMProcessor(
        FusedVLMImageProcessorPil(size={"height": 24, "width": 24}, max_local_views=2),
        processor.tokenizer,
        processor.query_tokenizer,
        image_token_id=3,
        num_visual_tokens=7,
        num_followup_visual_tokens=3,
        max_num_visual_tokens=12,
        chat_template=processor.chat_template,
    )
    messages = [tiny.user(tiny.picture(0), text=QUESTION)]
    one, other = chat(processor, messages), chat(twin, messages)
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(one["input_ids"], other["input_ids"])


def test_clip_bpe_equals_open_clips():
    open_clip = pytest.importorskip("open_clip")
    source, ours = open_clip.tokenizer.SimpleTokenizer(), clip_query_tokenizer()
    assert ours.vocab_size == 49408
    assert ours.eos_token_id == 49407
    for text in ("What is in the image?", "It's 10:45am; naïve café!", "日本 😀"):
        assert ours(text, add_special_tokens=False)["input_ids"] == source.encode(text)


def test_number_of_tokens_and_views_from_sizes_alone(processor):
    data = processor._get_num_multimodal_tokens([(40, 60), (24, 24)], num_visual_tokens=5)
    assert data["num_image_tokens"] == [5, 5]
    batch = processor.image_processor([tiny.picture(0, 60, 40), tiny.picture(0, 24, 24)], return_tensors="pt")
    assert data["num_image_patches"] == batch["image_num_views"].tolist()


def test_tokenizer_without_spare_token_is_refused(processor, tmp_path):
    from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import find_image_token_id

    without = clip_query_tokenizer()
    with pytest.raises(ValueError, match="no <image> token; pass image_token_id="):
        FusedVLMProcessor(processor.image_processor, without, processor.query_tokenizer)
    processor.tokenizer.save_pretrained(tmp_path / "with")
    assert find_image_token_id(str(tmp_path / "with"), None) == processor.image_token_id
    tiny.query_tokenizer().save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="pass image_token_id="):
        find_image_token_id(str(tmp_path / "without"), None)
