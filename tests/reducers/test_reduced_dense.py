"""A dense variant answers through reduced tokens, in batches of mixed views as one by one."""

import pytest
import torch

from fusedvlm.reducers import REDUCERS, ReducedDense, read_tower
from fusedvlm.tests.tiny import assistant, build_model, build_tiny_processor, picture, user

NAMES = [name for name, reducer in REDUCERS.items() if not reducer.reads_question]
FIXED = {"num_visual_tokens": 36, "trained_num_visual_tokens": [36], "num_followup_visual_tokens": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model = build_model(folder, connector="dense", fuser_config=None, initializer_range=0.3, **FIXED)
    return model, build_tiny_processor(model)


CHATS = [
    [user(picture(0, 60, 40), text="what is in the image?")],  # three views
    [
        user(picture(1, 20, 20), text="how many?"),
        assistant("yes"),
        user(text="and now?"),
        assistant("no"),
        user(picture(2, 50, 24), text="describe the picture"),
    ],
    [user(text="hello")],
]


def inputs_of(processor, chats) -> dict:
    return dict(
        processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
    )


OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("name", NAMES)
def test_mixed_conversations_answer_as_one_by_one(dense, name):
    model, processor = dense
    reduced = ReducedDense(model, name, 9)
    together = reduced.generate(**inputs_of(processor, CHATS), **OPTIONS)
    for chat, answer in zip(CHATS, together, strict=True):
        assert reduced.generate(**inputs_of(processor, [chat]), **OPTIONS)[0].tolist() == answer.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_all_patches_kept_answer_as_the_model_itself(dense, name):
    model, processor = dense
    inputs = inputs_of(processor, CHATS)
    own = model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    assert ReducedDense(model, name).generate(**inputs, **OPTIONS).tolist() == own.tolist()


def test_the_layer_read_is_the_dense_connectors(dense):
    model, processor = dense
    pixels = inputs_of(processor, CHATS)["pixel_values"]
    with torch.no_grad():
        tower = read_tower(model.model.vision_tower, pixels, -2)
        own = model.model.get_view_features(pixels)[0]
    assert torch.allclose(tower.tokens, own, atol=1e-6)


def test_budgets_count_views(dense):
    model, processor = dense
    inputs = inputs_of(processor, CHATS)
    budgets = ReducedDense(model, "random", 5).budgets(
        pixel_values=inputs["pixel_values"], image_num_views=inputs["image_num_views"]
    )
    assert [budget.total for budget in budgets] == [5 * views for views in inputs["image_num_views"].tolist()]


def test_other_connectors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="connector='fused' has none"):
        ReducedDense(build_model(tmp_path), "random", 4)
