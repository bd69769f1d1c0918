"""Bytes that claim to be a picture: whole, damaged, spliced, cut, with odd metadata."""

from pathlib import Path

import numpy as np
import pytest

from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.tests.fuzz.harness import Target, damaged_bytes, explore, judge


def read_picture(case: bytes, folder: Path) -> None:
    """From a file and from bytes the same upright RGB picture."""
    path = folder / "photo.jpg"
    path.write_bytes(case)
    picture = load_image(path)
    assert picture.mode == "RGB"
    assert picture.width >= 1
    assert picture.height >= 1
    pixels = np.asarray(picture)
    assert pixels.shape == (picture.height, picture.width, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(np.asarray(load_image(case)), pixels)


TARGET = Target("images", read_picture, ("photo.jpg", "image bytes"), lambda seeds: damaged_bytes(seeds))


@pytest.mark.filterwarnings("ignore")  # Pillow speaks of corrupt metadata
@pytest.mark.parametrize("path", TARGET.corpus(), ids=lambda path: path.name)
def test_the_corpus(path, tmp_path):
    kind = judge(TARGET, path.read_bytes(), tmp_path)
    assert kind == "clean" or not path.name.startswith("seed-")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(0)
def test_damaged_pictures(tmp_path):
    seen = explore(TARGET, tmp_path)
    assert seen["clean"]
    assert seen["refused"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", [path for path in TARGET.corpus() if path.name.startswith("seed-")], ids=lambda p: p.name
)
def test_a_cut_file_is_the_whole_picture_or_refused(path):
    data = path.read_bytes()
    whole = np.asarray(load_image(data))
    for cut in np.unique(np.linspace(1, len(data) - 1, 60).astype(int)):
        try:
            picture = np.asarray(load_image(data[:cut]))
        except ValueError:
            continue
        assert np.array_equal(picture, whole), cut
