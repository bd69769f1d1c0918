"""View tokens on disk: the same training, computed once, and nothing stale is ever found."""

import pytest
import torch
from PIL import Image

from fusedvlm.data import Mixture
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import arguments
from fusedvlm.trainers import GenerationArguments, GenerationTrainer, MixtureEpochs
from fusedvlm.trainers.view_cache import CachedViews, ViewCache, image_digest, tower_key

FROZEN = ["model.vision_tower.", "model.merger."]


@pytest.fixture
def samples(tmp_path):
    """Files, a picture, two images in one sample, and text alone."""
    rows = []
    for number in range(5):
        tiny.picture(number, 30 + 10 * number, 40).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "images": [str(tmp_path / f"{number}.png")],
                "messages": [tiny.user(text=f"question {number}?"), tiny.assistant(f"answer {number}")],
            }
        )
    rows[1]["images"] = [tiny.picture(7)]
    rows[2]["images"] = [rows[0]["images"][0], rows[4]["images"][0]]
    rows[3].pop("images")
    return rows


def run(backbones, processor, samples, folder, **kwargs):
    args = arguments(GenerationArguments, folder, freeze=FROZEN, max_steps=4, **kwargs)
    model = tiny.build_model(backbones)
    trainer = GenerationTrainer(
        model=model, args=args, train_dataset=samples, eval_dataset=samples[:3], processing_class=processor
    )
    trainer.train()
    trainer.evaluate()
    return [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history if "train_loss" not in row]


def test_training_from_the_cache_is_training_without(backbones, processor, samples, tmp_path):
    without = run(backbones, processor, samples, tmp_path / "without")
    first = run(backbones, processor, samples, tmp_path / "first", view_cache=str(tmp_path / "cache"))
    assert first == pytest.approx(without, rel=1e-4)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 3  # two files, one of them shown by two samples, and the picture
    second = run(backbones, processor, samples, tmp_path / "second", view_cache=str(tmp_path / "cache"))
    assert second == first
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


def test_workers_read_the_cache_without_the_model(model, processor, samples, tmp_path):
    cache = ViewCache(tmp_path / "cache", model, processor.image_processor)
    cache.fill(samples)
    loader = torch.utils.data.DataLoader(
        CachedViews(samples, cache), num_workers=1, collate_fn=list, multiprocessing_context="spawn"
    )
    read = [row[0]["view_features"] for row in loader]
    assert [len(views) for views in read] == [1, 1, 2, 0, 1]
    direct = processor.image_processor(Image.open(samples[0]["images"][0]), return_tensors="pt")
    expected = model.model.get_view_features(direct["pixel_values"])[0]
    torch.testing.assert_close(read[0][0], expected)
    torch.testing.assert_close(read[2][0], expected)


def test_images_that_a_mixture_shows_later_are_encoded_when_their_epoch_begins(backbones, processor, samples, tmp_path):
    mixture = Mixture([samples[:1] * 4, samples[:2] + samples[4:]], weights=[4.0, 1.0], seed=1, stop="first_exhausted")
    seen = [{str(mixture[i]["images"]) for i in range(len(mixture)) if mixture.start_epoch(e) is None} for e in (0, 1)]
    assert not seen[1] <= seen[0]
    mixture.start_epoch(0)
    args = arguments(
        GenerationArguments,
        tmp_path,
        freeze=FROZEN,
        max_steps=-1,
        num_train_epochs=2,
        view_cache=str(tmp_path / "cache"),
        per_device_train_batch_size=2,
    )
    trainer = GenerationTrainer(
        model=tiny.build_model(backbones), args=args, train_dataset=mixture, processing_class=processor,
        callbacks=[MixtureEpochs()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 2


def test_ranks_share_the_work(model, processor, samples, tmp_path):
    cache = ViewCache(tmp_path / "cache", model, processor.image_processor)
    done = [cache.fill(samples, batch_size=1, rank=rank, ranks=2) for rank in range(2)]
    assert sum(done) == 3
    assert cache.fill(samples) == 0


def test_every_change_of_the_tower_has_another_key(backbones, processor):
    model, images = tiny.build_model(backbones), processor.image_processor
    keys = {tower_key(model, images)}
    assert keys == {tower_key(tiny.build_model(backbones), images)}
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[3] += 1e-7
    keys.add(tower_key(model, images))
    with torch.no_grad():
        model.model.merger.newline[0] += 1e-7
    keys.add(tower_key(model, images))
    keys.add(tower_key(model.bfloat16(), images))
    for change in ({"max_local_views": 1}, {"image_mean": [0.5, 0.4, 0.4]}, {"global_view": "canvas"}):
        other = type(images).from_dict({**images.to_dict(), **change})
        keys.add(tower_key(model, other))
    assert len(keys) == 7


def test_what_does_not_touch_the_views_keeps_the_key(backbones, processor):
    model = tiny.build_model(backbones)
    before = tower_key(model, processor.image_processor)
    with torch.no_grad():
        model.model.fuser.norm.weight.mul_(2)
        model.model.projector.weight.mul_(2)
    model.config.num_visual_tokens = 1
    assert tower_key(model, processor.image_processor) == before


def test_a_changed_file_is_not_found(model, processor, samples, tmp_path):
    cache = ViewCache(tmp_path / "cache", model, processor.image_processor)
    cache.fill(samples)
    path = samples[0]["images"][0]
    before = cache.load(path)
    tiny.picture(99, 30, 40).save(path)
    with pytest.raises(ValueError, match=r"0\.png: it is new or has changed"):
        cache.load(path)
    assert cache.fill(samples) == 1
    assert not torch.equal(cache.load(path), before)


def test_digests_follow_the_content(tmp_path):
    picture = tiny.picture(1)
    path = tmp_path / "a.png"
    picture.save(path)
    content = path.read_bytes()
    assert image_digest(path) == image_digest(str(path)) == image_digest(content)
    assert image_digest({"bytes": content, "path": "x"}) == image_digest({"bytes": None, "path": str(path)})
    assert image_digest(picture) == image_digest(picture.copy())
    assert image_digest(picture) != image_digest(picture.transpose(Image.Transpose.ROTATE_90))
    with pytest.raises(ValueError, match="download it first"):
        image_digest("https://example.com/a.png")
    with pytest.raises(ValueError, match=r"missing\.png"):
        image_digest(str(tmp_path / "missing.png"))


def test_a_killed_run_leaves_nothing_half_written(model, processor, samples, tmp_path):
    cache = ViewCache(tmp_path / "cache", model, processor.image_processor)
    cache.fill(samples)
    path = cache.path(samples[0]["images"][0])
    assert not list(cache.folder.rglob("*.partial"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged .*; delete it"):
        cache.load(samples[0]["images"][0])


def test_a_tower_that_learns_cannot_be_cached(backbones, processor, samples, tmp_path):
    args = arguments(GenerationArguments, tmp_path, view_cache=str(tmp_path), freeze=["model.vision_tower."])
    with pytest.raises(ValueError, match=r"parameters learn \(first model.merger"):
        GenerationTrainer(
            model=tiny.build_model(backbones), args=args, train_dataset=samples, processing_class=processor
        )


def test_streams_cannot_be_cached(backbones, processor, samples, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples)

    args = arguments(GenerationArguments, tmp_path, view_cache=str(tmp_path), freeze=FROZEN)
    with pytest.raises(ValueError, match="with a length, not a stream"):
        GenerationTrainer(
            model=tiny.build_model(backbones), args=args, train_dataset=Stream(), processing_class=processor
        )
