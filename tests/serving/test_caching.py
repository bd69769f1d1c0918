"""What is kept between questions changes no answer: every test has its twin that computes everything anew."""

import itertools

import numpy as np
import pytest
import torch
from transformers import MistralConfig
from transformers.cache_utils import DynamicCache

from fusedvlm.serving import VisualChat, user_message
from fusedvlm.serving.byte_cache import ByteCache, know_image, size_of
from fusedvlm.serving.prefix_cache import PrefixCache
from fusedvlm.tests import tiny

QUESTIONS = ["what is it?", "which colour is it?", "how many objects are there on the sofa?", "yes or no"]
OTHERS = {
    "published rows": {"fusion_row_per_turn": False},
    "no question": {"fuse_question": False},
    "no question, published rows": {"fuse_question": False, "fusion_row_per_turn": False},
    "pool": {"connector": "pool", "fuser_config": None, "num_visual_tokens": None, "trained_num_visual_tokens": None,
             "num_followup_visual_tokens": None},
    "anchored": {"connector": "anchored", "fuser_config": None, "num_visual_tokens": None,
                 "trained_num_visual_tokens": None, "num_followup_visual_tokens": None},
}  # fmt: skip


def naive(model, processor, conversation, m=None, new=8):
    """The answer of `generate` on a batch of its own."""
    counts = {} if m is None else {"num_visual_tokens": m}
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs=counts,
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def chat(variant):
    return VisualChat(variant, device="cpu")


def test_every_question_image_and_m_is_answered_as_without_caches(chat, model, processor):
    asked = [*itertools.product(range(3), QUESTIONS, (1, 7, 12))]
    expected = {
        case: naive(model, processor, [user_message(tiny.picture(case[0]), case[1])], case[2]) for case in asked
    }
    assert len(set(expected.values())) > len(asked) / 3  # answers that depend on nothing would prove nothing
    for case in [*asked, *reversed(asked)]:
        image, question, m = case
        assert chat.ask(tiny.picture(image), question, m, max_new_tokens=8) == expected[case], case
    assert chat.answerer.encoder.counts.tower_images == 3
    assert chat.answerer.encoder.counts.questions == len(asked)


def converse(answer, questions, m):
    """Five turns, a second picture in the third; `answer` gives each."""
    conversation, answers = [], []
    for turn, question in enumerate(questions):
        shown = {0: [tiny.picture(1)], 2: [tiny.picture(2)]}.get(turn, [])
        conversation.append(user_message(shown, question))
        answers.append(answer(conversation, m))
        conversation.append(tiny.assistant(answers[-1]))
    return answers


@pytest.mark.parametrize("m", [1, 7])
def test_conversations_go_on_from_where_they_were(chat, model, processor, m):
    chat.answerer.clear()
    before = chat.answerer.prefixes.reused_tokens
    answers = converse(lambda c, m: chat.reply_batch([c], m, max_new_tokens=8)[0], QUESTIONS, m)
    assert answers == converse(lambda c, m: naive(model, processor, c, m), QUESTIONS, m)
    assert chat.answerer.prefixes.reused_tokens - before > 100
    streamed = converse(lambda c, m: "".join(chat.stream(c, m, max_new_tokens=8)).strip(), QUESTIONS, m)
    assert streamed == answers


