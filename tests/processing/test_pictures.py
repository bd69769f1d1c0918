"""The short way from pictures to views: equal to the long one bit by bit, in threads too; and what `exact=False` costs."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil, image_processing_fusedvlm_common
from fusedvlm.tests import tiny

BACKENDS = [FusedVLMImageProcessor, FusedVLMImageProcessorPil]
SIZES = [(640, 480), (97, 400), (300, 300), (20, 30), (1, 1), (200, 3), (24, 24), (48, 24), (900, 800)]
TILE = {"size": {"height": 48, "width": 48}, "max_local_views": 6}
OPTIONS = [
    {},
    {"max_local_views": 0},
    {"global_view": "canvas"},
    {"do_normalize": False},
    {"rescale_factor": 1 / 128.3},
    {"resample": 3},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]},
]


def the_long_way(backend, image, **options):
    """As arrays: canvas, normalization, tiles; what every picture went through before there was a short way."""
    processor = backend(**{**TILE, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_processing_fusedvlm_common, "as_picture", lambda _: None)
        return processor(np.asarray(image).transpose(2, 0, 1), return_tensors="pt")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_ways_give_the_same_bits(backend, options):
    for number, size in enumerate(SIZES):
        image = tiny.picture(number, *size)
        expected = the_long_way(backend, image, **options)
        processor = backend(**{**TILE, **options})
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for given in (image, pixels.numpy(), pixels):
            found = processor(given, return_tensors="pt")
            assert torch.equal(found["pixel_values"], expected["pixel_values"]), size
            assert torch.equal(found["image_num_views"], expected["image_num_views"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_in_threads_equals_one_picture_after_the_other(backend):
    images = [tiny.picture(number, *size) for number, size in enumerate(SIZES)]
    processor = backend(**TILE)
    alone = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    torch.set_num_threads(3)
    try:
        together = processor(images, return_tensors="pt")["pixel_values"]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, torch.cat(alone))


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("fusedvlm.processing.image_processing_fusedvlm_pictures._resized", fail)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            FusedVLMImageProcessor()(tiny.picture(0, 60, 40))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tensors_views_are_a_list_in_one_piece_of_memory(backend):
    views = backend(**TILE)([tiny.picture(0, 60, 40), tiny.picture(1, 30, 30)])["pixel_values"]
    assert isinstance(views, list)
    assert {view.shape for view in views} == {(3, 48, 48)}
    assert {type(view) for view in views} == {torch.Tensor if backend is FusedVLMImageProcessor else np.ndarray}


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_and_floats_mix(backend):
    picture, floats = tiny.picture(0, 60, 40), np.random.default_rng(0).random((30, 50, 3)).astype(np.float32) * 255
    views = backend(**TILE)([picture, floats], return_tensors="pt")["pixel_values"]
    alone = [backend(**TILE)(image, return_tensors="pt")["pixel_values"] for image in (picture, floats)]
    assert torch.equal(views, torch.cat(alone))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1900, 700), (500, 500)])
def test_tiles_that_need_not_be_exact_are_within_one_level(size):
    image = tiny.picture(3, *size)
    plain = {"do_normalize": False, "do_rescale": False, "size": {"height": 96, "width": 96}}
    exact = [backend(**plain)(image, return_tensors="pt")["pixel_values"] for backend in BACKENDS]
    rough = [backend(**plain, exact=False)(image, return_tensors="pt")["pixel_values"] for backend in BACKENDS]
    assert torch.equal(exact[0], exact[1])
    assert torch.equal(rough[0], rough[1])
    assert (exact[0][1:] - rough[0][1:]).abs().max() <= 1
    assert (exact[0][0] - rough[0][0]).abs().mean() < 2


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_the_levels_of_the_views(backend):
    image = tiny.picture(3, 90, 70)
    levels = backend(**TILE, do_normalize=False, do_rescale=False)(image, return_tensors="pt")["pixel_values"]
    found = backend(**TILE, uint8_views=True)(image, return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), levels)
    # A global view that is interpolated after normalization has no levels: the nearest ones.
    small = tiny.picture(3, 30, 30)
    levels = backend(**TILE, do_normalize=False, do_rescale=False)(small, return_tensors="pt")["pixel_values"]
    found = backend(**TILE, uint8_views=True)(small, return_tensors="pt")["pixel_values"]
    assert torch.equal(found.float(), levels.round().clamp(0, 255))
    assert not torch.equal(found.float(), levels)


@torch.no_grad()
def test_bytes_and_floats_give_the_same_answer(model, processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the image?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = tiny.picture(3, 90, 60)
    floats = processor(images=image, text=prompt, return_tensors="pt")
    levels = processor(images=image, text=prompt, return_tensors="pt", uint8_views=True)
    assert levels["pixel_values"].dtype == torch.uint8
    with pytest.raises(ValueError, match="does not know how to normalize them: call read_uint8_views"):
        model(**levels)
    model.read_uint8_views(processor.image_processor)
    try:
        assert torch.equal(model(**levels).logits, model(**floats).logits)
        for dtype in (torch.int64, torch.int16):
            with pytest.raises(ValueError, match="give normalized floats, or uint8"):
                model(**{**levels, "pixel_values": levels["pixel_values"].to(dtype)})
        with pytest.raises(ValueError, match=r"processor\.image_processor"):
            model.read_uint8_views(processor)
    finally:
        model.model._uint8_scale = None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_of_what_has_none_are_refused(backend):
    floats = np.random.default_rng(0).random((30, 50, 3)).astype(np.float32) * 255
    with pytest.raises(ValueError, match="uint8_views needs pictures of 8 bits"):
        backend(uint8_views=True)(floats)
    with pytest.raises(ValueError, match="uint8_views needs pictures of 8 bits"):
        backend(uint8_views=True, do_resize=False)(Image.new("RGB", (336, 336)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_write_the_same_views_in_inference_mode_too(backend, mode):
    """Inference mode is a thread's own; `VisualChat` preprocesses inside it, on as many threads as torch has."""
    images = [tiny.picture(1), tiny.picture(2)]
    alone = backend(**TILE)(images, return_tensors="pt")["pixel_values"]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with mode():
            found = backend(**TILE)(images, return_tensors="pt")["pixel_values"]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, alone)
