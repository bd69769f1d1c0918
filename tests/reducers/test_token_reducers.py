"""Reducers compute what their published code computes, view by view, within exactly the budget asked for."""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, SiglipVisionConfig, SiglipVisionModel

from fusedvlm.reducers import (
    REDUCERS,
    CDPruner,
    ClipQuestions,
    TowerFeatures,
    VisionZip,
    VisPruner,
    build_reducer,
    read_tower,
)

CASES = Path(__file__).parents[1] / "oracle" / "reducers"
TOLERANCE = 5e-5


def cases(method: str) -> tuple[dict, dict]:
    return dict(np.load(CASES / method / "cases.npz")), json.loads((CASES / method / "cases.json").read_text())


@lru_cache
def clip(attention: str = "sdpa") -> CLIPModel:
    return CLIPModel.from_pretrained(CASES / "clip_tiny", attn_implementation=attention).eval()


@lru_cache
def features(attention: str = "sdpa") -> TowerFeatures:
    images = torch.from_numpy(np.load(CASES / "clip_tiny" / "images_fp16.npy")).float()
    with torch.no_grad():
        return read_tower(clip(attention).vision_model, images)


@lru_cache
def questions() -> ClipQuestions:
    return ClipQuestions(clip(), AutoTokenizer.from_pretrained(CASES / "clip_tiny"))


def project(tokens: torch.Tensor, method: str) -> torch.Tensor:
    weights = load_file(CASES / method / "projector.safetensors")
    hidden = F.gelu(F.linear(tokens, weights["0.weight"], weights["0.bias"]))
    return F.linear(hidden, weights["2.weight"], weights["2.bias"])


def with_question(source: TowerFeatures, text: str = "What is on the left?") -> TowerFeatures:
    similarity = questions().similarity(source, [text] * len(source.tokens))
    return source.with_question(project(source.tokens, "cdpruner"), similarity)


def assert_close(ours: torch.Tensor, published: np.ndarray) -> None:
    assert tuple(ours.shape) == published.shape
    error = np.abs(ours.detach().numpy() - published) / np.maximum(1, np.abs(published))
    assert error.max() <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_attention_keys_and_states_are_the_towers_own(attention):
    arrays, _ = cases("visionzip")
    ours = features(attention)
    assert_close(ours.tokens, arrays["hidden_states_m2"][:, 1:])
    assert_close(ours.class_token, arrays["hidden_states_m2"][:, :1])
    assert_close(ours.class_attention, arrays["cls_attention_m2"].mean(1)[:, 1:])
    assert_close(ours.keys, arrays["metric"][:, 1:])


@pytest.mark.parametrize("case", cases("visionzip")[1]["cases"], ids=lambda case: case["key"])
def test_visionzip_equals_published_code(case):
    arrays, _ = cases("visionzip")
    reducer = VisionZip(contextual_tokens=case["contextual_argument"])
    assert_close(reducer(features(), case["total_tokens"]), arrays[f"{case['key']}_tokens"])


@pytest.mark.parametrize("case", cases("vispruner")[1]["cases"], ids=lambda case: case["key"])
def test_vispruner_equals_published_code_where_that_works(case):
    arrays, _ = cases("vispruner")
    reducer, budget = VisPruner(case["important_ratio"]), case["visual_token_num"]
    assert reducer.positions(features(), budget).tolist() == case["selected_raster"]
    assert_close(project(reducer(features(), budget), "vispruner"), arrays[f"{case['key']}_tokens"])


@pytest.mark.parametrize("case", cases("cdpruner")[1]["cases"], ids=lambda case: case["key"])
def test_cdpruner_equals_published_code_called_image_by_image(case):
    arrays, facts = cases("cdpruner")
    asked = with_question(features(), facts["texts"][case["text"]])
    relevance = CDPruner.relevance(asked.question_similarity)
    assert_close(relevance, arrays[f"{case['text']}_relevance_single"])
    assert CDPruner().positions(asked, case["visual_token_num"]).tolist() == case["selected_raster"]
    assert_close(project(CDPruner()(asked, case["visual_token_num"]), "cdpruner"), arrays[f"{case['key']}_tokens"])


@pytest.mark.parametrize("name", ["short", "long"])
def test_questions_are_cut_into_rows_as_published(name):
    arrays, facts = cases("cdpruner")
    ids, _ = questions().rows(facts["texts"][name])
    assert ids.flatten()[: len(arrays[f"text_{name}_ids"])].tolist() == arrays[f"text_{name}_ids"].tolist()
    assert_close(questions().embed(facts["texts"][name]), arrays[f"text_{name}_embeds"])


@pytest.mark.parametrize("budget", range(1, 36))
@pytest.mark.parametrize("name", ["random", "visionzip", "vispruner", "cdpruner"])
def test_every_budget_gives_exactly_that_many_distinct_tokens(name, budget):
    tokens = build_reducer(name)(with_question(features()), budget)
    assert tokens.shape == (3, budget, 64)
    assert all(len(view.unique(dim=0)) == budget for view in tokens)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_vispruner_keeps_its_important_half_at_budgets_where_published_code_fails(share):
    for budget in range(1, 37):
        kept = VisPruner(share).positions(features(), budget)
        assert all(len(set(row)) == budget for row in kept.tolist())
        most_attended = features().class_attention.topk(max(1, int(budget * share))).indices
        if int(budget * share):
            assert all(set(want) <= set(row) for want, row in zip(most_attended.tolist(), kept.tolist(), strict=True))