@pytest.mark.parametrize("name", OTHERS)
def test_other_variants_converse_as_without_caches(backbones, tmp_path, name):
    model = tiny.build_model(backbones, **OTHERS[name])
    processor = tiny.build_tiny_processor(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = VisualChat(tmp_path, device="cpu")
    expected = converse(lambda c, m: naive(model, processor, c, m), QUESTIONS, None)
    assert converse(lambda c, m: chat.reply_batch([c], m, max_new_tokens=8)[0], QUESTIONS, None) == expected
    # Once more, and from the second turn on without what came before, which is then read question by question.
    runs = chat.answerer.encoder.counts.tower_images
    assert converse(lambda c, m: chat.reply_batch([c], m, max_new_tokens=8)[0], QUESTIONS, None) == expected
    assert chat.answerer.encoder.counts.tower_images == runs == 2

    def forgetful(conversation, m):
        chat.answerer.clear()
        return chat.reply_batch([conversation], m, max_new_tokens=8)[0]

    assert converse(forgetful, QUESTIONS, None) == expected


@pytest.mark.parametrize("row_per_turn", [True, False])
def test_a_batch_of_mixed_views_counts_and_histories_is_that_of_single_ones(backbones, tmp_path, row_per_turn):
    model = tiny.build_model(backbones, fusion_row_per_turn=row_per_turn)
    processor = tiny.build_tiny_processor(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = VisualChat(tmp_path, device="cpu")
    wide, tall = tiny.picture(4, 200, 30), tiny.picture(5, 30, 31)
    conversations = [
        [user_message(wide, "what?")],
        [user_message([wide, tall], "which one is red?")],
        [user_message(tall, "what?"), tiny.assistant("a cat"), user_message([], "sure?")],
        [user_message([], "hello")],
        [user_message(wide, "what?"), tiny.assistant("a cat"), user_message(tall, "and this?")],
    ]
    counts = [12, 3, 7, 5, 1]
    single = [naive(model, processor, c, m) for c, m in zip(conversations, counts, strict=True)]
    assert chat.reply_batch(conversations, counts, max_new_tokens=8) == single
    assert chat.answerer.encoder.counts.tower_images == 2


def test_a_cache_of_any_size_gives_the_same_answers(variant, model, processor):
    expected = converse(lambda c, m: naive(model, processor, c, m), QUESTIONS, 7)
    for size in (0, 1, 2_000, 20_000, 200_000):
        chat = VisualChat(variant, device="cpu", cache_bytes=size, language_cache_bytes=size)
        assert converse(lambda c, m: chat.reply_batch([c], m, max_new_tokens=8)[0], QUESTIONS, 7) == expected  # noqa: B023
        assert chat.answerer.encoder.cache.num_bytes <= size
        assert chat.answerer.prefixes.cache.num_bytes <= size


def test_settings_of_generate_that_share_no_cache_work_on(chat, model, processor):
    conversation = [user_message(tiny.picture(1), "what?")]
    inputs = chat.prepare([conversation], 7)
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    text = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert chat.reply_batch([conversation], 7, max_new_tokens=6, num_beams=3)[0] == text
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, repetition_penalty=1.7)
    text = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert chat.reply_batch([conversation], 7, max_new_tokens=6, repetition_penalty=1.7)[0] == text


def test_a_language_model_whose_cache_cannot_be_cut_reads_every_prompt_anew(tmp_path):
    """With a sliding window the older keys are gone, and nothing could go on from the middle."""
    llm = MistralConfig(
        vocab_size=len(tiny.text_tokenizer()), hidden_size=48, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiny.save_backbones(tmp_path, llm_config=llm)
    model = tiny.build_model(tmp_path)
    processor = tiny.build_tiny_processor(model)
    model.save_pretrained(tmp_path / "variant")
    processor.save_pretrained(tmp_path / "variant")
    chat = VisualChat(tmp_path / "variant", device="cpu")
    expected = converse(lambda c, m: naive(model, processor, c, m), QUESTIONS[:2], 7)
    assert converse(lambda c, m: chat.reply_batch([c], m, max_new_tokens=8)[0], QUESTIONS[:2], 7) == expected
    assert chat.answerer.prefixes.reused_tokens == 0
    assert chat.answerer.encoder.counts.tower_images == 1


def test_one_cache_may_serve_several_models(variant, backbones, tmp_path, processor):
    other = tiny.build_model(backbones, seed=5)
    other.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shared = ByteCache(10_000_000)
    chats = [VisualChat(folder, device="cpu", cache=shared) for folder in (variant, tmp_path)]
    alone = [VisualChat(folder, device="cpu").ask(tiny.picture(1), "what?") for folder in (variant, tmp_path)]
    assert [chat.ask(tiny.picture(1), "what?") for chat in chats] == alone
    assert alone[0] != alone[1]


def test_the_least_recently_used_leave_first():
    cache = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert (cache.get("b"), cache.get("a"), cache.get("c"), cache.num_bytes) == (None, 1, 3, 8)
    cache.put("d", 4, 11)
    assert cache.get("d") is None
    cache.put("a", 5, 2)
    assert (cache.get("a"), cache.num_bytes, cache.evictions) == (5, 6, 1)
    with pytest.raises(ValueError, match="max_bytes=-1"):
        ByteCache(-1)


def test_pictures_are_known_by_their_content(tmp_path):
    image = tiny.picture(1)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    same = {know_image(source).key for source in (image, image.copy(), tmp_path / "a.png", str(tmp_path / "b.bmp"))}
    assert len(same) == 1
    array = np.asarray(image)
    keys = [know_image(source).key for source in (array, array.reshape(60, 40, 3), array.astype(np.float32), array + 1)]
    assert len(set(keys)) == 4
    assert know_image((tmp_path / "a.png").read_bytes()).key == know_image((tmp_path / "a.png").read_bytes()).key
    assert know_image(torch.from_numpy(array.copy())).key == know_image(torch.from_numpy(array.copy())).key


def test_prefixes_of_other_prompts_are_not_taken(model):
    prefixes = PrefixCache(10_000_000)
    state, length = prefixes.take(list(range(10)))
    assert (state, length) == (None, 0)
    state = DynamicCache()
    ids = torch.arange(5, 15)[None]
    model.model.language_model(input_ids=ids, past_key_values=state, use_cache=True)
    prefixes.keep(ids[0].tolist(), state)
    taken, length = prefixes.take([*range(5, 12), 99, 100])
    assert (length, taken.get_seq_length()) == (7, 7)
    assert torch.equal(taken.layers[0].keys, state.layers[0].keys[:, :, :7])
    assert prefixes.take(list(range(5, 15)))[1] == 9  # one is left to read
    assert prefixes.take([4, *range(6, 15)])[1] == 0
    assert prefixes.cache.num_bytes >= size_of(state)
