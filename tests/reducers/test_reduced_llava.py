"""LLaVA-1.5 and LLaVA-NeXT of transformers answer through reduced tokens, in batches as one by one."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    set_seed,
)

from fusedvlm.reducers import REDUCERS, ClipQuestions, ReducedLlava, VisionZip, read_tower

CLIP_TINY = Path(__file__).parents[1] / "oracle" / "reducers" / "clip_tiny"
IMAGE = 199
QUESTION = "What is on the left?"


@lru_cache
def model(kind: str, attention: str = "sdpa"):
    set_seed(0)
    vision = CLIPModel.from_pretrained(CLIP_TINY).vision_model
    text = LlamaConfig(
        vocab_size=200, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    sizes = {"vision_config": CLIPVisionConfig.from_dict(vision.config.to_dict()), "text_config": text}
    shared = {"image_token_index": IMAGE, "vision_feature_layer": -2}
    if kind == "llava":
        made = LlavaForConditionalGeneration(LlavaConfig(**sizes, **shared))
    else:
        pinpoints = [[84, 168], [168, 84], [168, 168]]
        made = LlavaNextForConditionalGeneration(LlavaNextConfig(**sizes, **shared, image_grid_pinpoints=pinpoints))
    made.model.vision_tower.load_state_dict(vision.state_dict())
    made.set_attn_implementation(attention)
    return made.eval()


@lru_cache
def clip_questions() -> ClipQuestions:
    return ClipQuestions(str(CLIP_TINY))


def reduced(kind: str, name: str, budget: int | None = None, attention: str = "sdpa") -> ReducedLlava:
    return ReducedLlava(model(kind, attention), name, budget, clip_questions())


def batch(kind: str) -> dict:
    """Three prompts, left-padded as processors do: one image, two images, none."""
    generator = torch.Generator().manual_seed(1)
    if kind == "llava":
        images = {"pixel_values": torch.randn(3, 3, 84, 84, generator=generator)}
        counts = [36, 36, 36]
    else:
        sizes = torch.tensor([[160, 160], [80, 168], [60, 160]])  # the last leaves padding on its tiles
        pixels = torch.randn(3, 5, 3, 84, 84, generator=generator)
        images = {"pixel_values": pixels, "image_sizes": sizes}
        counts = ReducedLlava(model(kind), "random").own_counts(**images)
    rows = [
        [1, *[IMAGE] * counts[0], 7, 8],
        [1, *[IMAGE] * counts[1], 9, *[IMAGE] * counts[2], 10, 11, 12],
        [1, 20, 21],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **images}


def alone(whole: dict, row: int, images: list[int]) -> dict:
    kept = whole["attention_mask"][row].bool()
    one = {"input_ids": whole["input_ids"][row][kept][None], "attention_mask": torch.ones(1, int(kept.sum())).long()}
    for name in ("pixel_values", "image_sizes"):
        if name in whole and images:
            one[name] = whole[name][images]
    return one


def ask(llava: ReducedLlava, inputs: dict) -> torch.Tensor:
    images = len(inputs.get("pixel_values", ()))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return llava.generate(questions=[QUESTION] * images, **inputs, **options)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_mixed_batch_answers_as_one_by_one(kind, name):
    llava, whole = reduced(kind, name, 9), batch(kind)
    together = ask(llava, whole)
    for row, images in ((0, [0]), (1, [1, 2]), (2, [])):
        assert ask(llava, alone(whole, row, images))[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("name", REDUCERS)
def test_all_tokens_kept_are_the_models_own_features_and_answers(kind, name):
    llava, whole = reduced(kind, name), batch(kind)
    images = {key: whole[key] for key in ("pixel_values", "image_sizes") if key in whole}
    own = model(kind).get_image_features(**images, return_dict=True).pooler_output
    for ours, theirs in zip(llava.image_features(**images), own, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    new = model(kind).generate(**whole, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ask(llava, whole).tolist() == new[:, whole["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", REDUCERS)
def test_tokens_just_below_all_are_the_projected_patches(name):
    """The path that reduces, fed with everything, equals the model's own: only the reducer's rule lies between."""
    llava = reduced("llava", name, 36)
    pixels = batch("llava")["pixel_values"]
    tower = read_tower(model("llava").model.vision_tower, pixels, -2)
    projected = model("llava").model.multi_modal_projector(tower.tokens)
    assert torch.allclose(torch.stack(llava.image_features(pixel_values=pixels)), projected, atol=1e-6)


@pytest.mark.parametrize("name", REDUCERS)
def test_the_attention_kernel_does_not_matter(name):
    pixels = batch("llava")["pixel_values"]
    asked = [QUESTION] * 3
    fused = reduced("llava", name, 9, "sdpa").image_features(asked, pixel_values=pixels)
    eager = reduced("llava", name, 9, "eager").image_features(asked, pixel_values=pixels)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, eager, strict=True))


def test_budgets_are_stated_per_view_and_in_total():
    whole = batch("llava_next")
    llava = reduced("llava_next", "visionzip", 9)
    budgets = llava.budgets(pixel_values=whole["pixel_values"], image_sizes=whole["image_sizes"])
    assert [(b.per_view, b.views, b.total) for b in budgets] == [(9, 5, 45), (9, 3, 27), (9, 3, 27)]
    lengths = [
        len(f) for f in llava.image_features(pixel_values=whole["pixel_values"], image_sizes=whole["image_sizes"])
    ]
    assert lengths == [45, 27, 27]


def test_next_reduces_base_view_and_tiles_one_by_one():
    whole, llava = batch("llava_next"), reduced("llava_next", "vispruner", 4)
    image = llava.image_features(pixel_values=whole["pixel_values"][:1], image_sizes=whole["image_sizes"][:1])[0]
    tower = read_tower(model("llava_next").model.vision_tower, whole["pixel_values"][0], -2)
    expected = model("llava_next").model.multi_modal_projector(llava.reducer(tower, 4)).flatten(0, 1)
    assert torch.allclose(image, expected, atol=1e-6)


def test_labels_are_shortened_with_the_prompt():
    whole = alone(batch("llava"), 1, [1, 2])
    labels = torch.where(whole["input_ids"] >= 10, whole["input_ids"], -100)
    labels[whole["input_ids"] == IMAGE] = -100
    llava = reduced("llava", "random", 4)
    prepared = llava.prepare(**whole, labels=labels)
    assert prepared["labels"].shape == prepared["inputs_embeds"].shape[:2] == (1, 1 + 4 + 1 + 4 + 3)
    assert prepared["labels"][0, -3:].tolist() == [10, 11, 12]
    assert torch.isfinite(llava(**whole, labels=labels).loss)


def test_what_does_not_fit_is_refused_in_one_line():
    whole = batch("llava")
    with pytest.raises(ValueError, match="clip_questions"):
        ReducedLlava(model("llava"), "cdpruner", 9)
    with pytest.raises(ValueError, match="no questions for 3 images"):
        reduced("llava", "cdpruner", 9).image_features(pixel_values=whole["pixel_values"])
    with pytest.raises(ValueError, match="9 or 16, not 12"):
        reduced("llava", "average", 12)
    with pytest.raises(ValueError, match="a view has 36"):
        reduced("llava", "random", 37)
    with pytest.raises(ValueError, match="not 'llama'"):
        ReducedLlava(type("Other", (), {"config": LlamaConfig()})(), "random", 4)
    with pytest.raises(ValueError, match="image_sizes"):
        reduced("llava_next", "random", 4).image_features(pixel_values=batch("llava_next")["pixel_values"])
    short = {**whole, "pixel_values": whole["pixel_values"][:2]}
    with pytest.raises(ValueError, match="108 image placeholders, their 2 images fill 72"):
        reduced("llava", "random", 4).prepare(**short)


def test_a_split_of_the_callers_with_everything_kept_has_the_class_token():
    llava = ReducedLlava(model("llava"), VisionZip(contextual_tokens=0), 36)
    pixels = batch("llava")["pixel_values"]
    tower = read_tower(model("llava").model.vision_tower, pixels, -2)
    first = model("llava").model.multi_modal_projector(tower.class_token)
    assert torch.allclose(torch.stack(llava.image_features(pixel_values=pixels))[:, :1], first, atol=1e-6)