@pytest.mark.parametrize("name", REDUCERS)
def test_all_patches_kept_are_the_features_themselves(name):
    assert torch.equal(build_reducer(name)(with_question(features()), 36), features().tokens)


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("budget", [1, 4, 9, 16])
def test_a_view_alone_gives_what_it_gives_in_a_batch(name, budget):
    whole, reducer = with_question(features()), build_reducer(name)
    together = reducer(whole, budget)
    for view in range(3):
        parts = {
            field: getattr(whole, field)[view : view + 1]
            for field in (f.name for f in dataclasses.fields(TowerFeatures))
        }
        assert torch.allclose(reducer(TowerFeatures(**parts), budget)[0], together[view], atol=1e-6)


def test_each_view_answers_to_its_own_question():
    texts = ["What is on the left?", "how many red cups are there on the table today", "a cat"]
    mixed = questions().similarity(features(), texts)
    for view, text in enumerate(texts):
        assert torch.allclose(mixed[view], questions().similarity(features(), [text] * 3)[view], atol=1e-6)


def test_average_tokens_are_means_of_their_windows():
    tokens = build_reducer("average")(features(), 4)
    grid = features().tokens.unflatten(1, (6, 6))
    assert torch.allclose(tokens[:, 1], grid[:, :3, 3:].mean((1, 2)), atol=1e-6)
    assert torch.allclose(tokens[:, 2], grid[:, 3:, :3].mean((1, 2)), atol=1e-6)


def test_visionzip_with_a_stated_split_keeps_everything_as_published():
    tokens = VisionZip(contextual_tokens=1)(features(), 37)
    everything = torch.cat([features().class_token, features().tokens], 1)
    for ours, own in zip(tokens, everything, strict=True):
        assert torch.allclose(ours.sort(0).values, own.sort(0).values, atol=1e-6)
    assert torch.equal(VisionZip(contextual_tokens=0)(features(), 1), features().class_token)


def test_a_larger_random_budget_keeps_what_a_smaller_one_kept():
    reducer = build_reducer("random", seed=3)
    small, large = (set(reducer.positions(features(), k)[0].tolist()) for k in (5, 20))
    assert small < large
    assert set(build_reducer("random", seed=4).positions(features(), 5)[0].tolist()) != small


def test_cdpruner_greedy_choice_is_the_largest_determinant_at_each_step():
    asked = with_question(features())
    directions = F.normalize(asked.projected, dim=-1).double()
    relevance = CDPruner.relevance(asked.question_similarity).double()
    for view in range(3):
        kernel = relevance[view, :, None] * (directions[view] @ directions[view].T) * relevance[view]
        chosen: list[int] = []
        for _ in range(6):
            others = [n for n in range(36) if n not in chosen]
            chosen.append(max(others, key=lambda n: float(torch.det(kernel[[*chosen, n]][:, [*chosen, n]]))))
        assert CDPruner().positions(asked, 6)[view].tolist() == sorted(chosen)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_cdpruner_fills_its_budget_when_features_span_less(rank):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 36, rank, generator=generator) @ torch.randn(rank, 48, generator=generator)
    asked = with_question(features())
    spanned = TowerFeatures(asked.tokens[:2], projected=flat, question_similarity=asked.question_similarity[:2])
    kept = CDPruner().positions(spanned, 16)
    assert all(len(set(row)) == 16 for row in kept.tolist())


def test_what_cannot_be_kept_is_refused_in_one_line():
    for name, budget, says in [
        ("average", 10, "9 or 16, not 10"),
        ("random", 0, "36 patches"),
        ("vispruner", 37, "37 tokens per view"),
        ("cdpruner", 2.5, "2.5 tokens"),
    ]:
        with pytest.raises(ValueError, match=says) as error:
            build_reducer(name)(with_question(features()), budget)
        assert len(str(error.value)) <= 300
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a view has 37"):
        VisionZip(contextual_tokens=10)(features(), 40)
    with pytest.raises(ValueError, match="no place for the class token"):
        VisionZip(contextual_tokens=4)(features(), 4)
    with pytest.raises(ValueError, match="reads projected"):
        CDPruner()(features(), 4)
    with pytest.raises(ValueError, match="reducers are random"):
        build_reducer("magic")
    with pytest.raises(ValueError, match="its options are important_share"):
        build_reducer("vispruner", share=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        VisPruner(1.5)
    with pytest.raises(ValueError, match="empty question"):
        questions().embed("  ")


def test_towers_without_a_class_token_and_layers_nobody_made_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes))
    with pytest.raises(ValueError, match="class token"):
        read_tower(siglip, torch.zeros(1, 3, 16, 16))
    for layer in (0, -4, 4, [-2, -1]):
        with pytest.raises(ValueError, match="-3 to -1"):
            read_tower(clip().vision_model, torch.zeros(1, 3, 84, 84), layer)
