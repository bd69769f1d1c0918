"""Levels and tiles by hand: what nine equal tiles or bright pictures would not show."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusedvlm.processing.image_processing_fusedvlm_arrays import to_usable_array
from fusedvlm.processing.image_processing_fusedvlm_common import cut_tiles
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    levels = np.array([[0, 128, 255]], dtype=np.uint16)  # of 65,535
    assert np.asarray(load_image(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_truth_values_are_black_and_white(wrap):
    values = np.zeros((3, 2, 2), dtype=bool)
    values[:, 0, 1] = True
    assert np.asarray(to_usable_array(wrap(values)))[0].tolist() == [[0, 255], [0, 0]]


def test_tiles_are_numbered_row_by_row():
    size, rows, columns = 2, 2, 3
    canvas = torch.zeros(3, rows * size, columns * size)
    for row in range(rows):
        for column in range(columns):
            canvas[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = row * columns + column
    assert [tile.unique().tolist() for tile in cut_tiles(canvas, size)] == [
        [number] for number in range(rows * columns)
    ]
